"""Torch7 files for tests/fuzz.py: sentence encoders with changed bytes or fields, and malicious files."""
import functools
import os
import struct

import numpy as np

from char_cnn_rnn.torch7 import read_encoder
from common import torch7_file
from common.errors import UserError
from tests.torch7_writer import Table, Tensor, Torch, dumps

DIM = 3
NAMES = ('protos', 'enc_doc', 'module', 'mapindex', 'weight', 'bias', 'modules', 'kW')
KINDS = ('nn.Linear', 'nn.CAddTable', 'nn.ReLU', 'torch.FloatTensor', 'torch.ByteStorage', 'tds.Hash')


def linear(**fields):
    return Torch('nn.Linear', weight=Tensor(np.ones((DIM, DIM), np.float32)), bias=Tensor(np.ones(DIM, np.float32)),
                 **fields)


def node(module, *parents):
    """Return the data of an nngraph node; its `mapindex` maps positions to parents and parents to positions."""
    mapindex = Table()
    for place, parent in enumerate(parents, 1):
        mapindex[place], mapindex[parent] = parent, place
    return Table(mapindex=mapindex, module=module)


def file_of(*found):
    return {'protos': {'enc_doc': Torch('nn.gModule', modules=list(found))}}


def small_encoder():
    """Return an encoder with convolutions and a plain recurrent network of two steps."""
    convolutions = [Torch('nn.TemporalConvolution', kW=4, weight=Tensor(np.ones((2, 4 * size), np.float32)),
                          bias=Tensor(np.ones(2, np.float32))) for size in (70, 384, 512)]
    first = node(Torch('nn.ReLU'), node(linear(), node(Torch('nn.Identity'))))
    joined = node(Torch('nn.CAddTable'), node(linear(), node(Torch('nn.Identity'))), node(linear(), first))
    return file_of(*convolutions, node(Torch('nn.ReLU'), joined),
                   Torch('nn.Linear', weight=Tensor(np.ones((1024, 2), np.float32)), bias=Tensor(np.ones(1024))))


def all_connected(count):
    """Return layers of `count` fully connected nodes: count^4 paths from the first to the last."""
    layer = [node(linear()) for _ in range(count)]
    for kind in ('nn.CAddTable', 'nn.Sigmoid', 'nn.MulConstant'):
        layer = [node(Torch(kind), *layer) for _ in range(count)]
    return file_of(*layer)


def itself(kind):
    found = Torch(kind, weight=Tensor(np.ones((DIM, DIM), np.float32)))
    found.fields['base'] = found.fields['module'] = found.fields['modules'] = found.fields
    found.fields['mapindex'] = found.fields
    return file_of(found)


def tensor(size, stride, offset=1, numbers=9):
    return file_of(Torch('nn.Linear', weight=Tensor(np.ones(numbers, np.float32), size, stride, offset),
                         bias=Tensor(np.ones(3, np.float32))))


def views(count):
    """Return many Linears, each with another part of one storage."""
    storage = np.ones(count + 100, np.float32)
    return file_of(*(Torch('nn.Linear', weight=Tensor(storage, (10, 10), (10, 1), i + 1)) for i in range(count)))


DEEP = 50_000
ATTACKS = {
    'itself': lambda: dumps(itself('nn.Linear')), 'itself, a graph': lambda: dumps(itself('nn.gModule')),
    'no stride': lambda: dumps(tensor((40_000, 40_000), (0, 0))), 'long': lambda: dumps(tensor((10 ** 12,), (1,))),
    'huge': lambda: dumps(tensor((2 ** 62, 2 ** 62), (2 ** 62, 2 ** 62))),
    'negative': lambda: dumps(tensor((3, -3), (3, 1))),
    'backwards': lambda: dumps(tensor((3, 3), (-3, 1))), 'before': lambda: dumps(tensor((3, 3), (3, 1), -5)),
    'connected': lambda: dumps(all_connected(20)), 'connected more': lambda: dumps(all_connected(100)),
    'views': lambda: dumps(views(1500)), 'more views': lambda: dumps(views(5000)),
    'deep': lambda: b''.join(struct.pack('<iiiid', 3, i + 1, 1, 1, 1.) for i in range(DEEP)) + struct.pack('<i', 0),
    'deep keys': lambda: b''.join(struct.pack('<iii', 3, i + 1, 1) for i in range(DEEP)) + DEEP * struct.pack('<i', 0),
    'objects': lambda: b''.join(struct.pack('<iii', 4, i + 1, 1) + b'x' for i in range(DEEP)) + struct.pack('<i', 0),
    'storage': lambda: _of('torch.FloatStorage', struct.pack('<q', 2 ** 60)),
    'storage below zero': lambda: _of('torch.FloatStorage', struct.pack('<q', -1)),
    'dimensions': lambda: _of('torch.FloatTensor', struct.pack('<i', 2 ** 31 - 1)),
    'string': lambda: struct.pack('<ii', 2, 2 ** 31 - 1), 'string below zero': lambda: struct.pack('<ii', 2, -1),
    'table': lambda: struct.pack('<iii', 3, 1, 2 ** 31 - 1), 'table below zero': lambda: struct.pack('<iii', 3, 1, -1),
    'array as a key': lambda: struct.pack('<iii', 3, 1, 1) + _of('torch.ByteStorage', struct.pack('<q', 0)) + bytes(4),
    'not a number as a key': lambda: struct.pack('<iii', 3, 1, 1) + struct.pack('<id', 1, float('nan')) + bytes(4),
    'function': lambda: struct.pack('<iii', 8, 1, 3) + b'abc' + bytes(4), 'html': lambda: b'<html>404</html>\n',
}


def _of(kind, rest):
    return struct.pack('<iii', 4, 77, len(kind)) + kind.encode() + rest


@functools.cache
def _attack(name):
    return ATTACKS[name]()


@functools.cache
def _whole():
    return dumps(small_encoder())


def _changed(rng, data):
    """Return bytes with some numbers changed, mostly small ones: lengths, types and references."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(0, min(len(data), rng.choice([200, 2000, len(data)])) - 8)
        way = rng.choice(['integer', 'long', 'bytes', 'cut', 'remove', 'copy'])
        if way == 'integer':
            data[place:place + 4] = struct.pack('<i', rng.choice([-1, 0, 1, 2, 3, 4, 7, 100, 2 ** 31 - 1, -2 ** 31]))
        elif way == 'long':
            data[place:place + 8] = struct.pack('<q', rng.choice([-1, 0, 1, 2, 3, 10 ** 6, 2 ** 40, 2 ** 63 - 1]))
        elif way == 'bytes':
            data[place:place + 3] = rng.randbytes(3)
        elif way == 'cut':
            del data[max(place, 20):]
        elif way == 'remove':
            del data[place:place + rng.choice([1, 4, 8, 100])]
        else:
            other = rng.randrange(len(data))
            data[place:place + 50] = data[other:other + 50]
        if len(data) < 20:
            break
    return bytes(data)


def encoders(rng, folder):
    return _read(_attack(rng.choice(list(ATTACKS))) if rng.random() < 0.003 else _changed(rng, _whole()), folder)


def made_up(rng, folder):
    """Return nested values of every kind."""
    return _read(_value(rng, 0), folder)


def _value(rng, depth):
    index, kind = rng.randrange(1, 9), rng.choice([0, 1, 2, 3, 3, 3, 4, 4, 5, 8, 9] if depth < 6 else [0, 1, 2, 5])
    if kind == 1:
        return struct.pack('<id', 1, rng.choice([0., 1, 2, -1, 1e300, float('nan'), float('inf')]))
    if kind == 2:
        return b'\2\0\0\0' + _text(rng.choice(NAMES))
    if kind == 5:
        return struct.pack('<ii', 5, rng.randrange(3))
    if kind == 3:
        count = rng.randrange(5)
        return struct.pack('<iii', 3, index, count) + b''.join(_value(rng, depth + 1) for _ in range(2 * count))
    if kind == 4:
        name = rng.choice(KINDS)
        rest = _value(rng, depth + 1)
        if name.endswith('Tensor'):
            dims = rng.randrange(3)
            rest = struct.pack('<i', dims) + b''.join(struct.pack('<q', rng.choice([-1, 0, 1, 2, 2 ** 40]))
                                                      for _ in range(2 * dims + 1)) + rest
        elif name.endswith('Storage'):
            rest = struct.pack('<q', rng.choice([-1, 0, 3, 2 ** 40])) + b'abc'
        return struct.pack('<ii', 4, index) + _text('V 1') + _text(name) + rest
    return struct.pack('<i', kind) + (struct.pack('<ii', index, 2) + b'ab' if kind == 8 else b'')


def _text(value):
    return struct.pack('<i', len(value)) + value.encode()


def _read(data, folder):
    """Read a file both as an encoder and as plain values."""
    path = os.path.join(folder, 'a.t7')
    with open(path, 'wb') as file:
        file.write(data)
    try:
        read_encoder(path)
        return 'accepted'
    except UserError as error:
        assert '\n' not in str(error) and len(str(error)) < 1000, str(error)
    try:
        _look_at(torch7_file.read(path))
    except ValueError:
        pass
    return 'refused'


def _look_at(value):
    if isinstance(value, torch7_file.Tensor):
        assert value.array().size < 10 ** 6
    elif isinstance(value, torch7_file.Table):
        for part in list(value.values())[:3]:
            if isinstance(part, torch7_file.Tensor):
                _look_at(part)


TARGETS = {'torch7_encoders': encoders, 'torch7_made_up': made_up}
