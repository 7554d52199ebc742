"""Hostile HDF5 files: valid ones with bytes changed, and files that are made to do harm."""
import functools
import io
import json
import os
import struct
import subprocess
import sys

import h5py
import numpy as np

from common.flags import ROOT
from data import layout
from tests import tiny

INTERESTING = (0, 1, 0x7f, 0x80, 0xff, 0xffff, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 40, 2 ** 63, 2 ** 64 - 1)
SIGNED = (b'OHDR', b'OCHK', b'BTHD', b'BTLF', b'FRHP', b'\x89HDF')  # parts of a file that end in a checksum
LONGEST_SIGNED = 700


SERVER = """
import os, sys
from common.flags import ROOT
from data import layout, read_split
for line in sys.stdin:
    sys.stdout.flush()
    reader = os.fork()
    if reader == 0:
        for split in layout.SPLITS:
            print(read_split.read(line.rstrip(), split)[0])
        sys.stdout.flush()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]), flush=True)
"""


@functools.cache
def _server():
    """A process that reads the files whose paths it is sent, each in a copy of itself (`data.cache` starts a new one)."""
    return subprocess.Popen([sys.executable, '-c', SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            cwd=ROOT)


def read(path):
    """Read all splits as `data.read_split` does, in a process that may end as that may."""
    server, answers = _server(), []
    print(path, file=server.stdin, flush=True)
    while not (line := server.stdout.readline()).lstrip('-').rstrip().isdigit():
        assert line, 'the server has ended'
        answers.append(line)
    assert int(line) <= 0, answers
    for answer in answers if int(line) == 0 else ():
        _check(path, json.loads(answer))


def _check(path, answer):
    """What is refused is refused in one line; what is read can be trained on."""
    if 'error' in answer:
        assert '\n' not in answer['error'] and path in answer['error']
        return
    index, size = layout.Index(**answer['index']), os.path.getsize(path)
    assert len(index.keys) == len(index.captions) == len(index.photo_of)
    assert len(index.names) == len(index.classes) == len(index.boxes) == len(index.places)
    assert all(0 < offset and offset + length <= size for offset, length in index.places)
    assert all(box is None or len(box) == 4 and np.isfinite(box).all() for box in index.boxes)


def write_public(path, splits=(('train', ('Auk', 'Jay')), ('valid', ()), ('test', ('Owl',))), captions=5, **options):
    """A file as the chapter's converter writes it: five captions, a copy of everything for each, no bounding box."""
    with h5py.File(path, 'w', **options) as file:
        for split, names in splits:
            file.create_group(split)
            for seed, name in enumerate(names):
                for k in range(captions):
                    example = file[split].create_group(f'{name}_0001_{k}')
                    example.create_dataset('name', data=f'{name}_0001')
                    example.create_dataset('img', data=np.void(tiny.jpeg(seed)))
                    example.create_dataset('embeddings', data=np.full(1024, 5.0 * seed + k))
                    example.create_dataset('class', data=f'00{seed}.{name}')
                    example.create_dataset('txt', data=np.array(f'a {name} with café wings {k}\n').astype(object),
                                           dtype=h5py.string_dtype())
    return path


@functools.cache
def _valid(kind):
    """The bytes of a small valid file: ours, the chapter's, or with what ours may hold one day."""
    buffer = io.BytesIO()
    if kind == 'ours':
        with h5py.File(buffer, 'w', libver=layout.LIBRARY_VERSIONS) as file:
            for split in layout.SPLITS:
                file.create_group(split)
            file.attrs['encoder'] = np.bytes_('0123456789abcdef')
            for photograph in tiny.photographs('train', {'001.Auk': 1, '002.Jay': 4}):
                layout.write_photograph(file, 'train', photograph)
    elif kind == 'public':
        write_public(buffer, captions=2)
    else:
        write_public(buffer, captions=3, libver='latest', track_order=True)
    return buffer.getvalue()


@functools.cache
def _signed(kind):
    """[(start, end)] of the parts of a valid file that are followed by their checksum."""
    data, parts = _valid(kind), []
    for signature in SIGNED:
        start = data.find(signature)
        while start >= 0:
            for end in range(start + 8, min(len(data) - 4, start + LONGEST_SIGNED)):
                # A checksum is rarely followed by what it would have to be: the costly test comes last.
                if data[end:end + 4] != b'\0\0\0\0' and _lookup3(data[start:end]) == data[end:end + 4]:
                    parts.append((start, end))
                    break
            start = data.find(signature, start + 1)
    return parts


def _lookup3(data):
    """HDF5's checksum of metadata: Bob Jenkins' lookup3 (hashlittle), four bytes."""
    def rotate(x, k):
        return (x << k | x >> 32 - k) & 0xffffffff

    a = b = c = 0xdeadbeef + len(data) & 0xffffffff
    while len(data) > 12:
        x, y, z = struct.unpack_from('<III', data)
        a, b, c = a + x & 0xffffffff, b + y & 0xffffffff, c + z & 0xffffffff
        for k in (4, 6, 8, 16, 19, 4):
            a = (a - c & 0xffffffff) ^ rotate(c, k)
            c = c + b & 0xffffffff
            a, b, c = b, c, a
        data = data[12:]
    if not data:
        return struct.pack('<I', c)
    x, y, z = struct.unpack('<III', data.ljust(12, b'\0'))
    a, b, c = a + x & 0xffffffff, b + y & 0xffffffff, c + z & 0xffffffff
    for k in (14, 11, 25, 16, 4, 14, 24):
        c = (c ^ b) - rotate(b, k) & 0xffffffff
        a, b, c = b, c, a
    return struct.pack('<I', b)


def changed_bytes(rng, folder):
    """A valid file with bits flipped, bytes or numbers overwritten, parts moved, or the end cut off."""
    kind = rng.choice(('ours', 'public', 'latest'))
    data = bytearray(_valid(kind))
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place = rng.randrange(len(data))
        how = rng.randrange(6)
        if how == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif how == 1:
            data[place] = rng.randrange(256)
        elif how == 2:
            number, size = rng.choice(INTERESTING), rng.choice((1, 2, 4, 8))
            data[place:place + size] = (number % 256 ** size).to_bytes(size, 'little')[:len(data) - place]
        elif how == 3:  # an address of something else
            data[place:place + 8] = rng.randrange(len(data)).to_bytes(8, 'little')[:len(data) - place]
        elif how == 4:
            source, size = rng.randrange(len(data)), rng.randrange(1, 64)
            part = data[source:source + size]
            data[place:place + len(part)] = part[:len(data) - place]
        elif rng.random() < 0.1:
            del data[place:]
            data += b'\0'
    return _write(folder, data)


def metadata(rng, folder):
    """A valid file with numbers changed in what describes groups and data sets; its checksums are right."""
    kind = rng.choice(('ours', 'latest'))
    data, parts = bytearray(_valid(kind)), _signed(kind)
    for start, end in rng.sample(parts, rng.choice((1, 1, 2, 3))):
        for _ in range(rng.choice((1, 1, 2, 5))):
            place, size = rng.randrange(start + 4, end), rng.choice((1, 1, 2, 4, 8))
            number = rng.choice((*INTERESTING, rng.randrange(256), rng.randrange(len(data))))
            data[place:min(place + size, end)] = (number % 256 ** size).to_bytes(size, 'little')[:end - place]
        data[end:end + 4] = _lookup3(bytes(data[start:end]))
    return _write(folder, data)


def _write(folder, data):
    path = os.path.join(folder, 'birds.hdf5')
    with open(path, 'wb') as file:
        file.write(data)
    read(path)


TARGETS = {'hdf5 bytes': changed_bytes, 'hdf5 metadata': metadata}
