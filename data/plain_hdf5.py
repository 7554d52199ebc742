"""Read groups and data sets of HDF5 files that may be damaged or malicious.

libhdf5 follows links and external storage to any file of the machine, and allocates as much memory as a length in the
file claims before it checks the length of the file. So only hard links are followed, and only plain data sets are read,
whose bytes are contiguous in the file itself, after their type, number and size have been checked.

Errors are ValueErrors, or whatever h5py raises for damaged files. `file` is an open h5py.File, and `group` a low-level
group of h5py (h5g.GroupID), which is ten times faster than the high-level one.
"""
import math
import os
import signal

import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5s, h5t

TEXT_BYTES = 1 << 20   # of the longest string that is read
VLEN_LENGTH_BYTES = 4  # a string of variable length is stored as its length and its position
# Limits on reading a file: memory, and CPU seconds before its first caption is read and from one caption to the next.
MEMORY, MEMORY_PER_BYTE = 400 << 20, 4
SECONDS, SECONDS_PER_BYTE = 1, 1 / 10e6
_seconds_for_all = None  # None if this process has no limits


def open_group(parent, name):
    """Return the subgroup `name` of the group `parent`."""
    return _open(parent, name, h5g.GroupID, 'a group')


def names(group):
    """Return the names of a group's members, in h5py's order."""
    return [name.decode() for name in group]


def limit_resources(size):
    """Limit the memory and the CPU time of this process in proportion to `size`, the bytes of the file it reads.

    Windows has no such limits, and macOS none of memory: there, only the separate process protects the others.
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
        _set_time_limit(_seconds_for_all)


def with_time_limit(items):
    """Yield the items; if `limit_resources` was called, end this process when one item takes more than SECONDS."""
    for item in items:
        _set_time_limit(SECONDS)
        yield item
    _set_time_limit(_seconds_for_all)


def _set_time_limit(seconds):
    """End this process by SIGPROF after so many CPU seconds: nothing else ends an endless loop in libhdf5."""
    if _seconds_for_all:
        signal.setitimer(signal.ITIMER_PROF, seconds)


def has(group, name):
    """Return whether the group has a member `name`."""
    return group.links.exists(name.encode())


def link(group, name):
    """Return the kind and target of the link `name`, the same for links to one object, or None if there is no link."""
    if not has(group, name):
        return None
    info = group.links.get_info(name.encode())
    return info.type, info.u


def read_text(file, group, name, errors='strict'):
    """Return the string `name`, stored as a scalar or a one-element array, of fixed or variable length.

    `errors` is that of `bytes.decode`, for text that is not valid UTF-8.
    """
    dataset, stored, count, offset = _open_plain(file, group, name)
    if stored.get_class() != h5t.STRING or count != 1:
        raise ValueError(f'{name} is not one string')
    length = stored.get_size()
    if stored.is_variable_str():  # libhdf5 would allocate and fill up to 4 GB before it checks the length
        with open(file.filename, 'rb', buffering=0) as plain:
            plain.seek(offset)
            length = int.from_bytes(plain.read(VLEN_LENGTH_BYTES), 'little')
    if length > TEXT_BYTES:
        raise ValueError(f'{name} would be a string of {length:,} bytes')
    value = np.empty(1, stored.dtype)
    dataset.read(h5s.ALL, h5s.ALL, value)
    try:
        return (value[0] or b'').decode('utf-8', errors)
    except UnicodeDecodeError as error:
        raise ValueError(f'{name} is not valid UTF-8') from error


def place_of_bytes(file, group, name):
    """Return (offset in the file, number of bytes) of `name`, stored as one opaque value or as an array of bytes."""
    _, stored, count, offset = _open_plain(file, group, name)
    is_opaque = stored.get_class() == h5t.OPAQUE and count == 1
    if not is_opaque and not (stored.get_class() == h5t.INTEGER and stored.get_size() == 1):
        raise ValueError(f'{name} is not an array of bytes')
    return offset, count * stored.get_size()


def read_numbers(file, group, name):
    """Return the numbers in the one-dimensional array `name`."""
    dataset, stored, count, _ = _open_plain(file, group, name)
    if stored.get_class() not in (h5t.FLOAT, h5t.INTEGER):
        raise ValueError(f'{name} is not an array of numbers')
    value = np.empty(count, stored.dtype)
    dataset.read(h5s.ALL, h5s.ALL, value)
    return value


def read_attribute(file, name):
    """Return the attribute `name` of the file, a string, or None.

    Only `limit_resources` bounds the memory that libhdf5 takes for an attribute whose length is damaged.
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
    """Return (low-level data set, type, number of values, offset of its bytes in the file) of the member `name`."""
    dataset = _open(group, name, h5d.DatasetID, 'a data set')
    plan, stored, count, offset = dataset.get_create_plist(), dataset.get_type(), _count(dataset), dataset.get_offset()
    if plan.get_layout() not in (h5d.CONTIGUOUS, h5d.COMPACT) or plan.get_external_count():
        raise ValueError(f'{name} is compressed, chunked, virtual or in another file; if it is compressed or chunked, '
                         'convert it with: h5repack -f NONE -l CONTI')
    size = count * stored.get_size()
    # In a file with a user block, even data that was never written has an offset.
    room = min(dataset.get_storage_size(), os.path.getsize(file.filename) - (offset or 0))
    if offset is None or not 0 < size <= room:
        raise ValueError(f'{name} is empty or truncated')
    return dataset, stored, count, offset


def _decoded(text):
    return (text or b'').decode('utf-8', 'replace')


def _count(dataset):
    """Return the number of values. The product that libhdf5 returns may have overflowed."""
    space = dataset.get_space()
    return 0 if space.get_simple_extent_type() == h5s.NULL else math.prod(space.get_simple_extent_dims())


def _open(parent, name, kind, article):
    """Return the member `name` of the group `parent`. Raises ValueError unless it is of the class `kind`."""
    encoded = name.encode()
    if '/' in name or name == '.':
        raise ValueError(f'{name!r} is not a valid name')
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
