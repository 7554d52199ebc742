"""Load pickles made by others without trusting them.

A pickle is a program and may do anything when it is loaded. So only the few names that arrays, scalars, lists and
tuples need are allowed, and each is a stand-in that checks its arguments: numpy's own `dtype.__setstate__` takes flags
from the file that would make numpy follow forged pointers. As a small file could also claim much memory or time, its
opcodes are checked before any is executed, and copies of its bytes are counted.
"""
import functools
import math
import mmap
import os
import pickle
import pickletools
import re

import numpy as np

from common.errors import UserError

NUMBERS_OR_TEXT = re.compile(r'[<>|=]?([?biufc]\d{0,2}|[SU][1-9]\d{0,3}|O\d?)')
# No dictionaries and sets, which colliding keys make slow, and nothing that creates objects.
OPCODES = set("""
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT STRING BINSTRING
    SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT
    MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD""".split())
# The number of bytes that store the length of an argument.
WIDTHS = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4,
          pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8}
LARGEST = 4 << 30  # bytes of a pickle; the published ones have 400 million
COPIES = 2         # of each byte of the file: one converted from text to bytes, one in an array


class _Dtype:
    """Stand-in for a dtype that checks its kind and takes only the byte order from the pickled state."""

    def __init__(self, spec, *_align_and_copy):
        if not NUMBERS_OR_TEXT.fullmatch(spec):
            raise pickle.UnpicklingError('an array of neither numbers nor text')
        self.dtype = np.dtype(spec)

    def __setstate__(self, state):
        _version, order, subarray, names, fields = state[:5]
        if order not in ('<', '>', '|', '=') or (subarray, names, fields) != (None, None, None):
            raise pickle.UnpicklingError('an array of records')
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """An array whose pickled state must match its shape exactly: numpy's own check overflows, or is not made.

    `count` is called with the number of bytes that are copied. The state can be set only once.
    """

    def __setstate__(self, state):
        _version, shape, dtype, fortran, data = state
        if dtype.dtype == object:
            held, item = len(data), 1
        else:
            data = _bytes(data)
            held, item = len(data), dtype.dtype.itemsize
        vars(self).pop('count')(held)
        if len(shape) > 32 or any(type(n) is not int or n < 0 for n in shape) or math.prod(shape) * item != held:
            raise pickle.UnpicklingError(f'an array whose shape does not fit its {held} bytes')
        super().__setstate__((1, shape, dtype.dtype, bool(fortran), data))


class _Admitted:
    """A function that a pickle may call but not modify."""
    __slots__ = ('function',)

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError('a modified function')


_NDARRAY = object()     # numpy.ndarray may only be passed to _reconstruct


def _bytes(data):
    """Return bytes as they are, and a string, which is one of Python 2's read as latin1, converted back to bytes."""
    return data.encode('latin1') if isinstance(data, str) else bytes(memoryview(data))


def _reconstruct(count, subtype, shape, typecode):
    if subtype is not _NDARRAY or shape != (0,) or typecode not in ('b', b'b'):
        raise pickle.UnpicklingError('something other than a numpy array')
    array = _Array(0, np.int8)
    array.count = count
    return array


def _scalar(count, dtype, data):
    if dtype.dtype == object:
        raise pickle.UnpicklingError('an object in place of a number')
    count(len(data))
    return np.frombuffer(_bytes(data), dtype.dtype).reshape(())[()]


def _frombuffer(count, data, dtype, shape, order, *_axis_order):
    count(len(data))
    return np.frombuffer(_bytes(data), dtype.dtype).reshape(shape, order=order)


def _encode(count, text, encoding):
    if encoding not in ('latin1', 'latin-1'):
        raise pickle.UnpicklingError('text in an encoding other than latin1')
    count(len(text))
    return text.encode('latin1')


def _admitted(count):
    """Return {(module, name): stand-in} for all versions of Python and numpy. They call `count(n)` to copy n bytes."""
    def admit(function):
        return _Admitted(functools.partial(function, count))

    admitted = {('_codecs', 'encode'): admit(_encode), ('numpy', 'dtype'): _Admitted(_Dtype),
                ('numpy', 'ndarray'): _NDARRAY}
    for module in ('numpy.core', 'numpy._core'):
        admitted[f'{module}.multiarray', '_reconstruct'] = admit(_reconstruct)
        admitted[f'{module}.multiarray', 'scalar'] = admit(_scalar)
        admitted[f'{module}.numeric', '_frombuffer'] = admit(_frombuffer)
    for module in ('__builtin__', 'builtins'):
        admitted[module, 'bytes'] = _Admitted(lambda: b'')      # protocol 2 writes empty bytes as bytes()
    return admitted


def _check_opcodes(file):
    """Raise UnpicklingError for opcodes that embeddings do not need, and for lengths and positions beyond the file.

    Unlike pickletools.genops, it copies no arguments, and it reads everything that Python 2 wrote.
    """
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        opcode, end = None, 0
        while opcode != 'STOP':
            if end >= len(data):
                raise pickle.UnpicklingError('it is truncated')
            known = pickletools.code2op.get(chr(data[end]))
            opcode, start = known and known.name, end + 1
            if opcode not in OPCODES:
                raise pickle.UnpicklingError(f'it has the opcode {opcode or data[end]}, which embeddings do not need')
            end = _end(data, known, start)
            if opcode in ('FRAME', 'PUT', 'LONG_BINPUT'):
                _check_number(opcode, data[start:end], len(data))


def _check_number(opcode, argument, largest):
    number = int(argument) if opcode == 'PUT' else int.from_bytes(argument, 'little')
    if number > largest:
        raise pickle.UnpicklingError(f'{opcode} {number} is beyond its end')


def _end(data, opcode, start):
    """Return where the argument of an opcode ends, given where it starts."""
    kind = opcode.arg.n if opcode.arg else 0
    if kind == pickletools.UP_TO_NEWLINE:
        for _ in range(2 if opcode.name == 'GLOBAL' else 1):
            start = data.find(b'\n', start) + 1 or len(data)
        return start
    if kind < 0:
        start, kind = start + WIDTHS[kind], int.from_bytes(data[start:start + WIDTHS[kind]], 'little')
    return start + kind


class _Unpickler(pickle.Unpickler):
    def __init__(self, file):
        super().__init__(file, encoding='latin1')
        self.path, self.admitted = file.name, _admitted(self.count)
        self.copies_left = COPIES * os.fstat(file.fileno()).st_size

    def count(self, size):
        """Raise UnpicklingError if the same bytes of the file are copied again and again."""
        self.copies_left -= size
        if self.copies_left < 0:
            raise pickle.UnpicklingError('its arrays are larger than the file')

    def find_class(self, module, name):
        if module.endswith('\r') or name.endswith('\r'):
            raise _line_ends_error(self.path)
        if (module, name) not in self.admitted:
            raise UserError(f'{self.path}: asks for {module[:60]!r} {name[:60]!r}, but a pickle of embeddings holds '
                            'only arrays, scalars, lists and tuples; do not use this file, download it again')
        return self.admitted[module, name]


def load_pickle(path):
    """Load a pickle of protocol 0 to 5, from Python 2 or 3, that holds only arrays, scalars, lists and tuples.

    Python 2's byte strings become str (latin1), arrays a subclass of np.ndarray that differs in how it is unpickled.
    Raises UserError if the file is missing or damaged, was converted to Windows line ends, or asks for anything else.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(0, 'not a file')      # opening a pipe would wait forever
        with open(path, 'rb') as file:
            if os.fstat(file.fileno()).st_size > LARGEST:
                raise OSError(0, f'it has more than {LARGEST:,} bytes')
            _check_opcodes(file)
            loaded = _Unpickler(file).load()
    except UserError:
        raise
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}); --pickles takes the folder that holds train/ and '
                        'test/, each with char-CNN-RNN-embeddings.pickle and filenames.pickle') from error
    except MemoryError as error:
        raise UserError(f'{path}: needs more memory than is available; close other programs') from error
    except Exception as error:      # a damaged pickle may raise errors of any kind
        if _has_windows_line_ends(path):
            raise _line_ends_error(path) from error
        raise UserError(f'{path}: not a readable pickle ({one_line(error)}); '
                        'it is damaged or another kind of file: download it again') from error
    if _has_windows_line_ends(path, text_pickle=True):      # its strings now end in carriage returns
        raise _line_ends_error(path)
    return loaded


def _line_ends_error(path):
    return UserError(f'{path}: this pickle was converted to Windows line ends (by git, or by an unzip in text mode); '
                     f'download or unpack it again in binary mode, or repair a text pickle with: dos2unix {path}')


def _has_windows_line_ends(path, text_pickle=False):
    """Return whether every line ends in CR LF; with `text_pickle`, only for the lines of a protocol 0 pickle."""
    with open(path, 'rb') as file:
        if text_pickle and file.read(1) == b'\x80':
            return False
        file.seek(0)
        data = file.read()
    return 0 < data.count(b'\r\n') == data.count(b'\n') and (not text_pickle or bool(re.search(rb'p\d+\r\n', data)))


def one_line(error):
    """Return an exception's type and the beginning of its message as one line."""
    return ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
