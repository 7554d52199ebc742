"""Networks whose convolutions are computed in another way, with the same results."""
import copy

import pytest
import torch
from torch import nn

from common.convolutions import make_fast, share_products
from stackgan_v1 import gan as stackgan_v1
from stackgan_v2 import gan as stackgan_v2


@pytest.mark.parametrize('upsample', [stackgan_v1.upsample, stackgan_v2.upsample])
def test_shared_products_give_the_same(upsample):
    torch.manual_seed(0)
    plain = upsample(5, 4)
    shared = share_products(copy.deepcopy(plain))
    features = torch.randn(2, 5, 6, 7, requires_grad=True)
    results = []
    for layers in (plain, shared):
        products = []
        layers[1].register_forward_hook(lambda _, inputs, __, products=products: products.append(inputs[0].shape))
        found = layers(features)
        gradients = torch.autograd.grad(found.square().sum(), [features, *layers.parameters()])
        results.append([found, *gradients, *layers.buffers()])
        assert products == [(2, 5, 6, 7) if layers is shared else (2, 5, 12, 14)]
    assert results[0][0].shape == (2, 4, 12, 14)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_a_copy_has_weights_of_its_own():
    net = share_products(stackgan_v1.upsample(2, 2)).eval()
    features = torch.randn(1, 2, 4, 4)
    before = net(features)
    other = copy.deepcopy(net)
    nn.init.zeros_(other[1].weight)
    assert torch.equal(net(features), before) and not torch.equal(other(features), before)


def test_gpus_convolve_as_the_network_says():
    net = make_fast(stackgan_v1.upsample(2, 2), 'cuda')
    assert not any('forward' in vars(layer) for layer in net)
    assert net[1].weight.is_contiguous(memory_format=torch.channels_last)
