"""Read published sentence embeddings without trusting the files.

Both readers return a function `look_up('CLASS/NAME') -> float32 [captions, 1024]`, with rows in the order of the
photograph's caption file. It raises ValueError with the reason if a photograph has no usable embedding.
"""
import os

import numpy as np

from common import torch7_file
from common.errors import UserError
from data.birds.untrusted_pickle import load_pickle, one_line
from data.layout import EMBED_DIM

ICML = 'icml2016 t7'     # what a file of these embeddings says about itself
LARGEST_T7 = 256 << 20   # bytes; published files have 100,000
LONGEST_NAME = 1000      # characters of CLASS/NAME


def open_pickles(folder):
    """Read StackGAN's pickles in `folder`/train and `folder`/test, and return a `look_up` for both.

    Raises UserError if a file is missing, refused, or does not match the others.
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
            load_pickle(classes_path)  # not needed, but if it is damaged, so may be the others
        if not all(isinstance(each, (list, tuple)) or np.ndim(each) for each in (names, embeddings)):
            raise UserError(f'{part}: filenames.pickle and char-CNN-RNN-embeddings.pickle must each hold a list')
        if len(names) != len(embeddings):
            raise UserError(f'{names_path}: names {len(names)} photographs, but {os.path.basename(rows_path)} has the '
                            f'embeddings of {len(embeddings)}; take both from the same download')
        if not all(isinstance(name, (str, bytes)) and len(name) <= LONGEST_NAME for name in names):
            raise UserError(f'{names_path}: holds something other than names, CLASS/NAME; download it again')
        known = len(rows)
        rows.update((name.decode('latin1') if isinstance(name, bytes) else str(name), embedding)
                    for name, embedding in zip(names, embeddings))
        if len(rows) < known + len(names):
            raise UserError(f'{names_path}: names a photograph twice; take all files from the same download')

    def look_up(key):
        if key not in rows:
            raise ValueError('no embedding in the pickles')
        return _checked_rows(rows[key])
    return look_up


def open_icml(folder):
    """Return a `look_up` that reads Reed's `folder`/CLASS/NAME.t7 on demand. Raises UserError without class folders."""
    try:
        has_classes = os.path.isdir(folder) and any(entry.is_dir() for entry in os.scandir(folder))
    except OSError as error:
        raise UserError(f'{folder}: cannot be listed ({error.strerror}); make it readable') from error
    if not has_classes:
        raise UserError(f'{folder}: holds no class folders; --icml takes the folder that holds CLASS/NAME.t7')

    def look_up(key):
        path = os.path.join(folder, f'{key}.t7')
        if not os.path.isfile(path):
            raise ValueError(f'no embedding: {path} is missing')
        if os.path.getsize(path) > LARGEST_T7:
            raise ValueError(f'no embedding: {path} has more than {LARGEST_T7:,} bytes')
        return _checked_rows(_read_t7(path))
    return look_up


def _checked_rows(rows):
    """Convert an array, or a list of arrays or lists, to float32 [captions, 1024]. Raises ValueError for anything else.

    Lists are checked before numpy converts them: one that contains another many times could fill the memory.
    """
    if isinstance(rows, (list, tuple)):
        if len(set(map(id, rows))) < len(rows) or not all(map(_is_row, rows)):
            raise ValueError(f'its embedding does not consist of rows of {EMBED_DIM} numbers')
    elif not _is_array(rows):
        raise ValueError('its embedding does not consist of numbers')
    try:
        with np.errstate(over='ignore'):    # infinity is found below
            rows = np.asarray(rows, np.float32)
    except OverflowError as error:
        raise ValueError('its embedding has numbers that are too large') from error
    if rows.ndim != 2 or rows.shape[1] != EMBED_DIM:
        raise ValueError(f'its embedding has shape {rows.shape}, not (captions, {EMBED_DIM})')
    if not np.isfinite(rows).all():
        raise ValueError('its embedding has numbers that are not finite')
    if not rows.any(axis=1).all():
        raise ValueError('its embedding consists of zeros')
    return rows


def _is_array(value):
    return isinstance(value, np.ndarray) and value.dtype.kind in 'fiu'


def _is_row(row):
    if isinstance(row, (list, tuple)):
        return len(row) == EMBED_DIM and all(isinstance(x, (int, float, np.integer, np.floating)) for x in row)
    return _is_array(row) and row.shape == (EMBED_DIM,)


def _read_t7(path):
    """Return the tensor `txt` of a Torch7 file. Raises ValueError with the reason if it cannot be read."""
    try:
        record = torch7_file.read(path)
        if isinstance(record, torch7_file.Table) and isinstance(record.get('txt'), torch7_file.Tensor):
            return record['txt'].array()
    except (ValueError, MemoryError) as error:
        raise ValueError(f'{path} cannot be read as a Torch7 file ({one_line(error)})') from error
    raise ValueError(f'{path} holds no tensor txt')
