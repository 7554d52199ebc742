"""Sentence embeddings that others published, read without trusting the files.

Both readers return a function `look_up('CLASS/NAME') -> float32 [captions, 1024]`, rows in the order of the
photograph's caption file. It raises ValueError with the reason where a photograph has no usable embedding.
"""
import os

import numpy as np
import torchfile

from common.errors import UserError
from data.birds.untrusted_pickle import load_pickle, one_line
from data.layout import EMBED_DIM


def open_pickles(folder):
    """Read StackGAN's pickles in `folder`/train and `folder`/test; return a `look_up` over both.

    Raises UserError where a file is missing, refused or does not fit its neighbour.
    """
    parts = [path for path in (os.path.join(folder, part) for part in ('train', 'test')) if os.path.isdir(path)]
    if not parts:
        raise UserError(f'{folder}: has neither train/ nor test/; --pickles takes the folder that holds both, '
                        'each with char-CNN-RNN-embeddings.pickle and filenames.pickle')
    rows = {}
    for part in parts:
        names_path = os.path.join(part, 'filenames.pickle')
        rows_path = os.path.join(part, 'char-CNN-RNN-embeddings.pickle')
        names, embeddings = load_pickle(names_path), load_pickle(rows_path)
        classes_path = os.path.join(part, 'class_info.pickle')
        if os.path.exists(classes_path):
            load_pickle(classes_path)  # not needed, but damage to it says that the others may be damaged too
        if not all(isinstance(each, (list, tuple)) or np.ndim(each) for each in (names, embeddings)):
            raise UserError(f'{part}: filenames.pickle and char-CNN-RNN-embeddings.pickle must each hold a list')
        if len(names) != len(embeddings):
            raise UserError(f'{names_path}: names {len(names)} photographs, but {os.path.basename(rows_path)} has the '
                            f'embeddings of {len(embeddings)}; take both from the same download')
        names = [name.decode('latin1') if isinstance(name, bytes) else str(name) for name in names]
        rows.update(zip(names, embeddings))

    def look_up(key):
        if key not in rows:
            raise ValueError('no embedding in the pickles')
        return _checked_rows(rows[key])
    return look_up


def open_icml(folder):
    """Return a `look_up` that reads Reed's Torch7 files `folder`/CLASS/NAME.t7, each when it is asked for.

    Raises UserError where `folder` holds no CLASS folders.
    """
    if not os.path.isdir(folder) or not any(entry.is_dir() for entry in os.scandir(folder)):
        raise UserError(f'{folder}: holds no class folders; --icml takes the folder that holds CLASS/NAME.t7')

    def look_up(key):
        path = os.path.join(folder, f'{key}.t7')
        if not os.path.isfile(path):
            raise ValueError(f'no embedding: {path} is missing')
        return _checked_rows(_read_t7(path))
    return look_up


def _checked_rows(rows):
    try:
        rows = np.asarray(rows, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError('its embedding does not consist of numbers') from error
    if rows.ndim != 2 or rows.shape[1] != EMBED_DIM:
        raise ValueError(f'its embedding has shape {rows.shape}, not (captions, {EMBED_DIM})')
    if not np.isfinite(rows).all():
        raise ValueError('its embedding has numbers that are not finite')
    return rows


def _read_t7(path):
    """The tensor `txt` of a Torch7 file. Raises ValueError with the reason where it cannot be read.

    torchfile evaluates nothing (a Lua function stays a string of bytes), but it believes every size in the file.
    """
    try:
        record = torchfile.load(path, force_8bytes_long=True)       # longs are 8 bytes, also where the C type has 4
    except Exception as error:      # a damaged file can raise nearly anything
        raise ValueError(f'{path} cannot be read as a Torch7 file ({one_line(error)})') from error
    if not isinstance(record, dict) or not isinstance(record.get(b'txt'), np.ndarray):
        raise ValueError(f'{path} holds no tensor txt')
    return record[b'txt']


def _read_tensor(reader, _version):
    """In torchfile's place: its own reader makes a view beyond the end of memory where a file is cut off or made up."""
    dims = reader.read_int()
    size, stride = ([reader.read_long() for _ in range(dims)] for _ in range(2))
    start, storage = reader.read_long() - 1, reader.read_obj()
    if dims == 0 or storage is None:
        return np.empty(0, np.float32)
    last = start + sum((n - 1) * step for n, step in zip(size, stride))
    if min(size) < 1 or min(stride) < 0 or start < 0 or last >= len(storage):
        raise ValueError('the tensor is larger than its numbers')
    return np.lib.stride_tricks.as_strided(storage[start:], size, [step * storage.itemsize for step in stride])


torchfile.type_handlers.update({name: _read_tensor for name in torchfile.type_handlers if name.endswith(b'Tensor')})
