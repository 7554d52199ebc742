"""benchmarks/gpu_run.sh, with tiny numbers on the CPU."""
import os
import subprocess
import sys

import pytest
import torch

from tests import tiny

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.join(ROOT, 'benchmarks', 'gpu_run.sh')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Return a folder with data and its encoder."""
    return tiny.with_encoder(tmp_path_factory.mktemp('gpu with a space'), {'train': {'001.Auk': 3, '002.Jay': 4},
                                                              'test': {'004.Wren': 1, '005.Lark': 1}})


def run_script(folder, *steps):
    """Return (exit status, what it prints)."""
    environment = os.environ | {'TINY': '1', 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1',
                                'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run(['sh', SCRIPT, 'data/tiny.hdf5', 'out', *steps], cwd=folder, env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def test_a_step_is_done_once(folder):
    status, said = run_script(folder, 'chapter')
    assert status == 0 and said.startswith('chapter: status 0, '), said + (folder / 'out/chapter.txt').read_text()
    run, = (path for path in (folder / 'out/chapter').iterdir() if path.is_dir())
    progress = torch.load(run / 'text2image.pt', weights_only=True)['progress']
    assert progress['epoch'] == 1
    assert run_script(folder, 'chapter') == (0, 'chapter: done before\n')


def test_a_step_that_fails_is_not_done(folder):
    (folder / 'out/improved').mkdir(parents=True)
    (folder / 'out/improved/improved').mkdir()
    (folder / 'out/improved/improved/text2image.pt').write_bytes(b'damaged')
    status, said = run_script(folder, 'improved')
    assert status == 1 and said.startswith('improved: status 1, ')
    assert 'out/improved' in (folder / 'out/improved.txt').read_text()
    assert not (folder / 'out/improved.done').exists()


def test_an_unknown_step_is_an_error(folder):
    status, said = run_script(folder, 'chapter', 'nonsense')
    assert (status, said) == (
        2, 'nonsense: no such step; give some of: tests speed evaluation chapter improved tree report\n')


def test_a_missing_file_is_an_error_before_the_first_step(folder):
    (folder / 'data/tiny.hdf5').rename(folder / 'data/moved.hdf5')
    try:
        assert run_script(folder) == (2, 'data/tiny.hdf5: no such file; give an HDF5 file with embeddings\n')
    finally:
        (folder / 'data/moved.hdf5').rename(folder / 'data/tiny.hdf5')
