"""Write checkpoint files whole or not at all, and read them without running any code in them."""
import contextlib
import glob
import io
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

SIZES = []  # {file: bytes} of the block `measured`, in which `save` writes nothing
DAMAGED = set()  # files that `newest` has found to be damaged
COUNT = re.compile(r'_(\d+)\.pth$')  # steps or epochs, in the name of a snapshot
NUMBER = re.compile(r'[1-9]\d{0,2}')  # of an older checkpoint
KEEP = 2  # number of checkpoints that a run keeps, the newest included
NOTES = {'progress', 'options', 'data'}  # the parts of a checkpoint that are no network or optimizer


def save(path, contents, old_format=False, keep=1):
    """Write `contents`, a dict of tensors, numbers, strings and containers of them, to `path`, whole or not at all.

    `old_format` is the format that PyTorch before 1.6 reads. The previous contents are kept as PATH.1 and so on, `keep`
    files in all. If `path` is a link, its target stays as it is. Raises CannotWrite, with the previous file unchanged.
    """
    if SIZES:
        SIZES[-1][path] = _size(contents, old_format)
        return
    with partial_file(path, follow_links=False) as partial, convert_os_errors(path):
        with open(partial, 'r+b') as file:
            _write(path, file, contents, old_format)
        _keep_older(path, keep)


@contextlib.contextmanager
def measured():
    """Yield {file: its size in bytes} of what `save` would write in this block; it writes nothing."""
    SIZES.append({})
    try:
        yield SIZES[-1]
    finally:
        SIZES.pop()


def _size(contents, old_format):
    """Return how many bytes a checkpoint has."""
    counter = _Counter()
    torch.save(contents, counter, _use_new_zipfile_serialization=not old_format)
    return counter.size + (len(checkpoint_file.trailer(counter.size, 0)) if old_format else 0)


class _Counter(io.RawIOBase):
    """A file that counts the bytes written to it, and keeps none."""

    size = 0

    def write(self, data):
        size = memoryview(data).nbytes
        self.size += size
        return size


def _write(path, file, contents, old_format):
    """Write a checkpoint to an open file. The old format has no checksum, so a line with one is appended to it."""
    writer = _ChecksumWriter(file)
    try:
        torch.save(contents, writer, _use_new_zipfile_serialization=not old_format)
    except RuntimeError as error:  # raised by PyTorch in place of the file's own error
        raise writer.error or CannotWrite(f'{path}: cannot be written ({_one_line(error)})') from error
    if old_format:
        file.write(checkpoint_file.trailer(file.tell(), writer.crc))
    file.flush()
    os.fsync(file.fileno())


class _ChecksumWriter:
    """Write to a file, and keep the CRC-32 of what was written and the error of a failed write."""

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
    """Rename PATH.1 to PATH.2 and so on, and link PATH to PATH.1, so that with a new PATH there are `keep` files."""
    if path in DAMAGED:  # it takes no place among those that are kept
        DAMAGED.discard(path)
        return
    kept = itertools.takewhile(os.path.isfile, (f'{path}.{number}' for number in range(1, keep - 1)))
    for number, file in reversed(list(enumerate(kept, 1))):
        os.replace(file, f'{path}.{number + 1}')
    if keep > 1 and os.path.isfile(path):
        _copy(path, f'{path}.1')
    for file in files_of(path)[keep:]:
        os.remove(file)


def _copy(path, target):
    """Give a file a second name by a hard link, or copy it on a file system without hard links."""
    temporary = f'{path}.partial-previous'  # the pattern that `remove_leftovers` removes
    with contextlib.suppress(FileNotFoundError):
        os.remove(temporary)
    try:
        os.link(os.path.realpath(path), temporary)  # not the link itself, whose target may change
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, target)
    with contextlib.suppress(FileNotFoundError):
        os.remove(temporary)  # os.replace does nothing if both names are links to the same file


def files_of(path):
    """Return the existing files among PATH, PATH.1, PATH.2, ..., newest first.

    PATH.20301231, say, is not one of them: someone has named a copy by the date or the step.
    """
    numbers = (file.removeprefix(f'{path}.') for file in glob.glob(f'{glob.escape(path)}.*'))
    older = [f'{path}.{number}' for number in sorted(int(number) for number in numbers if NUMBER.fullmatch(number))]
    return [file for file in (path, *older) if os.path.isfile(file)]


def newest(path):
    """Return PATH, or if it is damaged or missing, the newest intact file of PATH.1, ... with a message; else PATH."""
    reason = 'which is missing'
    for file in files_of(path):
        try:
            checkpoint_file.check(file)
        except Unreadable as error:
            reason = f'since {error}' if file == path else reason
            DAMAGED.add(file)
        else:
            if file != path:
                print(f'{file}: used in place of {os.path.basename(path)}, {reason}')
            return file
    return path


def load(path, mapped=False):
    """Return the dict that `save` wrote, or a plain state dict, with all tensors on the CPU.

    With `mapped`, tensors are read from the file only when they are used: generating images needs a tenth of a
    training's checkpoint. Raises UserError if the file is missing, damaged, or holds more than tensors and plain
    containers.
    """
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such checkpoint')
    is_zip = checkpoint_file.check(path)
    try:
        mapped = mapped and is_zip and os.fsencode(path).decode(errors='replace') == path  # PyTorch needs a UTF-8 path
        contents = torch.load(path, map_location='cpu', weights_only=True, mmap=mapped)
    except Exception as error:  # damage that `check` does not find makes PyTorch raise errors of any kind
        raise Unreadable(f'{path}: damaged, or not a checkpoint ({_one_line(error)})') from error
    if not isinstance(contents, dict):
        raise Unreadable(f'{path}: holds a {type(contents).__name__}, not a checkpoint or a state dict')
    return contents


def load_weights(module, state_dict, path):
    """Load a state dict into a module. Its keys may begin with DataParallel's `module.`.

    Raises UserError that names the first key that is missing, unknown, not finite or has another shape.
    """
    load_all([(module, state_dict, path)])


def load_all(networks, optimizers=()):
    """Load several state dicts, or none of them if one does not fit.

    `networks` are triples (module, state dict, file it is from), and `optimizers` are triples (optimizer, state dict,
    'FILE: its NAME'). Raises UserError as `load_weights` does.
    """
    weights = [checked_weights(*one) for one in networks]
    states = [checked_optimizer(*one) for one in optimizers]
    for (module, *_), fitting in zip(networks, weights):
        module.load_state_dict(fitting)
    for (optimizer, *_), fitting in zip(optimizers, states):
        _load_optimizer(optimizer, fitting)


def _load_optimizer(optimizer, state_dict):
    """Load an optimizer's state dict in the memory format of its parameters, as fused Adam expects (`common.speed`)."""
    optimizer.load_state_dict(state_dict)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


def build(make, state_dict, path):
    """Return the network that `make()` builds with the sizes found in a state dict.

    Raises UserError, before memory is allocated, if it does not fit: a file of a few kB can claim to hold terabytes.
    """
    try:
        with torch.device('meta'):
            network = make()
    except (RuntimeError, ValueError, TypeError, ArithmeticError, AssertionError) as error:
        raise UserError(f'{path}: its weights have shapes that no network of this section has') from error
    check_shapes(network, without_module(state_dict, path), path)
    return make()


def save_model(model, parts, path='', name=None, verbose=True, /, **more):
    """Write a model to `path/NAME.pt`, atomically, and keep the previous file as NAME.pt.1 (`model.keep` files in all).

    `parts` is {name: a network or optimizer, a list of them, or None}. The file holds their state dicts, the progress,
    options and data of the model, and `more`. Returns the path of the file. Raises CannotWrite.
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


def is_network_alone(contents):
    """Return whether a checkpoint is one of this project, but holds a single network and no optimizer."""
    return contents.keys() > NOTES and len(contents) == len(NOTES) + 1


def load_model(model, parts, contents, path, paths=None):
    """Load `contents`, a dict that `save_model` wrote, into the `parts` of a model: either all of it or nothing.

    A network that `contents` lacks keeps its weights. Optimizers and progress are loaded only if the model has
    optimizers and `contents` has their states. `path` is the file that error messages name; `paths` is {name: [file,
    ...]} for parts from other files. Raises UserError as `load_weights` does; the model is then unchanged.
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
    """Return [(module or optimizer, its state dict, name for errors)]; the last of `files` names the rest."""
    if not isinstance(part, list):
        part, state = [part], [state]
    if not isinstance(state, list) or len(state) != len(part):
        raise UserError(f'{where} is not a list of {len(part)} state dicts')
    return list(itertools.zip_longest(part, state, files[:len(part)], fillvalue=files[-1] if files else where))


def find(path, name, others=()):
    """Return the file that `path` refers to: itself, or in a folder NAME.pt or a file that matches one of `others`.

    `others` are glob patterns below the folder; of several matches, the one with the highest count in its name is
    taken. If NAME.pt is damaged or missing, returns the `newest` of the kept files.
    """
    if not os.path.isdir(path or '.'):
        return path
    ours = os.path.join(path, f'{name}.pt')
    found = [file for pattern in others for file in glob.glob(os.path.join(glob.escape(path), pattern))]
    return newest(ours) if files_of(ours) or not found else max(found, key=count_of)


def count_of(file):
    """Return the number COUNT in a file name NAME_COUNT.pth, or 0."""
    counted = COUNT.search(file)
    return int(counted[1]) if counted else 0


def description(file):
    """Return the description of the training data in a checkpoint; {} if it has none."""
    return checked_metadata(load(file, mapped=True), file)[1]


def count_in(contents, file, what):
    """Return the number of steps or epochs (`what`) of a checkpoint; for a snapshot, the number in its name."""
    return checked_progress(contents, file)[what] if 'progress' in contents else count_of(file)


def _one_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ' '.join(lines[:2])[:300] or type(error).__name__
