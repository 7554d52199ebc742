"""Track the progress of a training, as its checkpoints store it."""
import torch


def new_progress():
    """Return a run's progress at its start: complete epochs, batches in the current epoch, steps, and random states.

    `rng` is the present state of the generators, `epoch_rng` their state before the current epoch's order was drawn.
    `world_size` is the number of ranks; the states are those of rank 0. `batch_size` is a rank's, 0 if unknown.
    """
    return {'epoch': 0, 'batch': 0, 'step': 0, 'rng': None, 'epoch_rng': None, 'world_size': 1,
            'batch_size': 0}


def rng_state():
    """Return the states of PyTorch's generators as tensors: of the CPU and, if there is one, of the current GPU."""
    return {'cpu': torch.get_rng_state(), 'cuda': [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []}


def set_rng_state(state):
    """Restore the generators to a state that `rng_state` returned."""
    torch.set_rng_state(state['cpu'])
    if state['cuda'] and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state['cuda'][0])
