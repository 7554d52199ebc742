"""The training loop, interruptions and run folders, tested with text2image's Model on a tiny file."""
import glob
import io
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from common import log, training_run
from common.errors import UserError
from common.pictures import real_over_generated
from common.progress import new_progress
from tests.errors import one_line
from tests.small_training import EPOCHS, STEPS, make_dataset, new_model, train
from tests.states import assert_same, everything
from text2image.build_gan import Model

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp('data'))


def watch(model, at_step=lambda step: None):
    """Call `at_step` after every step, and return the list to which losses are added."""
    losses, train_step = [], model.train_step

    def watched(batch):
        losses.append({name: float(value) for name, value in train_step(batch).items()})
        at_step(model.progress['step'] + 1)
        return losses[-1]

    model.train_step = watched
    return losses


@pytest.fixture(scope='module')
def straight(dataset, tmp_path_factory):
    """Return (losses, final state, folder) of an uninterrupted run."""
    folder, model = str(tmp_path_factory.mktemp('straight') / 'run'), new_model(dataset)
    losses = watch(model)
    model.train(EPOCHS, 1, folder, verbose=False)
    return losses, everything(model), folder


# --- interruptions ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('stops, number', [([3], signal.SIGINT), ([2, 5], signal.SIGTERM)],
                         ids=['in the middle of an epoch', "at an epoch's end, and again"])
def test_an_interrupted_run_resumes_to_the_same_results(dataset, straight, tmp_path, capsys, stops, number):
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
            assert f'stopped after step {stop}; resume with: ' in said and f'--train --resume {folder}' in said
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


def test_training_can_continue_after_the_last_epoch(dataset, straight, tmp_path):
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


def test_a_killed_run_resumes_from_the_last_checkpoint(dataset, straight, tmp_path, monkeypatch):
    monkeypatch.setattr(training_run, 'SECONDS_BETWEEN_CHECKPOINTS', -1)  # after every step
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


def test_samples_and_files_do_not_change_results(dataset, straight):
    model = new_model(dataset)
    assert watch(model) == [] and model.train(EPOCHS, verbose=False) is None
    assert_same(everything(model), straight[1])


def test_training_can_be_called_again_after_a_failed_step(dataset):
    model = new_model(dataset)

    def fail(step):
        if step == 1:
            raise RuntimeError('the power fails')

    train_step = model.train_step
    losses = watch(model, fail)
    with pytest.raises(RuntimeError):
        model.train(1, verbose=False)
    model.train_step = train_step
    model.train(1, verbose=False)
    assert len(losses) == 1 and (model.progress['epoch'], model.progress['step']) == (1, STEPS - 1)


# --- data that can no longer be read ----------------------------------------------------------------------------------

class Replaced:
    """Imitate a loader whose data is replaced before the batch of this number, counted over all epochs."""

    def __init__(self, loader, batch):
        self.loader, self.left, self.batch_size = loader, batch, loader.batch_size

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:  # which has drawn for a batch by the time it fails
            if self.left == 0:
                raise UserError('birds.hdf5: has changed; put it back')
            self.left -= 1
            yield batch


@pytest.mark.parametrize('batch', [2, 3], ids=["an epoch's first batch", "an epoch's last batch"])
def test_steps_before_the_data_was_replaced_are_saved(dataset, straight, tmp_path, batch):
    model = new_model(dataset)
    model.data_loader = Replaced(model.data_loader, batch)
    said = one_line(model.train, EPOCHS, 1, str(tmp_path), False)
    assert said.startswith(f'birds.hdf5: has changed; put it back; stopped after step {batch}, which is saved; resume')
    assert said.endswith(f'--train --resume {tmp_path}')
    again = new_model(dataset, seed=9)
    again.load_from(str(tmp_path), verbose=False)
    losses = watch(again)
    again.train(EPOCHS, 1, str(tmp_path), verbose=False)
    assert losses == straight[0][batch:]
    assert_same(everything(again), straight[1])


def test_unreadable_data_leaves_no_checkpoint(dataset, tmp_path):
    model = new_model(dataset)
    model.data_loader = Replaced(model.data_loader, 0)
    assert one_line(model.train, 1, 1, str(tmp_path), False) == 'birds.hdf5: has changed; put it back'
    assert not (tmp_path / 'text2image.pt').exists()


# --- the run folder ---------------------------------------------------------------------------------------------------

def test_a_run_folder_has_the_documented_files(straight):
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
    grid = model.sample_grid()
    first = grid.crop((2, 2, 66, 66))
    assert (torch.tensor(list(first.tobytes())).view(64, 64, 3).permute(2, 0, 1) == dataset.pictures[0]).all()
    assert grid.tobytes() == model.sample_grid().tobytes()


def test_images_that_fill_no_row_are_left_out():
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
    images = events.Images('samples')
    assert [event.step for event in images] == [len(straight[0]) * epoch // EPOCHS for epoch in range(1, EPOCHS + 1)]
    newest = sorted(glob.glob(os.path.join(straight[2], 'samples', '*.png')))[-1]
    with Image.open(io.BytesIO(images[-1].encoded_image_string)) as shown, Image.open(newest) as written:
        assert shown.width == min(log.WIDTH, written.width) and shown.format == 'JPEG'
    table, = events.Tensors('sample_captions')
    assert table.step == images[0].step
    assert events.SummaryMetadata('sample_captions').plugin_data.plugin_name == 'text'
    what, blank, _, _, row = table.tensor_proto.string_val[0].decode().split('\n')
    with open(os.path.join(straight[2], log.CAPTIONS), encoding='utf-8') as file:
        first, captions = file.read().splitlines()
    assert f'# {what}' == first and not blank
    assert row.replace('\\_', '_') == f'| {" | ".join(captions.split(chr(9)))} |' and captions.count('\t') == 5


def test_captions_in_the_curves_are_not_markdown(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html
    curves = log.Curves(str(tmp_path))
    curves.add_captions('samples', '# two\na *red* bird | <b>blue</b>\t[b](c)\n', 1)
    curves.close()
    text = EventAccumulator(str(tmp_path)).Reload().Tensors('samples')[0].tensor_proto.string_val[0]
    html = markdown_to_safe_html(text)
    assert '<td>a *red* bird | &lt;b&gt;blue&lt;/b&gt;</td>' in html and '<td>[b](c)</td>' in html


# --- batches that cannot be used, and losses --------------------------------------------------------------------------

def loader_of(sizes):
    return [{'right_images': torch.rand(n, 3, 64, 64) * 2 - 1, 'right_embed': torch.randn(n, 1024)} for n in sizes]


def test_a_batch_of_one_image_is_skipped_and_reported_once(capsys):
    model = Model('text2image', 'cpu', loader_of([2, 1]), 3, 50, 100)
    model.create_optim(2e-4)
    losses = watch(model)
    model.train(2)
    assert len(losses) == 2 and model.progress['step'] == 2
    assert capsys.readouterr().out.count('a batch of one image') == 1


@pytest.mark.parametrize('sizes', [[], [1, 1]])
def test_nothing_to_train_on_is_an_error(sizes):
    model = Model('text2image', 'cpu', loader_of(sizes), 3, 50, 100)
    model.create_optim(2e-4)
    with pytest.raises(UserError, match='no batch of two or more images'):
        model.train(2, verbose=False)


def test_train_needs_optimizers():
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
    os.remove(file)
    model.progress = new_progress()
    with pytest.raises(UserError, match='training has diverged; there is no checkpoint yet'):
        model.train(1, log_interval, str(tmp_path), verbose=False)


def test_non_finite_weights_count_as_divergence():
    model = Model('text2image', 'cpu', loader_of([2, 2]), 3, 50, 100)
    model.create_optim(2e-4)
    with torch.no_grad():
        next(model.netG.parameters()).fill_(math.nan)
    with pytest.raises(UserError, match='a probability is not a number at step 1: training has diverged'):
        model.train(1, verbose=False)


def test_a_discriminator_without_gradient_is_reported_once(capsys):
    model = Model('text2image', 'cpu', loader_of([2, 2]), 3, l1_coef=0, l2_coef=0)
    model.create_optim(2e-4)
    with torch.no_grad():  # after the last leaky ReLU, most values are positive
        model.netD.output[0].weight.fill_(-1e4)
    model.train(1, log_interval=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split('  ')[2:4] for line in lines if 'step' in line] == [['loss_D 100.0000', 'loss_G 100.0000']] * 2
    assert sum('the discriminator is certain and wrong' in line for line in lines) == 1
    assert all(not weight.grad.any() for weight in model.netD.parameters())


def test_out_of_memory_is_a_one_line_error():
    def train_step(batch):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate ...')

    model = Model('text2image', 'cpu', loader_of([2, 2]), 3, 50, 100)
    model.create_optim(2e-4)
    model.train_step = train_step
    with pytest.raises(UserError, match='step 1: the GPU has too little memory; try a smaller --batch_size'):
        model.train(1, verbose=False)


def test_losses_are_read_only_when_logged(tmp_path):
    """On a GPU, reading a loss waits for the whole step."""
    class Loss:
        reads = 0

        def __float__(self):
            Loss.reads += 1
            return 1.0

    batch = {'right_images': torch.zeros(2, 3, 4, 4)}
    model = SimpleNamespace(train_step=lambda batch: {'loss_G': Loss()}, data_loader=5 * [batch],
                            progress=new_progress(), save_to=lambda *args, **kwargs: None)
    train(model, 1, log_interval=2, out_dir=str(tmp_path), verbose=False)
    assert Loss.reads == 3  # of two steps for the log, of the last one for the checkpoint


def test_losses_in_a_list_are_logged_one_by_one(tmp_path):
    class Branches:
        progress, data_loader = new_progress(), [{'right_images': [torch.zeros(2, 1), torch.zeros(2, 1)]}]

        def train_step(self, batch):
            return {'loss_D': [torch.tensor(1.0), torch.tensor(2.0)], 'loss_G': 3.0}

        def save_to(self, path, verbose):
            self.saved = path

    model = Branches()
    train(model, 1, 1, str(tmp_path), verbose=False)
    assert 'loss_D_0 1.0000  loss_D_1 2.0000  loss_G 3.0000' in (tmp_path / 'log.txt').read_text()
    assert model.saved == str(tmp_path)


def test_a_signal_while_logging_saves_the_first_step(dataset, tmp_path, monkeypatch):
    losses = training_run.Log.losses
    monkeypatch.setattr(training_run.Log, 'losses', lambda *args: signal.raise_signal(signal.SIGTERM) or losses(*args))
    with pytest.raises(KeyboardInterrupt):
        new_model(dataset).train(1, 1, str(tmp_path), verbose=False)
    assert torch.load(tmp_path / 'text2image.pt', weights_only=True)['progress']['step'] == 1


@pytest.mark.parametrize('batch_size', [2, 6])
def test_an_epoch_can_end_with_batches_of_another_size(dataset, tmp_path, batch_size, monkeypatch):
    """Whoever runs out of memory in the middle of an epoch continues with smaller batches: no item comes twice."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_run.Log, 'losses', lambda *_: signal.raise_signal(signal.SIGTERM))
        new_model(dataset).train(1, 1, str(tmp_path), verbose=False)  # four of the six items
    again, seen = new_model(dataset, batch_size=batch_size), []
    again.load_from(str(tmp_path), verbose=False)
    train_step = again.train_step
    again.train_step = lambda batch: seen.append(len(batch['txt'])) or train_step(batch)
    again.train(1, 1, str(tmp_path), verbose=False)
    assert sum(seen) == (2 if batch_size == 2 else 6)  # 4 are no whole batch of 6


@pytest.mark.parametrize('before', ['', 'stopped\n', 'epoch 1/2  step 20  loss_D 0.5000  36.4 images/s'])
def test_a_log_that_ends_within_a_line_is_continued_on_a_new_one(before, tmp_path):
    (tmp_path / 'log.txt').write_text(before)
    with log.Log(str(tmp_path), False, 20) as lines:
        lines.line('epoch 2/2  step 40  loss_D 0.2500  36.4 images/s')
    assert (tmp_path / 'log.txt').read_text().splitlines() == [
        *before.splitlines(), 'epoch 2/2  step 40  loss_D 0.2500  36.4 images/s']
