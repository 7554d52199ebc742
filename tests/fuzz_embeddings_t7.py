"""Damaged and malicious Torch7 files of embeddings, as `--icml` reads them."""
import functools
import os
import struct

import numpy as np

from data.birds.published_embeddings import open_icml
from tests.test_published_embeddings import HOSTILE
from tests.torch7_writer import Tensor, Torch, dumps, string

EDGES = [0, 1, 2, -1, 255, 2 ** 15, 2 ** 28, 2 ** 31 - 1, -2 ** 31]


@functools.lru_cache(maxsize=1)
def valid():
    """Return the bytes of valid files."""
    rows = np.arange(2 * 1024, dtype=np.float32).reshape(2, 1024) / 100
    itself = {'txt': Tensor(rows), 'deep': [[[1, 'a', True, None]]]}
    itself['base'] = itself
    linear = {'txt': Tensor(rows.astype(np.float64)), 'net': Torch('nn.Linear', weight=Tensor(rows))}
    plain = {'img': '001.A/one.jpg', 'char': Tensor(np.ones((21, 2), np.uint8)), 'txt': Tensor(rows)}
    return [dumps(record) for record in (itself, linear, plain)]


def fuzz(rng, folder):
    """Read one changed file."""
    if rng.random() < .2:
        data = struct.pack('<iiii', 3, 7, 1, 2) + string('txt') + rng.choice(list(HOSTILE.values()))
    elif rng.random() < .1:
        data = struct.pack('<iiiid', 3, 1, 1, 1, 0) * rng.randrange(1000)  # a table in a table in a table
    else:
        data = rng.choice(valid())
    data = mutate(rng, data) if rng.random() < .9 else data
    os.makedirs(os.path.join(folder, '001.A'), exist_ok=True)
    with open(os.path.join(folder, '001.A', 'one.t7'), 'wb') as file:
        file.write(data)
    try:
        rows = open_icml(folder)('001.A/one')
    except ValueError:
        return
    assert rows.dtype == np.float32 and rows.shape[1:] == (1024,) and np.isfinite(rows).all()


def mutate(rng, data):
    """Change some bytes or numbers, mostly in front of the rows."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(data) + 1) if rng.random() < .2 else rng.randrange(min(400, len(data) + 1))
        number = struct.pack('<i', rng.choice(EDGES)) if rng.random() < .5 else struct.pack(
            '<q', rng.choice((*EDGES, 2 ** 40, 2 ** 62, -2 ** 62)))
        kind = rng.randrange(4)
        if kind == 0:
            data[place:place + len(number)] = number
        elif kind == 1:
            data[place:place] = number
        elif kind == 2:
            del data[place:place + rng.choice((1, 4, 8, 500))]
        elif data:
            data[min(place, len(data) - 1)] = rng.randrange(256)
    return bytes(data)


TARGETS = {'embeddings_t7': fuzz}
