"""Compare StackGAN with numbers recorded from the authors' code (tests/golden)."""
import pytest
import torch

from stackgan_v1.build_gan import Model
from stackgan_v1.gan import Stage1Discriminator, Stage1Generator, Stage2Discriminator, Stage2Generator
from tests.golden_numbers import arrange_all, assert_after, draw_from, fill, golden, tensor_for

STAGES = [1, 2]
SIZES = {1: 64, 2: 256}
# Of the losses of each step, relative. In float32 Stage-II's later ones depend on the number of threads, by up to 1e-2.
TOLERANCES = {(1, torch.float32): (1e-4, 1.5e-2, 1.5e-2), (2, torch.float32): (2e-4, 2e-2, 2e-2),
              (2, torch.float64): (1e-4, 3e-3, 6e-3)}


def networks(stage, gf_dim=128, df_dim=64, z_dim=100, condition_dim=128, residuals=4):
    netG = Stage1Generator(gf_dim, z_dim, condition_dim=condition_dim)
    if stage == 1:
        return netG, Stage1Discriminator(df_dim, condition_dim)
    return Stage2Generator(netG, gf_dim, condition_dim, residuals=residuals), Stage2Discriminator(df_dim, condition_dim)


def filled_networks(facts):
    return [fill(net) for net in networks(facts['stage'], *(facts[key] for key in ('gf', 'df', 'z', 'ef', 'r')))]


@pytest.mark.parametrize('widths', ['coco (GF_DIM 192, DF_DIM 96, R_NUM 2)', 'birds (GF_DIM 128, DF_DIM 64, R_NUM 4)'])
@pytest.mark.parametrize('stage', STAGES)
def test_state_dicts_have_the_authors_keys_in_full_width(stage, widths):
    _, facts = golden('stackgan_v1_state_dicts', arrays=False)
    gf_dim, df_dim, residuals = (192, 96, 2) if widths.startswith('coco') else (128, 64, 4)
    with torch.device('meta'):
        nets = networks(stage, gf_dim, df_dim, residuals=residuals)
    for name, net in zip('GD', nets):
        expected = facts[widths][f'stage{stage}_{name}']
        assert {key: list(value.shape) for key, value in net.state_dict().items()} == expected


@pytest.mark.parametrize('stage', STAGES)
def test_forward_passes_equal_the_recorded_outputs(stage, monkeypatch):
    numbers, facts = golden(f'stackgan_v1_stage{stage}')
    netG, netD = filled_networks(facts)
    draw_from(monkeypatch, ['eps/ca0', 'eps/ca1'])
    with torch.no_grad():
        text, noise = tensor_for('text', (4, 1024)), tensor_for('noise', (4, facts['z']))
        stage1_image, image, mu, logvar = netG.eval()(text, noise)
        code = netD.eval()(image)
        ours = {'eval_image': image[..., ::SIZES[stage] // 64, ::SIZES[stage] // 64], 'mu': mu, 'logvar': logvar,
                'cond_prob': netD.get_cond_logits(code, mu)}
        if stage == 2:
            ours |= {'eval_stage1_image': stage1_image, 'uncond_prob': netD.get_uncond_logits(code)}
    assert set(ours) == set(numbers) and (stage1_image is None) is (stage == 1)
    for name, value in ours.items():
        torch.testing.assert_close(value, torch.from_numpy(numbers[name]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('fast', [False, True])
@pytest.mark.parametrize('stage, dtype', TOLERANCES)
def test_training_reproduces_recorded_losses_and_weights(stage, dtype, fast, monkeypatch):
    _, facts = golden(f'stackgan_v1_stage{stage}')
    netG, netD = (net.to(dtype) for net in filled_networks(facts))
    if fast:
        arrange_all(monkeypatch, netG, netD)
    model = Model('stackgan_v1', 'cpu', None, netG, netD, kl_coef=facts['kl'])
    model.create_optim(facts['lr'])
    tag, size = facts['tag'], facts['B']
    kinds = ['noise', 'eps/{}/ca0', 'eps/{}/ca1'][:stage + 1]
    draw_from(monkeypatch, [f'{tag}/{kind}'.format(step) if '{' in kind else f'{tag}/{kind}/{step}'
                            for step in range(facts['steps']) for kind in kinds], dtype)
    for step, (expected, tolerance) in enumerate(zip(facts['steps_record'], TOLERANCES[stage, dtype])):
        real = torch.tanh(tensor_for(f'{tag}/real/{step}', (size, 3, SIZES[stage], SIZES[stage])))
        embed = tensor_for(f'{tag}/embed/{step}', (size, 1024))
        losses = model.train_step({'right_images': real.to(dtype), 'right_embed': embed.to(dtype)})
        assert set(losses) == set(expected)
        for name, value in expected.items():
            assert float(losses[name]) == pytest.approx(value, rel=tolerance), (step, name)
    assert_after({f'{name}.{key}': value for name, net in (('netG', netG), ('netD', netD))
                  for key, value in net.state_dict().items()}, facts['after'])
