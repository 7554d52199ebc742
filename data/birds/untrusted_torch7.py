"""Read Torch7 files that others made (`torch.save` in Lua, in its binary format) without trusting them.

Everything is taken from the file's bytes and checked to be there, so that no file takes more memory than it has bytes.
"""
import math
import re

import numpy as np

NIL, NUMBER, STRING, TABLE, TORCH, BOOLEAN = range(6)
NUMBERS = {b'Byte': 'u1', b'Char': 'i1', b'Short': '<i2', b'Int': '<i4', b'Long': '<i8', b'Float': '<f4',
           b'Double': '<f8', b'Cuda': '<f4'}


def load_torch7(path):
    """What a Torch7 file holds: None, float, bool, bytes, tables as dicts, tensors as arrays, objects as their fields.

    Arrays cannot be written to. Raises ValueError or TypeError where the file is damaged or not what it says, OSError
    where it cannot be read, RecursionError where its tables are nested deeply.
    """
    with open(path, 'rb') as file:
        return _Reader(file.read()).value()


class _Reader:
    def __init__(self, data):
        self.data, self.place = data, 0
        self.values = {}  # tables, tensors, storages and objects by the number that the file gives them

    def numbers(self, kind, count=1):
        """The next `count` numbers, which are of the kind of this NumPy dtype."""
        if not 0 <= count <= len(self.data):
            raise ValueError(f'a length of {count}')
        numbers = np.frombuffer(self.data, kind, count, self.place)
        self.place += numbers.nbytes
        return numbers

    def integer(self, kind='<i4'):
        return int(self.numbers(kind)[0])

    def string(self):
        return self.numbers('u1', self.integer()).tobytes()

    def value(self):
        kind = self.integer()
        if kind == NIL:
            return None
        if kind == NUMBER:
            return float(self.numbers('<f8')[0])
        if kind == STRING:
            return self.string()
        if kind == BOOLEAN:
            return self.integer() == 1
        if kind not in (TABLE, TORCH):
            raise ValueError(f'a value of the kind {kind}')  # functions are of the kinds 6 to 8
        number = self.integer()
        if number not in self.values:
            self.values[number] = table = {}  # known before it is read, as it may hold itself
            if kind == TABLE:
                for _ in range(self.integer()):
                    key = self.value()
                    table[key] = self.value()
            else:
                self.values[number] = self.torch()
        return self.values[number]

    def torch(self):
        """A tensor, a storage, or the fields of an object of another class."""
        name = self.string()
        if name.startswith(b'V '):  # the version, which old files lack
            name = self.string()
        of_numbers = re.fullmatch(rb'torch\.(\w+)(Tensor|Storage)', name)
        if not of_numbers:
            return self.value()
        if of_numbers[2] == b'Tensor':
            return self.tensor()
        return self.numbers(NUMBERS[of_numbers[1]], self.integer('<i8'))

    def tensor(self):
        dims = self.integer()
        size, stride = (self.numbers('<i8', dims).tolist() for _ in range(2))
        start, storage = self.integer('<i8') - 1, self.value()
        if dims == 0 or storage is None:
            return np.empty(0, np.float32)
        if not isinstance(storage, np.ndarray) or storage.ndim != 1:
            raise ValueError('a tensor without numbers')
        last = start + sum((n - 1) * step for n, step in zip(size, stride))
        if (min(size) < 1 or min(stride) < 0 or start < 0 or last >= len(storage)
                or math.prod(size) > len(storage)):  # as a stride of 0 could make it
            raise ValueError('the tensor is larger than its numbers')
        return np.lib.stride_tricks.as_strided(storage[start:], size, [step * storage.strides[0] for step in stride],
                                               writeable=False)
