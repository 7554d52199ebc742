"""Captioned pictures at 64 x 64, as the chapter's text-to-image section prepares them."""
from collections.abc import Sequence

import torch

from data.captioned_photographs import CaptionedPhotographs

SIZE = 64
CHUNK = 16  # pictures that are normalized at once on a CPU: they stay in its cache from one pass to the next


class Text2ImageDataset(CaptionedPhotographs):
    """An item per caption of a split (0: train, 1: valid, 2: test) of an HDF5 file in `data.layout`'s layout.

    An item is a dict:
        right_images  float32 [3, 64, 64] in [-1, 1], the picture that the caption describes
        right_embed   float32 [1024], the caption's embedding
        wrong_images  float32 [3, 64, 64] in [-1, 1], a picture of another class, drawn anew each time
        inter_embed   float32 [1024], the embedding of a caption drawn at random, to interpolate with
        txt           str, the caption
    A file without embeddings gives items without `right_embed` and `inter_embed`. `transform`, if given, is applied to
    each picture. What is drawn comes from torch's global generator. With `drawn=False` items have nothing that is
    drawn (`wrong_images`, `inter_embed`), for a training that reads none of it.

    The photographs were decoded once (`data.cache`), so a batch is a few gathers, on the device that `to` has moved
    them to: with `DataLoader(dataset, ..., collate_fn=dataset.collate)` no worker processes are needed.

    Raises UserError where the file is missing or not in the layout.
    """

    def __init__(self, datasetFile, transform=None, split=0, drawn=True):
        super().__init__(datasetFile, split, SIZE)
        self.transform, self.drawn = transform, drawn

    def to(self, device):
        """Keep pictures (12 KB each) and embeddings (4 KB each) in the memory of `device`. Returns the dataset."""
        self.pictures = self.pictures.to(device)
        self.embeddings = None if self.embeddings is None else self.embeddings.to(device)
        return self

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """The items of a whole batch, gathered at once."""
        return GatheredItems(self.gather(indices))

    def gather(self, indices):
        """A batch: a dict as an item's, with a dimension for the batch in front, and `txt` a list."""
        captions = torch.as_tensor(indices, dtype=torch.long)
        photos = self.photo_of[captions]
        batch = {'right_images': self._images(photos), 'txt': [self.captions[i] for i in captions.tolist()]}
        if self.embeddings is not None:
            batch['right_embed'] = self._embeddings(captions)
        if self.drawn:
            batch['wrong_images'] = self._images(self.draw_other_class(photos))
        if self.drawn and self.embeddings is not None:
            batch['inter_embed'] = self._embeddings(torch.randint(len(self), captions.shape))
        return batch

    def _embeddings(self, captions):
        return self.embeddings.index_select(0, captions.to(self.embeddings.device, non_blocking=True))

    def _images(self, photos):
        # index_select copies whole pictures; pictures[photos] would go byte by byte and take 25 times as long.
        photos = photos.to(self.pictures.device, non_blocking=True)  # a GPU that is waited for in every step idles
        images = torch.empty((len(photos), *self.pictures.shape[1:]), device=self.pictures.device)
        chunk = len(photos) if images.is_cuda else CHUNK
        for some, places in zip(images.split(chunk), photos.split(chunk)):
            torch.sub(self.pictures.index_select(0, places), 127.5, out=some).div_(127.5)
        return images if self.transform is None else torch.stack([self.transform(image) for image in images])

    @staticmethod
    def collate(items):
        """A DataLoader's `collate_fn` that takes the gathered batch as it is, where the default one copies it."""
        return items.batch


class GatheredItems(Sequence):
    """The items of a batch, as views of it, for any `collate_fn`; `batch` is the whole, for one that needs no copy."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch['txt'])

    def __getitem__(self, place):
        return {name: values[place] for name, values in self.batch.items()}
