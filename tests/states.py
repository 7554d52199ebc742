"""Whether two models, or two runs, are in the same state to the last bit, with an interruption or without."""
import os
import signal

import pytest
import torch


def everything(model, nets=None, optimizers=None):
    """All tensors that a later step of `model` depends on, by name. It may have more `nets` and `optimizers` than two.
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
    """Call `model.train(*args)`, with a SIGTERM while its step of number `step` is under way."""
    train_step = model.train_step

    def watched(batch):
        if model.progress['step'] + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(batch)

    model.train_step = watched
    with pytest.raises(KeyboardInterrupt):
        model.train(*args, verbose=False)
