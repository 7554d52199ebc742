"""Other processes on the cores of a training are noticed."""
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from common import log
from common.contention import fewer_threads, seconds_without_core

needs_schedstat = pytest.mark.skipif(not os.path.exists('/proc/self/schedstat'), reason='Linux counts it')


def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@needs_schedstat
def test_time_without_a_core_is_counted():
    cores = os.sched_getaffinity(0)
    core = min(cores)
    busy = subprocess.Popen([sys.executable, '-c', f'import os; os.sched_setaffinity(0, [{core}]); print(flush=True)\n'
                             'while True: pass'], stdout=subprocess.PIPE)
    try:
        busy.stdout.readline()
        os.sched_setaffinity(0, [core])  # of this thread
        before, since = seconds_without_core(), time.monotonic()
        spin(.3)
        waited, elapsed = seconds_without_core() - before, time.monotonic() - since
    finally:
        os.sched_setaffinity(0, cores)
        busy.kill()
        busy.wait()
    assert waited == pytest.approx(elapsed - .3, abs=.1) and waited > .1


@pytest.mark.parametrize('threads, waiting, fewer', [
    (2, 0, None), (2, .4, None), (2, .5, 1), (2, 1.9, 1), (16, .9, 15), (16, 3.2, 12), (1, .9, None), (4, 9, 1)])
def test_threads_that_have_a_core_each(threads, waiting, fewer):
    assert fewer_threads(threads, waiting) == fewer


def test_a_training_says_once_that_it_has_more_threads_than_cores(tmp_path, monkeypatch):
    waited = iter([0, 6000, 12000])
    monkeypatch.setattr(log, 'WATCHED', 0)
    monkeypatch.setattr(log, 'seconds_without_core', lambda: next(waited))
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 3)
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: False)
    with log.Log(str(tmp_path), False, 0) as lines:
        for step in (1, 2):
            lines.losses({'epoch': 0, 'step': step}, 1, {'loss_D': .5}, SimpleNamespace(
                set_postfix_str=lambda text: None, disable=True))
    said = (tmp_path / 'log.txt').read_text()
    assert said.count('OMP_NUM_THREADS=1 set') == 1 and 'the 3 threads of this training' in said
