"""Load captioned images at several sizes, cropped around the bird, as StackGAN++ prepares them.

Images are cropped and flipped on the CPU: this halves the bytes to copy to a GPU, and all frames of CUB-200-2011, 3.5
GB, would take up memory that a small GPU needs. The rest is done on the device, for a whole batch at once.
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

SEMAPHORES = 3  # of the queue of each worker
ASPECT = 20  # maximum of longer over shorter side of a frame, which keeps one of 304 pixels below 5.5 MB
DRAWS = 3  # random numbers that `crop` takes: horizontal and vertical position, and whether to flip


class MultiscaleDataset(CaptionedPhotographs):
    """One item per photograph of a split (0: train, 1: valid, 2: test) of an HDF5 file in the layout of `data.layout`.

    An item is a dict:
        right_images  list of float32 [3, S, S] in [-1, 1], small to large: S = base_size * 2 ** i, i < branches
        wrong_images  the same for a random photograph of another class
        right_embed   float32 [D], the embedding of a random caption of the photograph
        txt           str, that caption
        class, name   str, of the photograph
    If the file has no embeddings, items have no `right_embed`. Every access draws new random crops, flips, captions and
    wrong images from torch's global generator, in the main thread, so that the same state gives the same items.
    To read captions without images, use `embeddings[i]`, `captions[i]` and `index.sentence(i)`.

    Raises UserError if the file is missing or not in this layout, or if a photograph cannot be decoded.
    """

    def __init__(self, datasetFile, split=0, branches=3, base_size=64):
        super().__init__(datasetFile, split)
        self.sizes, self.frames = sizes_of(branches, base_size), None
        self.by_photo = torch.argsort(self.photo_of, stable=True)
        self.caption_count = torch.bincount(self.photo_of)
        self.caption_start = self.caption_count.cumsum(0) - self.caption_count

    def cached(self):
        """Decode and resize every photograph once, into a file beside the HDF5 file (about 0.4 MB each at 256 pixels).

        Items do not change. Returns the data set. Raises UserError if the file cannot be written or a photograph
        decoded.
        """
        self.frames = load_frames(self.file, self.split, self.fingerprint, frame_side(self.sizes[-1]),
                                  lambda photo, jpeg: np.asarray(self._framed(photo, jpeg)))
        return self

    def __len__(self):
        return len(self.classes)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """Return the items of a whole batch, decoded in threads."""
        return CroppedItems(self.crops(indices), self.finish)

    def finish(self, batch, device='cpu'):
        """Convert the crops of a batch from `crops` to lists of images, on `device`."""
        return with_all_sizes(batch, self.sizes, device)

    def crops(self, indices):
        """Return a batch of items with crops, uint8 [B, S, S, 3] of the largest size, in place of lists of images."""
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

    def photograph(self, photo):
        """Return a photograph as it is compared with generated images: its middle crop, uint8 [3, S, S], not flipped.

        It is a NumPy array of the largest size.
        """
        middle = crop(np.asarray(self._framed(photo, *self.jpegs.read([photo]))), self.sizes[-1], 0.5, 0.5, 0)
        return np.ascontiguousarray(middle.transpose(2, 0, 1))

    def _draw_caption(self, photos):
        """Return the number of a random caption for each photograph."""
        place = (torch.rand(photos.shape, dtype=torch.float64) * self.caption_count[photos]).long()
        return self.by_photo[self.caption_start[photos] + place]

    def _crops(self, photos):
        """Return a random crop of each photograph, uint8 [B, S, S, 3]."""
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
    """The items of `batch`, a batch of crops, which `finish` converts when the first item is accessed."""

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
    """A DataLoader whose workers return batches of crops, which the main process converts to images on `device`.

    Raises UserError if workers cannot be started, and what reading a batch raises.
    """

    def __init__(self, dataset, batch_size, device, sampler, **options):
        # With its own generator, it does not draw from PyTorch's when it starts workers.
        super().__init__(SeededDataset(dataset), batch_size, sampler=SeededSampler(sampler), collate_fn=collate_crops,
                         generator=torch.Generator(), **options)
        self.finish, self.device = dataset.finish, device

    def __iter__(self):
        try:
            if self.num_workers and self._iterator is None:
                # Make the semaphores that PyTorch is about to make: if it fails, a destructor prints a traceback.
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
    """Return the batch of `CroppedItems` (a `collate_fn`), in workers as `PipedTensor`s; return an error as it is."""
    if get_worker_info() is None or isinstance(items, UserError):
        return getattr(items, 'batch', items)
    return {name: PipedTensor(values) if torch.is_tensor(values) else values for name, values in items.batch.items()}


class PipedTensor:
    """A tensor that is sent to another process through the pipe itself.

    PyTorch would use /dev/shm, which has 64 MB in Docker. Two StackGAN++ batches for each of 4 workers are larger, and
    if one does not fit, the main process waits for it forever.
    """

    def __init__(self, tensor):
        self.tensor = tensor

    def __reduce__(self):
        return torch.from_numpy, (self.tensor.numpy(),)


def shuffled_batches(dataset, batch_size, workers, device):
    """Return a loader of shuffled batches of this rank's share, on `device`.

    An incomplete last batch is dropped, unless the share is smaller than a batch. Workers are started once for all
    epochs; the batches do not depend on their number. Raises UserError as `CropLoader` does.
    """
    sampler = ranks.sampler(dataset)
    workers = min(workers, os.cpu_count())
    return CropLoader(dataset, batch_size, device, sampler, num_workers=workers, persistent_workers=workers > 0,
                      pin_memory=device.type == 'cuda', drop_last=len(sampler) >= batch_size,
                      worker_init_fn=init_worker)


def init_worker(_=None):
    """Let a worker process ignore Ctrl-C and signals to the process group (a `worker_init_fn`).

    They are for the main process, which saves and then ends its workers; it uses SIGTERM for that if it fails. If the
    main process is killed, workers end by themselves, even while writing into a pipe that nobody reads.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, 'setpgrp'):
        os.setpgrp()
    signals.when_parent_ends(functools.partial(os._exit, 1))


def sizes_of(branches, base_size=64):
    """Return the sizes of the images in pixels, small to large, each twice the one before."""
    return [base_size * 2 ** i for i in range(branches)]


def crop_box(size, bbox):
    """Return (left, top, right, bottom) of the part of a photograph that shows the bird, in whole pixels.

    This is a square of 1.5 times the longer side of `bbox` (x, y, width, height) around its center, clipped to the
    photograph's `size` (width, height) and rounded as in the StackGAN authors' code. It is the whole photograph if
    there is no box or the box lies outside.
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
    """Return the shorter side, in pixels, of the frame that images of `size` are cropped from."""
    return size * 76 // 64


def frame(part, size):
    """Resize a part of a photograph to the frame that images of `size` are cropped from: shorter side 76/64 of `size`.

    If its longer side is more than ASPECT times the shorter, only its middle is used.
    """
    width, height = part.size
    longest = ASPECT * min(part.size)
    if longest < max(part.size):
        across, down = max(0, width - longest) // 2, max(0, height - longest) // 2
        part = part.crop((across, down, width - across, height - down))
    scaled = [frame_side(size) * side // min(part.size) for side in part.size]
    return part.resize(scaled, Image.BILINEAR)


def crop(framed, size, across, down, flip):
    """Return a square crop, uint8 [size, size, 3], of a frame, uint8 [H, W, 3].

    `across` and `down`, in [0, 1), choose the position. The crop is flipped from left to right if `flip` is at least
    0.5.
    """
    top, left = (int(draw * (side - size + 1)) for draw, side in zip((down, across), framed.shape))
    square = framed[top:top + size, left:left + size]
    return square[:, ::-1] if flip >= 0.5 else square


def stack_crops(crops):
    """Stack arrays [S, S, 3] to a tensor [B, S, S, 3]."""
    return torch.from_numpy(np.stack(crops))


def with_all_sizes(batch, sizes, device='cpu'):
    """Replace the crops of a batch by lists of images in all `sizes`, and move its tensors to `device`."""
    batch = {name: values.to(device, non_blocking=True) if torch.is_tensor(values) else values
             for name, values in batch.items()}
    return batch | {name: all_sizes(batch[name], sizes) for name in batch if name.endswith('_images')}


def all_sizes(crops, sizes):
    """Convert crops, uint8 [B, S, S, 3], to a list of float32 [B, 3, size, size] in [-1, 1] for all `sizes`."""
    largest = crops.permute(0, 3, 1, 2)
    largest = largest.float() if crops.is_cuda else largest  # on a GPU, PyTorch cannot resize uint8
    return [images.float().sub_(127.5).div_(127.5)
            for images in (*(reduce(largest, size) for size in sizes[:-1]), largest)]


def reduce(images, size):
    """Resize images [B, C, H, W] in [0, 255] to size x size pixels as Pillow's bilinear filter does.

    uint8 input gives Pillow's numbers; float32 input gives whole numbers that differ here and there by a rounding.
    """
    return F.interpolate(images, (size, size), mode='bilinear', antialias=True).round()


def in_threads(function, *arguments):
    """Return `list(map(function, *arguments))`, computed in threads: Pillow releases Python's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(function, *arguments))
