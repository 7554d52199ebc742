"""Groups and data sets of HDF5 files that may be damaged, or made to do harm.

libhdf5 follows links and external storage to any file of the machine, and reserves as much memory as a length in the
file says before it knows that the file is as long. So no links but hard ones are followed, and only plain data sets are
read, whose bytes lie one after the other in the file itself, once their type, number and size are known to be right.

What is wrong is a ValueError that says so, or whatever h5py makes of what libhdf5 stumbles over. `file` is an open
h5py.File, `group` one of h5py's low-level groups (h5g.GroupID), which take a tenth of the time of the others.
"""
import math
import os
import signal

import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5s, h5t

TEXT_BYTES = 1 << 20   # of the longest string that is read
VLEN_LENGTH_BYTES = 4  # a string of variable length is stored as its length, and where it is
# What reading a file may take: memory, and seconds of work before its first caption is read, and from one to the next.
MEMORY, MEMORY_PER_BYTE = 400 << 20, 4
SECONDS, SECONDS_PER_BYTE = 1, 1 / 10e6
_seconds_for_all = None  # None where this process is not limited


def open_group(parent, name):
    """The group that the group `parent` holds as `name`."""
    return _open(parent, name, h5g.GroupID, 'a group')


def names(group):
    """Of all that a group holds, in the order in which h5py goes through it."""
    return [name.decode() for name in group]


def limit(size):
    """Let this process, which is there to read a file of `size` bytes, grow in proportion to it, and hang no more.

    Where the system has no such limits (Windows has none, macOS none of memory) it is only apart from others.
    """
    global _seconds_for_all
    try:
        import resource
        with open('/proc/self/statm') as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY + MEMORY_PER_BYTE * size,) * 2)
    except (ImportError, OSError, ValueError):
        pass
    if hasattr(signal, 'setitimer'):
        _seconds_for_all = SECONDS + size * SECONDS_PER_BYTE
        _let_work(_seconds_for_all)


def watched(items):
    """Yield the items; end this process where one takes longer, and `limit` has been called."""
    for item in items:
        _let_work(SECONDS)
        yield item
    _let_work(_seconds_for_all)


def _let_work(seconds):
    """End this process by SIGPROF once it has worked for so long: an endless loop in libhdf5 ends in no other way."""
    if _seconds_for_all:
        signal.setitimer(signal.ITIMER_PROF, seconds)


def has(group, name):
    """True where the group holds something as `name`."""
    return group.links.exists(name.encode())


def link(group, name):
    """What tells whether two groups hold the same thing as `name`: kind and target of the link, or None without one."""
    if not has(group, name):
        return None
    info = group.links.get_info(name.encode())
    return info.type, info.u


def read_text(file, group, name):
    """The string `name`, whichever way its writer stored it: scalar or one-element array, of fixed length or not."""
    dataset, stored, count, offset = _open_plain(file, group, name)
    if stored.get_class() != h5t.STRING or count != 1:
        raise ValueError(f'{name} is not one string')
    length = stored.get_size()
    if stored.is_variable_str():  # libhdf5 would reserve up to 4 GB, and fill them, before it finds the string shorter
        with open(file.filename, 'rb', buffering=0) as plain:
            plain.seek(offset)
            length = int.from_bytes(plain.read(VLEN_LENGTH_BYTES), 'little')
    if length > TEXT_BYTES:
        raise ValueError(f'{name} would be a string of {length:,} bytes')
    value = np.empty(1, stored.dtype)
    dataset.read(h5s.ALL, h5s.ALL, value)
    return _decoded(value[0])


def place_of_bytes(file, group, name):
    """(offset in the file, number) of the bytes `name`, stored as one opaque value or as an array of bytes."""
    _, stored, count, offset = _open_plain(file, group, name)
    is_opaque = stored.get_class() == h5t.OPAQUE and count == 1
    if not is_opaque and not (stored.get_class() == h5t.INTEGER and stored.get_size() == 1):
        raise ValueError(f'{name} is not a row of bytes')
    return offset, count * stored.get_size()


def read_numbers(file, group, name):
    """The numbers `name`, an array of one dimension."""
    dataset, stored, count, _ = _open_plain(file, group, name)
    if stored.get_class() not in (h5t.FLOAT, h5t.INTEGER):
        raise ValueError(f'{name} is not a row of numbers')
    value = np.empty(count, stored.dtype)
    dataset.read(h5s.ALL, h5s.ALL, value)
    return value


def read_attribute(file, name):
    """The attribute `name` of the file, a string, or None.

    Nothing but `limit` bounds what libhdf5 takes for one whose length is damaged: it does not tell where that is.
    """
    if not h5a.exists(file.id, name.encode()):
        return None
    attribute = h5a.open(file.id, name.encode())
    if attribute.get_type().get_class() != h5t.STRING or _count(attribute) != 1:
        return None
    value = np.empty(1, attribute.dtype)
    attribute.read(value)
    return _decoded(value[0])


def _open_plain(file, group, name):
    """What a group holds as `name`: (low-level data set, type, number of values, offset of its bytes in the file)."""
    dataset = _open(group, name, h5d.DatasetID, 'a data set')
    plan, stored, count, offset = dataset.get_create_plist(), dataset.get_type(), _count(dataset), dataset.get_offset()
    if plan.get_layout() not in (h5d.CONTIGUOUS, h5d.COMPACT) or plan.get_external_count():
        raise ValueError(f'{name} is compressed, in pieces, virtual or in another file; if it is one of the first two, '
                         'h5repack -f NONE -l CONTI mends it')
    size = count * stored.get_size()
    # What was never written has an offset, too, where a user block precedes the file.
    room = min(dataset.get_storage_size(), os.path.getsize(file.filename) - (offset or 0))
    if offset is None or not 0 < size <= room:
        raise ValueError(f'{name} is empty, or not whole')
    return dataset, stored, count, offset


def _decoded(text):
    return (text or b'').decode('utf-8', 'replace')


def _count(dataset):
    """The number of values. The product that libhdf5 gives can have overflowed."""
    space = dataset.get_space()
    return 0 if space.get_simple_extent_type() == h5s.NULL else math.prod(space.get_simple_extent_dims())


def _open(parent, name, kind, article):
    """What the group `parent` holds as `name`, of the class `kind`."""
    encoded = name.encode()
    if '/' in name or name == '.':
        raise ValueError(f'{name!r} is not a name')
    try:
        link = parent.links.get_info(encoded)
    except KeyError:
        raise ValueError(f'there is no {name}') from None
    if link.type != h5l.TYPE_HARD:
        raise ValueError(f'{name} is a link to another place or file, which is not followed')
    found = h5o.open(parent, encoded)
    if not isinstance(found, kind):
        raise ValueError(f'{name} is not {article}')
    return found
