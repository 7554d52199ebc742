"""Several GPUs, of one machine or of several: what the processes that torchrun starts, the ranks, have to agree on.

Each rank has a device and an even share of every epoch of its own. All start with the same weights, and every step of
an optimizer takes the mean of their gradients, so the weights stay the same. Rank 0 alone speaks and writes. In a
process that torchrun has not started, nothing here does anything.
"""
import contextlib
import os
import signal
import sys
import time
from datetime import timedelta

import numpy as np
import torch
from torch import distributed, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DistributedSampler, RandomSampler

from common import signals, torch_errors
from common.errors import UserError

TIMEOUT = timedelta(minutes=10)  # for the slowest to come, from a machine that first has to make its data cache
SECONDS_TO_STOP = 30             # without torchrun: as many as it gives to processes that it ends


def world_size():
    """The number of ranks, on all machines together. Raises UserError where the environment has no number of them."""
    names = ('LOCAL_RANK', 'RANK', 'WORLD_SIZE')
    started_by_torchrun = all(name in os.environ for name in names)
    if started_by_torchrun and not all(os.environ[name].isdecimal() for name in names):
        raise UserError(f'{", ".join(f"{name}={os.environ[name]}" for name in names)}: are to be numbers, as torchrun '
                        'sets them; unset them to train in one process')
    return int(os.environ['WORLD_SIZE']) if started_by_torchrun else 1


def rank():
    """The number of this process, from 0."""
    return int(os.environ['RANK']) if world_size() > 1 else 0


def local_rank():
    """Its number among those of its machine, from 0."""
    return int(os.environ['LOCAL_RANK']) if world_size() > 1 else 0


def join():
    """Meet the other ranks; from here on only rank 0 prints, and optimizers take the mean of all ranks' gradients.

    Tensors on GPUs go through NCCL, those on the CPU through Gloo. Raises UserError where they cannot be met.
    """
    if world_size() == 1:
        return
    if rank() > 0:
        sys.stdout = open(os.devnull, 'w')
    signals.when_parent_ends(_terminate)
    try:
        distributed.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo', timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f'the other processes cannot be met ({str(error).splitlines()[0]}); start all with torchrun, '
                        'with a --master_addr that every machine reaches') from error
    register_optimizer_step_pre_hook(_average_gradients)
    print(f'{world_size()} processes train together: the batch is {world_size()} times --batch_size')


def _terminate():
    """End this process as torchrun would, which is no longer there to do it: a training stops and saves."""
    if local_rank() == 0:
        print('torchrun has ended: its processes on this machine stop, too', file=sys.stderr, flush=True)
    signals.to_main_thread(signal.SIGTERM)
    time.sleep(SECONDS_TO_STOP)
    os._exit(128 + signal.SIGTERM)  # it waits for a process that no longer comes, where no signal reaches it


def leave():
    """Part from the other ranks, after a success: after a failure, some may no longer be there to part from."""
    if world_size() > 1:
        distributed.destroy_process_group()


@contextlib.contextmanager
def _convert_peer_errors():
    """Where ranks wait for each other. Raises UserError where one no longer comes."""
    try:
        yield
    except RuntimeError as error:
        if torch_errors.is_of_gpu(error):
            raise  # of this process's own, which the loop explains
        if '/dev/shm' in str(error):  # of NCCL
            raise UserError(f'process {rank()} of {world_size()}: /dev/shm has too little room for NCCL; enlarge it '
                            '(Docker: --shm-size=1g), or set NCCL_SHM_DISABLE=1') from error
        raise UserError(f'process {rank()} of {world_size()} waits in vain for another: it has ended, or has not come '
                        f'for {TIMEOUT.seconds // 60} minutes; what it said itself tells why') from error


def _average_gradients(optimizer, *_):
    """Replace gradients by their mean over the ranks: one `all_reduce` of all of them in a row.

    Not with DistributedDataParallel, which expects one forward pass for each backward pass: a step of a GAN calls a
    discriminator three times, freezes it, and sends the generator's gradient through it. What has no gradient is left
    out, which is the same parameters on all ranks, for all run the same step.
    """
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group['params']
                 if parameter.grad is not None]
    row = torch.cat([gradient.flatten() for gradient in gradients])
    with _convert_peer_errors():
        distributed.all_reduce(row)
    row /= world_size()
    means = row.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [mean.view_as(gradient) for mean, gradient in zip(means, gradients)])


def synchronize(networks):
    """Give a list of networks the weights of rank 0, and on GPUs batch norms with the statistics of all ranks' batches.

    On CPUs, for which PyTorch has no such layer, every rank's batch norms see its own batches.
    """
    if world_size() == 1:
        return
    for net in networks:
        if next(net.parameters()).is_cuda:
            nn.SyncBatchNorm.convert_sync_batchnorm(net)  # in place, with the same parameters under the same names
        for value in net.state_dict().values():
            first = value.contiguous()
            with _convert_peer_errors():
                distributed.broadcast(first, 0)
            value.copy_(first)


def sampler(dataset):
    """A sampler of an epoch's items in a new order, and of those only this rank's share.

    Shares are of one size, so that no rank waits for the batches of another; up to world_size - 1 items, of every
    epoch others, are left out. Of several ranks, the order is that of the last `torch.manual_seed` and of the epoch.
    """
    if world_size() == 1:
        return RandomSampler(dataset)
    return DistributedSampler(dataset, world_size(), rank(), seed=torch.initial_seed() % 2 ** 32, drop_last=True)


def seed_apart(step):
    """Seed PyTorch's generators from the last `torch.manual_seed`, the rank and the step."""
    entropy = np.random.SeedSequence((torch.initial_seed(), rank(), step))
    torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def any_rank(*flags):
    """Which of these bools are true on one rank at least, a sequence. All ranks wait here, but none for its GPU."""
    if world_size() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32)
    with _convert_peer_errors():
        distributed.all_reduce(votes, distributed.ReduceOp.MAX)
    return votes.bool().tolist()


def wait():
    """Go on when all ranks are here."""
    any_rank(True)


def mean(numbers):
    """The means over the ranks of a list of floats; NaN where one of them is."""
    if world_size() == 1 or not numbers:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)
    with _convert_peer_errors():
        distributed.all_reduce(total)
    return (total / world_size()).tolist()
