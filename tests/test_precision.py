"""`--precision`: what it selects and refuses, and what stays float32 in networks that compute in bf16."""
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from char_cnn_rnn.encoder import CharCnnRnn, init_weights, one_hot
from common import speed
from common.speed import precision
from tests.errors import one_line
from tests.test_stackgan_v1_model import batch_of as stackgan_v1_batch
from tests.test_stackgan_v1_model import new_model as stackgan_v1_model
from tests.test_stackgan_v2_model import batch_of as stackgan_v2_batch
from tests.test_stackgan_v2_model import new_model as stackgan_v2_model

pytestmark = pytest.mark.usefixtures('one_thread')

CPU = torch.device('cpu')


@pytest.fixture(params=['bf16', 'none'])
def has_bf16(request, monkeypatch):
    """Set whether the CPU reports bf16; PyTorch emulates it without hardware support."""
    monkeypatch.setattr(precision, 'cpu_flags', lambda: {'avx2'} | ({'amx_bf16'} if request.param == 'bf16' else set()))
    return request.param == 'bf16'


def test_auto_selects_what_the_hardware_supports(has_bf16):
    assert precision.choose_precision('auto', CPU) == ('bf16' if has_bf16 else 'fp32')
    assert precision.choose_precision('fp32', CPU) == 'fp32'


def test_unsupported_precisions_are_refused(has_bf16):
    assert '--precision tf32: this CPU does not support it' in one_line(precision.choose_precision, 'tf32', CPU)
    if has_bf16:
        assert precision.choose_precision('bf16', CPU) == 'bf16'
    else:
        assert 'avx512_bf16 or amx_bf16); use fp32' in one_line(precision.choose_precision, 'bf16', CPU)


@pytest.mark.skipif(not os.path.exists('/proc/cpuinfo'), reason='only Linux says')
def test_this_cpu_reports_its_support():
    with open('/proc/cpuinfo', encoding='utf-8') as lines:
        assert (' avx2 ' in lines.read()) == ('avx2' in precision.cpu_flags())


def trained(model, batch, nets, heads, asked):
    """Return the losses of two steps of `model` in the precision `asked`, and the dtypes that its layers read."""
    seen = {}
    netG, *netsD = nets
    speed.prepare(netG, netsD, heads, device=CPU, precision=asked, compile=False, batch_size=2)
    for layer in {module for net in nets for module in net.modules() if not list(module.children())}:
        layer.register_forward_pre_hook(lambda one, inputs: seen.setdefault(type(one), set()).add(inputs[0].dtype))
    for optimizer in (model.optim_G, *getattr(model, 'optims_D', [getattr(model, 'optim_D', None)])):
        for group in optimizer.param_groups:
            group['lr'] = 2e-5  # Adam's first steps have one size whatever the gradient: large ones amplify rounding
    torch.manual_seed(5)
    losses = [model.train_step(batch) for _ in range(2)]
    return [torch.stack([torch.as_tensor(part) for value in step.values()
                         for part in (value if isinstance(value, list) else [value])]) for step in losses], seen


def case(chapter):
    """Return (small model, a batch for it, its networks, heads of its discriminators)."""
    torch.manual_seed(7)
    if chapter == 'stackgan_v2':
        model, batch = stackgan_v2_model(), stackgan_v2_batch(2)
        return model, batch, (model.netG, *model.netsD), ()
    model, batch = stackgan_v1_model(2), stackgan_v1_batch(2)
    return model, batch, (model.netG, model.netD), (model.netD.get_cond_logits, model.netD.get_uncond_logits)


@pytest.mark.parametrize('chapter', ['stackgan_v1', 'stackgan_v2'])
def test_only_products_are_computed_in_bf16(chapter, monkeypatch):
    monkeypatch.setattr(precision, 'cpu_flags', lambda: {'avx512_bf16'})
    exact, types = trained(*case(chapter), 'fp32')
    assert set.union(*types.values()) == {torch.float32}
    model, batch, nets, heads = case(chapter)
    rounded, types = trained(model, batch, nets, heads, 'bf16')
    assert torch.bfloat16 in types[nn.BatchNorm2d]              # what a convolution gave
    for one, other in zip(exact, rounded):
        assert one.dtype == other.dtype == torch.float32
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=.02, atol=.02)
    for net in nets:
        assert {value.dtype for value in net.state_dict().values()} <= {torch.float32, torch.int64}
    for optimizer in (model.optim_G, *(model.optims_D if chapter == 'stackgan_v2' else [model.optim_D])):
        assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
    images = model.generate(batch['right_embed'])
    assert {image.dtype for image in images} == {torch.float32}


@pytest.mark.parametrize('layer, function', [(nn.Sigmoid, torch.sigmoid), (nn.Tanh, torch.tanh)])
def test_outputs_of_last_layers_are_not_rounded(layer, function, monkeypatch):
    """Near 1, bf16 has steps of 1/256: a logarithm could not tell a confident answer from a sure one, and a pixel that
    is nearly white would have no gradient."""
    monkeypatch.setattr(precision, 'cpu_flags', lambda: {'avx512_bf16'})
    net = nn.Sequential(nn.Linear(1, 1), layer())
    nn.init.ones_(net[0].weight), nn.init.zeros_(net[0].bias)
    speed.prepare(net, [], device=CPU, precision='bf16', compile=False, batch_size=1)
    result = net(torch.tensor([[4.]]))
    assert result.item() == function(torch.tensor(4.)).item() < 1
    result.backward()
    slope = torch.func.grad(function)(torch.tensor(4.)).item()
    assert net[0].weight.grad.item() == pytest.approx(4 * slope, rel=.01)


def test_a_network_computes_its_convolutions_in_bf16_while_it_trains(monkeypatch):
    monkeypatch.setattr(precision, 'cpu_flags', lambda: {'avx512_bf16'})
    torch.manual_seed(0)
    encoder, letters = CharCnnRnn('birds_cvpr'), one_hot(['a red bird.', 'this bird has blue wings.'])
    init_weights(encoder)
    exact = encoder(letters)
    speed.prepare_network(encoder, device=CPU, precision='auto')
    seen, convolve = [], F.conv1d
    monkeypatch.setattr(F, 'conv1d', lambda *args: seen.append(convolve(*args)) or seen[-1])
    rounded = encoder(letters)
    rounded.sum().backward()
    assert [found.dtype for found in seen] == [torch.bfloat16] * 3  # the rest, which adds up many numbers, is not
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=.01, atol=.01 * float(exact.detach().abs().max()))
    assert {value.dtype for one in encoder.parameters() for value in (one, one.grad)} == {torch.float32}
    assert torch.equal(encoder.eval()(letters), exact)
