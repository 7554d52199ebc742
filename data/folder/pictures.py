"""List the pictures in a folder: their paths, what they are called, and the classes that subfolders give them."""
import os
from collections import Counter, defaultdict, namedtuple

from common.errors import UserError
from data.bounded_files import files_in, is_plain, normalized, shown, some

ENDINGS = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.webp')
HELPERS = ('.txt', '.xml', '.json', '.jsonl', '.csv')  # beside pictures: captions, boxes, lists
SPLITS = {'train': 'train', 'training': 'train', 'test': 'test', 'testing': 'test',
          'valid': 'valid', 'validation': 'valid', 'val': 'valid', 'dev': 'valid'}

# `key` is the path in the folder without ending, `file` with it, `class_name` that of its subfolder or None, and
# `name` the key without that. `split` is that of the folder that it is in, such as test/, if splits have folders.
Picture = namedtuple('Picture', 'key file path class_name name split')


def list_pictures(folder):
    """Return (list of `Picture`s, names that cannot be used, Counter of the endings of other files).

    Hidden files are left out. Links are followed, but no folder is read twice. Subfolders are classes, unless all of
    them are named like splits (train, test, ...): then the subfolders in them are. Raises UserError without a picture.
    """
    if not os.path.isdir(folder):
        raise UserError(f'--images {folder}: no such folder; give the folder of the pictures')
    files, strange, others, again = [], [], Counter(), []
    for file in files_in(folder, again):
        stem, ending = os.path.splitext(file)
        if ending.lower() not in ENDINGS:
            others.update([ending.lower() or 'no ending'] if ending.lower() not in HELPERS else [])
        elif not is_plain(file):
            strange.append(shown(file))
        else:
            files.append(file)
    if not files:
        found = f' (its files are {shown(", ".join(sorted(others)[:5]))})' if others else ''
        raise UserError(f'--images {folder}: holds no JPEG, PNG or WebP picture{found}; give the folder that does')
    if again:
        print(f'not read: {len(again)} links to folders that are read already ({some(again)})')
    tops = {file.lower().partition('/')[0] for file in files if '/' in file}
    has_splits = tops <= SPLITS.keys() and len({SPLITS[top] for top in tops}) > 1 and 'train' in map(SPLITS.get, tops)
    return [_picture(folder, file, has_splits) for file in files], strange, others


def _picture(folder, file, has_splits):
    key = os.path.splitext(file)[0]
    top, _, below = key.rpartition('/')[0].partition('/')
    class_name = normalized(below.partition('/')[0] if has_splits else top) or None
    parts = key.split('/')
    if class_name:
        del parts[int(has_splits)]
    split = SPLITS[top.lower()] if has_splits and top else None
    return Picture(key, file, os.path.join(folder, file), class_name, '/'.join(parts), split)


def paths_beside(folder, ending):
    """Return a function that returns the path of a picture's NAME.txt (`ending`) in `folder`, which need not exist.

    Its ending may have capitals, and its accents be composed in another way. Raises UserError if a picture has several.
    """
    found = {}
    for file in filter(is_plain, files_in(folder)):
        stem, own = os.path.splitext(file)
        if own.lower() == ending and found.setdefault(normalized(stem), file) != file:
            raise UserError(f'{os.path.join(folder, file)}: belongs to the same picture as {found[normalized(stem)]}; '
                            'keep only one')
    return lambda picture: os.path.join(folder, found.get(normalized(picture.key), picture.key + ending))


def named_by(files):
    """Return a function that returns which of the `files` a line of the list `where` names, or None.

    The line may lack the ending of a picture, or have another. The function raises UserError if that leaves several
    files.
    """
    places = defaultdict(list)
    for file in files:
        for name in (file, os.path.splitext(file)[0]):
            places[normalized(name)].append(file)

    def find(line, where):
        line = normalized(line.replace('\\', '/').removeprefix('./'))
        stem, ending = os.path.splitext(line)
        found = places.get(line) or places.get(stem if ending.lower() in ENDINGS else None) or [None]
        found = [file for file in found if file and normalized(file) == line] or found
        if len(found) > 1:
            raise UserError(f'{where}: {line[:100]!r} is both {found[0]} and {found[1]}; write the ending')
        return found[0]
    return find
