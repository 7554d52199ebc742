"""Command-line flags that every chapter has, as the chapter types them, and what follows from them."""
import argparse
import os
import random

import numpy as np
import torch

from common import ranks
from common.errors import UserError
from common.precision import add_precision_flag

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def boolean(text):
    """'True', 'yes', '1' ... to a bool, so that `--train False` means what it says."""
    if text.lower() in ('true', 'yes', 'y', '1', 'on'):
        return True
    if text.lower() in ('false', 'no', 'n', '0', 'off'):
        return False
    raise argparse.ArgumentTypeError(f'{text!r} is neither True nor False')


def add_boolean(parser, name, default, help):
    """A flag that can be written `--name`, `--name True` and `--name False`."""
    parser.add_argument(name, type=boolean, nargs='?', const=True, default=default, metavar='BOOL',
                        help=f'{help} (default: {default})')


def positive(number):
    """An argparse type: `positive(int)` or `positive(float)`, above zero."""
    return _checked(number, 'positive', lambda value: value > 0, 'is not above zero')


def non_negative(number):
    """An argparse type: `non_negative(int)` or `non_negative(float)`, at least zero."""
    return _checked(number, 'non-negative', lambda value: value >= 0, 'is below zero')


def _checked(number, kind, is_fine, complaint):
    def parse(text):
        value = number(text)
        if not is_fine(value):
            raise argparse.ArgumentTypeError(f'{text} {complaint}')
        return value
    parse.__name__ = f'{kind} {number.__name__}'
    return parse


def add_run_flags(parser, model, epochs, batch_size, lr, chapter_dir):
    """The flags that every chapter's main.py shares; the arguments are the chapter's defaults."""
    parser.add_argument('--model', default=model, help=f'name of the model: of its checkpoint file (default: {model})')
    add_boolean(parser, '--cuda', True, 'use the GPU where there is one')
    add_boolean(parser, '--train', True, 'train; False: evaluate')
    parser.add_argument('--data_dir', type=os.path.abspath, metavar='DIR',
                        help='folder of the HDF5 file (default: data/DATASET in the repository)')
    parser.add_argument('--dataset', default='birds', help='name of the HDF5 file, without ending (default: birds)')
    parser.add_argument('--out_dir', type=os.path.abspath, default=os.path.join(chapter_dir, 'output'), metavar='DIR',
                        help='every run makes a folder of its own in here (default: output beside main.py)')
    parser.add_argument('--epochs', type=positive(int), default=epochs, help=f'default: {epochs}')
    parser.add_argument('--batch_size', type=positive(int), default=batch_size,
                        help=f'items in a step of each process: N of torchrun take N times as many '
                             f'(default: {batch_size})')
    parser.add_argument('--lr', type=positive(float), default=lr, help=f'learning rate (default: {lr})')
    parser.add_argument('--log_interval', type=positive(int), default=20,
                        help='steps between two lines of the log (default: 20)')
    parser.add_argument('--seed', type=int, default=1, help='of every random number (default: 1)')
    parser.add_argument('--resume', nargs='?', const='newest', metavar='RUN',
                        help='go on with a run: its folder, or without a value the newest one')


def add_drawing_flags(parser):
    """Which sentences a trained GAN draws, and what reads them."""
    parser.add_argument('--text', action='append', metavar='SENTENCE', help='draw this sentence; can be repeated')
    parser.add_argument('--text_file', metavar='FILE', help='draw the sentences of this file, one a line')
    parser.add_argument('--encoder', metavar='FILE',
                        help='sentence encoder for --text (default: the one in the run, or beside the data)')


def add_stackgan_flags(parser, widths, weights):
    """What both StackGANs have. `widths` and `weights` (of losses) list (name, default, what it is)."""
    for name, default, what in widths:
        parser.add_argument(f'--{name}', type=positive(int), default=default, metavar='N',
                            help=f'{what} (default: {default})')
    for name, default, what in weights:
        parser.add_argument(f'--{name}', type=non_negative(float), default=default, metavar='W',
                            help=f'weight of {what} (default: {default})')
    parser.add_argument('--checkpoint', metavar='FILE',
                        help='draw with this checkpoint (default: of the newest run), or start a training from it: '
                             'a run folder, its .pt, or a netG_*.pth')
    parser.add_argument('--gpu', type=int, default=0, metavar='N',
                        help='which GPU; -1: the CPU; processes of torchrun have one each (default: 0)')
    parser.add_argument('--workers', type=non_negative(int), default=4,
                        help='processes that prepare pictures, at most one per core; 0: this process does; pictures '
                             'are the same with any number (default: 4)')
    parser.add_argument('--accumulate', type=positive(int), default=1, metavar='N',
                        help='less memory, more time: discriminators see a batch in N parts, whose statistics their '
                             'batch norms take, and activations are computed again (default: 1, as the authors do)')
    add_boolean(parser, '--cache', True, 'decode and resize photographs once, into a file beside the data')
    add_precision_flag(parser)
    add_drawing_flags(parser)


def dataset_file(options):
    """The path of the HDF5 file that `--data_dir` and `--dataset` name."""
    folder = options.data_dir or os.path.join(ROOT, 'data', options.dataset)
    return os.path.join(folder, f'{options.dataset}.hdf5')


def print_options(options):
    """Print the options as a table, in alphabetical order."""
    width = max(map(len, vars(options)))
    print('\n'.join(f'  {name:<{width}}  {value}' for name, value in sorted(vars(options).items())), flush=True)


def choose_device(cuda, gpu=0):
    """The device for `--cuda` and `--gpu` (a number, or -1 for the CPU); says so where there is no GPU to use.

    Of several ranks, each has the GPU of its number on its machine. Raises UserError where there are GPUs, but not one
    of that number.
    """
    if not cuda or gpu < 0:
        return torch.device('cpu')
    if not torch.cuda.is_available():
        print('--cuda True, but PyTorch finds no CUDA device here: using the CPU')
        return torch.device('cpu')
    asked = f'--gpu {gpu}'
    if ranks.world_size() > 1:
        gpu = ranks.local_rank()
        asked = f'torchrun started a process for GPU {gpu}'
    if gpu >= torch.cuda.device_count():
        raise UserError(f'{asked}: this machine has {torch.cuda.device_count()}, and they count from 0')
    torch.backends.cudnn.benchmark = True
    torch.cuda.set_device(gpu)
    return torch.device('cuda', gpu)


def seed_everything(seed):
    """Seed Python's, NumPy's and PyTorch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def follow(options, resumed, train, draw, evaluate):
    """Do what the options of a GAN's main.py ask for: call one of three functions with (options, device, resumed).

    Raises UserError where they ask for two things at once, or for several processes to draw.
    """
    sentences = [f'--{name}' for name in ('text', 'text_file', 'interpolate') if vars(options).get(name)]
    if options.train and sentences:
        raise UserError(f'{sentences[0]}: draws with a trained model; add --train False')
    if ranks.world_size() > 1 and not options.train:
        raise UserError('--train False: draws in one process; start it with python, not with torchrun')
    ranks.join()
    print_options(options)
    device = choose_device(options.cuda, vars(options).get('gpu', 0))
    seed_everything(options.seed)
    task = train if options.train else draw if sentences else evaluate
    task(options, device, resumed)
    ranks.leave()


def read_sentences(texts, text_file):
    """The sentences of `--text` (a list or None) and `--text_file` (one a line). Raises UserError if there is none."""
    sentences = list(texts or [])
    if text_file:
        try:
            with open(text_file, encoding='utf-8-sig') as lines:
                sentences += lines.read().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'{text_file}: cannot be read as UTF-8 text ({error}); '
                            '--text_file takes a sentence a line') from error
    sentences = [sentence.strip() for sentence in sentences if sentence.strip()]
    if not sentences:
        raise UserError(f'{text_file or "--text"}: no sentence in it; write one, as in --text "a small red bird"')
    return sentences
