"""`--accumulate`: the same gradients, of which less was kept in memory until they were computed."""
import argparse

import pytest
import torch
from torch import nn

from common import memory
from tests.states import assert_same
from tests.test_stackgan_v1_model import batch_of as stackgan_v1_batch
from tests.test_stackgan_v1_model import new_model as stackgan_v1_model
from tests.test_stackgan_v2_model import batch_of as stackgan_v2_batch
from tests.test_stackgan_v2_model import new_model as stackgan_v2_model

pytestmark = pytest.mark.usefixtures('one_thread')

CHAPTERS = ['stackgan_v1', 'stackgan_v2', 'without text']


def case(chapter, accumulate, size=4):
    """(a small model, its discriminators, a batch for it)."""
    torch.manual_seed(7)
    if chapter == 'stackgan_v1':
        batch, model = stackgan_v1_batch(2, size), stackgan_v1_model(2)
        netsD = [model.netD]
    else:
        text = chapter == 'stackgan_v2'
        batch, model = stackgan_v2_batch(2, size, text), stackgan_v2_model(conditional=text)
        netsD = model.netsD
    memory.prepare(argparse.Namespace(accumulate=accumulate), model.netG, *netsD)
    return model, netsD, batch


def without_batch_statistics(nets):
    """Let discriminators judge every picture by itself, so that parts of a batch are judged as the whole is."""
    for layer in {layer for net in nets for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)}:
        layer.register_forward_pre_hook(lambda layer, _: layer.eval() and None)


@pytest.mark.parametrize('chapter', CHAPTERS)
def test_parts_give_the_gradient_of_the_batch(chapter):
    found = []
    for accumulate in (1, 3):  # of four pictures: parts of two
        model, netsD, batch = case(chapter, accumulate)
        without_batch_statistics(netsD)
        torch.manual_seed(3)
        model.train_step(batch)
        found.append({f'{i}.{name}': value for i, net in enumerate((model.netG, *netsD)) for name, value in
                      [(name, one.grad) for name, one in net.named_parameters()] + list(net.named_buffers())})
    whole, parts = found
    assert {name for name, value in whole.items() if value is None} == {
        name for name, value in parts.items() if value is None} < set(whole)
    # Running statistics are among them: what is computed twice counts once.
    torch.testing.assert_close(*({name: value for name, value in one.items() if value is not None} for one in found),
                               rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('chapter', CHAPTERS)
def test_discriminators_see_parts_and_computations_are_repeated(chapter):
    model, netsD, batch = case(chapter, 2, size=5)
    seen = []
    next(netsD[0].children()).register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    model.train_step(batch)
    passes = {'stackgan_v1': 3, 'stackgan_v2': 4, 'without text': 3}[chapter]
    assert sorted(seen) == sorted(2 * passes * [3, 2])


@pytest.mark.parametrize('chapter', CHAPTERS)
def test_less_is_kept(chapter):
    def bytes_kept(accumulate):
        model, _, batch = case(chapter, accumulate)
        inputs, sizes = [torch.randn(4, 5), batch.get('right_embed')], []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            model.netG(*reversed(inputs) if chapter == 'stackgan_v1' else inputs)
        return sum(sizes)

    assert 0 < 3 * bytes_kept(2) < bytes_kept(1)


def test_nothing_changes_without_it():
    model, netsD, _ = case('stackgan_v2', 1)
    assert not any('forward' in vars(module) for net in (model.netG, *netsD) for module in net.modules())


def test_drawing_is_the_same():
    embed = torch.randn(3, 1024)
    one, other = (case('stackgan_v2', accumulate)[0].generate(embed) for accumulate in (1, 2))
    assert_same(dict(enumerate(one)), dict(enumerate(other)))
