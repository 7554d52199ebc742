"""Unpickle files that others made, without trusting them.

A pickle is a program and may do anything when it is loaded, so only the few names that arrays, scalars, lists and
tuples need are admitted, and each of those is a stand-in that checks its arguments: numpy's own `dtype.__setstate__`
takes flags from the file that would make numpy follow made-up pointers. As a small file could also ask for much memory
or time, its opcodes are looked through before any is followed, and copies of its bytes are counted.
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
# No dictionaries and sets, which keys that collide fill slowly, and nothing that makes objects.
OPCODES = set("""
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT STRING BINSTRING
    SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT
    MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD""".split())
# How many bytes say how long an argument is.
WIDTHS = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4,
          pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8}
LARGEST = 4 << 30  # bytes of a pickle; the published ones have 400 million
COPIES = 2      # of each byte of the file: as bytes, where it was text, and in an array


class _Dtype:
    """What a pickle gets instead of a dtype: the kind is checked here; of the state only the byte order is taken."""

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
    """An array whose state has to hold exactly what its shape asks for: numpy's own check overflows, or is not made.

    `count` is told of the copy that is made of the state's bytes. A state can be set once.
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
    """A function that a pickle may call but not alter."""
    __slots__ = ('function',)

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError('a changed function')


_NDARRAY = object()     # nothing may be done with numpy.ndarray but hand it to _reconstruct


def _bytes(data):
    """Bytes as they are; Python 2's byte strings were read as latin1 and go back the same way."""
    return data.encode('latin1') if isinstance(data, str) else bytes(memoryview(data))


def _reconstruct(count, subtype, shape, typecode):
    if subtype is not _NDARRAY or shape != (0,) or typecode not in ('b', b'b'):
        raise pickle.UnpicklingError('something else than a numpy array')
    array = _Array(0, np.int8)
    array.count = count
    return array


def _scalar(count, dtype, data):
    if dtype.dtype == object:
        raise pickle.UnpicklingError('an object in the place of a number')
    count(len(data))
    return np.frombuffer(_bytes(data), dtype.dtype).reshape(())[()]


def _frombuffer(count, data, dtype, shape, order, *_axis_order):
    count(len(data))
    return np.frombuffer(_bytes(data), dtype.dtype).reshape(shape, order=order)


def _encode(count, text, encoding):
    if encoding not in ('latin1', 'latin-1'):
        raise pickle.UnpicklingError('text in another encoding than latin1')
    count(len(text))
    return text.encode('latin1')


def _admitted(count):
    """What a pickle may name, by module and name; Python 2 and older numpy say the same with other modules.

    `count(n)` is called for n bytes that are going to be copied.
    """
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
    """Refuse an open pickle with opcodes that embeddings need not, or with lengths and places beyond the file.

    Like pickletools.genops, which copies every argument, and cannot read all of what Python 2 wrote.
    """
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        opcode, end = None, 0
        while opcode != 'STOP':
            if end >= len(data):
                raise pickle.UnpicklingError('it is cut off')
            known = pickletools.code2op.get(chr(data[end]))
            opcode, start = known and known.name, end + 1
            if opcode not in OPCODES:
                raise pickle.UnpicklingError(f'the opcode {opcode or data[end]} is none that embeddings need')
            end = _end(data, known, start)
            if opcode in ('FRAME', 'PUT', 'LONG_BINPUT'):
                number = int(data[start:end]) if opcode == 'PUT' else int.from_bytes(data[start:end], 'little')
                if number > len(data):
                    raise pickle.UnpicklingError(f'{opcode} {number} is beyond its end')


def _end(data, opcode, start):
    """Where the argument of an opcode, which starts at `start`, ends in a pickle's bytes."""
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
        """Refuse a file that has the same bytes copied again and again."""
        self.copies_left -= size
        if self.copies_left < 0:
            raise pickle.UnpicklingError('arrays that hold more than the file')

    def find_class(self, module, name):
        if module.endswith('\r') or name.endswith('\r'):
            raise _line_ends_error(self.path)
        if (module, name) not in self.admitted:
            raise UserError(f'{self.path}: asks for {module[:60]!r} {name[:60]!r}, but a pickle of embeddings holds '
                            'arrays, scalars, lists and tuples and nothing else; do not use this file, get it anew')
        return self.admitted[module, name]


def load_pickle(path):
    """Load a pickle of protocol 0 to 5, of Python 2 or 3, that holds nothing but arrays, scalars, lists and tuples.

    Python 2's byte strings become str (latin1), arrays a subclass of np.ndarray that differs in how it is unpickled.
    Raises UserError where the file is missing or damaged, was converted to Windows line ends or asks for anything else.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(0, 'not a file')      # opening a pipe would wait for ever
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
        raise UserError(f'{path}: takes more memory than there is; end other programs') from error
    except Exception as error:      # a damaged pickle can raise nearly anything
        if _has_windows_line_ends(path):
            raise _line_ends_error(path) from error
        raise UserError(f'{path}: not a pickle that can be read ({one_line(error)}); '
                        'it is damaged or not what it says: download it again') from error
    if _has_windows_line_ends(path, text_pickle=True):      # its texts now end in carriage returns
        raise _line_ends_error(path)
    return loaded


def _line_ends_error(path):
    return UserError(f'{path}: this pickle was converted to Windows line ends (by git, or by an unzip in text mode); '
                     f'download or unpack it again in binary mode, or mend a text pickle with: dos2unix {path}')


def _has_windows_line_ends(path, text_pickle=False):
    """True where every line ends in CR LF; with `text_pickle` only where the lines are those of protocol 0."""
    with open(path, 'rb') as file:
        if text_pickle and file.read(1) == b'\x80':
            return False
        file.seek(0)
        data = file.read()
    return 0 < data.count(b'\r\n') == data.count(b'\n') and (not text_pickle or bool(re.search(rb'p\d+\r\n', data)))


def one_line(error):
    """An exception's kind and the beginning of its message on one line."""
    return ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
