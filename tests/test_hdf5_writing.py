"""HDF5 files appear whole or not at all, whatever happens to the disk or the process."""
import contextlib
import errno
import glob
import os
import shutil
import signal
import subprocess
import sys
import types

import h5py
import numpy as np
import pytest

from common import signals
from common.errors import CannotWrite
from data import layout
from data.toy_birds import prepare as toy_birds
from tests import tiny
from tests.errors import one_line

ROWS = {'train': np.zeros((14, 1024), np.float32)}


def photographs(count, size=50000):
    rows = np.ones((3, 1024), np.float32)
    for number in range(count):
        yield layout.Photograph(f'bird_{number}', '001.Auk', bytes(size), ['a bird'] * 3, rows)


def write(path, count=40):
    with layout.replace_file(str(path)) as file:
        for photograph in photographs(count):
            layout.write_photograph(file, 'train', photograph)


def test_the_encoder_fingerprint_is_stored_with_embeddings(tmp_path):
    path = tiny.make(tmp_path / 'birds.hdf5', embeddings=False)
    for encoder in ('1234abcd', None, '5678'):
        layout.write_embeddings(path, ROWS, 'a test', encoder)
        with h5py.File(path) as file:
            assert file.attrs.get('encoder') == encoder


@pytest.mark.parametrize('link', [h5py.ExternalLink('other.hdf5', '/train/Auk_0_0'), h5py.SoftLink('/test')], ids=str)
def test_embeddings_are_not_written_through_links(tmp_path, link):
    path, other = (tiny.make(tmp_path / name) for name in ('birds.hdf5', 'other.hdf5'))
    with h5py.File(path, 'r+') as file:
        del file['train/Auk_0_0']
        file['train/Auk_0_0'] = link
    with open(other, 'rb') as file:
        before = file.read()
    one_line(layout.write_embeddings, path, ROWS, 'a test', match='/train/Auk_0_0 is not a group of this file')
    with open(other, 'rb') as file:
        assert file.read() == before
    assert sorted(os.listdir(tmp_path)) == ['birds.hdf5', 'other.hdf5']


# --- the disk ---------------------------------------------------------------------------------------------------------

def test_reserved_space_is_released(tmp_path, monkeypatch):
    write(tmp_path / 'a.hdf5')
    monkeypatch.setattr(layout, '_reserve', lambda *_: None)
    write(tmp_path / 'b.hdf5')
    assert (tmp_path / 'a.hdf5').read_bytes() == (tmp_path / 'b.hdf5').read_bytes()


@pytest.mark.parametrize('at', [1, 5, 30])
def test_a_disk_that_fills_up_is_a_one_line_error(tmp_path, monkeypatch, at):
    """`at` allocations succeed; then another process has taken the remaining space."""
    (tmp_path / 'a.hdf5').write_text('kept')
    allocate, calls = os.posix_fallocate, []

    def until_full(*args):
        calls.append(args)
        if len(calls) > at:
            raise OSError(errno.ENOSPC, 'No space left on device')
        allocate(*args)

    monkeypatch.setattr(os, 'posix_fallocate', until_full)
    assert 'a.hdf5: disk full' in one_line(write, tmp_path / 'a.hdf5', 1000)
    assert os.listdir(tmp_path) == ['a.hdf5'] and (tmp_path / 'a.hdf5').read_text() == 'kept'


def test_free_space_is_checked_if_it_cannot_be_reserved(tmp_path, monkeypatch):
    def cannot(*_):
        raise OSError(errno.EOPNOTSUPP, 'Operation not supported')

    monkeypatch.setattr(os, 'posix_fallocate', cannot)
    write(tmp_path / 'a.hdf5')
    monkeypatch.delattr(os, 'posix_fallocate')
    write(tmp_path / 'a.hdf5')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=2000))
    assert 'disk full' in one_line(write, tmp_path / 'a.hdf5')
    assert os.listdir(tmp_path) == ['a.hdf5']


def test_no_space_for_embeddings_is_an_error(tmp_path, monkeypatch):
    path = tiny.make(tmp_path / 'birds.hdf5')
    with open(path, 'rb') as file:
        before = file.read()
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=len(before)))
    assert 'disk full' in one_line(layout.write_embeddings, path, ROWS, 'a test')
    with open(path, 'rb') as file:
        assert file.read() == before
    assert os.listdir(tmp_path) == ['birds.hdf5']


LIMITED = '''
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
sys.argv = sys.argv[1:]
sys.path.insert(0, {folder!r})
runpy.run_path(sys.argv[0], run_name='__main__')
'''


@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no limits of processes')
def test_a_file_size_limit_is_a_one_line_error(tmp_path):
    """HDF5 itself crashes with a segmentation fault when it writes beyond the limit, as on a full disk."""
    script = os.path.abspath(toy_birds.__file__)
    done = subprocess.run([sys.executable, '-c', LIMITED.format(folder=os.path.dirname(script)), script, '--out',
                           'toy.h5', '--count', '120'], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.startswith('error: toy.h5: cannot be written') and done.stderr.count('\n') == 1
    assert os.listdir(tmp_path) == []


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / 'a.hdf5.partial-12345678').write_bytes(bytes(1000))
    write(tmp_path / 'a.hdf5', 1)
    assert os.listdir(tmp_path) == ['a.hdf5']


def test_a_file_can_be_read_while_it_is_replaced(tmp_path):
    """HDF5 locks the files that it opens, and `partial_file` those that it writes."""
    path = tiny.make(tmp_path / 'birds.hdf5')
    with layout.replace_file(path, copy=True) as file, layout.open_file(path) as before:
        assert len(before['train']) == 14
        layout.write_photograph(file, 'valid', next(photographs(1)))
    with layout.open_file(path) as reader, layout.open_file(path) as another:
        assert len(reader['valid']) == len(another['valid']) == 3
        layout.write_embeddings(path, ROWS, 'a test')  # while it is being read
        assert len(reader['valid']) == 3


def test_a_new_file_can_be_read_at_once(tmp_path, monkeypatch):
    replace, found = os.replace, []

    def replace_and_read(old, new):
        replace(old, new)
        with layout.open_file(new) as file:
            found.append(len(file['train']))

    monkeypatch.setattr(os, 'replace', replace_and_read)
    write(tmp_path / 'a.hdf5', 2)
    assert found == [6]


# --- signals ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('outer', [False, True])
def test_a_signal_stops_writing_between_photographs(tmp_path, outer):
    written = []

    def writing():
        with layout.replace_file(str(tmp_path / 'a.hdf5')) as file:
            for photograph in photographs(9):
                layout.write_photograph(file, 'train', photograph)
                written.append(photograph)
                if len(written) == 3:
                    os.kill(os.getpid(), signal.SIGINT)
                    assert len(os.listdir(tmp_path)) == 1

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), signals.hold() if outer else contextlib.nullcontext():
        writing()
    assert len(written) == 3 and os.listdir(tmp_path) == [] and signal.getsignal(signal.SIGINT) is handler


def test_a_signal_acts_at_the_latest_after_writing(tmp_path):
    with pytest.raises(KeyboardInterrupt), layout.replace_file(str(tmp_path / 'a.hdf5')):
        os.kill(os.getpid(), signal.SIGINT)
    assert os.listdir(tmp_path) == ['a.hdf5']


@pytest.mark.parametrize('how, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interrupted_toy_birds_end_their_workers(tmp_path, how, status):
    out = tmp_path / 'toy.hdf5'
    process = subprocess.Popen([sys.executable, os.path.abspath(toy_birds.__file__), '--out', out, '--count', '5000'],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, text=True)
    while not any(os.path.getsize(path) > 3e5 for path in glob.glob(f'{out}.partial-*')):
        assert process.poll() is None
    process.send_signal(how)
    assert process.communicate(timeout=30)[1] == ''  # which its workers have open, too: so they have ended
    assert process.returncode == status
    if how != signal.SIGKILL:
        assert os.listdir(tmp_path) == []
    write(out, 1)
    assert os.listdir(tmp_path) == ['toy.hdf5']


def test_a_killed_worker_is_a_one_line_error(tmp_path):
    script = ('import os, sys; sys.path.insert(0, {folder!r})\n'
              'from common.errors import run_command\n'
              'from data.toy_birds import prepare\n'
              'prepare.draw = lambda *_: os.kill(os.getpid(), 9)\n'
              'run_command(prepare.main)').format(folder=os.path.join(os.path.dirname(toy_birds.__file__), '../..'))
    done = subprocess.run([sys.executable, '-c', script, '--out', 'a.hdf5'], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 1 and done.stderr.startswith('error: a process that drew birds was killed')
    assert done.stderr.count('\n') == 1 and os.listdir(tmp_path) == []


def test_the_first_of_two_concurrent_preparations_wins(tmp_path):
    def second():
        with layout.replace_file(str(tmp_path / 'a.hdf5')) as file:
            write(tmp_path / 'a.h5', 1)
            layout.write_photograph(file, 'train', next(photographs(1)))

    assert 'would also refer to a.h5' in one_line(second)
    assert os.listdir(tmp_path) == ['a.h5']


def test_embeddings_are_written_through_a_link(tmp_path):
    (tmp_path / 'far').mkdir()
    far = tiny.make(tmp_path / 'far' / 'birds.hdf5', embeddings=False)
    (tmp_path / 'a.hdf5').symlink_to(far)
    layout.write_embeddings(str(tmp_path / 'a.hdf5'), ROWS, 'a test')
    assert os.path.islink(tmp_path / 'a.hdf5') and os.listdir(tmp_path / 'far') == ['birds.hdf5']
    with layout.open_file(far) as file:
        assert layout.has_embeddings(file, 'train')


def test_unwritable_folders_are_an_error(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(CannotWrite):
        write(tmp_path / 'file' / 'a.hdf5')
