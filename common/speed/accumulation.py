"""Train in less memory and more time: `--accumulate`."""
import contextlib
import functools
from collections import OrderedDict

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Recomputed(nn.Sequential):
    """Layers that keep only their input for the backward pass, which recomputes their activations."""

    def forward(self, features):
        if not torch.is_grad_enabled():
            return super().forward(features)
        return checkpoint(super().forward, features, use_reentrant=False, context_fn=self._contexts,
                          preserve_rng_state=False)  # no layer draws random numbers

    def _contexts(self):
        """Return the contexts of the first and of the second computation."""
        return contextlib.nullcontext(), self._with_fixed_statistics()

    @contextlib.contextmanager
    def _with_fixed_statistics(self):
        """Keep running statistics unchanged: the first computation has already counted the batch."""
        layers = [layer for layer in self if isinstance(layer, _BatchNorm)]
        before = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
        for layer in layers:
            layer.momentum, layer.num_batches_tracked = 0.0, layer.num_batches_tracked.clone()
        try:
            yield
        finally:
            for layer, (momentum, count) in zip(layers, before):
                layer.momentum, layer.num_batches_tracked = momentum, count


def recompute(net):
    """Replace each innermost sequence of layers of `net` by a `Recomputed` with the same names.

    With outer sequences as well, the inner ones would be computed three times.
    """
    for parent in list(net.modules()):
        for name, layers in list(parent.named_children()):
            if isinstance(layers, nn.Sequential) and not any(list(layer.children()) for layer in layers):
                setattr(parent, name, Recomputed(OrderedDict(layers.named_children())))


def in_parts(forward, count):
    """Return `forward` with its inputs [B, ...] or None split into up to `count` parts, and its results concatenated.

    A result is a tensor, or a list or tuple of tensors. The gradients of the parts add up to that of the batch, but
    batch norms use the statistics of a part.
    """
    @functools.wraps(forward)
    def call(*inputs):
        results = [forward(*part) for part in zip(*(tensor.chunk(count) for tensor in inputs if tensor is not None))]
        if torch.is_tensor(results[0]):
            return torch.cat(results)
        return type(results[0])(torch.cat(parts) for parts in zip(*results))
    return call
