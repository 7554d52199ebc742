"""The training loop, interruptions, checkpoints and run folders, through text2image's Model on a tiny file."""
import glob
import math
import os
import pickle
import signal
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from common import checkpoint, loop
from common.errors import UserError
from common.pictures import real_over_generated
from data.txt2image_dataset import Text2ImageDataset
from tests import tiny
from tests.states import assert_same, everything
from text2image.build_gan import Model

pytestmark = pytest.mark.usefixtures('one_thread')

EPOCHS, STEPS = 3, 2  # steps of an epoch: batches of 4 and 2


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    splits = {'train': {'001.Auk': 1, '002.Jay': 2}}
    return Text2ImageDataset(tiny.make(tmp_path_factory.mktemp('data') / 'birds.hdf5', splits))


def new_model(dataset, seed=1):
    torch.manual_seed(seed)
    loader = DataLoader(dataset, 4, shuffle=True, collate_fn=dataset.collate)
    model = Model('text2image', 'cpu', loader, 3, 50, 100, cls_coef=1.0, int_coef=1.0)  # all that is drawn counts
    model.create_optim(2e-4)
    return model


def watch(model, at_step=lambda step: None):
    """Call `at_step` after every step. Returns the list to which the steps' losses are added."""
    losses, train_step = [], model.train_step

    def watched(batch):
        losses.append({name: float(value) for name, value in train_step(batch).items()})
        at_step(model.progress['step'] + 1)
        return losses[-1]

    model.train_step = watched
    return losses


@pytest.fixture(scope='module')
def straight(dataset, tmp_path_factory):
    """(losses, everything, folder) of a run without interruption."""
    folder, model = str(tmp_path_factory.mktemp('straight') / 'run'), new_model(dataset)
    losses = watch(model)
    model.train(EPOCHS, 1, folder, verbose=False)
    return losses, everything(model), folder


# --- interruptions ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('stops, number', [([3], signal.SIGINT), ([2, 5], signal.SIGTERM)],
                         ids=['in the middle of an epoch', "at an epoch's end, and again"])
def test_an_interrupted_run_goes_on_with_the_same_results(dataset, straight, tmp_path, capsys, stops, number):
    handlers, losses, folder = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], [], str(tmp_path)
    for seed, stop in enumerate([*stops, None]):
        model = new_model(dataset, seed=1 if seed == 0 else 70 + seed)
        if seed:
            model.load_from(folder, verbose=False)
        seen = watch(model, lambda step, stop=stop: os.kill(os.getpid(), number) if step == stop else None)
        if stop:
            with pytest.raises(KeyboardInterrupt):
                model.train(EPOCHS, 1, folder)
            said = capsys.readouterr().out
            assert f'stopped after step {stop}; go on with: ' in said and f'--train --resume {folder}' in said
        else:
            model.train(EPOCHS, 1, folder, verbose=False)
        losses += seen
    assert losses == straight[0] and len(losses) == EPOCHS * STEPS
    assert_same(everything(model), straight[1])
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    with open(os.path.join(folder, 'log.txt'), encoding='utf-8') as log:
        steps = [line.split('step ')[1].split()[0] for line in log if line.startswith('epoch')]
    assert steps == [str(step) for step in range(1, EPOCHS * STEPS + 1)]
    for name in sorted(os.listdir(os.path.join(straight[2], 'samples'))):
        ours, theirs = (os.path.join(place, 'samples', name) for place in (folder, straight[2]))
        assert Image.open(ours).tobytes() == Image.open(theirs).tobytes()


def test_more_epochs_after_the_last_one(dataset, straight, tmp_path):
    model = new_model(dataset)
    losses = watch(model)
    model.train(1, 100, str(tmp_path), verbose=False)
    again = new_model(dataset, seed=99)
    again.load_from(str(tmp_path), verbose=False)
    again.train(1, 100, str(tmp_path), verbose=False)  # nothing is left to do, and nothing changes
    again = new_model(dataset, seed=98)
    again.load_from(str(tmp_path), verbose=False)
    seen = watch(again)
    again.train(2, 100, str(tmp_path), verbose=False)
    again.train(EPOCHS, 100, str(tmp_path), verbose=False)  # nor does it matter that the process is the same
    assert losses + seen == straight[0]
    assert_same(everything(again), straight[1])


def test_a_run_that_is_killed_goes_on_from_the_last_checkpoint(dataset, straight, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, 'SECONDS_BETWEEN_CHECKPOINTS', -1)  # after every step
    model = new_model(dataset)

    def fail(step):
        if step == 2:
            raise RuntimeError('the power fails')

    watch(model, fail)
    with pytest.raises(RuntimeError):
        model.train(EPOCHS, 100, str(tmp_path), verbose=False)
    again = new_model(dataset, seed=97)
    again.load_from(str(tmp_path), verbose=False)
    assert again.progress['step'] == 1
    losses = watch(again)
    again.train(EPOCHS, 100, str(tmp_path), verbose=False)
    assert losses == straight[0][1:]
    assert_same(everything(again), straight[1])


def test_samples_and_files_leave_the_results_alone(dataset, straight):
    model = new_model(dataset)
    assert watch(model) == [] and model.train(EPOCHS, verbose=False) is None
    assert_same(everything(model), straight[1])


def test_training_can_be_called_again_after_a_failed_step(dataset):
    model = new_model(dataset)

    def fail(step):
        if step == 1:
            raise MemoryError

    train_step = model.train_step
    losses = watch(model, fail)
    with pytest.raises(MemoryError):
        model.train(1, verbose=False)
    model.train_step = train_step
    model.train(1, verbose=False)
    assert len(losses) == 1 and (model.progress['epoch'], model.progress['step']) == (1, STEPS - 1)


# --- the run folder ---------------------------------------------------------------------------------------------------

def test_what_a_run_leaves(straight):
    losses, _, folder = straight
    assert sorted(os.listdir(os.path.join(folder, 'samples'))) == [f'epoch_000{k}.png' for k in range(1, EPOCHS + 1)]
    with Image.open(os.path.join(folder, 'samples', 'epoch_0001.png')) as grid:
        assert grid.size == (6 * 66 + 2, 2 * 66 + 2)  # six captions: six real ones, six generated below
    assert glob.glob(os.path.join(folder, 'events.out.tfevents*'))
    with open(os.path.join(folder, 'log.txt'), encoding='utf-8') as log:
        lines = log.read().splitlines()
    assert len(lines) == EPOCHS * STEPS
    for step, (line, loss) in enumerate(zip(lines, losses), 1):
        assert line.startswith(f'epoch {(step - 1) // STEPS + 1}/{EPOCHS}  step {step}  loss_D {loss["loss_D"]:.4f}  '
                               f'loss_G {loss["loss_G"]:.4f}  ') and line.endswith(' images/s')


def test_the_grid_shows_real_over_generated(dataset):
    model = new_model(dataset)
    grid = model._sample_grid()
    first = grid.crop((2, 2, 66, 66))
    assert (torch.tensor(list(first.tobytes())).view(64, 64, 3).permute(2, 0, 1) == dataset.pictures[0]).all()
    assert grid.tobytes() == model._sample_grid().tobytes()


def test_pictures_that_fill_no_row_are_left_out():
    real, fake = torch.full((10, 3, 4, 4), 1.0), torch.full((10, 3, 4, 4), -1.0)
    grid = real_over_generated(real, fake)
    assert grid.size == (8 * 6 + 2, 2 * 6 + 2)
    assert grid.getpixel((45, 3)) == (255, 255, 255) and grid.getpixel((45, 9)) == (0, 0, 0)


def test_curves_can_be_read(straight):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(straight[2]).Reload()
    assert set(events.Tags()['scalars']) == {'loss_D', 'loss_G', 'images_per_second'}
    curve = [(event.step, event.value) for event in events.Scalars('loss_G')]
    assert curve == [(step, pytest.approx(loss['loss_G'])) for step, loss in enumerate(straight[0], 1)]


# --- batches that cannot be used, and losses --------------------------------------------------------------------------

def loader_of(sizes):
    return [{'right_images': torch.rand(n, 3, 64, 64) * 2 - 1, 'right_embed': torch.randn(n, 1024)} for n in sizes]


def test_a_batch_of_one_picture_is_left_out_and_said_once(capsys):
    model = Model('text2image', 'cpu', loader_of([2, 1]), 3, 50, 100)
    model.create_optim(2e-4)
    losses = watch(model)
    model.train(2)
    assert len(losses) == 2 and model.progress['step'] == 2
    assert capsys.readouterr().out.count('a batch of one picture') == 1


@pytest.mark.parametrize('sizes', [[], [1, 1]])
def test_nothing_to_train_on_is_an_error(sizes):
    model = Model('text2image', 'cpu', loader_of(sizes), 3, 50, 100)
    model.create_optim(2e-4)
    with pytest.raises(UserError, match='no batch of two or more pictures'):
        model.train(2, verbose=False)


def test_train_needs_optimisers():
    with pytest.raises(UserError, match=r'create_optim\(lr\)'):
        Model('text2image', 'cpu', [], 3, 50, 100).train(1)


@pytest.mark.parametrize('value, log_interval', [(math.nan, 2), (math.inf, 2), (math.nan, 100)])
def test_diverged_training_stops_and_leaves_the_last_checkpoint(tmp_path, value, log_interval):
    model = Model('text2image', 'cpu', loader_of([2, 2]), 3, 50, 100)
    model.create_optim(2e-4)
    file = model.save_to(str(tmp_path), verbose=False)
    before = os.stat(file)
    model.train_step = lambda batch: {'loss_D': torch.tensor(1.0), 'loss_G': torch.tensor(value)}
    with pytest.raises(UserError, match=f'loss_G is {value} at step 2: training has diverged'):
        model.train(1, log_interval, str(tmp_path), verbose=False)
    assert (os.stat(file).st_ino, os.stat(file).st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_weights_that_are_not_numbers_are_a_diverged_training():
    model = Model('text2image', 'cpu', loader_of([2, 2]), 3, 50, 100)
    model.create_optim(2e-4)
    with torch.no_grad():
        next(model.netG.parameters()).fill_(math.nan)
    with pytest.raises(UserError, match='a probability is not a number at step 1: training has diverged'):
        model.train(1, verbose=False)


def test_too_little_memory_is_said_in_a_line():
    def train_step(batch):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate ...')

    model = Model('text2image', 'cpu', loader_of([2, 2]), 3, 50, 100)
    model.create_optim(2e-4)
    model.train_step = train_step
    with pytest.raises(UserError, match='step 1: the GPU has too little memory; try a smaller --batch_size'):
        model.train(1, verbose=False)


def test_losses_are_read_only_where_they_are_logged(tmp_path):
    """On a GPU, reading one waits for the whole step."""
    class Loss:
        reads = 0

        def __float__(self):
            Loss.reads += 1
            return 1.0

    batch = {'right_images': torch.zeros(2, 3, 4, 4)}
    model = SimpleNamespace(train_step=lambda batch: {'loss_G': Loss()}, data_loader=5 * [batch],
                            progress=loop.new_progress(), save_to=lambda *args, **kwargs: None)
    loop.train_loop(model, 1, log_interval=2, out_dir=str(tmp_path), verbose=False)
    assert Loss.reads == 3  # of two steps for the log, of the last one for the checkpoint


def test_losses_in_a_list_are_logged_one_by_one(tmp_path):
    class Branches:
        progress, data_loader = loop.new_progress(), [{'right_images': [torch.zeros(2, 1), torch.zeros(2, 1)]}]

        def train_step(self, batch):
            return {'loss_D': [torch.tensor(1.0), torch.tensor(2.0)], 'loss_G': 3.0}

        def save_to(self, path, verbose):
            self.saved = path

    model = Branches()
    loop.train_loop(model, 1, 1, str(tmp_path), verbose=False)
    assert 'loss_D_0 1.0000  loss_D_1 2.0000  loss_G 3.0000' in (tmp_path / 'log.txt').read_text()
    assert model.saved == str(tmp_path)


# --- checkpoints ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def trained(straight):
    return os.path.join(straight[2], 'text2image.pt')


def same_weights(model, contents, nets=('netG', 'netD')):
    return all(torch.equal(value, contents[net][key])
               for net in nets for key, value in getattr(model, net).state_dict().items())


def test_a_checkpoint_holds_all_and_no_code(trained, dataset, tmp_path, capsys):
    contents = torch.load(trained, weights_only=True)
    assert set(contents) == {'netG', 'netD', 'optim_G', 'optim_D', 'progress', 'options'}
    assert (contents['progress']['epoch'], contents['progress']['step']) == (EPOCHS, EPOCHS * STEPS)
    model = new_model(dataset)
    model.options = {'lr': 2e-4, 'text': None, 'dataset': 'birds'}
    file = model.save_to(str(tmp_path / 'deep' / 'er'), 'other')
    assert capsys.readouterr().out == f'saved {file}\n' and os.path.basename(file) == 'other.pt'
    other = new_model(dataset, seed=5)
    other.load_from(str(tmp_path / 'deep' / 'er'), 'other')
    assert capsys.readouterr().out == f'loaded {file}\n' and other.options == model.options


def test_a_run_goes_on_in_another_memory_order(trained, dataset):
    """Fused Adam takes weights and moments to be in one order, without looking."""
    stepped = []
    for order in (torch.channels_last, torch.contiguous_format):  # the first is that of the run
        model = new_model(dataset)
        model.netD.to(memory_format=order)
        model.load_from(trained, verbose=False)
        torch.manual_seed(0)
        for parameter in model.netD.parameters():
            parameter.grad = torch.empty_like(parameter).copy_(1e-3 * torch.randn(parameter.shape))
        model.optim_D.step()
        stepped.append(model.netD.state_dict())
    for name, value in stepped[0].items():
        torch.testing.assert_close(stepped[1][name], value, msg=name)


def test_load_from_takes_every_kind_of_state_dict(trained, tmp_path):
    contents = torch.load(trained, weights_only=True)
    netG, netD = contents['netG'], contents['netD']
    parallel = {f'module.{key}': value for key, value in netG.items()}
    files = {'G': netG, 'D': netD, 'parallel': parallel, 'parallel_D': {f'module.{k}': v for k, v in netD.items()},
             'both': {'netG': parallel, 'netD': netD}, 'chapter_G': netG, 'chapter_D': netD}
    for name, state in files.items():
        torch.save(state, tmp_path / f'{name}.pt')
    for path, name, nets in [(trained, None, ['netG', 'netD']), (os.path.dirname(trained), None, ['netG', 'netD']),
                             (tmp_path / 'G.pt', None, ['netG']), (tmp_path / 'D.pt', None, ['netD']),
                             (tmp_path, 'parallel', ['netG']), (tmp_path, 'parallel_D', ['netD']),
                             (tmp_path, 'both', ['netG', 'netD']), (tmp_path, 'chapter', ['netG', 'netD'])]:
        model = Model('text2image', 'cpu', None, 3, 50, 100)  # without optimisers, as for drawing
        others = [net for net in ('netG', 'netD') if net not in nets]
        kept = {net: {k: v.clone() for k, v in getattr(model, net).state_dict().items()} for net in others}
        model.load_from(str(path), name, verbose=False)
        assert same_weights(model, contents, nets) and same_weights(model, kept, others), path


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


def refusal(path):
    model = Model('text2image', 'cpu', None, 3, 50, 100)
    with pytest.raises(UserError) as caught:
        model.load_from(str(path), verbose=False)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


def test_pickled_modules_are_refused_without_running_them(tmp_path):
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))):
        write({'netG': Trap(str(tmp_path / 'sprung'))}, tmp_path / 'text2image.pt')
        assert 'refused' in refusal(tmp_path)
    torch.save(torch.nn.Linear(2, 2), tmp_path / 'text2image.pt')
    assert 'refused' in refusal(tmp_path) and 'state_dict()' in refusal(tmp_path)
    assert not os.path.exists(tmp_path / 'sprung')


def test_damaged_and_foreign_files_are_one_line(trained, tmp_path):
    file = tmp_path / 'text2image.pt'
    assert f'{file}: no such checkpoint' == refusal(tmp_path)
    with open(trained, 'rb') as whole:
        start = whole.read(100_000)
    torch.save({'a': torch.ones(3)}, tmp_path / 'old', _use_new_zipfile_serialization=False)
    old = (tmp_path / 'old').read_bytes()
    for damaged in [b'', b'\x80', b'PK\x03\x04', b'no checkpoint\n' * 50, start, old[:3], old[:30], old[:-4]]:
        file.write_bytes(damaged)
        assert str(file) in refusal(tmp_path)
    torch.save(torch.ones(3), file)
    assert 'holds a Tensor' in refusal(tmp_path)
    for state in ({}, {'model.0.weight': torch.ones(2)}, {'output.0.weight': torch.ones(2)}, {'netG': {}, 'netD': {}}):
        torch.save(state, file)
        assert 'does not fit' in refusal(tmp_path)
    state = torch.load(trained, weights_only=True)
    state['netG']['model.0.weight'] = state['netG']['model.0.weight'][:, :7]
    torch.save(state, file)
    assert 'does not fit Generator' in refusal(tmp_path) and 'model.0.weight' in refusal(tmp_path)


@pytest.mark.parametrize('error, raised', [
    (OSError('No space left'), UserError),
    (RuntimeError('unexpected pos 1\nat 2'), UserError),  # what torch makes of a full disk
    (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch, error, raised):
    path = str(tmp_path / 'a.pt')
    checkpoint.save(path, {'a': torch.ones(3)})

    def half(contents, file, **_):
        file.write(b'half')
        raise error

    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(raised) as caught:
        checkpoint.save(path, {'a': torch.zeros(3)})
    assert '\n' not in str(caught.value)
    assert os.listdir(tmp_path) == ['a.pt'] and torch.equal(checkpoint.load(path)['a'], torch.ones(3))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot be written'):
        checkpoint.save(str(tmp_path / 'file' / 'a.pt'), {})


# --- drawing ----------------------------------------------------------------------------------------------------------

def test_generate_depends_on_its_seed_alone(dataset, trained):
    model = new_model(dataset)
    model.load_from(trained, verbose=False)
    embed, state = dataset.embeddings[:3], torch.get_rng_state()
    images = model.generate(embed)
    assert images.shape == (3, 3, 64, 64) and images.abs().max() <= 1 and not images.requires_grad
    assert torch.equal(torch.get_rng_state(), state) and model.netG.training
    torch.manual_seed(1234)
    assert torch.equal(images, model.generate(embed.numpy()))
    assert not torch.equal(images, model.generate(embed, seed=1))
    assert torch.equal(images[0], model.generate(embed[[0, 2, 2]])[0])  # whatever else is in the batch


def test_eval_draws_for_the_loaders_captions(dataset):
    model = new_model(dataset)
    model.data_loader = DataLoader(dataset, 4, collate_fn=dataset.collate)
    for size, expected in ((None, 4), (3, 3), (100, 4)):
        images, captions = model.eval(size)
        assert images.shape == (expected, 3, 64, 64) and captions == dataset.captions[:expected]
