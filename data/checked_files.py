"""Files of a cache that are known to be whole, by a checksum kept beside them.

A folder has a file checksums.json: of each of its files the CRC-32, and size, dates and number of the file for which it
was found right. As long as these are the same the file is not read again: going through 4 GB at every start would take
seconds. So all that any program does to a file is seen, but not what a failing disk does without telling the system.
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
    """Yield a binary file that takes its name once the block ends without an error, and is then known to be whole.

    Raises CannotWrite where it cannot be written; what was there stays.
    """
    path = os.path.join(folder, name)
    with files.atomic_write(path) as file:
        summed = _ChecksumWriter(file)
        yield summed
    _record(folder, name, summed.checksum)


def is_whole(folder, name):
    """True where the file is what was written."""
    known, path = _known(folder).get(name), os.path.join(folder, name)
    try:
        stamp = stamp_of(path)
        if known['stamp'] == stamp:
            return True
        if known['stamp'][0] != stamp[0] or known['checksum'] != _checksum(path):
            return False
    except (OSError, KeyError, TypeError, IndexError):
        return False
    with contextlib.suppress(CannotWrite):  # then it is checked again the next time
        _record(folder, name, known['checksum'])
    return True


def read(folder, name):
    """The bytes of a file. Raises ValueError where it is not whole."""
    if not is_whole(folder, name):
        raise ValueError(f'{name} is not whole')
    with open(os.path.join(folder, name), 'rb') as file:
        return file.read()


class _ChecksumWriter:
    """A file that sums up what is written to it."""

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
    """Size, dates and number of a file: what tells its versions apart."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _known(folder):
    """{name: {'checksum': ..., 'stamp': ...}} of the folder's files."""
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
