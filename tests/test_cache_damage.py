"""Caches that are damaged, incomplete, or too large for the disk, and data replaced during training."""
import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from char_cnn_rnn import image_encoder
from common.flags import ROOT
from data import cache, checked_files
from data.multiscale_dataset import MultiscaleDataset
from data.txt2image_dataset import Text2ImageDataset
from tests import tiny
from tests.errors import one_line
from tests.scenes import TINY, same

FILES = ('index.json', 'embeddings.npy', 'pictures_64.npy', 'frames_76.bin', 'frames_76.npy', 'checksums.json')


def read_all(path):
    """Return everything that a cache holds of /train."""
    items, crops = Text2ImageDataset(path), MultiscaleDataset(path, **TINY).cached()
    return (items.captions, items.classes, items.fingerprint, items.pictures.clone(), items.embeddings.clone(),
            [crops.frames[i].copy() for i in range(len(crops))])


def equal(a, b):
    return a[:3] == b[:3] and torch.equal(a[3], b[3]) and torch.equal(a[4], b[4]) and all(
        np.array_equal(x, y) for x, y in zip(a[5], b[5], strict=True))


def cut(data):
    return data[:-1]


def half(data):
    return data[:len(data) // 2]


def emptied(_):
    return b''


def deleted(_):
    return None


def first_byte(data):
    return bytes([data[0] ^ 1]) + data[1:]


def last_byte(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def byte_between(data):
    return data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1:]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """Return (path of a file with a cache, what is read from it)."""
    path = tiny.make(tmp_path_factory.mktemp('whole') / 'birds.hdf5')
    return path, read_all(path)


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('damage', [cut, half, emptied, deleted, first_byte, last_byte, byte_between])
def test_damaged_cache_files_are_rebuilt(damage, name, whole):
    path, expected = whole
    place = os.path.join(cache.cache_folder(path), 'train', name)
    status = os.stat(place)
    with open(place, 'rb') as file:
        damaged = damage(file.read())
    if damaged is None:
        os.remove(place)
    else:
        with open(place, 'wb') as file:
            file.write(damaged)
        os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns))  # whoever does harm may set the date back
    assert equal(read_all(path), expected)


def test_cache_files_are_verified_only_after_changes(whole, monkeypatch):
    path, expected = whole
    read_all(path)
    gone_through, checksum = [], checked_files._checksum
    monkeypatch.setattr(checked_files, '_checksum', lambda file: gone_through.append(file) or checksum(file))
    read_all(path)
    assert not gone_through
    os.utime(os.path.join(cache.cache_folder(path), 'train', 'pictures_64.npy'))
    for _ in range(2):
        assert equal(read_all(path), expected)
        assert [os.path.basename(file) for file in gone_through] == ['pictures_64.npy']


@pytest.mark.parametrize('content', [b'[]', b'{"index.json": 1}', b'{"index.json": {"stamp": []}}', b'\xff',
                                     b'[' * 99999])
def test_an_invalid_checksum_record_is_rebuilt(content, whole):
    path, expected = whole
    with open(os.path.join(cache.cache_folder(path), 'train', 'checksums.json'), 'wb') as file:
        file.write(content)
    assert equal(read_all(path), expected)


@pytest.mark.parametrize('name', [*FILES, '../lock'])
def test_pipes_do_not_block(name, tmp_path):
    path = tiny.make(tmp_path / 'birds.hdf5')
    expected, place = read_all(path), os.path.join(cache.cache_folder(path), 'train', name)
    os.remove(place)
    os.mkfifo(place)
    if name in ('index.json', 'embeddings.npy', 'checksums.json'):  # without which all is made anew
        assert equal(read_all(path), expected)
    else:
        assert f'{os.path.basename(name)}: cannot be written' in one_line(read_all, path)


@pytest.mark.parametrize('damage', [half, emptied, deleted, byte_between])
def test_damaged_features_are_recomputed(damage, tmp_path, monkeypatch):
    path, computed = tiny.make(tmp_path / 'birds.hdf5'), []
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    monkeypatch.setattr(image_encoder, 'pretrained',
                        lambda *_: computed.append(1) or (network, (0,) * 3, (255,) * 3, 3))
    expected = image_encoder.load_photographs('googlenet', path, 'train')
    kept = tmp_path / 'birds.cache' / 'googlenet_train.npz'
    data = damage(kept.read_bytes())
    kept.unlink() if data is None else kept.write_bytes(data)
    for _ in range(2):
        assert torch.equal(image_encoder.load_photographs('googlenet', path, 'train'), expected)
    assert len(computed) == 2


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    path = tiny.make(tmp_path / 'birds.hdf5')
    script = ('import os, signal, sys\n'
              'from data import cache, checked_files\n'
              'from data.txt2image_dataset import preprocess\n'
              'write, written = checked_files._ChecksumWriter.write, []\n'
              'def end(self, data):\n'
              '    write(self, data)\n'
              '    written.append(self.file.name)\n'
              '    if "pictures" in self.file.name and len(written) > 4:\n'
              '        self.file.flush()\n'
              '        os.kill(os.getpid(), signal.SIGKILL)\n'
              'checked_files._ChecksumWriter.write = end\n'
              'cache.load_split(sys.argv[1], "train", 64, preprocess)')
    assert subprocess.run([sys.executable, '-c', script, path], cwd=ROOT).returncode == -9
    folder = tmp_path / 'birds.cache'
    (folder / 'googlenet_train.npz.partial-12345678').write_bytes(b'1')
    assert list(folder.glob('train/pictures_64.npy.partial-*'))
    cache.load_split(path, 'train')
    assert not list(folder.glob('**/*partial*'))
    assert Text2ImageDataset(path).pictures.float().std() > 5


def test_files_of_others_in_a_linked_cache_folder_stay(tmp_path):
    theirs = ['train/thesis.txt', 'train/data/pictures_64.npy', 'notes.partial-1', 'other/x.partial-y/f', 'frames_1',
              'train/frames_2024/f', 'train/pictures_of_holiday.jpg']
    for name in theirs:
        (tmp_path / 'mine' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'mine' / name).write_text('precious')
    (tmp_path / 'birds.cache').symlink_to('mine')
    path = tiny.make(tmp_path / 'birds.hdf5')
    Text2ImageDataset(path)
    tiny.make(path, {'train': {'001.Auk': 1, '002.Jay': 1}})
    assert len(Text2ImageDataset(path)) == 4
    assert all((tmp_path / 'mine' / name).read_text() == 'precious' for name in theirs)


@pytest.mark.parametrize('name', FILES)
def test_a_full_disk_is_a_one_line_error(name, tmp_path, monkeypatch):
    path = tiny.make(tmp_path / 'birds.hdf5')

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, attribute):
            return getattr(self.file, attribute)

        def write(self, data):
            raise OSError(errno.ENOSPC, 'No space left on device')

    atomic_write = checked_files.files.atomic_write

    def full(target):
        return _wrapped(atomic_write(target), Full if os.path.basename(target) == name else lambda file: file)

    monkeypatch.setattr(checked_files.files, 'atomic_write', full)
    message = one_line(read_all, path)
    assert 'disk full' in message and name in message and ('--cache False' in message or 'frames' not in name)
    assert not list(tmp_path.glob('**/*partial*')) and not list(tmp_path.glob(f'**/{name}'))
    monkeypatch.undo()
    assert len(read_all(path)[0]) == 14


class _wrapped:
    def __init__(self, manager, wrap):
        self.manager, self.wrap = manager, wrap

    def __enter__(self):
        return self.wrap(self.manager.__enter__())

    def __exit__(self, *error):
        return self.manager.__exit__(*error)


def test_a_real_full_disk_is_reported_and_leaves_nothing(tmp_path):
    """On a real small disk, even a write that was not checked before fails with the file's name and leaves nothing."""
    path = tiny.make(tmp_path / 'birds.hdf5', {'train': {'001.Auk': 20, '002.Jay': 20}})
    (tmp_path / 'birds.cache').mkdir()
    script = ('import sys\nfrom data import cache, multiscale_dataset as m\nfrom common import files\n'
              'from common.errors import run_command\n'
              'files.check_space = lambda *_: None\n'
              'run_command(lambda: m.MultiscaleDataset(sys.argv[1], branches=1).cached())')
    command = f'mount -t tmpfs -o size=1m tmpfs {tmp_path}/birds.cache && {sys.executable} -c "$0" {path}; ' \
              f'status=$?; find {tmp_path}/birds.cache -name "*partial*"; exit $status'
    try:
        ended = subprocess.run(['unshare', '-m', 'sh', '-c', command, script], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip('the system has no unshare')
    if 'unshare' in ended.stderr or 'mount' in ended.stderr:
        pytest.skip('only root may mount a small disk')
    assert ended.returncode == 1 and 'frames_76.bin: disk full' in ended.stderr and '--cache False' in ended.stderr
    assert len(ended.stderr.splitlines()) == 1 and 'partial' not in ended.stdout


# --- data that is replaced --------------------------------------------------------------------------------------------

def test_replaced_data_is_an_error_until_it_is_put_back(tmp_path):
    path = tiny.make(tmp_path / 'birds.hdf5')
    dataset = MultiscaleDataset(path, **TINY)
    torch.manual_seed(0)
    before = dataset[0]
    os.rename(path, tmp_path / 'kept')
    assert 'birds.hdf5: can no longer be read' in one_line(dataset.__getitem__, 0)
    tiny.make(path, {'train': {'009.Kiwi': 3}})
    said = one_line(dataset.__getitem__, 0)
    assert 'birds.hdf5: has changed since it was first read; restore it, or start again' in said
    os.replace(tmp_path / 'kept', path)
    torch.manual_seed(0)
    assert same(dataset[0]['right_images'], before['right_images'])
