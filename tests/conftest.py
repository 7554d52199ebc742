"""Fixtures of several test files."""
import pytest
import torch

from tests import tiny


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
