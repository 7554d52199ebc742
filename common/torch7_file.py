"""Read Torch7's binary files (torch.save in Lua) without trusting the sizes in them.

The results are numbers, text, tables, tensors and objects of classes, whose fields are tables; nothing in the file is
executed. Time and memory are proportional to the size of the file, however deeply it is nested.
"""
import inspect
import math
import re
import struct

import numpy as np

NIL, NUMBER, STRING, TABLE, TORCH, BOOLEAN = range(6)
FUNCTIONS = (6, 7, 8)  # stored as bytes, which are skipped
ARRAY = re.compile(r'torch\.(?:Cuda)?(Byte|Char|Short|Int|Long|Half|Float|Double|)(Tensor|Storage)')
DTYPES = {'Byte': 'u1', 'Char': 'i1', 'Short': '<i2', 'Int': '<i4', 'Long': '<i8', 'Half': '<f2', 'Float': '<f4',
          'Double': '<f8', '': '<f4'}  # a torch.CudaTensor holds floats


INT, LONG, DOUBLE = map(struct.Struct, ('<i', '<q', '<d'))
DIMENSIONS = 32


class Table(dict):
    """A Lua table. It is equal only to itself, so that it can be a key of another."""
    __slots__ = ()
    __hash__, __eq__ = object.__hash__, object.__eq__


class Object:
    """An object of a Torch class, `kind`, such as nn.Linear. Its `fields` are usually a table."""
    __slots__ = ('kind', 'fields')

    def __init__(self, kind):
        self.kind, self.fields = kind, None


class Tensor:
    """A tensor as the file describes it; it may share its storage with others."""
    __slots__ = ('size', 'stride', 'offset', 'storage')

    def __init__(self, size, stride, offset, storage):
        self.size, self.stride, self.offset, self.storage = size, stride, offset, storage

    def array(self):
        """Return a read-only numpy array. Raises ValueError if it would reach beyond its storage."""
        if not self.size:
            return np.empty(0, np.float32)
        if not isinstance(self.storage, np.ndarray):
            raise ValueError('a tensor has no storage')
        last = self.offset + sum((length - 1) * step for length, step in zip(self.size, self.stride))
        if (min(self.size) < 1 or min(self.stride) < 0 or self.offset < 0 or last >= len(self.storage)
                or math.prod(self.size) > len(self.storage)):
            raise ValueError('a tensor is larger than its storage')
        return np.lib.stride_tricks.as_strided(self.storage[self.offset:], self.size,
                                               [step * self.storage.itemsize for step in self.stride], writeable=False)


def read(path):
    """Return the contents of a Torch7 file: None, numbers, bools, text (latin-1), and the classes above.

    Raises ValueError with the reason if it is damaged or not a Torch7 file.
    """
    try:
        with open(path, 'rb') as file:
            return _Reader(file.read()).read()
    except (OSError, TypeError) as error:  # an array as a key raises TypeError
        raise ValueError(' '.join(f'{type(error).__name__}: {error}'.split())) from error


class _Reader:
    """Reads `data` from its beginning, with a stack of generators in place of recursion.

    The generator of a value with parts yields once for each part and is sent its value.
    """

    def __init__(self, data):
        self.data, self.place, self.objects = data, 0, {}

    def read(self):
        generators, value = [], self._begin()
        while True:
            if inspect.isgenerator(value):
                generators.append(value)
                value = None
            elif not generators:
                return value
            try:
                generators[-1].send(value)
                value = self._begin()
            except StopIteration as finished:
                generators.pop()
                value = finished.value

    def _begin(self):
        """Return the value at this position, or a generator that reads it."""
        kind = self._int()
        if kind == NIL:
            return None
        if kind == NUMBER:
            return self._number(DOUBLE)
        if kind == STRING:
            return self._string()
        if kind == BOOLEAN:
            return self._int() == 1
        if kind not in (TABLE, TORCH, *FUNCTIONS):
            raise ValueError(f'there is no type {kind}')
        index = self._int()
        if index in self.objects:
            return self.objects[index]
        self.objects[index] = None
        if kind == TABLE:
            return self._table(index)
        return self._torch(index) if kind == TORCH else self._function()

    def _table(self, index):
        table = self.objects[index] = Table()
        for _ in range(self._length()):
            key = yield
            if key is None:
                raise ValueError('a table has no key for a value')
            table[key] = yield
        return table

    def _function(self):
        self._bytes(self._length())
        yield

    def _torch(self, index):
        kind = self._string()
        if kind.startswith('V '):  # a version, which the first files did not have
            kind = self._string()
        array = ARRAY.fullmatch(kind)
        if not array:
            found = self.objects[index] = Object(kind)
            found.fields = yield
        elif array[2] == 'Storage':
            dtype = np.dtype(DTYPES[array[1]])
            found = self.objects[index] = np.frombuffer(self._bytes(self._number(LONG) * dtype.itemsize), dtype)
        else:
            dimensions = self._length()
            if dimensions > DIMENSIONS:
                raise ValueError(f'a tensor of {dimensions} dimensions')
            size, stride = (tuple(self._number(LONG) for _ in range(dimensions)) for _ in range(2))
            offset = self._number(LONG) - 1  # Lua counts from 1
            found = self.objects[index] = Tensor(size, stride, offset, (yield))
        return found

    def _length(self):
        length = self._int()
        if length < 0:
            raise ValueError('a length is below zero')
        return length

    def _string(self):
        return str(self._bytes(self._length()), 'latin-1')

    def _int(self):
        return self._number(INT)

    def _number(self, kind):
        return kind.unpack(self._bytes(kind.size))[0]

    def _bytes(self, count):
        if not 0 <= count <= len(self.data) - self.place:
            raise ValueError('it is truncated')
        self.place += count
        return memoryview(self.data)[self.place - count:self.place]
