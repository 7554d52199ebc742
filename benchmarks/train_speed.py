"""Compare training speed: the chapter's way against this repository's, in one run on one machine.

    python benchmarks/train_speed.py [--chapter text2image] [--device cpu] [--batch_size 64] [--accumulate 1]

Each row of the table is a way to train: the whole loop with data loading, at full width, in a process of its own. Rows
alternate `--repeats` times, and the median counts. The first row is the chapter's script (`chapter_way.py`); the others
are our training in every precision and, on a GPU, the best of these compiled. (auto) marks the default of main.py.
Timing starts when worker processes have reached their steady state: see `EndlessBatches`.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path.insert(0, ROOT)

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # the imports below take seconds

import argparse
import itertools
import json
import subprocess
import time

import numpy as np
import torch
from torch.utils.data import DataLoader

import stackgan_v1.build_gan
import stackgan_v2.build_gan
import text2image.build_gan
from benchmarks import chapter_way
from char_cnn_rnn.reading import require_embeddings
from common import flags, speed
from common.errors import UserError, run_command
from common.speed.compiling import can_compile
from common.speed.precision import choose_precision
from data.cropped_dataset import CroppedDataset
from data.multiscale_dataset import MultiscaleDataset, shuffled_batches, sizes_of
from data.txt2image_dataset import Text2ImageDataset

BATCH_SIZES = {'text2image': 256, 'stackgan_v1': 64, 'stackgan_v2': 24}  # the chapter's and the authors'
CHAPTER, COMPILED = 'chapter', 'compiled'
WORKERS = 4  # main.py's default
WARM_UP = 2  # minimum number of steps between the first and the timed ones


def main():
    """Parse the flags; print the table, or measure one row of it in the process that `show` starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--chapter', choices=BATCH_SIZES, default='text2image',
                        help='section to train (default: text2image)')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu',
                        help='device to train on (default here: %(default)s)')
    parser.add_argument('--batch_size', type=flags.positive(int), help='batch size (default: that of the chapter)')
    parser.add_argument('--file', type=flags.path, default=os.path.join(ROOT, 'data', 'birds', 'birds.hdf5'),
                        help='HDF5 file with embeddings (default: data/birds/birds.hdf5)')
    parser.add_argument('--accumulate', type=flags.positive(int), default=1,
                        help='value of --accumulate of the StackGANs, in all rows but the first (default: 1)')
    parser.add_argument('--steps', type=flags.positive(int), default=10,
                        help='minimum number of timed steps per run (default: 10)')
    parser.add_argument('--seconds', type=flags.non_negative(float), default=10,
                        help='minimum time of these steps, in seconds (default: 10)')
    parser.add_argument('--repeats', type=flags.positive(int), default=3, help='number of runs per row (default: 3)')
    parser.add_argument('--way', help=argparse.SUPPRESS)  # a row; this script starts itself with it
    options = parser.parse_args()
    options.batch_size = options.batch_size or BATCH_SIZES[options.chapter]
    if options.accumulate > 1 and options.chapter == 'text2image':
        raise UserError('--accumulate: has no effect on text2image; leave it out, or choose a StackGAN with --chapter')
    if options.way:
        print(json.dumps(measure(*prepare(options), options)))
    else:
        require_embeddings(MultiscaleDataset(options.file))  # report missing data before the first row
        device = flags.choose_device(options.device == 'cuda')
        options.device = device.type
        show(options, {way: [] for way in ways(device, options.accumulate)})


def ways(device, accumulate):
    """Return the rows of the table: the chapter's way, the device's precisions, and compiled, if main.py would compile.
    """
    found = [CHAPTER, 'fp32']
    for asked in ('tf32', 'bf16'):
        try:
            found.append(choose_precision(asked, device))
        except UserError:
            pass
    return found + [COMPILED] * (accumulate == 1 and can_compile('auto', device))


def show(options, runs):
    """Measure every way `--repeats` times, in turns, and print the table."""
    for _, way in itertools.product(range(options.repeats), runs):
        command = [sys.executable, __file__, '--way', way, '--chapter', options.chapter, '--device', options.device,
                   *(str(word) for name in ('batch_size', 'file', 'accumulate', 'steps', 'seconds')
                     for word in (f'--{name}', vars(options)[name]))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f'{way}: the process ended with status {done.returncode}; see its output above')
        runs[way].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {way: {name: float(np.median([run[name] for run in of_way])) for name in of_way[0]}
               for way, of_way in runs.items()}
    auto = COMPILED if COMPILED in runs else choose_precision('auto', torch.device(options.device))
    print(f'{options.chapter}, batch {options.batch_size}, {options.device}, {torch.get_num_threads()} threads, '
          f'PyTorch {torch.__version__}, median of {options.repeats} runs of at least {options.steps} steps and '
          f'{options.seconds:g} s' + f', --accumulate {options.accumulate}' * (options.accumulate > 1), end='\n\n')
    print('| way | images/s | ratio | ms a step | waiting for data | peak memory, GB | to the first step, s |')
    print('|---|---|---|---|---|---|---|')
    for way, m in medians.items():
        print(f'| {way}{" (auto)" * (way == auto)} | {m["speed"]:.1f} | {m["speed"] / medians[CHAPTER]["speed"]:.2f} | '
              f'{1000 * m["step"]:.1f} | {m["waiting"]:.1%} | {m["memory"]:.2f} | {m["first"]:.1f} |')


def prepare(options):
    """Return (batches, function to call with each) for a way to train. Raises UserError without one full batch."""
    if options.way == CHAPTER:
        device = chapter_way.device(options.device)
    else:
        device = flags.choose_device(options.device == 'cuda')
    torch.manual_seed(0)
    new = new_text2image if options.chapter == 'text2image' else new_stackgan
    model, netsD, heads, batches, chapters_step = new(options, device)
    nets = model.netG, *netsD
    if len(batches.dataset) < options.batch_size:
        raise UserError(f'{options.file}: has {len(batches.dataset)} items in /train, less than a batch; '
                        'give a smaller --batch_size')
    model.create_optim(2e-4)
    for net in nets:
        net.train()
    if options.way == CHAPTER:
        chapter_way.slow_down(model, nets)
        return batches, lambda batch: chapters_step(model, batch)
    speed.prepare(model.netG, netsD, heads, device=device,
                  precision='auto' if options.way == COMPILED else options.way, compile=options.way == COMPILED,
                  accumulate=options.accumulate, batch_size=options.batch_size)
    return batches, model.train_step


def new_text2image(options, device):
    """Return (model, discriminators, their separately called parts, batches, the chapter's training step)."""
    model = text2image.build_gan.Model('speed', device, None, 3, l1_coef=50, l2_coef=100)
    if options.way == CHAPTER:
        batches = chapter_way.loader(chapter_way.CaptionItems(options.file), options.batch_size)
    else:
        dataset = require_embeddings(Text2ImageDataset(options.file, drawn=False)).to(device)
        batches = DataLoader(dataset, options.batch_size, shuffle=True, collate_fn=dataset.collate, drop_last=True)
    return model, [model.netD], (), batches, chapter_way.text2image_step


def new_stackgan(options, device):
    """Return the same for Stage-I of StackGAN, or for StackGAN++."""
    first = options.chapter == 'stackgan_v1'
    chapter, dataset, sizes = ((stackgan_v1.build_gan, CroppedDataset, sizes_of(1)) if first else
                               (stackgan_v2.build_gan, MultiscaleDataset, sizes_of(3)))
    model = chapter.Model('speed', device, None, *chapter.make_networks(device=device))
    if options.way == CHAPTER:
        batches = chapter_way.loader(chapter_way.PhotographItems(options.file, sizes), options.batch_size)
    else:
        batches = shuffled_batches(require_embeddings(dataset(options.file)).cached(), options.batch_size, WORKERS,
                                   device)
    netsD, heads = ([model.netD], [model.netD.get_cond_logits]) if first else (model.netsD, [])
    return model, netsD, heads, batches, chapter_way.stackgan_step


class EndlessBatches:
    """Yield batches of a DataLoader without end; `is_full` says whether its workers have filled their queue.

    Filling the queue slows the first steps down; if workers are slow, the queue then speeds some steps up. So timing
    starts when the queue is full or, if that never happens, when the batches of the first queue are used up.
    """

    def __init__(self, loader):
        self.loader, self.taken = loader, 0
        self.ahead = loader.num_workers * (loader.prefetch_factor or 0)
        loader.collate_fn = self.counted = CountedCollate(loader.collate_fn)

    def __iter__(self):
        while True:
            for batch in self.loader:
                self.taken += 1
                yield batch

    def is_full(self):
        epochs, place = divmod(self.taken - 1, len(self.loader))
        made = epochs * len(self.loader) + min(len(self.loader), place + 1 + self.ahead)
        return self.counted.calls.value >= made


class CountedCollate:
    """Wrap a `collate_fn` and count its calls in all processes."""

    def __init__(self, collate):
        self.collate, self.calls = collate, torch.multiprocessing.get_context().Value('l', 0)

    def __call__(self, items):
        batch = self.collate(items)
        with self.calls.get_lock():
            self.calls.value += 1
        return batch


def measure(batches, step, options):
    """Time training steps, and return a dict of floats.

    `speed` is in images/s, `step` in seconds per step; `waiting` is the share of time spent on waiting for data,
    `memory` the peak in GB (without worker processes), and `first` the seconds until the end of the first step.
    """
    synchronize = torch.cuda.synchronize if options.device == 'cuda' else lambda: None
    feed = EndlessBatches(batches)
    endless, least = iter(feed), options.steps
    start = time.perf_counter()
    step(next(endless))
    synchronize()
    first = time.perf_counter() - start
    for warm in range(1, WARM_UP + feed.ahead + 1):
        step(next(endless))
        synchronize()
        if warm >= WARM_UP and feed.is_full():
            break
    else:
        least = max(least, feed.ahead)  # workers deliver in bursts: time at least one round of all
    start, waiting, images, steps = time.perf_counter(), 0, 0, 0
    while steps < least or time.perf_counter() - start < options.seconds:
        asked = time.perf_counter()
        batch = next(endless)
        waiting += time.perf_counter() - asked
        step(batch)
        images, steps = images + len(batch['right_embed']), steps + 1
    synchronize()
    seconds = time.perf_counter() - start
    return {'speed': images / seconds, 'step': seconds / steps, 'waiting': waiting / seconds,
            'memory': peak_memory(options.device), 'first': first}


def peak_memory(device):
    """Return the peak memory in GB of the GPU or of this process, NaN on Windows, where it is not available."""
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:
        return float('nan')
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / 1e9


if __name__ == '__main__':
    run_command(main)
