"""Draw each batch from a seed of its own, so that it does not depend on the process, the time or the order."""
import torch
from torch.utils.data import Dataset

from common.errors import UserError
from common.torch_errors import is_out_of_memory


class SeededSampler:
    """Yield (number, seed) for each number from `sampler`.

    PyTorch's generator is read once, at the start of an epoch, so that its state does not depend on prefetching.
    """

    def __init__(self, sampler):
        self.sampler = sampler

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        seeds = torch.Generator().manual_seed(new_seed())
        return ((number, new_seed(seeds)) for number in self.sampler)

    def set_epoch(self, epoch):
        """Set the epoch of a DistributedSampler."""
        self.sampler.set_epoch(epoch)


class SeededDataset(Dataset):
    """A data set that takes batches of (number, seed); the first seed determines all random draws of the batch.

    A UserError is returned in place of the batch: a worker that raised it would add a traceback to its text.
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
                    return UserError('too little memory to read images; use fewer --workers or a smaller '
                                     '--batch_size')
                raise


def new_seed(generator=None):
    """Return a random seed from `generator`, or from PyTorch's global one."""
    return int(torch.randint(2 ** 63 - 1, (), generator=generator))
