"""Draw birds and describe each in ten sentences: a data set that needs no download and says how well a model listens.

    python data/toy_birds/prepare.py [--out FILE] [--count 2000] [--seed 1]

A bird's class is its body colour and its wing colour (`red_body_blue_wings`). The two differ: a wing of the body's
colour is neither seen nor measured apart from the body. Of the 30 classes, the 4 that join black and white or yellow
and blue are only in /test: no model has seen them, though each colour is in /train with other partners. /valid holds a
tenth of the pictures of the training classes. `color_accuracy` says how often a picture shows the colours asked for.
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # while the imports take seconds

import functools
import io
import itertools
import multiprocessing
import random
import signal
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from common.errors import OneLineParser, UserError, run_command
from common.files import check_space
from data import layout
from data.toy_birds.drawing import PALETTE, SCENES, draw, imagine, shapes
from data.toy_birds.sentences import describe

CLASSES = [f'{body}_body_{wings}_wings' for body in PALETTE for wings in PALETTE if body != wings]
# These never come together in training, whichever of the two has the body.
APART = {frozenset(pair) for pair in (('yellow', 'blue'), ('black', 'white'))}
UNSEEN = {name for name in CLASSES if frozenset(name.split('_')[::2]) in APART}
MIN_COUNT = 2 * len(CLASSES)
AHEAD = 1000  # birds
BYTES = 15000  # what a bird and its captions take in the file (measured)


def colors_of(class_name):
    """`red_body_blue_wings` -> ('red', 'blue')."""
    body, _, wings, _ = class_name.split('_')
    return body, wings


def color_accuracy(images, body_colors, wing_colors):
    """The shares of pictures whose body and whose wings have the colour asked for: (0..1, 0..1).

    `images` is float [B, 3, 64, 64] in [-1, 1] (or any side that 32 divides), the colours are B names each (see
    `colors_of`). Pictures that ignore the colours asked for score about 1/6.
    """
    guesses = [guess_colors(image) for image in images.detach().cpu().float().numpy()]
    hits = [(body == asked_body, wings == asked_wings)
            for (body, wings), asked_body, asked_wings in zip(guesses, body_colors, wing_colors, strict=True)]
    return tuple(float(share) for share in np.mean(hits, 0))


def guess_colors(image):
    """The likeliest (body, wings) of a picture, float [3, 64, 64] in [-1, 1].

    A pixel shows background, body or wing, as often as the drawings of a pose do at its place, in one of that part's
    colours, blurred and a bit off. So every pose and pair of colours has a likelihood, the product over the pixels.
    """
    pixels = image.reshape(3, 32, image.shape[1] // 32, 32, -1).mean((2, 4)).reshape(3, -1).T * 127.5 + 127.5
    rest, body, wings = pose_masks()
    colors = likelihood(pixels, list(PALETTE.values()))
    scene = likelihood(pixels, [tone for tones in SCENES.values() for tone in tones]).max(0)
    body, wings = body[:, None] * colors, wings[:, None] * colors
    # The constant pays for what is neither: beak, eye, crown, belly.
    pixel = (rest * scene + .02)[:, None, None] + body[:, :, None] + wings[:, None]
    score = np.log(pixel).sum(-1).max(0)
    np.fill_diagonal(score, -np.inf)
    names = list(PALETTE)
    best = np.unravel_index(score.argmax(), score.shape)
    return names[best[0]], names[best[1]]


def likelihood(pixels, colors, spread=40):
    """[N, 3] and C colours, both 0..255 -> [C, N]: 1 where they are equal, falling with the distance."""
    distance = ((pixels - np.array(colors, np.float32)[:, None]) ** 2).sum(-1)
    return np.exp(-distance / (2 * spread ** 2))


@functools.lru_cache(maxsize=1)
def pose_masks(samples=40):
    """How often background, body and wing are at a place: float32 [3, 4 poses, 32 * 32]."""
    rng, poses = random.Random(0), []
    for facing in (1, -1):
        for raised in (True, False):
            labels = [label_map(imagine(rng, 'red', 'blue', facing=facing, raised=raised)) for _ in range(samples)]
            poses.append([np.mean(np.equal(labels, part), 0) for part in range(3)])
    return np.array(poses, np.float32).swapaxes(0, 1)


def label_map(bird):
    """[32 * 32]: 0 background, 1 body, 2 wing or tail."""
    mask = Image.new('L', (32, 32))
    parts = shapes(bird)
    for part in ('far wing', 'tail', 'body', 'wing'):
        if part in parts:
            ImageDraw.Draw(mask).polygon([tuple(point) for point in 32 * parts[part]], fill=1 if part == 'body' else 2)
    return np.asarray(mask).ravel()


def make(number, seed):
    """Picture `number` of the set -> (its split, its `layout.Photograph`), whatever process makes it."""
    rng = random.Random(f'{seed}/{number}')
    round_, kind = divmod(number, len(CLASSES))
    class_name = CLASSES[kind]
    bird = imagine(rng, *colors_of(class_name))
    picture, box = draw(bird, rng)
    jpeg = io.BytesIO()
    picture.save(jpeg, 'JPEG', quality=90)
    split = 'test' if class_name in UNSEEN else 'valid' if round_ and (round_ + kind) % 10 == 0 else 'train'
    name = f'{class_name}_{round_ + 1:04}'
    return split, layout.Photograph(name, class_name, jpeg.getvalue(), describe(bird, rng), bbox=box)


def follow_the_parent():
    """Have a worker leave signals to the parent, which ends it, and end where the parent was killed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def batches(count):
    """The numbers below `count`, as many at a time as may wait to be drawn or written."""
    return (range(start, min(start + AHEAD, count)) for start in range(0, count, AHEAD))


def prepare(out, count, seed):
    """Write `count` birds to the HDF5 file `out`; returns how many are in each split."""
    if count < MIN_COUNT:
        raise UserError(f'--count {count}: give {MIN_COUNT} or more, so that every class and every split has a bird')
    layout.check_name(out)
    check_space(out, count * BYTES)
    counts = Counter()
    with signals.hold():
        pool = ProcessPoolExecutor(initializer=follow_the_parent)
        try:
            birds = itertools.chain.from_iterable(
                pool.map(functools.partial(make, seed=seed), numbers, chunksize=2) for numbers in batches(count))
            with layout.replace_file(out) as file:
                for split, photograph in tqdm(birds, total=count, desc='birds', unit='', disable=None):
                    layout.write_photograph(file, split, photograph)
                    counts[split] += 1
        except BrokenProcessPool as error:
            raise UserError('a process that drew birds was killed, perhaps for want of memory; start again') from error
        finally:
            pool.shutdown(cancel_futures=True)
    return counts


def main():
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', default=os.path.join(HERE, 'toy_birds.hdf5'),
                        help='HDF5 file, .hdf5 or .h5 (toy_birds.hdf5 beside this script)')
    parser.add_argument('--count', type=int, default=2000, help=f'birds to draw, at least {MIN_COUNT} (%(default)s)')
    parser.add_argument('--seed', type=int, default=1, help='the same seed gives the same birds (%(default)s)')
    args = parser.parse_args()
    counts = prepare(args.out, args.count, args.seed)
    print(', '.join(f'{counts[split]} {split}' for split in layout.SPLITS), f'birds in {os.path.abspath(args.out)}')


if __name__ == '__main__':
    run_command(main)
