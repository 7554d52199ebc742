"""Read configuration files: `--cfg FILE.yml` sets flags, which the command line overrides."""
import difflib
import os

import yaml

from common import flags, run
from common.errors import UserError
from common.files import check_is_file

MAX_LENGTH, MAX_DEPTH = 50_000, 4  # characters of a file; levels of nesting (the authors' TRAIN.COEFF.KL has three)
BOUNDARIES = (yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentStartEvent, yaml.DocumentEndEvent)


def add_cfg_flag(parser, modes):
    parser.add_argument('--cfg', type=flags.path, metavar='FILE', modes=modes,
                        help='YAML file with values of flags, which the command line overrides')


def parse_options(parser, mode_of, keys, translate, section_dir):
    """Parse the command line as `run.parse_options` does, with flags from the file `--cfg`.

    The path of the file may be relative to the current folder or to the section's. The file may also use `keys`, the
    names of the authors' code, with nested ones joined by dots: 'TRAIN.BATCH_SIZE'. `translate(values, path)` converts
    these to a dict of our flags and a list of keys without effect, which is printed. Raises UserError for an unknown
    key, and if the file cannot be read.
    """
    path = parser.parse_args().cfg
    if not path:
        return run.parse_options(parser, mode_of)
    path = find(path, [section_dir])
    ours, theirs = _read(path, parser.names_in_files(), keys)
    translated, ignored = translate(theirs, path) if theirs else ({}, [])
    for name in ours:
        if translated.get(name) and isinstance(translated[name], (str, list)):  # the authors' defaults are numbers
            raise UserError(f'{path}: {name} is also set by one of the authors\' keys; keep one of the two')
    if ignored:
        print(f'{path}: these keys have no effect here and are ignored: {", ".join(ignored)}')
    cfg_dir = os.path.dirname(os.path.abspath(path))
    folders = [cfg_dir, os.path.dirname(cfg_dir), section_dir]  # the authors' paths start above their cfg/
    read = set(parser.paths()) - {'out_dir'}
    values = {name: find(value, folders) if name in read and isinstance(value, str) and value else value
              for name, value in {**translated, **ours}.items()}
    flags.check_values(parser, values, path)
    return run.parse_options(parser, mode_of, values)


def find(path, folders):
    """Return a relative path as it is if that exists, else below the first of `folders` where it exists."""
    path = os.path.expanduser(path)
    places = [path, *(os.path.normpath(os.path.join(folder, path)) for folder in folders)]
    return next(filter(os.path.exists, places), path)


def _read(path, names, keys):
    """Return ({flag: value}, {the authors' key: value}) from a file; `names` are the names of our flags."""
    values = _load(path)
    ours = {key: value for key, value in values.items() if key in names}
    theirs = _flatten({key: value for key, value in values.items() if key not in names}, path)
    for key in theirs:
        if key not in keys:
            near = difflib.get_close_matches(key[:100], [*names, *keys], 1)
            raise UserError(f'{path}: unknown key {key[:100]!r}; ' + (
                f'did you mean {near[0]!r}?' if near else 'its keys are the flags that --help lists') +
                ' (a file of another section has others)')
    for key, value in (ours | theirs).items():
        if isinstance(value, dict) or isinstance(value, list) and key in theirs:
            raise UserError(f'{path}: {key} takes one value, not several')
    return ours, theirs


def _load(path):
    """Return the mapping in a YAML file: a dict with text keys, whose values are text, None, lists of those, and dicts.

    It is built from PyYAML's events, so that nothing is constructed that a configuration does not need: no tags, no
    anchors and aliases, no deep nesting. Raises UserError for those.
    """
    try:
        check_is_file(path)
        with open(path, 'rb') as file:
            text = file.read(MAX_LENGTH + 1)
        if len(text) > MAX_LENGTH:
            raise UserError(f'{path}: is too long for a configuration; write lines such as: batch_size: 24')
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        values = [_value(event, events, 0) for event in events if not isinstance(event, BOUNDARIES)]
    except _Refused as error:
        raise UserError(f'{path}: line {error.args[1].line + 1}: {error.args[0]}') from error
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror or error}); --cfg takes a YAML file, such as those '
                        "in the section's folder cfg") from error
    except (ValueError, OverflowError, yaml.YAMLError) as error:
        raise UserError(f'{path}: cannot be read as YAML ({" ".join(str(error).split())[:300]})') from error
    if len(values) > 1:
        raise UserError(f'{path}: holds {len(values)} documents; keep one, without --- between its lines')
    if values and values[0] is None:
        return {}
    if values and not isinstance(values[0], dict):
        raise UserError(f'{path}: holds a {type(values[0]).__name__}; write lines such as: batch_size: 24')
    return values[0] if values else {}


class _Refused(Exception):
    """Something that a configuration does not need, with its position in the file."""


def _value(event, events, depth):
    """Return the value that begins with `event`; its further events are taken from the iterator `events`."""
    if isinstance(event, yaml.AliasEvent) or event.anchor:
        raise _Refused('anchors (&) and aliases (*) are not supported; write the value itself', event.start_mark)
    if event.tag and event.tag != '!':
        raise _Refused(f'tags ({event.tag[:40]!r}) are not supported; remove the word with !', event.start_mark)
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event)
    if depth >= MAX_DEPTH:
        raise _Refused('is nested too deeply for a configuration', event.start_mark)
    return (_list if isinstance(event, yaml.SequenceStartEvent) else _mapping)(events, depth + 1)


def _list(events, depth):
    items = []
    for event in events:
        if isinstance(event, yaml.SequenceEndEvent):
            return items
        if isinstance(event, yaml.CollectionStartEvent):
            raise _Refused('a list must hold single values', event.start_mark)
        items.append(_value(event, events, depth))


def _mapping(events, depth):
    values = {}
    for event in events:
        if isinstance(event, yaml.MappingEndEvent):
            return values
        if not isinstance(event, yaml.ScalarEvent):
            raise _Refused('a key must be a single word', event.start_mark)
        if event.value in values:
            raise _Refused(f'{event.value[:100]!r} occurs twice; keep one', event.start_mark)
        _value(event, events, depth)  # checks the key like a value
        values[event.value] = _value(next(events), events, depth)


def _scalar(event):
    """Return the text as it is written, which the flags parse, or None if it means null in YAML 1.1."""
    text = event.value
    if not flags.is_valid_text(text):
        raise _Refused('a value has a line break or another control character', event.start_mark)
    is_null = yaml.SafeLoader('').resolve(yaml.ScalarNode, text, event.implicit).endswith(':null')
    return None if is_null else text


def _flatten(values, path, prefix=''):
    """Return nested values as a flat dict, with keys joined by dots. Raises UserError if a key then occurs twice."""
    flat = {}
    for key, value in values.items():
        inner = _flatten(value, path, f'{prefix}{key}.') if isinstance(value, dict) else {f'{prefix}{key}': value}
        if twice := flat.keys() & inner.keys():
            raise UserError(f'{path}: {min(twice)[:100]!r} occurs twice; keep one')
        flat |= inner
    return flat
