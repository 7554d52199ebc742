"""Unpickle files that others made, without trusting them.

A pickle is a program and may do anything when it is loaded, so only the few names that arrays, scalars and plain
containers need are admitted, and each of those is a stand-in that checks its arguments: numpy's own
`dtype.__setstate__` takes flags from the file that would make numpy follow made-up pointers.
"""
import math
import pickle
import re

import numpy as np

from common.errors import UserError

NUMBERS_OR_TEXT = re.compile(r'[<>|=]?([?biufcSU]\d{0,9}|O\d?)')


class _Dtype:
    """What a pickle gets instead of a dtype: the kind is checked here; of the state only the byte order is taken."""

    def __init__(self, spec, *_align_and_copy):
        if not NUMBERS_OR_TEXT.fullmatch(spec):
            raise pickle.UnpicklingError(f'an array of {spec!r}')
        self.dtype = np.dtype(spec)

    def __setstate__(self, state):
        _version, order, subarray, names, fields = state[:5]
        if order not in ('<', '>', '|', '=') or (subarray, names, fields) != (None, None, None):
            raise pickle.UnpicklingError('an array of records')
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """An array whose state has to hold exactly what its shape asks for: numpy's own check overflows, or is not made."""

    def __setstate__(self, state):
        _version, shape, dtype, fortran, data = state
        if dtype.dtype == object:
            held, item = len(data), 1
        else:
            data = _bytes(data)
            held, item = len(data), dtype.dtype.itemsize
        if any(type(n) is not int or n < 0 for n in shape) or math.prod(shape) * item != held:
            raise pickle.UnpicklingError(f'an array of shape {shape} with other contents')
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


def _reconstruct(subtype, shape, typecode):
    if subtype is not _NDARRAY or shape != (0,) or typecode not in ('b', b'b'):
        raise pickle.UnpicklingError('something else than a numpy array')
    return _Array(0, np.int8)


def _scalar(dtype, data):
    if dtype.dtype == object:
        raise pickle.UnpicklingError('an object in the place of a number')
    return np.frombuffer(_bytes(data), dtype.dtype).reshape(())[()]


def _frombuffer(data, dtype, shape, order, *_axis_order):
    return np.frombuffer(_bytes(data), dtype.dtype).reshape(shape, order=order)


def _encode(text, encoding):
    if encoding not in ('latin1', 'latin-1'):
        raise pickle.UnpicklingError(f'text in {encoding!r}')
    return text.encode('latin1')


def _admitted():
    """What a pickle may name, by module and name; Python 2 and older numpy say the same with other modules."""
    admitted = {('_codecs', 'encode'): _Admitted(_encode), ('numpy', 'dtype'): _Admitted(_Dtype),
                ('numpy', 'ndarray'): _NDARRAY}
    for module in ('numpy.core', 'numpy._core'):
        admitted[f'{module}.multiarray', '_reconstruct'] = _Admitted(_reconstruct)
        admitted[f'{module}.multiarray', 'scalar'] = _Admitted(_scalar)
        admitted[f'{module}.numeric', '_frombuffer'] = _Admitted(_frombuffer)
    for module in ('__builtin__', 'builtins'):
        admitted[module, 'bytes'] = _Admitted(lambda: b'')      # protocol 2 writes empty bytes as bytes()
        admitted[module, 'set'], admitted[module, 'frozenset'] = set, frozenset
    return admitted


class _Unpickler(pickle.Unpickler):
    def __init__(self, file):
        super().__init__(file, encoding='latin1')
        self.path, self.admitted = file.name, _admitted()

    def find_class(self, module, name):
        if module.endswith('\r') or name.endswith('\r'):
            raise _converted(self.path)
        if (module, name) not in self.admitted:
            raise UserError(f'{self.path}: asks for {module!r} {name!r}, but a pickle of embeddings holds arrays, '
                            'scalars and plain containers and nothing else; do not use this file, get it anew')
        return self.admitted[module, name]


def load_pickle(path):
    """Load a pickle of protocol 0 to 5, of Python 2 or 3, that holds nothing but arrays, scalars and plain containers.

    Python 2's byte strings become str (latin1), arrays a subclass of np.ndarray that differs in how it is unpickled.
    Raises UserError where the file is missing or damaged, was converted to Windows line ends or asks for anything else.
    """
    try:
        with open(path, 'rb') as file:
            loaded = _Unpickler(file).load()
    except UserError:
        raise
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}); --pickles takes the folder that holds train/ and '
                        'test/, each with char-CNN-RNN-embeddings.pickle and filenames.pickle') from error
    except Exception as error:      # a damaged pickle can raise nearly anything
        if _has_windows_line_ends(path):
            raise _converted(path) from error
        raise UserError(f'{path}: not a pickle that can be read ({one_line(error)}); '
                        'it is damaged or not what it says: download it again') from error
    if _has_windows_line_ends(path, text_pickle=True):      # its texts now end in carriage returns
        raise _converted(path)
    return loaded


def _converted(path):
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
    """An exception's kind and message on one line."""
    return ' '.join(f'{type(error).__name__}: {error}'.split())
