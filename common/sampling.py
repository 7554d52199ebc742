"""What a model draws, again and again the same, and as files."""
import contextlib
import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import torch
from tqdm import tqdm

from common import memory, run
from common.errors import UserError
from common.pictures import caption_sheet, grid, side_by_side, to_pil, to_pixels

SHOWN = 64           # pictures on the sheet of a run that draws without sentences
SHEET_COLUMNS = 8    # of that sheet
AHEAD = 128          # pictures that wait to be written before drawing waits too
COMPRESSION = 2      # of these: Pillow's 6 makes files a tenth smaller in three times the time
EXAMPLE_COLUMNS = 5  # captions in a row of a photograph's grid


def same_items(dataset, count):
    """A batch of up to `count` items from all over a data set, always the same, without drawing for anybody else.

    What items draw comes from PyTorch's generator, and a resumed run must find that as one without samples does.
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


def generate_all(model, embeddings, options):
    """As `model.generate`, a list of the pictures of every size, for as many embeddings as there are."""
    parts = [[images.cpu() for images in model.generate(part, seed)]
             for seed, part in enumerate(embeddings.split(options.batch_size), options.seed)]
    return [torch.cat(images) for images in zip(*parts)]


def write_pictures(options, kind, images, captions):
    """Every picture as a PNG and all on one sheet, in a new folder; the captions are printed beside the names.

    Returns the folder.
    """
    folder = run.new_run(options.out_dir, kind, vars(options))
    pictures = [to_pil(image) for image in images]
    for number, (picture, caption) in enumerate(zip(pictures, captions), 1):
        picture.save(os.path.join(folder, f'{number:03d}.png'))
        print(f'  {number:03d}.png  {caption}')
    with open(os.path.join(folder, 'captions.txt'), 'w', encoding='utf-8') as file:
        file.write(''.join(f'{number:03d}.png\t{caption}\n' for number, caption in enumerate(captions, 1)))
    caption_sheet(pictures, captions).save(os.path.join(folder, 'sheet.png'))
    print(f'all on one sheet: {os.path.join(folder, "sheet.png")}')
    return folder


def write_sizes(folder, name, images):
    """The sheet folder/NAME: a row of every sentence's pictures from `images`, as of `generate_all`, at one size."""
    sheet = os.path.join(folder, name)
    side_by_side(images, images[-1].shape[-1]).save(sheet)
    print(f'small beside large: {sheet}')


def write_samples(options, count, draw):
    """`count` pictures without sentences, as numbered PNGs and the first on one sheet, in a new folder.

    `draw(size, seed)` gives a batch of pictures [size, 3, S, S] in [-1, 1].
    """
    folder, shown = run.new_run(options.out_dir, 'sample', vars(options)), []

    def pictures():
        number = 0
        for seed, start in enumerate(range(0, count, options.batch_size), options.seed):
            for image in to_pixels(draw(min(options.batch_size, count - start), seed)).cpu():
                number += 1
                if number <= SHOWN:
                    shown.append(image)
                yield os.path.join(folder, f'{number:05d}.png'), image

    save_pictures(pictures(), count)
    to_pil(grid(torch.stack(shown), min(SHEET_COLUMNS, len(shown)))).save(os.path.join(folder, 'sheet.png'))
    print(f'{count} pictures in {folder}, the first {len(shown)} on one sheet: '
          f'{os.path.join(folder, "sheet.png")}')


def write_strip(options, images, captions):
    """Pictures [N, 3, S, S] in [-1, 1] side by side, from the first caption's to the last one's, in a new folder."""
    strip = os.path.join(run.new_run(options.out_dir, 'interpolate', vars(options)), 'strip.png')
    to_pil(grid(images.cpu(), len(images))).save(strip)
    print(f'from "{captions[0]}" to "{captions[-1]}": {strip}')


def write_evaluation(options, dataset, draw, checkpoint, count, example=False):
    """A picture for every caption of `dataset` (`data.captioned_photographs`), as the authors' evaluation names them.

    They go to COUNT/single_samples/valid/CLASS/NAME_S_sentenceK.png beside the file `checkpoint`, S is their size in
    pixels; with `example`, those of a photograph's captions are on one grid, COUNT/super/valid/CLASS/NAME_S.png.
    `draw(embeddings, seed)` gives a batch of pictures [B, 3, S, S] in [-1, 1].
    """
    memory.keep_what_is_freed()
    print(f'{checkpoint} draws {len(dataset.captions)} captions of /{dataset.split}', flush=True)
    folder = os.path.join(os.path.dirname(checkpoint), count, 'super' if example else 'single_samples', 'valid')
    drawn = _drawn(dataset, draw, options.batch_size, options.seed)
    if example:
        save_pictures(_grids(dataset, drawn, folder), len(dataset.index.names))
    else:
        save_pictures(_singles(dataset, drawn, folder), len(dataset.captions))
    print(f'done: {folder}')


def _drawn(dataset, draw, batch_size, seed):
    """(number of the caption, picture as uint8) for all captions, those of a photograph one after the other."""
    order = torch.argsort(dataset.photo_of, stable=True)
    for number, captions in enumerate(order.split(batch_size), seed):
        images = draw(dataset.embeddings.index_select(0, captions), number)
        yield from zip(captions.tolist(), to_pixels(images).cpu())


def _singles(dataset, drawn, folder):
    for caption, image in drawn:
        class_name, name, sentence = map(_file_name, dataset.index.sentence(caption))
        yield os.path.join(folder, class_name, f'{name}_{image.shape[-1]}_sentence{sentence}.png'), image


def _grids(dataset, drawn, folder):
    for _, group in groupby(drawn, lambda pair: dataset.index.photo_of[pair[0]]):
        captions, images = zip(*group)
        class_name, name, _ = map(_file_name, dataset.index.sentence(captions[0]))
        drawn_side_by_side = grid(torch.stack(images), min(EXAMPLE_COLUMNS, len(images)))
        yield os.path.join(folder, class_name, f'{name}_{images[0].shape[-1]}.png'), drawn_side_by_side


def _file_name(text):
    """A name out of a data file, with nothing in it that leads to another folder."""
    return re.sub(r'[\\/:*?"<>|\x00-\x1f]', '_', text).lstrip('.') or '_'


def save_pictures(pictures, total):
    """Write PNGs in threads while the next are drawn: `pictures` yields (path, image as `to_pil` takes it)."""
    waiting = deque()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for path, image in tqdm(pictures, 'drawing', total, unit=' pictures', disable=None):
            waiting.append(threads.submit(_save_picture, path, image))
            if len(waiting) > AHEAD:
                waiting.popleft().result()
        for written in waiting:
            written.result()


def _save_picture(path, image):
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        to_pil(image).save(path, compress_level=COMPRESSION)
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({error})') from error
