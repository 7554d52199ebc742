"""Compute the same numbers faster, or in less memory: one call for a training, and one for an evaluation.

Networks do not depend on this. Without these calls, everything works as before, except for time and rounding.
Parameters, their names, and the inputs and outputs of a network stay the same.
"""
import torch
from torch import nn

from common.errors import UserError
from common.speed import accumulation, allocator, compiling, cpu_kernels
from common.speed.precision import choose_precision, in_bf16, in_bf16_in_training, keep_outputs_in_float32


def prepare(generator, discriminators, heads=(), *, device, precision, compile, accumulate=1, batch_size):
    """Make the networks of a GAN train faster on `device`, or with `accumulate` > 1 in less memory, and print how.

    `heads` are parts of discriminators that a training step calls by themselves. `precision` is one of
    `precision.PRECISIONS`, `compile` is 'auto' or a bool; with `accumulate`, discriminators see a batch in that many
    parts. Call this before or after making optimizers, but before their first step. Raises UserError, with everything
    unchanged, if the device does not support it.
    """
    if accumulate > batch_size:
        raise UserError(f'--accumulate {accumulate}: more parts than images; with --batch_size {batch_size} give '
                        f'{batch_size} or less')
    if accumulate > 1 and compile is True:
        raise UserError('--compile True and --accumulate: give one of them')
    number_format = choose_precision(precision, device)  # not stored: a run may be resumed on another machine
    is_compiled = accumulate == 1 and compiling.can_compile(compile, device)  # recomputed layers do not compile
    use_number_format(number_format)
    if accumulate > 1:
        torch.backends.cudnn.benchmark = False  # it may choose algorithms that are faster by taking more memory
    if device.type == 'cpu':
        allocator.return_freed_memory() if accumulate > 1 else allocator.keep_freed_memory()

    for net in (generator, *discriminators):
        arrange(net, device)
        if accumulate > 1:
            accumulation.recompute(net)
        if number_format == 'bf16':
            keep_outputs_in_float32(net)
    for net in (generator, *discriminators, *heads):
        plain = call = net.forward
        if accumulate > 1 and net in discriminators:
            call = accumulation.in_parts(call, accumulate)
        if number_format == 'bf16':
            call = in_bf16(call, device.type)
        if is_compiled:
            call = compiling.compiled_for_whole_batches(net, call, batch_size)
        if call is not plain:
            # A module around the network would put its name in front of every key of the state dict.
            net.forward = call


def prepare_network(net, *, device, precision):
    """Make a single network train faster on `device`, and print how. Raises UserError as `prepare` does.

    In bf16, only its convolutions are, and only in training mode.
    """
    number_format = choose_precision(precision, device)
    use_number_format(number_format)
    if device.type == 'cpu':
        allocator.keep_freed_memory()
    if number_format == 'bf16':
        for layer in net.modules():
            if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
                layer.forward = in_bf16_in_training(layer, device.type)


def use_number_format(number_format):
    """Print the number format, and let GPUs use TF32 if it is tf32."""
    print(f'Computing in {number_format}')
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = number_format == 'tf32'


def prepare_evaluation(generator, device):
    """Make a generator of large images that is not trained generate many of them faster on `device`."""
    if device.type == 'cpu':
        allocator.keep_freed_memory()
    arrange(generator, device)


def arrange(net, device):
    """Make the layers of `net` compute in the fastest way on `device`."""
    net.to(memory_format=torch.channels_last)
    if device.type == 'cpu':
        cpu_kernels.place_all(net)
