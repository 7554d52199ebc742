"""Define the command-line flags that all sections share, with the chapter's names, and act on their values."""
import argparse
import os
import random
import re
import textwrap

import numpy as np
import torch

from common import ranks
from common.argument_types import absolute_path, is_valid_text, non_negative, path, plain_name, positive, up_to
from common.checkpoint import KEEP
from common.errors import OneLineParser, UserError
from common.files import check_is_file
from common.speed.precision import PRECISIONS

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

# The modes of a command. A script may have more of its own.
TRAIN, RESUME, EVALUATE, TEXT, LIKE = 'train', 'resume', 'evaluate', 'text', 'like'
TRAINING, GENERATING = (TRAIN, RESUME), (EVALUATE, TEXT, LIKE)
ALL = (*TRAINING, *GENERATING)
NEWEST = str(b'newest', 'ascii')  # `--resume` without a folder: an object of its own, as a folder may have that name

LARGEST_SEED = 10 ** 18
MOST_IMAGES = 100_000      # for the sentences of one command: their embeddings are in memory
MOST_CHOSEN = 1000         # images of which one is written
LONGEST_TEXT = 4_000_000   # characters in a file of sentences
UNUSED = []                # names of the flags that have no effect in the mode that was parsed last
LONGEST_COMPLAINT = 300    # characters of an error message: a value that it quotes may have any length


class Parser(OneLineParser):
    """A parser whose flags declare the modes in which they have an effect, and are refused in other modes.

    Flags from a configuration file or a resumed run are not refused: they may be meant for several modes.
    """

    def add_argument(self, *names, modes=None, selects_run=False, **settings):
        """Add a flag that has an effect in `modes`. With `selects_run`, `--resume` looks for a run with its value."""
        action = super().add_argument(*names, **settings)
        action.modes, action.selects_run = modes, selects_run
        return action

    def given(self, arguments):
        """Return the flags that the command line `arguments` contains, as argparse's actions."""
        nothing = object()  # argparse keeps what a namespace already has, except for flags on the command line
        namespace = argparse.Namespace(**{action.dest: None if isinstance(action, argparse._AppendAction) else nothing
                                          for action in self._actions})
        found = vars(self.parse_args(arguments, namespace))
        return [action for action in self._actions if found.get(action.dest) not in (None, nothing)]

    def paths(self):
        """Return the names of the flags that take a path."""
        return [action.dest for action in self._actions if action.type in (path, absolute_path)]

    def names_in_files(self):
        """Return the names of the flags that a configuration file may set: all except those that select a mode."""
        return {action.dest for action in self._actions
                if action.modes and (action.dest == TRAIN or action.dest not in ('cfg', *action.modes))}

    def unused(self, mode):
        """Return the names of the flags that have no effect in `mode`; a run keeps all, to be resumed with them."""
        return [action.dest for action in self._actions
                if mode not in TRAINING and action.modes and mode not in action.modes]

    def refuse_unused(self, arguments, mode):
        """Raise UserError if `arguments` contain a flag that has no effect in `mode`."""
        for action in self.given(arguments):
            if mode in action.modes:
                continue
            flag, trains = action.option_strings[0], mode in TRAINING
            advice = ('add --train False' if trains and not set(TRAINING) & set(action.modes) else
                      'the run keeps its own value; leave it out, or start a new run' if mode == RESUME else
                      'leave it out')
            raise UserError(f'{flag}: has no effect with {WHEN.get(mode, f"--{mode}")}; {advice}')


WHEN = {TRAIN: '--train', RESUME: '--resume', EVALUATE: '--train False'}  # the flags that select a mode


def boolean(text):
    """Convert 'True', 'yes', '1' ... to a bool, so that `--train False` means what it says."""
    if text.lower() in ('true', 'yes', 'y', '1', 'on'):
        return True
    if text.lower() in ('false', 'no', 'n', '0', 'off'):
        return False
    raise argparse.ArgumentTypeError(f'{text!r} is neither True nor False')


def add_boolean(parser, name, default, help, **settings):
    """Add a flag that can be written `--name`, `--name True` or `--name False`."""
    parser.add_argument(name, type=boolean, nargs='?', const=True, default=default, metavar='BOOL',
                        help=f'{help} (default: {default})', **settings)


def seed(text):
    """Convert text to a seed (an argparse type) of up to 18 digits, so that larger seeds after it are valid, too."""
    value = int(text)
    if abs(value) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f'{text[:40]} is too large; give a number of up to 18 digits')
    return value


def model_name(text):
    """Check text as an argparse type: a `plain_name` that is not that of another file in a run folder."""
    if text.lower() == 'encoder':
        raise argparse.ArgumentTypeError(f'{text!r} is the name of the sentence encoder in a run folder')
    return plain_name(text)


def add_run_flags(parser, model, epochs, batch_size, lr, section_dir, all_modes=ALL, seed_modes=(TRAIN, EVALUATE, TEXT),
                  batch_modes=TRAINING, resume_modes=(RESUME, *GENERATING), train_modes=None, data_modes=None,
                  models=None):
    """Add the flags that every section's main.py shares, with the section's defaults.

    `all_modes` are the section's modes; the other `..._modes` are those in which `--seed`, `--batch_size`, `--resume`,
    `--train` and `--data_dir` have an effect. `models` lists the values of `--model`, if not any name is allowed.
    """
    parser.add_argument('--model', type=model_name, choices=models, default=model, modes=all_modes,
                        help=f'name of the model and of its checkpoint file (default: {model})')
    add_boolean(parser, '--cuda', True, 'use the GPU if there is one', modes=all_modes)
    add_boolean(parser, '--train', True, 'train; False: evaluate', modes=train_modes or all_modes)
    parser.add_argument('--data_dir', type=absolute_path, metavar='DIR', modes=data_modes or all_modes,
                        selects_run=True, help='folder of the HDF5 file (default: data/DATASET in the repository)')
    parser.add_argument('--dataset', type=plain_name, default='birds', modes=all_modes, selects_run=True,
                        help='name of the HDF5 file, without its extension (default: birds)')
    parser.add_argument('--out_dir', type=absolute_path, default=os.path.join(section_dir, 'output'), metavar='DIR',
                        modes=all_modes,
                        help='folder in which every run makes a folder of its own (default: output beside main.py)')
    parser.add_argument('--epochs', type=positive(int), default=epochs, modes=TRAINING,
                        help=f'number of epochs to train (default: {epochs})')
    parser.add_argument('--batch_size', type=positive(int), default=batch_size, modes=batch_modes,
                        help='batch size of each process; torchrun with N processes trains on N times as many items '
                             f'in a step (default: {batch_size})')
    parser.add_argument('--lr', type=positive(float), default=lr, modes=TRAINING,
                        help=f'learning rate (default: {lr})')
    parser.add_argument('--log_interval', type=positive(int), default=20, modes=TRAINING,
                        help='number of steps between two log lines (default: 20)')
    parser.add_argument('--seed', type=seed, default=1, modes=seed_modes,
                        help='seed of the random numbers; a resumed run keeps its own (default: 1)')
    parser.add_argument('--keep', type=positive(int), default=KEEP, metavar='N', modes=TRAINING,
                        help='number of checkpoints that a run keeps: the newest, and older ones in case it is damaged '
                             f'(default: {KEEP})')
    add_boolean(parser, '--dry_run', False, 'print the networks, memory, time and disk space that the training takes, '
                'measured on a few steps, and write nothing', modes=TRAINING)
    parser.add_argument('--resume', type=path, nargs='?', const=NEWEST, metavar='RUN', modes=resume_modes,
                        help='resume the run in this folder, or the newest run if no folder is given' +
                             '; with --train False, generate images with it' * (len(resume_modes) > 1))


def add_sentence_flags(parser, generating_modes=GENERATING, encoder_modes=(TEXT, LIKE),
                       forms='a run folder or its .pt'):
    """Add the flags for generating images with a trained GAN, from `--checkpoint` to `--like`.

    `generating_modes` are the modes without training, and `encoder_modes` those that read sentences. `forms` describes
    the possible values of `--checkpoint` for its help text.
    """
    parser.add_argument('--checkpoint', type=path, metavar='FILE', modes=(TRAIN, *generating_modes),
                        help='checkpoint to generate with (default: that of the newest run) or to start a new run '
                             f'from: {forms}')
    parser.add_argument('--text', action='append', metavar='SENTENCE', modes=(TEXT, LIKE),
                        help='sentence to generate an image from; can be repeated')
    parser.add_argument('--text_file', type=path, metavar='FILE', modes=(TEXT, LIKE),
                        help='file of sentences to generate images from, one on each line')
    parser.add_argument('--encoder', type=path, metavar='FILE', modes=encoder_modes,
                        help='sentence encoder (default: the one in the run folder, or the one beside the data)')
    parser.add_argument('--truncation', type=positive(float), metavar='T',
                        modes=tuple(mode for mode in encoder_modes if mode != LIKE),
                        help='limit the noise to numbers from -T to T: less variety (default: no limit)')
    parser.add_argument('--like', type=path, metavar='FILE.png', modes=(LIKE,),
                        help='generate this image again, a PNG that --text wrote; with --text, generate images for '
                             'other sentences from its noise')


def add_count_flag(parser):
    """Add `--count` for the images of each sentence."""
    parser.add_argument('--count', type=positive(int), default=1, metavar='N', modes=(TEXT,),
                        help='number of images for each sentence, each with its own noise (default: 1)')


def add_best_of_flag(parser):
    """Add `--best_of`, with which only the most realistic of several images is written."""
    parser.add_argument('--best_of', type=up_to(MOST_CHOSEN), default=1, metavar='N', modes=(TEXT,),
                        help='generate N times as many images, and write only the most realistic of every N, whose '
                             'features are nearest to those of real photographs (default: 1, write all)')


def repeated(sentences, embeddings, count, best_of=1):
    """Return each of the sentences, and each of their embeddings [N, D], as often as images are generated for it.

    That is `best_of` times for each of the `count` images that are written (1 if it is None). Raises UserError if these
    are too many.
    """
    number = (count or 1) * best_of
    if len(sentences) * number > MOST_IMAGES:
        flag = f'--count {count or 1}' + f' --best_of {best_of}' * (best_of > 1)
        raise UserError(f'{flag}: {len(sentences) * number:,} images for {len(sentences):,} sentences; a command '
                        f'generates at most {MOST_IMAGES:,}: give a smaller number, or fewer sentences')
    return [sentence for sentence in sentences for _ in range(number)], embeddings.repeat_interleave(number, 0)


def add_widths(parser, widths):
    """Add flags for the sizes of networks from (name, default, description) triples, the largest number after some."""
    for name, default, what, *most in widths:
        parser.add_argument(f'--{name}', type=up_to(*most) if most else positive(int), default=default, metavar='N',
                            modes=TRAINING, help=f'{what} (default: {default})')


def add_weights(parser, weights):
    """Add flags for the weights of losses from (name, default, name of the loss) triples."""
    for name, default, what in weights:
        parser.add_argument(f'--{name}', type=non_negative(float), default=default, metavar='W', modes=TRAINING,
                            help=f'weight of {what} (default: {default})')


def add_large_image_flags(parser, all_modes):
    """Add the flags for training on large images: `--gpu`, `--workers`, `--accumulate`, `--cache`."""
    parser.add_argument('--gpu', type=int, default=0, metavar='N', modes=all_modes,
                        help='index of the GPU, or -1 for the CPU; each process of torchrun has its own (default: 0)')
    parser.add_argument('--workers', type=non_negative(int), default=4, modes=TRAINING,
                        help='number of processes that prepare images, at most one per core, 0 for none; the images '
                             'do not depend on it (default: 4)')
    parser.add_argument('--accumulate', type=positive(int), default=1, metavar='N', modes=TRAINING,
                        help='number of micro-batches into which a batch is split for the discriminators and their '
                             'batch norms; more than 1 saves memory but takes longer, because activations are '
                             'recomputed (default: 1, as in the authors\' code)')
    add_boolean(parser, '--cache', True, 'decode and resize photographs once, into a file beside the data',
                modes=TRAINING)


def dataset_file(options):
    """Return the path of the HDF5 file of `--data_dir` and `--dataset`: NAME.hdf5, or NAME.h5 if only that exists."""
    if options.dataset.endswith(('.hdf5', '.h5')):
        raise UserError(f'--dataset {options.dataset}: give the name without its ending, '
                        f'{os.path.splitext(options.dataset)[0]}')
    if os.path.isfile(options.data_dir or ''):
        raise UserError(f'--data_dir {options.data_dir}: is a file; give its folder, and its name with --dataset')
    stem = os.path.join(options.data_dir or os.path.join(ROOT, 'data', options.dataset), options.dataset)
    found = list(filter(os.path.isfile, (f'{stem}.hdf5', f'{stem}.h5'))) or [f'{stem}.hdf5']
    if len(found) > 1:
        print(f'{stem}.h5: is not read, because {found[0]} exists as well')
    return found[0]


def as_arguments(values):
    """Convert {flag: value} to arguments of a command line, without values that are None or ''."""
    return [part for name, value in values.items() if value not in (None, '')
            for part in ([f'--{name}', *map(str, value)] if isinstance(value, list) else [f'--{name}={value}'])]


def check_values(parser, values, path):
    """Raise UserError, which names the file `path`, if the parser refuses the {flag: value} read from it."""
    for name, value in values.items():
        if isinstance(value, list) and (not value or any(str(item or '-').startswith('-') for item in value)):
            raise UserError(f'{path}: {name}: the list, or an item of it, is empty, or an item begins with -; '
                            'list values only, or leave it out')
    parser.exit_on_error = False
    try:
        _, surplus = parser.parse_known_args(as_arguments(values))
    except argparse.ArgumentError as error:
        raise UserError(f'{path}: {textwrap.shorten(str(error), LONGEST_COMPLAINT)}') from error
    finally:
        parser.exit_on_error = True
    if surplus:
        too_much = textwrap.shorten(', '.join(surplus), LONGEST_COMPLAINT)
        raise UserError(f'{path}: a list in place of one value: remove {too_much}')


def mode_of(options, *own_modes):
    """Return the mode that the options select: one of `ALL`, or of `own_modes`, the flags that are modes themselves."""
    if options.train:
        return RESUME if options.resume else TRAIN
    own = next((name for name in (*own_modes, LIKE) if getattr(options, name, None)), None)
    has_text = getattr(options, 'text', None) or getattr(options, 'text_file', None)
    return own or (TEXT if has_text else EVALUATE)


def print_options(options):
    """Print the options that have an effect in the mode that was parsed, as a table in alphabetical order."""
    shown = {name: value for name, value in vars(options).items() if name not in UNUSED}
    width = max(map(len, shown))
    print('\n'.join(f'  {name:<{width}}  {value}' for name, value in sorted(shown.items())), flush=True)


def choose_device(cuda, gpu=0):
    """Return the device for `--cuda` and `--gpu` (a number, or -1 for the CPU); print a message if no GPU is found.

    Each of several ranks gets the GPU with its number on its machine. Raises UserError if the machine has GPUs, but
    none with that number.
    """
    if not cuda or gpu < 0:
        return torch.device('cpu')
    if not torch.cuda.is_available():
        print('--cuda True, but PyTorch finds no CUDA device: using the CPU')
        return torch.device('cpu')
    asked = f'--gpu {gpu}'
    if ranks.world_size() > 1:
        gpu = ranks.local_rank()
        asked = f'torchrun started a process for GPU {gpu}'
    if gpu >= torch.cuda.device_count():
        raise UserError(f'{asked}: there is no such GPU; this machine has {torch.cuda.device_count()}, numbered from '
                        '0; use one of those')
    torch.backends.cudnn.benchmark = True
    torch.cuda.set_device(gpu)
    return torch.device('cuda', gpu)


def seed_everything(seed):
    """Seed the global generators of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_up(options):
    """Print the options, join the other ranks, and seed all generators. Returns the device.

    Raises UserError if several processes were started for anything but a training, or for a dry run.
    """
    if ranks.world_size() > 1 and not options.train:
        raise UserError('--train False: runs in one process; start it with python, not with torchrun')
    if ranks.world_size() > 1 and options.dry_run:
        raise UserError('--dry_run: measures one process; start it with python, not with torchrun')
    ranks.join()
    print_options(options)
    device = choose_device(options.cuda, getattr(options, 'gpu', 0))
    seed_everything(options.seed)
    return device


def read_sentences(texts, text_file, flag='--text'):
    """Return the sentences of `flag` (a list or None) and of the file `text_file` (one on each line).

    Raises UserError if there is none, if one on the command line is empty, or if the file cannot be read.
    """
    sentences = list(texts or [])
    if not all(map(str.strip, sentences)):
        raise UserError(f'{flag}: the sentence is empty; write one, as in {flag} "a small red bird"')
    if text_file:
        try:
            check_is_file(text_file)
            with open(text_file, encoding='utf-8-sig') as lines:
                text = lines.read(LONGEST_TEXT + 1)
            if len(text) > LONGEST_TEXT:
                raise UserError(f'{text_file}: has more than {LONGEST_TEXT:,} characters; --text_file takes one '
                                'sentence on each line: split it, or give the right file')
            sentences += text.split('\n')  # splitlines() would also split at Unicode's other line ends
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'{text_file}: cannot be read as UTF-8 text ({error}); '
                            '--text_file takes one sentence on each line') from error
    sentences = [re.sub('[ \t]+', ' ', sentence).strip() for sentence in sentences if sentence.strip()]
    for sentence in sentences:
        if not is_valid_text(sentence):
            raise UserError(f'{text_file or flag}: {ascii(sentence[:60])} has control characters, or is not valid '
                            'UTF-8; type the sentence again')
    if not sentences:
        raise UserError(f'{text_file or flag}: contains no sentence; write one, as in {flag} "a small red bird"')
    return sentences


def add_precision_flag(parser):
    """Add `--precision`, one of `common.speed.precision.PRECISIONS`."""
    parser.add_argument('--precision', choices=PRECISIONS, default='auto', modes=TRAINING,
                        help='number format to train in; auto: bf16 if the hardware has it, else fp32 (default: auto)')


def add_compile_flag(parser):
    """Add `--compile`, whose value is 'auto', True or False."""
    parser.add_argument('--compile', type=lambda text: text if text == 'auto' else boolean(text), nargs='?', const=True,
                        default='auto', metavar='BOOL', modes=TRAINING,
                        help='compile the networks, so that the first steps take longer and all others less time; '
                             'auto: only on a single GPU that supports it and without --accumulate, not on a CPU, '
                             'where the first step takes minutes, nor on several GPUs, where it is untested '
                             '(default: auto)')
