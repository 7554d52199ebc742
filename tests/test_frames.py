"""The cache of decoded photographs: MultiscaleDataset's frames."""
import errno
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import torch

from common import files
from common.flags import ROOT
from data import layout, multiscale_dataset
from data.multiscale_dataset import MultiscaleDataset, frame
from tests import tiny
from tests.errors import one_line
from tests.scenes import TINY, epoch, same


def test_cached_photographs_give_the_same_items(birds):
    dataset, cached = MultiscaleDataset(birds, **TINY), MultiscaleDataset(birds, **TINY).cached()
    for workers in (0, 2):
        for a, b in zip(epoch(dataset, 1, num_workers=workers), epoch(cached, 1, num_workers=workers), strict=True):
            assert same(a['right_images'], b['right_images']) and same(a['wrong_images'], b['wrong_images'])
            assert torch.equal(a['right_embed'], b['right_embed']) and a['txt'] == b['txt']


def test_photographs_are_decoded_once_per_size_and_file(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(multiscale_dataset, 'frame', lambda *args: made.append(1) or frame(*args))
    path = tiny.make(tmp_path / 'birds.hdf5')
    for _ in range(2):
        MultiscaleDataset(path, **TINY).cached()[0]
    assert len(made) == 7
    MultiscaleDataset(path, branches=1).cached()                # also of 64 pixels
    assert len(made) == 7
    MultiscaleDataset(path, branches=1, base_size=8).cached()
    assert len(made) == 14
    tiny.make(path, {'train': {'001.Auk': 2, '009.Kiwi': 1}})
    assert len(MultiscaleDataset(path, **TINY).cached()) == 3 and len(made) == 17
    assert not list(tmp_path.glob('**/*partial*'))


def test_training_keeps_its_data_when_the_file_is_replaced(tmp_path):
    path = tiny.make(tmp_path / 'birds.hdf5')
    before, late = MultiscaleDataset(path, **TINY).cached(), MultiscaleDataset(path, **TINY)
    torch.manual_seed(0)
    expected = before[3]
    tiny.make(path, {'train': {'001.Auk': 2, '009.Kiwi': 1}})
    MultiscaleDataset(path, **TINY).cached()
    torch.manual_seed(0)
    item = before[3]
    assert same(item['right_images'], expected['right_images']) and same(item['wrong_images'], expected['wrong_images'])
    assert 'birds.hdf5: changed while it was being read' in one_line(late.cached)


def test_truncated_frames_are_a_one_line_error(tmp_path):
    dataset = MultiscaleDataset(tiny.make(tmp_path / 'birds.hdf5'), **TINY).cached()
    expected = dataset.frames[0].copy()
    os.truncate(dataset.frames.file, 0)
    assert 'frames_76.bin: was truncated; start again' in one_line(dataset.__getitems__, [0])
    dataset = MultiscaleDataset(dataset.file, **TINY).cached()
    os.remove(dataset.frames.file)  # which stays as it is, for whoever has it open
    assert np.array_equal(dataset.frames[0], expected)


def test_incomplete_frames_are_rebuilt(tmp_path):
    path = tiny.make(tmp_path / 'birds.hdf5')
    frames = MultiscaleDataset(path, **TINY).cached().frames
    whole = [frames[i].copy() for i in range(7)]
    os.truncate(frames.file, os.path.getsize(frames.file) - 1)
    again = MultiscaleDataset(path, **TINY).cached().frames
    sent = pickle.loads(pickle.dumps(again))  # as to a worker process that is not forked
    for i, pixels in enumerate(whole):
        assert np.array_equal(again[i], pixels) and np.array_equal(sent[i], pixels)
    assert len(pickle.dumps(again)) < 1000 < os.path.getsize(frames.file)


def test_concurrent_processes_build_one_cache(tmp_path):
    path = tiny.make(tmp_path / 'birds.hdf5', {'train': {'001.Auk': 30, '002.Jay': 30}})
    script = ('import sys, time\n'
              'from data import cache, multiscale_dataset as m\n'
              'write = cache._write_frames\n'
              'cache._write_frames = lambda *args: print("makes it") or time.sleep(1) or write(*args)\n'
              'print(len(m.MultiscaleDataset(sys.argv[1], branches=1).cached()[0]))')
    started = [subprocess.Popen([sys.executable, '-c', script, path], cwd=ROOT, text=True, stdout=subprocess.PIPE)
               for _ in range(3)]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert ''.join(said).count('makes it') == 1


def test_an_empty_split_is_cached(birds):
    assert len(MultiscaleDataset(birds, split=1, **TINY).cached()) == 0


def test_a_cache_that_cannot_be_built_is_an_error(tmp_path, monkeypatch):
    path = str(tmp_path / 'birds.hdf5')
    with layout.replace_file(path) as file:
        for name, jpeg in (('Auk_0', tiny.jpeg()), ('Jay_0', tiny.jpeg()[:-400])):
            layout.write_photograph(file, 'train', layout.Photograph(name, name[:3], jpeg, ['a bird']))
    assert 'the photograph Jay_0 of /train cannot be decoded' in one_line(MultiscaleDataset(path, **TINY).cached)
    path = tiny.make(tmp_path / 'others.hdf5')

    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    for module, name in ((np, 'ascontiguousarray'), (os, 'replace')):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            message = one_line(MultiscaleDataset(path, **TINY).cached)
        assert 'disk full' in message and '--cache False' in message
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, 'disk_usage', lambda folder: SimpleNamespace(free=1000))
        assert '0.0 MB are free; make room, or' in one_line(MultiscaleDataset(path, **TINY).cached)
    assert not [*tmp_path.glob('**/*partial*'), *tmp_path.glob('**/frames*')]
