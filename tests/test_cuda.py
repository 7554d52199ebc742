"""Tests that need a GPU: steps compared with the CPU, bf16, compiled networks, runs that change the device."""
import importlib
import math
import os

import pytest
import torch

from common import flags, speed
from common.speed.compiling import can_compile
from common.speed.precision import has_bf16
from tests import every_model
from tests.commands import DATA, Caller

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')]

CPU, GPU = torch.device('cpu'), torch.device('cuda', 0)
NARROW = ['--gf_dim', '4', '--df_dim', '4', '--z_dim', '5', '--residuals', '1', '--workers', '0']
FLAGS = {'text2image': [], 'stackgan_v1': [*NARROW, '--condition_dim', '6'],
         'stackgan_v2': [*NARROW, '--embedding_dim', '6', '--branches', '2']}
TRAINING = ['--train', *DATA, '--batch_size', '2', '--log_interval', '1']


@pytest.fixture(autouse=True)
def float32():
    """Switch TF32 off on the GPU, and restore all settings afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


@pytest.fixture
def same_draws(monkeypatch):
    """Make both devices use the same random numbers, those of the CPU."""
    randn, multinomial = torch.randn, torch.multinomial
    monkeypatch.setattr(torch, 'randn', lambda *size, device=None, **more: randn(*size, **more).to(device or CPU))
    monkeypatch.setattr(torch, 'multinomial', lambda weights, *args, **more: multinomial(
        weights.cpu(), *args, **more).to(weights.device))


def losses_of_a_step(name, device, **prepared):
    """Return the losses of a Model's first step as floats; `prepared` are arguments of `speed.prepare`, if any."""
    model, batch = every_model.new(name, device)
    if prepared:
        speed.prepare(*every_model.parts_of(model), device=device, batch_size=every_model.SIZE,
                      **{'precision': 'fp32', 'compile': False, **prepared})
    torch.manual_seed(2)
    losses = model.train_step(batch)
    for value in losses.values():
        assert all(loss.device == device for loss in (value if isinstance(value, list) else [value]))
    return [float(loss) for value in losses.values() for loss in (value if isinstance(value, list) else [value])]


@pytest.mark.parametrize('name', every_model.NEW)
def test_a_step_on_the_gpu_equals_one_on_the_cpu(name, same_draws):
    assert losses_of_a_step(name, GPU) == pytest.approx(losses_of_a_step(name, CPU), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('name', every_model.GANS)
def test_a_prepared_step_on_the_gpu_equals_one_on_the_cpu(name, accumulate, same_draws):
    expected = losses_of_a_step(name, CPU, accumulate=accumulate)
    assert losses_of_a_step(name, GPU, accumulate=accumulate) == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize('name', every_model.GANS)
def test_bf16_is_near_float32(name):
    if not has_bf16(GPU):
        pytest.skip('this GPU has no bf16')
    expected = losses_of_a_step(name, GPU, precision='fp32')
    assert losses_of_a_step(name, GPU, precision='bf16') == pytest.approx(expected, rel=.05, abs=.05)


@pytest.mark.parametrize('name', every_model.GANS)
def test_compiled_networks_compute_the_same(name):
    if not can_compile('auto', GPU):
        pytest.skip('PyTorch cannot compile here')
    expected = losses_of_a_step(name, GPU)
    assert losses_of_a_step(name, GPU, compile=True) == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.fixture
def type_in(folder, monkeypatch, capsys):
    """Return a function that runs a section's main.py with arguments, and returns what it prints."""
    def run(section, *args):
        return Caller(importlib.import_module(f'{section}.main'), folder, monkeypatch, capsys)(*args)
    return run


def newest_checkpoint(out_dir, section):
    run_dir, = (path for path in out_dir.iterdir() if path.is_dir())
    return torch.load(os.path.join(run_dir, f'{section}.pt'), map_location='cpu', weights_only=True)


@pytest.mark.parametrize('section', FLAGS)
def test_main_trains_two_steps_on_the_gpu(section, type_in, tmp_path):
    """Use the defaults `--precision auto` and `--compile auto`."""
    said = type_in(section, *TRAINING, *FLAGS[section], '--epochs', '1', '--out_dir', tmp_path)
    assert 'using the CPU' not in said
    contents = newest_checkpoint(tmp_path, section)
    assert contents['progress']['step'] >= 2
    assert all(value.isfinite().all() for value in contents['netG'].values())


@pytest.mark.parametrize('section', FLAGS)
def test_a_run_moves_from_the_cpu_to_the_gpu_and_back(section, type_in, tmp_path):
    def train(epochs, on_gpu, *args):
        type_in(section, *args, '--epochs', epochs, '--cuda', on_gpu, '--out_dir', tmp_path, '--precision', 'fp32',
                '--compile', 'False')
        return newest_checkpoint(tmp_path, section)

    first = train(1, False, *TRAINING, *FLAGS[section])
    steps = first['progress']['step']
    for epochs, on_gpu in ((2, True), (3, False)):
        contents = train(epochs, on_gpu, '--train', '--resume')
        assert contents['progress']['step'] == epochs * steps
        assert contents['netG'].keys() == first['netG'].keys()
        assert all(value.isfinite().all() for value in contents['netG'].values())
    counts = {int(state['step']) for state in contents['optim_G']['state'].values()}
    assert counts == {3 * steps}  # Adam's moments went along


def test_a_run_on_both_devices_computes_the_same(tmp_path, same_draws):
    """The step after a change of the device equals the step without a change."""
    found = []
    for devices in ((CPU, CPU, CPU), (CPU, GPU, CPU)):
        for number, device in enumerate(devices):
            model, batch = every_model.new('stackgan_v2', device)
            speed.prepare(*every_model.parts_of(model), device=device, precision='fp32', compile=False,
                          batch_size=every_model.SIZE)
            if number:
                model.load_from(str(tmp_path), verbose=False)
            torch.manual_seed(number)
            losses = model.train_step(batch)
            model.save_to(str(tmp_path), verbose=False)
        found.append(losses)
    unchanged, changed = found
    assert float(changed['loss_G']) == pytest.approx(float(unchanged['loss_G']), rel=2e-2)
    assert all(math.isfinite(float(loss)) for loss in changed['loss_D'])


def test_the_requested_gpu_is_used():
    assert flags.choose_device(True) == GPU
