"""Load images without captions, at several sizes, for training without text: from plain folders and from LSUN."""
import contextlib
import hashlib
import json
import os
import sys
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from common.errors import UserError
from data.multiscale_dataset import DRAWS, CroppedItems, crop, frame, in_threads, sizes_of, stack_crops, with_all_sizes
from data.pictures import BadPicture, check_header, read_picture

TRIES = 100  # images that are tried in place of one that cannot be decoded


class PlainPictures(Dataset):
    """One item per image of `source`, whose `files(indices)` returns (name, path or bytes of the file) for each.

    An item is a dict with one entry, `right_images`: a list of float32 [3, S, S] in [-1, 1], small to large, S =
    base_size * 2 ** i for i < branches, prepared as in `data.multiscale_dataset` without a bounding box.
    `fingerprint['pictures']` is 16 hexadecimal digits of a hash of the files' names and sizes in `file`. Random draws
    come from torch's global generator. An image that cannot be decoded is reported, once, and replaced by the
    next one, so that it does not end a training. Raises UserError if TRIES in a row cannot be decoded.
    """

    def __init__(self, source, branches=3, base_size=64):
        self.source, self.sizes, self.named = source, sizes_of(branches, base_size), set()
        self.file, self.fingerprint, self.embeddings = source.root, {'pictures': _digest(source.contents())}, None

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """Return the items of a whole batch, decoded in threads."""
        draws = torch.rand(len(indices), DRAWS, dtype=torch.float64).tolist()
        crops = stack_crops(in_threads(self._crop, indices, self.source.files(indices), draws))
        return CroppedItems({'right_images': crops}, self.finish)

    def finish(self, batch, device='cpu'):
        """Convert a batch of crops to lists of images, on `device`."""
        return with_all_sizes(batch, self.sizes, device)

    def _crop(self, index, name_and_file, draws):
        name, file = name_and_file
        for attempt in range(1, TRIES + 1):
            try:
                return crop(np.asarray(frame(read_picture(file), self.sizes[-1])), self.sizes[-1], *draws)
            except BadPicture as error:
                reason = f'{name}: cannot be decoded ({error})'
                if name not in self.named:
                    print(f'{reason}; the next image takes its place', file=sys.stderr, flush=True)
                self.named.add(name)
                (name, file), = self.source.files([(index + attempt) % len(self)])
        raise UserError(f'{reason}, like the {TRIES - 1} images before it; remove or replace them')


def image_folder(folder, classes=None, branches=3, base_size=64):
    """Return `PlainPictures` of folder/CLASS/**, with all classes or those in the list `classes`.

    Files that are not images despite their extensions are reported and skipped; other files are counted. Raises
    UserError if the folder or a listed class is missing, or has no images.
    """
    found = _class_folders(folder)
    composed = {unicodedata.normalize('NFC', name): name for name in found}  # macOS stores file names decomposed
    classes = classes and [composed.get(unicodedata.normalize('NFC', name), name) for name in classes]
    missing = [name for name in classes or () if name not in found]
    if missing:
        raise UserError(f'{folder}: has no class folder {missing[0]!r} (it has {_first_few(found)}); '
                        'correct the list of classes, or leave it out to use all')
    source = SelectedClasses(folder, classes or found)
    source.report_ignored()
    source.drop_unreadable()
    shown = {source.classes[number] for _, number in source.samples}
    empty = sorted(set(classes or ()) - shown)
    if shown and empty:
        raise UserError(f'{os.path.join(folder, empty[0])}: holds no usable image; put JPEG or PNG files '
                        'in it, or leave it out of the list of classes')
    if len(source) == 0:
        raise UserError(f'{folder}: no images in its class folders ({_first_few(source.classes)}); '
                        'put JPEG or PNG files in them')
    return PlainPictures(source, branches, base_size)


def _digest(contents):
    return hashlib.sha256(json.dumps(sorted(contents)).encode()).hexdigest()[:16]


class SelectedClasses(ImageFolder):
    """Like `ImageFolder`, but with only the class folders named in `keep`."""

    def __init__(self, folder, keep):
        self.keep = sorted(set(keep))
        super().__init__(folder, allow_empty=True)

    @staticmethod
    def make_dataset(directory, class_to_idx, extensions=None, *_, **__):
        """List (path, class number) per image; torchvision's method follows links to an enclosing folder forever."""
        return [(os.path.join(place, name), class_to_idx[class_name])
                for class_name, place, names in _walk_classes(directory, sorted(class_to_idx), verbose=True)
                for name in sorted(names) if name.lower().endswith(extensions) and name[0] != '.']

    def report_ignored(self):
        """Print, in one line, how many files have no image's extension, and how many images are in no class folder."""
        others = Counter(os.path.splitext(name)[1].lower() or 'none'
                         for _, _, names in _walk_classes(self.root, self.classes)
                         for name in names if not name.lower().endswith(self.extensions) and name[0] != '.')
        loose = sum(entry.name.lower().endswith(self.extensions) for entry in os.scandir(self.root)
                    if entry.is_file() and entry.name[0] != '.')
        ignored = [f'{sum(others.values())} files of other types ({_first_few(sorted(others))})'] if others else []
        ignored += [f'{loose} images beside the class folders'] if loose else []
        if ignored:
            print(f'{self.root}: left out {" and ".join(ignored)}')

    def find_classes(self, directory):
        return self.keep, {name: number for number, name in enumerate(self.keep)}

    def files(self, indices):
        return [(self.samples[i][0], self.samples[i][0]) for i in indices]

    def contents(self):
        """Yield (path within the folder, bytes) of every image."""
        for path, _ in self.samples:
            with contextlib.suppress(OSError):  # if it has been removed since, reading it will report that
                yield os.path.relpath(path, self.root).replace(os.sep, '/'), os.path.getsize(path)

    def drop_unreadable(self):
        """Report the files that do not begin like an image, and remove them from the data set."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            checked = threads.map(self._reason, (path for path, _ in self.samples))
            reasons = list(tqdm(checked, 'images', len(self.samples), unit='', leave=False, disable=None))
        for (path, _), reason in zip(self.samples, reasons):
            if reason:
                print(f'skipped {path}: {reason}')
        self.samples = [sample for sample, reason in zip(self.samples, reasons) if not reason]

    @staticmethod
    def _reason(path):
        """Return why the file is not an image, or None."""
        try:
            check_header(path)
        except BadPicture as error:
            return str(error)


def _walk_classes(folder, classes, verbose=False):
    """Yield (class, path, names of files) for the folder of each class and all below it, each once.

    A link to a folder that is read anyway, such as an enclosing one or that of another class, is not followed. With
    `verbose`, a line says so, and another names each folder that cannot be listed.
    """
    report = print if verbose else lambda line: None
    tops = [os.path.join(folder, class_name) for class_name in classes]
    path_of = {_identity(folder): folder}  # of the folders that are reached without a link below a class folder
    for top in sorted(tops, key=os.path.islink):  # a link takes no folder's place
        for place, _, _ in os.walk(top):
            path_of.setdefault(_identity(place), place)

    def cannot_list(error):
        report(f'skipped {error.filename}: the folder cannot be listed ({error.strerror})')

    for class_name, top in zip(classes, tops):
        found = []
        for place, folders, names in os.walk(top, onerror=cannot_list, followlinks=True):
            if path_of.setdefault(_identity(place), place) != place:
                report(f'skipped {place}: a link to a folder that is read already')
                folders.clear()
                continue
            # Sorted, so that a folder with several paths always has the same one.
            folders[:] = sorted(name for name in folders if name[0] != '.')
            found.append((class_name, place, names))
        yield from sorted(found)


def _identity(path):
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _class_folders(folder):
    """Return the names of the folders in `folder`. Raises UserError if there is none."""
    if not os.path.isdir(folder):
        raise UserError(f'{folder}: no such folder; give one that holds a folder of images for each class')
    try:
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != '.')
    except OSError as error:
        raise UserError(f'{folder}: cannot be listed ({error.strerror}); make it readable') from error
    if not found:
        raise UserError(f'{folder}: holds no class folders; put the images in one, such as '
                        f'{os.path.join(folder, "all")}')
    return found


def _first_few(names):
    return ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')


def lsun(folder, classes, branches=3, base_size=64):
    """Return `PlainPictures` of LSUN (Yu et al. 2015), from folder/NAME_lmdb for each NAME in the list `classes`.

    A class is named like 'church_outdoor_train'. Raises UserError if the package lmdb is not installed, or if a class
    is missing, empty or damaged.
    """
    try:
        import lmdb  # noqa: F401
    except ImportError as error:
        raise UserError(f'{folder}: reading LSUN needs the package lmdb: pip install lmdb') from error
    for name in classes:
        if not os.path.isdir(os.path.join(folder, f'{name}_lmdb')):
            raise UserError(f'{os.path.join(folder, name)}_lmdb: no such folder; unpack {name}_lmdb.zip there, '
                            'or correct the class (such as church_outdoor_train or bedroom_val)')
    source = Lsun(folder, [os.path.join(folder, f'{name}_lmdb') for name in classes])
    if len(source) == 0:
        raise UserError(f'{folder}: LSUN {_first_few(classes)} holds no images; download it again')
    return PlainPictures(source, branches, base_size)


class Lsun:
    """The JPEGs of LMDB databases, in the order of their keys.

    torchvision's LSUN keeps the keys in a pickle in the current folder, and would execute a pickle that it finds there.
    This class reads them from the database, and opens it for each batch, because an open one does not survive a fork.
    """

    def __init__(self, root, paths):
        self.root, self.paths, self.keys = root, paths, [self._read_keys(path) for path in paths]
        self.ends = np.cumsum([len(keys) for keys in self.keys])

    def __len__(self):
        return int(self.ends[-1])

    def contents(self):
        """Yield (name, number of pictures) of every database."""
        for path, keys in zip(self.paths, self.keys):
            yield os.path.basename(path), len(keys)

    @staticmethod
    def _read_keys(path):
        """Return the keys as one numpy array: workers would copy the pages of three million bytes objects."""
        with _reading(path) as transaction:
            keys = transaction.cursor().iternext(keys=True, values=False)
            return np.array(list(tqdm(keys, os.path.basename(path), unit=' keys', leave=False, disable=None)), bytes)

    def files(self, indices):
        with contextlib.ExitStack() as stack:
            transactions = [stack.enter_context(_reading(path)) for path in self.paths]
            return [self._file(transactions, index) for index in indices]

    def _file(self, transactions, index):
        number = int(np.searchsorted(self.ends, index, side='right'))
        key = bytes(self.keys[number][index - self.ends[number]])  # counted from the end of its database
        return f'{self.paths[number]}: {key.decode("ascii", "replace")}', transactions[number].get(key, b'')


@contextlib.contextmanager
def _reading(path):
    """Yield a read transaction of the LMDB database `path`. Raises UserError if it is damaged."""
    import lmdb
    try:
        with lmdb.open(path, readonly=True, lock=False, readahead=False, meminit=False) as database, \
                database.begin(write=False) as transaction:
            size = (database.info()['last_pgno'] + 1) * database.stat()['psize']
            if os.path.getsize(os.path.join(path, 'data.mdb')) < size:  # reading beyond its end would crash
                raise lmdb.CorruptedError(f'its file is shorter than {size:,} bytes')
            yield transaction
    except lmdb.Error as error:
        raise UserError(f'{path}: cannot be read ({error}); download it again') from error
