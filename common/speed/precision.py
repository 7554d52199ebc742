"""Choose the number format that networks compute in: `--precision`."""
import functools

import torch
from torch import nn

from common.errors import UserError

PRECISIONS = ('auto', 'fp32', 'tf32', 'bf16')
AMPERE = (8, 0)  # the first GPUs with tf32 and bf16
BF16_CPU_FLAGS = {'avx512_bf16', 'amx_bf16'}


def choose_precision(asked, device):
    """Return 'fp32', 'tf32' or 'bf16' for one of `PRECISIONS`; 'auto' is bf16 if the hardware has it, else fp32.

    Raises UserError if the hardware lacks the chosen format, which PyTorch would emulate many times slower.
    """
    if asked == 'auto':
        return 'bf16' if has_bf16(device) else 'fp32'
    processor = 'CPU' if device.type == 'cpu' else 'GPU'
    if asked == 'bf16' and not has_bf16(device):
        raise UserError(f'--precision bf16: this {processor} does not support it (it takes a GPU of compute capability '
                        '8.0 or more, or a CPU with avx512_bf16 or amx_bf16); use fp32')
    if asked == 'tf32' and not (device.type == 'cuda' and torch.cuda.get_device_capability(device) >= AMPERE):
        raise UserError(f'--precision tf32: this {processor} does not support it (it takes a GPU of compute capability '
                        '8.0 or more); use fp32')
    return asked


def has_bf16(device):
    """Return whether `device` multiplies bfloat16 numbers in hardware."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= AMPERE
    return device.type == 'cpu' and bool(BF16_CPU_FLAGS & cpu_flags())


def cpu_flags():
    """Return the names of this CPU's features, or an empty set if the system does not list them (only Linux does)."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as lines:
            return {flag for line in lines if line.startswith('flags') for flag in line.split(':', 1)[1].split()}
    except OSError:
        return set()


def in_bf16(forward, device_type):
    """Return `forward` with convolutions and matrix products in bfloat16, and with float32 results.

    Parameters, batch-norm statistics, losses and optimizers stay float32.
    """
    @functools.wraps(forward)
    def call(*inputs, **named_inputs):
        with torch.autocast(device_type, torch.bfloat16):
            return to_float32(forward(*inputs, **named_inputs))
    return call


def in_bf16_in_training(layer, device_type):
    """Return the forward pass of a layer, like `in_bf16` in training mode and unchanged in evaluation mode."""
    exact, rounded = layer.forward, in_bf16(layer.forward, device_type)

    @functools.wraps(exact)
    def call(*inputs, **named_inputs):
        return (rounded if layer.training else exact)(*inputs, **named_inputs)
    return call


def to_float32(values):
    """Convert a tensor, or a list or tuple of tensors, to float32; None stays None."""
    if isinstance(values, (list, tuple)):
        return type(values)(map(to_float32, values))
    return values if values is None else values.float()


def keep_outputs_in_float32(net):
    """Let every sigmoid and tanh, the last layers of discriminators and generators, compute in float32.

    Near 1, bfloat16 has steps of 1/256: too coarse for the logarithm of a probability and for the gradient of a pixel.
    """
    for layer in net.modules():
        if isinstance(layer, (nn.Sigmoid, nn.Tanh)):
            layer.register_forward_pre_hook(_inputs_to_float32)


def _inputs_to_float32(_, inputs):
    return to_float32(inputs)
