"""Training steps on PyTorch's `meta` device, which replaces a GPU in these tests.

Its tensors have no values. So a step that waits for a value (`.item()`, `float()`, an index by a mask) fails there,
and so does one that mixes in a tensor that was made on the CPU.
"""
import pytest
import torch

from tests import every_model

WAITS = pytest.param('char_cnn_rnn', marks=pytest.mark.xfail(
    strict=True, raises=(NotImplementedError, RuntimeError),
    reason='it cuts off the blank end of sentences, and the host has to know where that is'))


@pytest.fixture
def unfused(monkeypatch):
    """Use Adam without `fused`, which does not support meta tensors."""
    Adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, 'Adam', lambda *args, fused=None, **settings: Adam(*args, **settings))


def step(name, change=lambda model: None):
    model, batch = every_model.new(name, 'meta')
    change(model)
    return model.train_step(batch)


@pytest.mark.parametrize('name', [WAITS if name == 'char_cnn_rnn' else name for name in every_model.NEW])
def test_a_step_stays_on_its_device_and_never_synchronizes(name, unfused):
    for value in step(name).values():
        assert all(loss.device.type == 'meta' for loss in (value if isinstance(value, list) else [value]))


def waits(model):
    loss = model.loss_adv
    model.loss_adv = lambda *args: loss(*args) * float(loss(*args).detach())


def judges_by_the_cpu(model):
    loss = model.loss_adv
    model.loss_adv = lambda probability, label: loss(probability, torch.ones(label.shape))


def draws_on_the_cpu(model):
    generator = model.netG.forward
    model.netG.forward = lambda noise, text: generator(torch.randn(noise.shape), text)


@pytest.mark.parametrize('mutation', [waits, judges_by_the_cpu, draws_on_the_cpu])
def test_steps_that_synchronize_or_leave_the_device_are_detected(mutation, unfused):
    with pytest.raises((RuntimeError, NotImplementedError)):
        step('text2image', mutation)
