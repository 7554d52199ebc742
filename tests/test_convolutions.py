"""Networks whose convolutions are computed in another way, with the same results."""
import copy
import pickle

import pytest
import torch
from torch import nn

from common.convolutions import make_fast, share_products
from stackgan_v1 import gan as stackgan_v1
from stackgan_v2 import gan as stackgan_v2


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('upsample', [stackgan_v1.upsample, stackgan_v2.upsample])
def test_shared_products_give_the_same(upsample, dtype):
    torch.manual_seed(0)
    plain = upsample(5, 4).to(dtype)
    shared = share_products(copy.deepcopy(plain))
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


def test_elsewhere_networks_are_computed_as_they_are_written():
    """Wherever they were made: a Stage-I of the CPU becomes part of a Stage-II on a GPU."""
    _, plain = torch.manual_seed(0), stackgan_v1.upsample(5, 4)
    shared = share_products(copy.deepcopy(plain))
    shown = []
    shared[1].register_forward_hook(lambda _, inputs, __: shown.append(inputs[0].shape))
    features = torch.randn(2, 5, 6, 7)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(plain(features), shared(features))
    assert shared.to('meta')(features.to('meta')).shape == (2, 4, 12, 14)
    assert shown == 2 * [(2, 5, 12, 14)]


def test_copies_have_weights_of_their_own():
    net = share_products(stackgan_v1.upsample(2, 2)).eval()
    features = torch.randn(1, 2, 4, 4)
    before = net(features)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(features), before)
        nn.init.zeros_(other[1].weight)
        assert torch.equal(net(features), before) and not torch.equal(other(features), before)


def test_gpus_have_channels_last():
    net = make_fast(stackgan_v1.upsample(2, 2), 'cuda')
    assert net[1].weight.is_contiguous(memory_format=torch.channels_last)
