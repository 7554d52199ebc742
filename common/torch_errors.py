"""Recognize errors of PyTorch's that are not bugs here: by their type if they have their own, else by their text."""
import torch

AcceleratorError = getattr(torch, 'AcceleratorError', ())  # since PyTorch 2.8


def is_out_of_memory(error):
    """Return whether the machine is out of memory; for the GPU's memory, there is torch.OutOfMemoryError."""
    texts = "DefaultCPUAllocator: can't allocate memory", 'Storage size calculation overflowed'
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def is_of_gpu(error):
    """Return whether the GPU reports an error, perhaps of an earlier step, perhaps only for lack of memory."""
    return isinstance(error, (torch.OutOfMemoryError, AcceleratorError)) or 'CUDA error' in str(error)


def is_not_finite(error):
    """Return whether binary cross-entropy refuses a probability of NaN, which is an assertion on a GPU."""
    return 'should be between 0 and 1' in str(error) or 'device-side assert' in str(error)


def is_dead_worker(error):
    """Return whether a worker process of a DataLoader has ended, which is raised anywhere in the main process."""
    return str(error).startswith('DataLoader worker (pid')
