"""Check the contents of a checkpoint against what it is for: networks, optimizers, and the records of a run.

Each function returns what can be used as it is, and raises a UserError that names the file and the item.
"""
import math

import torch

from common.checkpoint_file import printable
from common.errors import UserError
from common.progress import new_progress

MAX_NAMES = 5_000                   # names in a state dict; the largest networks here have a few hundred
MAX_NOTES, MAX_DEPTH = 100_000, 10  # items, and levels of nesting, in the options of a run
MAX_SHOWN = 100                     # captions with their embeddings in the description of a data set
LARGEST = 2 ** 40                   # number of steps, or a setting of an optimizer
MOMENTS = {torch.optim.Adam: ('exp_avg', 'exp_avg_sq'), torch.optim.RMSprop: ('square_avg',),
           torch.optim.SGD: ()}
SQUARES = ('exp_avg_sq', 'square_avg')
NUMBERS = ('lr', 'betas', 'eps', 'weight_decay', 'alpha')  # an optimizer's settings that a checkpoint may change
VARIANTS = ('fused', 'foreach')  # implementations of the same computation
COUNTER = 'num_batches_tracked'  # of a batch norm; PyTorch before 0.4.1 had none


def without_module(state_dict, path):
    """Return a state dict without DataParallel's `module.` in its names. Raises UserError if it is not a state dict."""
    if (not isinstance(state_dict, dict) or len(state_dict) > MAX_NAMES
            or not all(isinstance(name, str) for name in state_dict)):
        raise UserError(f'{path}: does not hold a state dict')
    return {name.removeprefix('module.'): value for name, value in state_dict.items()}


def check_shapes(network, weights, path):
    """Raise UserError unless `weights`, a dict, holds the tensors of `network`, with the same shapes and types."""
    ours = network.state_dict()
    for name, value in ours.items():
        if name not in weights:
            if name.endswith(COUNTER):
                continue
            raise _misfit(network, path, f'{name} is missing')
        theirs = weights[name]
        if not torch.is_tensor(theirs):
            raise _misfit(network, path, f'{name} is not a tensor')
        if theirs.shape != value.shape:
            raise _misfit(network, path, f'{name} is {_size(theirs)}, not {_size(value)}')
        if theirs.is_floating_point() != value.is_floating_point() or theirs.dtype == torch.bool:
            raise _misfit(network, path, f'{name} is {theirs.dtype}, not {value.dtype}')
    if unknown := weights.keys() - ours.keys():
        raise _misfit(network, path, f'it has no {printable(min(unknown))}')


def checked_weights(network, state_dict, path):
    """Return a state dict that `network` can load, without `module.` in its names.

    Raises UserError that names the first tensor that is missing, unknown, not finite or of another shape or type.
    """
    weights = without_module(state_dict, path)
    check_shapes(network, weights, path)
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise UserError(f'{path}: {name} has numbers that are not finite: the training had diverged; '
                            'use an earlier checkpoint')
    return weights


def checked_optimizer(optimizer, state_dict, where):
    """Return a state dict that `optimizer` can load and continue from. `where` describes it: 'FILE: its NAME'.

    Raises UserError unless it is from an optimizer of the same type for parameters of the same shapes.
    """
    if not _is_state_dict(state_dict):
        raise UserError(f'{where} is not the state of an optimizer, so the training cannot be resumed from it')
    ours = optimizer.state_dict()['param_groups']
    groups, states = state_dict['param_groups'], state_dict['state']
    if len(groups) != len(ours) or any(group['params'] != own['params'] for group, own in zip(groups, ours)):
        raise UserError(f'{where} has other parameters than this training')
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group['params']))
    if unknown := states.keys() - parameters.keys():
        raise UserError(f'{where} has an unknown parameter {printable(min(unknown, key=str))}')
    return {'param_groups': [_checked_group(group, own, where) for group, own in zip(groups, ours)],
            'state': {number: _checked_state(state, parameters[number], MOMENTS[type(optimizer)],
                                             f'{where}, parameter {number},')
                      for number, state in states.items()}}


def checked_metadata(contents, path):
    """Return (options, data), a checkpoint's dicts of how and on what it was trained; {} if it has none."""
    options, data = contents.get('options', {}), contents.get('data', {})
    if not isinstance(options, dict) or not _is_plain(options):
        raise UserError(f'{path}: its options are not a dict of numbers and text')
    if not isinstance(data, dict) or not _is_description(data):
        raise UserError(f'{path}: its data is not a description of what it was trained on')
    return options, data


def checked_progress(contents, path):
    """Return the progress stored in a checkpoint, as in `common.progress.new_progress`."""
    progress, fresh = contents.get('progress'), new_progress()
    if not isinstance(progress, dict):
        raise UserError(f'{path}: does not say how far it was trained (its progress is not a dict)')
    progress = {name: progress.get(name, value) for name, value in fresh.items()}
    for name, value in progress.items():
        is_right = _is_generators(value) if fresh[name] is None else type(value) is int and 0 <= value < LARGEST
        if not is_right:
            raise UserError(f'{path}: its progress is damaged: {name} is neither a count nor a random state')
    if not progress['world_size'] or progress['batch'] and progress['epoch_rng'] is None:
        raise UserError(f'{path}: its progress is damaged: it does not say how the epoch under way began')
    return progress


def _misfit(network, path, reason):
    return UserError(f'{path}: does not fit {type(network).__name__}: {reason}; give a checkpoint of this network, and '
                     'for a training the networks and widths that it was trained with (--help lists their flags)')


def _size(tensor):
    return ' x '.join(map(str, tensor.shape)) or 'a single number'


def _is_state_dict(state):
    return (isinstance(state, dict) and isinstance(state.get('state'), dict)
            and all(isinstance(one, dict) for one in state['state'].values())
            and isinstance(state.get('param_groups'), list)
            and all(isinstance(group, dict) and isinstance(group.get('params'), list)
                    and all(type(number) is int for number in group['params']) for group in state['param_groups']))


def _checked_group(group, ours, where):
    """Return a parameter group with the checkpoint's settings, if all others are equal to ours."""
    checked = dict(ours)
    for name, own in ours.items():
        value = group.get(name, own)
        if name in NUMBERS and _is_number_like(value, own) or name in VARIANTS and isinstance(value, bool | None):
            checked[name] = value
        elif name != 'params' and not (isinstance(value, bool | int | float | None) and value == own):
            raise UserError(f'{where} was computed with {name} {printable(value)}, not {own}')
    if checked.get('fused') and checked.get('foreach'):
        raise UserError(f'{where} is both fused and foreach, which exclude each other')
    return checked


def _is_number_like(value, own):
    """Return whether `value` is a non-negative number, or like the tuple `own` a tuple of numbers in [0, 1)."""
    if isinstance(own, tuple):
        return (isinstance(value, (tuple, list)) and len(value) == len(own)
                and all(_is_number_like(part, 0.0) and part < 1 for part in value))
    return type(value) in (int, float) and 0 <= value < LARGEST and math.isfinite(value)


def _checked_state(state, parameter, moments, where):
    """Return what an optimizer stores for a parameter: the number of steps, and moments of the parameter's shape."""
    if state.keys() != {'step', *moments}:
        raise UserError(f'{where} does not have what its optimizer stores: step, {", ".join(moments)}')
    step = state['step']
    if torch.is_tensor(step):
        step = step.item() if step.numel() == 1 else math.nan
    if type(step) not in (int, float) or not 0 <= step < LARGEST:
        raise UserError(f'{where} has a step that is not a number of steps')
    for name in moments:
        value = state[name]
        if not torch.is_tensor(value) or not value.is_floating_point() or value.shape != parameter.shape:
            raise UserError(f'{where} has a {name} that is not {_size(parameter)} numbers')
        if not torch.isfinite(value).all():
            raise UserError(f'{where} has a {name} with numbers that are not finite: the training had diverged; '
                            'use an earlier checkpoint')
        if name in SQUARES and (value < 0).any():
            raise UserError(f'{where} has a {name} with numbers below zero, although it is a mean of squares')
    return {**state, 'step': torch.tensor(float(step))}


def _is_generators(state):
    """Return whether `state` is None or has the form of `common.progress.rng_state`."""
    if state is None:
        return True
    if not isinstance(state, dict) or not isinstance(state.get('cuda'), list):
        return False
    return _is_state_of('cpu', state.get('cpu')) and all(_is_state_of('cuda', one) for one in state['cuda'])


def _is_state_of(device, state):
    if not torch.is_tensor(state) or state.dtype != torch.uint8 or state.dim() != 1:
        return False
    if device == 'cuda' and not torch.cuda.is_available():
        return True  # such a state will not be used
    try:
        torch.Generator(device).set_state(state.contiguous())
    except RuntimeError:
        return False
    return True


def _is_description(data):
    """Return whether a dict holds text or None, except for the captions `shown` and their `shown_embeddings` [N, D]."""
    shown, embeddings = data.get('shown', []), data.get('shown_embeddings', torch.empty(0, 1))
    if not isinstance(shown, list) or not torch.is_tensor(embeddings) or embeddings.dim() != 2:
        return False
    texts = [value for name, value in data.items() if name not in ('shown', 'shown_embeddings')]
    return (all(isinstance(text, str) for text in (*data, *shown))
            and all(isinstance(text, str | None) for text in texts)
            and len(shown) == len(embeddings) <= MAX_SHOWN
            and embeddings.is_floating_point() and bool(torch.isfinite(embeddings).all()))


def _is_plain(note):
    """Return whether a dict holds only text, numbers, None, tensors, and lists, tuples and dicts of them."""
    todo, seen = [(note, 0)], 0
    while todo:
        item, depth = todo.pop()
        seen += 1
        if isinstance(item, dict):
            if not all(isinstance(key, str) for key in item):
                return False
            todo += [(part, depth + 1) for part in item.values()]
        elif isinstance(item, (list, tuple)):
            todo += [(part, depth + 1) for part in item]
        elif item is not None and not isinstance(item, (str, bool, int, float, torch.Tensor)):
            return False
        if depth > MAX_DEPTH or seen + len(todo) > MAX_NOTES:
            return False
    return True
