"""Captioned pictures at several sizes, cropped around the bird, as StackGAN++ prepares them.

Crops are cut and flipped where the frames are, on the CPU: they are half of the bytes that would go to a GPU, and all
frames of CUB-200-2011, 3.5 GB, would take the memory that small GPUs need. The rest is done there, a batch at once.
"""
import functools
import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info

from common import ranks, signals
from common.errors import UserError
from data import layout
from data.cache import load_frames
from data.captioned_photographs import CaptionedPhotographs
from data.pictures import BadPicture, read_picture
from data.seeded import SeededDataset, SeededSampler

SEMAPHORES = 3  # of a worker, for its queue
ASPECT = 20  # of the longer side to the shorter, at most, of what is cut from: a frame of 304 pixels has 5.5 MB then
DRAWS = 3  # random numbers that `crop` takes: where to cut, across and down, and whether to flip


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
        self.frames = load_frames(self.file, self.split, self.fingerprint, frame_side(self.sizes[-1]),
                                  lambda photo, jpeg: np.asarray(self._framed(photo, jpeg)))
        return self

    def __len__(self):
        return len(self.classes)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """The items of a whole batch, decoded in threads."""
        return CroppedItems(self.crops(indices), self.finish)

    def finish(self, batch, device='cpu'):
        """What `crops` gave, with pictures in the crops' place, on `device`."""
        return with_all_sizes(batch, self.sizes, device)

    def crops(self, indices):
        """A batch of items, but with a uint8 [B, S, S, 3] of the largest size in the place of lists of pictures."""
        photos = torch.as_tensor(indices, dtype=torch.long)
        captions = self._draw_caption(photos)
        batch = {'txt': [self.captions[i] for i in captions.tolist()],
                 'class': [self.classes[i] for i in photos.tolist()],
                 'name': [self.index.names[i] for i in photos.tolist()]}
        if self.embeddings is not None:
            batch['right_embed'] = self.embeddings.index_select(0, captions)
        batch['right_images'] = self._crops(photos)
        if self.has_wrong_images:
            batch['wrong_images'] = self._crops(self.draw_other_class(photos))
        return batch

    def _draw_caption(self, photos):
        """For each photograph, one of its captions."""
        place = (torch.rand(photos.shape, dtype=torch.float64) * self.caption_count[photos]).long()
        return self.by_photo[self.caption_start[photos] + place]

    def _crops(self, photos):
        """For each photograph a crop of its own, uint8 [B, S, S, 3]."""
        draws = torch.rand(len(photos), DRAWS, dtype=torch.float64).tolist()
        if self.frames is not None:
            return stack_crops([crop(self.frames[photo], self.sizes[-1], *draw)
                                for photo, draw in zip(photos.tolist(), draws)])
        jpegs = self.jpegs.read(photos.tolist())
        return stack_crops(in_threads(self._crop, photos.tolist(), jpegs, draws))

    def _crop(self, photo, jpeg, draws):
        return crop(np.asarray(self._framed(photo, jpeg)), self.sizes[-1], *draws)

    def _framed(self, photo, jpeg):
        try:
            bird = read_picture(jpeg, part=lambda size: crop_box(size, self.index.boxes[photo]))
            return frame(bird, self.sizes[-1])
        except BadPicture as error:
            raise layout.cannot_be_decoded(self.file, self.split, self.index.names[photo], error) from error


class CroppedItems(Sequence):
    """The items of a batch of crops, which are `finish`ed when an item is asked for. `batch` is the crops."""

    def __init__(self, batch, finish):
        self.batch, self.finish = batch, finish

    @cached_property
    def finished(self):
        return self.finish(self.batch)

    def __len__(self):
        return len(self.batch['right_images'])

    def __getitem__(self, place):
        item = {name: values[place] for name, values in self.finished.items() if not name.endswith('_images')}
        for name in self.finished.keys() - item.keys():
            images = self.finished[name]
            item[name] = [one[place] for one in images] if isinstance(images, list) else images[place]
        return item


class CropLoader(DataLoader):
    """A DataLoader whose workers only cut crops, a batch of which is finished at once, on `device`.

    Raises UserError where workers cannot be started, and what reading a batch raises.
    """

    def __init__(self, dataset, batch_size, device, sampler, **options):
        # A generator of its own, so that it does not draw from PyTorch's when it starts workers.
        super().__init__(SeededDataset(dataset), batch_size, sampler=SeededSampler(sampler), collate_fn=collate_crops,
                         generator=torch.Generator(), **options)
        self.finish, self.device = dataset.finish, device

    def __iter__(self):
        try:
            if self.num_workers and self._iterator is None:
                # What PyTorch is about to make, in /dev/shm: its own failure would leave a traceback of a destructor's.
                [multiprocessing.Lock() for _ in range(SEMAPHORES * (self.num_workers + 2))]
            batches = super().__iter__()
        except (OSError, RuntimeError) as error:
            raise UserError(f'--workers {self.num_workers}: cannot be started ({" ".join(str(error).split())[:200]}); '
                            'enlarge /dev/shm (Docker: --shm-size=1g) or the memory, or use --workers 0') from error
        return map(self._finished, batches)

    def _finished(self, batch):
        if isinstance(batch, UserError):
            raise batch
        return self.finish(batch, self.device)


def collate_crops(items):
    """The batch of `CroppedItems`, from a worker by way of its pipe; an error as it is."""
    if get_worker_info() is None or isinstance(items, UserError):
        return getattr(items, 'batch', items)
    return {name: PipedTensor(values) if torch.is_tensor(values) else values for name, values in items.batch.items()}


class PipedTensor:
    """A tensor that goes to another process in the pipe itself.

    PyTorch would put it into /dev/shm, of which Docker gives 64 MB: two of a StackGAN++'s batches for each of 4 workers
    are more, and where one does not fit, the main process waits for it for ever.
    """

    def __init__(self, tensor):
        self.tensor = tensor

    def __reduce__(self):
        return torch.from_numpy, (self.tensor.numpy(),)


def shuffled_batches(dataset, batch_size, workers, device):
    """A loader of this rank's share in whole batches, on `device`; a share smaller than a batch is one batch.

    What is left of an epoch after its whole batches is left out. `workers` are started once, for all epochs, and what
    they give is the same with any number of them.
    """
    sampler = ranks.sampler(dataset)
    workers = min(workers, os.cpu_count())  # more would only wait for each other
    return CropLoader(dataset, batch_size, device, sampler, num_workers=workers, persistent_workers=workers > 0,
                      pin_memory=device.type == 'cuda', drop_last=len(sampler) >= batch_size,
                      worker_init_fn=init_worker)


def init_worker(_=None):
    """For worker processes: a Ctrl-C, or a SIGTERM to all, is for the main process, which saves and then ends these.

    SIGTERM still ends a worker: that is how the main process does it when it fails. Where that is killed, they end by
    themselves, even if they are writing into a pipe that nobody reads.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, 'setpgrp'):
        os.setpgrp()
    signals.when_parent_ends(functools.partial(os._exit, 1))


def sizes_of(branches, base_size=64):
    """The sizes of the pictures in pixels, small to large, each twice the one before."""
    return [base_size * 2 ** i for i in range(branches)]


def crop_box(size, bbox):
    """(left, top, right, bottom) in whole pixels of the part of a photograph that shows the bird.

    A square of 1.5 times the longer side of `bbox` (x, y, width, height) around its center, clipped to the photograph's
    `size` (width, height), rounded as the StackGAN authors' code does. All of it where there is no box, or nothing
    of the photograph in it.
    """
    left, top, right, bottom = whole = (0, 0, *size)
    if bbox is None:
        return whole
    x, y, width, height = (int(number) for number in bbox)
    reach = int(0.75 * max(width, height))
    center_x, center_y = int((2 * x + width) / 2), int((2 * y + height) / 2)
    left, right = max(left, center_x - reach), min(right, center_x + reach)
    top, bottom = max(top, center_y - reach), min(bottom, center_y + reach)
    return (left, top, right, bottom) if left < right and top < bottom else whole


def frame_side(size):
    """The shorter side of what pictures of `size` are cut from, in pixels."""
    return size * 76 // 64


def frame(part, size):
    """What pictures of `size` are cut from: the part of a photograph to be shown, its shorter side 76/64 of that.

    Of one that is more than ASPECT times as long as wide, it is the middle.
    """
    width, height = part.size
    longest = ASPECT * min(part.size)
    if longest < max(part.size):
        across, down = max(0, width - longest) // 2, max(0, height - longest) // 2
        part = part.crop((across, down, width - across, height - down))
    scaled = [frame_side(size) * side // min(part.size) for side in part.size]
    return part.resize(scaled, Image.BILINEAR)


def crop(framed, size, across, down, flip):
    """One square, uint8 [size, size, 3], of a framed photograph, uint8 [H, W, 3].

    Numbers in [0, 1) say which: `across` and `down`, where between the first and the last place that it can be cut
    from, and `flip`, left for right from 0.5 on.
    """
    top, left = (int(draw * (side - size + 1)) for draw, side in zip((down, across), framed.shape))
    square = framed[top:top + size, left:left + size]
    return square[:, ::-1] if flip >= 0.5 else square


def stack_crops(crops):
    """Arrays [S, S, 3] to a tensor [B, S, S, 3]."""
    return torch.from_numpy(np.stack(crops))


def with_all_sizes(batch, sizes, device='cpu'):
    """A batch of crops, with lists of pictures in their place; its tensors on `device`."""
    batch = {name: values.to(device, non_blocking=True) if torch.is_tensor(values) else values
             for name, values in batch.items()}
    return batch | {name: all_sizes(batch[name], sizes) for name in batch if name.endswith('_images')}


def all_sizes(crops, sizes):
    """Crops, uint8 [B, S, S, 3], to a list of float32 [B, 3, S, S] in [-1, 1], one for each of `sizes`, S the last."""
    largest = crops.permute(0, 3, 1, 2)
    largest = largest.float() if crops.is_cuda else largest  # a GPU does not reduce bytes
    return [images.float().sub_(127.5).div_(127.5)
            for images in (*(reduce(largest, size) for size in sizes[:-1]), largest)]


def reduce(images, size):
    """Images [B, C, H, W] in [0, 255] to size x size pixels, as Pillow's bilinear filter does.

    Of uint8 the numbers are Pillow's; of float32 they are whole numbers, too, and differ by a rounding here and there.
    """
    return F.interpolate(images, (size, size), mode='bilinear', antialias=True).round()


def in_threads(function, *arguments):
    """`list(map(function, *arguments))`, in threads: Pillow decodes and resizes without Python's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(function, *arguments))
