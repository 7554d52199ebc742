"""List the pictures in a folder: their paths, what they are called, and the classes that sub-folders give them."""
import os
from collections import Counter, namedtuple

from common.errors import UserError
from data.bounded_files import CONTROL, is_encodable, normalized

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
        elif CONTROL.search(file) or not is_encodable(file):
            strange.append(CONTROL.sub('?', file))
        else:
            top, below, _ = normalized(file).partition('/')
            pictures.append(Picture(stem, file, os.path.join(folder, file), top if below else None))
    if not pictures:
        found = f' (its files are {", ".join(sorted(others)[:5])})' if others else ''
        raise UserError(f'--images {folder}: holds no JPEG, PNG or WebP picture{found}; give the folder of the pictures')
    return pictures, strange, others


def files_in(folder):
    """Yield the paths of all files in a folder, relative to it and with /, in alphabetical order."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(place)
        if real in seen:  # a link leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        for name in sorted(names):
            if not name.startswith('.'):
                yield os.path.relpath(os.path.join(place, name), folder).replace(os.sep, '/')


def _refuse(error):
    raise UserError(f'{error.filename}: cannot be listed ({error.strerror}); make it readable') from error
