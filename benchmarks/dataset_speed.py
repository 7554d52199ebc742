"""Measure Text2ImageDataset alone: the time to open it, and items per second on one core at batch size 256.

    python benchmarks/dataset_speed.py [--file data/birds/birds.hdf5]
    python benchmarks/dataset_speed.py --count 58940                        # with a temporary file of so many items

Memory is the peak of the process, PyTorch included. Another process builds the cache beforehand.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path.insert(0, ROOT)

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # the imports below take seconds

import argparse
import io
import multiprocessing
import tempfile
import time

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.train_speed import peak_memory
from common import flags
from common.errors import run_command
from common.speed import allocator
from data import layout
from data.txt2image_dataset import Text2ImageDataset

BATCH_SIZE, EPOCHS = 256, 5
CLASSES, CAPTIONS = 150, 10  # classes in CUB-200-2011's training split, captions per photograph


def main():
    """Parse the flags, prepare the file and its cache, and print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--file', type=flags.path, default=os.path.join(ROOT, 'data', 'birds', 'birds.hdf5'),
                        help='HDF5 file (default: data/birds/birds.hdf5)')
    parser.add_argument('--count', type=flags.positive(int),
                        help='measure a temporary file with this number of items instead')
    options = parser.parse_args()
    torch.set_num_threads(1)
    allocator.keep_freed_memory()  # as main.py does on a CPU
    with tempfile.TemporaryDirectory() as folder:
        if options.count:
            options.file = os.path.join(folder, 'items.hdf5')
            in_another_process(make, options.file, options.count)
        in_another_process(Text2ImageDataset, options.file)  # builds the cache if there is none
        show(options.file)


def in_another_process(function, *arguments):
    """Call a function in a new process, and exit if it fails."""
    process = multiprocessing.get_context('spawn').Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


def make(path, count):
    """Write an HDF5 file with `count` captions of small photographs of one color, and random embeddings."""
    random = np.random.default_rng(0)
    with layout.replace_file(path) as file:
        for photo in range(0, count, CAPTIONS):
            buffer, size = io.BytesIO(), min(CAPTIONS, count - photo)
            Image.new('RGB', (64, 64), tuple(random.integers(0, 256, 3).tolist())).save(buffer, 'JPEG')
            embeddings = random.standard_normal((size, layout.EMBED_DIM), np.float32)
            layout.write_photograph(file, 'train', layout.Photograph(
                f'photograph_{photo}', f'class_{photo // CAPTIONS % CLASSES}', buffer.getvalue(),
                ['a small bird with a short beak and wings of a color that is not easily named'] * size, embeddings))


def show(path):
    """Print the time to open the file, its memory, and the items per second."""
    start = time.perf_counter()
    dataset = Text2ImageDataset(path)
    seconds = time.perf_counter() - start
    print(f'opening {len(dataset)} cached items: {seconds:.2f} s, {peak_memory("cpu"):.2f} GB')
    for name, drawn in (('what main.py trains on', False), ('with wrong images', True)):
        dataset.drawn = drawn
        loader, speeds = DataLoader(dataset, BATCH_SIZE, shuffle=True, collate_fn=dataset.collate), []
        for _ in range(EPOCHS):
            start = time.perf_counter()
            items = sum(len(batch['txt']) for batch in loader)
            speeds.append(items / (time.perf_counter() - start))
        print(f'{name}: {sorted(speeds)[EPOCHS // 2]:,.0f} items/s (median of {EPOCHS} epochs)')


if __name__ == '__main__':
    run_command(main)
