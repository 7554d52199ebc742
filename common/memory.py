"""Training in less memory, `--accumulate`, and memory that a process keeps."""
import contextlib
import ctypes
import functools
import sys

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
LARGE = 2 ** 23  # bytes


def keep_what_is_freed():
    """Let the C library keep the memory of tensors that are gone for the next ones.

    As it is, it gives large pieces back at once, and the system clears every page that it hands out again: up to a
    quarter of the time of a StackGAN's step on a CPU. What is kept has gaps: up to a quarter more memory.
    """
    tell_malloc(M_TRIM_THRESHOLD, -1)  # keep all that is free,
    tell_malloc(M_MMAP_MAX, 0)         # and ask for no piece by itself


def give_back_what_is_freed():
    """Let the C library ask for every large piece of memory by itself, which goes back as soon as it is free.

    As it is, it comes to hold pieces of up to 32 MB for small, whose gaps are an eighth of the memory of a StackGAN++.
    """
    tell_malloc(M_MMAP_THRESHOLD, LARGE)


def tell_malloc(parameter, value):
    """Works with glibc, on Linux; elsewhere nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt:
        mallopt(parameter, value)


def prepare(parts, generator, *discriminators):
    """Let discriminators see a batch in that many `parts`, one after the other, and keep few activations.

    Of the parts, and of each sequence of the generator's layers, only the inputs are kept; the rest is computed again
    when gradients need it. Gradients of the parts add up to that of the batch. A discriminator's batch norm has the
    statistics of a part.
    """
    torch.backends.cudnn.benchmark = False  # it may choose algorithms that are faster by taking more memory
    for module in list(generator.modules()):
        # The innermost sequences: one around them would let them compute twice again.
        if isinstance(module, nn.Sequential) and not any(list(layer.children()) for layer in module):
            module.forward = recomputed(module)
    for netD in discriminators:
        netD.forward = in_parts(recomputed(netD), parts)


def recomputed(module):
    """The module's forward, of whose activations none is kept: they are computed again for the gradient."""
    forward = module.forward
    contexts = functools.partial(_contexts, module)

    @functools.wraps(forward)
    def call(*inputs):
        if not torch.is_grad_enabled():
            return forward(*inputs)
        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts,
                          preserve_rng_state=False)  # no layer draws
    return call


def _contexts(module):
    """For the first computation, and for the second, of the same batch: batch norms must not count it again."""
    return contextlib.nullcontext(), _with_fixed_statistics(module)


@contextlib.contextmanager
def _with_fixed_statistics(module):
    layers = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    before = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer in layers:
        layer.momentum, layer.num_batches_tracked = 0.0, layer.num_batches_tracked.clone()
    try:
        yield
    finally:
        for layer, (momentum, count) in zip(layers, before):
            layer.momentum, layer.num_batches_tracked = momentum, count


def in_parts(forward, count):
    """`forward` of up to `count` parts of its inputs [B, ...] or None; the results, tensors or lists, are joined."""
    @functools.wraps(forward)
    def call(*inputs):
        results = [forward(*part) for part in zip(*(tensor.chunk(count) for tensor in inputs if tensor is not None))]
        if isinstance(results[0], list):
            return [torch.cat(parts) for parts in zip(*results)]
        return torch.cat(results)
    return call
