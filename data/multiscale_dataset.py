"""Captioned pictures at several sizes, cropped around the bird, as StackGAN++ prepares them."""
import io
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from common import ranks
from common.errors import UserError
from data import layout
from data.cache import load_frames
from data.captioned_photographs import CaptionedPhotographs

DRAWS = 3  # random numbers that `views` takes: where to cut, across and down, and whether to flip


class MultiscaleDataset(CaptionedPhotographs):
    """An item per photograph of a split (0: train, 1: valid, 2: test) of an HDF5 file in `data.layout`'s layout.

    An item is a dict:
        right_images  list of float32 [3, S, S] in [-1, 1], small to large: S = base_size * 2 ** i, i < branches
        wrong_images  the same of a photograph of another class, drawn, cut and flipped anew each time
        right_embed   float32 [1024], the embedding of one of the photograph's captions, drawn anew each time
        txt           str, that caption
        class, name   str, of the photograph
    A file without embeddings gives items without `right_embed`. What is drawn comes from torch's global generator, and
    before any thread decodes, so that the same state gives the same items.

    To go through all captions without pictures: `embeddings[i]`, `captions[i]`, `index.sentence(i)`.

    Raises UserError where the file is missing or not in the layout, and where a photograph cannot be decoded.
    """

    def __init__(self, datasetFile, split=0, branches=3, base_size=64):
        super().__init__(datasetFile, split)
        self.sizes, self.frames = sizes_of(branches, base_size), None
        self.by_photo = torch.argsort(self.photo_of, stable=True)
        self.caption_count = torch.bincount(self.photo_of)
        self.caption_start = self.caption_count.cumsum(0) - self.caption_count

    def cached(self):
        """Decode and resize every photograph once, into a file beside the HDF5 file (some 0.4 MB each at 256 pixels).

        Items stay the same. Returns the dataset. Raises UserError where the file cannot be written or one be decoded.
        """
        self.frames = load_frames(self.file, self.split, self.index, frame_side(self.sizes[-1]),
                                  lambda photo, jpeg: np.asarray(self._framed(photo, jpeg)))
        return self

    def __len__(self):
        return len(self.classes)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """The items of a whole batch, decoded in threads."""
        photos = torch.as_tensor(indices, dtype=torch.long)
        items = self._captioned(photos)
        right, wrong = self._views(photos), self._views(self.draw_other_class(photos))
        return [{'right_images': right[i], 'wrong_images': wrong[i], **item} for i, item in enumerate(items)]

    def _captioned(self, photos):
        """For each photograph an item without pictures, with one of its captions."""
        captions = self._draw_caption(photos)
        items = [{'txt': self.captions[caption], 'class': self.classes[photo], 'name': self.index.names[photo]}
                 for photo, caption in zip(photos.tolist(), captions.tolist())]
        if self.embeddings is not None:
            for item, embedding in zip(items, self.embeddings.index_select(0, captions)):
                item['right_embed'] = embedding
        return items

    def _draw_caption(self, photos):
        """For each photograph, one of its captions."""
        place = (torch.rand(photos.shape, dtype=torch.float64) * self.caption_count[photos]).long()
        return self.by_photo[self.caption_start[photos] + place]

    def _views(self, photos):
        """For each photograph the list of its pictures, with a cut and a flip of its own."""
        draws = torch.rand(len(photos), DRAWS, dtype=torch.float64).tolist()
        if self.frames is not None:
            return in_threads(self._view_of_cached, photos.tolist(), draws)
        with layout.open_file(self.file) as file:  # opened for each batch: an HDF5 handle does not survive a fork
            jpegs = [layout.read_jpeg(file, self.split, self.index.img_keys[photo]) for photo in photos]
        return in_threads(self._view, photos.tolist(), jpegs, draws)

    def _view(self, photo, jpeg, draws):
        return views(self._framed(photo, jpeg), self.sizes, *draws)

    def _view_of_cached(self, photo, draws):
        return views(Image.fromarray(self.frames[photo]), self.sizes, *draws)

    def _framed(self, photo, jpeg):
        try:
            with Image.open(io.BytesIO(jpeg)) as photograph:
                return frame(photograph, self.sizes[-1], self.index.boxes[photo])
        except OSError as error:
            raise UserError(f'{self.file}: the photograph {self.index.names[photo]} of /{self.split} cannot be decoded '
                            f'({error}); make the file again without it: {layout.how_to_prepare(self.file)}') from error


def shuffled_batches(dataset, batch_size, workers, device):
    """A DataLoader of whole batches of this rank's share; one smaller than a batch is a batch of its own."""
    sampler = ranks.sampler(dataset)
    return DataLoader(dataset, batch_size, sampler=sampler, num_workers=workers, pin_memory=device.type == 'cuda',
                      drop_last=len(sampler) >= batch_size, worker_init_fn=leave_the_group)


def leave_the_group(_=None):
    """For worker processes: a Ctrl-C, or a SIGTERM to all, is for the main process, which saves and then ends these.

    SIGTERM still ends a worker: that is how the main process does it when it fails.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, 'setpgrp'):
        os.setpgrp()


def sizes_of(branches, base_size=64):
    """The sizes of the pictures in pixels, small to large, each twice the one before."""
    return [base_size * 2 ** i for i in range(branches)]


def crop_box(size, bbox):
    """(left, top, right, bottom) in whole pixels of the part of a photograph that shows the bird.

    A square of 1.5 times the longer side of `bbox` (x, y, width, height) around its centre, clipped to the photograph's
    `size` (width, height), rounded as the StackGAN authors' code does. All of it where there is no box, or nothing
    of the photograph in it.
    """
    left, top, right, bottom = whole = (0, 0, *size)
    if bbox is None:
        return whole
    x, y, width, height = (int(number) for number in bbox)
    reach = int(0.75 * max(width, height))
    centre_x, centre_y = int((2 * x + width) / 2), int((2 * y + height) / 2)
    left, right = max(left, centre_x - reach), min(right, centre_x + reach)
    top, bottom = max(top, centre_y - reach), min(bottom, centre_y + reach)
    return (left, top, right, bottom) if left < right and top < bottom else whole


def frame_side(size):
    """The shorter side of what pictures of `size` are cut from, in pixels."""
    return size * 76 // 64


def frame(photograph, size, bbox=None):
    """What pictures of `size` are cut from: the bird's part of a PIL image, in RGB, its shorter side 76/64 of that."""
    part = photograph.crop(crop_box(photograph.size, bbox)).convert('RGB')
    scaled = [frame_side(size) * side // min(part.size) for side in part.size]
    return part.resize(scaled, Image.BILINEAR)


def views(framed, sizes, across, down, flip):
    """One square cut out of a framed photograph, as a list of float32 [3, S, S] in [-1, 1], one for each of `sizes`.

    Numbers in [0, 1) say which: `across` and `down`, where between the first and the last place that it can be cut
    from, and `flip`, left for right from 0.5 on. The largest size is last; the others are reduced from that picture.
    """
    left, top = (int(draw * (side - sizes[-1] + 1)) for draw, side in zip((across, down), framed.size))
    largest = framed.crop((left, top, left + sizes[-1], top + sizes[-1]))
    if flip >= 0.5:
        largest = largest.transpose(Image.FLIP_LEFT_RIGHT)
    smaller = [largest.resize((size, size), Image.BILINEAR) for size in sizes[:-1]]
    return [_to_tensor(picture) for picture in (*smaller, largest)]


def _to_tensor(picture):
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    return pixels.float().sub_(127.5).div_(127.5)


def in_threads(function, *arguments):
    """`list(map(function, *arguments))`, in threads: Pillow decodes and resizes without Python's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(function, *arguments))
