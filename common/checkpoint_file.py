"""Check what a checkpoint file claims before PyTorch trusts it.

`torch.load(weights_only=True)` runs no code from a file, but it trusts the sizes in it, checks no checksum, and crashes
on deeply nested tuples. There are two formats:

    since PyTorch 1.6    an uncompressed zip archive: NAME/data.pkl, and the bytes of each storage in NAME/data/KEY;
                         with a CRC-32 of each, and with its directory at the end
    before               five pickles, of which the fourth holds the contents, then the storages one after another;
                         ours end in a line with the length and the CRC-32 of everything before it (`trailer`)
"""
import collections
import io
import math
import pickletools
import struct
import zipfile
import zlib

from common.errors import UserError

ZIP, PICKLE = b'PK\x03\x04', b'\x80'  # how the two formats begin
MAGIC_NUMBER, PROTOCOL = 0x1950a86a20f9469cfc6c, 1001  # of the older format
LOCAL_HEADER = struct.Struct('<4s22xHH')  # of a record: signature, ..., lengths of its name and of the extra field
END = struct.Struct('<4s12xIH')  # of the directory: signature, ..., its offset, length of the comment after it
LONGEST_TRAILER = 64
IN_ZIP64 = 2 ** 32 - 1  # the directory's offset, if it is beyond 4 GB and therefore stored elsewhere
CHUNK = 2 ** 20

BYTES = {'Double': 8, 'Float': 4, 'Half': 2, 'BFloat16': 2, 'Long': 8, 'Int': 4, 'Short': 2, 'Char': 1, 'Byte': 1,
         'Bool': 1}
STORAGES = {f'torch {kind}Storage': size for kind, size in BYTES.items()}  # the names in a pickle, in the form of
DICT = 'collections OrderedDict'                                           # pickletools: 'MODULE NAME'
TENSORS = ('torch._utils _rebuild_tensor_v2', 'torch._utils _rebuild_tensor')
PARAMETER = 'torch._utils _rebuild_parameter'
ITEMS = 100        # of a tuple and the tuples in it, at most
LARGEST_KEY = 2 ** 31


class Unreadable(UserError):
    """A checkpoint is damaged, or of an unsupported kind."""


class _Wrong(Exception):
    """What is wrong with a file, without the name of the file."""


def check(path):
    """Raise Unreadable unless the file is whole and holds plain tensors, numbers and text in dicts, lists and tuples.

    Returns whether it is a zip archive. A file of the older format from others has no checksum; only the sizes in it
    are checked.
    """
    try:
        with open(path, 'rb') as file:
            start = file.read(512)
            if start.startswith(ZIP):
                _check_zip(file)
            elif start.startswith(PICKLE):
                _check_legacy(file)
            else:
                raise _Wrong(_identify(start))
            return start.startswith(ZIP)
    except _Wrong as error:
        raise Unreadable(f'{path}: {error}') from error
    except PermissionError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}); change its permissions') from error
    except Exception as error:  # other bytes make zipfile and pickletools raise errors of any kind
        reason = ' '.join(str(error).split())[:200] or type(error).__name__
        raise Unreadable(f'{path}: damaged, or not a checkpoint ({reason}); use another one, or copy or download it '
                         'again') from error


def trailer(length, crc):
    """Return the last line of a file of the older format, whose other `length` bytes have this CRC-32."""
    return b'\nlength %d crc32 %08x\n' % (length, crc)


def _identify(start):
    """Return what a file that begins like this is instead of a checkpoint, and what to do."""
    text = start.lstrip().lower()
    if not start:
        return 'is empty; copy or download it again'
    if text.startswith((b'<!doctype', b'<html', b'<?xml', b'<head', b'<script')):
        return 'is a web page, not a checkpoint; download the file itself, not the page that leads to it'
    if text.startswith(b'version https://git-lfs'):
        return 'is only a pointer of Git LFS to the file; get the file itself with: git lfs pull'
    if all(byte >= 32 or byte in b'\t\n\r\f' for byte in start):
        return 'is text, not a checkpoint; download it again'
    return 'damaged, or not a checkpoint (it begins like none); use another one, or copy or download it again'


def _damaged(what):
    return _Wrong(f'damaged: {what}; use another one, or copy or download it again')


# --- the zip archive --------------------------------------------------------------------------------------------------

def _check_zip(file):
    with zipfile.ZipFile(file) as archive:
        listed, directory = archive.infolist(), archive.start_dir
    file.seek(-END.size, io.SEEK_END)
    signature, offset, comment = END.unpack(file.read(END.size))
    if signature != b'PK\x05\x06' or offset not in (directory, IN_ZIP64) or comment:
        raise _damaged('it does not end as it should')
    records = {record.filename: record for record in listed}
    if len({name.lower() for name in records}) < len(listed):  # PyTorch's reader does not mind capitals
        raise _damaged('two of its records have the same name')
    root = listed[0].filename.partition('/')[0] if listed else ''
    if f'{root}/constants.pkl' in records:
        raise _Wrong('holds a TorchScript module, which is code; save its state_dict() instead')
    if f'{root}/data.pkl' not in records:
        raise _Wrong('is a zip archive, but not a checkpoint: it has no data.pkl')
    has_checksums = any(record.CRC for record in listed)  # torch.serialization.set_crc32_options(False) writes none
    listed.sort(key=lambda record: record.header_offset)
    for record, end in zip(listed, [record.header_offset for record in listed[1:]] + [directory]):
        _check_record(file, record, end, has_checksums)
    contents = records[f'{root}/data.pkl']
    file.seek(_begin(file, contents))
    _, storages = _run(io.BytesIO(file.read(contents.file_size)))
    for key, length in storages.items():
        record = records.get(f'{root}/data/{key}')
        if length != (record.file_size if record else 0):
            raise _damaged(f'its record data/{printable(key)} is not as long as its tensors')


def _check_record(file, record, end, has_checksum):
    """Raise _Wrong unless the bytes of a record, which must end before `end`, are those that were written."""
    name = printable(record.filename)
    if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1 or record.compress_size != record.file_size:
        raise _Wrong(f'its record {name} is compressed, unlike those of torch.save; if another program has packed the '
                     'file again, use the original, else copy or download it again')
    begin, left, crc = _begin(file, record), record.file_size, 0
    if begin + left > end:
        raise _damaged(f'its record {name} overlaps the next')
    file.seek(begin)
    while left:
        chunk = file.read(min(left, CHUNK))
        if not chunk:
            raise _damaged('it is truncated')
        crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    if has_checksum and crc != record.CRC:
        raise _damaged(f'its record {name} has changed since it was written')


def _begin(file, record):
    """Return where the bytes of a record begin: after a header that repeats its name."""
    file.seek(record.header_offset)
    signature, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    encoding = 'utf-8' if record.flag_bits & 0x800 else 'cp437'
    if signature != ZIP or file.read(name_length).decode(encoding) != record.orig_filename:
        raise _damaged(f'its record {printable(record.filename)} has lost its header')
    return record.header_offset + LOCAL_HEADER.size + name_length + extra_length


# --- the older format -------------------------------------------------------------------------------------------------

def _check_legacy(file):
    file.seek(0)
    magic, protocol, _, contents, _ = (_run(file) for _ in range(5))
    if (magic[0], protocol[0]) != (MAGIC_NUMBER, PROTOCOL):
        raise _Wrong('is a pickle, but not a checkpoint; save the state_dict() of the model with torch.save')
    storages = contents[1].values()
    end = file.tell() + sum(storages) + 8 * len(storages)  # each has its length in front of it
    size = file.seek(0, io.SEEK_END)
    if size < end:
        raise _damaged(f'it is truncated: {end - size} bytes are missing')
    if size > end:
        _check_trailer(file, end)


def _check_trailer(file, length):
    """Raise _Wrong unless the first `length` bytes of a file have the checksum in the `trailer` after them."""
    file.seek(0)
    crc, left = 0, length
    while left:
        chunk = file.read(min(left, CHUNK))
        crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    if file.read(LONGEST_TRAILER) != trailer(length, crc):
        raise _damaged('it has changed since it was written')


# --- what a pickle builds ---------------------------------------------------------------------------------------------
# A pickle is a program for a stack machine. Here it runs with stand-ins for its values: numbers, text and None are used
# as they are, and these classes hold what has to be checked of all others.

_Global = collections.namedtuple('_Global', 'name')
_Storage = collections.namedtuple('_Storage', 'numel')
_Tuple = collections.namedtuple('_Tuple', 'items size')


class _Dict:
    """Stand-in for a dict, or for an OrderedDict, which may have attributes. Only the keys are kept."""

    def __init__(self, has_attributes=False):
        self.keys, self.has_attributes = set(), has_attributes


class _List:
    pass


class _Tensor:
    pass


def _run(file):
    """Run the pickle at the position of `file`, and return (its value, {key of a storage: its length in bytes}).

    Raises _Wrong for anything that a checkpoint does not need, and an error of any kind if the pickle is damaged.
    """
    stack, marked, memo, storages = [], [], {}, {}
    for opcode, value, _ in pickletools.genops(file):
        name = opcode.name
        if name in ('BINPUT', 'LONG_BINPUT'):
            memo[value] = stack[-1]
        elif name in ('BINGET', 'LONG_BINGET'):
            stack.append(memo[value])
        elif name == 'MARK':
            marked.append(stack)
            stack = []
        elif name in ('BINUNICODE', 'SHORT_BINSTRING', 'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT'):
            stack.append(value)
        elif name in ('NONE', 'NEWTRUE', 'NEWFALSE'):
            stack.append({'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}[name])
        elif name == 'EMPTY_DICT':
            stack.append(_Dict())
        elif name == 'EMPTY_LIST':
            stack.append(_List())
        elif name == 'EMPTY_TUPLE':
            stack.append(_Tuple((), 1))
        elif name in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
            count = int(name[-1])
            stack[-count:] = [_tuple(stack[-count:], count)]
        elif name == 'TUPLE':
            items, stack = stack, marked.pop()
            stack.append(_tuple(items, len(items)))
        elif name in ('APPENDS', 'SETITEMS'):
            items, stack = stack, marked.pop()
            _fill(stack[-1], items, name == 'SETITEMS')
        elif name in ('APPEND', 'SETITEM'):
            count = 1 if name == 'APPEND' else 2
            items = stack[-count:]
            del stack[-count:]
            _fill(stack[-1], items, name == 'SETITEM')
        elif name == 'GLOBAL':
            stack.append(_admitted(value))
        elif name == 'REDUCE':
            arguments = stack.pop()
            stack[-1] = _call(stack[-1], arguments)
        elif name == 'BUILD':
            attributes = stack.pop()
            if not stack[-1].has_attributes or not attributes.keys <= {'_metadata'}:
                raise _Wrong('refused: it sets attributes of something other than a state dict')
        elif name == 'BINPERSID':
            stack[-1] = _storage(stack[-1], storages)
        elif name == 'STOP':
            return stack.pop(), storages
        elif name != 'PROTO' or value != 2:
            raise _Wrong(f'refused: torch.save does not write {name} {printable(value)}; '
                         'write the file with torch.save(model.state_dict(), FILE)')


def _tuple(items, count):
    size = 1 + sum(item.size if isinstance(item, _Tuple) else 1 for item in items)
    if len(items) != count or size > ITEMS:  # hashing one may take forever, or crash Python if it is nested deeply
        raise _Wrong('refused: a tuple in it is larger than any in a checkpoint')
    return _Tuple(tuple(items), size)


def _fill(container, items, is_dict):
    if not isinstance(container, _Dict if is_dict else _List):
        raise ValueError('items without a container')
    if is_dict:
        if not all(isinstance(key, str) or type(key) is int and 0 <= key < LARGEST_KEY for key in items[::2]):
            raise _Wrong('refused: it holds a dict whose keys are neither text nor indices')
        container.keys.update(items[::2])


def _admitted(name):
    if name not in (DICT, *TENSORS, PARAMETER, *STORAGES):
        raise _Wrong(f'refused: it asks for {printable(name.replace(" ", "."))}, but a checkpoint holds plain tensors, '
                     'numbers and text only; anything else could run code when it is loaded. Save the state_dict() of '
                     'a module instead')
    return _Global(name)


def _call(function, arguments):
    """Return the stand-in for the value of a function that a pickle calls."""
    items = arguments.items
    if function.name == DICT:
        return _Dict(has_attributes=True)
    if function.name == PARAMETER and isinstance(items[0], _Tensor):
        return items[0]
    if function.name in TENSORS and 4 <= len(items) <= 6 and isinstance(items[0], _Storage):
        storage, offset, size, stride = items[:4]
        _check_place(storage.numel, offset, size.items, stride.items)
        return _Tensor()
    raise ValueError(f'{function.name} of other arguments')


def _check_place(numel, offset, size, stride):
    """Raise _Wrong if a tensor reaches beyond the `numel` elements of its storage, or has more elements than it."""
    numbers = (offset, *size, *stride)
    if any(type(number) is not int or number < 0 for number in numbers) or len(size) != len(stride):
        raise ValueError('a tensor of an invalid shape')
    elements = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if elements > numel or elements and last >= numel:
        raise _damaged('a tensor is larger than its storage')


def _storage(saved_id, storages):
    """Record the storage in a persistent id, ('storage', class, key, device, number of elements, and perhaps None)."""
    kind, storage_class, key, place, numel, *view = saved_id.items
    if kind != 'storage' or not isinstance(key, str) or type(numel) is not int or numel < 0 or view not in ([], [None]):
        raise ValueError('an invalid storage')
    if not isinstance(place, str):
        raise ValueError('a storage on no device')
    length = numel * STORAGES[storage_class.name]
    if storages.setdefault(key, length) != length:
        raise _damaged('a storage has two lengths')
    return _Storage(numel)


def printable(value):
    """Return a name or number from a file in printable form, or the type of anything else."""
    text = ascii(value) if isinstance(value, str | int | float | None) else f'a {type(value).__name__}'
    return text if len(text) < 80 else f'{text[:76]}...'
