"""Train on several GPUs, of one machine or several: what the processes that torchrun starts, the ranks, must agree on.

Each rank has its own device and an equal share of every epoch. All start with the same weights, and every optimizer
step uses the mean of their gradients, so the weights stay the same. Only rank 0 prints and writes files. In a process
that torchrun has not started, nothing here has an effect.
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

TIMEOUT = timedelta(minutes=10)  # to wait for the slowest rank, whose machine may first have to make its data cache
SECONDS_TO_STOP = 30             # that a process has to save and end, as under torchrun
SECONDS_FOR_THE_FIRST = 3        # that the first process of a machine has to notice that torchrun is gone


def world_size():
    """Return the number of ranks on all machines. Raises UserError if the environment's variables are not numbers."""
    names = ('LOCAL_RANK', 'RANK', 'WORLD_SIZE')
    started_by_torchrun = all(name in os.environ for name in names)
    if started_by_torchrun and not all(os.environ[name].isdecimal() for name in names):
        raise UserError(f'{", ".join(f"{name}={os.environ[name]}" for name in names)}: must be numbers, as torchrun '
                        'sets them; unset them to train in one process')
    return int(os.environ['WORLD_SIZE']) if started_by_torchrun else 1


def rank():
    """Return the number of this process, counted from 0."""
    return int(os.environ['RANK']) if world_size() > 1 else 0


def local_rank():
    """Return the number of this process among those of its machine, counted from 0."""
    return int(os.environ['LOCAL_RANK']) if world_size() > 1 else 0


def join():
    """Join the other ranks; from here on, only rank 0 prints, and optimizers use the mean of all ranks' gradients.

    Tensors on GPUs go through NCCL, those on the CPU through Gloo. Raises UserError if the ranks cannot connect.
    """
    if world_size() == 1:
        return
    if rank() > 0:
        sys.stdout = open(os.devnull, 'w')
    signals.when_parent_ends(_terminate)
    try:
        distributed.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo', timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f'cannot connect to the other processes ({str(error).splitlines()[0]}); start all with '
                        'torchrun, with a --master_addr that every machine can reach') from error
    register_optimizer_step_pre_hook(_average_gradients)
    print(f'{world_size()} processes train together: the batch is {world_size()} times --batch_size')


def _terminate():
    """End this process when torchrun is gone, as torchrun would: the training stops and saves.

    The first process of a machine usually stops them all. The others only act if it does not, so that its message
    appears once.
    """
    if local_rank() > 0:
        time.sleep(SECONDS_FOR_THE_FIRST)
    print('torchrun has ended: stopping its processes on this machine', file=sys.stderr, flush=True)
    signals.to_main_thread(signal.SIGTERM)
    time.sleep(SECONDS_TO_STOP)
    os._exit(128 + signal.SIGTERM)  # it is still waiting for a rank that has ended, where signals have no effect


def leave():
    """Disconnect from the other ranks after a success; after a failure, some may no longer exist."""
    if world_size() > 1:
        distributed.destroy_process_group()


@contextlib.contextmanager
def _convert_peer_errors():
    """Raise UserError if a rank that the block waits for does not arrive."""
    try:
        yield
    except RuntimeError as error:
        if torch_errors.is_of_gpu(error):
            raise  # an error of this process, which the training loop explains
        if '/dev/shm' in str(error):  # raised by NCCL
            raise UserError(f'process {rank()} of {world_size()}: /dev/shm has too little space for NCCL; enlarge it '
                            '(Docker: --shm-size=1g), or set NCCL_SHM_DISABLE=1') from error
        raise UserError(f'process {rank()} of {world_size()} gave up waiting for another, which has ended or has not '
                        f'responded for {TIMEOUT.seconds // 60} minutes; see the messages of that process') from error


def _average_gradients(optimizer, *_):
    """Replace gradients by their mean over the ranks, with one `all_reduce` of a vector of all of them.

    DistributedDataParallel is not used: it expects one forward pass for each backward pass, but a GAN's step calls a
    discriminator three times, freezes it, and sends the generator's gradient through it. Parameters without a gradient
    are left out; they are the same on all ranks, which run the same step.
    """
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group['params']
                 if parameter.grad is not None]
    vector = torch.cat([gradient.flatten() for gradient in gradients])
    with _convert_peer_errors():
        distributed.all_reduce(vector)
    vector /= world_size()
    means = vector.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [mean.view_as(gradient) for mean, gradient in zip(means, gradients)])


def synchronize(networks):
    """Copy the weights of rank 0 to all ranks, and on GPUs let batch norms use the statistics of all ranks' batches.

    On CPUs, for which PyTorch has no synchronized batch norm, each rank's batch norms use its own batch.
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
    """Return a sampler that shuffles a data set in every epoch and yields this rank's share of it.

    All shares have the same size, so that no rank waits for another; up to world_size - 1 items are left out, different
    ones in each epoch. On several ranks, the order depends on the last `torch.manual_seed` and the epoch.
    """
    if world_size() == 1:
        return RandomSampler(dataset)
    return DistributedSampler(dataset, world_size(), rank(), seed=torch.initial_seed() % 2 ** 32, drop_last=True)


def seed_apart(step):
    """Seed PyTorch's generators differently on each rank, from the last `torch.manual_seed`, the rank and the step."""
    entropy = np.random.SeedSequence((torch.initial_seed(), rank(), step))
    torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def any_rank(*flags):
    """Return, for each of these bools, whether it is true on at least one rank. Waits for all ranks, but for no GPU."""
    if world_size() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32)
    with _convert_peer_errors():
        distributed.all_reduce(votes, distributed.ReduceOp.MAX)
    return votes.bool().tolist()


def wait():
    """Wait until all ranks have called this."""
    any_rank(True)


def mean(numbers):
    """Return a list of floats averaged over the ranks, with NaN if one of them is NaN."""
    if world_size() == 1 or not numbers:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)
    with _convert_peer_errors():
        distributed.all_reduce(total)
    return (total / world_size()).tolist()
