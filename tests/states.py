"""Compare the states of two models, or of interrupted and uninterrupted runs, bit by bit."""
import os
import signal

import pytest
import torch


def everything(model, nets=None, optimizers=None):
    """Return all tensors that later steps of `model` depend on, by name; `nets` and `optimizers` name its parts.
    """
    found = {'rng': model.progress['rng']['cpu']}
    for number, net in enumerate(nets or (model.netG, model.netD)):
        found |= {f'{number}.{key}': value for key, value in net.state_dict().items()}
    for number, optimizer in enumerate(optimizers or (model.optim_G, model.optim_D)):
        for i, state in optimizer.state_dict()['state'].items():
            found |= {f'optim.{number}.{i}.{key}': value for key, value in state.items()}
    return {key: value.clone() for key, value in found.items()}


def assert_same(found, expected):
    assert set(found) == set(expected)
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def same_state(state, other):
    return set(state) == set(other) and all(torch.equal(state[key], other[key]) for key in state)


def interrupt(model, step, *args):
    """Call `model.train(*args)` and send SIGTERM during step number `step`."""
    train_step = model.train_step

    def watched(batch):
        if model.progress['step'] + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(batch)

    model.train_step = watched
    with pytest.raises(KeyboardInterrupt):
        model.train(*args, verbose=False)
