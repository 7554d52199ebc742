"""Pictures without sentences, at several sizes, for training without text: plain folders, and LSUN."""
import contextlib
import hashlib
import json
import os
import sys
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

TRIES = 100  # pictures that are tried in the place of one that cannot be decoded


class PlainPictures(Dataset):
    """An item per picture of `source`, whose `files(indices)` gives for each (name, file): its bytes or its path.

    An item is a dict with one entry, `right_images`: a list of float32 [3, S, S] in [-1, 1], small to large,
    S = base_size * 2 ** i for i < branches, prepared as `data.multiscale_dataset` does without a bounding box.
    `fingerprint` has 16 hexadecimal digits for the 'pictures': of the names and sizes of their files, in `file`.
    What is drawn comes from torch's global generator. A picture that cannot be decoded is named, once, and the next one
    takes its place: a training does not end over it. Raises UserError where TRIES in a row cannot be.
    """

    def __init__(self, source, branches=3, base_size=64):
        self.source, self.sizes, self.named = source, sizes_of(branches, base_size), set()
        self.file, self.fingerprint, self.embeddings = source.root, {'pictures': _digest(source.contents())}, None

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """The items of a whole batch, decoded in threads."""
        draws = torch.rand(len(indices), DRAWS, dtype=torch.float64).tolist()
        crops = stack_crops(in_threads(self._crop, indices, self.source.files(indices), draws))
        return CroppedItems({'right_images': crops}, self.finish)

    def finish(self, batch, device='cpu'):
        """A batch of crops, with lists of pictures in their place, on `device`."""
        return with_all_sizes(batch, self.sizes, device)

    def _crop(self, index, name_and_file, draws):
        name, file = name_and_file
        for attempt in range(1, TRIES + 1):
            try:
                return crop(np.asarray(frame(read_picture(file), self.sizes[-1])), self.sizes[-1], *draws)
            except BadPicture as error:
                reason = f'{name}: cannot be decoded ({error})'
                if name not in self.named:
                    print(f'{reason}; the next picture takes its place', file=sys.stderr, flush=True)
                self.named.add(name)
                (name, file), = self.source.files([(index + attempt) % len(self)])
        raise UserError(f'{reason}, as the {TRIES - 1} before it; remove or replace them')


def image_folder(folder, classes=None, branches=3, base_size=64):
    """`PlainPictures` of folder/CLASS/**, all classes or those in the list `classes`.

    Files that are not what their names say are named and left out, what else lies there is counted. Raises UserError
    where the folder, a class of the list, all its pictures, or every picture is missing.
    """
    found = _class_folders(folder)
    missing = [name for name in classes or () if name not in found]
    if missing:
        raise UserError(f'{folder}: has no class folder {missing[0]!r} (it has {_some(found)}); '
                        'correct the list of classes, or leave it out to take all')
    source = KeptClasses(folder, classes or found)
    source.say_what_is_left_out()
    source.leave_out_what_is_no_picture()
    shown = {source.classes[number] for _, number in source.samples}
    empty = sorted(set(classes or ()) - shown)
    if shown and empty:
        raise UserError(f'{os.path.join(folder, empty[0])}: holds no picture that can be used; put JPEG or PNG files '
                        'in it, or leave it out of the list of classes')
    if len(source) == 0:
        raise UserError(f'{folder}: no pictures in its class folders ({_some(source.classes)}); '
                        'put JPEG or PNG files in them')
    return PlainPictures(source, branches, base_size)


def _digest(contents):
    return hashlib.sha256(json.dumps(sorted(contents)).encode()).hexdigest()[:16]


class KeptClasses(ImageFolder):
    """`ImageFolder` with only the class folders named in `keep`."""

    def __init__(self, folder, keep):
        self.keep = sorted(keep)
        super().__init__(folder, allow_empty=True)

    @staticmethod
    def make_dataset(directory, class_to_idx, extensions=None, *_, **__):
        """As torchvision's, which would follow two links to the folder that they are in for ever."""
        return [(os.path.join(place, name), number) for class_name, number in sorted(class_to_idx.items())
                for place, names in sorted(_folders_below(os.path.join(directory, class_name)))
                for name in sorted(names) if name.lower().endswith(extensions)]

    def say_what_is_left_out(self):
        """Print, in one line, how many files have no ending of a picture's, and how many pictures lie in no class."""
        others = Counter(os.path.splitext(name)[1].lower() or 'none' for class_name in self.classes
                         for _, names in _folders_below(os.path.join(self.root, class_name))
                         for name in names if not name.lower().endswith(self.extensions) and name[0] != '.')
        loose = sum(entry.name.lower().endswith(self.extensions) for entry in os.scandir(self.root)
                    if entry.is_file() and entry.name[0] != '.')
        said = [f'{sum(others.values())} files of other endings ({_some(sorted(others))})'] if others else []
        said += [f'{loose} pictures beside the class folders'] if loose else []
        if said:
            print(f'{self.root}: left out {" and ".join(said)}')

    def find_classes(self, directory):
        return self.keep, {name: number for number, name in enumerate(self.keep)}

    def files(self, indices):
        return [(self.samples[i][0], self.samples[i][0]) for i in indices]

    def contents(self):
        """Yield (path within the folder, bytes) of every picture."""
        for path, _ in self.samples:
            with contextlib.suppress(OSError):  # it is gone meanwhile, which is said once it is to be read
                yield os.path.relpath(path, self.root).replace(os.sep, '/'), os.path.getsize(path)

    def leave_out_what_is_no_picture(self):
        """Name the files whose first bytes are not those of a picture, and forget them."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            checked = threads.map(self._reason, (path for path, _ in self.samples))
            reasons = list(tqdm(checked, 'pictures', len(self.samples), unit='', leave=False, disable=None))
        for (path, _), reason in zip(self.samples, reasons):
            if reason:
                print(f'skipped {path}: {reason}')
        self.samples = [sample for sample, reason in zip(self.samples, reasons) if not reason]

    @staticmethod
    def _reason(path):
        """Why the file is no picture, or None."""
        try:
            check_header(path)
        except BadPicture as error:
            return str(error)


def _folders_below(folder):
    """Yield (path, names of files) of a folder and of all in it, each once, also where links lead there."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        # Sorted: of several ways to a folder, it is always the same.
        folders[:] = sorted(name for name in folders if name[0] != '.')
        yield place, names


def _class_folders(folder):
    """The names of the folders in `folder`. Raises UserError where there is none."""
    if not os.path.isdir(folder):
        raise UserError(f'{folder}: no such folder; give one that holds a folder of pictures for each class')
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != '.')
    if not found:
        raise UserError(f'{folder}: holds no class folders; put the pictures in one, such as '
                        f'{os.path.join(folder, "all")}')
    return found


def _some(names):
    return ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')


def lsun(folder, classes, branches=3, base_size=64):
    """`PlainPictures` of LSUN (Yu et al. 2015), folder/NAME_lmdb for each NAME in `classes`: ['church_outdoor_train'].

    Raises UserError without the package lmdb, and where a class is missing, empty or damaged.
    """
    try:
        import lmdb  # noqa: F401
    except ImportError as error:
        raise UserError(f'{folder}: LSUN is read with the package lmdb, which is missing: pip install lmdb') from error
    for name in classes:
        if not os.path.isdir(os.path.join(folder, f'{name}_lmdb')):
            raise UserError(f'{os.path.join(folder, name)}_lmdb: no such folder; unpack {name}_lmdb.zip there, '
                            'or correct the class (they are named as church_outdoor_train and bedroom_val)')
    source = Lsun(folder, [os.path.join(folder, f'{name}_lmdb') for name in classes])
    if len(source) == 0:
        raise UserError(f'{folder}: LSUN {_some(classes)} holds no pictures; download it again')
    return PlainPictures(source, branches, base_size)


class Lsun:
    """The JPEGs of LMDB databases, in the order of their keys.

    torchvision's LSUN keeps the keys in a pickle in the current folder, and would run what it finds there. Here they
    are read from the database, which is opened for each batch, as an open one survives no fork.
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
        """As one numpy array: a list of three million bytes objects would be copied page by page in every worker."""
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
    """A transaction that reads the LMDB database `path`. Raises UserError where it is damaged."""
    import lmdb
    try:
        with lmdb.open(path, readonly=True, lock=False, readahead=False, meminit=False) as database, \
                database.begin(write=False) as transaction:
            size = (database.info()['last_pgno'] + 1) * database.stat()['psize']
            if os.path.getsize(os.path.join(path, 'data.mdb')) < size:  # it is mapped: reading on is fatal
                raise lmdb.CorruptedError(f'its file is shorter than {size:,} bytes')
            yield transaction
    except lmdb.Error as error:
        raise UserError(f'{path}: cannot be read ({error}); download it again') from error
