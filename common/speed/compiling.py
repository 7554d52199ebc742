"""Compile networks for a training: `--compile`."""
import functools
import warnings

import torch

from common import ranks
from common.errors import UserError

# Code for any batch size would be slower; fallback_random gives the random numbers of PyTorch without compiling.
# CUDA graphs are not used: their benefit was not measured.
SETTINGS = {'dynamic': False, 'options': {'fallback_random': True}}
VARIANTS = 64  # compiled versions of a network: for each shape, with and without gradients, and for each branch


def can_compile(asked, device):
    """Return whether to compile; `asked` is a bool, or 'auto': on a single GPU, if PyTorch can compile there.

    It tries, because compiling takes Triton, a C++ compiler and Python's headers. Raises UserError if `asked` is True
    and the attempt fails.
    """
    if not asked or asked == 'auto' and (device.type != 'cuda' or ranks.world_size() > 1):
        return False
    try:
        from torch._inductor import config  # imported only here because it takes a second
        # A cached result does not show that compiling still works; PyTorch warns that it takes longer without caches.
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
    """Return `forward`, compiled for when `net` is in training mode and the batch is complete.

    For the smaller last batch of an epoch, and for the few images generated between two steps, compiling would take
    more time than it saves.
    """
    torch._dynamo.config.cache_size_limit = VARIANTS  # beyond it, PyTorch would silently stop compiling
    compiled = torch.compile(forward, **SETTINGS)

    @functools.wraps(forward)
    def call(*inputs, **named_inputs):
        is_whole = len(inputs[0]) >= batch_size - 1  # a batch has one pair of neighbors fewer
        return (compiled if net.training and is_whole else forward)(*inputs, **named_inputs)
    return call
