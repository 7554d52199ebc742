"""Which errors of PyTorch's are no bugs of ours: told by their type where they have one of their own, else by text."""
import torch

AcceleratorError = getattr(torch, 'AcceleratorError', ())  # of PyTorch 2.8 and later


def is_out_of_memory(error):
    """Of this process, not of the GPU (torch.OutOfMemoryError)."""
    texts = "DefaultCPUAllocator: can't allocate memory", 'Storage size calculation overflowed'
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def is_of_gpu(error):
    """Whether the GPU reports an error, perhaps of a step before; its memory may only have been too small."""
    return isinstance(error, (torch.OutOfMemoryError, AcceleratorError)) or 'CUDA error' in str(error)


def is_not_finite(error):
    """Whether binary cross-entropy refuses a probability of NaN: on a GPU by an assertion."""
    return 'should be between 0 and 1' in str(error) or 'device-side assert' in str(error)


def is_dead_worker(error):
    """Whether a worker process of a DataLoader has ended: raised wherever the main process then is."""
    return str(error).startswith('DataLoader worker (pid')
