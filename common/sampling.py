"""Generate images reproducibly and in batches, and write them to files."""
import contextlib
import hashlib
import itertools
import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import torch
from PIL import PngImagePlugin
from tqdm import tqdm

from common import torch_errors
from common.errors import UserError
from common.files import atomic_write, convert_os_errors
from common.letters import CONTROL
from common.pictures import caption_sheet, grid, side_by_side, to_pil, to_pixels

GRID_IMAGES = 64      # images on a sheet without captions, and rows on a sheet with several sizes
SHEET_IMAGES = 256    # images on a sheet with captions
SHEET_COLUMNS = 8     # of a sheet without captions
MAX_QUEUED = 128      # images in the queue of the writing threads
COMPRESS_LEVEL = 2    # of a PNG: Pillow's default 6 saves a tenth of the bytes but takes three times as long
MAX_NAME_BYTES = 200  # of a name from a data file: disks allow 255, and size, sentence and extension are appended
SEED_STEP = 0x9E3779B97F4A7C15 % 2 ** 62  # 2^64 / golden ratio: its multiples never come close to each other
EXAMPLE_COLUMNS = 5   # images in a row of the grid of a photograph's captions


def fixed_batch(dataset, count):
    """Return a batch of up to `count` items spread over a data set, the same in every call.

    The random crops of the items do not change the state of PyTorch's generator, so that a run computes the same
    results with and without samples.
    """
    places = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed GPUs, too
        return torch.utils.data.default_collate([dataset[i] for i in places.tolist()])


@contextlib.contextmanager
def reproducible(net, device, seed):
    """Put `net` in evaluation mode without gradients, and seed PyTorch's generators, for the duration of the block."""
    was_training = net.training
    net.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            net.train(was_training)


def truncate(noise, truncation):
    """Convert standard normal `noise` to a normal distribution within [-truncation, truncation], if that is not None.

    Each number keeps its quantile, so that an image changes little with `truncation`. Source: the truncation trick of
    Brock et al., "Large Scale GAN Training for High Fidelity Natural Image Synthesis", ICLR 2019, section 3.1, which
    draws numbers beyond the limit again.
    """
    if truncation is None:
        return noise
    lowest = torch.special.ndtr(torch.tensor(-truncation, dtype=torch.double))
    quantile = torch.lerp(lowest, 1 - lowest, torch.special.ndtr(noise.double().cpu()))
    return torch.special.ndtri(quantile).clamp(-truncation, truncation).to(noise)


def seed_of_batch(seed, number):
    """Return the seed of batch `number` of a command with `--seed`: that seed for the first batch.

    Those of the others are far apart, so that two commands with neighboring seeds share no batch.
    """
    return (seed + number * SEED_STEP) % 2 ** 62 if number else seed


def in_batches(generate, embeddings, batch_size, seed, truncation=None, like=None):
    """Yield `generate(embeddings, seed, truncation)`, a list of images [B, 3, S, S] per size, for each batch.

    With `like`, the record of an image as `common.provenance` reads it, each of the embeddings gives one image, from
    the noise of that one. Raises UserError if the batch of that one does not fit into memory.
    """
    if like is None:
        for number, part in enumerate(embeddings.split(batch_size)):
            yield generate(part, seed_of_batch(seed, number), truncation)
        return
    for embedding in embeddings:  # a batch of the same size, as results are rounded differently in another
        try:
            images = generate(embedding.expand(like['batch'], -1), like['seed'], like['truncation'])
        except (RuntimeError, MemoryError) as error:
            if not (torch_errors.is_out_of_memory(error) or isinstance(error, torch.OutOfMemoryError)):
                raise
            raise UserError(f'--like {like["file"]}: was one of a batch of {like["batch"]:,} images, which has to be '
                            'generated again, and does not fit into the memory here') from error
        yield [of_size[like['row'], None] for of_size in images]


def write_images(folder, batches, captions, sizes=None):
    """Write every image as a PNG into a folder, and the first of them on a sheet; print the names and captions.

    `batches` yields pairs: a list of images [B, 3, S, S] in [-1, 1], small to large, and a list of B dicts that are
    stored in the PNGs, or None. The largest images are written as they arrive. With several sizes and a file name
    `sizes`, a sheet shows the first captions' images in all sizes, a row for each caption. Returns the folder. Raises
    CannotWrite.
    """
    # Those of a data file may have line breaks, and other control characters, which a terminal would obey.
    captions = [CONTROL.sub('\ufffd', ' '.join(caption.split())) for caption in captions]
    with atomic_write(os.path.join(folder, 'captions.txt')) as file:
        file.write(''.join(f'{number:03d}.png\t{caption}\n' for number, caption in enumerate(captions, 1)).encode())
    on_sheet, rows = [], []

    def images_to_write():
        number = 0
        for images, records in batches:
            if number < GRID_IMAGES:
                rows.append([of_size[:GRID_IMAGES - number].cpu() for of_size in images])
            for image, record in zip(to_pixels(images[-1]).cpu(), records or itertools.repeat(None)):
                number += 1
                print(f'  {number:03d}.png  {captions[number - 1]}')
                if number <= SHEET_IMAGES:
                    on_sheet.append(to_pil(image))
                yield os.path.join(folder, f'{number:03d}.png'), image, record

    save_images(images_to_write(), len(captions), quiet=True)
    save_sheet(caption_sheet(on_sheet, captions[:SHEET_IMAGES]), os.path.join(folder, 'sheet.png'))
    which = 'all' if len(captions) <= SHEET_IMAGES else f'the first {SHEET_IMAGES}'
    print(f'{which} images on one sheet: {os.path.join(folder, "sheet.png")}')
    if sizes and len(rows[0]) > 1:
        columns = [torch.cat(column) for column in zip(*rows)]
        save_sheet(side_by_side(columns, columns[-1].shape[-1]), os.path.join(folder, sizes))
        print(f'images in all sizes, small to large: {os.path.join(folder, sizes)}')
    return folder


def save_sheet(image, path):
    """Write a PIL image as a PNG; a link at `path` is replaced. Raises CannotWrite."""
    with atomic_write(path, follow_links=False) as file:
        image.save(file, 'PNG')


def write_samples(folder, generate, count, batch_size, seed):
    """Write `count` images generated without sentences as numbered PNGs, and the first of them on a sheet.

    `generate(size, seed)` returns images [size, 3, S, S] in [-1, 1]. Raises CannotWrite.
    """
    shown = []

    def images_to_write():
        number = 0
        for number_of_batch, start in enumerate(range(0, count, batch_size)):
            images = generate(min(batch_size, count - start), seed_of_batch(seed, number_of_batch))
            for image in to_pixels(images).cpu():
                number += 1
                if number <= GRID_IMAGES:
                    shown.append(image)
                yield os.path.join(folder, f'{number:05d}.png'), image

    save_images(images_to_write(), count)
    save_sheet(to_pil(grid(torch.stack(shown), min(SHEET_COLUMNS, len(shown)))), os.path.join(folder, 'sheet.png'))
    print(f'{count} images in {folder}, the first {len(shown)} on one sheet: '
          f'{os.path.join(folder, "sheet.png")}')


def write_strip(folder, images, captions):
    """Write images [N, 3, S, S] in [-1, 1], interpolated from the first caption to the last, side by side."""
    strip = os.path.join(folder, 'strip.png')
    save_sheet(to_pil(grid(images.cpu(), len(images))), strip)
    print(f'from "{captions[0]}" to "{captions[-1]}": {strip}')


def write_evaluation(folder, dataset, generate, batch_size, seed, example=False):
    """Generate an image for every caption of a `data.captioned_photographs` data set, with the authors' file names.

    Each is written to FOLDER/single_samples/valid/CLASS/NAME_S_sentenceK.png, where S is its size in pixels. With
    `example`, the images of a photograph's captions form one grid, FOLDER/super/valid/CLASS/NAME_S.png.
    `generate(embeddings, seed)` returns images [B, 3, S, S] in [-1, 1]. Raises CannotWrite, and UserError
    if two photographs would share their files.
    """
    _check_names_differ(dataset)
    folder = os.path.join(folder, 'super' if example else 'single_samples', 'valid')
    if os.path.isdir(folder):
        print(f'{folder}: already exists; images of the same name are replaced, others stay')
    images = _of_captions(dataset, generate, batch_size, seed)
    if example:
        save_images(_grids(dataset, images, folder), len(dataset.index.names))
    else:
        save_images(_singles(dataset, images, folder), len(dataset.captions))
    print(f'done: {folder}')


def _check_names_differ(dataset):
    photo_of_name = {}
    for caption, photo in enumerate(dataset.photo_of.tolist()):
        class_name, name, _ = map(_file_name, dataset.index.sentence(caption))
        if photo_of_name.setdefault((class_name, name), photo) != photo:
            raise UserError(f'{dataset.file}: two photographs of /{dataset.split} have the class {class_name} and the '
                            f'name {name}, so their images would overwrite each other; rename one of them')


def _of_captions(dataset, generate, batch_size, seed):
    """Yield (number of the caption, uint8 image [3, S, S]) for all captions, grouped by photograph."""
    order = torch.argsort(dataset.photo_of, stable=True)
    for number, captions in enumerate(order.split(batch_size)):
        images = generate(dataset.embeddings.index_select(0, captions), seed_of_batch(seed, number))
        yield from zip(captions.tolist(), to_pixels(images).cpu())


def _singles(dataset, images, folder):
    for caption, image in images:
        class_name, name, sentence = map(_file_name, dataset.index.sentence(caption))
        yield os.path.join(folder, class_name, f'{name}_{image.shape[-1]}_sentence{sentence}.png'), image


def _grids(dataset, images, folder):
    for _, group in groupby(images, lambda pair: dataset.index.photo_of[pair[0]]):
        captions, of_photograph = zip(*group)
        class_name, name, _ = map(_file_name, dataset.index.sentence(captions[0]))
        side = of_photograph[0].shape[-1]
        yield (os.path.join(folder, class_name, f'{name}_{side}.png'),
               grid(torch.stack(of_photograph), min(EXAMPLE_COLUMNS, len(of_photograph))))


def _file_name(text):
    """Return a name from a data file as a file name that leads to no other folder and is not too long."""
    text = text.encode('utf-8', 'replace').decode('utf-8')  # a lone surrogate cannot be in a file name
    name = re.sub(r'[\\/:*?"<>|\x00-\x1f]', '_', text).lstrip('.') or '_'
    if len(name.encode('utf-8')) <= MAX_NAME_BYTES:
        return name
    start = name.encode('utf-8')[:MAX_NAME_BYTES - 17].decode('utf-8', 'ignore')
    return f'{start}-{hashlib.sha256(name.encode("utf-8")).hexdigest()[:16]}'


def save_images(images, total, quiet=False):
    """Write PNGs in threads while the next images are generated.

    `images` yields (path, image as `to_pil` takes it) and perhaps a dict to store in the PNG; `total` is their number.
    With `quiet`, no progress bar is shown.
    """
    waiting = deque()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for item in tqdm(images, 'generating', total, unit=' images', disable=quiet or None):
            waiting.append(threads.submit(_save_image, *item))
            if len(waiting) > MAX_QUEUED:
                waiting.popleft().result()
        for written in waiting:
            written.result()


def _save_image(path, image, record=None):
    chunks = PngImagePlugin.PngInfo()
    for name, value in (record or {}).items():
        chunks.add_text(name, '' if value is None else str(value))
    with convert_os_errors(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f'{path}.partial-{os.getpid()}'  # an image of an earlier evaluation stays until it is replaced
        try:
            to_pil(image).save(partial, 'PNG', compress_level=COMPRESS_LEVEL, pnginfo=chunks)
            os.replace(partial, path)
        finally:
            if os.path.exists(partial):
                os.remove(partial)
