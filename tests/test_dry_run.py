"""`--dry_run` on every training: what it says is true, and it writes nothing."""
import os
import re
import shutil
import tempfile

import pytest
import torch

from char_cnn_rnn import main as char_cnn_rnn
from common import checkpoint, dry_run, run
from common.flags import ROOT
from stackgan_v1 import main as stackgan_v1
from stackgan_v2 import main as stackgan_v2
from tests import tiny
from tests.commands import DATA, Caller, files_below, newest, run_in
from tests.test_modes import NARROW
from text2image import main as text2image
from word2vec import main as word2vec

pytestmark = pytest.mark.usefixtures('one_thread')

TRAINING = ['--batch_size', '2', '--log_interval', '1', '--out_dir', 'out', *DATA]
OWN = {name: [*flags, *TRAINING] for name, flags in NARROW.items()}
SECTIONS = {'text2image': text2image, 'stackgan_v1': stackgan_v1, 'stackgan_v2': stackgan_v2,
            'char_cnn_rnn': char_cnn_rnn, 'word2vec': word2vec}
SIZES = {'kB': 1e3, 'MB': 1e6}


@pytest.fixture
def place(folder, tmp_path, monkeypatch):
    """Return a folder with the data and its encoder, but no cache; the temporary folder is in it, too."""
    monkeypatch.setattr(dry_run, 'SECONDS', 0)
    for name in ('data', 'temporary'):
        (tmp_path / name).mkdir()
    for name in ('tiny.hdf5', 'tiny.encoder.pt'):
        shutil.copy2(folder / 'data' / name, tmp_path / 'data')
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))
    return tmp_path


@pytest.fixture
def caller(place, monkeypatch, capsys):
    """Return a function from a section's main.py to the `Caller` that runs it in `place`, without a GPU."""
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    return lambda main: Caller(main, place, monkeypatch, capsys)


def tree(folder):
    """Return {path: (size, time of the last change, contents)} of everything below a folder."""
    found = {}
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith('torchinductor')]  # made by importing PyTorch
        found[place] = os.stat(place).st_mtime_ns if place != str(folder / 'temporary') else None
        for path in (os.path.join(place, name) for name in names):
            with open(path, 'rb') as file:
                found[path] = os.stat(path).st_mtime_ns, os.stat(path).st_ctime_ns, file.read()
    return found


def dry(call, place, *arguments):
    """Run with `--dry_run`, assert that nothing has changed, and return what is printed."""
    before = tree(place)
    said = call('--dry_run', *arguments)
    assert tree(place) == before
    return said


def size_of(text):
    number, unit = text.split()
    return float(number.replace(',', '')) * SIZES[unit]


def said_checkpoint(said):
    """Return the size of a checkpoint in bytes."""
    return size_of(re.search(r'\.pt \((\S+ [kM]B) x 2 kept', said)[1])


def parameters_of(contents):
    """Return {name of a network in a checkpoint: its number of parameters}."""
    counts = {}
    for name, part in contents.items():
        states = part if isinstance(part, list) else [part]
        if name.startswith(('net', 'encoder', 'image_side')) and isinstance(states[0], dict):
            for number, state in enumerate(states):
                known = f'netD{number}' if name == 'netsD' else name
                counts[known] = sum(value.numel() for key, value in state.items()
                                    if not re.search(r'running_|num_batches', key))
    return counts


def said_parameters(said):
    counts = {name: int(count.replace(',', ''))
              for name, count in re.findall(r'^  (\w+|in all) +([\d,]+) parameters', said, re.M)}
    assert counts.pop('in all') == sum(counts.values())
    return counts


def caches(said):
    """Return {file: bytes} of the caches that would be made."""
    return {path: size_of(size) for size, path in re.findall(r'^ +(\S+ [kM]B)  (\S+) \(cache,', said, re.M)}


@pytest.mark.parametrize('name', SECTIONS)
def test_a_dry_run_writes_nothing_and_says_what_the_training_then_does(name, caller, place):
    call, arguments = caller(SECTIONS[name]), ['--epochs', '2', *OWN[name]]
    said = dry(call, place, '--train', *arguments)
    assert re.search(r'measured on the CPU, on 1 step of \d+ (images|words) after a warm-up step', said)
    assert f'out{os.sep}tiny' in said and 'the training ' in said and ': 2 epochs' in said

    call('--train', *arguments)
    run_dir = newest(place / 'out', 'tiny_')
    file, = run_dir.glob('*.pt') if name in ('char_cnn_rnn', 'word2vec') else run_dir.glob(f'{name}.pt')
    assert said_checkpoint(said) == pytest.approx(file.stat().st_size, rel=0.01)
    assert said_parameters(said) == parameters_of(checkpoint.load(str(file)))
    assert caches(said) and all(os.path.getsize(path) == pytest.approx(size, rel=0.02, abs=150)
                                for path, size in caches(said).items())
    for what in ('samples', 'log.txt', 'encoder.pt', 'Model'):
        assert (f'{what} (' in said or f'{what}\n' in said or f'{what}{os.sep}' in said) == (run_dir / what).exists()
    log = sum(path.stat().st_size for path in run_dir.iterdir() if path.name.startswith(('log', 'events')))
    assert size_of(re.search(r'(\S+ kB)  \S+log.txt \(', said)[1]) == pytest.approx(log, rel=0.3)

    page = size_of(re.search(r'(\S+ kB)  \S+index.html\n', said)[1])
    assert page == pytest.approx((run_dir / 'index.html').stat().st_size, rel=0.25, abs=4000)  # other images

    (run_dir / 'lock').unlink()
    resumed = dry(call, place, '--train', '--resume', str(run_dir), '--epochs', '5')
    assert ': 3 epochs' in resumed and not caches(resumed) and ', 1 are there' in resumed and str(run_dir) in resumed
    assert 'nothing to do: 2 epochs are done' in dry(call, place, '--train', '--resume', str(run_dir))
    before = (run_dir / 'options.json').read_bytes()
    assert 'nothing to do' in call('--train', '--resume', str(run_dir), '--log_interval', '7')
    assert (run_dir / 'options.json').read_bytes() == before


def test_the_second_stage(caller, place):
    call = caller(stackgan_v1)
    call('--train', '--epochs', '1', *OWN['stackgan_v1'])
    stage1 = newest(place / 'out', 'tiny_stageI_')
    second = ['--stage', '2', '--stage1', str(stage1), '--epochs', '3', '--snapshot_interval', '2',
              *OWN['stackgan_v1'][2:], '--gf_dim', '8']
    said = dry(call, place, '--train', *second)
    frozen = parameters_of(checkpoint.load(str(stage1 / 'stackgan_v1.pt')))['netG']
    of_netG = said_parameters(said)['netG']
    assert f'{of_netG:,} parameters, {of_netG - frozen:,} of them trained  (Stage2Generator)' in said
    assert re.search(r'netG_epoch_COUNT.pth \(2 of ', said) and re.search(r'netD_epoch_last.pth \(1 of ', said)
    assert list(caches(said)) == [str(place / 'data' / 'tiny.cache' / 'train' / 'frames_304.bin')]
    call('--train', *second)
    run_dir = newest(place / 'out', 'tiny_stageII_')
    assert said_checkpoint(said) == pytest.approx((run_dir / 'stackgan_v1.pt').stat().st_size, rel=0.01)
    assert len(list((run_dir / 'Model').glob('netG_epoch_*.pth'))) == 2


@pytest.mark.parametrize('name', ['stackgan_v1', 'stackgan_v2'])
def test_a_configuration_file(name, caller, place):
    (place / 'my.yml').write_text('epochs: 7\nbatch_size: 3\n')
    said = dry(caller(SECTIONS[name]), place, '--cfg', 'my.yml', *NARROW[name], *TRAINING[2:])
    assert 'step of 3 images' in said and ': 7 epochs' in said


def test_features_of_photographs_are_measured_on_some(caller, place):
    pytest.importorskip('efficientnet_lite_pytorch')
    arguments = ['--variant', 'birds_cvpr', '--epochs', '1', *TRAINING]
    said = dry(caller(char_cnn_rnn), place, '--train', *arguments)
    cached = place / 'data' / 'tiny.cache' / 'efficientnet_lite0_train.npz'
    assert re.search(rf'{re.escape(str(cached))} \(cache, computed once, in \S+ s at this speed\)', said)
    caller(char_cnn_rnn)('--train', *arguments)
    assert caches(said)[str(cached)] == pytest.approx(cached.stat().st_size, abs=60)


def test_a_copied_cache_is_read_but_not_stamped_anew(caller, place):
    caller(text2image)('--train', '--epochs', '1', *OWN['text2image'])
    shutil.rmtree(place / 'out')
    shutil.copytree(place / 'data', place / 'copied')
    shutil.rmtree(place / 'data')
    os.rename(place / 'copied', place / 'data')
    assert not [path for path in caches(dry(caller(text2image), place, *OWN['text2image'])) if 'pictures' in path]


def test_the_command_as_typed(place):
    before = tree(place)
    said = run_in(place, os.path.join(ROOT, 'word2vec', 'main.py'), '--train', '--dry_run', *OWN['word2vec'])
    assert tree(place) == before and 'Dry run: nothing is written' in said
    assert int(re.search(r'on (\S+) steps? of', said)[1].replace(',', '')) > 1
    assert files_below(place) == ['data/tiny.encoder.pt', 'data/tiny.hdf5']


@pytest.mark.parametrize('name, arguments', [
    ('text2image', ['--dataset', 'none']), ('text2image', ['--batch_size', '1']), ('text2image', ['--resume', 'none']),
    ('text2image', ['--checkpoint', 'none']), ('text2image', ['--text', 'a bird']), ('stackgan_v1', ['--stage', '2']),
    ('stackgan_v1', ['--cfg', 'none.yml']), ('stackgan_v2', ['--image_folder', 'none']),
    ('stackgan_v2', ['--accumulate', '9']), ('char_cnn_rnn', ['--image_weights', 'none']),
    ('word2vec', ['--min_count', '1000']), ('word2vec', ['--window', '100000'])])
def test_bad_input_is_refused_as_by_the_training(name, arguments, caller, place):
    call = caller(SECTIONS[name])
    flags = [] if '--resume' in arguments else OWN[name]
    before = tree(place)
    refused = call.error('--train', '--dry_run', *flags, *arguments)
    assert tree(place) == before
    assert refused == call.error('--train', *flags, *arguments)


def test_other_data_than_that_of_the_run_is_refused(caller, place):
    call = caller(text2image)
    call('--train', '--epochs', '1', *OWN['text2image'])
    shutil.rmtree(place / 'data')
    tiny.make(place / 'data' / 'tiny.hdf5')
    before = tree(place)
    said = call.error('--resume', '--epochs', '2', '--dry_run', '--out_dir', 'out')
    assert 'was trained on different captions' in said
    assert tree(place) == before


def test_a_folder_that_cannot_be_made_is_refused(caller, place):
    (place / 'file').write_text('')
    for out_dir in ('file', 'file/below'):
        refused = [caller(text2image).error('--train', *extra, *OWN['text2image'], '--out_dir', out_dir)
                   for extra in (['--dry_run'], [])]
        assert all('cannot be made' in one and one.endswith('give a writable folder with --out_dir') for one in refused)


def test_a_full_disk_is_reported(caller, place, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(10, 0, 10_000))
    said = dry(caller(word2vec), place, *OWN['word2vec'])
    assert re.search(r'where 10\.0 kB are free: NOT ENOUGH, \S+ kB are missing', said)


def test_several_ranks_are_refused(caller, monkeypatch):
    for name in ('RANK', 'LOCAL_RANK'):
        monkeypatch.setenv(name, '0')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert caller(text2image).error('--dry_run', *OWN['text2image']) == (
        'error: --dry_run: measures one process; start it with python, not with torchrun')


def test_the_next_training_writes_again(caller, place):
    dry(caller(word2vec), place, *OWN['word2vec'])
    caller(word2vec)('--train', '--epochs', '1', *OWN['word2vec'])
    assert (place / 'data' / 'tiny.cache' / 'train' / 'index.json').exists()
    assert checkpoint.files_of(str(newest(place / 'out', 'tiny_') / 'cbow.pt')) and run.LOCKS


@pytest.mark.parametrize('seconds, text', [(0.01234, '0.0123 s'), (59.4, '59.4 s'), (60, '1 min 0 s'),
                                           (3599.9, '1 h 0 min'), (3661, '1 h 1 min'), (90000, '1 day 1 h'),
                                           (200000, '2 days 8 h')])
def test_durations(seconds, text):
    assert dry_run._duration(seconds) == text
