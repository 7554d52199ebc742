"""HDF5 files that appear whole or not at all, and what they say about themselves."""
import h5py
import numpy as np

from data import layout
from tests import tiny


def test_the_fingerprint_of_the_encoder_is_kept_with_its_embeddings(tmp_path):
    path = tiny.make(tmp_path / 'birds.hdf5', embeddings=False)
    rows = {'train': np.zeros((14, 1024), np.float32)}
    for encoder in ('1234abcd', None, '5678'):
        layout.write_embeddings(path, rows, 'a test', encoder)
        with h5py.File(path) as file:
            assert file.attrs.get('encoder') == encoder
