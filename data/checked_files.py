"""Detect damage to the files of a cache by checksums that are stored beside them.

The file checksums.json of a folder holds, for each other file, its CRC-32 and the size, dates and inode with which it
was last verified. While these are unchanged, the file is not read again, as reading 4 GB at every start would take
seconds. This detects whatever a program does to a file, but not what a failing disk does silently.
"""
import contextlib
import json
import os
import zlib

from common import files
from common.errors import CannotWrite

RECORD = 'checksums.json'
PIECE = 1 << 24


@contextlib.contextmanager
def write(folder, name):
    """Yield a binary file that takes its name once the block ends without an error, with its checksum recorded.

    Raises CannotWrite if it cannot be written; a previous file then remains.
    """
    path = os.path.join(folder, name)
    with files.atomic_write(path) as file:
        summed = _ChecksumWriter(file)
        yield summed
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
    """Write to a file, and keep the CRC-32 of what was written."""

    def __init__(self, file):
        self.file, self.checksum = file, 0

    def write(self, data):
        self.checksum = zlib.crc32(data, self.checksum)
        return self.file.write(data)


def _checksum(path):
    checksum = 0
    with open(path, 'rb') as file:
        while piece := file.read(PIECE):
            checksum = zlib.crc32(piece, checksum)
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
