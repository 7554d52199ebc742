"""Write Torch7's binary format (torch.save in Lua), as far as the tests of our readers need it."""
import struct
import sys

import numpy as np

KINDS = {np.dtype('u1'): 'Byte', np.dtype('i8'): 'Long', np.dtype('f4'): 'Float', np.dtype('f8'): 'Double'}


class Table(dict):
    """A Lua table: equal only to itself, so that it can be a key of another."""
    __hash__, __eq__ = object.__hash__, object.__eq__


class Torch:
    """An object of a Torch class, such as nn.Linear, whose fields are a table."""

    def __init__(self, kind, **fields):
        self.kind, self.fields = kind, Table(fields)


class Tensor:
    """A tensor whose storage is a NumPy array, by default all of it; tensors can share a storage.

    `size`, `stride` and `offset` (from 1) need not fit the storage.
    """

    def __init__(self, storage, size=None, stride=None, offset=1):
        self.storage, self.offset = storage, offset
        # An empty tensor has no dimensions.
        self.size = (storage.shape if storage.size else ()) if size is None else size
        self.stride = [n // storage.itemsize for n in storage.strides[:len(self.size)]] if stride is None else stride


def dumps(value):
    """Return the bytes of a file with `value`: None, bools, numbers, str, bytes, dicts, lists and the classes above.

    As in Lua, an object that occurs twice is written once and then referenced.
    """
    numbers, parts, kept = {}, [], []

    def write(value):
        if value is None:
            parts.append(struct.pack('<i', 0))
        elif isinstance(value, bool):
            parts.append(struct.pack('<ii', 5, value))
        elif isinstance(value, (int, float)):
            parts.append(struct.pack('<id', 1, value))
        elif isinstance(value, (str, bytes)):
            parts.append(struct.pack('<i', 2) + string(value))
        elif isinstance(value, (dict, list)):
            if begin(3, value):
                items = list(value.items() if isinstance(value, dict) else enumerate(value, 1))
                parts.append(struct.pack('<i', len(items)))
                for pair in items:
                    write(pair[0])
                    write(pair[1])
        elif begin(4, value):
            write_object(value)

    def write_object(value):
        if isinstance(value, Torch):
            parts.append(string('V 1') + string(value.kind))
            write(value.fields)
        elif isinstance(value, Tensor):
            dims = len(value.size)
            parts.append(string('V 1') + string(f'torch.{KINDS[value.storage.dtype]}Tensor') + struct.pack(
                f'<i{dims}q{dims}qq', dims, *value.size, *value.stride, value.offset))
            write(value.storage)
        else:
            parts.append(string('V 1') + string(f'torch.{KINDS[value.dtype]}Storage')
                         + struct.pack('<q', value.size) + value.tobytes())

    def begin(kind, value):
        new = id(value) not in numbers
        parts.append(struct.pack('<ii', kind, numbers.setdefault(id(value), len(numbers) + 1)))
        kept.append(value)  # alive, so that no other object gets its id
        return new

    depth = sys.getrecursionlimit()
    sys.setrecursionlimit(100000)
    try:
        write(value)
    finally:
        sys.setrecursionlimit(depth)
    return b''.join(parts)


def string(text):
    text = text.encode() if isinstance(text, str) else text
    return struct.pack('<i', len(text)) + text
