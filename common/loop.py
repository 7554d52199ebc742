"""The loop around a Model's `train_step`: epochs, progress bar, log, curves, samples, checkpoints, interruptions."""
import contextlib
import math
import os
import shlex
import sys
import time

import torch
from tqdm import tqdm

from common import ranks, signals
from common.errors import UserError

SECONDS_BETWEEN_CHECKPOINTS = 300  # what a run that is killed outright loses at most


def new_progress():
    """Where a run stands: whole epochs, batches of the epoch under way, steps, and the generators' states.

    `rng` is their state now; `epoch_rng` what it was before the epoch under way drew its order. `world_size` is the
    number of ranks that trained; the generators' states are those of rank 0.
    """
    return {'epoch': 0, 'batch': 0, 'step': 0, 'rng': None, 'epoch_rng': None, 'world_size': 1}


def train_loop(model, epochs, log_interval=100, out_dir='', verbose=True, sample=None, after_epoch=None,
               after_step=None):
    """Call `model.train_step` for every batch of `model.data_loader` until `model.progress` has `epochs` epochs.

    With `out_dir`, writes there: log.txt, TensorBoard curves, `sample()` (a PIL image) after every epoch, and through
    `model.save_to(out_dir)` a checkpoint. SIGINT and SIGTERM finish the step, save, and raise KeyboardInterrupt.
    `after_step()` and `after_epoch()` are called where they are given.
    A run that goes on from a checkpoint computes what it would have computed without the interruption; of several
    ranks (`common.ranks`), with the rest of the epoch and random numbers of its own. Losses are means over the ranks.
    """
    progress, losses, saved_at, warned = model.progress, {}, time.monotonic(), False
    verbose, world_size = verbose and ranks.rank() == 0, ranks.world_size()
    _regroup(progress, model.data_loader)
    with signals.noted() as stop, _Log(out_dir, verbose, progress['step']) as log:
        if progress['epoch'] >= epochs:
            log.line(f'nothing to do: {progress["epoch"]} epochs are done; give more with --epochs')
        while progress['epoch'] < epochs:
            batches = _batches_left(model.data_loader, progress)
            with (_progress_bar(model.data_loader, progress, epochs, verbose) as bar,
                  _explained(out_dir, lambda: progress['step'] + 1)):
                for batch in batches:
                    size = _batch_size(batch)
                    progress['batch'] += 1
                    if size < 2:
                        if not warned:
                            log.line('a batch of one picture has no batch statistics: left out, now and in every epoch')
                        warned = True
                        continue
                    losses = model.train_step(batch)
                    progress['step'] += 1
                    bar.update(size * world_size)
                    log.count(size * world_size)
                    if progress['step'] % log_interval == 0:
                        log.losses(progress, epochs, _read(losses, progress['step'], out_dir), bar)
                    if after_step:
                        after_step()
                    is_late = time.monotonic() - saved_at > SECONDS_BETWEEN_CHECKPOINTS
                    is_stopped, is_late = ranks.anywhere(bool(stop), is_late)
                    if is_stopped:
                        _save(model, losses, out_dir)
                        log.line(f'stopped after step {progress["step"]}' + _how_to_go_on(out_dir))
                        ranks.wait()  # for rank 0 to have saved: torchrun ends all others when one has ended
                        raise KeyboardInterrupt
                    if is_late:
                        _save(model, losses, out_dir)
                        progress['rng'], saved_at = None, time.monotonic()  # the generators go on from here
            if progress['step'] == 0:
                raise UserError('no batch of two or more pictures to train on: is the split empty, or --batch_size 1?')
            progress['epoch'], progress['batch'] = progress['epoch'] + 1, 0
            if after_epoch:
                after_epoch()
            if out_dir and sample:
                _write_sample(sample(), out_dir, progress['epoch'])
            if progress['epoch'] == epochs:
                _save(model, losses, out_dir)


def _regroup(progress, data_loader):
    """Fit what a checkpoint says to the ranks that go on: it has the generators of one, and counts one's batches."""
    before, now = progress.get('world_size', 1), ranks.world_size()
    if before != now:
        progress['batch'] = min(progress['batch'] * before // now, len(data_loader))
        progress['world_size'] = now
    if before > 1 or now > 1:
        ranks.seed_apart(progress['step'])
        progress['rng'] = progress['epoch_rng'] = rng_state()


def _batches_left(data_loader, progress):
    """The batches of the epoch under way that have not been trained on, with the generators as they then were."""
    if ranks.world_size() > 1:
        data_loader.sampler.set_epoch(progress['epoch'])
    now = progress['rng'] or rng_state()
    set_rng_state(progress['epoch_rng'] if progress['batch'] else now)
    progress['epoch_rng'] = rng_state()
    batches = iter(data_loader)
    for _ in range(progress['batch']):
        if next(batches, None) is None:
            raise UserError(f'the run had done {progress["batch"]} batches of its epoch, but now there are fewer: '
                            'go on with the same data and the same --batch_size')
    if progress['batch']:
        set_rng_state(now)
    progress['rng'] = None
    return batches


def _progress_bar(data_loader, progress, epochs, verbose):
    """A bar of pictures per second, where there is a terminal to show it."""
    images, batch_size = len(getattr(data_loader, 'dataset', ())), getattr(data_loader, 'batch_size', None) or 0
    return tqdm(desc=f'epoch {progress["epoch"] + 1}/{epochs}', total=images or None, unit=' images', leave=False,
                initial=progress['batch'] * batch_size * ranks.world_size(), disable=None if verbose else True)


def rng_state():
    """The states of PyTorch's generators, of the CPU and of the GPU in use, if there is one, as tensors."""
    return {'cpu': torch.get_rng_state(), 'cuda': [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []}


def set_rng_state(state):
    """Put the generators back into a state that `rng_state` gave."""
    torch.set_rng_state(state['cpu'])
    if state['cuda'] and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state['cuda'][0])


def _batch_size(batch):
    images = batch['right_images']
    return len(images[-1] if isinstance(images, (list, tuple)) else images)


def _read(losses, step, out_dir):
    """Losses as floats, a list one by one, means over the ranks. Raises UserError where one is not finite."""
    numbers = {}
    with _explained(out_dir, lambda: step):
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
def _explained(out_dir, step):
    """Raises UserError instead of PyTorch's errors about memory, or about what comes of weights that are not finite.

    `step()` is the number of the step under way; a GPU may report an error of it later, wherever it is waited for.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f'step {step()}: the GPU has too little memory; try a smaller --batch_size, or, for StackGANs, '
                        '--accumulate') from error
    except RuntimeError as error:
        # Binary cross-entropy refuses a probability of NaN: a GPU in an assertion, perhaps of an earlier step.
        if 'should be between 0 and 1' in str(error) or 'device-side assert' in str(error):
            raise UserError(f'a probability is not a number at step {step()}: {_diverged(out_dir)}') from error
        raise


def _diverged(out_dir):
    return (f'training has diverged; the last checkpoint in {out_dir or "out_dir"} is from before; '
            'try a smaller --lr')


def _save(model, losses, out_dir):
    _read(losses, model.progress['step'], out_dir)  # weights that have diverged must not replace good ones
    model.progress['rng'] = rng_state()
    if out_dir:
        model.save_to(out_dir, verbose=False)


def _write_sample(image, out_dir, epoch):
    os.makedirs(os.path.join(out_dir, 'samples'), exist_ok=True)
    image.save(os.path.join(out_dir, 'samples', f'epoch_{epoch:04d}.png'))


def _how_to_go_on(out_dir):
    launcher = 'python' if ranks.world_size() == 1 else 'torchrun ...'
    command = f'{launcher} {shlex.quote(sys.argv[0])} --train --resume {shlex.quote(out_dir)}'
    return f'; go on with: {command}' if out_dir else ''


class _Log:
    """Lines to log.txt, to the console where no progress bar shows them, and losses to TensorBoard."""

    def __init__(self, out_dir, verbose, step):
        self.file = self.writer = None
        self.verbose, self.images, self.since = verbose, 0, time.monotonic()
        if out_dir:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import: only where it is used
            os.makedirs(out_dir, exist_ok=True)
            self.file = open(os.path.join(out_dir, 'log.txt'), 'a', encoding='utf-8')
            self.writer = SummaryWriter(out_dir, purge_step=step + 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.file:
            self.file.close()
            self.writer.close()

    def line(self, text, console=True):
        if self.file:
            print(text, file=self.file, flush=True)
        if self.verbose and console:
            tqdm.write(text)

    def count(self, images):
        self.images += images

    def losses(self, progress, epochs, losses, bar):
        """A line and a point of the curves for a step's losses (a dict of floats), with the speed since the last."""
        speed = self.images / (time.monotonic() - self.since)
        self.images, self.since = 0, time.monotonic()
        text = '  '.join(f'{name} {value:.4f}' for name, value in losses.items())
        bar.set_postfix_str(text)
        self.line(f'epoch {progress["epoch"] + 1}/{epochs}  step {progress["step"]}  {text}  {speed:.3g} images/s',
                  console=bar.disable)
        if self.writer:
            for name, value in {**losses, 'images_per_second': speed}.items():
                self.writer.add_scalar(name, value, progress['step'])
