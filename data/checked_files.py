"""Detect damage to the files of a cache by checksums that are stored beside them.

The file checksums.json of a folder holds, for each other file, its CRC-32 and the size, dates and inode with which it
was last verified. While these are unchanged, the file is not read again, as reading 4 GB at every start would take
seconds. This detects whatever a program does to a file, but not what a failing disk does silently.

In a dry run (`only_read`), nothing is written, and `planned` returns what would have been.
"""
import contextlib
import json
import os
import zlib

from tqdm import tqdm

from common import files
from common.errors import CannotWrite

RECORD = 'checksums.json'
PIECE = 1 << 24
FEW = 32  # photographs that a dry run decodes in place of all

_planned = None  # what `planned` returns during a dry run, else None


@contextlib.contextmanager
def only_read(dry_run=True):
    """In a dry run, write no file of a cache in this block; `planned` returns what would have been written."""
    global _planned
    before, _planned = _planned, {} if dry_run else None
    try:
        yield
    finally:
        _planned = before


def is_dry_run():
    """Return whether this is a dry run, which reads caches but does not write them."""
    return _planned is not None


def planned():
    """Return {file: (its size in bytes, seconds to compute it)} of what a dry run would have written until now.

    Both are extrapolated from a few photographs for what is computed from all of them.
    """
    return dict(_planned or {})


def plan(path, size, seconds=0.0):
    """Add to `planned` that a file of `size` bytes would have been computed in so many seconds and written."""
    _planned[path] = size, seconds


def few(count):
    """Return the numbers of FEW photographs, spread over `count`: those that a dry run decodes."""
    return [number * count // min(FEW, count) for number in range(min(FEW, count))]


@contextlib.contextmanager
def write(folder, name):
    """Yield a binary file that takes its name once the block ends without an error, with its checksum recorded.

    In a dry run, its size is recorded instead. Raises CannotWrite if it cannot be written; a previous file then
    remains.
    """
    path = os.path.join(folder, name)
    with open(os.devnull, 'wb') if is_dry_run() else files.atomic_write(path) as file:
        summed = _ChecksumWriter(file)
        yield summed
    if is_dry_run():
        plan(path, summed.size)
    else:
        _record(folder, name, summed.checksum)


def is_whole(folder, name):
    """Return whether the file is as it was written."""
    known, path = _known(folder).get(name), os.path.join(folder, name)
    try:
        stamp = stamp_of(path)
        if known['stamp'] == stamp:
            return True
        if known['stamp'][0] != stamp[0] or known['checksum'] != _checksum(path):
            return False
    except (OSError, KeyError, TypeError, IndexError):
        return False
    if not is_dry_run():
        with contextlib.suppress(CannotWrite):  # without this record, the file is read again the next time
            _record(folder, name, known['checksum'])
    return True


def read(folder, name):
    """Return the bytes of a file. Raises ValueError if it is damaged."""
    if not is_whole(folder, name):
        raise ValueError(f'{name} is damaged')
    with open(os.path.join(folder, name), 'rb') as file:
        return file.read()


class _ChecksumWriter:
    """Write to a file, and keep the CRC-32 and the size of what was written."""

    def __init__(self, file):
        self.file, self.checksum, self.size = file, 0, 0

    def write(self, data):
        self.checksum = zlib.crc32(data, self.checksum)
        self.size += memoryview(data).nbytes
        return self.file.write(data)


def _checksum(path):
    checksum, name = 0, os.path.basename(path)
    with open(path, 'rb') as file, tqdm(total=os.path.getsize(path), desc=f'checksum of {name}', unit='B',
                                        unit_scale=True, leave=False, disable=None, delay=2) as bar:
        while piece := file.read(PIECE):
            checksum = zlib.crc32(piece, checksum)
            bar.update(len(piece))
    return checksum


def stamp_of(path):
    """Return the size, dates and inode of a file, which identify its version."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _known(folder):
    """Return {name: {'checksum': ..., 'stamp': ...}} for the folder's files."""
    try:
        files.check_is_file(os.path.join(folder, RECORD))
        with open(os.path.join(folder, RECORD), encoding='utf-8') as file:
            known = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _record(folder, name, checksum):
    known = _known(folder) | {name: {'checksum': checksum, 'stamp': stamp_of(os.path.join(folder, name))}}
    with files.atomic_write(os.path.join(folder, RECORD)) as file:
        file.write(json.dumps(known).encode())
