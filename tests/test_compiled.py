"""`--compile`: what it chooses, and that compiled networks train as others do."""
import argparse
import os

import pytest
import torch

from common import compiled
from tests.errors import one_line
from tests.test_stackgan_v1_model import batch_of, new_model

pytestmark = pytest.mark.usefixtures('one_thread')

CPU = torch.device('cpu')
PYTORCHS = torch.compile


def test_auto_never_compiles_for_a_cpu():
    parser = argparse.ArgumentParser()
    compiled.add_compile_flag(parser)
    typed = [parser.parse_args(args).compile for args in ([], ['--compile'], ['--compile', 'no'])]
    assert typed == ['auto', True, False]
    assert not compiled.choose('auto', CPU) and not compiled.choose(False, CPU)


def test_what_is_missing_is_said_in_a_line(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError('No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1 for ...')

    monkeypatch.setattr(torch, 'compile', fail)
    assert '(No working C++ compiler found); it takes a C++ compiler' in one_line(compiled.choose, True, CPU)
    assert not compiled.choose('auto', torch.device('cuda'))
    assert capsys.readouterr().out.count('\n') == 1


def test_what_is_computed_again_is_not_compiled():
    options = argparse.Namespace(compile='auto', accumulate=2)
    compiled.prepare(options, torch.device('cuda'))
    assert options.compile is False
    options.compile = True
    assert '--compile True and --accumulate' in one_line(compiled.prepare, options, CPU)


def compile_with(backend):
    """`torch.compile`, but for 'aot_eager' without the code for this processor, which takes minutes to build."""
    if backend == 'inductor':
        return PYTORCHS
    return lambda function, options, dynamic=None: PYTORCHS(function, dynamic=dynamic, backend=backend)


@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.skipif(
    'SLOW_TESTS' not in os.environ, reason='takes more than a minute; SLOW_TESTS=1 runs it'))])
def test_compiled_networks_train_as_others_do(backend, monkeypatch):
    monkeypatch.setattr(torch, 'compile', compile_with(backend))
    losses, models, drawn = {}, {}, []
    for asked in (False, True):
        model, options = new_model(1), argparse.Namespace(compile=asked)
        torch.manual_seed(7)
        batch = batch_of(1)
        compiled.prepare(options, CPU, model.netG, model.netD, model.netD.get_cond_logits)
        assert options.compile == asked
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(5)  # noise and conditions are the same, too
        losses[asked] = [list(model.train_step(batch).values()) for _ in range(3)]
        frames = dict(torch._dynamo.utils.counters['frames'])
        assert bool(frames) == asked and not torch._dynamo.utils.counters['graph_break']
        drawn.append(model.generate(batch['right_embed'])[0])
        assert dict(torch._dynamo.utils.counters['frames']) == frames  # drawing is not compiled
        models[asked] = model
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-4)
    for net in ('netG', 'netD'):
        assert getattr(models[True], net).state_dict().keys() == getattr(models[False], net).state_dict().keys()
