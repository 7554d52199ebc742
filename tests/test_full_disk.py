"""Training continues when the disk is full, and reports it."""
import errno
import os
import signal
import sys

import pytest
import torch

from common import log, training_run
from common.errors import CannotWrite
from common.files import unwritable
from tests.errors import one_line
from tests.small_training import EPOCHS, STEPS, make_dataset, new_model
from tests.states import assert_same, everything

pytestmark = pytest.mark.usefixtures('one_thread')

FULL = OSError(errno.ENOSPC, 'No space left on device')


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def straight(dataset):
    """Return the final state of a training that writes no files."""
    model = new_model(dataset)
    model.train(EPOCHS, verbose=False)
    return everything(model)


@pytest.fixture
def often(monkeypatch):
    """Save a checkpoint, or try it again, after every step; do not wait for space for the last one."""
    for name in ('SECONDS_BETWEEN_CHECKPOINTS', 'SECONDS_AT_THE_END', 'PAUSE_AT_THE_END'):
        monkeypatch.setattr(training_run, name, -1 if name.endswith('CHECKPOINTS') else 0)


def fails(model, is_full):
    """Make `model.save_to` fail with a full disk if `is_full(step)`."""
    save_to = model.save_to

    def save(path, **arguments):
        if is_full(model.progress['step']):
            raise unwritable(os.path.join(path, f'{model.name}.pt'), FULL)
        return save_to(path, **arguments)

    model.save_to = save
    return model


def log_of(folder):
    return (folder / 'log.txt').read_text(encoding='utf-8').splitlines()


def test_a_full_disk_is_reported_once_and_training_continues(dataset, straight, tmp_path, often, capsys):
    model = fails(new_model(dataset), lambda step: 2 <= step <= 4)
    model.train(EPOCHS, 1, str(tmp_path))
    assert_same(everything(model), straight)
    said = [line for line in log_of(tmp_path) if not line.startswith('epoch')]
    assert said == [f'{tmp_path}/text2image.pt: disk full, so it cannot be written; make room, or write to another '
                    'disk; the training continues and tries again (the last good one: step 1)',
                    'the checkpoint can be written again']
    assert capsys.readouterr().out.count('disk full') == 1
    again = new_model(dataset, seed=9)
    again.load_from(str(tmp_path), verbose=False)
    assert again.progress['step'] == EPOCHS * STEPS


def test_a_run_resumes_from_the_checkpoint_before_the_full_disk(dataset, straight, tmp_path, often):
    model = fails(new_model(dataset), lambda step: step > 2)
    train_step = model.train_step

    def dies(batch):
        if model.progress['step'] == 4:
            raise RuntimeError('the power fails')
        return train_step(batch)

    model.train_step = dies
    with pytest.raises(RuntimeError, match='power'):
        model.train(EPOCHS, 1, str(tmp_path), verbose=False)
    again = new_model(dataset, seed=9)
    again.load_from(str(tmp_path), verbose=False)
    assert again.progress['step'] == 2
    again.train(EPOCHS, 1, str(tmp_path), verbose=False)
    assert_same(everything(again), straight)


def test_no_space_for_the_last_checkpoint_is_an_error(dataset, tmp_path, often):
    model = fails(new_model(dataset), lambda step: step > 3)
    said = one_line(model.train, EPOCHS, 1, str(tmp_path), match='done, but some files were not written')
    assert 'disk full' in said and said.endswith('the last good checkpoint: step 3')
    assert any('is retried for' in line for line in log_of(tmp_path))
    assert torch.load(tmp_path / 'text2image.pt', weights_only=True)['progress']['step'] == 3


def test_space_freed_at_the_end_is_used(dataset, tmp_path, often, monkeypatch):
    monkeypatch.setattr(training_run, 'SECONDS_AT_THE_END', 60)
    answers = iter([True, True, False])
    model = fails(new_model(dataset), lambda step: step == EPOCHS * STEPS and next(answers))
    model.train(EPOCHS, 1, str(tmp_path), verbose=False)
    assert torch.load(tmp_path / 'text2image.pt', weights_only=True)['progress']['step'] == EPOCHS * STEPS


def test_a_signal_on_a_full_disk_is_an_error_at_once(dataset, tmp_path):
    model = fails(new_model(dataset), lambda step: True)
    train_step = model.train_step

    def stopped(batch):
        if model.progress['step'] == 2:
            signal.raise_signal(signal.SIGTERM)
        return train_step(batch)

    model.train_step = stopped
    said = one_line(model.train, EPOCHS, 1, str(tmp_path))
    assert said.startswith('stopped after step 3, but some files were not written: ') and 'disk full' in said


def test_failed_samples_and_snapshots_lose_no_training(dataset, straight, tmp_path, monkeypatch):
    model, broken = new_model(dataset), tmp_path / 'samples'
    broken.write_text('in the place of the folder')

    def snapshot():
        if model.progress['step'] < 3:
            raise CannotWrite('netG_1.pth: disk full')
        if broken.is_file():
            broken.unlink()

    model.netG.train()
    model.netD.train()
    with training_run.TrainingRun(model, EPOCHS, 1, str(tmp_path), False, model.sample_grid) as run:
        for _ in run.epochs():
            for batch in run.batches():
                run.log(model.train_step(batch))
                run.write('the snapshot', snapshot)
    assert_same(everything(model), straight)
    assert sorted(os.listdir(tmp_path / 'samples')) == ['epoch_0002.png', 'epoch_0003.png']
    said = [line for line in log_of(tmp_path) if not line.startswith('epoch')]
    assert len(said) == 4 and said[0].startswith('netG_1.pth: disk full; the training continues')
    assert said[1].startswith(f'{tmp_path}/samples/epoch_0001.png: cannot be written')
    assert said[1].endswith('tries again after the next epoch; samples until then are lost')
    assert said[2:] == ['the snapshot can be written again', 'the sample can be written again']


# --- log.txt and curves -----------------------------------------------------------------------------------------------

class Disk:
    """Imitate a file on a disk with space for so many bytes."""

    def __init__(self, room):
        self.room, self.held = room, b''

    def write(self, data):
        if not self.room:
            raise FULL
        written = data[:self.room]
        self.room -= len(written)
        self.held += written
        return len(written)

    def close(self):
        pass


def test_a_log_that_is_a_pipe_is_named(tmp_path):
    os.mkfifo(tmp_path / 'log.txt')  # opening it would wait for a reader
    with pytest.raises(CannotWrite, match='log.txt: cannot be written .it is a pipe, so'):
        log.Log(str(tmp_path), False, 0)


def test_log_lines_and_curves_are_written_later(tmp_path, capsys):
    with log.Log(str(tmp_path), True, 0) as lines:
        names = [lines.text.file.name, lines.curves.file.name]
        room = [os.path.getsize(name) for name in names]
        lines.text.file, lines.curves.file = disks = Disk(5), Disk(10)
        lines.line('one line')
        for step in (1, 2):
            with lines.attempt('the TensorBoard curves'):
                lines.curves.add({'loss': step / 4}, step)
        assert capsys.readouterr().out.count('disk full') == 2  # of each file once
        for disk in disks:
            disk.room = 10 ** 6
        lines.flush()
    assert disks[0].held.startswith(b'one line\n') and b'log.txt can be written again' in disks[0].held
    with open(names[1], 'ab') as file:
        assert file.tell() == room[1]
        file.write(disks[1].held)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars('loss')] == [(1, 0.25), (2, 0.5)]


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_log_on_a_full_disk_does_not_stop_training(dataset, straight, tmp_path, capsys):
    os.symlink('/dev/full', tmp_path / 'log.txt')
    model = new_model(dataset)
    said = one_line(model.train, EPOCHS, 1, str(tmp_path))
    assert said.startswith('the training is done, but some files were not written: ')
    assert 'log.txt: disk full' in said
    assert capsys.readouterr().out.count('log.txt: disk full') == 1
    assert_same(everything(model), straight)


def test_a_run_folder_that_cannot_be_created_is_an_error(dataset, tmp_path):
    (tmp_path / 'file').write_text('')
    said = one_line(new_model(dataset).train, EPOCHS, 1, str(tmp_path / 'file' / 'run'))
    assert said.startswith(f'{tmp_path}/file/run: cannot be written (')


def test_missing_tensorboard_is_reported(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'tensorboard.compat.proto', None)
    new_model(dataset).train(1, 1, str(tmp_path))
    assert capsys.readouterr().out.startswith('no TensorBoard curves: it cannot be imported (')
    assert not list(tmp_path.glob('events*'))


def test_a_closed_terminal_does_not_stop_training(dataset, straight, tmp_path, monkeypatch):
    def gone(*_, **__):
        raise OSError(errno.EIO, 'Input/output error')

    monkeypatch.setattr(log.tqdm, 'write', gone)
    model = new_model(dataset)
    model.train(EPOCHS, 1, str(tmp_path))
    assert_same(everything(model), straight)
    assert len(log_of(tmp_path)) == EPOCHS * STEPS
