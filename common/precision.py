"""With how many bits networks compute: `--precision`."""
import functools

import torch
from torch import nn

from common.errors import UserError

CHOICES = ('auto', 'fp32', 'tf32', 'bf16')
AMPERE = (8, 0)  # the first GPUs with tf32 and bf16
BF16_CPU_FLAGS = {'avx512_bf16', 'amx_bf16'}


def add_precision_flag(parser):
    parser.add_argument('--precision', choices=CHOICES, default='auto', modes=('train', 'resume'),
                        help='train in fp32, tf32 or bf16; auto: bf16 where the hardware has it, else fp32 '
                             '(default: auto)')


def choose(asked, device):
    """`--precision` on `device` -> 'fp32', 'tf32' or 'bf16'; `auto` is bf16 where the hardware has it, else fp32.

    Raises UserError where the hardware has not what was asked for: it would be imitated, many times slower.
    """
    if asked == 'auto':
        return 'bf16' if has_bf16(device) else 'fp32'
    processor = 'CPU' if device.type == 'cpu' else 'GPU'
    if asked == 'bf16' and not has_bf16(device):
        raise UserError(f'--precision bf16: this {processor} has none (it takes a GPU of compute capability 8.0 or '
                        'more, or a CPU with avx512_bf16 or amx_bf16); use fp32')
    if asked == 'tf32' and not (device.type == 'cuda' and torch.cuda.get_device_capability(device) >= AMPERE):
        raise UserError(f'--precision tf32: this {processor} has none (it takes a GPU of compute capability 8.0 or '
                        'more); use fp32')
    return asked


def has_bf16(device):
    """Whether `device` multiplies bfloat16 in hardware."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= AMPERE
    return device.type == 'cpu' and bool(BF16_CPU_FLAGS & cpu_flags())


def cpu_flags():
    """The names of what this CPU can do; none where the system does not say (only Linux does)."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as lines:
            return {flag for line in lines if line.startswith('flags') for flag in line.split(':', 1)[1].split()}
    except OSError:
        return set()


def prepare(options, device, *nets):
    """Let networks, or parts of them that are called by themselves, compute as `--precision` says. Says how.

    Parameters, batch-norm statistics, last layers' sigmoid and tanh, what networks return, losses and optimisers stay
    float32. Raises UserError as `choose` does.
    """
    precision = choose(options.precision, device)  # what was asked for stays: a run may go on on another machine
    print(f'Computing in {precision}')
    compute_in(precision, device, *nets)


def compute_in(precision, device, *nets):
    """Let networks compute in 'fp32', 'tf32' or 'bf16', which PyTorch imitates where `device` has it not."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == 'tf32'
    for net in nets if precision == 'bf16' else ():
        for module in net.modules():
            for layer, function in ((nn.Sigmoid, torch.sigmoid), (nn.Tanh, torch.tanh)):  # the last of D and of G
                if isinstance(module, layer):
                    module.forward = lambda values, function=function: function(values.float())
        net.forward = in_bf16(net.forward, device.type)


def in_bf16(forward, device_type):
    """`forward` with its convolutions and matrix products in bfloat16, and float32 results."""
    @functools.wraps(forward)
    def call(*inputs, **named_inputs):
        with torch.autocast(device_type, torch.bfloat16):
            return float32(forward(*inputs, **named_inputs))
    return call


def float32(values):
    """A tensor, or lists and tuples of them, as float32; what is None stays so."""
    if isinstance(values, (list, tuple)):
        return type(values)(map(float32, values))
    return values if values is None else values.float()
