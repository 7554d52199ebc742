"""Command-line flags that every chapter has, as the chapter types them, and what follows from them."""
import argparse
import os
import random
import textwrap
import unicodedata

import numpy as np
import torch

from common import ranks
from common.checkpoint import KEEP
from common.errors import OneLineParser, UserError
from common.files import check_is_file
from common.speed.precision import PRECISIONS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# What a command can be asked for. A script may have more modes of its own.
TRAIN, RESUME, EVALUATE, TEXT = 'train', 'resume', 'evaluate', 'text'
TRAINING, GENERATING = (TRAIN, RESUME), (EVALUATE, TEXT)
ALL = (*TRAINING, *GENERATING)

LARGEST = 2 ** 31 - 1      # of whole numbers and of weights: what is larger is a typing error, and overflows
LARGEST_SEED = 10 ** 18
LONGEST_NAME = 100         # bytes; a date and an ending are added, and file systems take 255
LONGEST_TEXT = 4_000_000   # characters of the sentences in a file
LONGEST_COMPLAINT = 300    # letters of what is said about a file: a value in it may have any number of them


class Parser(OneLineParser):
    """A parser whose flags say in which modes they are used: typed in another mode, a flag is refused.

    What a configuration file or a resumed run says is not refused: it may be meant for several modes.
    """

    def add_argument(self, *names, modes=None, selects_run=False, **settings):
        """Add a flag, which has an effect in some `modes`; its value may say which run is meant (`selects_run`)."""
        action = super().add_argument(*names, **settings)
        action.modes, action.selects_run = modes, selects_run
        return action

    def given(self, arguments):
        """The flags that the command line `arguments` names, as argparse's actions."""
        nothing = object()  # argparse leaves what a namespace already has, but for what is typed
        namespace = argparse.Namespace(**{action.dest: None if isinstance(action, argparse._AppendAction) else nothing
                                          for action in self._actions})
        found = vars(self.parse_args(arguments, namespace))
        return [action for action in self._actions if found.get(action.dest) not in (None, nothing)]

    def paths(self):
        """Return the names of the flags that take a path."""
        return [action.dest for action in self._actions if action.type in (path, absolute_path)]

    def names_in_files(self):
        """Return the names of the flags that a configuration file may set: not those that ask for a mode."""
        return {action.dest for action in self._actions
                if action.modes and (action.dest == TRAIN or action.dest not in ('cfg', *action.modes))}

    def refuse_unused(self, arguments, mode):
        """Raise UserError where `arguments` name a flag that has no effect in `mode`."""
        for action in self.given(arguments):
            if mode in action.modes:
                continue
            flag, trains = action.option_strings[0], mode in TRAINING
            advice = ('add --train False' if trains and not set(TRAINING) & set(action.modes) else
                      'the run goes on with its own; leave it out, or start a new run' if mode == RESUME else
                      'leave it out')
            raise UserError(f'{flag}: has no effect with {WHEN.get(mode, f"--{mode}")}; {advice}')


WHEN = {TRAIN: '--train', RESUME: '--resume', EVALUATE: '--train False'}  # what a mode is asked for with


def boolean(text):
    """'True', 'yes', '1' ... to a bool, so that `--train False` means what it says."""
    if text.lower() in ('true', 'yes', 'y', '1', 'on'):
        return True
    if text.lower() in ('false', 'no', 'n', '0', 'off'):
        return False
    raise argparse.ArgumentTypeError(f'{text!r} is neither True nor False')


def add_boolean(parser, name, default, help, **settings):
    """A flag that can be written `--name`, `--name True` and `--name False`."""
    parser.add_argument(name, type=boolean, nargs='?', const=True, default=default, metavar='BOOL',
                        help=f'{help} (default: {default})', **settings)


def positive(number):
    """An argparse type: `positive(int)` or `positive(float)`, above zero."""
    return _checked(number, 'positive', lambda value: value > 0, 'is not above zero')


def non_negative(number):
    """An argparse type: `non_negative(int)` or `non_negative(float)`, at least zero."""
    return _checked(number, 'non-negative', lambda value: value >= 0, 'is below zero')


def _checked(number, kind, is_fine, complaint):
    def parse(text):
        value = number(text)
        if value != value:
            raise argparse.ArgumentTypeError(f'{text} is no number')
        if not is_fine(value):
            raise argparse.ArgumentTypeError(f'{text} {complaint}')
        if value > LARGEST:
            raise argparse.ArgumentTypeError(f'{text[:40]} is too large')
        return value
    parse.__name__ = f'{kind} {number.__name__}'
    return parse


def seed(text):
    """An argparse type: a whole number that every generator takes, and a good many numbers after it, too."""
    value = int(text)
    if abs(value) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f'{text[:40]} is too large: give a number of up to 18 digits')
    return value


def is_valid_text(text):
    """False for control characters, which a terminal would obey, and for bytes that were no UTF-8."""
    return not any(unicodedata.category(letter) in ('Cc', 'Cs') for letter in text)


def plain_name(text):
    """An argparse type: a name that a file or a folder can have, not a path to one."""
    is_too_long = len(os.fsencode(text)) > LONGEST_NAME
    if not text.strip(' .') or set(text) & set('/\\') or not is_valid_text(text) or is_too_long:
        raise argparse.ArgumentTypeError(f'{text[:100]!r} is no plain name, of which files and folders are made')
    return text


def model_name(text):
    """An argparse type: a `plain_name` that no other file of a run has."""
    if text.lower() == 'encoder':
        raise argparse.ArgumentTypeError(f'{text!r} is the name of the sentence encoder in a run folder')
    return plain_name(text)


def path(text):
    """An argparse type: a path, which '' (an unset variable of the shell, say) is not."""
    if not text:
        raise argparse.ArgumentTypeError('is empty; leave out the flag, or give a path')
    return text


def absolute_path(text):
    """An argparse type: as `path`, from the root of the file system on."""
    return os.path.abspath(path(text))


def add_run_flags(parser, model, epochs, batch_size, lr, section_dir, all_modes=ALL, seed_modes=(TRAIN, *GENERATING),
                  batch_modes=TRAINING, resume_modes=(RESUME, *GENERATING), train_modes=None, data_modes=None,
                  models=None):
    """The flags that every section's main.py shares; the other arguments are the section's defaults and its modes.

    `all_modes` are all that it has; `--seed`, `--batch_size`, `--resume`, `--train` and `--data_dir` have an effect in
    some of them. `models` are the names that `--model` can have, if not any.
    """
    parser.add_argument('--model', type=model_name, choices=models, default=model, modes=all_modes,
                        help=f'name of the model: of its checkpoint file (default: {model})')
    add_boolean(parser, '--cuda', True, 'use the GPU where there is one', modes=all_modes)
    add_boolean(parser, '--train', True, 'train; False: evaluate', modes=train_modes or all_modes)
    parser.add_argument('--data_dir', type=absolute_path, metavar='DIR', modes=data_modes or all_modes,
                        help='folder of the HDF5 file (default: data/DATASET in the repository)')
    parser.add_argument('--dataset', type=plain_name, default='birds', modes=all_modes, selects_run=True,
                        help='name of the HDF5 file, without ending (default: birds)')
    parser.add_argument('--out_dir', type=absolute_path, default=os.path.join(section_dir, 'output'), metavar='DIR',
                        modes=all_modes,
                        help='every run makes a folder of its own in here (default: output beside main.py)')
    parser.add_argument('--epochs', type=positive(int), default=epochs, modes=TRAINING, help=f'default: {epochs}')
    parser.add_argument('--batch_size', type=positive(int), default=batch_size, modes=batch_modes,
                        help=f'items in a step of each process: N of torchrun take N times as many '
                             f'(default: {batch_size})')
    parser.add_argument('--lr', type=positive(float), default=lr, modes=TRAINING,
                        help=f'learning rate (default: {lr})')
    parser.add_argument('--log_interval', type=positive(int), default=20, modes=TRAINING,
                        help='steps between two lines of the log (default: 20)')
    parser.add_argument('--seed', type=seed, default=1, modes=seed_modes,
                        help='seed of the random numbers; a resumed run goes on with its own (default: 1)')
    parser.add_argument('--keep', type=positive(int), default=KEEP, metavar='N', modes=TRAINING,
                        help='checkpoints of a run that are kept: the newest, and those before it for when that is '
                             f'damaged (default: {KEEP})')
    parser.add_argument('--resume', type=path, nargs='?', const='newest', metavar='RUN', modes=resume_modes,
                        help='go on with a run: its folder, or without a value the newest one; '
                             'with --train False: generate with it')


def add_sentence_flags(parser, generating_modes=GENERATING, encoder_modes=(TEXT,), forms='a run folder or its .pt'):
    """Add what a trained GAN generates images with: `--checkpoint`, and `--text`, `--text_file` and `--encoder`.

    `generating_modes` are those without training, `encoder_modes` those that read sentences; `forms` says in words what
    `--checkpoint` can be.
    """
    parser.add_argument('--checkpoint', type=path, metavar='FILE', modes=(TRAIN, *generating_modes),
                        help='checkpoint to generate with (default: that of the newest run), or to start a training '
                             f'from: {forms}')
    parser.add_argument('--text', action='append', metavar='SENTENCE', modes=(TEXT,),
                        help='sentence to generate an image of; can be repeated')
    parser.add_argument('--text_file', type=path, metavar='FILE', modes=(TEXT,),
                        help='file of sentences to generate images of, one per line')
    parser.add_argument('--encoder', type=path, metavar='FILE', modes=encoder_modes,
                        help='sentence encoder (default: the one in the run, or the one beside the data)')


def add_widths(parser, widths):
    """Add flags for the sizes of networks: (name, default, what it is) each."""
    for name, default, what in widths:
        parser.add_argument(f'--{name}', type=positive(int), default=default, metavar='N', modes=TRAINING,
                            help=f'{what} (default: {default})')


def add_weights(parser, weights):
    """Add flags for the weights of losses: (name, default, which loss) each."""
    for name, default, what in weights:
        parser.add_argument(f'--{name}', type=non_negative(float), default=default, metavar='W', modes=TRAINING,
                            help=f'weight of {what} (default: {default})')


def add_large_image_flags(parser, all_modes):
    """Add what a training on large images takes: `--gpu`, `--workers`, `--accumulate`, `--cache`."""
    parser.add_argument('--gpu', type=int, default=0, metavar='N', modes=all_modes,
                        help='number of the GPU, -1 for the CPU; processes of torchrun have one each (default: 0)')
    parser.add_argument('--workers', type=non_negative(int), default=4, modes=TRAINING,
                        help='processes that prepare images, at most one per core, 0 for none; the images are the same '
                             'with any number (default: 4)')
    parser.add_argument('--accumulate', type=positive(int), default=1, metavar='N', modes=TRAINING,
                        help='number of parts in which discriminators, and their batch norms, see a batch; with '
                             'more than 1, activations are computed again: less memory, more time (default: 1, as the '
                             'authors do)')
    add_boolean(parser, '--cache', True, 'decode and resize photographs once, into a file beside the data',
                modes=TRAINING)


def dataset_file(options):
    """The path of the HDF5 file of `--data_dir` and `--dataset`: NAME.hdf5, or NAME.h5 where only that exists."""
    stem = os.path.join(options.data_dir or os.path.join(ROOT, 'data', options.dataset), options.dataset)
    found = list(filter(os.path.isfile, (f'{stem}.hdf5', f'{stem}.h5'))) or [f'{stem}.hdf5']
    if len(found) > 1:
        print(f'{stem}.h5: is not read, for {found[0]} is there, too')
    return found[0]


def as_arguments(values):
    """{flag: value} as arguments of a command line; what is None or empty is left out."""
    return [part for name, value in values.items() if value not in (None, '')
            for part in ([f'--{name}', *map(str, value)] if isinstance(value, list) else [f'--{name}={value}'])]


def check_values(parser, values, path):
    """Raise UserError where the parser refuses {flag: value} of the file `path`: argparse would not name the file."""
    for name, value in values.items():
        if isinstance(value, list) and (not value or any(str(item or '-').startswith('-') for item in value)):
            raise UserError(f'{path}: {name}: an empty list, or one in which something is empty or begins with -; '
                            'list values alone, or leave it out')
    parser.exit_on_error = False
    try:
        _, surplus = parser.parse_known_args(as_arguments(values))
    except argparse.ArgumentError as error:
        raise UserError(f'{path}: {textwrap.shorten(str(error), LONGEST_COMPLAINT)}') from error
    finally:
        parser.exit_on_error = True
    if surplus:
        too_much = textwrap.shorten(', '.join(surplus), LONGEST_COMPLAINT)
        raise UserError(f'{path}: a list where one value belongs: {too_much} is too much')


def mode_of(options, *own_modes):
    """What the options ask for: one of `ALL`, or of `own_modes`, flags that are modes of their own."""
    if options.train:
        return RESUME if options.resume else TRAIN
    own = next((name for name in own_modes if getattr(options, name)), None)
    has_text = getattr(options, 'text', None) or getattr(options, 'text_file', None)
    return own or (TEXT if has_text else EVALUATE)


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


def set_up(options):
    """Print the options, meet the other ranks, seed all generators. Returns the device.

    Raises UserError where several processes were started for something other than a training.
    """
    if ranks.world_size() > 1 and not options.train:
        raise UserError('--train False: generates in one process; start it with python, not with torchrun')
    ranks.join()
    print_options(options)
    device = choose_device(options.cuda, getattr(options, 'gpu', 0))
    seed_everything(options.seed)
    return device


def read_sentences(texts, text_file, flag='--text'):
    """The sentences of `flag` (a list or None) and `--text_file` (one a line).

    Raises UserError if there is none, or an empty one was typed.
    """
    sentences = list(texts or [])
    if not all(map(str.strip, sentences)):
        raise UserError(f'{flag}: an empty sentence; write one, as in {flag} "a small red bird"')
    if text_file:
        try:
            check_is_file(text_file)
            with open(text_file, encoding='utf-8-sig') as lines:
                text = lines.read(LONGEST_TEXT + 1)
            if len(text) > LONGEST_TEXT:
                raise UserError(f'{text_file}: has more than {LONGEST_TEXT:,} characters; --text_file takes a sentence '
                                'a line: split it, or give the right file')
            sentences += text.split('\n')  # nothing else that Unicode takes for the end of a line
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'{text_file}: cannot be read as UTF-8 text ({error}); '
                            '--text_file takes a sentence a line') from error
    sentences = [sentence.replace('\t', ' ').strip() for sentence in sentences if sentence.strip()]
    for sentence in sentences:
        if not is_valid_text(sentence):
            raise UserError(f'{text_file or flag}: {ascii(sentence[:60])} has control characters, or is not valid '
                            'UTF-8; write the sentence anew')
    if not sentences:
        raise UserError(f'{text_file or flag}: no sentence in it; write one, as in {flag} "a small red bird"')
    return sentences


def add_precision_flag(parser):
    """Add `--precision`, one of `common.speed.precision.PRECISIONS`."""
    parser.add_argument('--precision', choices=PRECISIONS, default='auto', modes=TRAINING,
                        help='train in fp32, tf32 or bf16; auto: bf16 where the hardware has it, else fp32 '
                             '(default: auto)')


def add_compile_flag(parser):
    """Add `--compile`, which becomes 'auto', True or False."""
    parser.add_argument('--compile', type=lambda text: text if text == 'auto' else boolean(text), nargs='?', const=True,
                        default='auto', metavar='BOOL', modes=TRAINING,
                        help='train with compiled networks: first steps take long, the others less; auto: on one GPU '
                             'where that works and without --accumulate; never on a CPU, where the first step alone '
                             'takes minutes, nor on several GPUs, where it is untried (default: auto)')
