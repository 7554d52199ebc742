"""StackGAN++'s Model: runs, interruptions, and checkpoints of ours and of the authors."""
import os
import weakref

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from common.errors import UserError
from common.pictures import to_pil
from data.multiscale_dataset import MultiscaleDataset, shuffled_batches
from stackgan_v2.build_gan import Model, load_generator, make_networks
from stackgan_v2.gan import Generator
from tests import tiny
from tests.states import assert_same, everything, interrupt, same_state

pytestmark = pytest.mark.usefixtures('one_thread')

EPOCHS, STEPS = 3, 2  # steps of an epoch of four photographs
SHAPE = {'branches': 2, 'gf_dim': 4, 'df_dim': 4, 'z_dim': 5, 'embedding_dim': 6, 'residuals': 1}


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    splits = {'train': {'001.Auk': 2, '002.Jay': 2}}
    return MultiscaleDataset(tiny.make(tmp_path_factory.mktemp('data') / 'birds.hdf5', splits), branches=2)


def new_model(loader=None, seed=1, optim=True, **shape):
    torch.manual_seed(seed)
    model = Model('stackgan_v2', 'cpu', loader, *make_networks(**SHAPE | shape), color_coef=1.0)
    model.snapshot_interval = 4
    if optim:
        model.create_optim(2e-4)
    return model


def batch_of(branches, size=2, text=True):
    batch = {f'{which}_images': [torch.rand(size, 3, 64 << i, 64 << i) * 2 - 1 for i in range(branches)]
             for which in ('right', 'wrong')}
    return batch | {'right_embed': torch.randn(size, 1024)} if text else batch


def all_of(model):
    nets, optimizers = (model.netG, *model.netsD), (model.optim_G, *model.optims_D)
    averaged = {f'average.{i}': value.clone() for i, value in enumerate(model.averaged)}
    return everything(model, nets, optimizers) | averaged


def loader_of(dataset, workers=0):
    return shuffled_batches(dataset, 2, workers, torch.device('cpu'))


@pytest.fixture(scope='module')
def straight(dataset, tmp_path_factory):
    """Return (model, its state, folder) of an uninterrupted run."""
    folder, model = str(tmp_path_factory.mktemp('straight') / 'run'), new_model(loader_of(dataset))
    model.options = {'lr': 2e-4}
    model.train(EPOCHS, 1, folder, verbose=False)
    return model, all_of(model), folder


# --- weights and steps ------------------------------------------------------------------------------------------------

def test_networks_start_orthogonal_and_a_model_keeps_their_weights():
    netG, netsD = make_networks(**SHAPE)
    for net in (netG, *netsD):
        for module in net.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                rows = module.weight.detach().flatten(1)
                gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
                torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-4)
            elif isinstance(module, torch.nn.BatchNorm2d):
                assert 0 < (module.weight - 1).abs().max() < 0.2 and not module.bias.any()
    before = {key: value.clone() for key, value in netG.state_dict().items()}
    assert same_state(Model('m', 'cpu', None, netG, netsD).netG.state_dict(), before)


@pytest.mark.parametrize('branches, gf_dim, conditional', [(1, 2, True), (2, 4, True), (4, 8, True), (2, 4, False)])
def test_a_step_works_for_every_number_of_branches(branches, gf_dim, conditional):
    model = new_model(branches=branches, gf_dim=gf_dim, df_dim=2, conditional=conditional)
    before = [[value.clone() for value in net.parameters()] for net in (model.netG, *model.netsD)]
    losses = model.train_step(batch_of(branches, text=conditional))
    assert len(losses['loss_D']) == branches and ('loss_KL' in losses) is conditional
    assert all(torch.isfinite(loss) for loss in (*losses['loss_D'], losses['loss_G']))
    for old, net in zip(before, (model.netG, *model.netsD)):
        assert any(not torch.equal(a, b) for a, b in zip(old, net.parameters()))
    images = model.generate(torch.randn(2, 1024) if conditional else None, count=2)
    assert [tuple(image.shape) for image in images] == [(2, 3, 64 << i, 64 << i) for i in range(branches)]


def test_the_generators_step_keeps_no_batch_in_memory(monkeypatch):
    class OnAnotherDevice:
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def to(self, device):
            copies.append(weakref.ref(copy := self.images.clone()))
            return copy

    copies, held, model = [], [], new_model()
    generator_loss = model._generator_loss
    monkeypatch.setattr(model, '_generator_loss', lambda *args: held.append(
        [copy() is not None for copy in copies]) or generator_loss(*args))
    batch = batch_of(2)
    for which in ('right_images', 'wrong_images'):
        batch[which] = [OnAnotherDevice(images) for images in batch[which]]
    model.train_step(batch)
    assert held == [[False] * 4] * 2
    assert not any(value.requires_grad for netD in model.netsD for value in netD.parameters())


# --- interruptions ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('stop', [2, 3], ids=["at an epoch's end", 'in the middle of an epoch'])
def test_an_interrupted_run_resumes_to_the_same_results(dataset, straight, tmp_path, stop):
    model, folder = new_model(loader_of(dataset, workers=2)), str(tmp_path)  # which were ahead
    interrupt(model, stop, EPOCHS, 1, folder)
    assert not os.path.exists(os.path.join(folder, 'Model'))
    again = new_model(loader_of(dataset), seed=99)
    again.load_from(folder, verbose=False)
    again.train(EPOCHS, 1, folder, verbose=False)
    assert_same(all_of(again), straight[1])
    for name in ('samples/epoch_0003.png', 'Model/netG_6.pth', 'Model/netG_4.pth'):
        ours, theirs = (os.path.join(place, name) for place in (folder, straight[2]))
        if name.endswith('png'):
            assert Image.open(ours).tobytes() == Image.open(theirs).tobytes()
        else:
            assert same_state(torch.load(ours, weights_only=True), torch.load(theirs, weights_only=True))


def test_training_needs_optimizers():
    with pytest.raises(UserError, match=r'create_optim\(lr\)'):
        new_model([], optim=False).train(1)


def test_set_lr_sets_all_optimizers():
    model = new_model()
    model.set_lr(0.5)
    assert {group['lr'] for one in (model.optim_G, *model.optims_D) for group in one.param_groups} == {0.5}


# --- what a run leaves ------------------------------------------------------------------------------------------------

def test_a_run_folder_has_the_documented_files(straight):
    model, _, folder = straight
    assert {'log.txt', 'samples', 'stackgan_v2.pt', 'Model'} <= set(os.listdir(folder))
    assert sorted(os.listdir(os.path.join(folder, 'Model'))) == ['netD0.pth', 'netD1.pth', 'netG_4.pth', 'netG_6.pth']
    with Image.open(os.path.join(folder, 'samples', 'epoch_0001.png')) as grid:
        assert grid.size == (3 * 130 + 2, 4 * 130 + 2)  # four items: two branches and a real image
    assert 'loss_D_0' in open(os.path.join(folder, 'log.txt'), encoding='utf-8').read()
    contents = torch.load(os.path.join(folder, 'stackgan_v2.pt'), weights_only=True)
    assert set(contents) == {'netG', 'netsD', 'average_G', 'optim_G', 'optims_D', 'progress', 'options', 'data'}
    assert contents['options'] == {'lr': 2e-4} and contents['progress']['step'] == EPOCHS * STEPS


def test_samples_show_all_branches_and_a_real_image(dataset, straight):
    model = straight[0]
    grid = model.sample_grid()
    small, large = model.generate(model.sample_batch['right_embed'])
    for column, image in ((0, small[0]), (1, large[0]), (2, model.sample_batch['right_images'][-1][0])):
        shown = grid.crop((2 + 130 * column, 2, 130 * (column + 1), 130))
        scale = 128 // image.shape[-1]
        expected = to_pil(image.repeat_interleave(scale, 1).repeat_interleave(scale, 2))
        assert shown.tobytes() == expected.tobytes()


def test_samples_do_not_change_results(dataset, straight):
    model = new_model(loader_of(dataset))
    model.train(EPOCHS, verbose=False)  # without a folder, and so without samples and files
    model.progress['rng'] = {'cpu': torch.get_rng_state()}
    assert_same(all_of(model), straight[1])


# --- the running average ----------------------------------------------------------------------------------------------

def test_images_are_generated_with_the_running_average(straight):
    model, embed = straight[0], torch.randn(3, 1024)
    averaged = Generator(**{key: value for key, value in SHAPE.items() if key != 'df_dim'}).eval()
    averaged.load_state_dict(model.average_G)
    names = {name for name, _ in model.netG.named_parameters()}
    live = model.netG.state_dict()
    assert any(not torch.equal(live[key], value) for key, value in model.average_G.items())
    assert all(torch.equal(live[key], value) for key, value in model.average_G.items() if key not in names)
    state, images = torch.get_rng_state(), model.generate(embed, seed=7)
    assert torch.equal(torch.get_rng_state(), state) and model.netG.training
    torch.manual_seed(7)
    with torch.no_grad():
        expected, _, _ = averaged(torch.randn(3, 5), embed)
    for image, wanted in zip(images, expected):
        torch.testing.assert_close(image, wanted, rtol=1e-4, atol=1e-5)
    again, other = model.generate(embed.numpy(), seed=7), model.generate(embed, seed=8)
    assert torch.equal(images[-1], again[-1]) and not torch.equal(images[-1], other[-1])


def test_eval_generates_for_the_loaders_captions(dataset):
    model = new_model(DataLoader(dataset, 3))
    for size, expected in ((None, 3), (2, 2), (100, 3)):
        images, captions = model.eval(size)
        assert [tuple(image.shape) for image in images] == [(expected, 3, 64, 64), (expected, 3, 128, 128)]
        assert len(captions) == expected and set(captions) <= set(dataset.captions)
    model = new_model(DataLoader(dataset, 3), conditional=False)
    images, captions = model.eval()
    assert images[-1].shape == (3, 3, 128, 128) and captions is None


# --- checkpoints ------------------------------------------------------------------------------------------------------

def test_snapshots_hold_the_average_in_the_authors_format(straight):
    model, _, folder = straight
    file = os.path.join(folder, 'Model', 'netG_6.pth')
    weights = torch.load(file, weights_only=True)
    assert same_state({key.removeprefix('module.'): value for key, value in weights.items()}, model.average_G)
    assert all(key.startswith('module.') for key in weights)
    with open(file, 'rb') as opened:
        assert opened.read(2) != b'PK'  # no zip archive, which PyTorch before 1.6 does not read
    theirs = torch.nn.DataParallel(new_model(optim=False).netG)
    theirs.load_state_dict(weights)  # as the authors' code does
    discriminator = torch.nn.DataParallel(new_model(optim=False).netsD[1])
    discriminator.load_state_dict(torch.load(os.path.join(folder, 'Model', 'netD1.pth'), weights_only=True))
    assert same_state(discriminator.module.state_dict(), model.netsD[1].state_dict())


def test_the_authors_checkpoints_load(straight, tmp_path):
    theirs = new_model(seed=5)
    files = {f'netD{i}.pth': netD for i, netD in enumerate(theirs.netsD)} | {'netG_210000.pth': theirs.netG}
    for folder in (tmp_path / 'generator', tmp_path / 'all', tmp_path / 'run' / 'Model'):
        os.makedirs(folder)
        for name, net in files.items():
            if folder.name != 'generator' or name == 'netG_210000.pth':
                state = {f'module.{key}': value for key, value in net.state_dict().items()
                         if not key.endswith('num_batches_tracked')}  # which PyTorch 0.3 did not count
                torch.save(state, folder / name, _use_new_zipfile_serialization=False)
    torch.save({}, tmp_path / 'all' / 'netG_90000.pth')  # an older one: not read
    parameters = list(theirs.netG.parameters())
    for path, with_discriminators in [('generator', False), ('generator/netG_210000.pth', False), ('all', True),
                                      ('all/netG_210000.pth', True), ('run', True), ('run/Model', True)]:
        model = new_model(seed=6)
        kept = [netD.state_dict()['logits.0.weight'].clone() for netD in model.netsD]
        model.load_from(str(tmp_path / path), verbose=False)
        assert all(map(torch.equal, model.averaged, parameters)), path
        assert all(map(torch.equal, model.netG.parameters(), parameters))
        for netD, old, its in zip(model.netsD, kept, theirs.netsD):
            expected = its.logits[0].weight if with_discriminators else old
            assert torch.equal(netD.logits[0].weight, expected), path
    assert model.progress['step'] == 0


def test_load_generator_takes_its_shape_from_the_checkpoint(straight, tmp_path):
    model, _, folder = straight
    embed = torch.randn(2, 1024)
    expected = model.generate(embed)[-1]
    for path, file in [(folder, 'stackgan_v2.pt'), (f'{folder}/Model', 'Model/netG_6.pth')]:
        generating, found, steps = load_generator(path, 'stackgan_v2')
        assert (found, steps) == (os.path.join(folder, file), 6) and generating.netsD == []
        torch.testing.assert_close(generating.generate(embed)[-1], expected, rtol=0, atol=1e-6)
    other = new_model(branches=3, gf_dim=8, z_dim=3, residuals=2, conditional=False)
    generating, _, steps = load_generator(other.save_to(str(tmp_path), verbose=False), 'stackgan_v2')
    assert steps == 0 and not generating.netG.conditional
    assert torch.equal(generating.generate(count=3)[2], other.generate(count=3)[2])


def test_weights_load_without_optimizers(straight):
    model = new_model(seed=8, optim=False)
    model.load_from(straight[2], verbose=False)
    model.create_optim(1e-3)
    assert model.progress['step'] == 0 and not model.optim_G.state
    assert all(map(torch.equal, model.averaged, straight[0].averaged))
    assert same_state(model.netsD[1].state_dict(), straight[0].netsD[1].state_dict())


def test_files_that_do_not_fit_are_one_line_errors(straight, tmp_path):
    def refusal(load, *args):
        with pytest.raises(UserError) as caught:
            load(*args)
        assert '\n' not in str(caught.value) and len(str(caught.value)) < 600
        return str(caught.value)

    narrow = new_model(gf_dim=2, optim=False)
    assert 'does not fit Generator' in refusal(narrow.load_from, straight[2])
    assert f'{tmp_path}/stackgan_v2.pt: no such checkpoint' == refusal(narrow.load_from, str(tmp_path))
    assert 'no such checkpoint' in refusal(load_generator, str(tmp_path / 'netG_1.pth'), 'stackgan_v2')
    for number, state in enumerate(({}, {'netG': {}, 'netsD': []}, narrow.netsD[0].state_dict())):
        torch.save(state, tmp_path / f'netG_{number}.pth')
        assert 'holds no generator' in refusal(narrow.load_from, str(tmp_path / f'netG_{number}.pth'))
        assert 'holds no generator' in refusal(load_generator, str(tmp_path / f'netG_{number}.pth'), 'stackgan_v2')
    torch.save(torch.nn.Linear(2, 2), tmp_path / 'netG_9.pth')
    assert 'refused' in refusal(load_generator, str(tmp_path), 'stackgan_v2')
