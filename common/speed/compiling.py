"""Networks that are compiled for a training: `--compile`."""
import functools
import warnings

import torch

from common import ranks
from common.errors import UserError

# Code for any batch size would be slower; fallback_random draws the numbers that PyTorch draws without compiling.
# CUDA graphs are left out: no GPU was at hand to see whether they help.
SETTINGS = {'dynamic': False, 'options': {'fallback_random': True}}
VARIANTS = 64  # of a network, each compiled by itself: other shapes, with or without gradients, of its branches


def can_compile(asked, device):
    """Return whether to compile; `asked` is a bool, or 'auto': on a single GPU, if PyTorch can compile there.

    It tries: compiling takes Triton, a C++ compiler and Python's headers. Raises UserError where True is asked for and
    fails.
    """
    if not asked or asked == 'auto' and (device.type != 'cuda' or ranks.world_size() > 1):
        return False
    try:
        from torch._inductor import config  # takes a second to import: only where something is to be compiled
        # A result cached on another day says nothing about today; PyTorch warns that it then takes longer.
        with config.patch(force_disable_caches=True), warnings.catch_warnings(action='ignore'):
            torch.compile(lambda x: x + 1, **SETTINGS)(torch.zeros(2, device=device))
        return True
    except Exception as error:  # each missing tool raises an error of its own kind
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        if asked == 'auto':
            print(f'--compile auto: not compiled, because PyTorch cannot do it here ({reason})')
            return False
        raise UserError(f'--compile True: PyTorch cannot compile here ({reason}); it takes a C++ compiler, and on a '
                        'GPU Triton; use --compile False') from error


def compiled_for_whole_batches(net, forward, batch_size):
    """Return `forward`, compiled for when `net` is in training mode and its batch is whole.

    To compile for the last, smaller batch of an epoch would take more time than it saves, and so would it for the few
    images that are generated between two steps.
    """
    torch._dynamo.config.cache_size_limit = VARIANTS  # beyond it, PyTorch would silently stop compiling
    compiled = torch.compile(forward, **SETTINGS)

    @functools.wraps(forward)
    def call(*inputs, **named_inputs):
        is_whole = len(inputs[0]) >= batch_size - 1  # pairs of neighbors in a batch are one fewer
        return (compiled if net.training and is_whole else forward)(*inputs, **named_inputs)
    return call
