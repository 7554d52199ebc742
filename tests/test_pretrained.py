"""evaluation/export.py, `--count`, and images from the weights that come with the repository."""
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import stackgan_v1.main
import stackgan_v2.main
from common import run
from common.flags import ROOT
from evaluation import export
from tests import tiny
from tests.commands import DATA, Caller, newest
from tests.errors import one_line
from text2image import main

pytestmark = pytest.mark.usefixtures('one_thread')
PRETRAINED = os.path.join(ROOT, 'pretrained')
SENTENCE = 'a small red bird with black wings'


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Return a `Caller` of text2image/main.py in a folder with data, an encoder and a run with an average."""
    tiny.with_encoder(tmp_path, {'train': {'001.Auk': 1, '002.Jay': 2}})
    call = Caller(main, tmp_path, monkeypatch, capsys)
    call('--train', *DATA, '--epochs', '1', '--batch_size', '4', '--average', '0.5', '--out_dir', 'out')
    return call


def exported(call, monkeypatch, out='small'):
    monkeypatch.setattr(sys, 'argv', [export.__file__, str(newest(call.folder / 'out', 'tiny')), '--out', out])
    export.main()
    return call.capsys.readouterr().out


def test_an_exported_run_generates_the_same_images_from_less(call, monkeypatch):
    said = exported(call, monkeypatch)
    assert '(epoch 1, step 2)' in said and 'MB in small' in said
    sizes = {name: sum(os.path.getsize(folder / file) for file in ('text2image.pt', 'encoder.pt'))
             for name, folder in (('whole', newest(call.folder / 'out', 'tiny')), ('small', call.folder / 'small'))}
    assert sizes['small'] < sizes['whole'] / 5
    images = []
    for place in (newest(call.folder / 'out', 'tiny'), 'small'):
        said = call('--train', 'False', '--checkpoint', place, '--text', SENTENCE, '--out_dir', 'drawn')
        assert 'does not say which encoder' not in said
        images.append(Image.open(newest(call.folder / 'drawn', 'text') / '001.png'))
        shutil.rmtree(call.folder / 'drawn')
    one, other = (torch.tensor(list(image.tobytes()), dtype=torch.float) for image in images)
    assert (one - other).abs().max() <= 2  # of 255
    assert 'holds weights alone' in call.error('--train', '--resume', 'small', *DATA)


@pytest.mark.parametrize('section, flags', [
    (stackgan_v1.main, ['--stage', '1', '--gf_dim', '8', '--df_dim', '2']),
    (stackgan_v2.main, ['--branches', '2', '--gf_dim', '4', '--df_dim', '4'])])
def test_runs_of_the_other_gans_are_exported_and_share_an_encoder(call, monkeypatch, section, flags):
    call.main, run_dir, text = section, call.folder / 'out', ['--train', 'False', '--text', SENTENCE]
    call('--train', *DATA, '--epochs', '2', '--batch_size', '2', '--workers', '0', *flags, '--out_dir', 'out')
    name = f'{run.read_options(newest(run_dir, "tiny"))["model"]}.pt'
    assert 'is its sentence encoder already' not in exported(call, monkeypatch, 'weights/one')
    assert {*os.listdir('weights/one')} == {'encoder.pt', 'options.json', 'photographs.npz', name}
    os.rename('weights/one/encoder.pt', 'weights/encoder.pt')
    assert 'weights/encoder.pt is its sentence encoder already' in exported(call, monkeypatch, 'weights/two')
    assert {*os.listdir('weights/two')} == {'options.json', 'photographs.npz', name}
    shutil.rmtree('data')
    images = []
    for place in (newest(run_dir, 'tiny'), 'weights/one', 'weights/two'):
        assert 'does not say which encoder' not in call(*text, '--checkpoint', place, '--out_dir', 'drawn')
        images.append(Image.open(newest(call.folder / 'drawn', 'text') / '001.png'))
        shutil.rmtree('drawn')
    whole, one, two = (torch.tensor(list(image.tobytes()), dtype=torch.float) for image in images)
    assert (whole - one).abs().max() <= 4 and torch.equal(one, two)  # of 255, after rounding in all layers


def test_a_run_starts_from_an_exported_one(call, monkeypatch):
    call.main, train = stackgan_v2.main, ['--train', *DATA, '--batch_size', '2', '--workers', '0', '--gf_dim', '4',
                                          '--df_dim', '4', '--out_dir', 'out']
    call(*train, '--branches', '1', '--epochs', '1')
    exported(call, monkeypatch)
    assert 'the tree grows from 1 to 2 branches' in call(*train, '--branches', '2', '--checkpoint', 'small', '--epochs',
                                                         '1')
    assert 'holds weights alone' in call.error('--train', '--resume', 'small', *DATA)


def test_another_encoder_in_the_folder_above_is_not_shared(call, monkeypatch):
    encoder = torch.load('data/tiny.encoder.pt', weights_only=True)
    encoder['encoder'] = {name: value + 0.1 for name, value in encoder['encoder'].items()}
    torch.save(encoder, 'encoder.pt')
    assert 'already' not in exported(call, monkeypatch) and os.path.isfile('small/encoder.pt')


def test_an_export_overwrites_nothing(call, monkeypatch, tmp_path):
    trained = newest(call.folder / 'out', 'tiny')
    before = {path: path.read_bytes() for path in trained.rglob('*') if path.is_file()}
    (tmp_path / 'file').write_text('mine')
    for out, reason in ((trained, 'exists already'), (tmp_path / 'file', 'exists already'),
                        (tmp_path / 'file' / 'below', 'cannot be written')):
        monkeypatch.setattr(sys, 'argv', [export.__file__, str(trained), '--out', str(out)])
        assert reason in one_line(export.main)
    assert {path: path.read_bytes() for path in trained.rglob('*') if path.is_file()} == before
    (trained / 'encoder.pt').unlink()  # the one beside the data is the same
    assert 'MB in small' in exported(call, monkeypatch)


def test_a_run_of_unknown_data_is_not_exported(call, monkeypatch):
    file = newest(call.folder / 'out', 'tiny') / 'text2image.pt'
    torch.save(torch.load(file, weights_only=True) | {'data': {}}, file)
    assert 'does not record what it was trained on' in one_line(exported, call, monkeypatch)
    assert not (call.folder / 'small').exists()


def test_several_images_of_a_sentence_differ(call):
    said = call('--train', 'False', '--text', SENTENCE, '--text', 'a crow', '--text', '红', '--count', '3', '--out_dir',
                'out')
    assert said.count('the encoder cannot read') == 1
    folder = newest(call.folder / 'out', 'text')
    sentences = [SENTENCE] * 3 + ['a crow'] * 3 + ['红'] * 3
    assert (folder / 'captions.txt').read_text(encoding='utf-8').splitlines() == [
        f'{number:03d}.png\t{sentence}' for number, sentence in enumerate(sentences, 1)]
    assert len({(folder / f'{number:03d}.png').read_bytes() for number in range(1, 10)}) == 9


def test_pretrained_weights_are_used_only_where_nothing_else_is_asked_for(call, monkeypatch, tmp_path):
    exported(call, monkeypatch)
    monkeypatch.setattr(main, 'PRETRAINED', str(tmp_path / 'small'))
    monkeypatch.setattr(main, 'HERE', str(tmp_path / 'section'))  # where --out_dir is by default
    text = ['--train', 'False', '--text', SENTENCE]
    assert f'no run of your own yet: generating with the pretrained weights in {tmp_path}/small' in call(*text)
    for more in (['--out_dir', 'empty'], ['--dataset', 'toy_birds'], ['--model', 'mine']):
        assert 'no run' in call.error(*text, *more)
    run = shutil.move(newest(call.folder / 'out', 'tiny'), tmp_path / 'section' / 'output')
    said = call(*text)
    assert f'generating with your newest run, {run}; for the pretrained weights, add --checkpoint small\n' in said
    assert 'generating with the pretrained weights' not in said
    os.rename(os.path.join(run, 'text2image.pt'), os.path.join(run, 'mine.pt'))  # trained with --model mine
    said = call(*text)
    assert f'no run with a text2image.pt yet (to generate with {os.path.basename(run)}, add --checkpoint ' in said
    assert f'{run}/mine.pt): generating with the pretrained weights' in said


@pytest.mark.skipif(not os.path.isdir(PRETRAINED), reason='this checkout has no pretrained weights')
@pytest.mark.parametrize('section, size', [('text2image', 64), ('stackgan_v2', 128)])
def test_a_fresh_clone_generates_a_bird(tmp_path, section, size):
    """Without data and without training, as the README types it."""
    for folder in ('common', 'data', 'char_cnn_rnn', section, 'pretrained'):
        shutil.copytree(os.path.join(ROOT, folder), tmp_path / folder,
                        ignore=shutil.ignore_patterns('output', '*.hdf5*', '*.cache', '*.encoder.pt', '__pycache__'))
    command = [f'{section}/main.py', '--train', 'False', '--text', SENTENCE, '--count', '2']
    done = subprocess.run([sys.executable, *command],
                          cwd=tmp_path, capture_output=True, text=True, env=os.environ | {'CUDA_VISIBLE_DEVICES': ''})
    assert (done.returncode, done.stderr) == (0, '')
    assert 'pretrained weights in ' in done.stdout and 'does not say which encoder' not in done.stdout
    folder = newest(tmp_path / section / 'output', 'text')
    one, other = (Image.open(folder / f'00{number}.png') for number in (1, 2))
    assert one.size == (size, size) and one.tobytes() != other.tobytes()
    assert sum(os.path.getsize(os.path.join(place, name)) for place, _, names in os.walk(PRETRAINED)
               for name in names) < 25e6
