"""Define the part of a data set of captioned photographs that does not depend on how its images are prepared."""
import warnings

import numpy as np
import torch
from torch.utils.data import Dataset

from data import layout
from data.cache import load_split


class CaptionedPhotographs(Dataset):
    """A split (0: train, 1: valid, 2: test) of an HDF5 file in the layout of `data.layout`.

    Attributes: `index` (`layout.Index`), `captions`, `classes`, `photo_of` (long [captions], the number of each
    caption's photograph), `embeddings` (float32 [captions, D], or None if there are none or bad ones), and with
    `size` the photographs `pictures`, prepared by `decode(jpeg, size)`. `bad_embeddings`, `fingerprint` and `encoder`
    are those of `data.cache.Split`.

    Raises UserError if the file is missing or not in this layout.
    """

    has_wrong_images = True

    def __init__(self, datasetFile, split, size=None, decode=None):
        self.file, self.split = datasetFile, layout.SPLITS[split]
        cached = load_split(datasetFile, self.split, size, decode)
        self.index, self.jpegs = cached.index, cached.jpegs
        self.pictures, self.embeddings = cached.pictures, cached.embeddings
        self.fingerprint, self.encoder = cached.fingerprint, cached.encoder
        self.bad_embeddings = cached.bad_embeddings
        self.captions, self.classes = cached.index.captions, cached.index.classes
        self.photo_of = torch.tensor(cached.index.photo_of, dtype=torch.long)
        self._group_by_class()

    def _group_by_class(self):
        """Sort the photographs by class, so that those of a class are one block and all others lie outside it."""
        _, number = np.unique(self.classes, return_inverse=True)
        class_of = torch.from_numpy(number).long()
        self.by_class = torch.argsort(class_of, stable=True)
        block_size = torch.bincount(class_of)
        block_start = block_size.cumsum(0) - block_size
        self.class_size, self.class_start = block_size[class_of], block_start[class_of]
        self.place = torch.argsort(self.by_class)
        if len(block_size) == 1 and self.has_wrong_images:
            warnings.warn(f'{self.file}: all photographs of /{self.split} are of the class {self.classes[0]!r}, so '
                          'wrong_images are other photographs of that class', stacklevel=4)
        if len(block_size) == 1:
            self.block_size, self.block_start = torch.ones_like(class_of), self.place
        else:
            self.block_size, self.block_start = block_size[class_of], block_start[class_of]

    @property
    def embed_dim(self):
        """Return the width D of the embeddings, which another encoder than the chapter's may have."""
        return layout.EMBED_DIM if self.embeddings is None else self.embeddings.shape[1]

    @classmethod
    def held_out(cls, datasetFile, **arguments):
        """Return the split to evaluate on: /test, or /valid if that is empty."""
        test = cls(datasetFile, split=2, **arguments)
        return test if len(test) else cls(datasetFile, split=1, **arguments)

    def draw_other_class(self, photos):
        """Return a random photograph of another class for each of the `photos` (long [B]), uniformly distributed."""
        block_size, block_start = self.block_size[photos], self.block_start[photos]
        others = (len(self.by_class) - block_size).clamp(min=1)
        place = (torch.rand(photos.shape, dtype=torch.float64) * others).long()
        place += block_size * (place >= block_start)
        return self.by_class[place.clamp(max=len(self.by_class) - 1)]

    def draw_same_class(self, photos):
        """Return another random photograph of the same class for each of the `photos` (long [B]).

        Of a class with a single photograph, it is that one.
        """
        size, start = self.class_size[photos], self.class_start[photos]
        step = 1 + (torch.rand(photos.shape, dtype=torch.float64) * (size - 1)).long()
        return self.by_class[start + (self.place[photos] - start + step) % size]
