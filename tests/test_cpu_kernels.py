"""Convolutions that are computed in another way on CPUs, with the same results."""
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import speed
from common.speed import cpu_kernels
from common.speed.cpu_kernels import DoubledConv, ProductConv, ProductConvTranspose, ProductOfHalves
from stackgan_v1 import gan as stackgan_v1
from stackgan_v2 import gan as stackgan_v2


def arranged(layers):
    """Return a copy of `layers`, arranged for a CPU."""
    copied = nn.Sequential(copy.deepcopy(layers))  # a layer that is replaced has to have a parent
    speed.arrange(copied, torch.device('cpu'))
    return copied[0]


@pytest.mark.parametrize('weights_per_position', [0, cpu_kernels.WEIGHTS_PER_POSITION])  # with and without a product
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('upsample', [stackgan_v1.upsample, stackgan_v2.upsample])
def test_doubled_convs_compute_the_same(upsample, dtype, weights_per_position, monkeypatch):
    monkeypatch.setattr(cpu_kernels, 'WEIGHTS_PER_POSITION', weights_per_position)
    torch.manual_seed(0)
    plain = upsample(5, 4).to(dtype)
    shared = arranged(plain)
    features = torch.randn(2, 5, 6, 7, dtype=dtype, requires_grad=True)
    results = []
    for layers in (plain, shared):
        seen = []
        layers[1].register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(inputs[0].shape))
        found = layers(features)
        gradients = torch.autograd.grad(found.square().sum(), [features, *layers.parameters()])
        results.append([found, *gradients, *layers.buffers()])
        assert seen == [(2, 5, 6, 7) if layers is shared else (2, 5, 12, 14)]
    assert results[0][0].shape == (2, 4, 12, 14) and list(plain.state_dict()) == list(shared.state_dict())
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('weights_per_position', [0, cpu_kernels.WEIGHTS_PER_POSITION])
def test_summed_weights_are_rounded_once_in_bf16(weights_per_position, monkeypatch):
    monkeypatch.setattr(cpu_kernels, 'WEIGHTS_PER_POSITION', weights_per_position)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(1, 1, 3, padding=1, bias=False))
    nn.init.zeros_(plain[1].weight)
    with torch.no_grad():
        plain[1].weight[0, 0, 0, :2] = torch.tensor([1 + 2 ** -8, -1])  # as bfloat16, the first is 1
    features = torch.ones(1, 1, 4, 4)
    with torch.autocast('cpu', torch.bfloat16):
        found = arranged(plain)(features)
    assert found.dtype == torch.bfloat16 and plain(features)[0, 0, 3, 3] == 2 ** -8
    assert torch.equal(found[..., 1::2].float(), plain(features)[..., 1::2])  # there, the two meet one number


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
@pytest.mark.parametrize('size', [1, 2])
@pytest.mark.parametrize('conv', [nn.Conv2d(6, 9, 4, stride=2, padding=1, bias=False),
                                  nn.Conv2d(6, 9, 3, padding=1),
                                  nn.Conv2d(6, 9, 3, padding=(0, 1), stride=(2, 1), bias=False),
                                  nn.ConvTranspose2d(6, 9, 4, stride=2, padding=1, bias=False),
                                  nn.ConvTranspose2d(6, 9, 4, bias=False),
                                  nn.ConvTranspose2d(6, 9, (3, 2), padding=(1, 0), stride=(2, 3), bias=False)])
def test_convolutions_with_many_weights_per_location_become_matrix_products(conv, dtype, size, monkeypatch):
    torch.manual_seed(0)
    plain = conv.to(torch.float64).to(dtype)
    product = arranged(plain)
    features = torch.randn(size, 6, 8, 5).to(dtype).requires_grad_()
    own_way, results = count_convolutions(monkeypatch, type(conv)), []
    monkeypatch.setattr(cpu_kernels, 'WEIGHTS_PER_POSITION', 0)
    for layer in (plain, product):
        found = layer(features)
        assert found.dtype == dtype
        results.append([found, *torch.autograd.grad(found.square().sum(), [features, *layer.parameters()])])
    assert len(own_way) == 1 and isinstance(product, (ProductConv, ProductConvTranspose))  # that of `plain`
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, **({'rtol': 0.02, 'atol': 0.2} if dtype == torch.bfloat16 else {}))


def count_convolutions(monkeypatch, kind=nn.Conv2d):
    """Return a list to which the shape of the map is added in each call of PyTorch's convolution."""
    name = 'conv2d' if kind is nn.Conv2d else 'conv_transpose2d'
    found, convolve = [], getattr(F, name)
    monkeypatch.setattr(F, name, lambda features, *args, **named: (
        found.append(tuple(features.shape[2:])) or convolve(features, *args, **named)))
    return found


@pytest.mark.parametrize('kind', [nn.Conv2d, nn.ConvTranspose2d])
def test_convolutions_with_few_weights_per_location_stay_with_pytorch(kind, monkeypatch):
    conv = arranged(kind(64, 64, 4, stride=2, padding=1, bias=False))  # 2 ** 16 weights
    own_way = count_convolutions(monkeypatch, kind)
    small, large = ((4, 4), (6, 4)) if kind is nn.Conv2d else ((2, 2), (3, 2))
    for shape in (small, large):
        conv(torch.randn(2, 64, *shape))  # small: 4 positions in the smaller map, and 2 ** 14 weights for each
    assert own_way == [large]


def test_a_convolution_with_a_single_position_is_a_product(monkeypatch):
    """PyTorch 2.14 gets it wrong on some CPUs, with 16 or 24 channels in bf16 and channels last."""
    conv = nn.Conv2d(16, 1, 4, stride=4)
    features = torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last)
    exact, own_way = conv(features), count_convolutions(monkeypatch)
    with torch.autocast('cpu', torch.bfloat16):
        found = arranged(conv)(features)
    assert not own_way
    torch.testing.assert_close(found, exact.bfloat16(), rtol=.02, atol=.02)


@pytest.mark.parametrize('shape', [(3, 8), (3, 8, 4, 4)])
def test_gated_layers_compute_the_same_with_gradients_in_the_memory_format_of_the_input(shape):
    plain, results = nn.GLU(dim=1), []
    product = arranged(plain)
    assert isinstance(product, ProductOfHalves) and isinstance(arranged(nn.GLU()), nn.GLU)
    features = torch.randn(shape)
    if len(shape) == 4:
        features = features.to(memory_format=torch.channels_last)
    features.requires_grad_()
    for layer in (plain, product):
        found = layer(features)
        gradient, = torch.autograd.grad(found.square().sum(), [features])
        results.append([found, gradient])
        if len(shape) == 4:
            assert gradient.is_contiguous(memory_format=torch.channels_last) is (layer is product)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one)


OTHERS = [nn.Conv2d(4, 4, 3, padding=1, bias=False, groups=2), nn.Conv2d(4, 4, 3, padding=2, bias=False, dilation=2),
          nn.Conv2d(4, 4, 3, padding=1, bias=False, padding_mode='reflect'), nn.Conv2d(4, 4, 3, padding='same'),
          nn.ConvTranspose2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3, bias=False, stride=2, output_padding=1)]


@pytest.mark.parametrize('conv', OTHERS)
def test_other_kinds_of_convolutions_are_unchanged(conv):
    layers = nn.Sequential(nn.Upsample(scale_factor=2), conv)
    assert type(arranged(layers)[1]) is type(conv)


@pytest.mark.parametrize('upsample, conv', [
    (nn.Upsample(scale_factor=3), nn.Conv2d(4, 4, 3, padding=1, bias=False)),
    (nn.Upsample(scale_factor=2, mode='bilinear'), nn.Conv2d(4, 4, 3, padding=1, bias=False)),
    (nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1)),
    (nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 5, padding=2, bias=False))])
def test_other_upsampling_is_unchanged(upsample, conv):
    layers = nn.Sequential(upsample, conv)
    features = torch.randn(1, 4, 4, 4)
    assert not isinstance(arranged(layers)[1], DoubledConv)
    torch.testing.assert_close(arranged(layers)(features), layers(features))


@pytest.mark.parametrize('weights_per_position', [0, cpu_kernels.WEIGHTS_PER_POSITION])
@pytest.mark.parametrize('layers', [stackgan_v1.upsample(2, 2),
                                    nn.Sequential(nn.Identity(), nn.ConvTranspose2d(2, 2, 4, bias=False))])
def test_copies_have_their_own_weights(layers, weights_per_position, monkeypatch):
    monkeypatch.setattr(cpu_kernels, 'WEIGHTS_PER_POSITION', weights_per_position)
    net = arranged(layers).eval()
    features = torch.randn(1, 2, 4, 4)
    before = net(features)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(features), before)
        nn.init.zeros_(other[1].weight)
        assert torch.equal(net(features), before) and not torch.equal(other(features), before)


def test_gpus_use_pytorch_layers_in_channels_last():
    net = stackgan_v1.upsample(2, 2)
    speed.arrange(net, torch.device('cuda'))
    assert type(net[0]) is nn.Upsample and type(net[1]) is nn.Conv2d
    assert net[1].weight.is_contiguous(memory_format=torch.channels_last)
