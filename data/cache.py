"""What an epoch reads, kept beside the HDF5 file in the form in which it is read: arrays.

`birds.hdf5` gets a folder `birds.cache` with, for each split, index.json (names, classes, captions), embeddings.npy and
pictures_64.npy: every photograph decoded and resized once. For the StackGANs' crops there are frames_304.bin and
frames_304.npy: what pictures of 256 pixels are cut from, one after the other, and their heights and widths. All is made
at first use, by one process while others wait for it, checked against the size and date of the HDF5 file, and made
again when they have changed. What a process has already read stays as it was.
"""
import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.errors import UserError
from common.locks import lock_file
from data import layout

FORMAT = 2  # a cache of another format is made again
CHUNK = 512  # photographs decoded between two writes: bounds the memory


@dataclass
class Split:
    """A split, ready to be indexed.

    `pictures` is uint8 [photographs, 3, size, size] or None, `embeddings` float32 [captions, 1024] or None.

    `fingerprint` says what the split holds: 16 hexadecimal digits for each of 'captions' (with names, classes and
    boxes), 'pictures' (the bytes of the JPEGs) and 'embeddings' (None where there are none). `encoder` is what the file
    says of the encoder that wrote the embeddings, or None.
    """
    index: layout.Index
    fingerprint: dict
    encoder: str = None
    pictures: torch.Tensor = None
    embeddings: torch.Tensor = None


def load_split(path, split, size=None):
    """Read a split ('train', 'valid' or 'test') of the HDF5 file `path`, through its cache.

    With `size`, `pictures` holds every photograph squashed to `size` x `size` pixels, as the chapter prepares them.
    Raises UserError where the file is missing, damaged or not in the layout.
    """
    with layout.open_file(path) as file, _alone_with(path) as cache:
        folder = os.path.join(cache, split)
        known = _read_known(folder, _stamp(path))
        if known is None:
            known = _write_split(folder, file, split, _stamp(path))
        index, fingerprint, encoder = known
        pictures_file = os.path.join(folder, f'pictures_{size}.npy')
        if size and not os.path.exists(pictures_file):
            _write_pictures(pictures_file, file, split, index, size)
        embeddings_file = os.path.join(folder, 'embeddings.npy')
        return Split(index, fingerprint, encoder, pictures=_map(pictures_file) if size else None,
                     embeddings=_map(embeddings_file) if os.path.exists(embeddings_file) else None)


def load_frames(path, split, index, shorter, make):
    """The `Frames` of a split of the HDF5 file `path`, through its cache; `index` is what `load_split` gave of it.

    `make(photo, jpeg)` makes a photograph's, uint8 [H, W, 3], the shorter of H and W `shorter`. Raises UserError where
    the file has changed since, the cache cannot be written, and what `make` does.
    """
    with layout.open_file(path) as file, _alone_with(path) as cache:
        folder = os.path.join(cache, split)
        if (_read_known(folder, _stamp(path)) or [None])[0] != index:
            raise UserError(f'{path}: has changed while it was being read; start again')
        pixels, sizes = (os.path.join(folder, f'frames_{shorter}.{ending}') for ending in ('bin', 'npy'))
        frames = _read_frames(pixels, sizes)
        if frames is None:
            _write_frames(pixels, sizes, shorter, file, split, index.img_keys, make)
            frames = _read_frames(pixels, sizes)
        return frames


class Frames:
    """Pictures of N sizes [N, 2] (height, width), one after the other in a file; item i is uint8 [H, W, 3]."""

    def __init__(self, file, sizes):
        self.file, self.sizes = file, sizes
        self.ends = (3 * sizes.prod(1)).cumsum()
        self.pixels = np.memmap(file, np.uint8, 'r') if len(sizes) else np.empty(0, np.uint8)
        if len(self.pixels) != (self.ends[-1] if len(sizes) else 0):
            raise ValueError(f'{file}: has {len(self.pixels)} bytes, which are not those of its pictures')

    def __reduce__(self):  # for a worker process that is not forked: it maps the file, too, instead of being sent it
        return Frames, (self.file, self.sizes)

    def __getitem__(self, i):
        height, width = self.sizes[i]
        return self.pixels[self.ends[i] - 3 * height * width:self.ends[i]].reshape(height, width, 3)


def squash(jpeg, size):
    """A picture file's bytes to uint8 [size, size, 3]: Pillow's default filter, grayscale repeated (chapter 10)."""
    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image.convert('RGB').resize((size, size)))


def cache_folder(path):
    """Beside the file; where that folder cannot be written, one in the temporary folder."""
    folder = f'{os.path.splitext(os.path.abspath(path))[0]}.cache'
    if os.access(folder if os.path.isdir(folder) else os.path.dirname(folder), os.W_OK):
        return folder
    unique = hashlib.sha256(folder.encode()).hexdigest()[:16]
    return os.path.join(tempfile.gettempdir(), f'{os.path.basename(folder)}-{unique}')


@contextlib.contextmanager
def _alone_with(path):
    """The folder of the cache of the HDF5 file `path`, while no other process is in here."""
    folder = cache_folder(path)
    os.makedirs(folder, exist_ok=True)
    with lock_file(os.path.join(folder, 'lock'), wait=True):
        yield folder


def _stamp(path):
    status = os.stat(path)
    return {'format': FORMAT, 'bytes': status.st_size, 'modified_ns': status.st_mtime_ns}


def _read_known(folder, stamp):
    """The cached (index, fingerprint, encoder), or None where they are not there or the HDF5 file has changed since."""
    try:
        with open(os.path.join(folder, 'index.json'), encoding='utf-8') as file:
            stored = json.load(file)
        if stored['stamp'] != stamp:
            return None
        return layout.Index(**stored['index']), stored['fingerprint'], stored['encoder']
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_split(folder, file, split, stamp):
    """Replace the split's cache by a new one that holds index and embeddings; it takes its name only when complete.

    Returns (index, fingerprint, encoder).
    """
    index = layout.read_index(file, split)
    embeddings = layout.read_embeddings(file, split, index.keys) if layout.has_embeddings(file, split, index) else None
    fingerprint, encoder = _fingerprint(file, split, index, embeddings), layout.read_encoder(file)
    partial = tempfile.mkdtemp(prefix=f'{split}.partial-', dir=os.path.dirname(folder))
    try:
        if embeddings is not None:
            np.save(os.path.join(partial, 'embeddings.npy'), embeddings)
        with open(os.path.join(partial, 'index.json'), 'w', encoding='utf-8') as stored:
            json.dump({'stamp': stamp, 'fingerprint': fingerprint, 'encoder': encoder, 'index': asdict(index)}, stored)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return index, fingerprint, encoder


def _fingerprint(file, split, index, embeddings):
    """What `Split.fingerprint` is. The names of the groups are not in it: they say nothing that is trained on."""
    captions = json.dumps([index.names, index.classes, index.boxes, index.captions, index.photo_of]).encode()
    jpegs = (layout.read_jpeg(file, split, key) for key in index.img_keys)
    return {'captions': _digest([captions]), 'pictures': _digest(jpegs),
            'embeddings': None if embeddings is None else _digest([embeddings])}


def _digest(pieces):
    """16 hexadecimal digits of the SHA-256 of the pieces, each with its length before it."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(memoryview(piece).nbytes.to_bytes(8, 'little'))
        digest.update(piece)
    return digest.hexdigest()[:16]


def _write_pictures(path, file, split, index, size):
    """Decode every photograph of the split, in threads (Pillow decodes without Python's lock)."""
    def decode(name, jpeg):
        try:
            return squash(jpeg, size).transpose(2, 0, 1)
        except OSError as error:
            raise layout.cannot_be_decoded(file.filename, split, name, error) from error

    partial = f'{path}.partial-{os.getpid()}'
    shape = (len(index.names), 3, size, size)
    # A file of no rows cannot be mapped, so an empty split is kept as a file of one row that nothing points to.
    pictures = np.lib.format.open_memmap(partial, 'w+', np.uint8, (max(1, shape[0]),) + shape[1:])
    try:
        with ThreadPoolExecutor(os.cpu_count()) as threads, \
                tqdm(total=shape[0], desc=f'{split}: pictures at {size} px', unit='', leave=False, disable=None) as bar:
            for start in range(0, shape[0], CHUNK):
                jpegs = [layout.read_jpeg(file, split, key) for key in index.img_keys[start:start + CHUNK]]
                for i, picture in enumerate(threads.map(decode, index.names[start:], jpegs), start):
                    pictures[i] = picture
                    bar.update()
        pictures.flush()
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f'{file.filename} cannot be read, or {partial} cannot be written ({error})') from error
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def _read_frames(pixels, sizes):
    """`Frames`, or None where they are not there, or not whole."""
    try:
        return Frames(pixels, np.load(sizes, allow_pickle=False))
    except (OSError, ValueError):
        return None


def _write_frames(pixels, sizes, shorter, file, split, keys, make):
    """Make the frame of every photograph, in threads; the file `sizes`, which says that they are there, comes last."""
    partial, shapes = f'{pixels}.partial-{os.getpid()}', []
    squares, free = 3 * shorter ** 2 * len(keys), shutil.disk_usage(os.path.dirname(pixels)).free
    if free < squares:
        raise UserError(f'{pixels}: would have {squares / 1e9:.1f} GB or more, and {free / 1e9:.1f} GB are free; '
                        'make room, or read the photographs themselves with --cache False')
    print(f'Decoding {len(keys)} photographs once, into {pixels} ({squares / 1e6:,.0f} MB or more)', flush=True)
    try:
        with open(partial, 'wb') as out, ThreadPoolExecutor(os.cpu_count()) as threads, \
                tqdm(total=len(keys), desc=f'{split}: frames', unit='', leave=False, disable=None) as bar:
            for start in range(0, len(keys), CHUNK):
                jpegs = [layout.read_jpeg(file, split, key) for key in keys[start:start + CHUNK]]
                for frame in threads.map(make, range(start, start + len(jpegs)), jpegs):
                    shapes.append(frame.shape[:2])
                    out.write(np.ascontiguousarray(frame))
                    bar.update()
        os.replace(partial, pixels)
        with open(partial, 'wb') as out:
            np.save(out, np.array(shapes, np.int64).reshape(-1, 2))
        os.replace(partial, sizes)
    except OSError as error:
        raise UserError(f'{partial}: cannot be written ({error}); make room, or read the photographs themselves '
                        'with --cache False') from error
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def _map(path):
    """A tensor over the file's pages: read when touched, shared between processes, and never written back."""
    return torch.from_numpy(np.load(path, mmap_mode='c', allow_pickle=False))
