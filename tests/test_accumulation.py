"""`--accumulate`: the same gradients with fewer activations in memory."""
import contextlib
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from common import speed
from common.flags import ROOT
from common.speed import precision
from common.speed.accumulation import Recomputed
from tests.errors import one_line
from tests.states import assert_same
from tests.test_stackgan_v1_model import batch_of as stackgan_v1_batch
from tests.test_stackgan_v1_model import new_model as stackgan_v1_model
from tests.test_stackgan_v2_model import batch_of as stackgan_v2_batch
from tests.test_stackgan_v2_model import new_model as stackgan_v2_model

pytestmark = pytest.mark.usefixtures('one_thread')

CPU = torch.device('cpu')
CHAPTERS = ['stackgan_v1', 'stackgan_v2', 'without text']


def case(chapter, accumulate=1, size=4):
    """Return (small model, its discriminators, a batch for it)."""
    torch.manual_seed(7)
    if chapter == 'stackgan_v1':
        batch, model = stackgan_v1_batch(2, size), stackgan_v1_model(2)
        netsD = [model.netD]
    else:
        text = chapter == 'stackgan_v2'
        batch, model = stackgan_v2_batch(2, size, text), stackgan_v2_model(conditional=text)
        netsD = model.netsD
    if accumulate > 1:
        prepare(model, netsD, accumulate=accumulate, batch_size=size)
    return model, netsD, batch


def prepare(model, netsD, heads=(), **more):
    """Call `speed.prepare` with everything switched off except for `more`."""
    speed.prepare(model.netG, netsD, heads, **{'device': CPU, 'precision': 'fp32', 'compile': False, 'batch_size': 4,
                                               **more})


def without_batch_statistics(nets):
    """Remove batch statistics from discriminators, so that parts of a batch give the same outputs as the whole."""
    for layer in {layer for net in nets for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)}:
        layer.register_forward_pre_hook(lambda layer, _: layer.eval() and None)


@pytest.fixture
def float64():
    """Compute in float64: in float32, rounding depends on the CPU and on the size of a part."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def noting(gradients):
    """Record in a dict the gradient of every parameter when an optimizer takes a step."""
    def note(optimizer, *_):
        gradients.update({parameter: parameter.grad.clone() for group in optimizer.param_groups
                          for parameter in group['params'] if parameter.grad is not None})

    handle = register_optimizer_step_pre_hook(note)
    yield
    handle.remove()


@pytest.mark.parametrize('chapter', CHAPTERS)
def test_gradients_of_parts_equal_those_of_the_batch(chapter, float64):
    found = []
    for accumulate in (1, 3):  # of four images: parts of two
        model, netsD, batch = case(chapter, accumulate)
        without_batch_statistics(netsD)
        torch.manual_seed(3)
        gradients = {}
        with noting(gradients):
            model.train_step(batch)
        names = {parameter: f'{i}.{name}' for i, net in enumerate((model.netG, *netsD))
                 for name, parameter in net.named_parameters()}
        assert len(gradients) > len(netsD) and set(gradients) <= set(names)
        # Running statistics are among them: what is computed twice counts once.
        found.append({names[parameter]: value for parameter, value in gradients.items()}
                     | {f'{i}.{name}': value for i, net in enumerate((model.netG, *netsD))
                        for name, value in net.named_buffers()})
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('chapter', CHAPTERS)
def test_discriminators_read_parts_and_activations_are_recomputed(chapter):
    model, netsD, batch = case(chapter, 2, size=5)
    seen = []
    first_layer = next(netsD[0].children())[0]
    first_layer.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    model.train_step(batch)
    passes = {'stackgan_v1': 3, 'stackgan_v2': 4, 'without text': 3}[chapter]
    assert sorted(seen) == sorted(2 * passes * [3, 2])
    assert next(count for name, count in netsD[0].named_buffers() if name.endswith('num_batches_tracked')) == 2 * passes


@pytest.mark.parametrize('chapter', CHAPTERS)
def test_fewer_activations_are_kept(chapter):
    def bytes_kept(accumulate):
        model, _, batch = case(chapter, accumulate)
        inputs, sizes = [torch.randn(4, 5), batch.get('right_embed')], []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            model.netG(*reversed(inputs) if chapter == 'stackgan_v1' else inputs)
        return sum(sizes)

    assert 0 < 3 * bytes_kept(2) < bytes_kept(1)


def test_accumulation_works_with_bf16(monkeypatch):
    monkeypatch.setattr(precision, 'cpu_flags', lambda: {'avx512_bf16'})
    found = []
    for accumulate in (1, 2):
        model, netsD, batch = case('stackgan_v2')
        without_batch_statistics(netsD)
        prepare(model, netsD, precision='bf16', accumulate=accumulate)
        torch.manual_seed(3)
        gradients = {}
        with noting(gradients):
            losses = model.train_step(batch)
        found.append((torch.stack([*losses['loss_D'], losses['loss_G']]), torch.cat(
            [gradients[parameter].flatten() for parameter in model.netG.parameters()])))
    (losses, gradient), (others, other) = found
    torch.testing.assert_close(others, losses, rtol=.02, atol=.02)
    assert torch.nn.functional.cosine_similarity(gradient, other, dim=0) > .99


def test_accumulate_1_changes_nothing():
    model, netsD, _ = case('stackgan_v2')
    prepare(model, netsD)
    layers = [layer for net in (model.netG, *netsD) for layer in net.modules()]
    assert not any('forward' in vars(layer) or layer._forward_pre_hooks or isinstance(layer, Recomputed)
                   for layer in layers)


@pytest.mark.parametrize('chapter', CHAPTERS)
def test_names_and_parameters_are_unchanged(chapter):
    model, netsD, _ = case(chapter)
    before = [list(net.state_dict(keep_vars=True).items()) for net in (model.netG, *netsD)]
    prepare(model, netsD, precision='bf16' if precision.has_bf16(CPU) else 'fp32', accumulate=2)
    after = [list(net.state_dict(keep_vars=True).items()) for net in (model.netG, *netsD)]
    for one, other in zip(before, after, strict=True):
        assert [name for name, _ in one] == [name for name, _ in other]
        assert all(value is same for (_, value), (_, same) in zip(one, other))


def test_more_parts_than_images_are_an_error():
    model, netsD, _ = case('stackgan_v2')
    assert '--accumulate 5: more parts than images; with --batch_size 4 give 4 or less' in one_line(
        lambda: prepare(model, netsD, accumulate=5))


def test_generated_images_are_the_same():
    embed = torch.randn(3, 1024)
    images = []
    for accumulate in (1, 2):
        model, netsD, _ = case('stackgan_v2')
        prepare(model, netsD, accumulate=accumulate)
        images.append(dict(enumerate(model.generate(embed))))
    assert_same(*images)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='other C libraries have their own ways')
@pytest.mark.parametrize('accumulate, bits', [(1, 28), (2, 24)])
def test_freed_memory_is_kept_unless_memory_is_short(accumulate, bits):
    """By default, glibc returns tensors of 2 ** 28 bytes to the system, and soon keeps those of 2 ** 24."""
    script = f"""
import resource, torch
from common import speed

def pages_a_tensor():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2 ** {bits - 2})
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (2 ** {bits} / resource.getpagesize())

print(pages_a_tensor())
net = torch.nn.Sequential()
speed.prepare(net, [net], device=torch.device('cpu'), precision='fp32', compile=False, accumulate={accumulate},
              batch_size=4)
print([pages_a_tensor() for _ in range(20)][-1])
"""
    before, _, after = subprocess.check_output([sys.executable, '-c', script], cwd=ROOT, text=True).splitlines()
    assert (float(after) > float(before) / 2) == (accumulate > 1)
