"""Fixtures of several test files."""
import signal

import pytest
import torch

from tests import tiny
from tests.commands import Caller


@pytest.fixture(scope='session', autouse=True)
def hear_signals():
    """A shell lets the commands that it starts in the background ignore SIGINT, and so all that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope='module')
def one_thread():
    """Small networks are faster on one, and their sums are then the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def birds(tmp_path_factory):
    """The path of a tiny HDF5 file with embeddings."""
    return tiny.make(tmp_path_factory.mktemp('data') / 'birds.hdf5')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """data/tiny.hdf5 with its encoder, in a folder that commands are run from."""
    return tiny.with_encoder(tmp_path_factory.mktemp('elsewhere'),
                             {'train': {'001.Auk': 2, '002.Jay': 2}, 'test': {'004.Wren': 1, '005.Lark': 2}})


@pytest.fixture
def call(request, folder, monkeypatch, capsys):
    """The `Caller` of the test module's `main`, on a machine without a GPU."""
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    return Caller(request.module.main, folder, monkeypatch, capsys)
