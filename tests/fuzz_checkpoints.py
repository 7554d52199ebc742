"""Checkpoints for tests/fuzz.py: damaged bytes, malicious pickles, and edits of what the four Models save."""
import functools
import os
import tempfile
import zipfile
from unittest import mock

import torch

from char_cnn_rnn import encoder
from char_cnn_rnn.build_encoder import load_encoder
from common import checkpoint
from common.errors import UserError
from common.progress import set_rng_state
from stackgan_v1 import build_gan as stackgan_v1
from stackgan_v2 import build_gan as stackgan_v2
from tests import hostile_checkpoints as hostile

MODELS = ('text2image', 'stackgan_v1', 'stackgan_v2', 'char_cnn_rnn')
WHOLE = {'netG': {'0.weight': torch.arange(600.).reshape(20, 30), '0.bias': torch.zeros(0)}, 'step': 3,
         'options': {'lr': 2e-4, 'text': None, 'train': True}, 'list': [torch.arange(5), (0.5, 0.999)]}


@functools.cache
def _small_model(name):
    return hostile.small_model(name)


@functools.cache
def _contents(name):
    with tempfile.TemporaryDirectory() as folder:
        return hostile.contents_of(name, folder)


@functools.cache
def _file(zipped):
    if zipped:
        return hostile.dumps(WHOLE)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(f'{folder}/a', WHOLE, old_format=True)
        with open(f'{folder}/a', 'rb') as file:
            return file.read()


def _refused(read, *args, **how):
    """Return what a reader returns, or None if it refuses its file in one line."""
    try:
        return read(*args, **how)
    except UserError as error:
        assert '\n' not in str(error) and len(str(error)) < 1000, str(error)
        return None


def _write(folder, data, name='a.pt'):
    path = os.path.join(folder, name)
    with open(path, 'wb') as file:
        file.write(data)
    return path


def _damaged(rng, data):
    """Return bytes with one kind of damage."""
    data, place = bytearray(data), rng.randrange(len(data))
    way = rng.choice(['bit', 'byte', 'bytes', 'cut', 'zeros', 'insert', 'remove', 'copy', 'append'])
    length = min(rng.choice([1, 2, 4, 64, 512]), len(data) - place)
    if way == 'bit':
        data[place] ^= 1 << rng.randrange(8)
    elif way == 'byte':
        data[place] = rng.randrange(256)
    elif way == 'bytes':
        data[place:place + length] = rng.randbytes(length)
    elif way == 'cut':
        del data[place:]
    elif way == 'zeros':
        data[place:place + length] = bytes(length)
    elif way == 'insert':
        data[place:place] = rng.randbytes(length)
    elif way == 'remove':
        del data[place:place + length]
    elif way == 'copy':
        data[place:place + length] = data[:length]
    else:
        data += rng.randbytes(length)
    return bytes(data)


def damaged_bytes(rng, folder):
    """A damaged file is refused, or the damage does not matter: what is read equals what was written."""
    data = _file(zipped=rng.random() < 0.7)
    data = _damaged(rng, data) if rng.random() < 0.9 else hostile.packed(
        _file(True), rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]))
    contents = _refused(checkpoint.load, _write(folder, data), mapped=rng.random() < 0.5)
    assert contents is None or _same(contents, WHOLE), 'other contents than were written'
    return 'refused' if contents is None else 'accepted'


def _same(value, other):
    if torch.is_tensor(other):
        return torch.is_tensor(value) and value.dtype == other.dtype and torch.equal(value, other)
    if isinstance(other, dict):
        return (isinstance(value, dict) and value.keys() == other.keys()
                and all(_same(value[key], other[key]) for key in other))
    if isinstance(other, (list, tuple)):
        return type(value) is type(other) and len(value) == len(other) and all(map(_same, value, other))
    return value == other


def pickles(rng, folder):
    """Malicious pickle programs, or that of a checkpoint with changes, in a valid archive."""
    if rng.random() < 0.02:
        program = rng.choice(list(hostile.ATTACKS.values()))
    else:
        program = hostile.entry(rng.choice([hostile.tensor(), hostile.STATE_DICT, b']', b'}', b'K\x01\x85']))
        for _ in range(rng.randint(1, 3)):
            program = _damaged(rng, program or b'.')
        if rng.random() < 0.3:
            program = program[:2] + rng.choice(list(hostile.ATTACKS.values()))[:300][2:-1] + program[2:]
    contents = _refused(checkpoint.load, _write(folder, hostile.with_pickle(program)), mapped=rng.random() < 0.5)
    return 'refused' if contents is None else 'accepted'


def edits(rng, folder, name):
    """Training can continue from an accepted checkpoint; a refused one leaves the model unchanged.

    One in ten goes through a file, which takes most of the time.
    """
    model, with_file = _small_model(name), rng.random() < 0.1
    contents = hostile.edited(_contents(name), rng, rng.choice([1, 1, 1, 2, 3]), with_file)
    path = _write(folder, hostile.dumps(contents, zipped=rng.random() < 0.8) if with_file else b'')
    load = checkpoint.load if with_file else lambda *_: contents
    before = hostile.state_of(model)
    with mock.patch('builtins.print'), mock.patch.object(checkpoint, 'load', load):
        if _refused(lambda: model.load_from(path, verbose=False) or True) is None:
            after = hostile.state_of(model)  # whose numbers may be without end after steps from odd ones
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after)), 'half loaded'
            return 'refused'
    hostile.take_a_step(model)
    for state in (model.progress['rng'], model.progress['epoch_rng']):
        if state:
            set_rng_state(state)
    if with_file:
        model.save_to(folder, 'again', verbose=False)
        checkpoint.load(os.path.join(folder, 'again.pt'))
    return 'accepted'


def generators(rng, folder):
    """The generator of an accepted checkpoint can generate."""
    section, name = rng.choice([(stackgan_v1, 'stackgan_v1'), (stackgan_v2, 'stackgan_v2')])
    contents = _contents(name)
    contents = contents['netG'] if rng.random() < 0.5 else {key: contents[key] for key in contents if 'D' not in key}
    path = _write(folder, hostile.dumps(hostile.edited(contents, rng, rng.choice([1, 1, 2])), rng.random() < 0.8))
    with mock.patch('builtins.print'):
        loaded = _refused(section.load_generator, path, name)
    if loaded is None:
        return 'refused'
    if rng.random() < 0.05:
        loaded[0].generate(torch.ones(1, 3))
    return 'accepted'


@functools.cache
def _encoder_contents():
    return {'variant': 'birds_cvpr', 'encoder': encoder.CharCnnRnn('birds_cvpr').state_dict()}


def encoders(rng, folder):
    """Sentence encoders with a narrow recurrent network."""
    with mock.patch.dict(encoder.VARIANTS, {name: (4, *how[1:]) for name, how in encoder.VARIANTS.items()}):
        contents = _encoder_contents()
        contents = contents if rng.random() < 0.5 else contents['encoder']
        path = _write(folder, hostile.dumps(hostile.edited(contents, rng, 1)))
        return 'refused' if _refused(load_encoder, path) is None else 'accepted'


TARGETS = {'checkpoint_bytes': damaged_bytes, 'checkpoint_pickles': pickles, 'generators': generators,
           'encoders': encoders, **{f'{name}_edits': functools.partial(edits, name=name) for name in MODELS}}
WEIGHTS = {'encoders': 0.1, 'generators': 0.5}
