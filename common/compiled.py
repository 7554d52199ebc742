"""Networks compiled for a training: `--compile`."""
import functools

import torch

from common.errors import UserError
from common.flags import boolean

VARIANTS = 64  # of a network, each compiled by itself: other shapes, with or without gradients, of its branches


def add_compile_flag(parser):
    parser.add_argument('--compile', type=auto_or_boolean, nargs='?', const=True, default='auto', metavar='BOOL',
                        help='train with compiled networks: first steps take long, the others less; auto: on a GPU '
                             'where that works, never on a CPU, where the first step alone takes minutes '
                             '(default: auto)')


def auto_or_boolean(text):
    return text if text == 'auto' else boolean(text)


def choose(asked, device):
    """`--compile` on `device` -> bool; `auto` is True on a GPU where PyTorch can compile, which is found out by trying:
    it takes Triton, a C++ compiler and Python's headers. Raises UserError where True is asked for and it cannot.
    """
    if not asked or asked == 'auto' and device.type != 'cuda':
        return False
    try:
        torch.compile(lambda x: x + 1, options={'force_disable_caches': True})(torch.zeros(2, device=device))
        return True
    except Exception as error:  # of what is missing there are as many kinds as there are tools
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if asked == 'auto':
            print(f'--compile auto: not compiled, for PyTorch cannot do it here ({reason})')
            return False
        raise UserError(f'--compile True: PyTorch cannot compile here ({reason}); it takes a C++ compiler, and on a '
                        'GPU Triton; use --compile False') from error


def prepare(options, device, *nets):
    """Let networks, or parts of them that are called by themselves, be compiled where `--compile` says so. Says so.

    They are what `precision.prepare` made of them; state dicts and random numbers stay the same. What is drawn between
    two steps is not compiled: for a few pictures that would take longer. Raises UserError as `choose` does.
    """
    if vars(options).get('accumulate', 1) > 1:  # a compiler does not take to what is computed again
        if options.compile is True:
            raise UserError('--compile True and --accumulate: give one of them')
        options.compile = False
    options.compile = choose(options.compile, device)  # noted in the run: `--resume` goes on with it
    if not options.compile:
        return
    print('Compiling: the first steps take longer')
    torch._dynamo.config.cache_size_limit = VARIANTS  # what is beyond it would silently not be compiled
    for net in nets:
        # Without CUDA graphs: they keep results in memory that the next call writes to, and a discriminator is called
        # several times before its losses go back. fallback_random draws what PyTorch draws when it does not compile.
        # dynamic=False: an epoch's last batch gets networks of its own, instead of slower ones for all batches.
        net.forward = in_training(net, torch.compile(net.forward, dynamic=False, options={'fallback_random': True}))


def in_training(net, compiled):
    """`compiled` while `net` is in training mode, else what its forward is now."""
    plain = net.forward

    @functools.wraps(plain)
    def call(*inputs, **named_inputs):
        return (compiled if net.training else plain)(*inputs, **named_inputs)
    return call
