"""How many items a second Text2ImageDataset gives, on one core at batch 256.

    python benchmarks/dataset_speed.py [--file data/birds/birds.hdf5]
"""
import argparse
import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch
from torch.utils.data import DataLoader

from common.errors import run_command
from data.txt2image_dataset import Text2ImageDataset

BATCH_SIZE, EPOCHS = 256, 5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--file', default=os.path.join(ROOT, 'data', 'birds', 'birds.hdf5'))
    torch.set_num_threads(1)
    dataset = Text2ImageDataset(parser.parse_args().file)
    start = time.perf_counter()
    Text2ImageDataset(dataset.file)
    print(f'opening {len(dataset)} cached items: {time.perf_counter() - start:.2f} s')
    for name, collate_fn in (('dataset.collate', dataset.collate), ('default collate', None)):
        loader, speeds = DataLoader(dataset, BATCH_SIZE, shuffle=True, collate_fn=collate_fn), []
        for _ in range(EPOCHS):
            start = time.perf_counter()
            items = sum(len(batch['txt']) for batch in loader)
            speeds.append(items / (time.perf_counter() - start))
        print(f'{name}: {sorted(speeds)[EPOCHS // 2]:,.0f} items/s (median of {EPOCHS} epochs)')


if __name__ == '__main__':
    run_command(main)
