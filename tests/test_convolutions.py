"""Networks whose convolutions are computed in another way, with the same results."""
import copy
import pickle

import pytest
import torch
from torch import nn

from common import convolutions
from common.convolutions import ProductConv, make_fast, rewrite
from stackgan_v1 import gan as stackgan_v1
from stackgan_v2 import gan as stackgan_v2


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('upsample', [stackgan_v1.upsample, stackgan_v2.upsample])
def test_shared_products_give_the_same(upsample, dtype):
    torch.manual_seed(0)
    plain = upsample(5, 4).to(dtype)
    shared = rewrite(copy.deepcopy(plain))
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


def test_sums_of_weights_are_rounded_once_in_bf16():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(1, 1, 3, padding=1, bias=False))
    nn.init.zeros_(plain[1].weight)
    with torch.no_grad():
        plain[1].weight[0, 0, 0, :2] = torch.tensor([1 + 2 ** -8, -1])  # as bfloat16, the first is 1
    features = torch.ones(1, 1, 4, 4)
    with torch.autocast('cpu', torch.bfloat16):
        found = rewrite(copy.deepcopy(plain))(features)
    assert found.dtype == torch.bfloat16 and plain(features)[0, 0, 3, 3] == 2 ** -8
    assert torch.equal(found[..., 1::2].float(), plain(features)[..., 1::2])  # there, the two meet one number


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
@pytest.mark.parametrize('conv', [nn.Conv2d(6, 9, 4, stride=2, padding=1, bias=False),
                                  nn.Conv2d(6, 9, 3, padding=1),
                                  nn.Conv2d(6, 9, 3, padding=(0, 1), stride=(2, 1), bias=False)])
def test_many_weights_for_few_places_are_a_product_of_matrices(conv, dtype, monkeypatch):
    torch.manual_seed(0)
    plain, product = conv.to(torch.float64), rewrite(copy.deepcopy(conv.to(torch.float64)))
    plain, product = plain.to(dtype), product.to(dtype)
    features = torch.randn(2, 6, 8, 5).to(dtype).requires_grad_()
    own_way, results = [], []
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, 'forward', lambda self, x: own_way.append(self) or forward(self, x))
    monkeypatch.setattr(convolutions, 'WEIGHTS_PER_PLACE', 0)
    for layer in (plain, product):
        found = layer(features)
        assert found.dtype == dtype
        results.append([found, *torch.autograd.grad(found.square().sum(), [features, *layer.parameters()])])
    assert own_way == [plain] and isinstance(product, ProductConv)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, **({'rtol': 0.02, 'atol': 0.2} if dtype == torch.bfloat16 else {}))


def test_few_weights_or_many_places_are_left_to_pytorch(monkeypatch):
    conv = rewrite(nn.Conv2d(64, 64, 4, stride=2, padding=1, bias=False))  # 2 ** 16 weights
    own_way, forward = [], nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, 'forward', lambda self, x: own_way.append(len(x)) or forward(self, x))
    for batch in (1, 2):
        conv(torch.randn(batch, 64, 4, 4))  # 4 places each: in a batch of one, 2 ** 14 weights for every place
    assert own_way == [2]


def test_elsewhere_networks_are_computed_as_they_are_written():
    """Wherever they were made: a Stage-I of the CPU becomes part of a Stage-II on a GPU."""
    upsample, conv = stackgan_v1.upsample(5, 4), nn.Conv2d(128, 128, 4, stride=2, padding=1, bias=False)
    rewrite(nn.ModuleList([upsample, conv])).to('meta')
    shown = []
    for layer in (upsample[1], conv):
        layer.register_forward_hook(lambda _, inputs, __: shown.append(inputs[0].shape))
    assert upsample(torch.empty(2, 5, 6, 7, device='meta')).shape == (2, 4, 12, 14)
    assert shown == [(2, 5, 12, 14)]
    assert conv(torch.empty(1, 128, 4, 4, device='meta')).is_contiguous()  # a product's result has channels last


def test_copies_have_weights_of_their_own():
    net = rewrite(stackgan_v1.upsample(2, 2)).eval()
    features = torch.randn(1, 2, 4, 4)
    before = net(features)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(features), before)
        nn.init.zeros_(other[1].weight)
        assert torch.equal(net(features), before) and not torch.equal(other(features), before)


def test_gpus_have_channels_last():
    net = make_fast(stackgan_v1.upsample(2, 2), 'cuda')
    assert net[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert make_fast(net, 'cpu')[1].weight.is_contiguous()
