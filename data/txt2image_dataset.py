"""Captioned pictures at 64 x 64, as the chapter's text-to-image section prepares them."""
import torch

from data.captioned_photographs import CaptionedPhotographs

SIZE = 64


class Text2ImageDataset(CaptionedPhotographs):
    """An item per caption of a split (0: train, 1: valid, 2: test) of an HDF5 file in `data.layout`'s layout.

    An item is a dict:
        right_images  float32 [3, 64, 64] in [-1, 1], the picture that the caption describes
        right_embed   float32 [1024], the caption's embedding
        wrong_images  float32 [3, 64, 64] in [-1, 1], a picture of another class, drawn anew each time
        inter_embed   float32 [1024], the embedding of a caption drawn at random, to interpolate with
        txt           str, the caption
    A file without embeddings gives items without `right_embed` and `inter_embed`. `transform`, if given, is applied to
    each picture. What is drawn comes from torch's global generator.

    The photographs were decoded once (`data.cache`), so a batch is five gathers: with
    `DataLoader(dataset, ..., collate_fn=dataset.collate)` no worker processes are needed.

    Raises UserError where the file is missing or not in the layout.
    """

    def __init__(self, datasetFile, transform=None, split=0):
        super().__init__(datasetFile, split, SIZE)
        self.transform = transform

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
        batch = {'right_images': self._images(photos), 'wrong_images': self._images(self.draw_other_class(photos)),
                 'txt': [self.captions[i] for i in captions.tolist()]}
        if self.embeddings is not None:
            batch['right_embed'] = self.embeddings.index_select(0, captions)
            batch['inter_embed'] = self.embeddings.index_select(0, torch.randint(len(self), captions.shape))
        return batch

    def _images(self, photos):
        # index_select copies whole pictures; pictures[photos] would go byte by byte and take 25 times as long.
        images = self.pictures.index_select(0, photos).float().sub_(127.5).div_(127.5)
        return images if self.transform is None else torch.stack([self.transform(image) for image in images])

    @staticmethod
    def collate(items):
        """A DataLoader's `collate_fn` that takes the gathered batch as it is, where the default one copies it."""
        return items.batch


class GatheredItems(list):
    """The items of a batch, as views of it, for any `collate_fn`; `batch` is the whole, for one that needs no copy."""

    def __init__(self, batch):
        super().__init__(dict(zip(batch, values)) for values in zip(*batch.values()))
        self.batch = batch
