"""Measure how long the evaluation of StackGAN++ takes, from sentence embeddings to PNG files.

    python benchmarks/eval_speed.py [--count 29330] [--device cpu] [--checkpoint RUN]

Embeddings are random, and so are the weights unless a checkpoint is given; images of an untrained network take another
time to compress. The files are removed at the end. Starting Python and reading weights and sentences is not timed.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path.insert(0, ROOT)

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # the imports below take seconds

import argparse
import tempfile
import time
from types import SimpleNamespace

import torch

from common import flags, speed
from common.errors import run_command
from common.sampling import write_evaluation
from stackgan_v2.build_gan import Model, load_generator, make_networks

CAPTIONS = 10  # per photograph


def main():
    """Parse the flags, evaluate into a temporary folder, and print the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--count', type=flags.positive(int), default=29330,
                        help='number of captions (default: 29330, the held-out ones of CUB-200-2011)')
    parser.add_argument('--checkpoint', type=flags.path, metavar='FILE',
                        help='checkpoint to evaluate (default: random weights)')
    parser.add_argument('--batch_size', type=flags.positive(int), default=24,
                        help='images generated at once (default: 24)')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu',
                        help='device to generate on (default here: %(default)s)')
    parser.add_argument('--seed', type=int, default=1, help='seed of noise and conditions (default: 1)')
    options = parser.parse_args()
    device = flags.choose_device(options.device == 'cuda')
    if options.checkpoint:
        model, _, _ = load_generator(options.checkpoint, 'stackgan_v2', device)
    else:
        netG, _ = make_networks(device=device)
        model = Model('stackgan_v2', device, None, netG, [])
    speed.prepare_evaluation(model.netG, device)
    photo_of = torch.arange(options.count) // CAPTIONS
    index = SimpleNamespace(sentence=lambda i: ('class', f'photograph_{i // CAPTIONS}', str(i % CAPTIONS)))
    dataset = SimpleNamespace(captions=range(options.count), split='test', photo_of=photo_of, index=index,
                              embeddings=torch.randn(options.count, 1024))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_evaluation(folder, dataset, lambda embed, seed: model.generate(embed, seed)[-1], options.batch_size,
                         options.seed)
        seconds = time.perf_counter() - start
    print(f'{options.count} images on {device.type} and {os.cpu_count()} CPU cores: {seconds:.1f} s, '
          f'{options.count / seconds:.1f} images/s')


if __name__ == '__main__':
    run_command(main)
