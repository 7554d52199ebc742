"""StackGAN's Model: both stages, runs, interruptions, and checkpoints of ours and of the authors."""
import os

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from common.errors import UserError
from common.pictures import to_pil
from data.cropped_dataset import CroppedDataset
from data.multiscale_dataset import MultiscaleDataset
from stackgan_v1.build_gan import Model, load_generator, make_networks
from stackgan_v1.gan import SIZES, Stage1Generator, Stage2Generator
from tests import tiny
from tests.errors import one_line
from tests.states import assert_same, everything, interrupt, same_state

pytestmark = pytest.mark.usefixtures('one_thread')

EPOCHS, STEPS = 3, 2  # steps of an epoch of four photographs
LR = 2e-4
SHAPE = {'gf_dim': 8, 'df_dim': 2, 'z_dim': 5, 'condition_dim': 6, 'residuals': 1}


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    splits = {'train': {'001.Auk': 2, '002.Jay': 2}}
    return tiny.make(tmp_path_factory.mktemp('data') / 'birds.hdf5', splits)


def new_model(stage, file=None, seed=1, lr=LR, **shape):
    torch.manual_seed(seed)
    stage1 = make_networks(**SHAPE | shape)[0] if stage == 2 else None
    loader = DataLoader(CroppedDataset(file, size=SIZES[stage]), 2, shuffle=True) if file else None
    model = Model('stackgan_v1', 'cpu', loader, *make_networks(stage1, **SHAPE | shape))
    model.snapshot_interval, model.lr_decay_epoch = 2, 1
    if lr:
        model.create_optim(lr)
    return model


def batch_of(stage, size=3):
    return {'right_images': torch.rand(size, 3, SIZES[stage], SIZES[stage]) * 2 - 1,
            'right_embed': torch.randn(size, 1024)}


def rate_of(model):
    rate, = {group['lr'] for one in (model.optim_G, model.optim_D) for group in one.param_groups}
    return rate


@pytest.fixture(scope='module', params=[1, 2])
def straight(file, tmp_path_factory, request):
    """Return (model, its state, folder, stage) of an uninterrupted run."""
    folder, model = str(tmp_path_factory.mktemp('straight') / 'run'), new_model(request.param, file)
    model.options = {'stage': request.param}
    model.train(EPOCHS, 1, folder, verbose=False)
    return model, everything(model), folder, request.param


# --- images ---------------------------------------------------------------------------------------------------------

def test_images_are_prepared_as_for_stackgan_v2(file):
    torch.manual_seed(5)
    item = CroppedDataset(file, size=64)[2]
    torch.manual_seed(5)
    expected = MultiscaleDataset(file, branches=1)[2]
    assert set(item) == {'right_images', 'right_embed', 'txt', 'class', 'name'}
    assert torch.equal(item['right_images'], expected['right_images'][0])
    assert [item[key] for key in ('txt', 'class', 'name')] == [expected[key] for key in ('txt', 'class', 'name')]
    assert torch.equal(item['right_embed'], expected['right_embed'])
    assert CroppedDataset(file, size=256)[0]['right_images'].shape == (3, 256, 256)


def test_one_class_is_enough(tmp_path, recwarn):
    CroppedDataset(tiny.make(tmp_path / 'birds.hdf5', {'train': {'001.Auk': 2}}))
    assert not [warning for warning in recwarn if 'wrong_images' in str(warning.message)]


# --- weights and steps ------------------------------------------------------------------------------------------------

def test_new_layers_are_initialized_and_stage1_keeps_its_weights():
    torch.manual_seed(0)
    stage1, netD = make_networks(gf_dim=16, df_dim=8)
    trained = {key: value.clone() for key, value in stage1.state_dict().items()}
    netG, _ = make_networks(stage1, gf_dim=16, df_dim=8)
    assert same_state(netG.STAGE1_G.state_dict(), trained)
    for weight in (stage1.fc[0].weight, stage1.ca_net.fc.weight, netD.encode_img[8].weight, netG.hr_joint[0].weight):
        assert abs(weight.mean()) < 1e-3 and 0.019 < weight.std() < 0.021
    for norm in (stage1.fc[1], netD.encode_img[9], netG.hr_joint[1]):
        assert abs(norm.weight.mean() - 1) < 0.01 and 0.01 < norm.weight.std() < 0.03 and not norm.bias.any()
    assert not stage1.ca_net.fc.bias.any()


def test_stage2_trains_around_a_frozen_stage1():
    model = new_model(2)
    stage1 = model.netG.STAGE1_G
    weights, before = [value.clone() for value in stage1.parameters()], stage1.fc[1].running_mean.clone()
    kept = [value.clone() for value in (*model.netG.encoder.parameters(), *model.netD.parameters())]
    losses = model.train_step(batch_of(2))
    assert all(map(torch.equal, weights, stage1.parameters())) and all(map(torch.isfinite, losses.values()))
    assert not torch.equal(before, stage1.fc[1].running_mean)  # its batch norms keep counting
    assert not any(map(torch.equal, kept, (*model.netG.encoder.parameters(), *model.netD.parameters())))
    assert not any(parameter.requires_grad for parameter in (*stage1.parameters(), *model.netD.parameters()))
    stage1_image, image = model.generate(torch.randn(3, 1024))
    assert stage1_image.shape == (3, 3, 64, 64) and image.shape == (3, 3, 256, 256)


def test_a_wrong_pair_is_an_image_with_the_next_condition():
    model, condition = new_model(1), torch.randn(4, 6)
    image = torch.rand(4, 3, 64, 64)
    seen, judge = [], model.netD.get_cond_logits
    judge.register_forward_pre_hook(lambda _, args: seen.append(args))
    model._discriminator_losses(image, image.clone(), condition)
    code, its_condition = seen[1]
    assert torch.equal(code, seen[0][0][:3]) and torch.equal(its_condition, condition[1:])


def test_the_learning_rate_is_halved(file, straight):
    model, _, _, stage = straight
    assert rate_of(model) == LR / 2 ** (EPOCHS - 1)  # that of the last epoch
    model, rates = new_model(stage, file), []
    model.lr_decay_epoch = 2
    train_step = model.train_step
    model.train_step = lambda batch: rates.append(rate_of(model)) or train_step(batch)
    model.train(EPOCHS, verbose=False)
    assert rates == [LR] * 4 + [LR / 2] * 2
    model.lr = 1e-3
    model.train(EPOCHS + 1, verbose=False)
    assert rate_of(model) == 1e-3 / 2


# --- interruptions ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('stop', [2, 3], ids=["at an epoch's end", 'in the middle of an epoch'])
def test_an_interrupted_run_resumes_to_the_same_results(file, straight, tmp_path, stop):
    _, expected, done, stage = straight
    model, folder = new_model(stage, file), str(tmp_path)
    interrupt(model, stop, EPOCHS, 1, folder)
    again = new_model(stage, file, seed=99)
    again.load_from(folder, verbose=False)
    again.train(EPOCHS, 1, folder, verbose=False)
    assert_same(everything(again), expected)
    for name in ('Model/netG_epoch_2.pth', 'Model/netG_epoch_3.pth', 'Model/netD_epoch_last.pth'):
        ours, theirs = (torch.load(os.path.join(place, name), weights_only=True) for place in (folder, done))
        assert same_state(ours, theirs)
    ours, theirs = (Image.open(os.path.join(place, 'samples', 'epoch_0003.png')) for place in (folder, done))
    assert ours.tobytes() == theirs.tobytes()


def test_samples_and_files_do_not_change_results(file, straight):
    model = new_model(straight[3], file)
    model.train(EPOCHS, verbose=False)
    model.progress['rng'] = {'cpu': torch.get_rng_state()}
    assert_same(everything(model), straight[1])


# --- what a run leaves ------------------------------------------------------------------------------------------------

def test_a_run_folder_has_the_documented_files(straight):
    model, _, folder, stage = straight
    assert {'log.txt', 'samples', 'stackgan_v1.pt', 'Model'} <= set(os.listdir(folder))
    assert sorted(os.listdir(os.path.join(folder, 'Model'))) == ['netD_epoch_last.pth', 'netG_epoch_2.pth',
                                                                 'netG_epoch_3.pth']
    assert 'loss_KL' in open(os.path.join(folder, 'log.txt'), encoding='utf-8').read()
    contents = torch.load(os.path.join(folder, 'stackgan_v1.pt'), weights_only=True)
    assert set(contents) == {'netG', 'netD', 'optim_G', 'optim_D', 'progress', 'options', 'data'}
    assert contents['options'] == {'stage': stage} and contents['progress']['step'] == EPOCHS * STEPS


def test_samples_show_stage1_stage2_and_real_images(straight):
    model, _, _, stage = straight
    size = SIZES[stage]
    grid = model.sample_grid()
    columns = [*model.generate(model.sample_batch['right_embed']), model.sample_batch['right_images']]
    assert len(columns) == stage + 1 and grid.size == (len(columns) * (size + 2) + 2, 4 * (size + 2) + 2)
    for number, column in enumerate(columns):
        left, scale = 2 + number * (size + 2), size // column.shape[-1]
        expected = to_pil(column[0].repeat_interleave(scale, 1).repeat_interleave(scale, 2))
        assert grid.crop((left, 2, left + size, 2 + size)).tobytes() == expected.tobytes()


def test_equal_seeds_generate_equal_images(straight):
    model, embed = straight[0], torch.randn(3, 1024)
    state, images = torch.get_rng_state(), model.generate(embed, seed=7)
    assert torch.equal(torch.get_rng_state(), state) and model.netG.training
    again, other = model.generate(embed.numpy(), seed=7), model.generate(embed, seed=8)
    assert torch.equal(images[-1], again[-1]) and not torch.equal(images[-1], other[-1])
    for size, expected in ((None, 2), (1, 1), (100, 2)):
        images, captions = model.eval(size)
        assert images[-1].shape == (expected, 3, SIZES[straight[3]], SIZES[straight[3]])
        assert len(captions) == expected and set(captions) <= set(model.data_loader.dataset.captions)


# --- checkpoints ------------------------------------------------------------------------------------------------------

def test_snapshots_are_in_the_authors_format(straight):
    model, _, folder, _ = straight
    for name, net in (('netG_epoch_3.pth', model.netG), ('netD_epoch_last.pth', model.netD)):
        path = os.path.join(folder, 'Model', name)
        assert same_state(torch.load(path, weights_only=True), net.state_dict())
        with open(path, 'rb') as opened:
            assert opened.read(2) != b'PK'  # no zip archive, which PyTorch before 1.6 does not read


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('stage', [1, 2])
def test_the_authors_checkpoints_load(stage, prefix, tmp_path):
    theirs = new_model(stage, seed=5)
    os.makedirs(tmp_path / 'run' / 'Model')
    for folder in (tmp_path, tmp_path / 'run' / 'Model'):
        for name, net in (('netG_epoch_90', theirs.netG), ('netD_epoch_last', theirs.netD)):
            if folder != tmp_path or net is theirs.netG:
                state = {f'{prefix}{key}': value for key, value in net.state_dict().items()
                         if not key.endswith('num_batches_tracked')}  # which PyTorch 0.3 did not count
                torch.save(state, folder / f'{name}.pth', _use_new_zipfile_serialization=False)
    torch.save({}, tmp_path / 'run' / 'Model' / 'netG_epoch_80.pth')  # an older one: not read
    for path, with_discriminator in [('.', False), ('netG_epoch_90.pth', False), ('run', True), ('run/Model', True)]:
        model = new_model(stage, seed=6)
        kept = model.netD.encode_img[0].weight.clone()
        model.load_from(str(tmp_path / path), verbose=False)
        assert all(map(torch.equal, model.netG.parameters(), theirs.netG.parameters()))
        expected = theirs.netD.encode_img[0].weight if with_discriminator else kept
        assert torch.equal(model.netD.encode_img[0].weight, expected), path
        generating, found, epochs = load_generator(str(tmp_path / path), 'stackgan_v1', stage=stage)
        assert epochs == 90 and os.path.basename(found) == 'netG_epoch_90.pth'
        assert all(map(torch.equal, generating.netG.parameters(), theirs.netG.parameters()))


def test_load_generator_takes_widths_from_the_checkpoint(straight):
    model, _, folder, stage = straight
    embed = torch.randn(2, 1024)
    for path, found in [(folder, 'stackgan_v1.pt'), (f'{folder}/Model', 'Model/netG_epoch_3.pth')]:
        generating, file, epochs = load_generator(path, 'stackgan_v1', stage=stage)
        assert (file, epochs) == (os.path.join(folder, found), 3)
        torch.testing.assert_close(generating.generate(embed), model.generate(embed), rtol=0, atol=1e-6)


def test_every_width_is_read_from_the_checkpoint(tmp_path):
    stage1 = Stage1Generator(gf_dim=3, z_dim=7, text_dim=11, condition_dim=5)
    netG = Stage2Generator(stage1, gf_dim=4, condition_dim=9, text_dim=11, residuals=3)
    torch.save(netG.state_dict(), tmp_path / 'netG_epoch_1.pth')
    found = load_generator(str(tmp_path), 'stackgan_v1')[0].netG
    assert same_state(found.state_dict(), netG.state_dict()) and found.z_dim == 7
    assert found.STAGE1_G.width == 8 * 3 and len(found.residual) == 3


def test_weights_load_without_optimizers(straight):
    model = new_model(straight[3], seed=8, lr=None)
    model.load_from(straight[2], verbose=False)
    model.create_optim(1e-3)
    assert model.progress['step'] == 0 and not model.optim_G.state
    assert same_state(model.netD.state_dict(), straight[0].netD.state_dict())


def test_errors_are_one_line(straight, tmp_path):
    _, _, folder, stage = straight
    with pytest.raises(UserError, match=r'create_optim\(lr\)'):
        new_model(stage, lr=None).train(1)
    wide = new_model(stage, gf_dim=12, lr=None)
    one_line(wide.load_from, folder, match='does not fit Stage.Generator')
    one_line(load_generator, folder, 'stackgan_v1', 'cpu', 3 - stage,
             match=f'holds a Stage-{"I" * stage} generator, but Stage-{"I" * (3 - stage)} is asked for')
    one_line(load_generator, str(tmp_path / 'netG_1.pth'), 'stackgan_v1', match='no such checkpoint')
    for state in ({}, {'netG': {}}, wide.netD.state_dict(), {'ca_net.fc.weight': torch.ones(4)}, {'a': 'text'}):
        torch.save(state, tmp_path / 'netG_1.pth')
        one_line(load_generator, str(tmp_path), 'stackgan_v1', match='holds no generator of StackGAN')
    torch.save(torch.nn.Linear(2, 2), tmp_path / 'netG_1.pth')
    one_line(load_generator, str(tmp_path), 'stackgan_v1', match='refused')
