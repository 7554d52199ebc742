"""Fixtures for several test files."""
import os
import signal

import pytest
import torch

from tests import generating as runs
from tests import tiny
from tests.commands import Caller
from text2image import main as text2image


@pytest.fixture(scope='session', autouse=True)
def hear_signals():
    """Restore SIGINT and SIGHUP, which shells and nohup make background commands, and all that they start, ignore."""
    before = {number: signal.signal(number, handler) for number, handler in (
        (signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL))}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope='module')
def one_thread():
    """Use one thread: small networks are faster, and their sums are the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def birds(tmp_path_factory):
    """Return the path of a tiny HDF5 file with embeddings."""
    return tiny.make(tmp_path_factory.mktemp('data') / 'birds.hdf5')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Return a folder with data/tiny.hdf5 and its encoder, to run commands from."""
    return tiny.with_encoder(tmp_path_factory.mktemp('elsewhere'),
                             {'train': {'001.Auk': 2, '002.Jay': 2}, 'test': {'004.Wren': 1, '005.Lark': 2}})


@pytest.fixture
def call(request, folder, monkeypatch, capsys):
    """Return a `Caller` of the test module's `main`, as on a machine without a GPU."""
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    return Caller(request.module.main, folder, monkeypatch, capsys)


@pytest.fixture(params=runs.NARROW, ids=lambda section: os.path.basename(section.HERE))
def section(request):
    """Return the main module of each of the three GANs."""
    return request.param


@pytest.fixture
def generating(request, tmp_path, monkeypatch, capsys):
    """Return a `Caller` in a folder with a run: of the section of the test, or of text2image."""
    section = request.getfixturevalue('section') if 'section' in request.fixturenames else text2image
    return runs.trained(section, tmp_path, monkeypatch, capsys)
