"""Worker processes that read crops: their errors, and how they end."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.progress import new_progress
from data import multiscale_dataset
from data.multiscale_dataset import PipedTensor, collate_crops, shuffled_batches
from tests.errors import one_line
from tests.small_training import train

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device('cpu')
PATIENCE = 60  # seconds, for a machine that is busy with other things


class Dataset:
    """A data set of crops of `size` bytes; reading a batch first calls `act`."""

    def __init__(self, act=lambda: None, size=10):
        self.act, self.size = act, size

    def __len__(self):
        return 8

    def __getitems__(self, numbers):
        self.act()
        images = torch.full((len(numbers), self.size), os.getpid() % 256, dtype=torch.uint8)
        return SimpleNamespace(batch={'right_images': images, 'pid': [os.getpid()] * len(numbers)})

    def finish(self, batch, device):
        return batch


def refuse():
    raise UserError('auk.jpg: cannot be decoded; remove it')


def run_out_of_memory():
    raise np._core._exceptions._ArrayMemoryError((10 ** 9,), np.dtype('f8'))


def run_out_of_tensors():
    torch.empty(10 ** 15)


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('act, said', [(refuse, 'auk.jpg: cannot be decoded; remove it'),
                                       (run_out_of_memory, 'too little memory to read images; use fewer --workers'),
                                       (run_out_of_tensors, 'too little memory to read images; use fewer --workers')])
def test_errors_in_workers_are_the_same_line(workers, act, said):
    assert one_line(lambda: list(shuffled_batches(Dataset(act), 4, workers, CPU))).startswith(said)


def test_batches_do_not_fill_shared_memory():
    batch, = {id(batch): batch for batch in shuffled_batches(Dataset(size=10 ** 6), 8, 1, CPU)}.values()
    assert not batch['right_images'].is_shared() and batch['right_images'].shape == (8, 10 ** 6)
    assert set(batch['pid']) != {os.getpid()} and (batch['right_images'] == batch['pid'][0] % 256).all()
    batch['right_images'][0] = 1  # it may be written to, and warns of nothing


def test_without_workers_batches_are_not_sent():
    images = torch.zeros(2, 3)
    assert collate_crops(SimpleNamespace(batch={'right_images': images}))['right_images'] is images
    function, arguments = PipedTensor(images).__reduce__()
    assert torch.equal(function(*arguments), images)


def test_missing_semaphores_are_a_one_line_error(monkeypatch):
    def no_room():
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(multiscale_dataset.multiprocessing, 'Lock', no_room)
    said = one_line(iter, shuffled_batches(Dataset(), 4, 2, CPU))
    assert '/dev/shm' in said and said.endswith('use --workers 0')


def test_a_killed_worker_is_a_one_line_error():
    loader = shuffled_batches(Dataset(), 2, 1, CPU)

    def train_step(batch):
        os.kill(batch['pid'][0], signal.SIGKILL)
        time.sleep(2)
        return {'loss': 1.0}

    model = SimpleNamespace(train_step=train_step, data_loader=loader, progress=new_progress())
    said = one_line(train, model, 100, 1, '', False)
    assert said.startswith('step ') and 'a process that reads images has ended (DataLoader worker (pid' in said
    assert said.endswith('start or resume with fewer --workers, or 0')


KILLED = '''
import os, sys, time
import torch
from data.multiscale_dataset import shuffled_batches
from tests.test_workers import CPU, Dataset
for batch in shuffled_batches(Dataset(size=10 ** 7), 2, 1, CPU):
    print(batch['pid'][0], flush=True)
    time.sleep(3600)
'''


def test_workers_of_a_killed_process_end_while_sending():
    with subprocess.Popen([sys.executable, '-c', KILLED], env=os.environ | {'PYTHONPATH': str(ROOT)}, text=True,
                          stdout=subprocess.PIPE) as process:
        worker = int(process.stdout.readline())
        time.sleep(1)  # the next batch is on its way, and waits for room in the pipe
        process.kill()
    begun = time.monotonic()
    while is_alive(worker):
        assert time.monotonic() - begun < PATIENCE
        time.sleep(0.1)


def is_alive(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False
