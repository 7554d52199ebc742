"""Where a training stands, as its checkpoints say."""


def new_progress():
    """Where a run stands: whole epochs, batches of the epoch under way, steps, and the generators' states.

    `rng` is their state now; `epoch_rng` what it was before the epoch under way drew its order. `world_size` is the
    number of ranks that trained; the generators' states are those of rank 0.
    """
    return {'epoch': 0, 'batch': 0, 'step': 0, 'rng': None, 'epoch_rng': None, 'world_size': 1}
