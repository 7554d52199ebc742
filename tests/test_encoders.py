"""Embeddings of any encoder and width: written, trained on, evaluated, and read by that encoder alone."""
import io
import json
import os
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch

from char_cnn_rnn import reading
from common import checkpoint
from common.errors import UserError, run_command
from data import embed as embed_main
from data import layout, sentence_encoders
from data.cache import load_split
from data.sentence_encoders import SentenceEncoder, fingerprint_of
from data.txt2image_dataset import Text2ImageDataset
from evaluation.browsed_runs import BrowsedRun
from stackgan_v1 import main as stackgan_v1
from stackgan_v2 import main as stackgan_v2
from tests import tiny
from tests.commands import DATA, Caller, newest
from tests.errors import one_line
from text2image import main as text2image
from text2image.build_gan import load_generator

pytestmark = pytest.mark.usefixtures('one_thread')

WIDTH = 24
SPLITS = {'train': {'001.Auk': 2, '002.Jay': 2}, 'test': {'004.Wren': 1, '005.Lark': 1}}
GANS = {'text2image': (text2image, []),
        'stackgan_v1': (stackgan_v1, ['--gf_dim', '4', '--df_dim', '1', '--condition_dim', '2', '--workers', '0']),
        'stackgan_v2': (stackgan_v2, ['--branches', '1', '--gf_dim', '2', '--df_dim', '2', '--workers', '0'])}
TRAINING = ['--batch_size', '2', '--log_interval', '1', '--out_dir', 'out']
DRAW = ['--train', 'False', '--out_dir', 'drawn', '--text', 'ein roter Vogel – 一只红色的小鸟', '--checkpoint']


@pytest.fixture
def folder(tmp_path):
    """Return a folder with data/tiny.hdf5, embedded by the chapter's encoder, which is beside it."""
    return tiny.with_encoder(tmp_path, SPLITS)


@pytest.fixture
def embed(folder, monkeypatch, capsys):
    return Caller(embed_main, folder, monkeypatch, capsys)


def path_of(folder):
    return str(folder / 'data' / 'tiny.hdf5')


def names_of(path):
    return [f'{split}/{key}' for split in layout.SPLITS for key in load_split(path, split).index.keys]


def rows_of(names, width=WIDTH, seed=0):
    return np.random.default_rng(seed).standard_normal((len(names), width)).astype(np.float32)


def write_npz(folder, name='rows.npz', width=WIDTH, seed=0, **others):
    """Write embeddings of all captions, the names in reverse order; return {name: embedding}."""
    names = names_of(path_of(folder))
    rows = rows_of(names, width, seed)
    np.savez(folder / name, **{'names': np.array(names[::-1]), 'embeddings': rows[::-1]} | others)
    return dict(zip(names, rows))


def test_rows_of_another_width_are_found_by_name(folder, embed):
    before = (folder / 'data' / 'tiny.encoder.pt').read_bytes()
    rows = write_npz(folder, encoder='mine, v2')
    said = embed('tiny', '--data_dir', 'data', '--npy', 'rows.npz')
    assert f'done: 12 embeddings of {WIDTH} numbers in' in said
    for number, split in ((0, 'train'), (2, 'test')):
        dataset = Text2ImageDataset(path_of(folder), split=number)
        for key, row in zip(dataset.index.keys, dataset.embeddings):
            assert np.array_equal(row.numpy(), rows[f'{split}/{key}'])
        assert dataset.embed_dim == WIDTH and dataset.encoder.startswith('npy ')
        assert Text2ImageDataset(path_of(folder), split=number).embeddings.shape == (len(dataset), WIDTH)  # cached
    with layout.open_file(path_of(folder)) as file:
        assert file.attrs['embeddings'] == 'npy, rows.npz of mine, v2'
    assert (folder / 'data' / 'tiny.encoder.pt.1').read_bytes() == before  # maybe the only copy of it


@pytest.mark.parametrize('name', GANS)
def test_a_gan_reads_the_width_from_the_file(name, folder, embed, monkeypatch, capsys):
    main, narrow = GANS[name]
    gan = Caller(main, folder, monkeypatch, capsys)
    write_npz(folder, encoder='mine')
    embed('tiny', '--data_dir', 'data', '--npy', 'rows.npz')
    typed = [*DATA, *TRAINING, *narrow]
    gan(*typed, '--epochs', '2')
    whole = newest(folder / 'out', 'tiny')

    step, steps = main.Model.train_step, []  # interrupted in the second epoch, then resumed

    def stop(model, batch):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), 2)
        return step(model, batch)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(main.Model, 'train_step', stop)
        gan(*typed, '--epochs', '2', '--out_dir', 'stopped')
    assert ended.value.code == 130 and len(steps) == 3
    stopped = newest(folder / 'stopped', 'tiny')
    gan('--resume', stopped)
    first, second = (torch.load(run / f'{name}.pt', weights_only=True)['netG'] for run in (whole, stopped))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(value.shape[1:] == (WIDTH,) for value in first.values())

    place = ['--out_dir', 'drawn'] if name == 'text2image' else []  # the others write into the run
    gan(*DATA, '--train', 'False', *place, '--checkpoint', whole)  # no flag says the width
    said = gan.error(*DRAW, whole)
    assert 'rows.npz of mine: the embeddings came from this file, and only the encoder that computed them' in said

    write_npz(folder, 'wide.npz', width=WIDTH + 8)
    embed('tiny', '--data_dir', 'data', '--npy', 'wide.npz')
    said = gan.error(*DATA, '--train', 'False', '--checkpoint', whole)
    assert f'they have {WIDTH + 8} numbers, not {WIDTH}; write them again with that one' in said
    assert '(python data/embed.py NAME --npy)' in said
    said = gan.error('--resume', whole, '--epochs', '3')
    assert f'{whole}: was trained on different embeddings from those that tiny.hdf5 holds now' in said
    assert 'does not fit' in gan.error(*typed, '--epochs', '1', '--checkpoint', whole)


def test_all_kinds_of_runs_are_measured(folder, embed, monkeypatch, capsys):
    from evaluation.trained_runs import TrainedRun
    write_npz(folder)
    embed('tiny', '--data_dir', 'data', '--npy', 'rows.npz')
    for main, narrow in GANS.values():
        Caller(main, folder, monkeypatch, capsys)(*DATA, *TRAINING, *narrow, '--epochs', '1')
        run = TrainedRun(str(newest(folder / 'out', 'tiny')), torch.device('cpu'))
        dataset = run.dataset('test')
        run.check(dataset)
        assert run.embed_dim == WIDTH and len(run.generate(dataset.embeddings)) == 4


def test_the_chapters_width_needs_no_description(tmp_path):
    """A published generator is a plain state dict; its width is that of its weights."""
    for width in (1024, WIDTH):
        torch.manual_seed(0)
        model = text2image.Model('text2image', 'cpu', None, 3, 50, 100, embed_dim=width)
        torch.save(model.netG.state_dict(), tmp_path / 'G.pt')
        loaded, _ = load_generator(str(tmp_path / 'G.pt'))
        assert loaded.netG.embed_dim == width
        assert torch.equal(loaded.generate(torch.ones(2, width)), model.generate(torch.ones(2, width)))
    weights = model.netG.state_dict() | {'text_embedding.0.weight': torch.zeros(1).expand(128, 10 ** 12)}
    torch.save(weights, tmp_path / 'G.pt')
    one_line(load_generator, str(tmp_path / 'G.pt'))


def member(array=None, header=None):
    """Return the bytes of a NPY file, or of one whose header claims something else."""
    buffer = io.BytesIO()
    if header:
        np.lib.format.write_array_header_1_0(buffer, header)
    else:
        np.lib.format.write_array(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize('change, said', [
    (lambda names, rows: {'names': names[1:], 'embeddings': rows[1:]}, 'names is [11], and there are 12 captions'),
    (lambda names, rows: {'names': names, 'embeddings': rows[1:]}, 'embeddings is [11, 24], and there are 12'),
    (lambda names, rows: {'names': np.r_[names[1:], ['train/Dodo_0']], 'embeddings': rows},
     "has no embedding of 'train/Auk_0_0' (1 such names)"),
    (lambda names, rows: {'names': np.r_[names[1:], names[1:2]], 'embeddings': rows}, 'has no embedding of'),
    (lambda names, rows: {'names': names, 'embeddings': rows * np.nan}, 'numbers that are not finite'),
    (lambda names, rows: {'names': names, 'embeddings': rows * 0}, 'or only zeros'),
    (lambda names, rows: {'names': names, 'embeddings': rows.astype(int)}, 'embeddings is of type int64, not float'),
    (lambda names, rows: {'names': names, 'embeddings': rows[:, 0]}, 'not [N] and [N, D]'),
    (lambda names, rows: {'names': names}, 'lacks an array'),
    (lambda names, rows: {'names': names.astype(object), 'embeddings': rows}, 'names is of type object, not str'),
    (lambda names, rows: {'names': names, 'embeddings': np.zeros((12, 20000), 'f2')}, 'embeddings is [12, 20000]')])
def test_npz_files_that_do_not_fit_are_refused(folder, embed, change, said):
    names = np.array(names_of(path_of(folder)))
    np.savez(folder / 'rows.npz', **change(names, rows_of(names)))
    before = {file: (folder / 'data' / file).read_bytes() for file in ('tiny.hdf5', 'tiny.encoder.pt')}
    error = embed.error('tiny', '--data_dir', 'data', '--npy', 'rows.npz')
    assert error.startswith('error: rows.npz: ') and said in error
    assert all((folder / 'data' / file).read_bytes() == content for file, content in before.items())


def test_npz_files_that_claim_too_much_are_refused(folder, embed):
    huge = member(header={'descr': '<f4', 'fortran_order': False, 'shape': (12, 10 ** 12)})
    names = member(np.array(names_of(path_of(folder))))
    for content in (huge, b'', b'\x93NUMPY\x01\x00\xff\xff'):
        with zipfile.ZipFile(folder / 'rows.npz', 'w') as archive:
            archive.writestr('names.npy', names)
            archive.writestr('embeddings.npy', content)
        error = embed.error('tiny', '--data_dir', 'data', '--npy', 'rows.npz')
        assert 'cannot be read as an NPZ file of embeddings' in error
    (folder / 'rows.npz').write_bytes(b'PK\x03\x04 damaged')
    assert 'cannot be read as an NPZ file' in embed.error('tiny', '--data_dir', 'data', '--npy', 'rows.npz')
    assert 'No such file' in embed.error('tiny', '--data_dir', 'data', '--npy', 'absent.npz')
    assert 'absent.hdf5: no such file' in embed.error('absent', '--data_dir', 'data', '--npy', 'rows.npz')
    assert '--download: has no effect with --npy' in embed.error('tiny', '--npy', 'rows.npz', '--download')


def test_embeddings_of_several_widths_are_not_written(tmp_path):
    path = tiny.make(tmp_path / 'birds.hdf5')
    rows = {'train': np.ones((14, 8)), 'test': np.ones((8, 9))}
    assert 'gives embeddings of 8 and 9 numbers' in one_line(layout.write_embeddings, path, rows, 'a test')
    rows = {'train': np.ones((14, layout.WIDEST + 1), np.float16)}
    assert 'up to 16,384' in one_line(layout.write_embeddings, path, rows, 'a test')


# --- encoders of other libraries --------------------------------------------------------------------------------------

class Letters(torch.nn.Module):
    """An encoder: the sums of the sentences' letters, in place of a library's network."""

    def __init__(self, seed=0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)))


def encode(network, device, sentences):
    sums = torch.tensor([[sum(map(ord, sentence)) / 1000 + len(sentence)] for sentence in sentences])
    return torch.sin(sums * network.weight).numpy()


@pytest.fixture
def library(monkeypatch):
    """Return the networks, {name of a folder: network}, that a library would load."""
    networks = {'mine': Letters()}
    monkeypatch.setitem(sentence_encoders.LOADERS, 'sentence_transformer',
                        lambda name, download: (networks[os.path.basename(name)], encode, os.path.abspath(name)))
    return networks


def test_a_sentence_is_read_by_the_encoder_of_the_embeddings(folder, embed, library, monkeypatch, capsys):
    gan = Caller(text2image, folder, monkeypatch, capsys)
    said = embed('tiny', '--data_dir', 'data', '--sentence_transformer', 'mine')
    assert 'captions in full' not in said
    gan(*DATA, *TRAINING, '--epochs', '1')
    run = newest(folder / 'out', 'tiny')
    assert checkpoint.load(str(run / 'encoder.pt')) == {
        'kind': 'sentence_transformer', 'name': str(folder / 'mine'),
        'fingerprint': fingerprint_of('sentence_transformer', library['mine'].parameters())}
    said = gan(*DRAW, run)
    assert f'embedded by {folder}/mine:' in said and 'cannot read' not in said
    for place in (folder / 'data').glob('tiny.*'):  # nor is the data needed
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    gan(*DRAW, run)

    library['other'], library['moved'] = Letters(seed=1), library['mine']
    for name in ('other', 'moved'):
        (folder / name).mkdir()
        (folder / name / 'modules.json').write_text('[]')
    assert f'embedded by {folder}/moved:' in gan(*DRAW, run, '--encoder', 'moved')
    assert 'other: is not the sentence encoder that' in gan.error(*DRAW, run, '--encoder', 'other')
    shutil.copy(run / 'text2image.pt', folder / 'alone.pt')
    assert 'no sentence encoder' in gan.error(*DRAW, 'alone.pt', '--data_dir', 'data')
    assert f'embedded by {folder}/moved:' in gan(*DRAW, 'alone.pt', '--encoder', 'moved')
    library['mine'] = library['other']  # the folder has been replaced by another model
    assert 'is not the sentence encoder that wrote the embeddings, sentence_transformer ' in gan.error(*DRAW, run)
    library['mine'] = library['moved']
    monkeypatch.setitem(sentence_encoders.LOADERS, 'sentence_transformer', lambda name, download: (
        library['mine'], lambda *arguments: encode(*arguments) + 1, name))  # such as with another tokenizer
    assert 'but computes different embeddings for its captions' in gan.error(*DRAW, run)
    with pytest.raises(UserError, match='but computes different embeddings for its captions'):  # on the page, too
        BrowsedRun(str(run), torch.device('cpu'))


def test_a_run_of_another_encoder_is_exported(folder, embed, library, monkeypatch, capsys):
    from evaluation import export
    embed('tiny', '--data_dir', 'data', '--sentence_transformer', 'mine')
    Caller(text2image, folder, monkeypatch, capsys)(*DATA, *TRAINING, '--epochs', '1')
    Caller(export, folder, monkeypatch, capsys)(newest(folder / 'out', 'tiny'), '--out', 'small')
    assert 'embedded by' in Caller(text2image, folder, monkeypatch, capsys)(*DRAW, 'small')


@pytest.mark.parametrize('contents', [{'kind': 'pickle'}, {'kind': 'npy', 'name': 5, 'fingerprint': 'npy 1'},
                                      {'kind': 'npy', 'name': 'a\nb', 'fingerprint': 'npy 1'},
                                      {'kind': 'npy', 'name': 'a', 'fingerprint': None}])
def test_files_that_name_no_encoder_are_refused(tmp_path, contents):
    torch.save(contents, tmp_path / 'encoder.pt')
    assert 'names no sentence encoder that is known here' in one_line(reading.load, str(tmp_path / 'encoder.pt'))


def test_a_missing_library_is_named(monkeypatch):
    for kind, module, package in (('sentence_transformer', 'sentence_transformers', 'sentence-transformers'),
                                  ('open_clip', 'open_clip', 'open_clip_torch')):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(Exception, match=f'needs: pip install {package}'):
            SentenceEncoder(kind, 'absent').embed(['a bird'])


@pytest.fixture(scope='module')
def transformer(tmp_path_factory):
    """Return the folder of a tiny model of sentence-transformers: one layer of BERT with random weights."""
    library = pytest.importorskip('sentence_transformers')
    transformers, tokenizers = pytest.importorskip('transformers'), pytest.importorskip('tokenizers')
    folder = tmp_path_factory.mktemp('bert')
    words = ['[PAD]', '[UNK]', 'a', 'small', 'red', 'bird', 'ein', 'roter', 'Vogel']
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(words, range(9))), unk_token='[UNK]'))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token='[PAD]', unk_token='[UNK]',
                                         model_max_length=32).save_pretrained(folder / 'bert')
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    )).save_pretrained(folder / 'bert')
    library.SentenceTransformer(str(folder / 'bert'), device='cpu').save(str(folder / 'model'))
    return folder / 'model'


def test_a_sentence_transformer_is_read(transformer, folder, embed, monkeypatch, capsys):
    embed('tiny', '--data_dir', 'data', '--sentence_transformer', transformer)
    assert load_split(path_of(folder), 'train').embeddings.shape == (8, 16)
    gan = Caller(text2image, folder, monkeypatch, capsys)
    gan(*DATA, *TRAINING, '--epochs', '1')
    assert f'embedded by {transformer}:' in gan(*DRAW, newest(folder / 'out', 'tiny'))


def test_unsafe_sentence_transformers_are_refused(transformer, tmp_path):
    unsafe = shutil.copytree(transformer, tmp_path / 'unsafe')
    modules = json.loads((unsafe / 'modules.json').read_text())
    for name in ('os.system', 'sentence_transformers.models.Router'):
        (unsafe / 'modules.json').write_text(json.dumps([{**modules[0], 'type': name}]))
        encoder = SentenceEncoder('sentence_transformer', str(unsafe))
        assert f"needs the code of '{name}'" in one_line(encoder.embed, ['a'])
    pickled = shutil.copytree(transformer, tmp_path / 'pickled')
    weights, = pickled.glob('**/model.safetensors')
    weights.rename(weights.parent / 'pytorch_model.bin')
    one_line(SentenceEncoder('sentence_transformer', str(pickled)).embed, ['a'], match='cannot be read as a model')
    for name in ('absent', 'absent/model'):
        one_line(SentenceEncoder('sentence_transformer', name).embed, ['a'], match='neither a folder nor in the cache')


def test_the_text_side_of_a_clip_model_is_read(folder, embed, monkeypatch, capsys):
    """Tiny, with random weights: its letters and words are those of CLIP."""
    open_clip = pytest.importorskip('open_clip')
    (folder / 'tiny-clip.json').write_text(json.dumps({
        'embed_dim': 24, 'vision_cfg': {'image_size': 32, 'layers': 1, 'width': 64, 'patch_size': 16},
        'text_cfg': {'context_length': 77, 'vocab_size': 49408, 'width': 64, 'heads': 1, 'layers': 1}}))
    open_clip.add_model_config(folder / 'tiny-clip.json')
    torch.manual_seed(0)
    network = open_clip.create_model('tiny-clip')
    torch.save(network.state_dict(), folder / 'clip.pt')
    embed('tiny', '--data_dir', 'data', '--open_clip', 'tiny-clip:clip.pt')
    split = load_split(path_of(folder), 'train')
    expected = network.eval().encode_text(open_clip.get_tokenizer('tiny-clip')(split.index.captions), normalize=True)
    assert torch.allclose(split.embeddings, expected.detach(), atol=1e-5) and expected.std(0).max() > 1e-3
    gan = Caller(text2image, folder, monkeypatch, capsys)
    gan(*DATA, *TRAINING, '--epochs', '1')
    assert f'embedded by tiny-clip:{folder}/clip.pt:' in gan(*DRAW, newest(folder / 'out', 'tiny'))
    for name in ('RN50', 'tiny-clip:gone.pt'):
        assert 'give ARCHITECTURE:FILE, a file of weights' in embed.error('tiny', '--data_dir', 'data', '--open_clip',
                                                                          name)
    torch.save({**network.state_dict(), 'text_projection': torch.zeros(1)}, folder / 'clip.pt')
    assert 'clip.pt' in embed.error('tiny', '--data_dir', 'data', '--open_clip', 'tiny-clip:clip.pt')


def test_errors_of_the_command_are_one_line(folder, embed, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['embed.py', 'tiny'])
    with pytest.raises(SystemExit):
        run_command(embed_main.main)
    assert capsys.readouterr().err.count('\n') == 1
