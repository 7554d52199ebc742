"""Configuration files: `--cfg FILE.yml` stands for flags, and a flag typed on the command line wins over it."""
import difflib
import os

import yaml

from common import flags, run
from common.errors import UserError

NOT_IN_FILES = ('cfg', 'help', 'resume', 'text', 'interpolate')
PATHS = ('checkpoint', 'data_dir', 'encoder', 'image_folder', 'lsun', 'stage1', 'text_file')  # what is read


def add_cfg_flag(parser, modes):
    parser.add_argument('--cfg', metavar='FILE', modes=modes,
                        help='take flags from this YAML file; what is typed wins over it')


def parse_options(parser, mode_of, keys, translate, chapter_dir):
    """As `run.parse_options`, after `--cfg`, whose path may be relative to the current folder or to the chapter's.

    The file may also use `keys`, the names of the authors' code, nested ones joined with dots: 'TRAIN.BATCH_SIZE'.
    `translate(values, path)` turns what it says with them into a dict of our flags and a list of what means nothing
    here, which is printed. Raises UserError for a key that is neither, and where the file cannot be read.
    """
    path = parser.parse_args().cfg
    if not path:
        return run.parse_options(parser, mode_of)
    path = find(path, [chapter_dir])
    ours, theirs = _read(path, {action.dest for action in parser._actions} - set(NOT_IN_FILES), keys)
    translated, ignored = translate(theirs, path) if theirs else ({}, [])
    if ignored:
        print(f'{path}: means nothing here and is ignored: {", ".join(ignored)}')
    cfg_dir = os.path.dirname(os.path.abspath(path))
    folders = [cfg_dir, os.path.dirname(cfg_dir), chapter_dir]  # the authors' paths start above their cfg/
    arguments = flags.as_arguments({name: find(str(value), folders) if name in PATHS and value else value
                                    for name, value in {**translated, **ours}.items()})
    flags.check_arguments(parser, arguments, path)
    return run.parse_options(parser, mode_of, arguments)


def find(path, folders):
    """A relative path as it is if that exists, else below the first of `folders` where it does, else as it is."""
    places = [path, *(os.path.normpath(os.path.join(folder, path)) for folder in folders)]
    return next(filter(os.path.exists, places), path)


def _read(path, flags, keys):
    """({flag: value}, {the authors' key: value})."""
    try:
        with open(path, encoding='utf-8') as file:
            values = yaml.safe_load(file) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f'{path}: cannot be read as YAML ({" ".join(str(error).split())})') from error
    if not isinstance(values, dict):
        raise UserError(f'{path}: holds a {type(values).__name__}; write a flag a line, as in: batch_size: 24')
    ours = {key: value for key, value in values.items() if key in flags}
    theirs = _flatten({key: value for key, value in values.items() if key not in flags})
    for key in theirs:
        if key not in keys:
            near = difflib.get_close_matches(key, [*flags, *keys], 1)
            raise UserError(f'{path}: unknown key {key!r}; ' + (
                f'did you mean {near[0]!r}?' if near else 'its keys are the flags that --help lists'))
    return ours, theirs


def _flatten(values, prefix=''):
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f'{prefix}{key}.') if isinstance(value, dict) else {f'{prefix}{key}': value}
    return flat
