"""Checkpoint files: written whole or not at all, and read without running any code of theirs."""
import glob
import os
import pickle
import re
import zipfile

import torch

from common.errors import UserError

COUNT = re.compile(r'_(\d+)\.pth$')  # steps or epochs, in the name of a generator that the StackGANs write


def save(path, contents, old_format=False):
    """Write a dict of tensors, numbers, strings and containers of them; `path` changes only once all is on the disk.

    `old_format` is what PyTorch reads that is older than 1.6.
    """
    partial = f'{path}.partial-{os.getpid()}'
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(partial, 'wb') as file:
            torch.save(contents, file, _use_new_zipfile_serialization=not old_format)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
        raise UserError(f'{path}: cannot be written ({_one_line(error)}); '
                        'what it held before is still there') from error
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def load(path, mapped=False):
    """Read what `save` wrote, or a plain state dict, onto the CPU.

    `mapped` reads of each tensor what is looked at, when it is: a drawing needs a tenth of what a training left.
    Raises UserError where the file is missing, damaged, or holds more than tensors and plain containers.
    """
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such checkpoint')
    try:
        contents = torch.load(path, map_location='cpu', weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(f'{path}: refused: not a checkpoint of tensors alone; a pickled module could run code when '
                        f'it is loaded. Save its state_dict() instead') from error
    except Exception as error:  # bytes that are no checkpoint lead the reader into errors of any kind
        raise UserError(f'{path}: damaged, or no checkpoint ({_one_line(error)})') from error
    if not isinstance(contents, dict):
        raise UserError(f'{path}: holds a {type(contents).__name__}, not a checkpoint or a state dict')
    return contents


def load_weights(module, state_dict, path):
    """Load a state dict into a module, with or without DataParallel's `module.` in front of its keys.

    Raises UserError that names the first key that is missing, unknown or of another shape.
    """
    try:
        module.load_state_dict(without_module(state_dict, path))
    except RuntimeError as error:
        raise UserError(f'{path}: does not fit {type(module).__name__}: {_one_line(error)}') from error


def without_module(state_dict, path):
    """A state dict without DataParallel's `module.` in front of its keys. Raises UserError where it is none."""
    if not isinstance(state_dict, dict) or not all(isinstance(key, str) for key in state_dict):
        raise UserError(f'{path}: holds no state dict where one belongs')
    return {key.removeprefix('module.'): value for key, value in state_dict.items()}


def save_pair(model, path='', name=None, verbose=True):
    """Write `model`'s netG, netD, progress and options, and where it has them optim_G and optim_D, to `path/NAME.pt`.

    Whole or not at all. Returns the file.
    """
    file = os.path.join(path, f'{name or model.name}.pt')
    contents = {'netG': model.netG.state_dict(), 'netD': model.netD.state_dict(),
                'progress': model.progress, 'options': model.options, 'data': model.data}
    if model.optim_G is not None:
        contents |= {'optim_G': model.optim_G.state_dict(), 'optim_D': model.optim_D.state_dict()}
    save(file, contents)
    if verbose:
        print(f'saved {file}')
    return file


def load_optimiser(optimiser, state_dict):
    """Load an optimiser's state dict, with what it keeps of a parameter in the memory order of that parameter.

    Fused Adam takes the order for granted, and the machine that wrote the state may have another (`make_fast`).
    """
    optimiser.load_state_dict(state_dict)
    for parameter, state in optimiser.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


def load_pair(model, contents, path):
    """Take over what `save_pair` wrote; of a training, only where `model` has optimisers already.

    Raises UserError as `load_weights` does.
    """
    load_weights(model.netG, contents['netG'], path)
    load_weights(model.netD, contents['netD'], path)
    model.options, model.data = contents.get('options', {}), contents.get('data', {})
    if model.optim_G is not None and 'optim_G' in contents:
        load_optimiser(model.optim_G, contents['optim_G'])
        load_optimiser(model.optim_D, contents['optim_D'])
        model.progress = contents['progress']


def find(path, name):
    """The file that `path` names: itself, or in the folder NAME.pt, or a netG_*COUNT.pth there or in Model/.

    Of several the one with the highest COUNT, as the StackGANs' authors number their snapshots. A folder may also hold
    the chapter's own NAME_G.pt, with its discriminator beside it.
    """
    if not os.path.isdir(path or '.'):
        return path
    ours = os.path.join(path, f'{name}.pt')
    snapshots = [file for place in ('', 'Model')
                 for file in glob.glob(os.path.join(glob.escape(path), place, 'netG_*.pth')) if COUNT.search(file)]
    generator = os.path.join(path, f'{name}_G.pt')
    if not os.path.isfile(ours) and os.path.isfile(generator):
        return generator
    return ours if os.path.isfile(ours) or not snapshots else max(snapshots, key=count_of)


def count_of(file):
    """The number in the name of a file netG_210000.pth or netG_epoch_90.pth, or 0."""
    counted = COUNT.search(file)
    return int(counted[1]) if counted else 0


def _one_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ' '.join(lines[:2])[:300] or type(error).__name__
