"""Run text2image/main.py from another folder, on a tiny file."""
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from common import run
from common.errors import run_command
from tests import tiny
from text2image import main

SCRIPT = os.path.abspath(main.__file__)
DATA = ['--data_dir', 'data', '--dataset', 'tiny']
EPOCHS, STEPS = 5, 2
TRAINING = ['--epochs', str(EPOCHS), '--batch_size', '4', '--log_interval', '1', '--seed', '3']
SENTENCE = 'un petit oiseau coloré'


def start(folder, *args):
    """Start main.py in `folder`, without a GPU and on one thread."""
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONIOENCODING': 'utf-8'}
    return subprocess.Popen([sys.executable, *(args if args[0] == SCRIPT else (SCRIPT, *args))], cwd=folder, text=True,
                            env=environment, encoding='utf-8', stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    out, err = process.communicate(timeout=120)
    return SimpleNamespace(out=out, err=err, status=process.returncode)


def runs_in(folder, prefix):
    return sorted(str(path) for path in folder.iterdir() if path.name.startswith(prefix))


def wait_for_step(folder, process):
    """Wait until the log of the run in `folder` has its first step."""
    for _ in range(1200):
        assert process.poll() is None, process.communicate()
        if folder.is_dir() and any(log.read_text() for log in folder.glob('*/log.txt')):
            return
        time.sleep(0.05)
    raise TimeoutError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Return a folder with data/tiny.hdf5 and its encoder, to run commands from."""
    return tiny.with_encoder(tmp_path_factory.mktemp('elsewhere'),
                             {'train': {'001.Auk': 1, '002.Jay': 2}, 'test': {'004.Wren': 1, '005.Lark': 1}})


@pytest.fixture(scope='module')
def straight(folder):
    """Return an uninterrupted run."""
    done = finish(start(folder, *DATA, '--train', 'True', '--cuda', 'False', '--out_dir', 'straight', *TRAINING))
    assert (done.status, done.err) == (0, '')
    done.run, = runs_in(folder / 'straight', 'tiny_')
    return done


def test_training_prints_its_options_and_writes_its_folder(folder, straight):
    table = dict(re.findall(r'^  (\w+) +(.*)$', straight.out, re.MULTILINE))
    assert list(table) == sorted(table)
    expected = {'model': 'text2image', 'cuda': 'False', 'train': 'True', 'data_dir': str(folder / 'data'),
                'dataset': 'tiny', 'epochs': str(EPOCHS), 'batch_size': '4', 'lr': '0.0002', 'channels': '3',
                'l1_coef': '50', 'l2_coef': '100', 'cls_coef': '0', 'int_coef': '0', 'log_interval': '1', 'seed': '3'}
    for name, value in expected.items():
        assert table[name] == value
    assert 'Training on 6 captions of 3 photographs' in straight.out and 'CUDA' not in straight.out
    assert f'step {EPOCHS * STEPS}  loss_D' in straight.out and os.path.basename(straight.run) in straight.out
    files = set(os.listdir(straight.run))
    assert {'options.json', 'log.txt', 'samples', 'text2image.pt', 'encoder.pt'} <= files
    assert any('tfevents' in name for name in files) and not any('partial' in name for name in files)
    kept = run.read_options(straight.run)
    assert (kept['epochs'], kept['batch_size'], kept['cuda'], kept['text']) == (EPOCHS, 4, False, None)
    contents = torch.load(os.path.join(straight.run, 'text2image.pt'), weights_only=True)
    assert contents['options'] == kept and contents['progress']['step'] == EPOCHS * STEPS


def test_a_killed_run_says_how_to_resume_and_ends_with_the_same_results(folder, straight):
    process = start(folder, *DATA, '--train', '--out_dir', 'killed', *TRAINING)
    wait_for_step(folder / 'killed', process)
    process.send_signal(signal.SIGTERM)
    killed = finish(process)
    assert killed.status == 143 and killed.err == ''
    assert '--cuda True, but PyTorch finds no CUDA device: using the CPU' in killed.out
    stopped = re.search(r'^stopped after step (\d+); resume with: python (.*)$', killed.out, re.MULTILINE)
    step, command = stopped.groups()
    assert int(step) < EPOCHS * STEPS
    killed_run, = runs_in(folder / 'killed', 'tiny_')

    resumed = finish(start(folder, *shlex.split(command)))  # as the message says
    assert (resumed.status, resumed.err) == (0, '') and runs_in(folder / 'killed', 'tiny_') == [killed_run]
    ours, theirs = (torch.load(os.path.join(one, 'text2image.pt'), weights_only=True)
                    for one in (killed_run, straight.run))
    for net in ('netG', 'netD'):
        assert all(torch.equal(value, ours[net][key]) for key, value in theirs[net].items())
    assert torch.equal(ours['progress']['rng']['cpu'], theirs['progress']['rng']['cpu'])

    more = finish(start(folder, '--resume', '--out_dir', 'killed', '--epochs', str(EPOCHS + 1)))  # the newest run
    assert (more.status, more.err) == (0, '') and runs_in(folder / 'killed', 'tiny_') == [killed_run]
    assert re.search(r'^  batch_size +4\n(.*\n)*  dataset +tiny$', more.out, re.MULTILINE)
    with open(os.path.join(killed_run, 'log.txt'), encoding='utf-8') as log:
        steps = [int(found) for found in re.findall(r'^epoch .*  step (\d+)', log.read(), re.MULTILINE)]
    assert steps == list(range(1, (EPOCHS + 1) * STEPS + 1))


def assert_generated(done, folder, captions):
    """Assert that `folder` holds images, captions.txt and sheet.png, and that the output names them."""
    names = [f'{k:03d}.png' for k in range(1, len(captions) + 1)]
    assert sorted(os.listdir(folder)) == sorted([*names, 'captions.txt', 'options.json', 'sheet.png'])
    with open(os.path.join(folder, 'captions.txt'), encoding='utf-8') as file:
        assert file.read() == ''.join(f'{name}\t{caption}\n' for name, caption in zip(names, captions))
    for name, caption in zip(names, captions):
        assert f'  {name}  {caption}\n' in done.out
        with Image.open(os.path.join(folder, name)) as picture:
            assert picture.size == (64, 64) and picture.mode == 'RGB'
    with Image.open(os.path.join(folder, 'sheet.png')) as sheet:
        assert sheet.width == len(captions) * 136 + 8
    assert done.out.rstrip().endswith(os.path.join(os.path.basename(folder), 'sheet.png'))


def test_evaluation_generates_images_for_held_out_captions(folder, straight):
    done = finish(start(folder, *DATA, '--train', 'False', '--out_dir', 'straight'))
    assert (done.status, done.err) == (0, '') and 'generates images for captions of /test' in done.out
    generated, = runs_in(folder / 'straight', 'eval_')
    captions = re.findall(r'^  \d{3}\.png  (.*)$', done.out, re.MULTILINE)
    assert sorted(captions) == sorted(f'{caption}, {name}_0' for name in ('Wren', 'Lark') for caption in tiny.CAPTIONS)
    assert_generated(done, generated, captions)


def test_images_are_generated_for_sentences(folder, straight):
    (folder / 'sentences.txt').write_text(f'{SENTENCE}\n\n', encoding='utf-8')
    done = finish(start(folder, '--train', 'False', '--out_dir', 'straight', '--text', 'a red bird', '--text', 'a crow',
                        '--text_file', 'sentences.txt'))  # with the encoder that the run kept, so without the data
    assert (done.status, done.err) == (0, '')
    generated, = runs_in(folder / 'straight', 'text_')
    assert_generated(done, generated, ['a red bird', 'a crow', SENTENCE])
    with open(os.path.join(generated, '001.png'), 'rb') as one, open(os.path.join(generated, '002.png'), 'rb') as other:
        assert one.read() != other.read()


def test_command_errors_are_one_line(folder):
    for args, status, message in [(['--data_dir', 'nowhere'], 1, 'data/birds/prepare.py --cub'),
                                  (['--train', 'perhaps'], 2, "'perhaps' is neither True nor False")]:
        done = finish(start(folder, *args, '--out_dir', 'none'))
        assert done.status == status and message in done.err and 'Traceback' not in done.err
        assert status == 2 or (done.err.count('\n') == 1 and done.err.startswith('error: '))
    assert not (folder / 'none').exists()


# --- the same in this process, which saves the seconds of its start ---------------------------------------------------

@pytest.fixture
def error(folder, monkeypatch, capsys):
    """Return a function that runs main.py with invalid arguments and returns its one line on stderr."""
    def call(*args):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, 'argv', [SCRIPT, *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            run_command(main.main)
        assert isinstance(caught.value.code, str) and '\n' not in caught.value.code
        return caught.value.code

    return call


def test_errors_say_what_to_do(folder, error, tmp_path):
    assert 'add --train False' in error('--text', 'a red bird')
    assert 'add --train False' in error('--train', '--text_file', 'sentences.txt')
    tiny.make(tmp_path / 'tiny.hdf5', {'train': {'001.Auk': 1, '002.Jay': 2}, 'test': {}}, embeddings=False)
    message = error('--data_dir', tmp_path, '--dataset', 'tiny', '--out_dir', tmp_path / 'out')
    assert 'holds no sentence embeddings yet' in message and 'char_cnn_rnn/main.py --embed' in message
    assert not (tmp_path / 'out').exists()
    evaluate = ['--train', 'False', '--out_dir', 'empty']
    assert 'holds no captions' in error(*evaluate, '--data_dir', tmp_path, '--dataset', 'tiny')
    said = error(*evaluate, *DATA)
    assert 'empty: no run of --dataset tiny with a text2image.pt in it yet; train one first (--train)' in said
    assert 'empty: no run with a text2image.pt' in error(*evaluate, '--text', 'a red bird')
    assert 'empty: no run of --dataset tiny with a text2image.pt' in error(*DATA, '--out_dir', 'empty', '--resume')
    assert '--resume nowhere: is not a run folder' in error(*DATA, '--resume', 'nowhere')
    for more in ([], ['--text', 'a red bird']):
        assert 'error: no.pt: no such checkpoint' in error(*evaluate, *DATA, *more, '--checkpoint', 'no.pt')
    assert 'no.txt: cannot be read' in error(*evaluate, '--text_file', 'no.txt')
    assert '--text: the sentence is empty' in error(*evaluate, '--text', ' ')
    assert not (folder / 'empty').exists()


def test_a_missing_or_wrong_encoder_is_an_error(folder, error, tmp_path):
    model = main.Model('text2image', 'cpu', None, 3, 50, 100)
    generate = ['--train', 'False', '--text', 'a red bird', '--checkpoint', model.save_to(str(tmp_path), verbose=False)]
    message = error(*generate, '--data_dir', tmp_path, '--dataset', 'tiny')
    assert f'{tmp_path}/tiny.encoder.pt: no sentence encoder' in message
    assert 'python char_cnn_rnn/main.py --train' in message and '--encoder FILE.t7' in message
    for wrong in ('no.t7', '.', os.devnull):
        message = error(*generate, *DATA, '--encoder', wrong)
        assert message.startswith(f'error: --encoder {wrong}: no sentence encoder there; give the encoder.pt of a run')
    assert 'holds no sentence encoder' in error(*generate, *DATA, '--encoder', generate[-1])
