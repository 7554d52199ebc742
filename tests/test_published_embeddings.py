"""Published embeddings load; forged files do no harm."""
import errno
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from common.errors import UserError
from data.birds.published_embeddings import load_pickle, open_icml, open_pickles
from tests.errors import one_line
from tests.torch7_writer import Tensor, Torch, dumps, string

ROWS = np.arange(2 * 1024, dtype=np.float32).reshape(2, 1024) / 100


def save(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as file:
        file.write(data)
    return str(path)


# --- pickles as Python 2 wrote them -----------------------------------------------------------------------------------

def python2_array(array):
    """Return protocol 2 opcodes for a float32 array, as written by Python 2.7 with NumPy 1: byte strings."""
    data = array.tobytes()
    string = b'T' + struct.pack('<i', len(data)) + data                             # BINSTRING
    shape = b'(' + b''.join(b'M' + struct.pack('<H', n) for n in array.shape) + b't'
    return (b'cnumpy.core.multiarray\n_reconstruct\n' b'cnumpy\nndarray\n' b'K\x00\x85' b'U\x01b' b'\x87R'
            b'(K\x01' + shape + b'cnumpy\ndtype\n' b'U\x02f4' b'K\x00K\x01\x87R'
            b'(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb' b'\x89' + string + b'tb')


def python2_strings(strings):
    return b''.join(b'U' + bytes([len(string)]) + string.encode() for string in strings)


def python2_text_array(array, line_end='\n'):
    """Return a one-dimensional float32 array in protocol 0."""
    data = ''.join(f'\\x{byte:02x}' for byte in array.tobytes())
    lines = f"""cnumpy.core.multiarray|_reconstruct|p0|(cnumpy|ndarray|p1|(I0|tp2|S'b'|p3|tp4|Rp5|(I1|(I{len(array)}|tp6
cnumpy|dtype|p7|(S'f4'|p8|I0|I1|tp9|Rp10|(I3|S'<'|p11|NNNI-1|I-1|I0|tp12|bI00|S'{data}'|p13|tp14|b."""
    lines = lines.replace('|', '\n').split('\n')
    return line_end.join(lines).encode()


def stackgan_folder(folder, names, arrays):
    for part, first in (('train', 0), ('test', 1)):
        chosen = slice(first, None, 2)
        save(folder / part / 'filenames.pickle', b'\x80\x02](' + python2_strings(names[chosen]) + b'e.')
        save(folder / part / 'char-CNN-RNN-embeddings.pickle',
             b'\x80\x02](' + b''.join(map(python2_array, arrays[chosen])) + b'e.')
    return str(folder)


def test_stackgan_pickles_are_found_in_both_folders(tmp_path):
    names = ['001.A/one', '002.B/two', '001.A/three']
    look_up = open_pickles(stackgan_folder(tmp_path, names, [ROWS, ROWS + 1, ROWS + 2]))
    for k, name in enumerate(names):
        assert look_up(name).dtype == np.float32
        np.testing.assert_array_equal(look_up(name), ROWS + k)
    with pytest.raises(ValueError, match='no embedding'):
        look_up('001.A/four')


def test_one_array_for_all_photographs_is_read(tmp_path):
    save(tmp_path / 'test/filenames.pickle', pickle.dumps(np.array(['001.A/one', '001.A/two'], object)))
    save(tmp_path / 'test/char-CNN-RNN-embeddings.pickle', pickle.dumps(np.stack([ROWS, -ROWS])))
    np.testing.assert_array_equal(open_pickles(str(tmp_path))('001.A/two'), -ROWS)


def test_protocol_0_of_python_2_is_read(tmp_path):
    path = save(tmp_path / 'a.pickle', python2_text_array(ROWS[0, :3]))
    np.testing.assert_array_equal(load_pickle(path), ROWS[0, :3])


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize('value', [
    ROWS, np.asfortranarray(ROWS), ROWS.astype('>f8'), np.zeros((0, 3)), np.array(['a', 'bé']), np.array([b'a', b'bc']),
    np.array(['a', None, 3], object), np.array([True, False]), np.float32(1.5), np.int64(-3), np.str_('x'),
    [1, 2.5, None, True, 'é', (1,), [b'\xff', ()], b'', 10 ** 20]], ids=repr)
def test_arrays_scalars_and_containers_are_read(tmp_path, value, protocol):
    loaded = load_pickle(save(tmp_path / 'a.pickle', pickle.dumps(value, protocol)))
    if isinstance(value, (np.ndarray, np.generic)):
        assert loaded.dtype.newbyteorder('=') == value.dtype.newbyteorder('=') and loaded.shape == value.shape
        np.testing.assert_array_equal(loaded, value)
    else:
        assert loaded == value


# --- pickles that are not what they say -------------------------------------------------------------------------------

class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def dtype_of(spec, order=b'<', subarray=b'N'):
    return (b'cnumpy\ndtype\n' b'U' + bytes([len(spec)]) + spec + b'K\x00K\x01\x87R(K\x03U\x01' + order + subarray +
            b'NNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb')


def array_of(dtype, shape, data):
    return (b'\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R'
            b'(K\x01' + shape + dtype + b'\x89' + data + b'tb.')


MULTIARRAY = b'cnumpy.core.multiarray\n'
FORGED = {
    'os.system': lambda marker: pickle.dumps(Call(os.system, f'touch {marker}')),
    'os.system, protocol 0': lambda marker: f"cos\nsystem\n(S'touch {marker}'\ntR.".encode(),
    'INST': lambda marker: f"(S'touch {marker}'\nios\nsystem\n.".encode(),
    'eval': lambda marker: pickle.dumps(Call(eval, f'open({str(marker)!r}, "w")')),
    'getattr': lambda marker: pickle.dumps(Call(getattr, ROWS, 'tofile')),
    'in a container': lambda marker: pickle.dumps([ROWS, {'a': Call(os.mkdir, str(marker))}]),
    'numpy opens a file': lambda marker: pickle.dumps(Call(np.memmap, str(marker), 'u1', 'w+', 0, 4)),
    'numpy.load': lambda marker: pickle.dumps(Call(np.load, str(marker), None, True)),
    'dotted name': lambda marker: b'\x80\x04\x8c\x05numpy\x8c\x0fdtype.__class__\x93.',
    'numpy runs code': lambda marker: b'\x80\x02cnumpy.testing._private.utils\nrunstring\n.',
    'another subtype': lambda marker: MULTIARRAY + b'_reconstruct\nc__builtin__\nset\nK\x00\x85U\x01b\x87R.',
    'ndarray itself': lambda marker: b'\x80\x02cnumpy\nndarray\nK\x64\x85\x85R.',
    'object scalar': lambda marker: MULTIARRAY + b'scalar\n' + dtype_of(b'O8', b'|') + b'U\x01a\x86R.',
    'dtype with flags and records': lambda marker: b'\x80\x02' + dtype_of(b'V8', b'|') + b'.',
    'dtype of subarrays': lambda marker: b'\x80\x02' + dtype_of(b'f4', b'<', dtype_of(b'f4')) + b'.',
    'dtype by expression': lambda marker: b'\x80\x02' + dtype_of(b'f4,O') + b'.',
    'object array, short list': lambda marker: array_of(dtype_of(b'O8', b'|'), b'K\x40\x85', b']K\x01a'),
    'object array, bytes': lambda marker: array_of(dtype_of(b'O8', b'|'), b'K\x01\x85', b'U\x01a'),
    'more shape than bytes': lambda marker: array_of(dtype_of(b'f4'), b'K\x40\x85', b'U\x04abcd'),
    'shape that overflows': lambda marker: array_of(dtype_of(b'f4'), b'\x8a\5\0\0\0\0\1\x8a\5\0\0\0\0\1\x86', b'U\0'),
    'negative shape': lambda marker: array_of(dtype_of(b'f4'), b'J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86', b'U\4abcd'),
    'changed function': lambda marker: b'\x80\x02cnumpy\ndtype\n}U\x08functionK\x01sb.',
    'changed class': lambda marker: b'\x80\x02c__builtin__\nset\nN}U\x03addK\x01s\x86b.',
    'codec': lambda marker: b'\x80\x02c_codecs\nencode\nU\x01aU\x03zip\x86R.',
    'a billion bytes': lambda marker: b'\x80\x02c__builtin__\nbytes\nJ\x00\xca\x9a\x3b\x85R.',
    'a dictionary': lambda marker: pickle.dumps({1: 2}),
    'a set': lambda marker: pickle.dumps({1}),
    'an array that changes': lambda marker: array_of(dtype_of(b'u1'), b'K\x01\x85', b'U\x01atb(K\x01K\x01\x85' +
                                                     dtype_of(b'u1') + b'\x89U\x01a'),
    'elements of no size': lambda marker: array_of(dtype_of(b'S0'), b'J\xff\xff\xff\x7f\x85', b'U\0'),
    'a text in a shape': lambda marker: array_of(dtype_of(b'u1'), b'U\x01a\x85', b'U\x01a'),
    'a number of 6,000 digits': lambda marker: pickle.dumps(10 ** 6000),
    'a number of 6,000 digits, protocol 0': lambda marker: b'L' + b'9' * 6000 + b'L\n.',
    'empty': lambda marker: b'',
    'truncated': lambda marker: pickle.dumps(ROWS, 2)[:-500],
    'not a pickle': lambda marker: b'<html>404</html>\n',
}


@pytest.mark.parametrize('what', FORGED)
def test_other_pickles_are_refused_without_running_them(tmp_path, what):
    marker = tmp_path / 'marker'
    path = save(tmp_path / 'forged.pickle', FORGED[what](marker))
    with pytest.raises(UserError) as caught:
        load_pickle(path)
    assert path in str(caught.value) and '\n' not in str(caught.value)
    assert os.listdir(tmp_path) == ['forged.pickle']


SMALL = {  # but large where they are believed
    'memo of 2^28': b'\x80\x02K\x01r\0\0\0\x10.',
    'memo of 2^28, text': b'I1\np268435456\n.',
    'BINBYTES of 2 GB': b'\x80\x03B\xff\xff\xff\x7fabc.',
    'BINBYTES8 of 1 EB': b'\x80\x04\x8e' + struct.pack('<Q', 2 ** 60) + b'abc.',
    'BYTEARRAY8 of 4 GB': b'\x80\x05\x96' + struct.pack('<Q', 2 ** 32) + b'abc.',
    'BINSTRING of 2 GB': b'\x80\x02T\xff\xff\xff\x7fabc.',
    'BINUNICODE of 2 GB': b'\x80\x02X\xff\xff\xff\x7fabc.',
    'frame of 4 GB': b'\x80\x04\x95' + struct.pack('<Q', 2 ** 32) + b'K\x01.',
    'one text in 20,000 arrays': (
        b'\x80\x02T' + struct.pack('<i', 10 ** 5) + b'x' * 10 ** 5 + b'q\x000' + MULTIARRAY + b'scalar\nq\x01' +
        dtype_of(b'u1') + b'q\x02(' + b'h\x01h\x02h\0\x86R' * 20000 + b'l.').replace(b'q\x000', b'q\x00'),
    'one text encoded 20,000 times': (
        b'\x80\x02(X' + struct.pack('<i', 10 ** 5) + b'x' * 10 ** 5 + b'q\x00c_codecs\nencode\nq\x01U\6latin1q\x02' +
        b'h\x01h\0h\x02\x86R' * 20000 + b'l.'),
}


@pytest.mark.parametrize('what', SMALL)
def test_a_small_file_takes_little_memory(tmp_path, what):
    path = save(tmp_path / 'forged.pickle', SMALL[what])
    tracemalloc.start()
    one_line(load_pickle, path, match='not a readable pickle')
    assert tracemalloc.get_traced_memory()[1] < 2 ** 20 + 20 * len(SMALL[what])
    tracemalloc.stop()


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / 'a.pickle')
    one_line(load_pickle, str(tmp_path / 'a.pickle'), match='cannot be read')


def test_refusals_name_the_requested_object(tmp_path):
    with pytest.raises(UserError, match="'system'"):
        load_pickle(save(tmp_path / 'forged.pickle', FORGED['os.system, protocol 0']('x')))


@pytest.mark.parametrize('data', [
    python2_text_array(ROWS[0, :3], '\r\n'),
    b"(lp0\r\nS'001.A/one'\r\np1\r\na.",
    b'(lp0\r\nV001.A/one\r\np1\r\na.',
    (b'\x80\x02](' + python2_array(ROWS) + b'e.').replace(b'\n', b'\r\n')], ids=['array', 'str', 'unicode', 'binary'])
def test_converted_line_ends_are_reported(tmp_path, data):
    path = save(tmp_path / 'class_info.pickle', data)
    with pytest.raises(UserError, match='Windows line ends.*dos2unix') as caught:
        load_pickle(path)
    assert path in str(caught.value) and '\n' not in str(caught.value)


def test_numbers_that_look_like_line_ends_load(tmp_path):
    assert load_pickle(save(tmp_path / 'a.pickle', pickle.dumps([0x0a0d], 2))) == [0x0a0d]


def test_pickles_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match='neither train/ nor test/'):
        open_pickles(str(tmp_path))
    save(tmp_path / 'train/filenames.pickle', pickle.dumps(['a/b']))
    with pytest.raises(UserError, match='char-CNN-RNN-embeddings.pickle: cannot be read'):
        open_pickles(str(tmp_path))
    rows_path = tmp_path / 'train/char-CNN-RNN-embeddings.pickle'
    save(rows_path, pickle.dumps([ROWS, ROWS]))
    with pytest.raises(UserError, match='names 1 photographs.*embeddings of 2'):
        open_pickles(str(tmp_path))
    save(rows_path, pickle.dumps(np.float32(3)))
    with pytest.raises(UserError, match='must each hold a list'):
        open_pickles(str(tmp_path))


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def shared(depth, width=10):
    """Return a nested list of `width` ** `depth` numbers in which most lists are shared."""
    value = [1.0] * 1024
    for _ in range(depth):
        value = [value] * width
    return value


def test_rows_may_be_lists(tmp_path):
    save(tmp_path / 'train/filenames.pickle', pickle.dumps(['a/b', 'a/c']))
    save(tmp_path / 'train/char-CNN-RNN-embeddings.pickle', pickle.dumps([list(ROWS), ROWS.tolist()]))
    look_up = open_pickles(str(tmp_path))
    for key in ('a/b', 'a/c'):
        np.testing.assert_array_equal(look_up(key), ROWS)


def test_lists_nested_100_000_deep_are_refused(tmp_path):
    save(tmp_path / 'train/filenames.pickle', pickle.dumps(['a/b']))
    deep = b']' * 10 ** 5 + b'a' * (10 ** 5 - 1)
    save(tmp_path / 'train/char-CNN-RNN-embeddings.pickle', b'\x80\x02](' + deep + b'e.')
    with pytest.raises(ValueError, match='numbers'):
        open_pickles(str(tmp_path))('a/b')


@pytest.mark.parametrize('names', [
    [10 ** 400], [None], [['a/b']], ['x' * 10 ** 5], np.empty((1, 0)), np.array([[b'a']])], ids=range(6))
def test_invalid_names_are_refused(tmp_path, names):
    save(tmp_path / 'train/filenames.pickle', pickle.dumps(names))
    save(tmp_path / 'train/char-CNN-RNN-embeddings.pickle', pickle.dumps([ROWS]))
    one_line(open_pickles, str(tmp_path), match='filenames.pickle: holds something other than names')


def test_a_repeated_name_is_refused(tmp_path):
    save(tmp_path / 'train/filenames.pickle', pickle.dumps(['a/b', 'a/b']))
    save(tmp_path / 'train/char-CNN-RNN-embeddings.pickle', pickle.dumps([ROWS, ROWS + 1]))
    one_line(open_pickles, str(tmp_path), match='twice')


@pytest.mark.parametrize('rows, reason', [
    (ROWS[:, :100], r'shape \(2, 100\)'), (ROWS[0], 'shape'), (ROWS * np.nan, 'not finite'), ('abc', 'numbers'),
    ([[1], [1, 2]], 'numbers'), (nested(400), 'numbers'), (shared(6), 'numbers'), (shared(1), 'numbers'),
    ([[10 ** 400] * 1024], 'too large'), (ROWS.astype(float) * 1e300, 'not finite'), (ROWS.astype('S4'), 'numbers'),
    (ROWS.astype(complex), 'numbers'), (list(ROWS[:, :7]), 'numbers'), ([['1'] * 1024], 'numbers'),
    (np.array([[None] * 1024]), 'numbers'), (np.empty((0, 3)), 'shape')],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__)
def test_rows_that_are_not_embeddings_are_refused(tmp_path, rows, reason):
    save(tmp_path / 'train/filenames.pickle', pickle.dumps(['a/b']))
    save(tmp_path / 'train/char-CNN-RNN-embeddings.pickle', pickle.dumps([rows]))
    with pytest.raises(ValueError, match=reason):
        open_pickles(str(tmp_path))('a/b')


# --- Torch7 files -----------------------------------------------------------------------------------------------------

def t7_file(path, txt, **layout):
    return save(path, dumps({'img': '001.A/one.jpg', 'char': Tensor(np.ones((201, 2), np.uint8)),
                             'txt': Tensor(txt, **layout)}))


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_torch7_files_are_read(tmp_path, dtype):
    t7_file(tmp_path / '001.A/one.t7', ROWS.astype(dtype))
    look_up = open_icml(str(tmp_path))
    assert look_up('001.A/one').dtype == np.float32
    np.testing.assert_array_equal(look_up('001.A/one'), ROWS)
    with pytest.raises(ValueError, match='two.t7 is missing'):
        look_up('001.A/two')
    os.truncate(tmp_path / '001.A/one.t7', 10 << 40)
    with pytest.raises(ValueError, match='one.t7 has more than 268,435,456 bytes'):
        look_up('001.A/one')


def test_wrong_torch7_sizes_are_refused(tmp_path):
    look_up = open_icml(str(save(tmp_path / '001.A/x', b'') and tmp_path))
    for layout in ({'size': (10 ** 6, 1024)}, {'offset': 2}, {'offset': -5}, {'stride': (2 ** 40, 1)},
                   {'stride': (-1024, 1)}, {'size': (-2, 1024)}, {'size': (10 ** 6, 1024), 'stride': (0, 1)},
                   {'size': (2 ** 62, 2 ** 62), 'stride': (0, 0)}):
        path = t7_file(tmp_path / '001.A/forged.t7', ROWS, **layout)
        with pytest.raises(ValueError, match='larger than its storage') as caught:
            look_up('001.A/forged')
        assert path in str(caught.value)


def test_damaged_torch7_files_are_one_line_errors(tmp_path):
    with open(t7_file(tmp_path / '001.A/one.t7', ROWS), 'rb') as file:
        whole = file.read()
    look_up = open_icml(str(tmp_path))
    for data in (b'', whole[:3], whole[:40], whole[:700], whole[:-1], b'\xff' * 100, b'<html>',
                 struct.pack('<iii', 3, 1, 0), struct.pack('<iii3si', 8, 1, 3, b'lua', 0)):
        save(tmp_path / '001.A/one.t7', data)
        with pytest.raises(ValueError) as caught:
            look_up('001.A/one')
        assert 'one.t7' in str(caught.value) and '\n' not in str(caught.value)


def tensor(storage, size=(2, 1024), stride=(1024, 1)):
    """Return the bytes of a FloatTensor, object 1, with the bytes of its storage."""
    return (struct.pack('<iii3s', 4, 1, 3, b'V 1') + string('torch.FloatTensor') +
            struct.pack('<i5q', 2, *size, *stride, 1) + storage)


HOSTILE = {
    'a storage of 2^60': tensor(struct.pack('<iii3s', 4, 2, 3, b'V 1') + string('torch.FloatStorage') +
                                struct.pack('<q', 2 ** 60)),
    'a storage of all that follows': tensor(struct.pack('<iii3s', 4, 2, 3, b'V 1') + string('torch.FloatStorage') +
                                            struct.pack('<q', -1) + ROWS.tobytes()),
    'a text for a storage': tensor(struct.pack('<i', 2) + string('x' * 9000)),
    'a table for a storage': tensor(struct.pack('<iii', 3, 2, 0)),
    'itself for a storage': tensor(struct.pack('<ii', 4, 1)),
    'a view of one number for a storage': tensor(
        struct.pack('<iii3s', 4, 2, 3, b'V 1') + string('torch.FloatTensor') + struct.pack('<i3q', 1, 2048, 0, 1) +
        struct.pack('<iii3s', 4, 3, 3, b'V 1') + string('torch.FloatStorage') + struct.pack('<qf', 1, 1)),
    'a tensor of 2^31 dimensions': struct.pack('<iii3s', 4, 1, 3, b'V 1') + string('torch.FloatTensor') + b'\xff' * 16,
    'a text of 2 GB': struct.pack('<ii', 2, 2 ** 31 - 1),
    'a table of 2^31': struct.pack('<iii', 3, 9, 2 ** 31 - 1),
    'halves': tensor(struct.pack('<iii3s', 4, 2, 3, b'V 1') + string('torch.HalfStorage') + b'\0' * 9),
}


@pytest.mark.parametrize('what', HOSTILE)
def test_torch7_files_with_too_large_sizes_are_refused(tmp_path, what):
    record = struct.pack('<iii', 3, 7, 1) + struct.pack('<i', 2) + string('txt') + HOSTILE[what]
    save(tmp_path / '001.A/one.t7', record)
    look_up = open_icml(str(tmp_path))
    tracemalloc.start()
    with pytest.raises(ValueError, match='one.t7') as caught:
        look_up('001.A/one')
    assert '\n' not in str(caught.value) and tracemalloc.get_traced_memory()[1] < 2 ** 20
    tracemalloc.stop()


def test_recursive_torch7_tables_are_refused(tmp_path):
    record = {'txt': Tensor(ROWS), 'base': None, 'deep': Torch('nn.Linear', weight=Tensor(ROWS))}
    record['base'] = record
    save(tmp_path / '001.A/one.t7', dumps(record))
    np.testing.assert_array_equal(open_icml(str(tmp_path))('001.A/one'), ROWS)
    for _ in range(2000):
        record = [record]
    save(tmp_path / '001.A/one.t7', dumps(record))
    with pytest.raises(ValueError, match='holds no tensor txt'):
        open_icml(str(tmp_path))('001.A/one')


def test_a_wrong_icml_folder_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / 'absent'):
        with pytest.raises(UserError, match='--icml takes the folder'):
            open_icml(str(folder))


def test_an_icml_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, 'Permission denied', str(path))

    monkeypatch.setattr(os, 'scandir', denied)
    assert 'cannot be listed (Permission denied)' in one_line(open_icml, str(tmp_path))


def test_embeddings_of_zeros_are_refused(tmp_path):
    rows = ROWS.copy()
    rows[-1] = 0
    save(tmp_path / '001.A/one.t7', dumps({'txt': Tensor(rows)}))
    with pytest.raises(ValueError, match='consists of zeros'):
        open_icml(str(tmp_path))('001.A/one')
