import functools
import io
import os
import random
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from data import layout
from data.toy_birds import drawing, prepare, sentences
from evaluation.color_accuracy import color_accuracy

COUNT = prepare.MIN_COUNT
SCRIPT = os.path.abspath(prepare.__file__)


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    """Return the path of a file written by one worker."""
    path = str(tmp_path_factory.mktemp('toy') / 'toy_birds.hdf5')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, 'ProcessPoolExecutor', functools.partial(ProcessPoolExecutor, 1))
        prepare.prepare(path, COUNT, seed=3)
    return path


@pytest.fixture(scope='module')
def indices(path):
    with layout.open_file(path) as file:
        return {split: layout.read_index(file, split) for split in layout.SPLITS}


@pytest.fixture(scope='module')
def birds():
    """Return two birds of every class: (parameters, image, box)."""
    made = []
    for i in range(2 * len(prepare.CLASSES)):
        rng = random.Random(f'a seed of no other test/{i}')
        bird = drawing.random_bird(rng, *prepare.colors_of(prepare.CLASSES[i // 2]))
        made.append((bird, *drawing.draw(bird, rng)))
    return made


def to_tensor(pictures, blur=0):
    small = [np.array(picture.resize((64, 64)).filter(ImageFilter.GaussianBlur(blur))) for picture in pictures]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 127.5 - 1


def accuracy(birds, blur=0, turn=0):
    """Return `color_accuracy` of each image against the bird `turn` positions later."""
    asked = [bird for bird, _, _ in birds[turn:] + birds[:turn]]
    pictures = to_tensor([picture for _, picture, _ in birds], blur)
    return color_accuracy(pictures, [bird.body for bird in asked], [bird.wings for bird in asked])


def test_every_split_has_birds_and_every_bird_ten_captions(indices):
    assert sum(len(index.names) for index in indices.values()) == COUNT
    for index in indices.values():
        assert index.names
        assert np.array_equal(np.bincount(index.photo_of), [10] * len(index.names))


def test_classes_of_test_are_in_no_other_split(indices):
    test = set(indices['test'].classes)
    seen = set(indices['train'].classes)
    assert not test & (seen | set(indices['valid'].classes))
    assert test | seen == set(prepare.CLASSES)
    assert .1 < len(test) / len(prepare.CLASSES) < .2


def test_colors_of_test_never_come_together_in_train(indices):
    together = {frozenset(prepare.colors_of(name)) for name in indices['train'].classes}
    assert not any(frozenset(prepare.colors_of(name)) in together for name in indices['test'].classes)


def test_every_color_is_in_train(indices):
    bodies, wings = zip(*(prepare.colors_of(name) for name in indices['train'].classes))
    assert set(bodies) == set(wings) == set(drawing.PALETTE)


def test_test_has_every_color_once_as_body_and_once_as_wings(indices):
    bodies, wings = zip(*(prepare.colors_of(name) for name in set(indices['test'].classes)))
    assert sorted(bodies) == sorted(wings) == sorted(drawing.PALETTE)


def test_captions_name_both_colors(indices):
    for index in indices.values():
        for caption, photo in zip(index.captions, index.photo_of):
            words = caption.strip('.').replace(',', '').split()
            assert set(prepare.colors_of(index.classes[photo])) <= set(words), caption
            assert caption.isascii() and caption == caption.lower() and len(caption) <= 201
            assert 'a orange' not in caption and '  ' not in caption and '{' not in caption


def test_captions_name_the_scene_on_which_the_pose_depends():
    for i in range(30):
        rng = random.Random(i)
        bird = drawing.random_bird(rng, 'red', 'blue')
        assert (bird.facing, bird.raised) == drawing.POSES[bird.scene][:2]
        for caption in sentences.describe(bird, rng):
            said = {scene for scene, places in sentences.PLACES.items() if any(place in caption for place in places)}
            assert said - {'plain'} == {bird.scene} - {'plain'}, caption


def test_captions_of_a_bird_differ(indices):
    index = indices['train']
    assert len(set(zip(index.photo_of, index.captions))) == len(index.captions)


def test_captions_describe_the_image():
    rng = random.Random(0)
    bird = drawing.random_bird(rng, 'red', 'blue', crown='green', beak='grey', beak_length='long', scene='sand')
    said = ' '.join(sentences.describe(bird, rng) + sentences.describe(bird, rng))
    words = set(said.replace('.', '').replace(',', '').split())
    assert {'grey', 'long', 'green'} <= words
    assert not {'short', 'yellow', 'branch', 'sky'} & words


def test_boxes_are_inside_the_images(indices):
    for index in indices.values():
        for x, y, width, height in index.boxes:
            assert 0 < x < x + width < drawing.SIZE and 0 < y < y + height < drawing.SIZE
            assert width > 80 and height > 60


def test_boxes_are_tight(monkeypatch):
    """On a background of one color, all other pixels belong to the bird, except for its faint antialiased edge."""
    monkeypatch.setattr(drawing, 'draw_scene', lambda *_: Image.new('RGB', (drawing.SIZE, drawing.SIZE), (255, 0, 255)))
    for i in range(12):
        rng = random.Random(i)
        picture, (x, y, width, height) = drawing.draw(drawing.random_bird(rng, 'green', 'yellow'), rng)
        far = np.abs(np.array(picture, int) - (255, 0, 255)).sum(2) > 20
        ys, xs = np.nonzero(far)
        box = np.array([x, y, x + width - 1, y + height - 1])
        assert np.abs(box - [xs.min(), ys.min(), xs.max(), ys.max()]).max() <= 2


def test_images_are_256_pixel_jpegs(path, indices):
    with layout.open_file(path) as file:
        for key in indices['test'].img_keys[:3]:
            picture = Image.open(io.BytesIO(layout.read_jpeg(file, 'test', key)))
            assert (picture.format, picture.size, picture.mode) == ('JPEG', (256, 256), 'RGB')


def test_another_seed_gives_other_birds():
    first, again, other = (prepare.make(60, seed)[1] for seed in (1, 1, 2))
    assert (first.jpeg, first.captions) == (again.jpeg, again.captions)
    assert first.jpeg != other.jpeg and first.captions != other.captions


@pytest.mark.parametrize('blur, least', [(0, .97), (1.5, .95)])
def test_color_accuracy_recognizes_drawings(birds, blur, least):
    body, wings = accuracy(birds, blur)
    assert body >= least and wings >= least


def test_color_accuracy_is_near_chance_for_unrelated_images():
    """The images stand for a generator that ignores the sentence."""
    rng = random.Random(0)
    picture, _ = drawing.draw(drawing.random_bird(rng, 'red', 'blue'), rng)
    asked = [prepare.colors_of(name) for name in prepare.CLASSES]
    accuracies = color_accuracy(to_tensor([picture] * len(asked)), *zip(*asked))
    assert accuracies == pytest.approx((1 / 10, 1 / 10))


def test_color_accuracy_is_low_with_wrong_colors(birds):
    assert max(accuracy(birds, turn=45)) < .3


def test_color_accuracy_tells_body_from_wings(birds):
    bodies, wings = [bird.body for bird, _, _ in birds], [bird.wings for bird, _, _ in birds]
    assert color_accuracy(to_tensor([picture for _, picture, _ in birds]), wings, bodies) == (0, 0)


@pytest.mark.parametrize('arguments, word', [(['--count', str(COUNT - 1), '--out', 'birds.hdf5'], '--count'),
                                             (['--out', '.'], '--out'), (['--count', 'x'], '--help lists the flags'),
                                             (['--out', f'{__file__}/a/b.hdf5'], 'is a file, not a folder')])
def test_bad_arguments_are_one_line_errors(arguments, word, tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and done.stdout == ''
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1 and word in done.stderr
    assert os.listdir(tmp_path) == []


def test_the_file_depends_neither_on_the_folder_nor_on_workers(path, tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, '--out', 'birds.hdf5', '--count', str(COUNT), '--seed', '3'],
                          cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(tmp_path / 'birds.hdf5') in done.stdout.splitlines()[-1] and 'train' in done.stdout
    assert os.listdir(tmp_path) == ['birds.hdf5']
    with open(path, 'rb') as expected:
        assert (tmp_path / 'birds.hdf5').read_bytes() == expected.read()
