"""Run char_cnn_rnn/main.py from another folder, on squares whose captions name their color."""
import glob
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from char_cnn_rnn import main
from char_cnn_rnn.build_encoder import embed_captions, load_encoder
from common import run
from common.errors import UserError, run_command
from data import layout
from data.cache import load_split
from tests.test_char_cnn_rnn import write_squares

SMALL = ['--variant', 'birds_cvpr', '--image_encoder', 'scratch', '--batch_size', '3', '--log_interval', '1']


def arguments(folder, flags):
    return ['--data_dir', str(folder), '--dataset', 'squares', '--out_dir', str(folder / 'output'), '--cuda', 'False',
            *flags]


def command(folder, *flags):
    """Run main.py as a process in `folder`, and return the finished process."""
    return subprocess.run([sys.executable, main.__file__, *arguments(folder, flags)], cwd=folder, capture_output=True,
                          text=True, timeout=120, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def test_train_resume_evaluate_query_and_embed(tmp_path, monkeypatch, capsys):
    def here(*flags):
        """Run main.py in this process, which saves the imports, and return what it prints."""
        monkeypatch.setattr(sys, 'argv', [main.__file__, *arguments(tmp_path, flags)])
        main.main()
        return capsys.readouterr().out

    path = write_squares(tmp_path / 'squares.hdf5', captions=1, photos=1)

    trained = command(tmp_path, '--epochs', '1', *SMALL)
    assert trained.returncode == 0, trained.stderr
    assert 'Training on 6 captions of 6 photographs of 6 classes' in trained.stdout
    folder, = glob.glob(str(tmp_path / 'output' / 'squares_*'))
    assert {'char_cnn_rnn.pt', 'log.txt', 'options.json'} <= set(os.listdir(folder))

    assert folder in here('--train', '--resume', '--epochs', '2')
    with open(os.path.join(folder, 'log.txt')) as log:
        assert [line.split('  ')[1] for line in log] == ['step 1', 'step 2', 'step 3', 'step 4']

    printed = here('--train', 'False', '--query', 'a small orange bird')
    assert 'was trained on different' not in printed
    assert 'on 2 photographs of 2 classes of /test' in printed
    assert printed.count('(chance 50.0%)') == 2 and 'top-1 accuracy' in printed
    sheet, = glob.glob(str(tmp_path / 'output' / 'query_*' / 'sheet.png'))
    assert Image.open(sheet).size == (2 * 136 + 8, Image.open(sheet).height)

    embedded = command(tmp_path, '--embed')
    assert f'done: 10 embeddings in {path}' in embedded.stdout, embedded.stderr
    encoder = load_encoder(str(tmp_path / 'squares.encoder.pt'))
    assert encoder.variant == 'birds_cvpr'
    for split, size in zip(layout.SPLITS, (6, 2, 2)):
        cached = load_split(path, split)
        assert cached.embeddings.shape == (size, 1024)
        again = embed_captions(encoder, cached.index.captions)
        np.testing.assert_allclose(cached.embeddings, again, rtol=1e-5, atol=1e-6)

    evaluate = ['--train', 'False', '--encoder', folder]
    for flags, message in [(['--train', *SMALL, '--image_weights', 'x'], '--image_weights: is not used with --image'),
                           (['--train', *SMALL, '--batch_size', '1'], '--batch_size 1: a batch of one'),
                           ([*evaluate, '--image_weights', 'x'], '--image_weights: is not used with'),
                           ([*evaluate, '--image_encoder', 'googlenet'], '--image_encoder googlenet: ')]:
        assert error(monkeypatch, tmp_path, *flags).startswith(f'error: {message}')

    write_squares(tmp_path / 'squares.hdf5', train=5, captions=1, photos=1)
    said = f'{folder}/char_cnn_rnn.pt: was trained on different captions and pictures from those in {path} now, '
    assert said in here('--train', 'False') and said in here('--embed')

    process = command(tmp_path, '--dataset', 'absent')
    assert process.returncode == 1 and process.stderr.count('\n') == 1
    assert process.stderr.startswith(f'error: {tmp_path}/absent.hdf5: no such file') and 'prepare.py' in process.stderr


def error(monkeypatch, folder, *flags):
    """Run main.py in this process and return what it writes to stderr; `sys.exit` with a text means status 1."""
    monkeypatch.setattr(sys, 'argv', [main.__file__, *arguments(folder, flags)])
    with pytest.raises(SystemExit) as caught:
        run_command(main.main)
    assert isinstance(caught.value.code, str) and '\n' not in caught.value.code
    return caught.value.code


def test_errors_are_one_line(tmp_path, monkeypatch):
    write_squares(tmp_path / 'squares.hdf5', photos=1)
    for flags in (['--train', 'False'], ['--embed']):
        assert 'no run of --dataset squares with a char_cnn_rnn.pt' in error(monkeypatch, tmp_path, *flags)
    assert '--query' in error(monkeypatch, tmp_path, '--query', 'a red bird')
    assert '--train False' in error(monkeypatch, tmp_path, '--query', 'a red bird', '--train')
    for wrong in ('absent.t7', 'absent.pt', os.devnull, str(tmp_path)):
        said = error(monkeypatch, tmp_path, '--embed', '--encoder', wrong)
        assert said.startswith(f'error: --encoder {wrong}: no sentence encoder there; give a run of this program')
    (tmp_path / 'damaged.t7').write_bytes(b'')
    assert 'download it again' in error(monkeypatch, tmp_path, '--embed', '--encoder', str(tmp_path / 'damaged.t7'))
    words = str(tmp_path / 'cbow.pt')
    torch.save({'network': {'input.weight': torch.ones(2, 2)}}, words)
    assert f'{words}: holds no sentence encoder (no weights named conv3.weight); give ' in error(
        monkeypatch, tmp_path, '--embed', '--encoder', words)
    monkeypatch.setattr(main, 'load_encoder', lambda *_: None)  # nor is it asked to read before there is room
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=2000))
    assert 'squares.hdf5: disk full' in error(monkeypatch, tmp_path, '--embed', '--encoder', words)
    needed = os.path.getsize(tmp_path / 'squares.hdf5') + 20 * layout.EMBEDDING_BYTES  # and the encoder does not fit
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=needed + 100))
    assert 'squares.hdf5: disk full' in error(monkeypatch, tmp_path, '--embed', '--encoder', words)
    os.mkdir(tmp_path / 'squares.encoder.pt')
    before = (tmp_path / 'squares.hdf5').read_bytes()
    assert 'squares.encoder.pt: cannot be written, as it is a folder' in error(
        monkeypatch, tmp_path, '--embed', '--encoder', words)
    assert (tmp_path / 'squares.hdf5').read_bytes() == before
    os.remove(tmp_path / 'squares.hdf5')
    for flags in ([], ['--embed', '--encoder', words]):
        assert 'squares.hdf5: no such file' in error(monkeypatch, tmp_path, *flags)
    assert not os.path.exists(tmp_path / 'output')


def test_the_newest_run_of_the_data_set_is_used(tmp_path):
    runs = ['birds_20260101_000000', 'birds_20260101_000000_1', 'birds_small_20260102_000000', 'query_20260103_000000']
    for age, name in enumerate(runs):
        os.makedirs(tmp_path / name)
        if name != 'query_20260103_000000':
            (tmp_path / name / 'model.pt').write_bytes(b'')
            os.utime(tmp_path / name / 'model.pt', (age, age))
    for prefix, name in [('', runs[2]), ('birds', runs[1]), ('birds_small', runs[2])]:
        assert run.find_run(str(tmp_path), 'model.pt', dataset=prefix) == str(tmp_path / name)
        assert run.checkpoint_file('model', str(tmp_path), None, None, dataset=prefix) == str(
            tmp_path / name / 'model.pt')
    for prefix in ('bird', 'small', 'birds.*', 'query'):
        with pytest.raises(UserError, match='no run of --dataset '):
            run.find_run(str(tmp_path), 'model.pt', dataset=prefix)


@pytest.mark.parametrize('bad', [np.zeros(768), np.full(1024, np.nan), None], ids=['width', 'NaN', 'missing'])
def test_invalid_embeddings_are_overwritten(tmp_path, monkeypatch, bad):
    path, words = write_squares(tmp_path / 'squares.hdf5', photos=1), str(tmp_path / 'encoder\udcff.pt')
    torch.save({}, tmp_path / 'encoder.pt')
    os.rename(tmp_path / 'encoder.pt', words)
    rows = {split: np.ones((len(load_split(path, split).index.keys), 1024), np.float32) for split in layout.SPLITS}
    layout.write_embeddings(path, rows, 'a test')
    with h5py.File(path, 'a') as file:
        del file['train/red_0_1/embeddings']
        if bad is not None:
            file['train/red_0_1/embeddings'] = bad
    for name, value in (('load_encoder', SimpleNamespace(variant='birds_icml')), ('fingerprint', '1234'),
                        ('save_encoder', 'there')):
        monkeypatch.setattr(main, name, lambda *_, value=value: value)
    monkeypatch.setattr(main, 'embed_captions', lambda _, captions: np.ones((len(captions), 1024), np.float32))
    monkeypatch.setattr(sys, 'argv', [main.__file__, *arguments(tmp_path, ['--embed', '--encoder', words])])
    main.main()
    assert load_split(path, 'train').embeddings.eq(1).all()


@pytest.mark.parametrize('when', ['captions are read', 'embeddings are written'])
@pytest.mark.parametrize('photos', [1, 2])
def test_embed_does_not_write_into_a_replaced_file(tmp_path, monkeypatch, photos, when):
    path, words = write_squares(tmp_path / 'squares.hdf5', photos=1), str(tmp_path / 'encoder.pt')
    torch.save({}, words)
    monkeypatch.setattr(main, 'load_encoder', lambda *_: SimpleNamespace(variant='birds_icml'))

    def replace(*_):
        write_squares(tmp_path / 'new.hdf5', train=5, photos=photos)
        os.replace(tmp_path / 'new.hdf5', path)

    for split in layout.SPLITS:
        load_split(path, split)  # so that the cache is warm
    monkeypatch.setattr(main, 'embed_captions', lambda _, captions: (
        when == 'captions are read' and replace(), np.zeros((len(captions), 1024), np.float32))[1])
    monkeypatch.setattr(main, 'fingerprint', lambda _: '1234')
    if when == 'embeddings are written':
        monkeypatch.setattr(layout, '_write_embedding', replace)
    said = error(monkeypatch, tmp_path, '--embed', '--encoder', words)
    assert said == f'error: {path}: changed while its captions were being read; start again'
    with layout.open_file(str(path)) as file:
        assert not layout.has_embeddings(file, 'train') and len(file['train']) == 5 * photos * 2
    assert sorted(os.listdir(tmp_path)) == ['encoder.pt', 'squares.cache', 'squares.hdf5']


def test_the_query_sheet_names_classes_and_each_sentence_once(tmp_path, monkeypatch):
    path = write_squares(tmp_path / 'squares.hdf5', photos=1)
    index = load_split(path, 'train').index
    order = torch.eye(len(index.names))
    monkeypatch.setattr(main, 'embed_captions', lambda encoder, queries, verbose: torch.arange(12.).view(2, 6).numpy())
    monkeypatch.setattr(main, 'FOUND', 2)
    sheets = []
    monkeypatch.setattr(main, 'caption_sheet', lambda images, captions, columns: sheets.append((captions, columns)))
    main.best_pictures(SimpleNamespace(encoder=None, embed_photographs=lambda photographs: photographs), path, 'train',
                       index, order, ['one', 'two'])
    best, second = (index.classes[i].replace('_', ' ') for i in (5, 4))
    assert sheets == [([f'"one": {best}', second, f'"two": {best}', second], 2)]
