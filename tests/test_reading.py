"""A sentence is embedded by the encoder that belongs to the model, or refused."""
import os
import shutil

import h5py
import numpy as np
import pytest
import torch

from char_cnn_rnn import main as encoder_main
from char_cnn_rnn.build_encoder import fingerprint, load_encoder, save_encoder
from char_cnn_rnn.encoder import CharCnnRnn
from common import run
from data import layout
from stackgan_v1 import main as stackgan_v1
from stackgan_v2 import main as stackgan_v2
from tests import tiny
from tests.commands import DATA, Caller, newest
from text2image import main

pytestmark = pytest.mark.usefixtures('one_thread')

SPLITS = {'train': {'001.Auk': 2, '002.Jay': 2}, 'test': {'004.Wren': 1, '005.Lark': 1}}
TRAINING = ['--epochs', '1', '--batch_size', '4', '--out_dir', 'out']
DRAW = ['--train', 'False', '--out_dir', 'out', '--text', 'a crow']
UNKNOWN = 'does not say which encoder it was trained with'


@pytest.fixture
def folder(tmp_path):
    """Return a folder with data/tiny.hdf5 and an encoder that did not write its embeddings: --embed was not run."""
    path = tiny.make(tmp_path / 'data' / 'tiny.hdf5', SPLITS)
    write_encoder(path, seed=0)
    return tmp_path


@pytest.fixture
def call(folder, monkeypatch, capsys):
    return Caller(main, folder, monkeypatch, capsys)


@pytest.fixture
def embed(folder, monkeypatch, capsys):
    """Return a function that writes the embeddings of the encoder beside the data, as --embed does."""
    command = Caller(encoder_main, folder, monkeypatch, capsys)
    return lambda: command(*DATA, '--embed', '--encoder', layout.encoder_beside('data/tiny.hdf5'))


def write_encoder(path, seed):
    torch.manual_seed(seed)
    return save_encoder(CharCnnRnn('birds_cvpr'), path)


def path_of(folder):
    return str(folder / 'data' / 'tiny.hdf5')


def test_a_run_uses_its_own_encoder_not_that_of_the_data(folder, embed, call):
    assert 'done: 12 embeddings' in embed()
    with layout.open_file(path_of(folder)) as file:
        assert file.attrs['encoder'] == fingerprint(load_encoder(layout.encoder_beside(path_of(folder))))
    call(*DATA, *TRAINING)
    trained = newest(folder / 'out', 'tiny')
    right = call(*DRAW)
    assert UNKNOWN not in right and f'embedded by {trained}/encoder.pt' in right
    write_encoder(path_of(folder), seed=1)  # another one beside the data, and then no data at all
    for checkpoint in (trained, trained / 'text2image.pt'):
        said = call(*DRAW, *DATA, '--checkpoint', checkpoint)
        assert '--data_dir and --dataset: not used, because the run is named' in said
        assert f'embedded by {trained}/encoder.pt' in said and UNKNOWN not in said
    shutil.copy(trained / 'text2image.pt', folder / 'alone.pt')
    error = call.error(*DRAW, *DATA, '--checkpoint', 'alone.pt')
    assert 'tiny.encoder.pt: is not the sentence encoder that alone.pt was trained with' in error
    assert 'is not the sentence encoder' in call.error(*DRAW, '--encoder', layout.encoder_beside(path_of(folder)))
    said = call(*DRAW, *DATA, '--checkpoint', 'alone.pt', '--encoder', trained / 'encoder.pt')
    assert f'embedded by {trained}/encoder.pt' in said and UNKNOWN not in said


def test_a_model_of_published_embeddings_refuses_the_encoder_beside_the_data(folder, call):
    """The embeddings are random numbers, which look like those of another encoder."""
    assert 'so no encoder is saved with this run' in call(*DATA, *TRAINING)
    assert not (newest(folder / 'out', 'tiny') / 'encoder.pt').exists()
    assert 'tiny.encoder.pt: is not the sentence encoder' in call.error(*DRAW, *DATA)


def test_the_encoder_of_published_embeddings_is_recognized(folder, embed, call):
    embed()
    with layout.replace_file(path_of(folder), copy=True) as file:
        del file.attrs['encoder']  # as of pickles: nothing says whose they are
    assert 'no encoder is saved' not in call(*DATA, *TRAINING)
    assert UNKNOWN not in call(*DRAW)


def test_a_run_does_not_resume_with_other_embeddings(folder, embed, call):
    embed()
    call(*DATA, *TRAINING)
    trained = newest(folder / 'out', 'tiny')
    kept = (trained / 'encoder.pt').read_bytes()
    write_encoder(path_of(folder), seed=1)
    embed()
    error = call.error('--out_dir', 'out', '--resume', '--epochs', '2')
    assert f'{trained}: was trained on different embeddings from those that tiny.hdf5 holds now' in error
    assert (trained / 'encoder.pt').read_bytes() == kept
    error = call.error(*DATA, '--train', 'False', '--out_dir', 'out')
    assert 'tiny.hdf5: its embeddings do not come from the sentence encoder' in error and '--embed --encoder' in error
    call(*DRAW)  # its own encoder is still there


def test_a_run_does_not_resume_with_other_images_or_captions(folder, embed, call):
    embed()
    call(*DATA, *TRAINING)
    shutil.copy(path_of(folder), folder / 'kept.hdf5')
    for field, part, value in (('img', 'pictures', np.void(tiny.jpeg(99))), ('txt', 'captions', 'another caption')):
        shutil.copy(folder / 'kept.hdf5', path_of(folder))
        with layout.replace_file(path_of(folder), copy=True) as file:
            for group in [file['train/Auk_0_0'], file['train/Auk_0_1']]:
                del group[field]
                group[field] = value
        said = call.error('--out_dir', 'out', '--resume', '--epochs', '2')
        assert f'was trained on different {part} from those that' in said
    shutil.copy(folder / 'kept.hdf5', path_of(folder))
    assert 'step 4' in call('--out_dir', 'out', '--resume', '--epochs', '2', '--log_interval', '1')


def test_an_unknown_encoder_is_reported(folder, embed, call, monkeypatch, capsys):
    embed()
    call(*DATA, *TRAINING)
    trained = newest(folder / 'out', 'tiny')
    contents = torch.load(trained / 'text2image.pt', weights_only=True)
    torch.save({**contents, 'data': {}}, trained / 'text2image.pt')  # as of an earlier version
    said = call('--out_dir', 'out', '--resume', '--epochs', '2')
    assert f'{trained}: has no record of its training data' in said
    os.makedirs(folder / 'weights')
    shutil.copy(trained / 'options.json', folder / 'weights')
    torch.save({net: contents[net] for net in ('netG', 'netD')}, folder / 'weights' / 'text2image.pt')
    assert 'weights: its checkpoint holds weights alone' in call.error('--resume', 'weights')
    torch.save(contents['netG'], folder / 'generator.pt')
    assert f'generator.pt: {UNKNOWN}' in call(*DRAW, *DATA, '--checkpoint', 'generator.pt')
    assert f'generator.pt: {UNKNOWN}' in call(*DATA, '--train', 'False', '--out_dir', 'out', '--checkpoint',
                                                'generator.pt')

    tree = Caller(stackgan_v2, folder, monkeypatch, capsys)
    tree(*DATA, '--epochs', '1', '--batch_size', '2', '--branches', '1', '--gf_dim', '2', '--df_dim', '2', '--workers',
         '0', '--out_dir', 'tree')
    snapshot, = (newest(folder / 'tree', 'tiny') / 'Model').glob('netG_*.pth')
    assert UNKNOWN not in tree(*DRAW, '--checkpoint', snapshot)  # the run keeps the encoder
    swapped = shutil.copytree(snapshot.parent.parent, folder / 'swapped')
    write_encoder(str(swapped / 'other.hdf5'), seed=2)
    os.replace(swapped / 'other.encoder.pt', swapped / 'encoder.pt')
    for place in (swapped, swapped / 'Model' / snapshot.name):
        assert 'swapped/encoder.pt: is not the sentence encoder' in tree.error(*DRAW, '--checkpoint', place)
    shutil.copy(snapshot, folder)
    assert f'{snapshot.name}: {UNKNOWN}' in tree(*DRAW, *DATA, '--checkpoint', snapshot.name)
    write_encoder(path_of(folder), seed=1)
    assert 'is not the sentence encoder' in tree.error(*DRAW, '--checkpoint', snapshot,
                                                       '--encoder', layout.encoder_beside(path_of(folder)))


def test_stackgan_v1_refuses_another_encoder(folder, embed, monkeypatch, capsys):
    embed()
    stackgan = Caller(stackgan_v1, folder, monkeypatch, capsys)
    narrow = ['--batch_size', '2', '--gf_dim', '4', '--df_dim', '1', '--condition_dim', '2', '--workers', '0']
    stackgan(*DATA, *TRAINING, *narrow)
    stage1 = newest(folder / 'out', 'tiny')
    second = ['--stage', '2', *DATA, '--epochs', '1', *narrow, '--residuals', '1', '--out_dir']
    assert UNKNOWN not in stackgan(*second, 'out2', '--stage1', stage1)
    stage2 = newest(folder / 'out2', 'tiny')
    write_encoder(path_of(folder), seed=1)
    other = layout.encoder_beside(path_of(folder))
    assert f'{other}: is not the sentence encoder' in stackgan.error(*DRAW, '--encoder', other)
    embed()
    for checkpoint in (stage1, stage2):
        said = stackgan.error(*DATA, '--train', 'False', '--checkpoint', checkpoint)
        assert f'do not come from the sentence encoder that {checkpoint}/stackgan_v1.pt was trained with' in said
    for start in (['--stage1', stage1], ['--checkpoint', stage2]):
        said = stackgan.error(*second, 'none', *start)
        assert f'do not come from the sentence encoder that {start[1]}/stackgan_v1.pt was trained with' in said
    assert 'was trained on different embeddings from' in stackgan.error('--resume', stage2, '--epochs', '2')
    assert not (folder / 'none').exists()


def test_characters_that_the_encoder_cannot_read_are_reported(folder, embed, call):
    embed()
    call(*DATA, *TRAINING)
    said = call('--train', 'False', '--out_dir', 'out', '--text', 'красная птица', '--text', 'a café' + ' bird' * 50,
                '--text', 'a red bird', '--text', 'a\xa0red \u200bbird')
    assert 'the encoder cannot read U+00A0 U+200B; it reads "ared bird"' in said
    assert '"красная птица": the encoder cannot read а и к н п р с т ц я; it reads " "' in said
    assert 'cannot read é; it reads "a caf bird' in said and 'not the 55 after them' in said
    assert '"a red bird": the encoder' not in said


def test_training_an_encoder_on_one_class_is_refused(folder, monkeypatch, capsys):
    tiny.make(path_of(folder), {'train': {'001.Auk': 3}, 'test': {'002.Jay': 1}})
    command = Caller(encoder_main, folder, monkeypatch, capsys)
    error = command.error(*DATA, '--image_encoder', 'scratch', '--out_dir', 'out')
    assert 'all 3 photographs of /train are of one class' in error and not os.path.exists(folder / 'out')
    tiny.make(path_of(folder), {'train': {}, 'test': {'002.Jay': 1}})
    error = command.error(*DATA, '--image_encoder', 'scratch', '--out_dir', 'out')
    assert '/train is empty; prepare the data with photographs to train on' in error


def test_a_run_that_moved_finds_its_data_again(folder, embed, call):
    embed()
    call(*DATA, *TRAINING)
    os.makedirs(folder / 'elsewhere')
    for part in ('data', 'out'):
        shutil.move(folder / part, folder / 'elsewhere' / part)
    trained = newest(folder / 'elsewhere' / 'out', 'tiny')
    assert 'step 4' in call('--resume', trained, '--epochs', '2', '--log_interval', '1')
    assert run.read_options(trained)['data_dir'] == str(folder / 'elsewhere' / 'data')
    call('--train', 'False', '--resume', trained, '--text', 'a crow')
    assert newest(folder / 'elsewhere' / 'out', 'text_').is_dir() and not (folder / 'out').exists()
    shutil.move(folder / 'elsewhere' / 'data', folder / 'data')  # the data has moved, the run has not
    said = call('--resume', trained, '--epochs', '3', '--data_dir', 'data')
    assert 'which does not exist' in said and 'done: ' in said


def test_a_run_moved_during_training_can_resume(folder, embed, call, monkeypatch):
    embed()
    steps, step = [], main.Model.train_step

    def move_it(model, batch):
        steps.append(1)
        if len(steps) == 1:
            shutil.move(newest(folder / 'out', 'tiny'), folder / 'mine')
        return step(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(main.Model, 'train_step', move_it)
        said = call(*DATA, *TRAINING)
    trained = newest(folder / 'out', 'tiny')
    assert f'{trained}: the folder was moved or removed during the training' in said
    assert 'such as encoder.pt, from the moved one' in (trained / 'log.txt').read_text()
    assert list(trained.glob('events.out.tfevents.*')) and (trained / 'lock').exists()
    assert 'step 4' in call('--resume', trained, '--epochs', '2', '--log_interval', '1')


def test_captions_that_the_encoder_cannot_read_are_reported(folder, embed, call, monkeypatch, capsys):
    encode = Caller(encoder_main, folder, monkeypatch, capsys)
    train = [*DATA, '--image_encoder', 'scratch', '--variant', 'birds_cvpr', '--epochs', '1', '--out_dir', 'sje']
    assert 'cannot read 6 of 12 captions in full, such as' in embed()  # the second caption of each photograph
    assert 'the encoder cannot read 4 of 8 captions in full' in encode(*train)
    tiny.make(path_of(folder), SPLITS, captions=('一只红色的小鸟', ' \n'))
    with h5py.File(path_of(folder), 'r+') as file:  # without the photograph's name
        for split in SPLITS:
            for group in file[split].values():
                del group['txt']
                group['txt'] = '一只红色的小鸟'
    for command in (lambda: encode.error(*train), lambda: encode.error(
            *DATA, '--embed', '--encoder', layout.encoder_beside('data/tiny.hdf5'))):
        assert "the encoder cannot read any of the captions, such as '一只红色的小鸟'" in command()
    assert 'all embeddings of /train are the same' not in call(*DATA, *TRAINING)
    layout.write_embeddings(path_of(folder), {'train': np.ones((8, 1024)), 'valid': np.ones((0, 1024)),
                                              'test': np.ones((4, 1024))}, 'ones')
    assert 'all embeddings of /train are the same, so images cannot' in call(*DATA, *TRAINING)


def test_a_training_from_weights_for_other_embeddings_says_so(folder, embed, call):
    embed()
    call(*DATA, *TRAINING)
    trained, said = newest(folder / 'out', 'tiny'), 'was trained on embeddings of a different sentence encoder'
    start = [*DATA, '--epochs', '1', '--batch_size', '4', '--out_dir', 'more', '--checkpoint', trained]
    assert said not in call(*start)
    write_encoder(path_of(folder), seed=1)
    embed()
    assert f'{trained}: {said}' in call(*start)
