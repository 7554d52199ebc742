"""Oxford-102 in Reed's layout -> HDF5, with his class lists and embeddings."""
import os
import sys

import numpy as np
import pytest

from common.errors import UserError
from data import layout
from data.flowers import prepare
from tests.test_birds_prepare import captions, embedding, jpeg, write
from tests.test_published_embeddings import t7_file

FLOWERS = {'class_00001': [6734, 6735], 'class_00002': [5087], 'class_00102': [8000, 8001]}


@pytest.fixture
def flowers(tmp_path):
    """Write a few photographs, captions, lists and embeddings as published; return the flags of the command."""
    for class_name, numbers in FLOWERS.items():
        for number in numbers:
            name = f'image_{number:05}'
            write(tmp_path / 'jpg' / f'{name}.jpg', jpeg(seed=number))
            write(tmp_path / 'text_c10' / class_name / f'{name}.txt', '\n'.join(captions(name)))
            t7_file(tmp_path / 'flowers_icml' / class_name / f'{name}.t7', embedding(name))
    write(tmp_path / 'jpg' / 'image_00001.jpg', jpeg())
    for name, text in {'train': 'class_00001\n', 'val': 'class_00002\n', 'test': 'class_00102\n',
                       'trainval': 'class_00001\nclass_00002\n'}.items():
        write(tmp_path / f'{name}classes.txt', text)
    return ['--images', tmp_path / 'jpg', '--text', tmp_path / 'text_c10', '--out', tmp_path / 'made' / 'flowers.hdf5']


def run(monkeypatch, typed):
    monkeypatch.setattr(sys, 'argv', ['prepare.py', *map(str, typed)])
    prepare.main()


def test_reeds_layout_lists_and_embeddings(tmp_path, monkeypatch, capsys, flowers):
    run(monkeypatch, [*flowers, '--icml', tmp_path / 'flowers_icml'])
    said = capsys.readouterr().out
    assert 'without captions: 1 photographs (image_00001)' in said and said.endswith('skipped 0 photographs\n')
    with layout.open_file(str(flowers[-1])) as file:
        found = {split: layout.read_index(file, split) for split in layout.SPLITS}
        assert [index.classes for index in found.values()] == [
            ['class_00001'] * 2, ['class_00002'], ['class_00102'] * 2]
        assert layout.read_jpeg(file, 'valid', 'image_05087_0') == jpeg(seed=5087)
        assert found['test'].captions[:10] == captions('image_08000')
        row, = layout.read_embeddings(file, 'test', ['image_08001_3'])
    np.testing.assert_array_equal(row, embedding('image_08001')[3])


def test_other_endings_are_read_and_counted(tmp_path, monkeypatch, capsys, flowers):
    os.rename(tmp_path / 'text_c10/class_00002/image_05087.txt', tmp_path / 'text_c10/class_00002/image_05087.TXT')
    write(tmp_path / 'jpg' / 'image_00002.jpeg', jpeg())
    run(monkeypatch, [*flowers, '--dry_run'])
    said = capsys.readouterr().out
    assert 'valid: 1 photographs' in said and 'without captions: 2 photographs (image_00001, image_00002)' in said


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys, flowers):
    os.remove(tmp_path / 'jpg' / 'image_06735.jpg')
    run(monkeypatch, [*flowers, '--train_classes', tmp_path / 'trainvalclasses.txt', '--dry_run'])
    said = capsys.readouterr().out
    assert 'skipped class_00001/image_06735: its photograph is missing' in said and 'train: 2 photographs' in said
    assert 'left out: 2 photographs of 1 classes' in said and not (tmp_path / 'made').exists()
    os.remove(tmp_path / 'trainclasses.txt')
    images, text, lists = flowers[:2], flowers[2:4], ['--train_classes', tmp_path / 'trainvalclasses.txt']
    for typed, message in ((flowers, "put Reed's class lists there"),
                           (['--images', tmp_path / 'absent', *text, *flowers[4:], *lists], '--images'),
                           ([*images, '--text', tmp_path / 'jpg', *flowers[4:], *lists], 'holds no CLASS/NAME.txt')):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, typed)
