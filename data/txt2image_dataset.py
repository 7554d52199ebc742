"""Captioned images of 64 x 64 pixels, prepared as in the chapter (section "GAN architecture and training")."""
from collections.abc import Sequence

import numpy as np
import torch

from data.captioned_photographs import CaptionedPhotographs
from data.pictures import read_picture

SIZE = 64
CHUNK = 16  # images that are normalized at once on a CPU, few enough to stay in its cache between passes


def preprocess(jpeg, size=SIZE):
    """Decode a photograph and resize it without keeping its proportions: uint8 [3, size, size].

    It is resized with Pillow's default filter; a gray photograph gets three equal channels. Raises BadPicture.
    """
    return np.asarray(read_picture(jpeg).resize((size, size))).transpose(2, 0, 1)


def normalize(pixels):
    """Convert uint8 images [..., 3, 64, 64] to float32 in [-1, 1]."""
    return (pixels - 127.5) / 127.5


class Text2ImageDataset(CaptionedPhotographs):
    """One item per caption of a split (0: train, 1: valid, 2: test) of an HDF5 file (layout: `data/layout.py`).

    An item is a dict:
        right_images  float32 [3, 64, 64] in [-1, 1], the image that the caption describes
        right_embed   float32 [D], the caption's embedding
        wrong_images  float32 [3, 64, 64] in [-1, 1], a random image of another class
        inter_embed   float32 [D], the embedding of a random caption, to interpolate with
        txt           str, the caption
    If the file has no embeddings, items have no `right_embed` and `inter_embed`. `transform`, if given, is applied to
    each image. With `drawn=False`, items have neither `wrong_images` nor `inter_embed`, for a training that does not
    use them. With `flip`, half of the images, by chance, are mirrored. With `pairs`, the second half of a batch repeats
    the captions of the first, each with another photograph of the same class, and wrong images are of the same class in
    both halves. Random draws come from torch's global generator.

    The photographs are decoded once, by `preprocess`, into a cache beside the file (`data/cache.py`). So a batch is a
    few gathers, on the device that `to` moves them to, and a DataLoader with `collate_fn=dataset.collate` needs no
    worker processes.

    Raises UserError if the file is missing or has another layout.
    """

    def __init__(self, datasetFile, transform=None, split=0, drawn=True, flip=False, pairs=False):
        super().__init__(datasetFile, split, SIZE, preprocess)
        self.transform, self.drawn, self.flip, self.pairs = transform, drawn, flip, pairs

    def to(self, device):
        """Move images (12 KB each) and embeddings (4 D bytes each) to the memory of `device`. Returns the data set."""
        self.pictures = self.pictures.to(device)
        self.embeddings = None if self.embeddings is None else self.embeddings.to(device)
        return self

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        photo = self.photo_of[index]
        item = {'right_images': self.image(photo), 'txt': self.captions[index]}
        if self.embeddings is not None:
            item['right_embed'] = self.embeddings[index]
        if self.drawn:
            item['wrong_images'] = self.image(self.draw_other_class(photo[None])[0])
        if self.drawn and self.embeddings is not None:
            item['inter_embed'] = self.embeddings[torch.randint(len(self), (1,))[0]]
        return item

    def image(self, photo):
        """Return a photograph: float32 [3, 64, 64] in [-1, 1]."""
        image = normalize(self.pictures[photo])
        image = image.flip(-1) if self.flip and torch.rand(()) < 0.5 else image
        return image if self.transform is None else self.transform(image)

    def photograph(self, photo):
        """Return a photograph as it is compared with generated images, uint8 [3, 64, 64], a NumPy array."""
        return self.pictures[photo].cpu().numpy()

    # --- the same for a whole batch at once, which is many times faster -----------------------------------------------

    def __getitems__(self, indices):
        return GatheredItems(self.gather(indices))

    @staticmethod
    def collate(items):
        """Return the gathered batch as it is (a `collate_fn`); PyTorch's default would copy it."""
        return items.batch

    def gather(self, indices):
        """Return the batch of these items: a dict like an item, with a batch dimension in front, and `txt` a list."""
        captions, half = torch.as_tensor(indices, dtype=torch.long), len(indices) // 2
        if self.pairs:
            captions = torch.cat([captions[:half], captions[:half], captions[2 * half:]])
        photos = self.photo_of[captions]
        if self.pairs:
            photos[half:2 * half] = self.draw_same_class(photos[:half])
        batch = {'right_images': self._images(photos), 'txt': [self.captions[i] for i in captions.tolist()]}
        if self.embeddings is not None:
            batch['right_embed'] = self._embeddings(captions)
        if self.drawn:
            wrong = self.draw_other_class(photos)
            if self.pairs:
                wrong[half:2 * half] = self.draw_same_class(wrong[:half])
            batch['wrong_images'] = self._images(wrong)
        if self.drawn and self.embeddings is not None:
            batch['inter_embed'] = self._embeddings(torch.randint(len(self), captions.shape))
        return batch

    def _embeddings(self, captions):
        return self.embeddings.index_select(0, captions.to(self.embeddings.device, non_blocking=True))

    def _images(self, photos):
        # index_select copies whole images; pictures[photos] copies single bytes and takes 25 times as long.
        photos = photos.to(self.pictures.device, non_blocking=True)  # waiting for a GPU would leave it idle
        images = torch.empty((len(photos), *self.pictures.shape[1:]), device=self.pictures.device)
        chunk = len(photos) if images.is_cuda else CHUNK
        for some, places in zip(images.split(chunk), photos.split(chunk)):
            torch.sub(self.pictures.index_select(0, places), 127.5, out=some).div_(127.5)
        if self.flip:
            mirrored = (torch.rand(len(images)) < 0.5).nonzero()[:, 0].to(images.device, non_blocking=True)
            images[mirrored] = images[mirrored].flip(-1)
        return images if self.transform is None else torch.stack([self.transform(image) for image in images])


class GatheredItems(Sequence):
    """The items of a batch, as views for any `collate_fn`; one that avoids the copy can take the whole `batch`."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch['txt'])

    def __getitem__(self, place):
        return {name: values[place] for name, values in self.batch.items()}
