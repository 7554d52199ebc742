"""Measure what each CPU optimization of `common/speed` gains: time a training step with it and without it.

    OMP_NUM_THREADS=1 python benchmarks/kernels.py [--gan stackgan_v2] [--batch_size 4] [--precision bf16] [--steps 5]

Networks have their full width, and batches are random numbers. Both kinds of step alternate in one process, and their
processor time is compared: with one thread, that is the time on an idle core, whatever else the machine does.
"""
import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from unittest.mock import patch

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path.insert(0, ROOT)

import torch

import stackgan_v1.build_gan
import stackgan_v2.build_gan
import text2image.build_gan
from common import flags, speed
from common.errors import run_command
from common.speed import allocator, cpu_kernels

CPU = torch.device('cpu')


def main():
    """Parse the flags and print a table with one row per optimization."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--gan', choices=GANS, default='stackgan_v2', help='GAN to train (default: stackgan_v2)')
    parser.add_argument('--batch_size', type=flags.positive(int), default=4, help='batch size (default: 4)')
    parser.add_argument('--precision', choices=('fp32', 'bf16'), default='fp32',
                        help='precision to train in (default: fp32)')
    parser.add_argument('--steps', type=flags.positive(int), default=5,
                        help='number of timed steps of each kind (default: 5)')
    parser.add_argument('--only', choices=GAINS, action='append',
                        help='measure only this optimization; can be repeated')
    options = parser.parse_args()
    print(f'{options.gan}, batch {options.batch_size}, {options.precision}, {torch.get_num_threads()} threads, '
          f'PyTorch {torch.__version__}, median of {options.steps} steps\n')
    print('| what | s a step without it | with it | ratio |\n|---|---|---|---|', flush=True)
    for name in options.only or GAINS:
        without, with_it = GAINS[name](options)
        print(f'| {name} | {without:.2f} | {with_it:.2f} | {without / with_it:.2f} |', flush=True)


def new_stackgan_v1(stage, batch_size):
    """Return (new Model of a stage, its discriminators, their heads, a batch without embeddings)."""
    stage1 = stackgan_v1.build_gan.make_networks()[0] if stage == 2 else None
    model = stackgan_v1.build_gan.Model('kernels', CPU, None, *stackgan_v1.build_gan.make_networks(stage1))
    heads = [head for head in (model.netD.get_cond_logits, model.netD.get_uncond_logits) if head is not None]
    side = 64 if stage == 1 else 256
    return model, [model.netD], heads, {'right_images': random_images(batch_size, side)}


def new_stackgan_v2(batch_size):
    """Return the same for StackGAN++ with three branches."""
    model = stackgan_v2.build_gan.Model('kernels', CPU, None, *stackgan_v2.build_gan.make_networks())
    images = {f'{which}_images': [random_images(batch_size, side) for side in (64, 128, 256)]
              for which in ('right', 'wrong')}
    return model, model.netsD, (), images


def new_text2image(batch_size):
    """Return the same for the chapter's GAN."""
    model = text2image.build_gan.Model('kernels', CPU, None, 3, l1_coef=50, l2_coef=100)
    return model, [model.netD], (), {'right_images': random_images(batch_size, 64)}


def random_images(batch_size, side):
    """Return random images [B, 3, side, side] in [-1, 1]."""
    return torch.rand(batch_size, 3, side, side) * 2 - 1


GANS = {'text2image': new_text2image, 'stage-I': lambda size: new_stackgan_v1(1, size),
        'stage-II': lambda size: new_stackgan_v1(2, size), 'stackgan_v2': new_stackgan_v2}


def prepared_step(options):
    """Return a function that trains a new model for one step; the model is prepared as in main.py."""
    torch.manual_seed(0)
    model, netsD, heads, batch = GANS[options.gan](options.batch_size)
    batch['right_embed'] = torch.randn(options.batch_size, 1024)
    speed.prepare(model.netG, netsD, heads, device=CPU, precision=options.precision, compile=False,
                  batch_size=options.batch_size)
    model.create_optim(2e-4)
    return lambda: model.train_step(batch)


def without_function(owner, name):
    """Return a function that measures a step without the optimization `owner.name`, and a step with it."""
    def measure(options):
        with patch.object(owner, name, lambda *_: None):
            without = prepared_step(options)
        return time_in_turns(options.steps, without, prepared_step(options))
    return measure


def channels_last(options):
    """Return the seconds per step with weights in contiguous memory format, and in channels last."""
    with patch.object(speed, 'arrange', lambda net, _: cpu_kernels.place_all(net)):
        without = prepared_step(options)
    return time_in_turns(options.steps, without, prepared_step(options))


def freed_memory(options):
    """Return the seconds per step with the C library's default for freed memory, and with freed memory kept.

    A process cannot go back to the default, so each is measured in a process of its own.
    """
    def in_a_process(is_kept):
        with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as process:
            return process.submit(seconds_per_step, options, is_kept).result()
    return in_a_process(False), in_a_process(True)


def seconds_per_step(options, is_kept):
    """Return the seconds per step, with freed memory kept or not."""
    with contextlib.nullcontext() if is_kept else patch.object(allocator, 'keep_freed_memory'):
        step = prepared_step(options)
    return time_in_turns(options.steps, step)[0]


def time_in_turns(steps, *functions):
    """Call the functions in turns; return the median processor time of each, without its first call."""
    seconds = [[] for _ in functions]
    for number in range(steps + 1):
        for function, times in zip(functions, seconds):
            start = time.process_time()
            function()
            if number:
                times.append(time.process_time() - start)
    return [statistics.median(times) for times in seconds]


GAINS = {'DoubledConv': without_function(cpu_kernels, 'place_doubled_convs'),
         'ProductConv': without_function(cpu_kernels, 'place_product_convs'),
         'ProductOfHalves': without_function(cpu_kernels, 'place_products_of_halves'),
         'channels_last': channels_last,
         'freed memory': freed_memory}


if __name__ == '__main__':
    run_command(main)
