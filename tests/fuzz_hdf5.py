"""Hostile HDF5 files: valid ones with changed bytes, and malicious ones."""
import functools
import json
import os
import struct
import subprocess
import sys
import tempfile

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
import resource
import tqdm
from data import layout, read_split
tqdm.tqdm.get_lock()
for line in sys.stdin:
    sys.stdout.flush()
    reader = os.fork()
    if reader == 0:
        split, _, path = line.rstrip().partition(' ')
        print(read_split.read(path, split)[0], flush=True)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]), flush=True)
"""


@functools.cache
def _server():
    """Read files in forks of one process; `data.cache` starts a new process for each, which is slower."""
    return subprocess.Popen([sys.executable, '-c', SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            cwd=ROOT)


def read(path, split='train'):
    """Read a split as `data.read_split` does, in a process that may crash."""
    server, answer = _server(), None
    print(split, path, file=server.stdin, flush=True)
    while not (line := server.stdout.readline()).lstrip('-').rstrip().isdigit():
        assert line, 'the server has ended'
        answer = json.loads(line)
    assert int(line) <= 0, line
    if int(line) == 0:
        _check(path, answer)


def _check(path, answer):
    """Check that a file is refused in one line, or that its contents can be trained on."""
    if 'error' in answer:
        assert '\n' not in answer['error'] and path in answer['error']
        return
    index, size = layout.Index(**answer['index']), os.path.getsize(path)
    assert len(index.keys) == len(index.captions) == len(index.photo_of)
    assert len(index.names) == len(index.classes) == len(index.boxes) == len(index.places)
    assert all(0 < offset and offset + length <= size for offset, length in index.places)
    assert all(box is None or len(box) == 4 and np.isfinite(box).all() for box in index.boxes)


def write_public(path, splits=(('train', ('Auk', 'Jay')), ('valid', ()), ('test', ('Owl',))), captions=5, **options):
    """Write a file as the chapter's converter does: five captions, each with a copy of everything, no bounding box."""
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
    """Return the bytes of a small valid file: ours, the chapter's, or one with possible future contents of ours."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'valid.hdf5')
        if kind == 'ours':
            with layout.replace_file(path) as file:
                file.attrs['encoder'] = '0123456789abcdef'
                for photograph in tiny.photographs('train', {'001.Auk': 1, '002.Jay': 4}):
                    layout.write_photograph(file, 'train', photograph)
        elif kind == 'attacked':
            tiny.make(path, {'train': {'001.Auk': 1, '002.Jay': 1}})
        elif kind == 'public':
            write_public(path, captions=2)
        else:
            write_public(path, captions=3, libver='latest', track_order=True)
        with open(path, 'rb') as file:
            return file.read()


@functools.cache
def _signed(kind):
    """Return [(start, end)] of the parts of a valid file that are followed by their checksum."""
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
    """Return HDF5's checksum of metadata: Bob Jenkins' lookup3 (hashlittle), four bytes."""
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
    """Read a valid file with bits flipped, bytes or numbers overwritten, parts moved, or the end cut off."""
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
    _write(folder, data, rng.choice(('train', 'train', 'test')))


def metadata(rng, folder):
    """Read a valid file with changed numbers in its metadata and corrected checksums."""
    kind = rng.choice(('ours', 'latest'))
    data, parts = bytearray(_valid(kind)), _signed(kind)
    for start, end in rng.sample(parts, rng.choice((1, 1, 2, 3))):
        for _ in range(rng.choice((1, 1, 2, 5))):
            place, size = rng.randrange(start + 4, end), rng.choice((1, 1, 2, 4, 8))
            number = rng.choice((*INTERESTING, rng.randrange(256), rng.randrange(len(data))))
            data[place:min(place + size, end)] = (number % 256 ** size).to_bytes(size, 'little')[:end - place]
        data[end:end + 4] = _lookup3(bytes(data[start:end]))
    _write(folder, data, 'train')


def _write(folder, data, split):
    path = os.path.join(folder, 'birds.hdf5')
    with open(path, 'wb') as file:
        file.write(data)
    read(path, split)


def _replace(name, **made):
    """Return an attack that replaces `name` of a photograph by another data set, made with `create_dataset`."""
    def attack(file, folder):
        del file['train/Auk_0_0'][name]
        file['train/Auk_0_0'].create_dataset(name, **made)
    return attack


def _put(name, make):
    """Return an attack that replaces `name` by the result of `make(folder)`; '' stands for the caption's group."""
    def attack(file, folder):
        path = f'train/Auk_0_0/{name}'.rstrip('/')
        if path in file:
            del file[path]
        file[path] = make(folder)
    return attack


def _group_at(path):
    def attack(file, folder):
        del file[path]
        file.create_group(path)
    return attack


def _to_itself(file, folder):
    del file['train/Auk_0_0/img']
    file['train/Auk_0_0/img'] = file['train/Auk_0_0']


def _split_is_data(file, folder):
    del file['train']
    file['train'] = np.zeros(3)


def _secret(folder, name='secret.hdf5'):
    """Return another file of the machine, which must not be read."""
    path = os.path.join(folder, name)
    with h5py.File(path, 'w') as file:
        file['txt'], file['group/txt'] = 'the secret', 'the secret'
    return path


def _pipe(folder):
    path = os.path.join(folder, 'pipe')
    if not os.path.exists(path):
        os.mkfifo(path)
    return path


def _stored_elsewhere(name, dtype, where, shape=(100,)):
    def attack(file, folder):
        del file['train/Auk_0_0'][name]
        file['train/Auk_0_0'].create_dataset(name, shape, dtype, external=[(where(folder), 0, h5py.h5f.UNLIMITED)])
    return attack


def _virtual(file, folder):
    virtual = h5py.VirtualLayout((1,), h5py.string_dtype())
    virtual[:] = h5py.VirtualSource(_secret(folder), 'txt', (1,))
    del file['train/Auk_0_0/txt']
    file['train/Auk_0_0'].create_virtual_dataset('txt', virtual)


def _many_of_one(file, folder):
    del file['train/Auk_0_0/txt']
    file['train/Auk_0_0/txt'] = 'x' * 1_000_000
    for k in range(2, 60):
        group = file.create_group(f'train/Auk_0_{k}')
        for name in ('txt', 'name', 'class', 'img'):
            group[name] = file['train/Auk_0_0'][name]


def _lists(file, folder):
    del file['train/Auk_0_0/txt']
    file['train/Auk_0_0'].create_dataset('txt', (1,), h5py.vlen_dtype(np.int32))[0] = np.arange(3)


def _one_picture_of_many(file, folder):
    del file['train/Auk_0_0/img']
    file['train/Auk_0_0/img'] = np.void(bytes(100_000))
    for number in range(200):
        group = file.create_group(f'train/Owl_{number}_0')
        for name in ('txt', 'name', 'class', 'img'):
            group[name] = file['train/Auk_0_0'][name]


def _long_string(file, folder):
    stored = h5py.h5t.C_S1.copy()
    stored.set_size(2 ** 40)
    del file['train/Auk_0_0/txt']
    h5py.h5d.create(file['train/Auk_0_0'].id, b'txt', stored, h5py.h5s.create(h5py.h5s.SCALAR))


def _named(name):
    def attack(file, folder):
        file['train'].move('Auk_0_0', name)
    return attack


# What a file of `tiny` is made into; each has to be refused, with what is wrong at /train or /train/Auk_0_0.
ATTACKS = {
    'a split that is a data set': _split_is_data,
    'a split elsewhere': lambda file, folder: (file.move('train', 'x'), file.__setitem__('train', h5py.SoftLink('/x'))),
    'a caption that is a data set': _put('', lambda folder: np.zeros(3)),
    'a caption in another file': _put('', lambda folder: h5py.ExternalLink(_secret(folder), '/group')),
    'a caption in a pipe': _put('', lambda folder: h5py.ExternalLink(_pipe(folder), '/')),
    'a caption that is the split': lambda file, folder: _put('', lambda folder: file['train'])(file, folder),
    'a sentence in another file': _put('txt', lambda folder: h5py.ExternalLink(_secret(folder), '/txt')),
    'a sentence by a soft link': _put('txt', lambda folder: h5py.SoftLink('/train/Auk_0_1/txt')),
    'a sentence by a soft link to itself': _put('txt', lambda folder: h5py.SoftLink('/train/Auk_0_0/txt')),
    'a sentence of another file, virtual': _virtual,
    'a sentence stored in another file': _stored_elsewhere('txt', 'S20', _secret, (1,)),
    'a picture stored in another file': _stored_elsewhere('img', 'u1', _secret),
    'a picture stored in a pipe': _stored_elsewhere('img', 'u1', _pipe),
    'numbers stored in a pipe': _stored_elsewhere('embeddings', 'f4', _pipe, (1024,)),
    'a sentence that is a group': _group_at('train/Auk_0_0/txt'),
    'a picture that is a group': _group_at('train/Auk_0_0/img'),
    'a picture that is its caption': _to_itself,
    'a picture that is a string': _replace('img', data='a string'),
    'a picture that is nothing': _replace('img', data=h5py.Empty('u1')),
    'a picture of no bytes': _replace('img', data=np.zeros(0, 'u1')),
    'a picture of numbers': _replace('img', data=np.zeros(9)),
    'a picture that was never written': _replace('img', shape=(2 ** 40,), dtype='u1'),
    'a picture in pieces': _replace('img', data=np.zeros(900, 'u1'), chunks=(300,)),
    'a picture that inflates': _replace('img', data=np.zeros(2 ** 22, 'u1'), compression='gzip'),
    'a sentence that is nothing': _replace('txt', data=h5py.Empty('S5')),
    'no sentence': _replace('txt', data=np.zeros(0, 'S5')),
    'two sentences': _replace('txt', data=[b'one', b'two']),
    'a sentence of numbers': _replace('txt', data=5),
    'a sentence of lists': _lists,
    'a sentence of records': _replace('txt', data=np.zeros(1, [('a', 'S3'), ('b', 'f4')])),
    'a sentence that is a reference': _replace('txt', shape=(1,), dtype=h5py.ref_dtype),
    'a sentence of 2^40 characters': _long_string,
    'a sentence of 2 million characters': _replace('txt', data='x' * 2_000_000),
    'a class of 2 million characters': _replace('class', data=np.bytes_('x' * 2_000_000)),
    'one long sentence in many groups': _many_of_one,
    'one picture of many photographs': _one_picture_of_many,
    'a box of two numbers': _replace('bbox', data=[1.0, 2.0]),
    'a box of one number': _replace('bbox', data=1.0),
    'a box that is none': _replace('bbox', data=[1, 2, np.nan, 4]),
    'a box without end': _replace('bbox', data=[1, 2, np.inf, 4]),
    'a box of text': _replace('bbox', data='1 2 3 4'),
    'embeddings of text': _replace('embeddings', data='1 2 3 4'),
    'a name that is no photograph\'s': _named('Auk'),
    'a name without a photograph': _named('_0'),
}


def write_attack(name, folder):
    """Write a file of `tiny` with one of ATTACKS, and return its path."""
    path = os.path.join(folder, 'birds.hdf5')
    with open(path, 'wb') as file:
        file.write(_valid('attacked'))
    with h5py.File(path, 'a') as file:
        ATTACKS[name](file, str(folder))
    return path


def attack(rng, folder):
    """Read a file with one of ATTACKS, some with bytes changed afterwards."""
    path = write_attack(rng.choice(list(ATTACKS)), folder)
    if rng.random() < 0.5:
        with open(path, 'rb') as file:
            data = bytearray(file.read())
        data[rng.randrange(len(data))] = rng.randrange(256)
        with open(path, 'wb') as file:
            file.write(data)
    read(path)


TARGETS = {'hdf5 bytes': changed_bytes, 'hdf5 metadata': metadata, 'hdf5 attacks': attack}
