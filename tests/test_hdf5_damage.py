"""Damaged and malicious HDF5 files are refused in one line, with limited memory and time."""
import os
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest

from char_cnn_rnn.reading import require_embeddings
from common.flags import ROOT
from data import cache, layout, plain_hdf5
from data.cache import load_split
from data.txt2image_dataset import Text2ImageDataset
from tests import tiny
from tests.errors import one_line
from tests.fuzz_hdf5 import ATTACKS, write_attack, write_public


@pytest.fixture
def in_this_process(monkeypatch):
    """Read files in this process: starting another one takes a quarter of a second."""
    def read(path, split):
        with layout.open_file(path) as file:
            index = layout.read_index(file, split)
            rows, bad = None, None
            try:
                rows = layout.read_embeddings(file, split, index.keys) if layout.has_embeddings(file, split) else None
            except layout.BadEmbeddings as error:
                bad = str(error)
            return index, layout.read_encoder(file), bad, rows

    monkeypatch.setattr(cache, '_read_in_subprocess', read)


@pytest.mark.parametrize('attack', ATTACKS)
def test_attacks_are_refused(attack, tmp_path, in_this_process):
    try:
        path = write_attack(attack, tmp_path)
    except (ValueError, TypeError, OSError) as error:
        pytest.fail(f'{attack}: cannot be written: {error!r}')
    message = one_line(load_split, path, 'train')
    assert 'make the file again with' in message and '/train' in message and 'secret' not in message
    assert attack.startswith(('a split', 'one', 'a name')) or '/train/Auk_0_0 ' in message


def test_groups_are_opened_by_name_not_by_path(tmp_path):
    with h5py.File(tiny.make(tmp_path / 'birds.hdf5')) as file:
        for name in ('train/Auk_0_0', '.', '/'):
            with pytest.raises(ValueError, match='is not a valid name'):
                plain_hdf5.open_group(file.id, name)


# --- files of others ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('stored', [
    {'txt': np.bytes_('a bird')}, {'txt': [b'a bird']}, {'txt': np.array(['a bird'], object)},
    {'img': np.frombuffer(tiny.jpeg(), 'u1')}, {'img': np.frombuffer(tiny.jpeg(), 'i1')},
    {'embeddings': np.ones(1024, 'f2')}, {'embeddings': np.ones((1, 1024), '>f8')}, {'embeddings': np.ones(1024, 'i4')},
    {'bbox': np.array([1, 2, 30, 20])}, {'class': np.bytes_('001.Auk')}], ids=str)
def test_equivalent_storage_layouts_are_read(stored, tmp_path, in_this_process):
    path = tiny.make(tmp_path / 'birds.hdf5', {'train': {'001.Auk': 1}})
    (name, value), = stored.items()
    with h5py.File(path, 'a') as file:
        for k in range(2):
            del file[f'train/Auk_0_{k}'][name]
            file[f'train/Auk_0_{k}'][name] = value
    found = load_split(path, 'train')
    assert found.index.classes == ['001.Auk'] and found.jpegs.read([0])[0][:2] == b'\xff\xd8'
    if name == 'txt':
        assert found.index.captions == ['a bird'] * 2
    elif name == 'img':
        assert found.jpegs.read([0]) == [tiny.jpeg()]
    elif name == 'embeddings':
        assert found.embeddings.eq(1).all()
    elif name == 'bbox':
        assert found.index.boxes == [[1, 2, 30, 20]]


@pytest.mark.parametrize('field', ['name', 'class', 'img'])
def test_groups_of_other_photographs_are_no_captions_of_the_first(field, tmp_path, in_this_process):
    """As where groups are numbered on: image_00001, image_00002."""
    path = tiny.make(tmp_path / 'birds.hdf5', {'train': {'001.Auk': 1, '002.Jay': 1}})
    with h5py.File(path, 'a') as file:
        auk, jay = file['train/Auk_0_1'], file['train/Jay_0_0']
        values = {name: (jay if name == field else auk)[name][()] for name in ('name', 'class', 'img')}
        for name, value in values.items():
            del auk[name]
            auk[name] = np.void(tiny.jpeg(0, (30, 30))) if name == field == 'img' else value
    assert ('/train/Auk_0_1 is incomplete or damaged (it is of another photograph than Auk_0_0; name groups '
            'PHOTOGRAPH_K, with K the number of the caption); make') in one_line(load_split, path, 'train')


def test_boxes_in_fractions_are_refused(tmp_path, in_this_process):
    path = tiny.make(tmp_path / 'birds.hdf5', {'train': {'001.Auk': 1}})
    with h5py.File(path, 'a') as file:
        file['train/Auk_0_0/bbox'][:] = 0.1, 0.2, 0.5, 1
    assert 'Auk_0_0 is incomplete or damaged (bbox is in fractions of the image; give pixels)' in one_line(
        load_split, path, 'train')


def test_a_first_caption_without_an_embedding_is_named(tmp_path, in_this_process):
    path = tiny.make(tmp_path / 'birds.hdf5')
    with h5py.File(path, 'a') as file:
        del file['train/Auk_0_0/embeddings']
        for group in file['test'].values():
            del group['embeddings']
    assert ': /train/Auk_0_0 has no embedding of 1024 numbers; write' in one_line(
        require_embeddings, Text2ImageDataset(path))
    assert ': /test holds no sentence embeddings yet; write' in one_line(require_embeddings, Text2ImageDataset(
        path, split=2))


def test_a_file_with_a_user_block_is_read(tmp_path, in_this_process):
    path = write_public(str(tmp_path / 'birds.hdf5'), userblock_size=512)
    found = load_split(path, 'train')
    assert found.jpegs.read([0, 1]) == [tiny.jpeg(0), tiny.jpeg(1)] and len(found.index.captions) == 10
    with h5py.File(path, 'a') as file:
        del file['train/Auk_0001_0/img']
        file['train/Auk_0001_0'].create_dataset('img', (100,), 'u1')
    assert '/train/Auk_0001_0 is incomplete or damaged (img is empty' in one_line(load_split, path, 'train')


@pytest.mark.parametrize('rows, wrong', [
    (np.full(1024, np.nan), 'NaN'), (np.r_[np.inf, np.zeros(1023)], 'infinite'),
    (np.full(1024, 1e300), 'infinite'),
    (np.zeros(768), 'but one of 768'), (np.float32(1), 'but one of 1;')])
def test_invalid_embeddings_are_reported(rows, wrong, tmp_path, in_this_process):
    path = tiny.make(tmp_path / 'birds.hdf5')
    with h5py.File(path, 'a') as file:
        del file['train/Jay_0_1/embeddings']
        file['train/Jay_0_1/embeddings'] = rows
    for _ in range(2):  # the second time from the cache
        split = load_split(path, 'train')
        assert len(split.index.captions) == 14 and split.embeddings is None
        dataset = Text2ImageDataset(path)
        message = one_line(require_embeddings, dataset, match=f'/train/Jay_0_1 has .*{wrong}')
        assert 'write them with: python char_cnn_rnn/main.py' in message
    assert len(load_split(path, 'test').embeddings) == 8


# --- the process that reads ---------------------------------------------------------------------------------------

def test_a_file_locked_by_another_program_is_an_error(tmp_path):
    path = tiny.make(tmp_path / 'birds.hdf5')
    with h5py.File(path, 'a'):
        message = one_line(load_split, path, 'train')
    assert 'in use by another program' in message and 'make it again' not in message
    assert len(load_split(path, 'train').index.keys) == 14


def test_damaged_lengths_are_refused(tmp_path):
    """libhdf5 alone needs 18 seconds and 4 GB to find that a string is shorter than its stored length."""
    path = tiny.make(tmp_path / 'birds.hdf5')
    with h5py.File(path, 'a') as file:
        file.attrs['encoder'] = '0123456789abcdef'
        place = file['train/Auk_0_0/txt'].id.get_offset()
    with open(path, 'rb') as file:
        data = file.read()
    start = time.monotonic()
    with open(path, 'wb') as file:
        file.write(data[:place] + b'\xf0\xff\xff\xff' + data[place + 4:])
    assert 'a string of 4,294,967,280 bytes' in one_line(load_split, path, 'train')
    assert time.monotonic() - start < 60  # most of it for the new process, on a busy machine


@pytest.mark.parametrize('ends, why', [
    ('while True: pass', 'reading it does not end'), ('bytearray(8 << 30)', 'too much memory'),
    ('os.kill(os.getpid(), 11)', 'SIGSEGV'), ('os._exit(0)', 'ended with status 0'),
    ('print(\'{"index": \', end="", flush=True); os.kill(os.getpid(), 9)', 'SIGKILL')])
def test_a_hanging_or_crashing_reader_is_an_error(ends, why, tmp_path, monkeypatch):
    """libhdf5 hangs or crashes on some damaged files; we report it in one line and can read the next file."""
    path, reader = tiny.make(tmp_path / 'birds.hdf5'), tmp_path / 'reader.py'
    reader.write_text('import os, sys\n'
                      f'sys.path.insert(0, {ROOT!r})\n'
                      'from data import layout, plain_hdf5, read_split\n'
                      'plain_hdf5.SECONDS = 0.1\n'
                      f'def hostile(*_):\n    {ends}\n'
                      'layout.read_index = hostile\n'
                      'read_split.main()\n')
    with monkeypatch.context() as patch:
        patch.setattr(cache, 'READER', str(reader))
        message = one_line(load_split, path, 'train', match=why)
    assert f'{path}: /train is incomplete or damaged (' in message and 'make the file again with' in message
    assert len(load_split(path, 'train').index.keys) == 14


def test_a_reader_ends_when_its_caller_stops_waiting(tmp_path, monkeypatch):
    path, reader, pid = tiny.make(tmp_path / 'birds.hdf5'), tmp_path / 'reader.py', tmp_path / 'pid'
    reader.write_text('import os, time\n'
                      f'open({str(pid)!r}, "w").write(str(os.getpid()))\n'
                      f'os.kill({os.getpid()}, 2)\n'
                      'time.sleep(60)\n')
    monkeypatch.setattr(cache, 'READER', str(reader))
    with pytest.raises(KeyboardInterrupt):
        load_split(path, 'train')
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_reader_without_a_parent_ends_silently(tmp_path):
    path = tiny.make(tmp_path / 'birds.hdf5')
    reader = subprocess.Popen([sys.executable, cache.READER, path, 'train'], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE)
    reader.stdout.close()
    assert reader.stderr.read() == b'' and reader.wait() == -signal.SIGPIPE
    reader.stderr.close()


@pytest.mark.parametrize('field', ['name', 'class'])
def test_names_that_are_not_utf8_are_refused(field, tmp_path, in_this_process):
    """Replaced letters would make one class of two."""
    path = tiny.make(tmp_path / 'birds.hdf5', {'train': {'001.Auk': 1}})
    with h5py.File(path, 'a') as file:
        del file['train/Auk_0_0'][field]
        file['train/Auk_0_0'][field] = np.bytes_('роза'.encode('cp1251'))
    said = one_line(load_split, path, 'train')
    assert f'/train/Auk_0_0 is incomplete or damaged ({field} is not valid UTF-8)' in said


def test_embeddings_of_zeros_are_refused(tmp_path):
    path = tiny.make(tmp_path / 'a.hdf5')
    with h5py.File(path, 'r+') as file:
        file['train/Auk_1_1/embeddings'][...] = 0
    assert '/train/Auk_1_1 has an embedding of zeros' in one_line(require_embeddings, Text2ImageDataset(path))
