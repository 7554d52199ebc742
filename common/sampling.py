"""Images that a model generates: reproducibly, in batches, and as files."""
import contextlib
import hashlib
import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import torch
from tqdm import tqdm

from common.errors import UserError
from common.files import atomic_write, explained
from common.pictures import caption_sheet, grid, side_by_side, to_pil, to_pixels

SHOWN = 64           # images on the sheet of those without sentences, and rows on one of several sizes
ON_SHEET = 256       # images on a sheet with their sentences
SHEET_COLUMNS = 8    # of that sheet
AHEAD = 128          # images that wait to be written before generating waits, too
COMPRESSION = 2      # of these: Pillow's 6 makes files a tenth smaller in three times the time
LONGEST_NAME = 200   # bytes of a name out of a data file; disks take 255, with size, sentence and ending behind it
EXAMPLE_COLUMNS = 5  # captions in a row of a photograph's grid


def same_items(dataset, count):
    """Return a batch of up to `count` items from all over a data set, always the same ones.

    Random crops of items come from PyTorch's generator, whose state is as before afterwards: a run with samples must
    compute what one without them does.
    """
    places = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed GPUs, too
        return torch.utils.data.default_collate([dataset[i] for i in places.tolist()])


@contextlib.contextmanager
def reproducible(net, device, seed):
    """`net` in evaluation mode without gradients, and PyTorch's generators at `seed`; afterwards all as before."""
    was_training = net.training
    net.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            net.train(was_training)


def in_batches(generate, embeddings, batch_size, seed):
    """Yield what `generate(embeddings, seed)` returns, lists of images [B, 3, S, S], for one batch after the other."""
    for number, part in enumerate(embeddings.split(batch_size)):
        yield generate(part, seed + number)


def write_pictures(folder, batches, captions, sizes=None):
    """Write every image as a PNG into a folder, and the first of them on a sheet; print the captions with the names.

    `batches` yields lists of images [B, 3, S, S] in [-1, 1], from small to large, of which the largest are written as
    they come. With several sizes, the sheet named `sizes` has a row of them for each of the first sentences.
    """
    with atomic_write(os.path.join(folder, 'captions.txt')) as file:
        file.write(''.join(f'{number:03d}.png\t{caption}\n' for number, caption in enumerate(captions, 1)).encode())
    on_sheet, rows = [], []

    def pictures():
        number = 0
        for images in batches:
            if number < SHOWN:
                rows.append([of_size[:SHOWN - number].cpu() for of_size in images])
            for image in to_pixels(images[-1]).cpu():
                number += 1
                print(f'  {number:03d}.png  {captions[number - 1]}')
                if number <= ON_SHEET:
                    on_sheet.append(to_pil(image))
                yield os.path.join(folder, f'{number:03d}.png'), image

    save_pictures(pictures(), len(captions), quiet=True)
    save_sheet(caption_sheet(on_sheet, captions[:ON_SHEET]), os.path.join(folder, 'sheet.png'))
    is_all = 'all' if len(captions) <= ON_SHEET else f'the first {ON_SHEET}'
    print(f'{is_all} on one sheet: {os.path.join(folder, "sheet.png")}')
    if sizes and len(rows[0]) > 1:
        columns = [torch.cat(column) for column in zip(*rows)]
        save_sheet(side_by_side(columns, columns[-1].shape[-1]), os.path.join(folder, sizes))
        print(f'small beside large: {os.path.join(folder, sizes)}')
    return folder


def save_sheet(picture, path):
    """Write a PIL image as a PNG. Raises CannotWrite."""
    with atomic_write(path) as file:
        picture.save(file, 'PNG')


def write_samples(folder, generate, count, batch_size, seed):
    """Write `count` images without sentences as numbered PNGs into a folder, and the first of them on a sheet.

    `generate(size, seed)` returns a batch of images [size, 3, S, S] in [-1, 1].
    """
    shown = []

    def pictures():
        number = 0
        for number_of_batch, start in enumerate(range(0, count, batch_size)):
            for image in to_pixels(generate(min(batch_size, count - start), seed + number_of_batch)).cpu():
                number += 1
                if number <= SHOWN:
                    shown.append(image)
                yield os.path.join(folder, f'{number:05d}.png'), image

    save_pictures(pictures(), count)
    save_sheet(to_pil(grid(torch.stack(shown), min(SHEET_COLUMNS, len(shown)))), os.path.join(folder, 'sheet.png'))
    print(f'{count} images in {folder}, the first {len(shown)} on one sheet: '
          f'{os.path.join(folder, "sheet.png")}')


def write_strip(folder, images, captions):
    """Write images [N, 3, S, S] in [-1, 1] side by side into a folder, from the first caption's to the last one's."""
    strip = os.path.join(folder, 'strip.png')
    save_sheet(to_pil(grid(images.cpu(), len(images))), strip)
    print(f'from "{captions[0]}" to "{captions[-1]}": {strip}')


def write_evaluation(folder, dataset, generate, batch_size, seed, example=False):
    """Write an image for every caption of `dataset` (`data.captioned_photographs`), named as the authors name them.

    They go to FOLDER/single_samples/valid/CLASS/NAME_S_sentenceK.png, where S is their size in pixels; with `example`,
    those of a photograph's captions are on one grid, FOLDER/super/valid/CLASS/NAME_S.png. `generate(embeddings, seed)`
    returns a batch of images [B, 3, S, S] in [-1, 1]. Raises UserError where two photographs would share their files.
    """
    _check_names_differ(dataset)
    folder = os.path.join(folder, 'super' if example else 'single_samples', 'valid')
    if os.path.isdir(folder):
        print(f'{folder}: exists; images of the same name are replaced, others stay')
    images = _of_captions(dataset, generate, batch_size, seed)
    if example:
        save_pictures(_grids(dataset, images, folder), len(dataset.index.names))
    else:
        save_pictures(_singles(dataset, images, folder), len(dataset.captions))
    print(f'done: {folder}')


def _check_names_differ(dataset):
    photo_of_name = {}
    for caption, photo in enumerate(dataset.photo_of.tolist()):
        class_name, name, _ = map(_file_name, dataset.index.sentence(caption))
        if photo_of_name.setdefault((class_name, name), photo) != photo:
            raise UserError(f'{dataset.file}: two photographs of /{dataset.split} have the class {class_name} and the '
                            f'name {name}, and so would the files of their images; give each a name of its own')


def _of_captions(dataset, generate, batch_size, seed):
    """Yield (number of the caption, image as uint8) for all captions, those of a photograph one after the other."""
    order = torch.argsort(dataset.photo_of, stable=True)
    for number, captions in enumerate(order.split(batch_size), seed):
        images = generate(dataset.embeddings.index_select(0, captions), number)
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
    """Return a name from a data file with nothing in it that leads to another folder, and not too long for a disk."""
    text = text.encode('utf-8', 'replace').decode('utf-8')  # half a character, as of UTF-16, is none in a file's name
    name = re.sub(r'[\\/:*?"<>|\x00-\x1f]', '_', text).lstrip('.') or '_'
    if len(name.encode('utf-8')) <= LONGEST_NAME:
        return name
    start = name.encode('utf-8')[:LONGEST_NAME - 17].decode('utf-8', 'ignore')
    return f'{start}-{hashlib.sha256(name.encode("utf-8")).hexdigest()[:16]}'


def save_pictures(pictures, total, quiet=False):
    """Write PNGs in threads while the next are generated: `pictures` yields (path, image as `to_pil` takes it).

    With `quiet`, no progress bar is shown.
    """
    waiting = deque()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for path, image in tqdm(pictures, 'generating', total, unit=' images', disable=quiet or None):
            waiting.append(threads.submit(_save_picture, path, image))
            if len(waiting) > AHEAD:
                waiting.popleft().result()
        for written in waiting:
            written.result()


def _save_picture(path, image):
    with explained(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f'{path}.partial-{os.getpid()}'  # what another evaluation has left here stays until it is replaced
        try:
            to_pil(image).save(partial, 'PNG', compress_level=COMPRESSION)
            os.replace(partial, path)
        finally:
            if os.path.exists(partial):
                os.remove(partial)
