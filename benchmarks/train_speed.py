"""Training speed: the chapter's own way against this repository's, in one run on one machine.

    python benchmarks/train_speed.py [--chapter text2image] [--device cpu] [--batch_size 64] [--file birds.hdf5]

A row is a way to train, of the whole loop with its data, at full width. Each runs in processes of its own, the rows
alternate `--repeats` times, and the median counts. The first row is what the chapter's script does (`chapter_way.py`),
the others are precisions of ours; (auto) marks the one that `--precision auto` takes.
"""
import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import numpy as np
import torch
from torch.utils.data import DataLoader

import stackgan_v1.build_gan
import stackgan_v2.build_gan
import text2image.build_gan
from benchmarks import chapter_way
from common import flags, precision
from common.errors import UserError, run_command
from data.cropped_dataset import CroppedDataset
from data.multiscale_dataset import MultiscaleDataset, shuffled_batches
from data.txt2image_dataset import Text2ImageDataset

BATCH_SIZES = {'text2image': 256, 'stackgan_v1': 64, 'stackgan_v2': 24}  # the chapter's and the authors'
CHAPTER = 'chapter'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--chapter', choices=BATCH_SIZES, default='text2image', help='(default: text2image)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu',
                        help='(default here: %(default)s)')
    parser.add_argument('--batch_size', type=flags.positive(int), help='default: that of the chapter')
    parser.add_argument('--file', default=os.path.join(ROOT, 'data', 'birds', 'birds.hdf5'),
                        help='with embeddings (default: data/birds/birds.hdf5)')
    parser.add_argument('--steps', type=flags.positive(int), default=10, help='timed steps of a run (default: 10)')
    parser.add_argument('--repeats', type=flags.positive(int), default=3, help='runs of a row (default: 3)')
    parser.add_argument('--way', help=argparse.SUPPRESS)  # a row: what this script starts itself with
    options = parser.parse_args()
    options.batch_size = options.batch_size or BATCH_SIZES[options.chapter]
    if options.way:
        print(json.dumps(measure(*prepare(options), options)))
    else:
        show(options, {way: [] for way in ways(torch.device(options.device))})


def ways(device):
    """The rows of the table: the chapter's way, and the precisions that the device has."""
    found = [CHAPTER, 'fp32']
    for asked in ('tf32', 'bf16'):
        try:
            found.append(precision.choose(asked, device))
        except UserError:
            pass
    return found


def show(options, runs):
    """Measure every way `--repeats` times, in turns, and print the table."""
    for _, way in itertools.product(range(options.repeats), runs):
        command = [sys.executable, __file__, '--way', way, '--chapter', options.chapter, '--device', options.device,
                   '--batch_size', str(options.batch_size), '--file', options.file, '--steps', str(options.steps)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f'{way}: ended with status {done.returncode}; what it said is above')
        runs[way].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {way: {name: float(np.median([run[name] for run in of_way])) for name in of_way[0]}
               for way, of_way in runs.items()}
    auto = precision.choose('auto', torch.device(options.device))
    print(f'{options.chapter}, batch {options.batch_size}, {options.device}, {torch.get_num_threads()} threads, '
          f'PyTorch {torch.__version__}, median of {options.repeats} runs of {options.steps} steps\n')
    print('| way | images/s | ratio | ms a step | waiting for data | peak memory, GB | to the first step, s |')
    print('|---|---|---|---|---|---|---|')
    for way, m in medians.items():
        print(f'| {way}{" (auto)" * (way == auto)} | {m["speed"]:.1f} | {m["speed"] / medians[CHAPTER]["speed"]:.2f} | '
              f'{1000 * m["step"]:.1f} | {m["waiting"]:.1%} | {m["memory"]:.2f} | {m["first"]:.1f} |')


def prepare(options):
    """(batches, what to call with each) of a way to train."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    new = new_text2image if options.chapter == 'text2image' else new_stackgan
    model, nets, heads, batches, chapters_step = new(options, device)
    model.create_optim(2e-4)
    for net in nets:
        net.train()
    if options.way == CHAPTER:
        chapter_way.slow_down(model, nets)
        return batches, lambda batch: chapters_step(model, batch)
    for net in nets:
        net.to(memory_format=torch.channels_last)
    precision.prepare(argparse.Namespace(precision=options.way), device, *nets, *heads)
    return batches, model.train_step


def new_text2image(options, device):
    """(model, its networks, parts of them that are called by themselves, batches, the chapter's step)."""
    model = text2image.build_gan.Model('speed', device, None, 3, l1_coef=50, l2_coef=100)
    if options.way == CHAPTER:
        batches = chapter_way.loader(chapter_way.CaptionItems(options.file), options.batch_size)
    else:
        dataset = Text2ImageDataset(options.file, drawn=False).require_embeddings().to(device)
        batches = DataLoader(dataset, options.batch_size, shuffle=True, collate_fn=dataset.collate, drop_last=True)
    return model, (model.netG, model.netD), (), batches, chapter_way.text2image_step


def new_stackgan(options, device):
    """The same of StackGAN's Stage-I, or of StackGAN++."""
    first = options.chapter == 'stackgan_v1'
    chapter, dataset = ((stackgan_v1.build_gan, CroppedDataset) if first else
                        (stackgan_v2.build_gan, MultiscaleDataset))
    model = chapter.Model('speed', device, None, *chapter.make_networks(device=device))
    dataset = dataset(options.file).require_embeddings()
    workers = os.cpu_count() if device.type == 'cuda' else 0
    batches = (chapter_way.loader(chapter_way.OneByOne(dataset), options.batch_size) if options.way == CHAPTER else
               shuffled_batches(dataset, options.batch_size, workers, device))
    nets, heads = ((model.netG, model.netD), [model.netD.get_cond_logits]) if first else (
        (model.netG, *model.netsD), [])
    return model, nets, heads, batches, chapter_way.stackgan_step


def measure(batches, step, options):
    """A dict: `speed` in images/s, seconds a `step`, the share of them `waiting` for data, GB of `memory` at its peak
    (without worker processes), seconds to the end of the `first` step.
    """
    synchronise = torch.cuda.synchronize if options.device.startswith('cuda') else lambda: None
    endless = itertools.chain.from_iterable(itertools.repeat(batches))
    start = time.perf_counter()
    step(next(endless))
    synchronise()
    first = time.perf_counter() - start
    step(next(endless))
    synchronise()
    start, waiting = time.perf_counter(), 0
    for _ in range(options.steps):
        asked = time.perf_counter()
        batch = next(endless)
        waiting += time.perf_counter() - asked
        step(batch)
    synchronise()
    seconds = time.perf_counter() - start
    memory = (torch.cuda.max_memory_allocated() if options.device.startswith('cuda') else
              1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return {'speed': options.steps * options.batch_size / seconds, 'step': seconds / options.steps,
            'waiting': waiting / seconds, 'memory': memory / 1e9, 'first': first}


if __name__ == '__main__':
    run_command(main)
