"""Images without captions: class folders, and LSUN's databases."""
import errno
import os
import pickle
import shutil
import sys
from collections import Counter

import lmdb
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data.image_folder import image_folder, lsun
from tests import tiny
from tests.errors import one_line
from tests.scenes import COLORS, TINY, class_shown, measure, same, slope


@pytest.fixture
def folder(tmp_path):
    """Return a folder of class folders with PNGs; the images of a class have its color."""
    for name, color in COLORS.items():
        (tmp_path / 'pictures' / name / 'deeper').mkdir(parents=True)
        for place in ('a.png', 'deeper/b.png'):
            Image.new('RGB', (30, 20), color).save(tmp_path / 'pictures' / name / place)
    (tmp_path / 'pictures' / 'empty').mkdir()
    (tmp_path / 'pictures' / 'notes.txt').write_text('no picture')
    return str(tmp_path / 'pictures')


def classes_of(dataset):
    return Counter(class_shown(dataset[i]['right_images']) for i in range(len(dataset)))


def test_class_folders_are_read(folder):
    dataset = image_folder(folder, **TINY)
    assert classes_of(dataset) == dict.fromkeys(COLORS, 2) and set(dataset[0]) == {'right_images'}
    batch = next(iter(DataLoader(dataset, 5)))
    assert [image.shape for image in batch['right_images']] == [(5, 3, 16, 16), (5, 3, 32, 32), (5, 3, 64, 64)]
    assert [image.shape[-1] for image in image_folder(folder)[0]['right_images']] == [64, 128, 256]


def test_links_are_followed_but_no_image_is_read_twice(folder, tmp_path, capsys):
    class_folder = os.path.join(folder, '001.Auk')
    jay = os.path.join(folder, '002.Jay')
    links = {'loop': class_folder, 'deeper/up': class_folder, 'all': folder, 'jay': jay, 'in': f'{jay}/deeper',
             '../Z': jay, '../000': jay}
    for name, target in links.items():
        os.symlink(target, os.path.join(class_folder, name))
    (tmp_path / 'elsewhere').mkdir()
    Image.new('RGB', (30, 20), COLORS['002.Jay']).save(tmp_path / 'elsewhere' / 'c.PNG')
    os.symlink(tmp_path / 'elsewhere', os.path.join(folder, '002.Jay', 'linked'))
    found = [os.path.relpath(path, folder) for path, _ in image_folder(folder, **TINY).source.samples]
    assert found == ['001.Auk/a.png', '001.Auk/deeper/b.png', '002.Jay/a.png', '002.Jay/deeper/b.png',
                     '002.Jay/linked/c.PNG', '003.Owl/a.png', '003.Owl/deeper/b.png']
    said = capsys.readouterr().out
    for name in links:
        path = os.path.normpath(os.path.join(class_folder, name))
        assert f'skipped {path}: a link to a folder that is read already' in said


def test_classes_selects_classes(folder):
    dataset = image_folder(folder, ['003.Owl', '001.Auk'], **TINY)
    assert classes_of(dataset) == {'001.Auk': 2, '003.Owl': 2}


def test_folder_images_are_cropped_and_flipped(tmp_path):
    (tmp_path / 'all').mkdir()
    slope().save(tmp_path / 'all' / 'slope.png')
    dataset = image_folder(str(tmp_path), **TINY)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    items = dataset.__getitems__([0] * 20)
    flipped, across, down = torch.tensor([measure(item['right_images'][-1]) for item in items]).T
    assert 0.2 < flipped.mean() < 0.8 and across.std() > 0.05 and down.std() > 0.01
    torch.set_rng_state(state)
    assert all(same(a['right_images'], b['right_images']) for a, b in zip(items, dataset.__getitems__([0] * 20)))


def test_unusable_folders_are_an_error(folder, tmp_path):
    assert 'absent: no such folder' in one_line(image_folder, str(tmp_path / 'absent'))
    assert "has no class folder '004.Emu' (it has 001.Auk, 002.Jay, 003.Owl, empty)" in one_line(
        image_folder, folder, ['001.Auk', '004.Emu'])
    assert 'no images in its class folders (empty)' in one_line(image_folder, folder, ['empty'])
    assert 'holds no class folders' in one_line(image_folder, os.path.join(folder, 'empty'))
    with open(os.path.join(folder, 'empty', 'broken.png'), 'wb') as file:
        file.write(b'not a picture')
    assert 'no images in its class folders (empty)' in one_line(image_folder, folder, ['empty'])


def test_folders_that_cannot_be_listed_are_reported(folder, monkeypatch, capsys):
    locked, scandir = set(), os.scandir

    def listed(path):
        if str(path) in locked:
            raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', listed)  # permissions do not bind the administrator
    inner = os.path.join(folder, '001.Auk', 'deeper')
    os.makedirs(inner, exist_ok=True)
    locked.add(inner)
    image_folder(folder, **TINY)
    assert f'skipped {inner}: the folder cannot be listed (Permission denied)' in capsys.readouterr().out
    locked.add(folder)
    assert f'{folder}: cannot be listed (Permission denied)' in one_line(image_folder, folder)


def test_skipped_files_are_counted(folder, capsys):
    image_folder(folder, **TINY)
    assert capsys.readouterr().out == ''
    for name in ('loose.JPG', '.hidden.jpg', '001.Auk/a.jfif', '001.Auk/deeper/b.HEIC', '002.Jay/c.heic',
                 '002.Jay/LIES', '003.Owl/.DS_Store', '.cache/x.png', '003.Owl/.thumbnails/x.png'):
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.new('RGB', (9, 9)).save(path, 'PNG')
    dataset = image_folder(folder, **TINY)
    assert classes_of(dataset) == dict.fromkeys(COLORS, 2)
    assert capsys.readouterr().out == (f'{folder}: left out 4 files of other types (.heic, .jfif, none) and '
                                       '1 images beside the class folders\n')


def test_a_fingerprint_says_whether_the_pictures_are_others(folder, tmp_path):
    before = image_folder(folder, **TINY).fingerprint
    assert set(before) == {'pictures'} and int(before['pictures'], 16)
    assert image_folder(folder, ['001.Auk'], **TINY).fingerprint != before
    moved = str(tmp_path / 'moved')
    shutil.copytree(folder, moved)
    assert image_folder(moved, **TINY).fingerprint == before
    os.rename(os.path.join(moved, '001.Auk', 'a.png'), os.path.join(moved, '001.Auk', 'c.png'))
    assert image_folder(moved, **TINY).fingerprint != before
    Image.new('RGB', (90, 20), 'red').save(os.path.join(folder, '001.Auk', 'a.png'))
    assert image_folder(folder, **TINY).fingerprint != before


def test_a_requested_class_without_images_is_an_error(folder):
    os.mkdir(os.path.join(folder, 'broken'))
    with open(os.path.join(folder, 'broken', 'a.png'), 'wb') as file:
        file.write(b'not a picture')
    for name in ('empty', 'broken'):
        said = one_line(image_folder, folder, ['001.Auk', name])
        assert said.startswith(f'{folder}/{name}: holds no usable image; put JPEG or PNG files in it')
    assert len(image_folder(folder, ['001.Auk', '001.Auk'], **TINY)) == 2
    assert len(image_folder(folder, **TINY)) == 6  # where they were not asked for


def test_lsun_needs_lmdb(monkeypatch):
    monkeypatch.setitem(sys.modules, 'lmdb', None)  # as where it is not installed
    assert 'pip install lmdb' in one_line(lsun, 'lsun', ['church_outdoor_train'])


def write_lmdb(path, pictures):
    """Write `pictures`, {key: bytes}, as an LMDB database."""
    with lmdb.open(path) as database, database.begin(write=True) as transaction:
        for key, picture in pictures.items():
            transaction.put(key, picture)


class Trap:
    def __reduce__(self):
        return open, ('sprung', 'w')


def test_lsun_databases_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('church_outdoor_train', 'tower_val'):
        write_lmdb(f'{name}_lmdb', {str(seed).encode(): tiny.jpeg(seed) for seed in range(3)})
    dataset = lsun('.', ['church_outdoor_train'], **TINY)
    batch = next(iter(DataLoader(dataset, 3)))
    assert len(dataset) == 3 and set(batch) == {'right_images'}
    assert [image.shape for image in batch['right_images']] == [(3, 3, 16, 16), (3, 3, 32, 32), (3, 3, 64, 64)]
    both = lsun('.', ['tower_val', 'church_outdoor_train'], **TINY)
    assert len(both) == 6 and both.fingerprint != dataset.fingerprint
    for index in range(6):
        torch.manual_seed(0)
        item = both[index]
        torch.manual_seed(0)
        assert same(item['right_images'], dataset[index % 3]['right_images'])


def test_lsun_works_in_worker_processes(tmp_path):
    write_lmdb(str(tmp_path / 'tower_val_lmdb'), {str(seed).encode(): tiny.jpeg(seed) for seed in range(4)})
    dataset = lsun(str(tmp_path), ['tower_val'], **TINY)
    dataset[0]  # opened here first: an open database would not survive the fork
    assert sum(len(batch['right_images'][0]) for batch in DataLoader(dataset, 2, num_workers=2)) == 4


def test_unusable_lsun_databases_are_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lmdb('tower_val_lmdb', {})
    assert 'tower_val holds no images' in one_line(lsun, '.', ['tower_val'])
    assert 'bedroom_train_lmdb: no such folder' in one_line(lsun, '.', ['tower_val', 'bedroom_train'])
    with open(os.path.join('tower_val_lmdb', 'data.mdb'), 'wb') as file:
        file.write(b'no database' * 1000)
    assert 'tower_val_lmdb: cannot be read (' in one_line(lsun, '.', ['tower_val'])


def test_lsun_reads_no_pickle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lmdb('church_outdoor_train_lmdb', {b'a': tiny.jpeg(), b'b': b'no picture'})
    for name in ('_cache_churchoutdoortrainlmdb', '_cache_'):  # where torchvision's LSUN would keep its keys
        with open(name, 'wb') as file:
            pickle.dump(Trap(), file)
    before = sorted(os.listdir())
    dataset = lsun('.', ['church_outdoor_train'], **TINY)
    assert len(dataset) == 2 and len(dataset[0]['right_images']) == 3 and sorted(os.listdir()) == before
