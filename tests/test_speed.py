"""`common/speed` can be left out: without its line in main.py everything works as before, but slower."""
import os
import re

import pytest
import torch

from common import speed
from tests.commands import DATA
from text2image import main  # noqa: F401 - the `main` of `call`

pytestmark = pytest.mark.usefixtures('one_thread')

TRAINING = ['--epochs', '1', '--batch_size', '4', '--log_interval', '1', '--precision', 'fp32']


def losses_of(said):
    return [float(number) for number in re.findall(r'loss_[DG] +(-?[\d.]+)', said)]


def test_a_training_without_the_line_is_the_same(call, monkeypatch, tmp_path):
    with_it = call('--train', *DATA, '--out_dir', tmp_path / 'with', *TRAINING)
    monkeypatch.setattr(speed, 'prepare', lambda *_, **__: None)  # as if the line were not there
    without = call('--train', *DATA, '--out_dir', tmp_path / 'without', *TRAINING)
    assert 'Computing in fp32' in with_it and 'Computing in' not in without
    assert len(losses_of(without)) >= 4  # two losses in each of two steps, at least
    assert losses_of(without) == pytest.approx(losses_of(with_it), rel=.05)
    kept = [torch.load(os.path.join(next((tmp_path / name).iterdir()), 'text2image.pt'), weights_only=True)
            for name in ('with', 'without')]
    assert list(kept[0]['netG']) == list(kept[1]['netG']) and kept[1]['progress']['step'] == 2
