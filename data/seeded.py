"""Batches that are drawn from seeds of their own: the same in whichever process, whenever, and in whatever order."""
import torch
from torch.utils.data import Dataset

from common.errors import UserError
from common.torch_errors import is_out_of_memory


class SeededSampler:
    """The numbers that `sampler` gives, each with a seed: (number, seed).

    PyTorch's generator is read once an epoch, at its start, so that its state does not depend on how many batches
    worker processes have been asked for ahead.
    """

    def __init__(self, sampler):
        self.sampler = sampler

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        seeds = torch.Generator().manual_seed(new_seed())
        return ((number, new_seed(seeds)) for number in self.sampler)

    def set_epoch(self, epoch):
        """As of a DistributedSampler."""
        self.sampler.set_epoch(epoch)


class SeededDataset(Dataset):
    """A data set that is asked for batches of (number, seed); the first seed is that of all that the batch draws.

    A UserError is returned in the batch's place: raised in a worker, it would come to the main process with a traceback
    in its text.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, number):
        return self.dataset[number]

    def __getitems__(self, numbers_and_seeds):
        numbers, seeds = zip(*numbers_and_seeds)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seeds[0])
            try:
                return self.dataset.__getitems__(list(numbers))
            except UserError as error:
                return error
            except (MemoryError, RuntimeError) as error:
                if is_out_of_memory(error):
                    return UserError('too little memory to read pictures; use fewer --workers or a smaller '
                                     '--batch_size')
                raise


def new_seed(generator=None):
    """A number that `generator`, or else PyTorch's, draws."""
    return int(torch.randint(2 ** 63 - 1, (), generator=generator))
