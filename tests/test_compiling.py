"""`--compile`: what it selects, and that compiled networks train like uncompiled ones."""
import os

import pytest
import torch

from common import flags, ranks
from common.speed import compiling, cpu_kernels, precision
from tests.errors import one_line
from tests.test_accumulation import case, prepare

pytestmark = pytest.mark.usefixtures('one_thread')

CPU = torch.device('cpu')
PYTORCHS = torch.compile
slow = pytest.mark.skipif('SLOW_TESTS' not in os.environ, reason='compiles for this CPU; SLOW_TESTS=1 runs it')


def test_auto_never_compiles_for_a_cpu():
    parser = flags.Parser()
    flags.add_compile_flag(parser)
    typed = [parser.parse_args(args).compile for args in ([], ['--compile'], ['--compile', 'no'])]
    assert typed == ['auto', True, False]
    assert not compiling.can_compile('auto', CPU) and not compiling.can_compile(False, CPU)


def test_auto_compiles_for_one_gpu(monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda *_, **__: torch.Tensor.clone)
    monkeypatch.setattr(torch, 'zeros', lambda *_, device: torch.ones(2))
    assert compiling.can_compile('auto', torch.device('cuda'))
    monkeypatch.setattr(ranks, 'world_size', lambda: 2)
    assert not compiling.can_compile('auto', torch.device('cuda'))


def test_pytorch_knows_the_compile_options():
    """PyTorch checks the options at once, but compiles only when the function is called."""
    assert callable(torch.compile(torch.neg, **compiling.SETTINGS))
    with pytest.raises(RuntimeError, match='no_such_option'):
        torch.compile(torch.neg, options={'no_such_option': True})


@slow
def test_can_compile_tries_to_compile():
    assert compiling.can_compile(True, CPU)


def test_a_missing_compiler_is_reported_in_one_line(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError('No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1 for ...')

    monkeypatch.setattr(torch, 'compile', fail)
    assert '(No working C++ compiler found); it takes a C++ compiler' in one_line(compiling.can_compile, True, CPU)
    assert not compiling.can_compile('auto', torch.device('cuda'))
    assert capsys.readouterr().out.count('\n') == 1


def test_recomputed_networks_are_not_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(compiling, 'can_compile', lambda asked, device: bool(asked))  # as on a GPU
    monkeypatch.setattr(torch, 'compile', lambda forward, **_: compiled.append(forward) or forward)
    for accumulate, count in ((1, 3), (2, 0)):
        model, netsD, _ = case('stackgan_v2')
        prepare(model, netsD, compile='auto', accumulate=accumulate)
        assert len(compiled) == count
        compiled.clear()
    assert '--compile True and --accumulate' in one_line(lambda: prepare(model, netsD, compile=True, accumulate=2))


def test_a_smaller_last_batch_runs_uncompiled(monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda forward, **_: lambda x: 'compiled')
    net = torch.nn.Linear(1, 1)
    forward = compiling.compiled_for_whole_batches(net, net.forward, 4)
    assert [forward(torch.zeros(size, 1)) == 'compiled' for size in (4, 3)] == [True, True]
    torch.testing.assert_close(forward(torch.zeros(2, 1)), net(torch.zeros(2, 1)))
    net.eval()
    assert torch.is_tensor(forward(torch.zeros(4, 1)))


def compile_with(backend):
    """Return `torch.compile` with the backend 'aot_eager', which saves minutes of building code."""
    if backend == 'inductor':
        return PYTORCHS
    return lambda function, options, dynamic=None: PYTORCHS(function, dynamic=dynamic, backend=backend)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('chapter, bits', [('stackgan_v1', 'fp32'), ('stackgan_v2', 'bf16')])
@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=slow)])
def test_compiled_networks_train_as_uncompiled_ones(backend, chapter, bits, monkeypatch, request):
    monkeypatch.setattr(torch, 'compile', compile_with(backend))
    monkeypatch.setattr(precision, 'cpu_flags', lambda: {'avx512_bf16'})
    if bits == 'bf16':
        monkeypatch.setattr(cpu_kernels, 'WEIGHTS_PER_POSITION', 0)  # so that all are matrix products
    if backend == 'inductor' and bits == 'fp32':
        request.getfixturevalue('float64')  # Adam's first steps make rounding of other code a hundred times as large
    losses, names, generated = {}, [], []
    for asked in (False, True):
        model, netsD, batch = case(chapter, size=4)
        heads = [netsD[0].get_cond_logits, netsD[0].get_uncond_logits] if chapter == 'stackgan_v1' else []
        prepare(model, netsD, heads, precision=bits, compile=asked)
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(5)  # noise and conditions are the same, too
        losses[asked] = [list(model.train_step(batch).values()) for _ in range(3)]
        frames = dict(torch._dynamo.utils.counters['frames'])
        assert bool(frames) == asked and not torch._dynamo.utils.counters['graph_break']
        generated.append(model.generate(batch['right_embed'])[-1])
        assert dict(torch._dynamo.utils.counters['frames']) == frames  # generating is not compiled
        names.append([net.state_dict().keys() for net in (model.netG, *netsD)])
    rounding = {'rtol': 1e-5, 'atol': 1e-5} if bits == 'fp32' else {'rtol': .02, 'atol': .02}
    torch.testing.assert_close(losses[True], losses[False], **rounding)
    torch.testing.assert_close(*generated, rtol=0, atol=1e-4 if bits == 'fp32' else .05)
    assert names[0] == names[1]
