"""Translate the configuration files of the papers' authors to our flags: the part that several papers share."""
from common.errors import UserError


def translate(values, path, flags, only, ignored, defaults):
    """Return ({flag: value}, ignored keys) for the authors' keys of the file `path`, nested ones joined by dots.

    `flags` maps their keys to flags; `only` maps keys that can have only one value here to that value; `ignored` lists
    keys without effect; `defaults` are the values in their code that differ from ours. Raises UserError for a value
    that is not possible here.
    """
    for key, value in only.items():
        if str(values.get(key, value)) != str(value):
            raise UserError(f'{path}: {key} is {values[key]}, but can only be {value} here; remove it')
    rates = [values[key] for key in ('TRAIN.GENERATOR_LR', 'TRAIN.DISCRIMINATOR_LR') if key in values]
    if rates and _number(rates[0]) != _number(rates[-1]):
        raise UserError(f'{path}: GENERATOR_LR and DISCRIMINATOR_LR differ, but all networks learn at one rate here; '
                        'make them equal')
    if 'DATASET_NAME' in values:  # a complete file of the authors, not one of ours with some of their keys
        values = {**defaults, **values}
    gpu, *more_gpus = (values.get('GPU_ID') or '').split(',')
    return ({**{flags[key]: value for key, value in values.items() if key in flags}, 'gpu': gpu.strip()},
            [key for key in ignored if key in values] + [f'GPU_ID {number.strip()}' for number in more_gpus])


def _number(text):
    """Convert text to a float, to compare all its spellings; return other text unchanged for the flag to refuse."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


def data_folder(values):
    """Return the folder in DATA_DIR, or '' if it is the default one."""
    folder = str(values.get('DATA_DIR') or '').rstrip('/')
    return '' if folder == f'../data/{values.get("DATASET_NAME", "")}' else folder
