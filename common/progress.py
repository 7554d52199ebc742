"""Where a training stands, as its checkpoints say."""
import torch


def new_progress():
    """Return where a run stands: whole epochs, batches of the epoch under way, steps, and the generators' states.

    `rng` is their state now; `epoch_rng` what it was before the epoch under way drew its order. `world_size` is the
    number of ranks that trained; the generators' states are those of rank 0. `batch_size` is that of each rank, 0 where
    it is not known.
    """
    return {'epoch': 0, 'batch': 0, 'step': 0, 'rng': None, 'epoch_rng': None, 'world_size': 1,
            'batch_size': 0}


def rng_state():
    """Return the states of PyTorch's generators, of the CPU and of the GPU in use, if there is one, as tensors."""
    return {'cpu': torch.get_rng_state(), 'cuda': [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []}


def set_rng_state(state):
    """Put the generators back into a state that `rng_state` returned."""
    torch.set_rng_state(state['cpu'])
    if state['cuda'] and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state['cuda'][0])
