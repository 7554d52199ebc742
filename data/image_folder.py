"""Pictures without sentences, at several sizes, for training without text: plain folders, and LSUN."""
import os

import torch
from torch.utils.data import Dataset
from torchvision.datasets import LSUN, ImageFolder
from torchvision.datasets.folder import default_loader

from common.errors import UserError
from data.multiscale_dataset import DRAWS, frame, in_threads, sizes_of, views


class PlainPictures(Dataset):
    """An item per picture of `source`, a data set of torchvision's whose items are (PIL image, class).

    An item is a dict with one entry, `right_images`: a list of float32 [3, S, S] in [-1, 1], small to large,
    S = base_size * 2 ** i for i < branches, prepared as `data.multiscale_dataset` does without a bounding box.
    What is drawn comes from torch's global generator.
    """

    def __init__(self, source, branches=3, base_size=64):
        self.source, self.sizes = source, sizes_of(branches, base_size)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """The items of a whole batch, decoded in threads."""
        draws = torch.rand(len(indices), DRAWS, dtype=torch.float64).tolist()
        return in_threads(self._item, indices, draws)

    def _item(self, index, draws):
        photograph, _ = self.source[index]
        return {'right_images': views(frame(photograph, self.sizes[-1]), self.sizes, *draws)}


def image_folder(folder, classes=None, branches=3, base_size=64):
    """`PlainPictures` of folder/CLASS/**, all classes or those in the list `classes`.

    Raises UserError where the folder, a class or every picture is missing, and for a picture that cannot be decoded.
    """
    found = _class_folders(folder)
    missing = [name for name in classes or () if name not in found]
    if missing:
        raise UserError(f'{folder}: has no class folder {missing[0]!r} (it has {_some(found)}); '
                        'correct the list of classes, or leave it out to take all')
    source = KeptClasses(folder, classes or found)
    if len(source) == 0:
        raise UserError(f'{folder}: no pictures in its class folders ({_some(source.classes)}); '
                        'put JPEG or PNG files in them')
    return PlainPictures(source, branches, base_size)


class KeptClasses(ImageFolder):
    """`ImageFolder` with only the class folders named in `keep`."""

    def __init__(self, folder, keep):
        self.keep = sorted(keep)
        super().__init__(folder, loader=_read_picture, allow_empty=True)

    def find_classes(self, directory):
        return self.keep, {name: number for number, name in enumerate(self.keep)}


def _read_picture(path):
    try:
        return default_loader(path)
    except OSError as error:
        raise UserError(f'{path}: cannot be decoded ({error}); remove or replace it') from error


def _class_folders(folder):
    """The names of the folders in `folder`. Raises UserError where there is none."""
    if not os.path.isdir(folder):
        raise UserError(f'{folder}: no such folder; give one that holds a folder of pictures for each class')
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not found:
        raise UserError(f'{folder}: holds no class folders; put the pictures in one, such as '
                        f'{os.path.join(folder, "all")}')
    return found


def _some(names):
    return ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')


def lsun(folder, classes, branches=3, base_size=64):
    """`PlainPictures` of LSUN (Yu et al. 2015), folder/NAME_lmdb for each NAME in `classes`: ['church_outdoor_train'].

    torchvision keeps the keys of each in a pickle `_cache_...` in the current folder, and trusts the one it finds.
    Raises UserError without the package lmdb, and where a class is missing, empty or damaged.
    """
    try:
        import lmdb
    except ImportError as error:
        raise UserError(f'{folder}: LSUN is read with the package lmdb, which is missing: pip install lmdb') from error
    for name in classes:
        if not os.path.isdir(os.path.join(folder, f'{name}_lmdb')):
            raise UserError(f'{os.path.join(folder, name)}_lmdb: no such folder; unpack {name}_lmdb.zip there, '
                            'or correct the class (they are named as church_outdoor_train and bedroom_val)')
    try:
        source = LSUN(folder, list(classes))
    except (ValueError, lmdb.Error) as error:
        raise UserError(f'{folder}: LSUN {_some(classes)} cannot be read ({error}); download it again') from error
    if len(source) == 0:
        raise UserError(f'{folder}: LSUN {_some(classes)} holds no pictures; download it again')
    return PlainPictures(source, branches, base_size)
