"""Report, before training starts, how much memory, time and disk space it will take, measured on a few steps.

Steps, batches, samples and checkpoints are the training's own. What is extrapolated from them is printed as such.
"""
import itertools
import os
import sys
import tempfile
import time

import torch
from tqdm import tqdm

from common import checkpoint, run, run_page
from common.errors import CannotWrite
from common.files import free_space
from common.history import History
from common.log import Log
from common.progress import rng_state
from common.run_page import FRAMES, PAGE, sample_names
from common.training_run import adapt_progress, convert_errors, items_in, to_floats

SECONDS = 2  # of steps after the warm-up step, of which there is at least one
UNITS = (('day', 86400), ('h', 3600), ('min', 60), ('s', 1))


def report(model, networks, epochs, log_interval, run_dir, *, caches=None, copied=None, sample=None, snapshot=None,
           snapshot_steps=1, unit='images', smallest=2):
    """Print what training `model` until `epochs` epochs are done would take. Writes nothing but a temporary folder.

    `model` is as for `TrainingRun`, ready to be trained, and `networks` are {name: module}. The run would write to
    `run_dir`; before it, the `caches` {file: (bytes, seconds)}, and the files `copied` {name: bytes} into it. `sample`
    makes the PIL image of an epoch, and `snapshot(folder)` saves networks every `snapshot_steps` steps; both can be
    None. `unit` and `smallest` are as for `TrainingRun`. Raises UserError as a training does.
    """
    progress, loader = model.progress, model.data_loader
    adapt_progress(progress, loader)
    done, last = progress['epoch'] * len(loader) + progress['batch'], epochs * len(loader)
    print('\nDry run: nothing is written\n\nnetworks')
    _print_networks(networks)
    if done >= last:
        print(f'nothing to do: {progress["epoch"]} epochs are done; give a larger --epochs')
        return
    with convert_errors('', lambda: progress['step'] + 1):
        first, step, losses = _measure(model, unit, smallest)
    started = time.perf_counter()
    image = sample() if sample else None
    sampling = time.perf_counter() - started
    _print_memory(model.device, getattr(loader, 'num_workers', 0))
    left, lines = epochs - progress['epoch'], last // log_interval - done // log_interval
    at_start, of_step, of_epoch, of_image, of_page = _log_sizes(model, epochs, losses, image, unit, left)

    files = [(file, size, _computed(seconds)) for file, (size, seconds) in (caches or {}).items()]
    files += [(os.path.join(run_dir, name), size, '') for name, size in (copied or {}).items() if size]
    snapshots = last // snapshot_steps - done // snapshot_steps + (last % snapshot_steps > 0)
    files += _checkpoints(model, run_dir, snapshot, snapshots)
    if image:
        files.append((os.path.join(run_dir, 'samples'), left * of_image, f'{left:,} of {_megabytes(of_image)}'))
    files.append((os.path.join(run_dir, PAGE), of_page, ''))
    files.append((os.path.join(run_dir, 'log.txt'), at_start + lines * of_step + left * of_epoch,
                  f'{_counted(lines, "line")}, with the TensorBoard curves'))
    _print_files(files)

    caching = sum(seconds for _, seconds in (caches or {}).values())
    seconds = caching + first + (last - done) * step + left * sampling
    ends = time.strftime('%a %d %b %Y, %H:%M', time.localtime(time.time() + seconds))
    and_caches = f' and {_duration(caching)} for the caches' if caching else ''
    print(f'\nat this speed\n  an epoch      {_duration(len(loader) * step + sampling)}, '
          f'{_counted(len(loader), "step")}\n  the training  {_duration(seconds)}: {_counted(left, "epoch")}'
          f'{and_caches}; started now, it is done on {ends}')


def _print_networks(networks):
    """Print the number of parameters of each network, and how many of them are trained if that is not all."""
    width, total = max(map(len, (*networks, 'in all'))), 0
    for name, network in networks.items():
        count = sum(parameter.numel() for parameter in network.parameters())
        trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        note = '' if trained == count else f', {trained:,} of them trained'
        print(f'  {name:<{width}}  {count:>13,} parameters{note}  ({type(network).__name__})')
        total += count
    print(f'  {"in all":<{width}}  {total:>13,} parameters')


def _measure(model, unit, smallest):
    """Train for a warm-up step and for SECONDS more; print the time of a step.

    Returns (seconds of the warm-up step, seconds of a step after it, losses as floats).
    """
    batches = itertools.chain.from_iterable(itertools.repeat(model.data_loader))
    batches = (batch for batch in batches if items_in(batch) >= smallest)

    def step():
        batch = next(batches)
        model.progress['step'] += 1
        return model.train_step(batch), items_in(batch)

    start = time.perf_counter()
    step()
    _wait(model.device)
    warm, items = time.perf_counter(), []
    while not items or time.perf_counter() - warm < SECONDS:
        losses, count = step()
        items.append(count)
    _wait(model.device)
    seconds = time.perf_counter() - warm
    speed = sum(items) / seconds
    print(f'\nmeasured on {_name_of(model.device)}, on {_counted(len(items), "step")} of {max(items)} {unit} after a '
          f'warm-up step of {_duration(warm - start)}\n  a step        {_duration(seconds / len(items))}, '
          f'{speed:,.{0 if speed >= 100 else 2}f} {unit}/s')
    return warm - start, seconds / len(items), to_floats(losses, model.progress['step'], '')


def _wait(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def _name_of(device):
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else f'the {device.type.upper()}'


def _print_memory(device, workers):
    """Print the peak memory of the steps and of a sample."""
    if device.type == 'cuda':
        print(f'  peak memory   {_megabytes(torch.cuda.max_memory_allocated(device))} of the GPU')
        return
    try:
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    except ImportError:
        print('  peak memory   not measured: Windows does not tell')
        return
    others = f', besides that of {workers} --workers' if workers else ''
    print(f'  peak memory   {_megabytes(peak)} of this process, with PyTorch and the data{others}')


def _log_sizes(model, epochs, losses, image, unit, left):
    """Return the bytes of log and curves at the start, for a line of losses and for a sample; of a sample; of the page.

    They are written to a temporary folder, which is removed. The page is that with the samples of `left` epochs.
    """
    progress = model.progress
    with tempfile.TemporaryDirectory() as folder, Log(folder, False, progress['step'], unit) as log:
        empty = _bytes_in(folder)
        log.losses(progress, epochs, losses, tqdm(disable=True))
        with_losses = _bytes_in(folder)
        if image:
            log.sample(image, progress)
        of_image = _bytes_in(os.path.join(folder, 'samples'))
        for error in log.failures.values():
            raise CannotWrite(error)
        with_image = _bytes_in(folder)
        run.write_options(folder, model.options)
        for name in sample_names(folder):
            for number in range(1, min(left, FRAMES)):  # the others are of about the same size
                os.link(os.path.join(folder, 'samples', name), os.path.join(folder, 'samples', f'{number}.png'))
        run_page.write(folder, History(folder), {})
        of_page = os.path.getsize(os.path.join(folder, PAGE))
        return empty, with_losses - empty, with_image - with_losses - of_image, of_image, of_page


def _bytes_in(folder):
    return sum(os.path.getsize(os.path.join(place, name)) for place, _, names in os.walk(folder) for name in names)


def _checkpoints(model, run_dir, snapshot, snapshots):
    """Return (file, bytes, remark) for the checkpoints and snapshots, with their present contents."""
    model.progress |= {'rng': rng_state(), 'epoch_rng': rng_state()}
    with checkpoint.measured() as sizes:
        model.save_to(run_dir, verbose=False)
    (file, size), = sizes.items()
    kept = len(checkpoint.files_of(file))
    more = max(0, model.keep - kept) + 1
    there = f', {kept} are there' if kept else ''
    found = [(file, more * size, f'{_megabytes(size)} x {model.keep} kept{there}, and 1 while it is being written')]
    with checkpoint.measured() as sizes:
        if snapshot:
            snapshot(run_dir)
    for file, size in sizes.items():
        count = snapshots if checkpoint.COUNT.search(file) else 1
        found.append((checkpoint.COUNT.sub('_COUNT.pth', file), count * size, f'{count:,} of {_megabytes(size)}'))
    return found


def _print_files(files):
    """Print files and their sizes, and for each disk whether it has the space."""
    print('\nfiles, at these sizes')
    needed, free = {}, {}
    for path, size, remark in files:
        print(f'  {_megabytes(size):>14}  {path}{remark and f" ({remark})"}')
        disk, free_now = free_space(path)
        needed[disk], free[disk] = needed.get(disk, 0) + size, (path, free_now)
    for disk, size in needed.items():
        path, free_now = free[disk]
        enough = '' if size <= free_now else f': NOT ENOUGH, {_megabytes(size - free_now)} are missing'
        print(f'  {_megabytes(size):>14}  in all on the disk of {os.path.dirname(path)}, '
              f'where {_megabytes(free_now)} are free{enough}')


def _computed(seconds):
    return f'cache, computed once, in {_duration(seconds)} at this speed' if seconds else 'cache, computed once'


def _megabytes(size):
    return f'{size / 1e6:,.1f} MB' if size >= 1e7 else f'{size / 1e3:,.1f} kB'


def _counted(number, what):
    return f'{number:,} {what}{"s" * (number != 1)}'


def _duration(seconds):
    """Convert seconds to text with two units, as in '3 h 5 min'; below a minute, to seconds with three digits."""
    if seconds < 59.5:
        return f'{seconds:.3g} s'
    seconds = round(seconds)
    larger = next(number for number, (_, length) in enumerate(UNITS) if seconds >= length)
    (name, length), (smaller, part) = UNITS[larger:larger + 2]
    count, parts = divmod(round(seconds / part), length // part)
    return f'{count} {name}{"s" * (name == "day" and count > 1)} {parts} {smaller}'
