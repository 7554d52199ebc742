"""Run a training loop with its progress bar, log, curves, samples, checkpoints and handling of interruptions."""
import contextlib
import math
import os
import shlex
import sys
import time

import torch
from tqdm import tqdm

from common import ranks, run, signals, torch_errors
from common.errors import UserError
from common.log import Log
from common.progress import rng_state, set_rng_state
from common.run_page import RunPage

SECONDS_BETWEEN_CHECKPOINTS = 300  # a run that is killed outright loses no more than this
SECONDS_BETWEEN_ATTEMPTS = 60      # to write a checkpoint again after the disk was full
SECONDS_AT_THE_END = 600           # how long writing the last checkpoint is retried
PAUSE_AT_THE_END = 10              # seconds between two of these retries
LARGEST_BCE = 100                  # of nn.BCELoss, for a probability of 0 where it should be 1


class TrainingRun:
    """The context of a training loop. A `Model` writes its loop as the chapter does:

        with TrainingRun(self, epochs, log_interval, out_dir, verbose, self.sample_grid) as run:
            for epoch in run.epochs():
                for batch in run.batches():
                    losses = self.train_step(batch)
                    run.log(losses)

    Batches come from `model.data_loader`, until `model.progress` has reached `epochs` epochs. With `out_dir`, the run
    writes log.txt, TensorBoard curves, the PIL image `sample()` after every epoch, checkpoints through
    `model.save_to(out_dir)`, and a page that shows all of this (`common.run_page`). If a file cannot be written because
    the disk is full, the training reports it, continues and tries again. `unit` is the name of a batch's items. Batches
    of fewer than `smallest` items are skipped, as batch norm needs two.

    On SIGINT or SIGTERM the run finishes the step, saves, and raises KeyboardInterrupt with the signal's number; before
    the end of the first step it raises at once. A run resumed from a checkpoint computes what it would have computed
    without the interruption; on several ranks (`common.ranks`) it completes the epoch with new random numbers. Logged
    losses are means over the ranks.

    Raises UserError if a batch cannot be read, after saving the steps before it, and at the end of the training if some
    file still could not be written.
    """

    def __init__(self, model, epochs, log_interval=100, out_dir='', verbose=True, sample=None, unit='images',
                 smallest=2):
        self.model, self.progress, self.data_loader = model, model.progress, model.data_loader
        self.last_epoch, self.log_interval, self.out_dir = epochs, log_interval, out_dir
        self.verbose, self.unit, self.smallest = verbose and ranks.rank() == 0, unit, smallest
        # A list of batches has no data set to generate samples from.
        self.sample = sample if out_dir and hasattr(self.data_loader, 'dataset') else None
        self.losses, self.bar, self.size = {}, None, 0
        self.warned_small = self.warned_stuck = False

    def __enter__(self):
        adapt_progress(self.progress, self.data_loader)
        with contextlib.ExitStack() as stack:
            self.stop = stack.enter_context(signals.recorded())
            self.writer = stack.enter_context(Log(self.out_dir, self.verbose, self.progress['step'], self.unit))
            stack.enter_context(convert_errors(self.out_dir, lambda: self.progress['step'] + 1))
            self.checkpoints = _CheckpointWriter(self.model, self.out_dir, self.writer)
            self.page = RunPage(self.out_dir, self.writer, self.progress, self.last_epoch)
            self.contexts = stack.pop_all()
        return self

    def __exit__(self, *error):
        try:
            if error[0] and self.losses:  # stopped, after some steps
                self.page.renew(at_once=True)
        finally:  # also if a second signal arrives
            is_handled = self.contexts.__exit__(*error)
        return is_handled

    def epochs(self):
        """Yield the number of every epoch that remains to be trained, counted from 0."""
        if self.progress['epoch'] >= self.last_epoch:
            self.writer.line(f'nothing to do: {self.progress["epoch"]} epochs are done; give a larger --epochs')
        while self.progress['epoch'] < self.last_epoch:
            yield self.progress['epoch']
            if self.progress['step'] == 0:
                raise UserError('no batch of two or more images to train on: is the split empty, or --batch_size 1?')
            self.progress['epoch'], self.progress['batch'] = self.progress['epoch'] + 1, 0
            if self.sample:
                self.writer.sample(self.sample(), self.progress)
            is_last = self.progress['epoch'] == self.last_epoch
            self.page.renew(at_once=is_last)
            if is_last:
                self.checkpoints.finish(self.losses, self.stop)
                self.page.renew(at_once=True)  # with the last checkpoint

    def batches(self):
        """Yield the batches of this epoch that remain to be trained on; save checkpoints when they are due."""
        with _progress_bar(self.data_loader, self.progress, self.last_epoch, self.verbose, self.unit) as self.bar:
            for batch in _batches_left(self.data_loader, self.progress, self.stop, self._stop_on_error):
                self.progress['batch'] += 1
                self.size = items_in(batch)
                if self.size < self.smallest:
                    self._warn_small()
                    continue
                with contextlib.ExitStack() as self.first_step:  # it may compile networks for minutes
                    self.first_step.enter_context(_interruptible(self.stop, not self.losses))
                    yield batch
                is_stopped, is_due = ranks.any_rank(bool(self.stop), self.checkpoints.is_due())
                if is_stopped:
                    self.checkpoints.stop(self.losses, self.stop)
                if is_due:
                    self.checkpoints.save(self.losses)
                    self.page.renew()
        if self.stop and ranks.world_size() == 1:
            self.checkpoints.stop(self.losses, self.stop)

    def log(self, losses):
        """Count a step, and log its losses (a dict of scalars or lists of scalars) every `log_interval` steps."""
        self.first_step.close()  # from here on, an interruption must save the step
        self.losses = losses
        self.progress['step'] += 1
        trained = self.size * ranks.world_size()
        self.bar.update(trained)
        self.writer.count(trained)
        if self.progress['step'] % self.log_interval == 0:
            numbers = to_floats(losses, self.progress['step'], self.out_dir)
            self.writer.losses(self.progress, self.last_epoch, numbers, self.bar)
            self._warn_stuck(numbers)

    def write(self, what, write, *arguments, every=1):
        """Call `write(*arguments)` after `every` so many steps; if it cannot write `what`, report that and continue.

        Without an `out_dir`, nothing is written.
        """
        if self.out_dir and self.progress['step'] % every == 0:
            with self.writer.attempt(what):
                write(*arguments)

    def _stop_on_error(self, error):
        self.checkpoints.stop_on_error(self.losses, error)

    def _warn_small(self):
        if not self.warned_small:
            self.writer.line('a batch of one image has no batch statistics: skipped in every epoch')
        self.warned_small = True

    def _warn_stuck(self, numbers):
        for name, value in numbers.items():
            if name.startswith('loss_D') and value >= LARGEST_BCE and not self.warned_stuck:
                self.writer.line(f'{name} is {value:.0f}: the discriminator is certain and wrong, where its loss has '
                                 'no gradient, so it hardly learns any more; begin again with a smaller --lr')
                self.warned_stuck = True


def adapt_progress(progress, data_loader):
    """Convert the progress in a checkpoint, which counts the batches of one rank, to the present ranks and batch size.

    An epoch that was left in the middle continues after as many items as were trained on, rounded down to a batch.
    """
    before, now = progress['world_size'], ranks.world_size()
    size = getattr(data_loader, 'batch_size', None) or 0
    size_before = progress['batch_size'] or size
    if (before, size_before) != (now, size):
        trained = progress['batch'] * before * (size_before or 1)
        progress['batch'] = min(trained // (now * (size or 1)), len(data_loader))
    progress['world_size'], progress['batch_size'] = now, size
    if before > 1 or now > 1:
        ranks.seed_apart(progress['step'])
        progress['rng'] = progress['epoch_rng'] = rng_state()


def _batches_left(data_loader, progress, stop, on_error):
    """Yield the batches of the current epoch that remain to be trained on, with the random state for them.

    A signal that arrives while waiting for worker processes ends the epoch early, as they may be stuck. If a batch
    cannot be read, this restores the random state from before it and calls `on_error(error)`.
    """
    if ranks.world_size() > 1:
        data_loader.sampler.set_epoch(progress['epoch'])
    now = progress['rng'] or rng_state()
    set_rng_state(progress['epoch_rng'] if progress['batch'] else now)
    progress['epoch_rng'] = rng_state()
    batches = iter(data_loader)
    with _interruptible(stop, progress['batch'] > 0):
        for _ in range(progress['batch']):
            if next(batches, None) is None:
                raise UserError(f'the run had done {progress["batch"]} batches of its epoch, but now there are fewer: '
                                'resume with the same data and the same --batch_size')
    if progress['batch']:
        set_rng_state(now)
    progress['rng'] = None
    try:
        while True:
            before = torch.get_rng_state()  # of the CPU's generator, the only one that loaders draw from
            with _interruptible(stop, getattr(data_loader, 'num_workers', 0) > 0):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
    except KeyboardInterrupt:
        if progress['batch'] == 0:
            set_rng_state(progress['epoch_rng'])  # as if the epoch had not begun
    except UserError as error:
        torch.set_rng_state(before)
        if progress['batch'] == 0:
            set_rng_state(progress['epoch_rng'])
        on_error(error)
        raise


def _interruptible(stop, is_allowed):
    """Return a context in which a signal raises KeyboardInterrupt, if `is_allowed` and there is only one rank."""
    return stop.interruptible() if is_allowed and ranks.world_size() == 1 else contextlib.nullcontext()


def _progress_bar(data_loader, progress, epochs, verbose, unit):
    """Return a progress bar in images, or another `unit`, per second; it is shown only in a terminal.

    It covers all epochs, so the time that it says is left is that of the training.
    """
    batch_size = getattr(data_loader, 'batch_size', None) or 0
    images = len(getattr(data_loader, 'dataset', ())) or len(data_loader) * batch_size
    return tqdm(desc=f'epoch {progress["epoch"] + 1}/{epochs}', total=images * epochs or None, unit=f' {unit}',
                initial=progress['epoch'] * images + progress['batch'] * batch_size * ranks.world_size(),
                leave=False, disable=None if verbose else True)


def items_in(batch):
    """Return the number of items in a batch: a dict of tensors, or of lists of tensors for several sizes."""
    items = batch.get('right_images', next(iter(batch.values())))
    return len(items[-1] if isinstance(items, (list, tuple)) else items)


def to_floats(losses, step, out_dir):
    """Return losses as floats, one per list item, averaged over the ranks. Raises UserError if one is not finite."""
    numbers = {}
    with convert_errors(out_dir, lambda: step):
        for name, value in losses.items():
            if isinstance(value, (list, tuple)):
                numbers.update({f'{name}_{i}': float(part) for i, part in enumerate(value)})
            else:
                numbers[name] = float(value)
    numbers = dict(zip(numbers, ranks.mean(list(numbers.values()))))
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise UserError(f'{name} is {value} at step {step}: {_diverged(out_dir)}')
    return numbers


@contextlib.contextmanager
def convert_errors(out_dir, step):
    """Raise UserError in place of PyTorch's errors that are not bugs (`common.torch_errors`).

    `step()` returns the number of the current step. A GPU may report an error of a step later, when it is waited for.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if explanation := _explanation(error, step(), out_dir):
            raise UserError(explanation) from error
        raise


def _explanation(error, step, out_dir):
    """Return a one-line explanation for the user, or None if the error is unknown."""
    if isinstance(error, torch.OutOfMemoryError):
        return (f'step {step}: the GPU has too little memory; try a smaller --batch_size, or --accumulate if the '
                'section has that flag')
    if torch_errors.is_out_of_memory(error):
        return (f'step {step}: this machine has too little memory; try a smaller --batch_size, fewer --workers, or '
                '--accumulate if the section has those flags')
    if torch_errors.is_dead_worker(error):
        return (f'step {step}: a process that reads images has ended ({_one_line(error)}), usually because this '
                'machine has too little memory; start or resume with fewer --workers, or 0')
    if torch_errors.is_not_finite(error):
        return f'a probability is not a number at step {step}: {_diverged(out_dir)}'
    if torch_errors.is_of_gpu(error):
        return (f'step {step}: the GPU has failed ({_one_line(error)}); continue with --resume from the last '
                'checkpoint, if there is one')


def _one_line(error):
    return str(error).partition('\n')[0].strip().rstrip('.')[:200]


def _diverged(out_dir):
    is_saved = out_dir and any(run.CHECKPOINT.search(name) and name != run.ENCODER for name in os.listdir(out_dir))
    saved = f'the last checkpoint in {out_dir} was saved before that' if is_saved else 'there is no checkpoint yet'
    return f'training has diverged; {saved}; try a smaller --lr'


class _CheckpointWriter:
    """Write a run's checkpoints: at intervals, when training is stopped, and when it ends."""

    def __init__(self, model, out_dir, log):
        self.model, self.out_dir, self.log = model, out_dir, log
        self.due = time.monotonic() + SECONDS_BETWEEN_CHECKPOINTS
        self.good = f'step {model.progress["step"]}' if model.progress['step'] else 'none'
        self.is_run = bool(out_dir) and run.has_options(out_dir)

    def is_due(self):
        return time.monotonic() > self.due

    def _restore_folder(self):
        """If the run folder was moved or removed during the training, make it again and report it."""
        if self.is_run and not run.has_options(self.out_dir):
            run.write_options(self.out_dir, self.model.options)
            run.lock(self.out_dir)
            self.log.open(self.model.progress['step'])
            self.log.line(f'{self.out_dir}: the folder was moved or removed during the training; from now on the run '
                          'writes to a new folder of that name; copy what it had before, such as '
                          f'{run.ENCODER}, from the moved one')

    def save(self, losses):
        """Write a checkpoint, or report why that failed, and schedule the next attempt."""
        self._check(losses)
        is_written = self._try_to_save()
        wait = SECONDS_BETWEEN_CHECKPOINTS if is_written else min(SECONDS_BETWEEN_CHECKPOINTS, SECONDS_BETWEEN_ATTEMPTS)
        self.due = time.monotonic() + wait
        self.model.progress['rng'] = None  # the training continues, so this state is about to change

    def stop(self, losses, stop):
        """Write a checkpoint and raise KeyboardInterrupt, or UserError if it cannot be written."""
        self._check(losses)
        stopped = f'stopped after step {self.model.progress["step"]}'
        is_written = self._try_to_save()
        if is_written:
            self.log.line(stopped + _resume_command(self.out_dir))
        ranks.wait()  # until rank 0 has saved: torchrun ends all ranks as soon as one has ended
        if is_written:
            stop.interrupt()
        self._fail(stopped)

    def stop_on_error(self, losses, error):
        """Write a checkpoint when the next batch cannot be read, and raise a UserError that says how to resume.

        Does nothing if there is nothing to lose, or on one of several ranks, as the others may continue.
        """
        if not (losses and self.out_dir) or ranks.world_size() > 1:
            return
        self._check(losses)
        stopped = f'{error}; stopped after step {self.model.progress["step"]}'
        if not self._try_to_save():
            self._fail(stopped)
        raise UserError(f'{stopped}, which is saved{_resume_command(self.out_dir)}') from error

    def finish(self, losses, stop):
        """Write the last checkpoint. Raises UserError if it or another file still cannot be written."""
        self._check(losses)
        if not self._try_to_save():
            self.log.line(f'the training is done; its checkpoint is retried for {SECONDS_AT_THE_END // 60} minutes')
            self._keep_trying(stop)
        self.log.flush()
        if self.log.failures:
            self._fail('the training is done')

    def _keep_trying(self, stop):
        """Retry writing the checkpoint for `SECONDS_AT_THE_END`, or until a signal arrives."""
        give_up = time.monotonic() + SECONDS_AT_THE_END
        while not stop and time.monotonic() < give_up:
            with contextlib.suppress(KeyboardInterrupt), stop.interruptible():
                time.sleep(PAUSE_AT_THE_END)
            if self._try_to_save():
                return

    def _check(self, losses):
        """Raise UserError if the losses are not finite, so that diverged weights never replace good ones."""
        to_floats(losses, self.model.progress['step'], self.out_dir)

    def _try_to_save(self):
        """Save the present state of the run, and return whether that succeeded."""
        what, progress = 'the checkpoint', self.model.progress
        progress['rng'] = rng_state()
        with self.log.attempt(what, f' (the last good one: {self.good})'):
            if self.out_dir:
                self._restore_folder()
                self.model.save_to(self.out_dir, verbose=False)
            self.good = f'step {progress["step"]}'
        return what not in self.log.failures

    def _fail(self, when):
        failures = '; '.join(self.log.failures.values())
        raise UserError(f'{when}, but some files were not written: {failures}; the last good checkpoint: {self.good}')


def _resume_command(out_dir):
    launcher = 'python' if ranks.world_size() == 1 else 'torchrun ...'
    command = f'{launcher} {shlex.quote(sys.argv[0])} --train --resume {shlex.quote(out_dir)}'
    return f'; resume with: {command}' if out_dir else ''
