"""Compare StackGAN++ with numbers recorded from the authors' code (tests/golden)."""
import pytest
import torch

from stackgan_v2.build_gan import Model
from stackgan_v2.gan import Discriminator, Generator
from tests.golden_numbers import arrange_all, assert_after, draw_from, fill, golden, tensor_for

SIZES = (64, 128, 256)
CASES = ['stackgan_v2', 'stackgan_v2_unconditional']


def filled_networks(facts):
    netG = Generator(3, facts['gf'], facts['z'], 1024, facts['ef'], conditional=facts['cond'])
    return fill(netG), [fill(Discriminator(size, facts['df'], facts['ef'], facts['cond'])) for size in SIZES]


def filled_model(facts):
    netG, netsD = filled_networks(facts)
    model = Model('stackgan_v2', 'cpu', None, netG, netsD, kl_coef=facts['kl'], uncond_coef=facts['uncond'],
                  color_coef=facts['color'])
    model.create_optim(facts['lr'])
    return model


def batch_of(step, facts):
    tag, size = facts['tag'], facts['B']
    batch = {f'{which}_images': [torch.tanh(tensor_for(f'{tag}/{name}/{step}/{side}', (size, 3, side, side)))
                                 for side in SIZES] for which, name in (('right', 'real'), ('wrong', 'wrong'))}
    return {**batch, 'right_embed': tensor_for(f'{tag}/embed/{step}', (size, 1024))}


@pytest.mark.parametrize('conditional', [True, False])
def test_state_dicts_have_the_authors_keys_in_full_width(conditional):
    _, facts = golden('stackgan_v2_state_dicts', arrays=False)
    with torch.device('meta'):
        nets = {'netG': Generator(conditional=conditional),
                **{f'netD{i}': Discriminator(size, conditional=conditional) for i, size in enumerate(SIZES)}}
    expected = facts['conditional' if conditional else 'unconditional']
    assert set(expected) == set(nets)
    for name, net in nets.items():
        assert {key: list(value.shape) for key, value in net.state_dict().items()} == expected[name]


@pytest.mark.parametrize('case', CASES)
def test_forward_passes_equal_the_recorded_outputs(case, monkeypatch):
    numbers, facts = golden(case)
    netG, netsD = filled_networks(facts)
    text = tensor_for('text', (2, 1024)) if facts['cond'] else None
    draw_from(monkeypatch, ['eps'])
    with torch.no_grad():
        images, mu, logvar = netG.eval()(tensor_for('noise', (2, facts['z'])), text)
        judged = [netD.eval()(image, mu) for netD, image in zip(netsD, images)]
    ours = {f'eval_image_{size}': image[..., ::size // 64, ::size // 64] for size, image in zip(SIZES, images)}
    ours |= {f'eval_D{i}_{j}': part for i, parts in enumerate(judged) for j, part in enumerate(parts)}
    if facts['cond']:
        ours |= {'mu': mu, 'logvar': logvar}
    assert set(ours) == set(numbers)
    for name, value in ours.items():
        torch.testing.assert_close(value, torch.from_numpy(numbers[name]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('fast', [False, True])
@pytest.mark.parametrize('case', CASES)
def test_training_reproduces_recorded_losses_and_weights(case, fast, monkeypatch):
    _, facts = golden(case)
    model = filled_model(facts)
    if fast:
        arrange_all(monkeypatch, model.netG, *model.netsD)
    kinds = ('noise', 'eps') if facts['cond'] else ('noise',)
    draw_from(monkeypatch, [f'{facts["tag"]}/{kind}/{step}' for step in range(facts['steps']) for kind in kinds])
    for step, expected in enumerate(facts['steps_record']):
        losses = model.train_step(batch_of(step, facts))
        assert set(losses) == set(expected)
        for name, value in expected.items():
            ours = [float(one) for one in losses[name]] if isinstance(value, list) else float(losses[name])
            assert ours == pytest.approx(value, rel=1.5e-2 if step else 1e-4), (step, name)
    nets = {'netG': model.netG, **{f'netD{i}': netD for i, netD in enumerate(model.netsD)}}
    state = {f'{name}.{key}': value for name, net in nets.items() for key, value in net.state_dict().items()}
    assert_after(state, facts['after'])
    parameters = {name for name, _ in model.netG.named_parameters()}
    assert_after({key: value for key, value in model.average_G.items() if key in parameters}, facts['average_G'])
