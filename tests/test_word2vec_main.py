"""Run word2vec/main.py from another folder, on captions that name colors and parts."""
import json
import sys

import pytest
import torch
from PIL import Image

from data import layout
from data.cache import load_split
from tests import tiny
from tests.commands import files_below, newest, run_in
from word2vec import main

pytestmark = pytest.mark.usefixtures('one_thread')

SMALL = ['--epochs', '2', '--batch_size', '16', '--vector_size', '8', '--min_count', '1', '--log_interval', '1']
PARTS = ('wings', 'belly', 'crown', 'wing', 'tail', 'bill')
CAPTIONS = [f'this {size} bird has {color} {part}'
            for size, color, part in zip(('small', 'large') * 3, ('red', 'black', 'white') * 2, PARTS)]
WORDS = 15  # this, small, large, bird, has, the colors, the parts, and Auk, which is added to every caption


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Return a folder with data/tiny.hdf5, to run commands from."""
    place = tmp_path_factory.mktemp('elsewhere')
    tiny.make(place / 'data' / 'tiny.hdf5', {'train': {'001.Auk': 2}, 'test': {'004.Wren': 1}}, CAPTIONS, False)
    return place


@pytest.fixture
def data(tmp_path):
    return ['--data_dir', 'data', '--dataset', 'tiny', '--out_dir', str(tmp_path)]


@pytest.fixture
def trained(call, data, tmp_path):
    """Train once and return the run folder."""
    call('--train', *data, *SMALL)
    return newest(tmp_path, 'tiny_')


def asked(tmp_path, *what):
    return [*what, '--dataset', 'tiny', '--out_dir', str(tmp_path)]


def test_train_resume_and_query_from_the_command_line(folder, data, tmp_path):
    script = main.__file__
    printed = run_in(folder, script, '--train', *data, *SMALL)
    run_dir = newest(tmp_path, 'tiny_')
    assert 'Training on 12 captions: ' in printed and str(run_dir) in printed
    assert ' words/s' in (run_dir / 'log.txt').read_text()
    assert {'cbow.pt', 'log.txt', 'options.json'} <= {file.name for file in run_dir.iterdir()}
    assert 'nearest to red:' in run_in(folder, script, *asked(tmp_path, '--query', 'red'))


def test_a_resumed_run_equals_an_uninterrupted_one(call, data, trained, tmp_path):
    call('--train', *data, *SMALL[2:], '--epochs', '4')
    straight = newest(tmp_path, 'tiny_')
    call('--train', '--resume', trained, '--epochs', '4')
    steps = [[line.split()[3] for line in (run_dir / 'log.txt').read_text().splitlines()]
             for run_dir in (trained, straight)]
    assert steps[0] == steps[1]
    assert json.loads((trained / 'options.json').read_text())['vector_size'] == 8
    call('--train', '--resume', '--dataset', 'tiny', '--out_dir', tmp_path)  # the newest, and nothing is left to do


@pytest.mark.parametrize('model', ['cbow', 'skipgram'])
@pytest.mark.parametrize('way', [['--loss', 'softmax'], ['--loss', 'negative', '--negative', '2'],
                                 ['--optimizer', 'sgd', '--lr', '0.01', '--sample', '0.1']])
def test_every_model_loss_and_optimizer_trains(call, data, tmp_path, model, way):
    assert f'and {model}.pt' in call('--train', '--model', model, *way, *data, *SMALL)
    run_dir = newest(tmp_path, 'tiny_')
    assert 'done: ' in call('--train', '--resume', run_dir, '--epochs', '3')
    out = call(*asked(tmp_path, '--query', 'wings', '--query', 'Red', '--model', model))
    assert str(run_dir) in out and 'nearest to wings:' in out and 'nearest to Red:' in out
    assert len(out.splitlines()) == 1 + 1 + 2 * (1 + main.NEAREST)


def test_analogy_evaluation_and_plot_work(call, trained, tmp_path):
    out = call(*asked(tmp_path, '--analogy', 'wing', 'wings', 'bill'))
    assert 'wing is to wings as bill is to:' in out and 'wings' not in out.split('is to:')[1]
    out = call(*asked(tmp_path, '--train', 'False'))
    assert ' of the 15 words nearest to 3 colors are colors' in out and '  red ' in out
    out = call(*asked(tmp_path, '--plot'))
    file = newest(tmp_path, 'plot_') / 'words.png'
    assert str(file) in out and Image.open(file).size == (1440, 940)
    assert call('--checkpoint', trained, '--query', 'red') == call(
        '--checkpoint', trained / 'cbow.pt', '--query', 'red', '--train', 'False')
    assert '--dataset: is not used with --checkpoint' in call.error(
        '--checkpoint', trained, *asked(tmp_path, '--query', 'red'))


def test_errors_are_one_line(call, data, trained, tmp_path, folder):
    assert call.error(*asked(tmp_path, '--query', 'wigns')).startswith(
        f"error: 'wigns': not in the vocabulary of {WORDS} words; similar ones are wings")
    assert 'give another word' in call.error(*asked(tmp_path, '--query', 'xyzzy'))
    assert "'blakc'" in call.error(*asked(tmp_path, '--analogy', 'red', 'blakc', 'wing'))
    assert 'with a skipgram.pt in it yet' in call.error(*asked(tmp_path, '--query', 'red', '--model', 'skipgram'))
    assert 'add --loss negative' in call.error('--train', *data, *SMALL, '--negative', '3')
    assert '--negative 2147483647: too many, 5 to 20 are usual' in call.error(
        '--train', *data, *SMALL, '--loss', 'negative', '--negative', '2147483647')
    assert 'too few' in call.error('--train', *data, *SMALL, '--min_count', '1000')
    before = files_below(tmp_path)
    assert 'leave out --sample' in call.error('--train', *data, *SMALL, '--sample', '1e-9')
    assert files_below(tmp_path) == before
    assert 'no such' in call.error('--checkpoint', 'absent.pt', '--query', 'red')
    assert f'--model skipgram: {trained}/cbow.pt holds cbow; leave out --model' in call.error(
        '--checkpoint', trained / 'cbow.pt', '--query', 'red', '--model', 'skipgram')
    assert 'prepare.py' in call.error('--train', '--dataset', 'absent')
    assert call.error('--train', '--query', 'red').endswith('--query: has no effect with --train; add --train False')
    assert call.error('--plot', '--query', 'red').endswith('--plot: has no effect with --query; leave it out')
    assert 'diverged' in call.error(*data, '--lr', '1e9', '--optimizer', 'sgd', *SMALL)


def test_an_empty_path_is_not_the_newest_run(call, capsys):
    with pytest.raises(SystemExit, match='2'):
        call('--query', 'red', '--checkpoint', '')
    assert 'argument --checkpoint: is empty' in capsys.readouterr().err


def test_a_run_does_not_resume_with_other_captions(call, data, tmp_path, folder):
    other = tmp_path / 'other'
    tiny.make(other / 'tiny.hdf5', {'train': {'001.Auk': 2}}, CAPTIONS, False)
    call('--train', '--data_dir', other, '--dataset', 'tiny', '--out_dir', tmp_path / 'runs', *SMALL)
    with layout.replace_file(str(other / 'tiny.hdf5')) as file:
        for photograph in tiny.photographs('train', {'001.Auk': 2}, list(reversed(CAPTIONS)), False):
            layout.write_photograph(file, 'train', photograph)
    assert load_split(str(other / 'tiny.hdf5'), 'train').index.captions[0] != CAPTIONS[0]
    message = call.error('--resume', newest(tmp_path / 'runs', 'tiny_'), '--epochs', '3')
    assert 'was trained on different captions' in message or 'continue with the same model and captions' in message


def test_the_checkpoint_holds_only_tensors_and_words(trained):
    contents = torch.load(trained / 'cbow.pt', weights_only=True)
    assert contents['net']['W'].shape == (WORDS, 8) and len(contents['words']) == WORDS


def test_the_benchmark_compares_with_gensim(folder, monkeypatch, capsys):
    pytest.importorskip('gensim')
    from benchmarks import word2vec_gensim
    monkeypatch.setattr(sys, 'argv', ['word2vec_gensim.py', '--file', str(folder / 'data' / 'tiny.hdf5'),
                                      '--epochs', '1', '--seeds', '2'])
    monkeypatch.setattr(word2vec_gensim, 'MIN_COUNT', 1)
    word2vec_gensim.main()
    rows = [line.split(' | ') for line in capsys.readouterr().out.splitlines() if line.startswith('| ')]
    assert [row[0] for row in rows[1:4]] == ['| cbow: gensim, negative sampling', '| cbow: ours, negative sampling',
                                             '| cbow: ours, softmax']
    assert all(0 <= int(found) <= 15 for row in rows[1:7] for found in row[1].split(', '))
    assert [row[0] for row in rows[7:]] == ['| color', '| red', '| black', '| white']
