"""MultiscaleDataset on tiny files, and StackGAN++'s preprocessing on real ones."""
import io
import itertools
import os
import subprocess
import sys
import warnings
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from char_cnn_rnn.reading import require_embeddings
from common.flags import ROOT
from data import layout, multiscale_dataset
from data.cropped_dataset import CroppedDataset
from data.multiscale_dataset import MultiscaleDataset, crop_box, frame
from data.pictures import read_picture
from data.seeded import SeededDataset
from tests import tiny
from tests.errors import one_line
from tests.golden_numbers import golden
from tests.scenes import COLORS, TINY, class_shown, epoch, measure, same, slope


@pytest.fixture
def dataset(birds):
    torch.manual_seed(0)
    return MultiscaleDataset(birds, **TINY)


def write(path, pictures, captions=('a bird',), bbox=None):
    """Write a file whose train split holds (class, PIL image) pairs, and return its path."""
    with layout.replace_file(str(path)) as file:
        for number, (class_name, picture) in enumerate(pictures):
            buffer = io.BytesIO()
            picture.save(buffer, 'JPEG', quality=95)
            photograph = layout.Photograph(f'{class_name[4:]}_{number}', class_name, buffer.getvalue(), captions,
                                           np.full((len(captions), layout.EMBED_DIM), number, np.float32), bbox)
            layout.write_photograph(file, 'train', photograph)
    return str(path)


def pixels(image):
    """Convert float32 [3, S, S] in [-1, 1] to uint8 [S, S, 3]; assert that values are multiples of 1/255."""
    image = image.double() * 127.5 + 127.5
    assert (image - image.round()).abs().max() < 1e-4
    return image.round().to(torch.uint8).permute(1, 2, 0).numpy()


# --- crop_box, frame, crop, all_sizes ---------------------------------------------------------------------------------

def views(framed, sizes, *draws):
    """Return the images [3, S, S] of one crop at all sizes."""
    crop = multiscale_dataset.crop(np.asarray(framed), sizes[-1], *draws)
    return [images[0] for images in multiscale_dataset.all_sizes(torch.tensor(crop.copy())[None], sizes)]


def test_the_crop_box_equals_the_authors():
    facts = golden('preprocessing')[1]
    assert len(facts) == 4
    for fact in facts.values():
        assert list(crop_box(fact['size'], fact['box'])) == fact['crop']


@pytest.mark.parametrize('bbox, expected', [
    (None, (0, 0, 50, 40)),                     # the public file has none
    ((20, 10, 10, 6), (18, 6, 32, 20)),         # 7 = int(0.75 x 10) to each side of (25, 13)
    ((20.0, 10.0, 6.0, 11.0), (15, 7, 31, 23)),
    ((1, 2, 30.5, 20), (0, 0, 38, 34)),
    ((100, 100, 20, 20), (0, 0, 50, 40)),       # shows nothing of the photograph
    ((20, 10, 0.5, 0.5), (0, 0, 50, 40)),
])
def test_crop_boxes_are_clipped(bbox, expected):
    assert crop_box((50, 40), bbox) == expected


def test_the_shorter_side_of_a_frame_is_76_64ths_of_the_image():
    picture = Image.new('RGB', (50, 40), (250, 0, 0))
    picture.paste((0, 0, 250), (18, 6, 32, 20))
    framed = frame(picture.crop(crop_box(picture.size, (20, 10, 10, 6))), 64)
    assert framed.size == (76, 76) and framed.getcolors() == [(76 * 76, (0, 0, 250))]
    assert frame(picture, 64).size == (95, 76) and len(frame(picture, 64).getcolors(9999)) > 1
    reduced = frame(slope((601, 400)), 64)  # 76 x 601 / 400 = 114.19
    assert np.array_equal(reduced, slope((601, 400)).resize((114, 76), Image.BILINEAR))


@pytest.mark.parametrize('size', [(50, 40), (40, 50), (300, 2), (1, 90), (5, 5)])
def test_every_photograph_can_be_cropped(size):
    framed = frame(slope(size), 64)
    assert min(framed.size) == 76
    for draw in (0.0, 0.5, 1 - 2 ** -53):
        assert [view.shape for view in views(framed, [16, 32, 64], draw, draw, draw)] == [
            (3, 16, 16), (3, 32, 32), (3, 64, 64)]


def test_crops_are_at_the_given_place():
    across, down = np.meshgrid(np.arange(95), np.arange(76))
    framed = Image.fromarray(np.stack([across, down, across], axis=2).astype(np.uint8))
    for x, y, left, top in ((0, 0, 0, 0), (0.99, 0, 31, 0), (0, 0.99, 0, 12), (0.5, 0.5, 16, 6)):
        upright, flipped = (pixels(views(framed, [64], x, y, flip)[0]) for flip in (0.49, 0.5))
        assert np.array_equal(upright[:, :, 0], np.tile(np.arange(left, left + 64), (64, 1)))
        assert np.array_equal(upright[:, :, 1], np.tile(np.arange(top, top + 64)[:, None], (1, 64)))
        assert np.array_equal(flipped, upright[:, ::-1])


def framed_bird(jpeg, bbox, size):
    return frame(read_picture(jpeg, lambda whole: crop_box(whole, bbox)), size)


def center(framed, size):
    """Return the random numbers for `views` that crop where torchvision's CenterCrop does."""
    room = [side - size for side in framed.size]
    return [(round(pixels / 2) + 0.5) / (pixels + 1) for pixels in room]


@pytest.mark.skipif('CUB_DATA' not in os.environ, reason='CUB_DATA names no folder of real photographs (cub_8)')
def test_real_photographs_equal_the_golden_images(tmp_path):
    folder, path = os.environ['CUB_DATA'], str(tmp_path / 'birds.hdf5')
    subprocess.run([sys.executable, os.path.join(ROOT, 'data', 'birds', 'prepare.py'), '--out', path, '--cub',
                    os.path.join(folder, 'CUB_200_2011'), '--text', os.path.join(folder, 'text_c10')], check=True)
    (numbers, facts), met = golden('preprocessing'), 0
    with layout.open_file(path) as file:
        for split in layout.SPLITS:
            index = layout.read_index(file, split)
            for name in (os.path.splitext(name)[0] for name in facts):
                if os.path.basename(name) not in index.names:
                    continue
                photo = index.names.index(os.path.basename(name))
                framed = framed_bird(layout.read_jpeg(file, split, index.img_keys[photo]), index.boxes[photo], 256)
                for view in views(framed, [64, 128, 256], *center(framed, 256), 0):
                    size = view.shape[-1]
                    expected = numbers[f'{name}|stackgan_{size}']
                    assert np.array_equal(pixels(view)[::size // 64, ::size // 64], expected)
                    met += 1
    assert met == 12


def test_downsampling_floats_equals_downsampling_bytes_up_to_rounding():
    noise = torch.randint(256, (2, 3, 256, 256), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for size in (64, 128):
        floats, reduced = (multiscale_dataset.reduce(images, size) for images in (noise.float(), noise))
        difference = (floats - reduced.float()).abs()
        assert difference.max() <= 2 and difference.mean() < 0.5


# --- items ------------------------------------------------------------------------------------------------------------

def test_items_have_the_documented_contents(dataset):
    assert len(dataset) == 7
    for i in range(7):
        item = dataset[i]
        assert set(item) == {'right_images', 'wrong_images', 'right_embed', 'txt', 'class', 'name'}
        for name in ('right_images', 'wrong_images'):
            assert [image.shape for image in item[name]] == [(3, 16, 16), (3, 32, 32), (3, 64, 64)]
            for image in item[name]:
                assert image.dtype == torch.float32
                assert image.min() >= -1 and image.max() <= 1 and image.std() > 0.02
        assert (item['class'], item['name']) == (dataset.classes[i], dataset.index.names[i])
        assert item['txt'].endswith(f', {item["name"]}')


@pytest.mark.parametrize('chapters', [MultiscaleDataset, CroppedDataset])
def test_batches_do_not_depend_on_the_number_of_workers(birds, chapters):
    dataset, found = chapters(birds), []
    for workers in (0, 1, 3):
        torch.manual_seed(3)
        loader = multiscale_dataset.shuffled_batches(dataset, 3, workers, torch.device('cpu'))
        epochs = []
        for _ in range(2):
            for batch in loader:
                epochs.append(batch)
                torch.rand(1)  # as a training does, whose draws must not depend on how far workers are ahead
        found.append([*epochs, {'drawn': torch.rand(1)}])
    assert [len(batches) for batches in found] == [5, 5, 5]
    for one, *others in zip(*found):
        for other in others:
            assert one.keys() == other.keys()
            for name, values in one.items():
                is_drawn = name.endswith(('images', 'embed', 'drawn'))
                assert same(values, other[name]) if is_drawn else values == other[name]
                assert not name.endswith('images') or values[-1].dtype == torch.float32
    shown = [batch['right_images'][-1] for batch in found[0][:4]]
    assert not any(torch.equal(image, other) for image, other in itertools.combinations(torch.cat(shown), 2))


def test_a_batch_follows_from_its_seed(birds):
    dataset = MultiscaleDataset(birds, **TINY)
    before = torch.get_rng_state()
    item, again, other = (SeededDataset(dataset).__getitems__([(4, seed), (5, 0)])[0] for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    expected = dataset.__getitems__([4, 5])[0]
    assert same(item['right_images'], again['right_images']) and same(item['right_images'], expected['right_images'])
    assert not same(item['right_images'], other['right_images'])


def test_a_loader_yields_items_of_the_dataset(birds):
    dataset = MultiscaleDataset(birds)
    loader = multiscale_dataset.shuffled_batches(dataset, 3, 0, torch.device('cpu'))
    torch.manual_seed(3)
    asked = next(iter(loader.batch_sampler))
    expected = torch.utils.data.default_collate(SeededDataset(dataset).__getitems__(asked))
    torch.manual_seed(3)
    batch = next(iter(loader))
    assert batch.keys() == expected.keys() == set(dataset[0])
    for name, values in batch.items():
        assert same(values, expected[name]) if name.endswith(('images', 'embed')) else values == expected[name]


class ReadBy:
    """A data set whose batches hold the id of the process that reads them."""

    def __len__(self):
        return 12

    def __getitems__(self, numbers):
        return SimpleNamespace(batch={'process': os.getpid()})

    def finish(self, batch, device):
        return batch['process']


def test_workers_are_started_once():
    loader = multiscale_dataset.shuffled_batches(ReadBy(), 2, 2, torch.device('cpu'))
    first, second = set(loader), set(loader)
    assert first == second and len(first) == 2 and os.getpid() not in first


def test_splits_branches_and_sizes_are_selected(birds):
    assert [len(MultiscaleDataset(birds, split)) for split in (0, 1, 2)] == [7, 0, 4]
    assert [image.shape[-1] for image in MultiscaleDataset(birds)[0]['right_images']] == [64, 128, 256]
    assert [image.shape[-1] for image in MultiscaleDataset(birds, branches=1, base_size=8)[0]['right_images']] == [8]
    assert MultiscaleDataset(birds, branches=5).sizes == [64, 128, 256, 512, 1024]


def test_images_show_the_photograph_of_the_item(dataset):
    photographs = {p.name: p for p in tiny.photographs('train', tiny.SPLITS['train'])}
    for _ in range(3):
        for i in range(7):
            item = dataset[i]
            photograph = photographs[item['name']]
            framed = framed_bird(photograph.jpeg, photograph.bbox, 64)
            corners = [(left, top) for left in range(framed.width - 63) for top in range(framed.height - 63)]
            cuts = [np.asarray(framed)[top:top + 64, left:left + 64] for left, top in corners]
            shown = pixels(item['right_images'][-1])
            assert any(np.array_equal(shown, cut) or np.array_equal(shown, cut[:, ::-1]) for cut in cuts)


def test_smaller_images_are_downsampled_from_the_largest(dataset):
    for item in dataset.__getitems__(range(7)):
        for name in ('right_images', 'wrong_images'):
            largest = Image.fromarray(pixels(item[name][-1]))
            for image in item[name]:
                size = image.shape[-1]
                assert np.array_equal(pixels(image), np.asarray(largest.resize((size, size), Image.BILINEAR)))


@pytest.mark.filterwarnings('ignore:.*all photographs')
def test_right_and_wrong_images_have_their_own_crops_and_flips(tmp_path):
    """The only photograph is its own wrong image, so the two differ only by their random crops and flips."""
    dataset = MultiscaleDataset(write(tmp_path / 'birds.hdf5', [('001.Auk', slope())]), **TINY)
    torch.manual_seed(0)
    items = dataset.__getitems__([0] * 200)
    drawn = [torch.tensor([measure(item[name][-1]) for item in items]).T for name in ('right_images', 'wrong_images')]
    for flipped, across, down in drawn:
        assert 0.4 < flipped.mean() < 0.6
        # 76 / 64 of a photograph of 3 x 2: 50 places across and 12 down, over that share of the slope.
        assert 0.75 * 50 / 114 < (across.max() - across.min()) / 2 <= 1.1 * 50 / 114
        assert 0.75 * 12 / 76 < (down.max() - down.min()) / 2 <= 1.1 * 12 / 76
    for right, wrong in zip(*drawn):
        assert torch.corrcoef(torch.stack([right, wrong]))[0, 1].abs() < 0.25


def test_wrong_images_come_from_every_other_class(tmp_path):
    pictures = [(name, Image.new('RGB', (20, 30), color)) for name, color in COLORS.items() for _ in range(2)]
    dataset = MultiscaleDataset(write(tmp_path / 'birds.hdf5', pictures), **TINY)
    seen = {name: Counter() for name in COLORS}
    for item in dataset.__getitems__(list(range(6)) * 30):
        assert class_shown(item['right_images']) == item['class']
        seen[item['class']][class_shown(item['wrong_images'])] += 1
    for name, counts in seen.items():
        assert set(counts) == set(COLORS) - {name} and min(counts.values()) > 15


def test_every_caption_is_sampled_with_its_embedding(dataset):
    drawn = Counter()
    for item in dataset.__getitems__(list(range(7)) * 60):
        caption = dataset.captions.index(item['txt'])
        assert torch.equal(item['right_embed'], dataset.embeddings[caption])
        assert dataset.index.sentence(caption)[:2] == (item['class'], item['name'])
        drawn[caption] += 1
    assert set(drawn) == set(range(14)) and min(drawn.values()) > 15


def test_held_out_captions_have_sentence_numbers(birds):
    dataset = require_embeddings(MultiscaleDataset(birds, split=2))
    photographs = {p.name: p for p in tiny.photographs('test', tiny.SPLITS['test'])}
    rows = []
    for i, caption in enumerate(dataset.captions):
        class_name, name, k = dataset.index.sentence(i)
        assert photographs[name].class_name == class_name and photographs[name].captions[int(k)] == caption
        assert np.array_equal(dataset.embeddings[i], photographs[name].embeddings[int(k)])
        rows.append((name, k))
    assert sorted(rows) == sorted((name, str(k)) for name in photographs for k in range(2))


def test_grayscale_photographs_are_converted_to_rgb(dataset):
    gray = dataset[dataset.index.names.index('Jay_1')]['right_images']
    colored = dataset[dataset.index.names.index('Jay_0')]['right_images']
    assert all(torch.equal(image[0], image[1]) and torch.equal(image[0], image[2]) for image in gray)
    assert not any(torch.equal(image[0], image[1]) for image in colored)


def test_without_bounding_boxes_whole_photographs_are_used(tmp_path):
    picture = Image.new('RGB', (64, 64), COLORS['001.Auk'])
    picture.paste(COLORS['003.Owl'], (20, 20, 44, 44))
    share = {}
    for bbox in (None, (24, 24, 16, 16)):
        path = write(tmp_path / f'{bbox is None}.hdf5', [('001.Auk', picture), ('002.Jay', picture)], bbox=bbox)
        images = [image for name in ('right_images', 'wrong_images')
                  for image in MultiscaleDataset(path, **TINY)[0][name]]
        share[bbox] = [(image[0] > image[2]).float().mean().item() for image in images]
    assert max(share[24, 24, 16, 16]) == 0 and min(share[None]) > 0.5


def test_a_single_class_gives_other_images_and_prints_it_once(tmp_path):
    pictures = [('001.Auk', Image.new('RGB', (20, 20), color)) for color in COLORS.values()]
    path = write(tmp_path / 'birds.hdf5', pictures)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        dataset = MultiscaleDataset(path, **TINY)
        items = dataset.__getitems__([0, 1, 2] * 20)
    assert len(caught) == 1 and "of the class '001.Auk'" in str(caught[0].message) and caught[0].filename == __file__
    pairs = {(class_shown(item['right_images']), class_shown(item['wrong_images'])) for item in items}
    assert pairs == {(right, wrong) for right in COLORS for wrong in COLORS if right != wrong}


def test_missing_embeddings_are_reported(tmp_path, birds):
    path = tiny.make(tmp_path / 'birds.hdf5', embeddings=False)
    dataset = MultiscaleDataset(path, **TINY)
    assert set(dataset[0]) == {'right_images', 'wrong_images', 'txt', 'class', 'name'}
    message = one_line(require_embeddings, dataset)
    assert path in message and 'python char_cnn_rnn/main.py --embed' in message
    assert '/valid holds no captions' in one_line(require_embeddings, MultiscaleDataset(birds, split=1))
    assert 'no such file' in one_line(MultiscaleDataset, str(tmp_path / 'absent.hdf5'))


def test_a_damaged_photograph_is_an_error(tmp_path):
    path = str(tmp_path / 'birds.hdf5')
    with layout.replace_file(path) as file:
        for name, jpeg in (('Auk_0', tiny.jpeg()[:-400]), ('Jay_0', tiny.jpeg())):
            layout.write_photograph(file, 'train', layout.Photograph(name, name[:3], jpeg, ['a bird']))
    message = one_line(MultiscaleDataset(path, **TINY).__getitem__, 0)
    assert path in message and 'the photograph Auk_0 of /train cannot be decoded' in message


# --- batches ----------------------------------------------------------------------------------------------------------

def test_equal_seeds_give_equal_batches(dataset):
    first, again, other = epoch(dataset, 1), epoch(dataset, 1), epoch(dataset, 2)
    assert [len(batch['txt']) for batch in first] == [4, 3]
    assert [image.shape for image in first[0]['right_images']] == [(4, 3, 16, 16), (4, 3, 32, 32), (4, 3, 64, 64)]
    assert first[1]['right_embed'].shape == (3, 1024)
    assert sorted(name for batch in first for name in batch['name']) == sorted(dataset.index.names)
    for name in ('right_images', 'wrong_images', 'right_embed'):
        assert all(same(a[name], b[name]) for a, b in zip(first, again))
        assert not any(same(a[name], b[name]) for a, b in zip(first, other))
    assert [batch['txt'] for batch in first] == [batch['txt'] for batch in again]


def test_a_restored_state_continues_with_the_same_items(dataset):
    epoch(dataset, 1)
    state = torch.get_rng_state()
    expected = dataset.__getitems__([3, 5])
    torch.set_rng_state(state)
    for a, b in zip(expected, dataset.__getitems__([3, 5])):
        assert same(a['right_images'], b['right_images']) and same(a['wrong_images'], b['wrong_images'])
        assert a['txt'] == b['txt']


def test_worker_processes_read_the_file(dataset):
    dataset[0]  # read here first: what is open must not be in the workers' way
    first, again = (epoch(dataset, 1, num_workers=2) for _ in range(2))
    for a, b in zip(first, again):
        assert same(a['right_images'], b['right_images']) and same(a['wrong_images'], b['wrong_images'])
