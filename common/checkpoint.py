"""Checkpoint files: written whole or not at all, and read without running any code of theirs."""
import contextlib
import glob
import itertools
import os
import re
import shutil
import zlib

import torch

from common import checkpoint_file
from common.checkpoint_contents import (
    check_shapes,
    checked_metadata,
    checked_optimizer,
    checked_progress,
    checked_weights,
    without_module,
)
from common.checkpoint_file import Unreadable
from common.errors import CannotWrite, UserError
from common.files import convert_os_errors, partial_file

COUNT = re.compile(r'_(\d+)\.pth$')  # steps or epochs, in the name of a snapshot
KEEP = 2  # files of a run's checkpoint: the newest, and those before it


def save(path, contents, old_format=False, keep=1):
    """Write a dict of tensors, numbers, strings and containers of them; `path` changes only once all is on the disk.

    `old_format` is what PyTorch reads that is older than 1.6. What the file held before stays as PATH.1, and so on,
    `keep` files in all. Raises CannotWrite; what was there before is then still there.
    """
    with partial_file(path) as partial, convert_os_errors(path):
        with open(partial, 'r+b') as file:
            _write(path, file, contents, old_format)
        _keep_older(path, keep)


def _write(path, file, contents, old_format):
    """Write a checkpoint into an open file; of the older format, that has no checksum, with a line that has one."""
    writer = _ChecksumWriter(file)
    try:
        torch.save(contents, writer, _use_new_zipfile_serialization=not old_format)
    except RuntimeError as error:  # which is what torch makes of an error of the file
        raise writer.error or CannotWrite(f'{path}: cannot be written ({_one_line(error)})') from error
    if old_format:
        file.write(checkpoint_file.trailer(file.tell(), writer.crc))
    file.flush()
    os.fsync(file.fileno())


class _ChecksumWriter:
    """A file to write to: the CRC-32 of what was written, and the error where it could not be."""

    def __init__(self, file):
        self.file, self.crc, self.error = file, 0, None

    def write(self, data):
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.crc = zlib.crc32(data, self.crc)
        return len(data)

    def flush(self):
        self.file.flush()


def _keep_older(path, keep):
    """Let PATH also be PATH.1, which was to become PATH.2, ... so that with a new PATH there are `keep` files."""
    for number in reversed(range(1, keep - 1)):
        if os.path.isfile(f'{path}.{number}'):
            os.replace(f'{path}.{number}', f'{path}.{number + 1}')
    if keep > 1 and os.path.isfile(path):
        _copy(path, f'{path}.1')
    for file in files_of(path)[keep:]:
        os.remove(file)


def _copy(path, target):
    """Give a file a second name, which it keeps when another takes its first; without hard links, copy it."""
    temporary = f'{path}.partial-older'  # one that a killed process left is removed as others are
    with contextlib.suppress(FileNotFoundError):
        os.remove(temporary)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, target)
    with contextlib.suppress(FileNotFoundError):
        os.remove(temporary)  # still there where both names were of the same file already


def files_of(path):
    """Those that there are of PATH, PATH.1, PATH.2, ..."""
    older = [file for file in glob.glob(f'{glob.escape(path)}.*') if file.removeprefix(f'{path}.').isdecimal()]
    older.sort(key=lambda file: int(file.removeprefix(f'{path}.')))
    return [file for file in (path, *older) if os.path.isfile(file)]


def newest(path):
    """PATH, or where it is damaged or gone the newest of PATH.1, ... that is whole, which is said; else PATH."""
    reason = 'which is gone'
    for file in files_of(path):
        try:
            checkpoint_file.check(file)
        except Unreadable as error:
            reason = f'since {error}' if file == path else reason
        else:
            if file != path:
                print(f'{file}: taken in place of {os.path.basename(path)}, {reason}')
            return file
    return path


def load(path, mapped=False):
    """Read what `save` wrote, or a plain state dict, onto the CPU.

    `mapped` reads of each tensor what is looked at, when it is: a drawing needs a tenth of what a training left.
    Raises UserError where the file is missing, damaged, or holds more than tensors and plain containers.
    """
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such checkpoint')
    is_zip = checkpoint_file.check(path)
    try:
        mapped = mapped and is_zip and os.fsencode(path).decode(errors='replace') == path  # only of a UTF-8 path
        contents = torch.load(path, map_location='cpu', weights_only=True, mmap=mapped)
    except Exception as error:  # what is wrong and was not found by `check` leads PyTorch into errors of any kind
        raise Unreadable(f'{path}: damaged, or no checkpoint ({_one_line(error)})') from error
    if not isinstance(contents, dict):
        raise Unreadable(f'{path}: holds a {type(contents).__name__}, not a checkpoint or a state dict')
    return contents


def load_weights(module, state_dict, path):
    """Load a state dict into a module, with or without DataParallel's `module.` in front of its keys.

    Raises UserError that names the first key that is missing, unknown, of another shape or not finite.
    """
    load_all([(module, state_dict, path)])


def load_all(networks, optimizers=()):
    """Load state dicts, all of them, or where one does not fit none.

    `networks` are triples of a module, its state dict and the file that this is from; `optimizers` of an optimizer, its
    state dict, and what that is, `FILE: its NAME`. Raises UserError as `load_weights` does.
    """
    weights = [checked_weights(*one) for one in networks]
    states = [checked_optimizer(*one) for one in optimizers]
    for (module, *_), fitting in zip(networks, weights):
        module.load_state_dict(fitting)
    for (optimizer, *_), fitting in zip(optimizers, states):
        _load_optimizer(optimizer, fitting)


def _load_optimizer(optimizer, state_dict):
    """Load an optimizer's state dict, with what it keeps of a parameter in the memory order of that parameter.

    Fused Adam takes the order for granted, and the machine that wrote the state may have another (`common.speed`).
    """
    optimizer.load_state_dict(state_dict)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


def build(make, state_dict, path):
    """The network that `make()` builds, whose widths are those of the tensors in a state dict.

    Raises UserError, before anything is allocated, where the state dict is not of such a network: a file of some kB
    can say that it is of one of some TB.
    """
    try:
        with torch.device('meta'):
            network = make()
    except (RuntimeError, ValueError, TypeError, ArithmeticError, AssertionError) as error:
        raise UserError(f'{path}: its weights have shapes that those of no network here have') from error
    check_shapes(network, without_module(state_dict, path), path)
    return make()


def save_model(model, parts, path='', name=None, verbose=True, /, **more):
    """Write a model to `path/NAME.pt`, whole or not at all; what that held before stays as NAME.pt.1 (`model.keep`).

    `parts` are its networks and optimizers, {name: one of them, a list of them, or None}; beside their state dicts the
    file holds the progress, options and data of the model, and `more`. Returns the file.
    """
    file = os.path.join(path, f'{name or model.name}.pt')
    states = {part: _states(value) for part, value in parts.items() if value}
    save(file, {**states, 'progress': model.progress, 'options': model.options, 'data': model.data, **more},
         keep=model.keep)
    if verbose:
        print(f'saved {file}')
    return file


def _states(part):
    return [one.state_dict() for one in part] if isinstance(part, list) else part.state_dict()


def load_model(model, parts, contents, path, paths=None):
    """Load what `save_model` wrote, a dict `contents`, into the `parts` of a model, all of it or nothing.

    A network that `contents` lacks keeps its weights. Optimizers and progress are loaded where the model has optimizers
    already and `contents` has their states. `path` is the file that messages name, or for some of the parts their own
    `paths`, {name: [file, ...]}. Raises UserError as `load_weights` does; the model is then as it was.
    """
    parts = {name: part for name, part in parts.items() if part}
    networks = {name: part for name, part in parts.items() if not _is_optimizer(part)}
    optimizers = {name: part for name, part in parts.items() if _is_optimizer(part)}
    is_training = bool(optimizers) and any(name in contents for name in optimizers)
    options, data = checked_metadata(contents, path)
    progress = checked_progress(contents, path) if is_training else model.progress
    fitting = [(network, state, file) for name, part in networks.items() if name in contents
               for network, state, file in _triples(part, contents[name], f'{path}: its {name}',
                                                    [*(paths or {}).get(name, []), path])]
    load_all(fitting, [one for name, part in optimizers.items() if is_training
                       for one in _triples(part, contents.get(name), f'{path}: its {name}')])
    model.options, model.data, model.progress = options, data, progress


def _is_optimizer(part):
    return isinstance(part[0] if isinstance(part, list) else part, torch.optim.Optimizer)


def _triples(part, state, where, files=()):
    """Return [(module or optimizer, its state dict, the file or what it is)]; the last of `files` is also of the rest.

    Raises UserError where there are not as many states as there should be.
    """
    if not isinstance(part, list):
        part, state = [part], [state]
    if not isinstance(state, list) or len(state) != len(part):
        raise UserError(f'{where} is no list of {len(part)} state dicts')
    return list(itertools.zip_longest(part, state, files[:len(part)], fillvalue=files[-1] if files else where))


def find(path, name, others=()):
    """Return the file that `path` names: itself, or in the folder NAME.pt, or one of those that match `others`.

    `others` are patterns of files below the folder; of several files, the one with the highest COUNT. In place of a
    NAME.pt that is damaged or gone, the `newest` that was kept.
    """
    if not os.path.isdir(path or '.'):
        return path
    ours = os.path.join(path, f'{name}.pt')
    found = [file for pattern in others for file in glob.glob(os.path.join(glob.escape(path), pattern))]
    return newest(ours) if files_of(ours) or not found else max(found, key=count_of)


def count_of(file):
    """Return the number COUNT in the name of a file NAME_COUNT.pth, or 0."""
    counted = COUNT.search(file)
    return int(counted[1]) if counted else 0


def count_in(contents, file, what):
    """Return how many steps or epochs (`what`) a checkpoint was trained for; of a snapshot, as its name says."""
    return checked_progress(contents, file)[what] if 'progress' in contents else count_of(file)


def _one_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ' '.join(lines[:2])[:300] or type(error).__name__
