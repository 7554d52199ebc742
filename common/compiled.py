"""Networks compiled for a training: `--compile`."""
import functools
import warnings

import torch

from common import ranks
from common.errors import UserError
from common.flags import boolean

# Networks for any size of batch would be slower; fallback_random draws what PyTorch draws when it does not compile.
# CUDA graphs are left out: no GPU was at hand to see whether they help.
HOW = {'dynamic': False, 'options': {'fallback_random': True}}
VARIANTS = 64  # of a network, each compiled by itself: other shapes, with or without gradients, of its branches


def add_compile_flag(parser):
    parser.add_argument('--compile', type=auto_or_boolean, nargs='?', const=True, default='auto', metavar='BOOL',
                        modes=('train', 'resume'),
                        help='train with compiled networks: first steps take long, the others less; auto: on one GPU '
                             'where that works and without --accumulate; never on a CPU, where the first step alone '
                             'takes minutes, nor on several GPUs, where it is untried (default: auto)')


def auto_or_boolean(text):
    return text if text == 'auto' else boolean(text)


def choose(asked, device):
    """`--compile` on `device` -> bool; `auto` is True on a single GPU where PyTorch can compile.

    That is found out by trying: it takes Triton, a C++ compiler and Python's headers. Raises UserError where True is
    asked for and it cannot.
    """
    if not asked or asked == 'auto' and (device.type != 'cuda' or ranks.world_size() > 1):
        return False
    try:
        from torch._inductor import config  # takes a second to import: only where something is to be compiled
        # What was compiled another day says nothing about today; PyTorch warns that it then takes longer.
        with config.patch(force_disable_caches=True), warnings.catch_warnings(action='ignore'):
            torch.compile(lambda x: x + 1, **HOW)(torch.zeros(2, device=device))
        return True
    except Exception as error:  # of what is missing there are as many kinds as there are tools
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        if asked == 'auto':
            print(f'--compile auto: not compiled, because PyTorch cannot do it here ({reason})')
            return False
        raise UserError(f'--compile True: PyTorch cannot compile here ({reason}); it takes a C++ compiler, and on a '
                        'GPU Triton; use --compile False') from error


def prepare(options, device, *nets):
    """Let networks, or parts of them that are called by themselves, be compiled where `--compile` says so. Says so.

    They are what `precision.prepare` made of them; state dicts and random numbers stay the same. What is drawn between
    two steps is not compiled: for a few pictures that would take longer. Raises UserError as `choose` does.
    """
    if not choose(options.compile, device):  # what was asked for stays: a run may go on on another machine
        return
    print('Compiling: the first steps take longer')
    torch._dynamo.config.cache_size_limit = VARIANTS  # what is beyond it would silently not be compiled
    for net in nets:
        net.forward = for_whole_batches(net, torch.compile(net.forward, **HOW), options.batch_size)


def for_whole_batches(net, compiled, batch_size):
    """`compiled` while `net` is in training mode and sees whole batches, else what its forward is now.

    An epoch's last, smaller batch would take more time to compile for than it then saves.
    """
    plain = net.forward

    @functools.wraps(plain)
    def call(*inputs, **named_inputs):
        is_whole = len(inputs[0]) >= batch_size - 1  # StackGAN's wrong pairs are one fewer than a batch
        return (compiled if net.training and is_whole else plain)(*inputs, **named_inputs)
    return call
