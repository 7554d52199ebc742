"""Damaged and malicious pickles of embeddings, as `--pickles` reads them."""
import functools
import os
import pickle
import struct

import numpy as np

from common.errors import UserError
from data.birds.published_embeddings import open_pickles
from tests.test_published_embeddings import (
    FORGED,
    SMALL,
    array_of,
    dtype_of,
    nested,
    python2_array,
    python2_strings,
    python2_text_array,
    shared,
)

NAMES, ROWS = ['001.A/one', '002.B/two'], np.arange(2 * 1024, dtype=np.float32).reshape(2, 1024) / 100
FILES = {'names': 'filenames.pickle', 'rows': 'char-CNN-RNN-embeddings.pickle'}


@functools.lru_cache(maxsize=1)
def valid():
    """Return {'names' or 'rows': [bytes of pickles]}, as Python 2 and 3 write them; all arrays but one are small."""
    lists = [ROWS, -ROWS], [list(ROWS), ROWS.tolist()[:1]], [ROWS.astype('>f8'), ROWS[:1]], np.stack([ROWS, ROWS])
    rows = [pickle.dumps(value, protocol) for value in lists for protocol in range(6)]
    rows += [b'\x80\x02](' + python2_array(ROWS) + python2_array(-ROWS) + b'e.', python2_text_array(ROWS[0])]
    names = [pickle.dumps(value, protocol) for value in (NAMES, tuple(NAMES), np.array(NAMES), np.array(NAMES, object))
             for protocol in range(6)]
    return {'rows': rows, 'names': [*names, b'\x80\x02](' + python2_strings(NAMES) + b'e.']}


def fuzz(rng, folder):
    """Read a pair of pickles, one of which is changed."""
    damaged = rng.choice(list(FILES))
    os.makedirs(os.path.join(folder, 'train'), exist_ok=True)
    for what, name in FILES.items():
        data = rng.choice(valid()[what])
        if what == damaged:
            data = attack(rng) if rng.random() < .3 else mutate(rng, data)
        with open(os.path.join(folder, 'train', name), 'wb') as file:
            file.write(data)
    try:
        look_up = open_pickles(folder)
    except UserError:
        return
    for name in NAMES:
        try:
            rows = look_up(name)
        except ValueError:
            continue
        assert rows.dtype == np.float32 and rows.shape[1:] == (1024,) and np.isfinite(rows).all()


def mutate(rng, data):
    """Change, remove, repeat or insert some bytes: random ones, opcodes, or extreme numbers."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = rng.randrange(len(data) + 1) if rng.random() < .5 else rng.randrange(min(200, len(data) + 1))
        edge = rng.choice((b'\xff' * 4, b'\0' * 4, b'\xff\xff\xff\x7f', b'\0\0\0\x10', bytes([rng.randrange(256)]),
                           rng.choice([b'h', b'q', b'r', b'R', b'b', b'l', b't', b'(', b'2', b'0', b'a', b'e', b'j']),
                           rng.choice([b'\x95', b'\x96', b'\x8e', b'T', b'X', b'B']) + rng.randbytes(8)))
        kind = rng.randrange(5)
        if kind == 0:
            data[place:place + len(edge)] = edge
        elif kind == 1:
            data[place:place] = edge
        elif kind == 2:
            del data[place:place + rng.choice((1, 3, 500))]
        elif kind == 3:
            start = rng.randrange(len(data) + 1)
            data[place:place] = data[start:start + rng.choice((1, 8, 60))]
        elif data:
            place = min(place, len(data) - 1)
            data[place] ^= 1 << rng.randrange(8)
    return bytes(data)


def attack(rng):
    """Return a pickle that requests much memory, or other objects."""
    size = rng.choice((2 ** 15, 2 ** 28, 2 ** 31 - 1, 2 ** 32 - 1))
    kinds = [
        lambda: rng.choice(list(SMALL.values())),
        lambda: rng.choice(list(FORGED.values()))(os.devnull),
        lambda: b'\x80\x02K\x01r' + struct.pack('<I', size) + b'.',
        lambda: b'\x80\x03' + rng.choice((b'B', b'T', b'X')) + struct.pack('<I', size) + rng.randbytes(9) + b'.',
        lambda: b'\x80\x04' + rng.choice((b'\x8e', b'\x96', b'\x8d', b'\x95')) + struct.pack('<Q', size << 20) + b'a.',
        lambda: b'\x80\x02](' + b']' * size_of(rng) + b'a' * size_of(rng) + b'e.',
        lambda: b'(' * size_of(rng) + b't' * size_of(rng) + b'.',
        lambda: b']q\0' + b'h\0' * size_of(rng) + b'.',
        lambda: pickle.dumps([shared(rng.randrange(12), rng.choice((2, 10, 100)))] * 2),
        lambda: pickle.dumps([nested(rng.randrange(300))] * 2, rng.randrange(6)),
        lambda: pickle.dumps([[10 ** rng.choice((30, 400, 6000))] * 1024] * 2),
        lambda: array_of(dtype_of(rng.choice((b'U9999', b'f4', b'S1', b'O8', b'c16', b'M8', b'V8'))),
                         b'(' + b'J' + struct.pack('<I', size) * rng.randrange(2) + b'K\0' * rng.randrange(40) + b't',
                         b'U\0'),
    ]
    return rng.choice(kinds)()


def size_of(rng):
    return rng.choice((0, 1, 10, 1000, 20000))


TARGETS = {'pickles': fuzz}
