"""Draw birds and write ten captions for each: a data set that needs no download.

    python data/toy_birds/prepare.py [--out FILE] [--count 2000] [--seed 1]

A bird's class is its body color and its wing color (`red_body_blue_wings`). The two always differ, because wings of the
body's color would be invisible. Of the 90 classes, the 10 that combine opposite colors, such as black and white, are
only in /test: no model has seen these pairs, although each color is in /train with eight other partners, as body and as
wings. /valid holds a tenth of the images of the training classes. `evaluation/color_accuracy.py` measures how often a
generated image has the colors that its sentence names.
"""
import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # while the imports take seconds

import io
import multiprocessing
import random
import signal
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from common.errors import OneLineParser, UserError, run_command
from common.files import check_space
from data import layout
from data.toy_birds.drawing import PALETTE, draw, random_bird
from data.toy_birds.sentences import describe

CLASSES = [f'{body}_body_{wings}_wings' for body in PALETTE for wings in PALETTE if body != wings]
# Pairs that never occur in training, whichever of the two is the body's color.
APART = {frozenset(pair) for pair in (('red', 'green'), ('yellow', 'blue'), ('black', 'white'), ('orange', 'purple'),
                                      ('pink', 'brown'))}
UNSEEN = {name for name in CLASSES if frozenset(name.split('_')[::2]) in APART}
MIN_COUNT = len(CLASSES) + 10
AHEAD = 1000  # birds that are drawn before they are written, at most
BYTES = 15000  # of a bird and its captions in the file (measured)


def colors_of(class_name):
    """Return the colors in a class's name: `red_body_blue_wings` gives ('red', 'blue')."""
    body, _, wings, _ = class_name.split('_')
    return body, wings


def make(number, seed):
    """Return (split, `layout.Photograph`) of bird `number`, which depends only on `number` and `seed`."""
    rng = random.Random(f'{seed}/{number}')
    round_, kind = divmod(number, len(CLASSES))
    class_name = CLASSES[kind]
    bird = random_bird(rng, *colors_of(class_name))
    picture, box = draw(bird, rng)
    jpeg = io.BytesIO()
    picture.save(jpeg, 'JPEG', quality=90)
    split = 'test' if class_name in UNSEEN else 'valid' if round_ and (round_ + kind) % 10 == 0 else 'train'
    name = f'{class_name}_{round_ + 1:04}'
    return split, layout.Photograph(name, class_name, jpeg.getvalue(), describe(bird, rng), bbox=box)


def init_worker():
    """Let a worker ignore signals, which the parent handles, and end when the parent is killed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def batches(count):
    """Return ranges of the numbers below `count`, with as many numbers as may be drawn ahead."""
    return (range(start, min(start + AHEAD, count)) for start in range(0, count, AHEAD))


def prepare(out, count, seed):
    """Write `count` birds to the HDF5 file `out`, and return the number of birds in each split.

    Raises UserError if `count` is too small for every split to have a bird, or if `out` cannot be written.
    """
    if count < MIN_COUNT:
        raise UserError(f'--count {count}: give {MIN_COUNT} or more, so that every class and every split has a bird')
    layout.check_name(out)
    check_space(out, count * BYTES)
    counts = Counter()
    with signals.hold(), layout.replace_file(out) as file:
        for split, photograph in tqdm(draw_all(count, seed), total=count, desc='birds', unit='', disable=None):
            layout.write_photograph(file, split, photograph)
            counts[split] += 1
    return counts


def draw_all(count, seed):
    """Yield what `make` returns for each number below `count`, in order, made in one process per core."""
    pool, is_broken = ProcessPoolExecutor(initializer=init_worker), False
    try:
        for numbers in batches(count):
            for future in [pool.submit(make, number, seed) for number in numbers]:
                yield future.result()
    except BrokenProcessPool as error:
        is_broken = True  # then the pool ends its futures itself, and fails with a traceback if they are canceled
        raise UserError('a process that drew birds was killed, perhaps for lack of memory; start again') from error
    finally:
        pool.shutdown(cancel_futures=not is_broken)


def main():
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=os.path.expanduser, default=os.path.join(HERE, 'toy_birds.hdf5'),
                        help='HDF5 file to write, .hdf5 or .h5 (default: toy_birds.hdf5 beside this script)')
    parser.add_argument('--count', type=int, default=2000, help=f'birds to draw, at least {MIN_COUNT} (default: 2000)')
    parser.add_argument('--seed', type=int, default=1, help='seed of the random birds (default: %(default)s)')
    args = parser.parse_args()
    counts = prepare(args.out, args.count, args.seed)
    print(', '.join(f'{counts[split]} {split}' for split in layout.SPLITS), f'birds in {os.path.abspath(args.out)}')


if __name__ == '__main__':
    run_command(main)
