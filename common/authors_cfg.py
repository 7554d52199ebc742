"""The configuration files of the papers' authors, in terms of our flags: what those of several papers have alike."""
from common.errors import UserError


def translate(values, path, flags, only, ignored, defaults):
    """({flag: value}, what is ignored) for the authors' keys of the file `path`, nested ones joined with dots.

    `flags` maps their keys to flags; `only` those that can have but one value here to that; `ignored` are those that
    mean nothing here; `defaults` the values of their code where ours are others. Raises UserError for a value that
    cannot be had here.
    """
    for key, value in only.items():
        if str(values.get(key, value)) != str(value):
            raise UserError(f'{path}: {key} is {values[key]}, but can only be {value} here')
    rates = [values[key] for key in ('TRAIN.GENERATOR_LR', 'TRAIN.DISCRIMINATOR_LR') if key in values]
    if rates and _number(rates[0]) != _number(rates[-1]):
        raise UserError(f'{path}: GENERATOR_LR and DISCRIMINATOR_LR differ, but all networks learn at one rate here')
    if 'DATASET_NAME' in values:  # a whole file of theirs, not one of ours with a line of theirs in it
        values = {**defaults, **values}
    gpu, *more_gpus = (values.get('GPU_ID') or '').split(',')
    return ({**{flags[key]: value for key, value in values.items() if key in flags}, 'gpu': gpu.strip()},
            [key for key in ignored if key in values] + [f'GPU_ID {number.strip()}' for number in more_gpus])


def _number(text):
    """A number as such, which may be written in several ways; what is none, for the flag to refuse, as it is."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


def data_folder(values):
    """The folder that DATA_DIR names, or '' where that is where ours is by default."""
    folder = str(values.get('DATA_DIR') or '').rstrip('/')
    return '' if folder == f'../data/{values.get("DATASET_NAME", "")}' else folder
