"""`common/speed` is optional: without its line in main.py, everything works as before, but slower."""
import os
import re

import pytest
import torch

from common import speed
from common.speed import precision
from tests import every_model
from tests.commands import DATA
from tests.states import same_state
from text2image import main  # noqa: F401 - the `main` of `call`

pytestmark = pytest.mark.usefixtures('one_thread')

TRAINING = ['--epochs', '1', '--batch_size', '4', '--log_interval', '1', '--precision', 'fp32']


def losses_of(said):
    return [float(number) for number in re.findall(r'loss_[DG] +(-?[\d.]+)', said)]


def test_training_without_speed_prepare_is_the_same(call, monkeypatch, tmp_path):
    with_it = call('--train', *DATA, '--out_dir', tmp_path / 'with', *TRAINING)
    monkeypatch.setattr(speed, 'prepare', lambda *_, **__: None)  # as if the line were not there
    without = call('--train', *DATA, '--out_dir', tmp_path / 'without', *TRAINING)
    assert 'Computing in fp32' in with_it and 'Computing in' not in without
    assert len(losses_of(without)) >= 4  # two losses in each of two steps, at least
    assert losses_of(without) == pytest.approx(losses_of(with_it), rel=.05)
    kept = [torch.load(os.path.join(next((tmp_path / name).iterdir()), 'text2image.pt'), weights_only=True)
            for name in ('with', 'without')]
    assert list(kept[0]['netG']) == list(kept[1]['netG']) and kept[1]['progress']['step'] == 2


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('bits', ['fp32', 'bf16'])
def test_resumed_training_is_bitwise_identical(bits, accumulate, monkeypatch, tmp_path):
    monkeypatch.setattr(precision, 'has_bf16', lambda device: True)  # PyTorch imitates it where it is missing

    def new():
        model, batch = every_model.new('stackgan_v2', 'cpu')
        speed.prepare(*every_model.parts_of(model), device=torch.device('cpu'), precision=bits, compile=False,
                      accumulate=accumulate, batch_size=every_model.SIZE)
        return model, batch

    model, batch = new()
    model.train_step(batch)
    file = model.save_to(str(tmp_path), verbose=False)
    resumed, _ = new()
    resumed.load_from(file, verbose=False)
    for one in (model, resumed):
        torch.manual_seed(3)
        one.train_step(batch)
    for net, other in zip(every_model.nets_of(model), every_model.nets_of(resumed), strict=True):
        assert same_state(net.state_dict(), other.state_dict())
    assert all(map(torch.equal, model.averaged, resumed.averaged))
