"""List the pictures in a folder: their paths, what they are called, and the classes that sub-folders give them."""
import os
from collections import Counter, namedtuple

from common.errors import UserError
from data.bounded_files import files_in, is_plain, normalized, shown

ENDINGS = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.webp')
HELPERS = ('.txt', '.xml', '.json', '.jsonl', '.csv')  # beside pictures: captions, boxes, lists

# `key` is the path in the folder without ending, `file` with it, `class_name` that of its sub-folder or None.
Picture = namedtuple('Picture', 'key file path class_name')


def list_pictures(folder):
    """Return (list of `Picture`s, names that cannot be used, Counter of the endings of other files).

    Hidden files are left out. Links are followed, but not twice into one folder. Raises UserError without a picture.
    """
    if not os.path.isdir(folder):
        raise UserError(f'--images {folder}: no such folder; give the folder of the pictures')
    pictures, strange, others = [], [], Counter()
    for file in files_in(folder):
        stem, ending = os.path.splitext(file)
        if ending.lower() not in ENDINGS:
            others.update([ending.lower() or 'no ending'] if ending.lower() not in HELPERS else [])
        elif not is_plain(file):
            strange.append(shown(file))
        else:
            top, below, _ = normalized(file).partition('/')
            pictures.append(Picture(stem, file, os.path.join(folder, file), top if below else None))
    if not pictures:
        found = f' (its files are {shown(", ".join(sorted(others)[:5]))})' if others else ''
        raise UserError(f'--images {folder}: holds no JPEG, PNG or WebP picture{found}; give the folder that does')
    return pictures, strange, others
