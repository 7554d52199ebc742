"""Cache the data that an epoch reads, as arrays in a folder beside the HDF5 file.

`birds.hdf5` gets a folder `birds.cache` with, for each split, index.json (names, classes, captions), embeddings.npy and
pictures_64.npy: every photograph decoded and resized once. For the StackGANs' crops, frames_304.bin holds the frames
that images of 256 pixels are cropped from, and frames_304.npy their heights and widths. One process makes a file at
first use while others wait. It is checked against the size and date of the HDF5 file and its own checksum
(`data.checked_files`), and made again after any change. What a process has already read does not change.

A dry run (`data.checked_files.only_read`) writes nothing, not even a lock: it uses what is cached, reads captions and
embeddings into memory, and shows a few photographs in place of all.
"""
import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from common import files
from common.errors import CannotWrite, UserError
from common.locks import lock_file
from data import checked_files, layout
from data.pictures import BadPicture

FILES = ('index.json', 'embeddings.npy', checked_files.RECORD)  # and in a split's folder
IMAGES = re.compile(r'(pictures|frames)_\d+\.(npy|bin)').fullmatch
FORMAT = 3  # a cache of another format is made again
CHUNK = 128  # photographs that are decoded before they are written, which limits the memory
READER = os.path.join(os.path.dirname(os.path.realpath(__file__)), 'read_split.py')
IN_MEMORY = {}  # {folder of a split: `Split`} that dry runs have read and not written


@dataclass
class Jpegs:
    """The JPEGs of a split in the version `stamp` of the file `path`; `places` are pairs (offset, number of bytes)."""
    path: str
    stamp: dict
    places: list

    def read(self, photos):
        """Return the bytes of these photographs (a list of numbers). Raises UserError if the file has changed."""
        try:
            with open(self.path, 'rb') as file:
                if _stamp(file.fileno()) != self.stamp:
                    raise UserError(f'{self.path}: has changed since it was first read; restore it, or start again')
                return [self._read(file, *self.places[photo]) for photo in photos]
        except OSError as error:
            raise UserError(f'{self.path}: can no longer be read ({error.strerror or error}); restore it') from error

    @staticmethod
    def _read(file, offset, size):
        file.seek(offset)
        return file.read(size)


@dataclass
class Split:
    """A split in memory.

    `pictures` is uint8 [photographs, 3, size, size] or None, `embeddings` float32 [captions, D] or None.
    `fingerprint` holds 16 hexadecimal digits each of 'captions' (with names, classes and boxes), 'pictures' (the bytes
    of the JPEGs) and 'embeddings' (None if there are none). `encoder` is the file's fingerprint of the encoder that
    wrote the embeddings, or None. `bad_embeddings` says what is wrong with the embeddings if they cannot be used, else
    None.
    """
    index: layout.Index
    jpegs: Jpegs
    fingerprint: dict
    encoder: str = None
    bad_embeddings: str = None
    pictures: torch.Tensor = None
    embeddings: torch.Tensor = None


def load_split(path, split, size=None, decode=None):
    """Return a `Split` ('train', 'valid' or 'test') of the HDF5 file `path`, read through its cache.

    With `size`, its `pictures` are `decode(jpeg, size)` of every photograph, uint8 [3, size, size]. Raises UserError if
    the file is missing, damaged or not in the layout; an error in its embeddings only is in `bad_embeddings`.
    """
    with _locked_cache(path, split) as folder:
        found = _read_split(folder, path) or _write_split(folder, path, split)
        if size:
            shape = len(found.index.names), 3, size, size
            found.pictures = _read_pictures(folder, shape)
            if found.pictures is None:
                found.pictures = _write_pictures(folder, path, split, found, size, decode)
        return found


def load_frames(path, split, fingerprint, shorter, make):
    """Return the `Frames` of a split of the HDF5 file `path`, read through its cache.

    `fingerprint` is from `load_split`. `make(photo, jpeg)` returns a photograph's frame, uint8 [H, W, 3], whose shorter
    side is `shorter`. Raises UserError if the file has changed or the cache cannot be written, and what `make` raises.
    """
    with _locked_cache(path, split) as folder:
        found = _read_split(folder, path)
        if found is None or found.fingerprint != fingerprint:
            raise UserError(f'{path}: changed while it was being read; start again')
        frames = _read_frames(folder, shorter, len(found.index.names))
        if frames is None and checked_files.is_dry_run():
            return _few_frames(folder, split, found.jpegs, shorter, make)
        if frames is None:
            try:
                _write_frames(folder, split, found.jpegs, shorter, make)
            except CannotWrite as error:
                raise CannotWrite(f'{error}; or train without this cache, with --cache False') from error
            frames = _read_frames(folder, shorter, len(found.index.names))
        return frames


class Frames:
    """The images in `file`, one after another, of `sizes` [N, 2] (height, width); item i is uint8 [H, W, 3]."""

    def __init__(self, file, sizes):
        self.file, self.sizes = file, sizes
        self.ends = (3 * sizes.prod(1)).cumsum()
        self.pixels = np.memmap(file, np.uint8, 'r') if len(sizes) else np.empty(0, np.uint8)
        if len(self.pixels) != (self.ends[-1] if len(sizes) else 0):
            raise ValueError(f'{file}: its {len(self.pixels)} bytes do not match the sizes of its images')

    def __reduce__(self):  # a worker process that is not forked maps the file, too, rather than receive a copy
        return Frames, (self.file, self.sizes)

    def __getitem__(self, i):
        if self.pixels._mmap.size() < len(self.pixels):  # reading beyond the end of the file would crash
            raise UserError(f'{self.file}: was truncated; start again to rebuild it')
        height, width = self.sizes[i]
        return self.pixels[self.ends[i] - 3 * height * width:self.ends[i]].reshape(height, width, 3)


def cache_folder(path):
    """Return the cache folder of an HDF5 file: beside it, or in the temporary folder if that place is not writable."""
    folder = f'{os.path.splitext(os.path.abspath(path))[0]}.cache'
    if os.access(folder if os.path.isdir(folder) else os.path.dirname(folder), os.W_OK):
        return folder
    unique = hashlib.sha256(folder.encode()).hexdigest()[:16]
    return os.path.join(tempfile.gettempdir(), f'{os.path.basename(folder)}-{unique}')


@contextlib.contextmanager
def _locked_cache(path, split):
    """Yield the folder of a split's cache while this process has the lock on the cache of the HDF5 file `path`."""
    if not os.path.isfile(path):
        raise layout.no_such_file(path)
    folder = cache_folder(path)
    if checked_files.is_dry_run():  # files that another process is writing appear whole
        yield os.path.join(folder, split)
        return
    with files.convert_os_errors(folder):
        os.makedirs(os.path.join(folder, split), exist_ok=True)
        lock = lock_file(os.path.join(folder, 'lock'), wait=True)
    with lock:
        _remove_leftovers(folder)
        yield os.path.join(folder, split)


def _remove_leftovers(folder):
    """Remove what a killed process left in the cache `folder`, which is locked, so that no other process uses it."""
    for place in (folder, *(os.path.join(folder, split) for split in layout.SPLITS)):
        for left in glob.glob(os.path.join(glob.escape(place), '*.partial-*')):
            files.remove_leftovers(left.rpartition('.partial-')[0])


def _stamp(path):
    """Return what identifies a version of a file, given its path or the descriptor of an open one."""
    status = os.stat(path)
    return {'format': FORMAT, 'bytes': status.st_size, 'modified_ns': status.st_mtime_ns}


def _changed(path):
    """Return when a file last changed in any way, in nanoseconds: on Linux and macOS, no program can set it."""
    return os.stat(path).st_ctime_ns


def _read_index(folder):
    """Return the dict in index.json. Raises OSError or ValueError if it is missing or damaged."""
    return json.loads(checked_files.read(folder, 'index.json'))


def _read_split(folder, path):
    """Return the cached `Split`, or None if it is missing or damaged or the HDF5 file has changed."""
    if checked_files.is_dry_run() and folder in IN_MEMORY and IN_MEMORY[folder].jpegs.stamp == _stamp(path):
        return replace(IN_MEMORY[folder])
    try:
        stored = _read_index(folder)
        if stored['stamp'] != _stamp(path) or stored['changed_ns'] != _changed(path):
            return None
        index, width = layout.Index(**stored['index']), stored.get('width', layout.EMBED_DIM)  # as all had at first
        found = Split(index, Jpegs(path, stored['stamp'], index.places), stored['fingerprint'], stored['encoder'],
                      stored.get('bad_embeddings'))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if found.fingerprint['embeddings']:
        found.embeddings = _load_mapped(folder, 'embeddings.npy', (len(index.keys), width), np.float32)
        return None if found.embeddings is None else found
    return found


def _write_split(folder, path, split):
    """Write index and embeddings of a split to its cache, and return its `Split`.

    Images stay in the cache if only other things have changed, such as the embeddings.
    """
    stamp, changed = _stamp(path), _changed(path)
    index, encoder, bad, embeddings = _read_in_subprocess(path, split)
    jpegs = Jpegs(path, stamp, index.places)
    fingerprint = _fingerprint(index, jpegs, embeddings)
    if not checked_files.is_dry_run():
        _remove_old(folder, fingerprint)
    if embeddings is not None:
        _check_space(folder, embeddings.nbytes)
        with checked_files.write(folder, 'embeddings.npy') as file:
            np.lib.format.write_array(file, embeddings, allow_pickle=False)
    width = layout.EMBED_DIM if embeddings is None else embeddings.shape[1]
    with checked_files.write(folder, 'index.json') as file:  # written last: it shows that the others are complete
        file.write(json.dumps({'stamp': stamp, 'changed_ns': changed, 'fingerprint': fingerprint, 'encoder': encoder,
                               'bad_embeddings': bad, 'width': width, 'index': vars(index)}).encode())
    if checked_files.is_dry_run():
        IN_MEMORY[folder] = Split(index, jpegs, fingerprint, encoder, bad)
        IN_MEMORY[folder].embeddings = None if embeddings is None else torch.from_numpy(embeddings)
    return _read_split(folder, path) or Split(index, jpegs, fingerprint, encoder, bad)


def _check_space(path, needed):
    """Raise CannotWrite if the disk is too full, except in a dry run, which prints how much is missing."""
    if not checked_files.is_dry_run():
        files.check_space(path, needed)


def _remove_old(folder, fingerprint):
    """Remove what an earlier version of a split left, unless its captions and photographs were those of `fingerprint`.

    The folder may hold other people's files, if it is a link to one of theirs: these stay.
    """
    try:
        before = _read_index(folder)
        is_same = before['stamp']['format'] == FORMAT and all(
            before['fingerprint'][part] == fingerprint[part] for part in ('captions', 'pictures'))
    except (OSError, ValueError, KeyError, TypeError):
        is_same = False
    with files.convert_os_errors(folder):
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            path = os.path.join(folder, name)
            if (name in FILES or IMAGES(name)) and not (is_same and os.path.isfile(path)):
                shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.remove(path)


def _read_in_subprocess(path, split):
    """Return (index, encoder, error in the embeddings or None, embeddings or None) of a split, using READER."""
    command = [sys.executable, READER, path, split]
    # In its own session, it does not receive Ctrl-C: this process does, and ends it.
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True) as reader:
        try:
            stored, embeddings = _read_answer(reader.stdout)
        except BaseException:
            reader.kill()
            reader.wait()
            raise
    if 'error' in stored:
        raise UserError(stored['error'])
    if not stored:
        raise layout.cannot_be_read(path, split, _exit_reason(reader.returncode))
    return layout.Index(**stored['index']), stored['encoder'], stored['bad_embeddings'], embeddings


def _read_answer(stream):
    """Return (the dict that READER wrote, {} if it is incomplete; the embeddings after it or None)."""
    answer = stream.readline()
    stored = json.loads(answer) if answer.endswith(b'\n') else {}
    if not stored.get('width'):
        return stored, None
    embeddings = np.empty((len(stored['index']['keys']), stored['width']), np.float32)
    is_whole = stream.readinto(memoryview(embeddings).cast('B')) == embeddings.nbytes
    return (stored if is_whole else {}), embeddings


def _exit_reason(status):
    if status >= 0:
        return f'the process that read it ended with status {status}'
    name = signal.Signals(-status).name
    return 'reading it does not end' if name == 'SIGPROF' else f'the process that read it was ended by {name}'


def _fingerprint(index, jpegs, embeddings):
    """Return `Split.fingerprint`. It ignores the names of the groups, which do not affect the training."""
    captions = json.dumps([index.names, index.classes, index.boxes, index.captions, index.photo_of]).encode()
    photos = tqdm(range(len(jpegs.places)), 'checksum of photographs', unit='', leave=False, disable=None, delay=2)
    pictures = (jpegs.read([photo])[0] for photo in photos)
    return {'captions': _digest([captions]), 'pictures': _digest(pictures),
            'embeddings': None if embeddings is None else _digest([embeddings])}


def _digest(pieces):
    """Return 16 hexadecimal digits of the SHA-256 of the pieces, each preceded by its length."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(memoryview(piece).nbytes.to_bytes(8, 'little'))
        digest.update(piece)
    return digest.hexdigest()[:16]


def _read_pictures(folder, shape):
    return _load_mapped(folder, f'pictures_{shape[-1]}.npy', shape, np.uint8)


def _write_pictures(folder, path, split, found, size, decode):
    """Decode every photograph of the split, in threads (Pillow releases Python's lock), and write the array.

    Returns it. In a dry run, a few photographs are repeated in it.
    """
    def make(photo, jpeg):
        try:
            return decode(jpeg, size)
        except BadPicture as error:
            raise layout.cannot_be_decoded(path, split, found.index.names[photo], error) from error

    name, shape = f'pictures_{size}.npy', (len(found.index.names), 3, size, size)
    if checked_files.is_dry_run() and len(found.index.names):
        few, seconds = _process_few(make, found.jpegs, f'{split}: images at {size} px')
        checked_files.plan(os.path.join(folder, name), int(np.prod(shape)), seconds)
        return torch.from_numpy(np.stack(few))[torch.arange(len(found.index.names)) % len(few)]
    _check_space(os.path.join(folder, name), np.prod(shape))
    with checked_files.write(folder, name) as file:
        np.lib.format.write_array_header_1_0(file, {'descr': '|u1', 'fortran_order': False, 'shape': shape})
        for picture in _process_all(make, found.jpegs, f'{split}: images at {size} px'):
            file.write(np.ascontiguousarray(picture))
    return _read_pictures(folder, shape)


def _read_frames(folder, shorter, count):
    """Return the `Frames`, or None if they are missing or damaged."""
    sizes = _load_mapped(folder, f'frames_{shorter}.npy', (count, 2), np.int64)
    if sizes is None or not checked_files.is_whole(folder, f'frames_{shorter}.bin'):
        return None
    try:
        return Frames(os.path.join(folder, f'frames_{shorter}.bin'), sizes.numpy())
    except (OSError, ValueError):
        return None


def _write_frames(folder, split, jpegs, shorter, make):
    """Make the frame of every photograph, in threads. The file of sizes is written last, as a mark of completeness."""
    count, shapes, pixels = len(jpegs.places), [], os.path.join(folder, f'frames_{shorter}.bin')
    squares = 3 * shorter ** 2 * count
    files.check_space(pixels, squares)
    print(f'Decoding {count} photographs once, into {pixels} ({squares / 1e6:,.0f} MB or more)', flush=True)
    with checked_files.write(folder, f'frames_{shorter}.bin') as file:
        for frame in _process_all(make, jpegs, f'{split}: frames'):
            shapes.append(frame.shape[:2])
            file.write(np.ascontiguousarray(frame))
    with checked_files.write(folder, f'frames_{shorter}.npy') as file:
        np.lib.format.write_array(file, np.array(shapes, np.int64).reshape(-1, 2), allow_pickle=False)


class _Repeated(list):
    """The frames of a few photographs in place of those of all: a shorter list that begins again at its end."""

    def __getitem__(self, photo):
        return super().__getitem__(photo % len(self))


def _few_frames(folder, split, jpegs, shorter, make):
    """Return the frames of a few photographs in place of all `Frames`, which a dry run does not write."""
    few, seconds = _process_few(make, jpegs, f'{split}: frames')
    size = sum(one.nbytes for one in few) * len(jpegs.places) // len(few)
    checked_files.plan(os.path.join(folder, f'frames_{shorter}.bin'), size, seconds)
    return _Repeated(few)


def _process_few(make, jpegs, what):
    """Return (what `make` makes of a few photographs, seconds that all photographs would take at this speed)."""
    photos, start = checked_files.few(len(jpegs.places)), time.perf_counter()
    made = list(_process_all(make, jpegs, what, photos))
    return made, (time.perf_counter() - start) * len(jpegs.places) / len(photos)


def _process_all(make, jpegs, what, photos=None):
    """Yield `make(photo, jpeg)` for all `photos` (default: every one), computed in threads, with a progress bar."""
    photos = photos or range(len(jpegs.places))
    count = len(photos)
    with ThreadPoolExecutor(os.cpu_count()) as threads, \
            tqdm(total=count, desc=what, unit='', leave=False, disable=None) as bar:
        for start in range(0, count, CHUNK):
            for made in threads.map(lambda photo: make(photo, *jpegs.read([photo])), photos[start:start + CHUNK]):
                yield made
                bar.update()


def _load_mapped(folder, name, shape, dtype):
    """Return a tensor mapped to a file: read when accessed, shared between processes, and never written back.

    Returns None if the file is missing or damaged, or holds another array.
    """
    if not checked_files.is_whole(folder, name):
        return None
    try:
        # An empty array cannot be mapped.
        array = np.load(os.path.join(folder, name), mmap_mode='c' if shape[0] else None, allow_pickle=False)
    except (OSError, ValueError):
        return None
    return torch.from_numpy(array) if array.shape == shape and array.dtype == dtype else None
