"""The HDF5 layout, its cache, and Text2ImageDataset, on tiny files."""
import glob
import io
import os
import subprocess
import sys
import warnings

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from char_cnn_rnn.reading import require_embeddings
from common.errors import UserError
from common.flags import ROOT
from data import cache, layout, txt2image_dataset
from data.txt2image_dataset import Text2ImageDataset
from tests import tiny
from tests.errors import one_line
from tests.golden_numbers import golden


@pytest.fixture
def dataset(birds):
    torch.manual_seed(0)
    return Text2ImageDataset(birds)


def chapters_picture(jpeg):
    """Return an image preprocessed as in the chapter, float32 [3, 64, 64], by independent code."""
    pixels = np.array(Image.open(io.BytesIO(jpeg)).resize((64, 64)), dtype=float)
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, axis=2)
    return torch.FloatTensor((pixels.transpose(2, 0, 1) - 127.5) / 127.5)


# --- layout -----------------------------------------------------------------------------------------------------------

def test_written_captions_and_photographs_are_read(birds):
    with layout.open_file(birds) as file:
        assert [len(file[split]) for split in layout.SPLITS] == [14, 0, 8]
        for split, classes in tiny.SPLITS.items():
            index = layout.read_index(file, split)
            photographs = {p.name: p for p in tiny.photographs(split, classes)}
            assert sorted(index.names) == sorted(photographs)
            for name, class_name, box, key in zip(index.names, index.classes, index.boxes, index.img_keys):
                assert (class_name, tuple(box)) == (photographs[name].class_name, photographs[name].bbox)
                assert layout.read_jpeg(file, split, key) == photographs[name].jpeg
            embeddings = layout.read_embeddings(file, split, index.keys)
            for key, caption, photo, row in zip(index.keys, index.captions, index.photo_of, embeddings):
                photograph, k = photographs[index.names[photo]], int(key[-1])
                assert caption == photograph.captions[k] and np.array_equal(row, photograph.embeddings[k])


def test_a_photograph_is_stored_once_and_linked(birds):
    with h5py.File(birds) as file:
        groups = [file[f'train/Auk_0_{k}'] for k in range(len(tiny.CAPTIONS))]
        for name in ('img', 'name', 'class', 'bbox'):
            assert len({h5py.h5o.get_info(group[name].id).addr for group in groups}) == 1
        assert len({h5py.h5o.get_info(group['txt'].id).addr for group in groups}) == len(groups)


def test_the_chapters_loader_reads_our_file(birds):
    with h5py.File(birds) as file:  # as the chapter's __getitem__ does
        example = file['train']['Auk_0_1']
        assert Image.open(io.BytesIO(bytes(np.array(example['img'])))).size == (50, 40)
        assert np.array(example['embeddings'], dtype=float).shape == (1024,)
        assert example['txt'][()].decode() == 'un oiseau coloré – très petit “ébène”, Auk_0'
        assert example['class'][()].decode() == '001.Auk' and example['name'][()].decode() == 'Auk_0'


def test_duplicate_photograph_names_in_a_class_are_an_error(tmp_path):
    photograph = next(tiny.photographs('train', {'001.Auk': 1}))
    with layout.replace_file(str(tmp_path / 'a.hdf5')) as file:
        layout.write_photograph(file, 'train', photograph)
        with pytest.raises(UserError, match='001.Auk/Auk_0: two photographs in /train have this'):
            layout.write_photograph(file, 'train', photograph)


@pytest.fixture
def public_file(tmp_path):
    """Write a file as the chapter's converter does: five captions, each with a copy of everything, no bounding box."""
    path, text = str(tmp_path / 'public.hdf5'), h5py.special_dtype(vlen=str)
    with h5py.File(path, 'w') as file:
        for split, classes in (('train', ['Auk', 'Jay']), ('valid', []), ('test', ['Owl'])):
            file.create_group(split)
            for seed, name in enumerate(classes):
                for k in range(5):
                    example = file[split].create_group(f'{name}_0001_{k}')
                    example.create_dataset('name', data=f'{name}_0001')
                    example.create_dataset('img', data=np.void(tiny.jpeg(seed)))
                    example.create_dataset('embeddings', data=np.full(1024, 5.0 * seed + k + 1))
                    example.create_dataset('class', data=f'00{seed}.{name}')
                    example.create_dataset('txt', data=np.array(f'a {name} with café wings {k}\n').astype(object),
                                           dtype=text)
    return path


def test_the_public_converters_file_is_read(public_file):
    dataset = Text2ImageDataset(public_file)
    assert len(dataset) == 10 and dataset.pictures.shape == (2, 3, 64, 64)
    for i in range(10):
        item, jay = dataset[i], i >= 5
        assert item['txt'] == f'a {"Jay" if jay else "Auk"} with café wings {i % 5}'
        assert torch.equal(item['right_embed'], torch.full((1024,), float(i + 1)))
        assert torch.equal(item['right_images'], chapters_picture(tiny.jpeg(int(jay))))
        assert torch.equal(item['wrong_images'], chapters_picture(tiny.jpeg(int(not jay))))
    with layout.open_file(public_file) as file:
        assert layout.read_index(file, 'train').boxes == [None, None]


def test_errors_say_what_to_run(tmp_path):
    missing = str(tmp_path / 'birds.hdf5')
    assert 'no such file' in one_line(Text2ImageDataset, missing)
    assert f'python data/birds/prepare.py --cub CUB_200_2011 --text text_c10 --out {missing}' in one_line(
        Text2ImageDataset, missing)
    toy = tmp_path / 'toy_birds.hdf5'
    assert 'python data/toy_birds/prepare.py' in one_line(Text2ImageDataset, str(toy))
    toy.write_bytes(b'no HDF5 at all' * 100)
    message = one_line(Text2ImageDataset, str(toy))
    assert 'not a readable HDF5 file' in message and 'python data/toy_birds/prepare.py' in message
    with h5py.File(missing, 'w') as file:
        file.create_group('train')
    message = one_line(Text2ImageDataset, missing)
    assert 'has no group /valid' in message and 'prepare.py' in message
    with h5py.File(missing, 'a') as file:
        file.create_group('valid'), file.create_group('test')
        file.create_group('train/Auk_0_0')['txt'] = 'a bird'
    message = one_line(Text2ImageDataset, missing)
    assert '/train/Auk_0_0 is incomplete' in message and 'prepare.py' in message


def test_a_damaged_photograph_is_a_one_line_error(tmp_path):
    path = str(tmp_path / 'birds.hdf5')
    with layout.replace_file(path) as file:
        layout.write_photograph(file, 'train', layout.Photograph('Auk', '001.Auk', tiny.jpeg()[:300], ['a bird']))
    assert 'the photograph Auk of /train cannot be decoded' in one_line(Text2ImageDataset, path)
    assert not glob.glob(str(tmp_path / '**' / '*partial*'), recursive=True)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tiny.make(tmp_path / 'birds.hdf5')
    with open(path, 'rb') as file:
        before = file.read()
    with pytest.raises(ZeroDivisionError), layout.replace_file(path) as file:
        file['train'].create_group('half')
        raise ZeroDivisionError
    with pytest.raises(UserError, match='/train has 14 captions, but there are 3 embeddings'):
        layout.write_embeddings(path, {'train': np.zeros((3, 1024))}, 'nobody')
    with open(path, 'rb') as file:
        assert file.read() == before
    assert os.listdir(tmp_path) == ['birds.hdf5']


def test_invalid_embeddings_are_not_written(tmp_path):
    path = tiny.make(tmp_path / 'birds.hdf5', embeddings=False)
    for number in (np.nan, np.inf):
        message = one_line(layout.write_embeddings, path, {'train': np.full((14, 1024), number)}, 'encoder.pt')
        assert 'encoder.pt gives embeddings with numbers that are infinite or NaN, so none are written' in message
    assert Text2ImageDataset(path).embeddings is None


def test_embeddings_can_be_added_later(tmp_path):
    path = tiny.make(tmp_path / 'birds.hdf5', embeddings=False)
    assert Text2ImageDataset(path).embeddings is None
    rows = np.random.default_rng(0).standard_normal((14, 1024)).astype(np.float32)
    layout.write_embeddings(path, {'train': rows}, 'a test')
    dataset = require_embeddings(Text2ImageDataset(path))
    assert torch.equal(dataset[3]['right_embed'], torch.from_numpy(rows[3]))
    with h5py.File(path) as file:
        assert file.attrs['embeddings'] == 'a test' and 'embeddings' not in file['test/Wren_0_0']


# --- items ------------------------------------------------------------------------------------------------------------

def test_items_have_the_documented_contents(dataset):
    assert len(dataset) == 14
    for item in (dataset[i] for i in range(14)):
        assert set(item) == {'right_images', 'wrong_images', 'right_embed', 'inter_embed', 'txt'}
        for name in ('right_images', 'wrong_images'):
            assert item[name].shape == (3, 64, 64) and item[name].dtype == torch.float32
            assert item[name].min() >= -1 and item[name].max() <= 1 and item[name].std() > 0.05
        for name in ('right_embed', 'inter_embed'):
            assert item[name].shape == (1024,) and item[name].dtype == torch.float32
            assert (dataset.embeddings == item[name]).all(1).any()
        assert isinstance(item['txt'], str)
    assert dataset[1]['txt'] == 'un oiseau coloré – très petit “ébène”, Auk_0'


def test_splits_are_selected_by_number(birds):
    assert [len(Text2ImageDataset(birds, split=split)) for split in (0, 1, 2)] == [14, 0, 8]


def test_images_equal_the_chapters_preprocessing(dataset):
    by_name = {p.name: p.jpeg for p in tiny.photographs('train', tiny.SPLITS['train'])}
    for i in range(len(dataset)):
        item = dataset[i]
        assert torch.equal(item['right_images'], chapters_picture(by_name[item['txt'].rpartition(' ')[2]]))


@pytest.mark.skipif('CUB_DATA' not in os.environ, reason='CUB_DATA names no folder of real photographs (cub_8)')
def test_real_photographs_equal_the_golden_images(tmp_path):
    folder, path = os.environ['CUB_DATA'], str(tmp_path / 'birds.hdf5')
    subprocess.run([sys.executable, os.path.join(ROOT, 'data', 'birds', 'prepare.py'), '--out', path, '--cub',
                    os.path.join(folder, 'CUB_200_2011'), '--text', os.path.join(folder, 'text_c10')], check=True)
    cached = {}
    for split in layout.SPLITS:
        found = cache.load_split(path, split, 64, txt2image_dataset.preprocess)
        cached |= dict(zip(found.index.names, found.pictures.permute(0, 2, 3, 1).numpy()))
    numbers = {key.partition('|')[0]: value for key, value in golden('preprocessing')[0].items() if 'chapter_64' in key}
    assert len(numbers) == 4
    for name, expected in numbers.items():
        assert np.array_equal(cached[os.path.basename(name)], expected)


def class_of_picture(dataset, image):
    images = dataset.pictures.float().sub(127.5).div(127.5)
    return dataset.classes[int((images == image).flatten(1).all(1).nonzero()[0])]


def test_wrong_images_come_evenly_from_all_other_classes(dataset):
    for caption in range(len(dataset)):
        own = dataset.classes[dataset.photo_of[caption]]
        wrong = dataset.gather([caption] * 100)['wrong_images']
        counts = {}
        for image in wrong:
            name = class_of_picture(dataset, image)
            counts[name] = counts.get(name, 0) + 1
        assert set(counts) == set(dataset.classes) - {own}
        pictures = {name: dataset.classes.count(name) for name in counts}
        for name, count in counts.items():
            assert abs(count / 100 - pictures[name] / sum(pictures.values())) < 0.2


def test_a_single_class_gives_other_images_and_prints_it_once(tmp_path):
    path = tiny.make(tmp_path / 'birds.hdf5', {'train': {'001.Auk': 4}})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        dataset = Text2ImageDataset(path)
        items = [dataset[i] for i in range(len(dataset)) for _ in range(20)]
    assert len(caught) == 1 and "of the class '001.Auk'" in str(caught[0].message)
    assert not any(torch.equal(item['right_images'], item['wrong_images']) for item in items)
    assert len({item['wrong_images'].sum().item() for item in items}) == 4


@pytest.mark.filterwarnings('ignore:.*all photographs')
def test_a_single_photograph_is_its_own_wrong_image(tmp_path):
    item = Text2ImageDataset(tiny.make(tmp_path / 'birds.hdf5', {'train': {'001.Auk': 1}}, ('a bird',)))[0]
    assert torch.equal(item['right_images'], item['wrong_images']) and item['txt'] == 'a bird, Auk_0'


def test_an_empty_split_has_no_items(birds):
    for _ in range(2):  # made, then from the cache
        dataset = Text2ImageDataset(birds, split=1)
        assert len(dataset) == 0 and list(dataset) == []
    assert 'holds no captions' in one_line(require_embeddings, dataset)


def test_a_file_without_embeddings_is_readable(tmp_path):
    dataset = Text2ImageDataset(tiny.make(tmp_path / 'birds.hdf5', embeddings=False))
    assert set(dataset[0]) == {'right_images', 'wrong_images', 'txt'}
    assert next(iter(DataLoader(dataset, 4)))['right_images'].shape == (4, 3, 64, 64)
    message = one_line(require_embeddings, dataset)
    assert 'python char_cnn_rnn/main.py --train' in message and 'python char_cnn_rnn/main.py --embed' in message
    assert f'--data_dir {tmp_path}' in message


def test_a_single_missing_embedding_is_reported(tmp_path):
    path = tiny.make(tmp_path / 'birds.hdf5')
    with h5py.File(path, 'a') as file:
        del file['train/Jay_0_1/embeddings']
    assert '/train/Jay_0_1 has no embedding' in one_line(require_embeddings, Text2ImageDataset(path))


# --- batches ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('workers', [0, 2])
def test_every_kind_of_data_loader_gives_the_same_batches(dataset, workers):
    epochs = []
    for collate in (None, dataset.collate):
        torch.manual_seed(3)
        epochs.append(list(DataLoader(dataset, 4, shuffle=True, num_workers=workers, collate_fn=collate)))
    assert [len(batch['txt']) for batch in epochs[0]] == [4, 4, 4, 2]
    assert sorted(caption for batch in epochs[0] for caption in batch['txt']) == sorted(dataset.captions)
    for stock, ours in zip(*epochs):
        assert set(stock) == set(ours) and list(stock['txt']) == list(ours['txt'])
        for name in set(stock) - {'txt'}:
            assert torch.equal(stock[name], ours[name])


def test_transform_is_applied_to_every_image(birds):
    seen = []

    def transform(image):
        seen.append(image.shape)
        return image[:, ::2, ::2] * 0.5

    torch.manual_seed(0)
    plain = Text2ImageDataset(birds).gather([0, 5])
    torch.manual_seed(0)
    changed = Text2ImageDataset(birds, transform=transform).gather([0, 5])
    assert seen == [(3, 64, 64)] * 4
    for name in ('right_images', 'wrong_images'):
        assert torch.equal(changed[name], plain[name][:, :, ::2, ::2] * 0.5)


# --- cache ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def decoded(monkeypatch):
    """Return a list that grows by one with every decoded photograph."""
    calls, preprocess = [], txt2image_dataset.preprocess
    monkeypatch.setattr(txt2image_dataset, 'preprocess', lambda *args: calls.append(1) or preprocess(*args))
    return calls


def test_the_cache_is_rebuilt_only_when_the_file_changes(tmp_path, decoded):
    path = tiny.make(tmp_path / 'birds.hdf5')
    first = Text2ImageDataset(path)
    assert len(decoded) == 7
    second = Text2ImageDataset(path)
    assert len(decoded) == 7 and torch.equal(first.pictures, second.pictures) and first.captions == second.captions
    status = os.stat(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # the same size, another date
    Text2ImageDataset(path)
    assert len(decoded) == 7  # the photographs are the same
    tiny.make(path, {'train': {'001.Auk': 2, '009.Kiwi': 1}})
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # the same date, another size
    assert len(Text2ImageDataset(path)) == 6 and len(decoded) == 10
    assert not glob.glob(str(tmp_path / '**' / '*partial*'), recursive=True)


def test_data_replaced_with_the_same_size_and_date_is_read_again(tmp_path, decoded):
    path, other = (tiny.make(tmp_path / name) for name in ('birds.hdf5', 'other.hdf5'))
    layout.write_embeddings(other, {split: np.full((count, 1024), 7, np.float32)
                                    for split, count in (('train', 14), ('valid', 0), ('test', 8))}, 'others')
    with open(path, 'ab') as file:
        file.truncate(os.path.getsize(other))
    before, status = Text2ImageDataset(path), os.stat(path)
    os.replace(other, path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = Text2ImageDataset(path)
    assert os.path.getsize(path) == status.st_size
    assert (after.embeddings == 7).all() and not (before.embeddings == 7).any()
    assert len(decoded) == 7 and torch.equal(after.pictures, before.pictures)


def test_changed_pixels_are_not_written_to_the_cache(tmp_path):
    path = tiny.make(tmp_path / 'birds.hdf5')
    dataset = Text2ImageDataset(path)
    before = dataset.pictures.clone()
    dataset.pictures.zero_(), dataset[0]['right_images'].zero_()
    assert torch.equal(Text2ImageDataset(path).pictures, before)


def test_a_partial_cache_is_not_used(tmp_path, monkeypatch, decoded):
    path, preprocess = tiny.make(tmp_path / 'birds.hdf5'), txt2image_dataset.preprocess

    def fail(*args):
        if len(decoded) == 3:
            raise KeyboardInterrupt
        return preprocess(*args)

    monkeypatch.setattr(txt2image_dataset, 'preprocess', fail)
    with pytest.raises(KeyboardInterrupt):
        Text2ImageDataset(path)
    made = os.listdir(os.path.join(cache.cache_folder(path), 'train'))
    assert 'pictures_64.npy' not in made and not any('partial' in name for name in made)
    monkeypatch.setattr(txt2image_dataset, 'preprocess', preprocess)
    for damage in (None, b'{"stamp": ', b'[]'):
        if damage:
            with open(os.path.join(cache.cache_folder(path), 'train', 'index.json'), 'wb') as file:
                file.write(damage)
        dataset = Text2ImageDataset(path)
        assert len(dataset) == 14 and dataset.pictures.float().std() > 5 and dataset.embeddings.shape == (14, 1024)


def test_a_read_only_data_folder_works_without_a_cache(tmp_path, monkeypatch):
    data, temporary = tmp_path / 'data', tmp_path / 'temporary'
    data.mkdir(), temporary.mkdir()
    path, access = tiny.make(data / 'birds.hdf5'), os.access
    monkeypatch.setattr(cache.tempfile, 'tempdir', str(temporary))
    # Whoever runs as root may write everywhere, so only the question is answered as it would be on a read-only disk.
    monkeypatch.setattr(os, 'access', lambda place, mode: str(data) not in str(place) and access(place, mode))
    for _ in range(2):
        assert len(Text2ImageDataset(path)) == 14
    assert os.listdir(data) == ['birds.hdf5'] and len(os.listdir(temporary)) == 1


# --- what a data set is known by --------------------------------------------------------------------------------------

def test_fingerprints_show_what_has_changed(tmp_path):
    path = tiny.make(tmp_path / 'birds.hdf5')
    first = Text2ImageDataset(path)
    assert set(first.fingerprint) == {'captions', 'pictures', 'embeddings'} and first.encoder is None
    assert all(len(digits) == 16 and int(digits, 16) for digits in first.fingerprint.values())
    assert Text2ImageDataset(path).fingerprint == first.fingerprint  # from the cache

    def changed():
        now = Text2ImageDataset(path).fingerprint
        return {part for part in now if now[part] != first.fingerprint[part]}

    layout.write_embeddings(path, {'train': np.ones((14, 1024), np.float32)}, 'ones')
    assert changed() == {'embeddings'}
    tiny.make(path, captions=('another bird', 'and another'))
    assert changed() == {'captions'}
    with h5py.File(tiny.make(path), 'a') as file:
        file['train/Auk_0_0/bbox'][2] = 31
    assert changed() == {'captions'}
    with h5py.File(tiny.make(path), 'a') as file:
        for k in range(2):
            del file[f'train/Auk_0_{k}/img']
            file[f'train/Auk_0_{k}/img'] = np.void(tiny.jpeg(99))
    assert changed() == {'pictures'}
    assert Text2ImageDataset(tiny.make(path, embeddings=False)).fingerprint['embeddings'] is None


@pytest.mark.parametrize('attribute, read', [
    ('0123456789abcdef', '0123456789abcdef'), (np.bytes_('fixed'), 'fixed'), ('', None), ('x' * 1000, None),
    ('two\nlines', None), (5, None), (np.zeros(3), None), (['a', 'b'], None)])
def test_the_encoder_fingerprint_of_a_file_is_read(tmp_path, attribute, read):
    path = tiny.make(tmp_path / 'birds.hdf5')
    with h5py.File(path, 'a') as file:
        file.attrs['encoder'] = attribute
    for _ in range(2):  # made, then from the cache
        assert Text2ImageDataset(path).encoder == read
