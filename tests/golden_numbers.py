"""Read tests/golden, and create the tensors it was recorded with (see tests/golden/README.md)."""
import json
import os
import zlib

import numpy as np
import torch

from common import speed
from common.speed import cpu_kernels

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'golden')


def golden(name, arrays=True):
    """Return (arrays, facts) of a golden file."""
    with open(os.path.join(GOLDEN, f'{name}.json'), encoding='utf-8') as facts:
        return dict(np.load(os.path.join(GOLDEN, f'{name}.npz'))) if arrays else None, json.load(facts)


def tensor_for(name, shape):
    """Return the standard normal float32 tensor that belongs to a name."""
    numbers = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(int(np.prod(shape)))
    return torch.from_numpy(numbers.reshape(shape).astype(np.float32))


def draw_from(monkeypatch, names, dtype=torch.float32):
    """Make `torch.randn` return the tensors that belong to `names`, one after the other."""
    names = iter(names)
    monkeypatch.setattr(torch, 'randn', lambda shape, **_: tensor_for(next(names), tuple(shape)).to(dtype))


def arrange_all(monkeypatch, *nets):
    """Arrange all layers of networks on a CPU as `common.speed` arranges those with the most weights."""
    monkeypatch.setattr(cpu_kernels, 'WEIGHTS_PER_POSITION', 0)
    for net in nets:
        speed.arrange(net, torch.device('cpu'))


def fill(module):
    """Fill the state of a module with tensors that follow from the names of its keys."""
    state = module.state_dict()
    for key, value in state.items():
        n = tensor_for(key, tuple(value.shape))
        if key.endswith('num_batches_tracked'):
            n = torch.zeros_like(value)
        elif key.endswith('running_var'):
            n = 1 + 0.1 * n.abs()
        elif key.endswith('running_mean'):
            n = 0.1 * n
        elif key.endswith('.weight') and value.dim() == 1:
            n = 1 + 0.1 * n
        elif key.endswith('.weight'):
            n = n / value[0].numel() ** 0.5
        else:
            n = 0.1 * n
        state[key] = n
    module.load_state_dict(state)
    return module


def assert_after(state, expected):
    """Assert [sum, norm] of every entry of a state dict after training, within 5e-3 of the norm."""
    assert set(state) == set(expected)
    for key, (total, norm) in expected.items():
        value = state[key].double()
        assert abs(value.norm().item() - norm) <= 5e-3 * norm + 1e-6, key
        # A sum of n numbers that nearly cancel is known to the error of its terms, not to a share of itself.
        assert abs(value.sum().item() - total) <= 5e-3 * max(abs(total), norm * value.numel() ** 0.5) + 1e-6, key
