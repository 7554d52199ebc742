"""Manage run folders: one for each run, never cleared, never overwritten, each with the options it was made with."""
import argparse
import contextlib
import errno
import json
import os
import re
import shutil
import sys
import time

from common import checkpoint, flags, ranks
from common.checkpoint import files_of
from common.errors import UserError
from common.files import atomic_write, check_is_file, convert_os_errors, partial_file, remove_leftovers
from common.locks import lock_file
from common.log import LOG

GIVEN_FLAGS = []  # names of the flags that the command line contains
PATH_FLAGS = []  # names of the flags that take the path of an input
DEFAULTS = {}  # {name of a flag: its default value}
LOCKS = []  # open files: a lock lasts as long as its file is open
STAMP = r'_\d{8}_\d{6}(_\d+)?'  # what `new_run` appends to the name
CHECKPOINT = re.compile(r'\.pt(\.\d+)?$')  # in the name of a file
ENCODER = 'encoder.pt'  # file name of the sentence encoder in a run folder
OPTIONS = 'options.json'
MAX_OPTIONS = 1 << 20  # bytes of an options file that are read


class NoRun(UserError):
    """There is no run that could be used."""


def new_run(out_dir, name, options):
    """Make the folder `out_dir/NAME_DATE_TIME`, write `options` (a dict) into it, and return its path."""
    stamp = time.strftime('%Y%m%d_%H%M%S')
    for attempt in range(1000):
        run_dir = os.path.join(out_dir, f'{name}_{stamp}' + (f'_{attempt}' if attempt else ''))
        try:
            os.makedirs(run_dir)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise _cannot_make(run_dir, error) from error
    write_options(run_dir, options)
    return run_dir


def check_can_make(run_dir):
    """Raise UserError, as `new_run` does, if a folder cannot be made because of those above it."""
    above = os.path.dirname(run_dir)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    number = 0 if os.access(above, os.W_OK) else errno.EACCES
    if number := number if os.path.isdir(above) else errno.ENOTDIR:
        raise _cannot_make(run_dir, OSError(number, os.strerror(number), run_dir))


def _cannot_make(run_dir, error):
    return UserError(f'{run_dir}: cannot be made ({error}); give a writable folder with --out_dir')


def keep_links_apart(run_dir):
    """Replace links to the options and the log of another run, as in a copy made of links of any kind, by copies.

    So a resumed run does not write into the files of the other one. All other files are replaced as a whole.
    """
    for path in (os.path.join(run_dir, name) for name in (OPTIONS, LOG)):
        if os.path.isfile(path) and (os.path.islink(path) or os.stat(path).st_nlink > 1):
            with open(path, 'rb') as linked, partial_file(path, follow_links=False) as partial:
                with convert_os_errors(path), open(partial, 'wb') as copy:
                    shutil.copyfileobj(linked, copy)


def write_options(run_dir, options):
    """Write the options of a new or resumed run, from which a later `--resume` takes them.

    Paths are also stored relative to the run folder, so that the run and its inputs may be moved together.
    """
    seen_from_run = {name: os.path.relpath(options[name], run_dir) for name in PATH_FLAGS if options.get(name)}
    with atomic_write(os.path.join(run_dir, OPTIONS)) as file:
        file.write(json.dumps(options | {'seen_from_run': seen_from_run}, indent=1, sort_keys=True).encode())


def has_options(run_dir):
    """Return whether the folder has an options file, which makes it a run folder."""
    return os.path.isfile(os.path.join(run_dir, OPTIONS))


def find_run(out_dir, checkpoint, data_dir=None, **wanted):
    """Return the newest run folder in `out_dir` that has the file `checkpoint` and the `wanted` options.

    Options that are None are not compared. Of several runs, one on the data in `data_dir` is preferred; if there is
    none, that is printed. A newer run that has no checkpoint yet is named. Raises UserError if there is no such run.
    """
    wanted = {name: value for name, value in wanted.items() if value}
    folders = [os.path.join(out_dir, name) for name in _names_in(out_dir)]
    found = {folder: os.path.getmtime(files[0]) for folder in folders
             if (files := files_of(os.path.join(folder, checkpoint))) and _has(folder, wanted)}
    if not found:
        which = ' and '.join(f'--{name} {value}' for name, value in wanted.items())
        raise NoRun(f'{out_dir}: no run{which and f" of {which}"} with a {checkpoint} in it yet; train one first '
                        '(--train)')
    if data_dir:
        same = {folder: date for folder, date in found.items() if _data_dir(folder) == os.path.realpath(data_dir)}
        if not same:
            print(f'{out_dir}: no run on data in {data_dir}; taking {max(found, key=found.get)}')
        found = same or found
    newest = max(found, key=found.get)
    wanted |= {'train': True, 'model': checkpoint.removesuffix('.pt')}
    for folder in folders:
        if folder not in found and has_options(folder) and not _checkpoints_in(folder) and _has(folder, wanted) and (
                os.path.getmtime(os.path.join(folder, OPTIONS)) > found[newest]):
            print(f'{folder}: has no {checkpoint} (its training ended before the first one, or has not reached it yet);'
                  f' taking the older run {newest}')
    return newest


def _names_in(folder):
    """Return the names of a folder's files, or [] if it is no folder. Raises UserError if it cannot be listed."""
    try:
        return os.listdir(folder) if os.path.isdir(folder) else []
    except OSError as error:
        raise UserError(f'{folder}: its files cannot be listed ({error.strerror}); make it readable, or give another '
                        'folder') from error


def _data_dir(run_dir):
    """Return the folder of the data that a run was trained on."""
    default = os.path.join(flags.ROOT, 'data', str(_option(run_dir, 'dataset')))
    return os.path.realpath(str(_option(run_dir, 'data_dir') or default))


def _has(run_dir, wanted):
    """Return whether a run has these options, {name: value}."""
    return all(_option(run_dir, name) == value for name, value in wanted.items())


def _option(run_dir, name):
    """Return the value of a run's option, or None if it is unknown."""
    try:
        found = read_options(run_dir).get(name)
    except UserError:
        found = None
    return found or (re.sub(f'{STAMP}$', '', os.path.basename(run_dir)) if name == 'dataset' else None)


def read_options(run_dir):
    """Return the options that a run was started with, as a dict. Raises UserError if they cannot be read.

    A path that no longer exists is looked up relative to the run folder.
    """
    path = os.path.join(run_dir, OPTIONS)
    try:
        check_is_file(path)
        with open(path, encoding='utf-8') as file:
            text = file.read(MAX_OPTIONS + 1)
        if len(text) > MAX_OPTIONS:
            raise ValueError(f'it has more than {MAX_OPTIONS:,} characters')
        options = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        remove_leftovers(path)
        raise UserError(f'{path}: cannot be read ({error}); restore the file that the run wrote, or start a new run '
                        'from its checkpoint, with --checkpoint') from error
    if not isinstance(options, dict):
        raise UserError(f'{path}: holds a {type(options).__name__}, not the options of a run; restore the file '
                        'that the run wrote, or start a new run')
    seen_from_run = options.pop('seen_from_run', {})
    for name, place in seen_from_run.items() if isinstance(seen_from_run, dict) else ():
        moved = os.path.join(run_dir, str(place))
        if name in (*PATH_FLAGS, 'data_dir') and not os.path.exists(str(options.get(name))) and os.path.exists(moved):
            options[name] = os.path.abspath(moved)
    return options


def lock(run_dir):
    """Lock a run folder until this process ends. Raises UserError if another process is training in it."""
    path = os.path.join(run_dir, 'lock')
    with convert_os_errors(path):
        locked = lock_file(path)
    if locked is None:
        raise UserError(f'{run_dir}: another process is training in it')
    LOCKS.append(locked)


def begin(model, networks, resumed, out_dir, name, options, data, prepare=None, dry_run=False):
    """Return the folder to train in: a new one, `out_dir/NAME_DATE_TIME`, or `resumed`, from which the model is loaded.

    `options` (a dict) is written to it; `data` describes the training data as `describe` does. `prepare()`, which may
    take minutes, is called after all checks. Rank 0 locks the folder; the other ranks write nothing and get ''.
    Afterwards all ranks have the same weights in `networks`. A `dry_run` does the same without writing, and gets the
    folder that the run would have, with DATE in the name of a new one. Raises UserError if a resumed run would start
    from the beginning, or continue with other data than before.
    """
    if resumed:
        if ranks.rank() == 0 and (not dry_run or os.path.exists(os.path.join(resumed, 'lock'))):
            lock(resumed)
        try:
            model.load_from(resumed)
        except UserError:
            check_same_data_as_checkpoint(resumed, model.name, data)
            raise
        check_resumable(resumed, model)
        check_same_data(resumed, model.data, data)
    elif dry_run:
        check_can_make(os.path.join(out_dir, name))
    if prepare:
        prepare()
    run_dir = ''
    if dry_run:
        run_dir = resumed or os.path.join(out_dir, f'{name}_DATE')
    elif ranks.rank() == 0 and resumed:
        run_dir = resumed
        keep_links_apart(resumed)
        if model.progress['epoch'] < options['epochs']:  # else nothing is trained with them
            write_options(resumed, options)
    elif ranks.rank() == 0:
        run_dir = new_run(out_dir, name, options)
        lock(run_dir)
    model.options, model.data = options, data
    ranks.synchronize(networks)
    return run_dir


def check_batches(batch_size, items):
    """Raise UserError unless there can be a batch of two `items`, which batch norm needs."""
    if batch_size < 2:
        raise UserError(f'--batch_size {batch_size}: a batch of one has no batch statistics; give 2 or more')
    if items < 2:
        raise UserError(f'too little data: a batch needs 2 items, and each process has only {items}; add images to it')


def check_resumable(run_dir, model):
    """Raise UserError if the loaded checkpoint has no training progress: the training would silently start again."""
    if not model.progress['step'] and model.progress['rng'] is None:  # a run stopped before its first step has `rng`
        raise UserError(f'{run_dir}: its checkpoint holds weights alone, no training progress; start a new run '
                        'from them, with --checkpoint in place of --resume')


def check_same_data(run_dir, before, now):
    """Raise UserError if `before` and `now`, descriptions of a run's data, differ.

    Parts that either lacks are not compared: runs of early versions have no description.
    """
    changed = changed_parts(before, now, ('captions', 'pictures', 'embeddings'))
    if changed:
        raise UserError(f'{run_dir}: was trained on different {" and ".join(changed)} from those that '
                        f'{now.get("file", "the data")} holds now; restore that data, or start a new run')
    if not before:
        print(f'{run_dir}: has no record of its training data, so whether the data is still the same is not checked')


def changed_parts(before, now, parts):
    """Return those of the `parts` that differ in two descriptions of data and that neither lacks."""
    return [part for part in parts if before.get(part) and now.get(part) and before[part] != now[part]]


def check_same_data_as_checkpoint(run_dir, name, now):
    """Raise UserError if a run whose checkpoint NAME.pt does not fit was trained on other data than `now`.

    The widths of networks depend on it.
    """
    file, before = checkpoint.newest(os.path.join(run_dir, f'{name}.pt')), {}
    with contextlib.suppress(UserError):  # a damaged checkpoint, which has its own message
        before = checkpoint.description(file)
    if before:
        check_same_data(run_dir, before, now)


def checkpoint_file(model, out_dir, given, resumed, find=checkpoint.find, pretrained=None, **wanted):
    """Return the checkpoint file to generate with: the given one, that of the run `resumed`, or that of the newest run.

    `model` is the checkpoint's name, `find(path, model)` finds it in a folder, and `wanted` is as in `find_run`. If
    nothing that says which run is wanted was typed, and there is none yet, it is the one in the folder `pretrained`.
    Raises UserError if there is none, or if both `given` and `resumed` are set.
    """
    if given and resumed:
        raise UserError(f'--resume {resumed} and --checkpoint {given}: give one of them')
    if given:
        return existing(given, model, find)
    has_pretrained = pretrained and os.path.isdir(pretrained)
    is_any_run = not any(wanted.values()) and not {'out_dir', 'model', 'data_dir'} & set(GIVEN_FLAGS)
    try:
        folder = resumed or find_run(out_dir, f'{model}.pt', **wanted)
        if has_pretrained and is_any_run and not resumed:
            print(f'generating with your newest run, {folder}; for the pretrained weights, add --checkpoint '
                  f'{os.path.relpath(pretrained)}')
    except NoRun as error:
        if not has_pretrained:
            raise
        if not is_any_run:
            raise NoRun(f'{error}, or add --checkpoint {pretrained}, the pretrained weights') from error
        print(f'{no_run_yet(out_dir, model)}: generating with the pretrained weights in {pretrained}')
        folder = pretrained
    return checkpoint.newest(os.path.join(folder, f'{model}.pt'))


def no_run_yet(out_dir, model):
    """Return why there is no run to generate with: a line that names a run with another `--model`, if there is one."""
    for name in sorted(_names_in(out_dir), reverse=True):
        if files := _checkpoints_in(os.path.join(out_dir, name)):
            other = os.path.join(out_dir, name, files[0])
            return f'no run with a {model}.pt yet (to generate with {name}, add --checkpoint {other})'
    return 'no run of your own yet'


def _checkpoints_in(run_dir):
    """Return the names of a run's checkpoints, [] if the folder is no run."""
    names = _names_in(run_dir) if has_options(run_dir) else []
    return sorted(name for name in names if name.endswith('.pt') and name != ENCODER)


def existing(path, model, find=checkpoint.find):
    """Return the checkpoint file that `path`, the value of a flag, refers to. Raises UserError if it does not exist."""
    file = find(path, model)
    if not os.path.exists(file):
        if has_options(path) and not any(CHECKPOINT.search(name) for name in _names_in(path) if name != ENCODER):
            raise UserError(f'{path}: is a run without a checkpoint: it has no {model}.pt, as its training ended '
                            'before the first one or has not reached it yet, or it holds the output of a trained '
                            'model; give another run')
        if has_options(path):
            others = _checkpoints_in(path)
            advice = f'; give {os.path.join(path, others[0])} if it is that one' if others else ''
            raise UserError(f'{path}: is a run, but not of this section or --model: it has no {model}.pt{advice}')
        raise UserError(f'{file}: no such checkpoint here; give a run folder, its {model}.pt or a snapshot in its '
                        'Model/')
    return file


def if_given(name, value):
    """Return an option's value if the command line contains its flag, else None."""
    return value if name in GIVEN_FLAGS else None


def parse_options(parser, mode_of, defaults=None):
    """Parse the command line. With `--resume`, options that it does not set keep the values of that run.

    `mode_of(options)` returns the mode; flags that have no effect in it are refused. `defaults` is a dict {flag:
    value}, from a file or a recipe, which the command line overrides. Returns (options, the folder of the run to resume
    or None).
    """
    arguments = sys.argv[1:]
    GIVEN_FLAGS[:] = [action.dest for action in parser.given(arguments)]
    PATH_FLAGS[:] = set(parser.paths()) - {'out_dir'}
    DEFAULTS.clear()
    DEFAULTS.update({action.dest: action.default for action in parser._actions if action.dest != 'help'})
    defaults = {name: value for name, value in (defaults or {}).items() if value not in (None, '')}

    def parse(values):
        others = {name: value for name, value in values.items() if name not in GIVEN_FLAGS}  # lists would be joined
        return parser.parse_args([*flags.as_arguments(others), *arguments])

    options, run_dir = parse(defaults), None
    parser.refuse_unused(arguments, mode_of(options))
    if options.resume:
        run_dir, name = _run_to_resume(parser, options)
        if options.train and options.resume is not flags.NEWEST:
            refuse_given(['out_dir'], 'with --resume RUN, which continues in its own folder')
        parser.set_defaults(out_dir=os.path.dirname(run_dir))
        kept = _kept_options(parser, run_dir, options.train)
        options = parse(kept | _with_effect(parser, mode_of(options), kept, defaults))
        if name and name != options.model:
            print(f'{run_dir}: continues from {name}.pt, as {name}.pt; {options.model}.pt stays as it is')
        options.model = name or options.model
        _check_has_checkpoint(run_dir, options.model)
    flags.UNUSED[:] = parser.unused(mode_of(options))
    return options, run_dir


def complete(options, **defaults):
    """Set those of the options that are None to these values, which are the defaults, but depend on other options."""
    DEFAULTS.update(defaults)
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def _with_effect(parser, mode, kept, defaults):
    """Return the values of a configuration file that a resumed run can take; print the names of the others."""
    if mode != flags.RESUME:
        return defaults
    unused = {action.dest for action in parser._actions if action.dest in defaults and mode not in action.modes}
    ignored = sorted(name for name in unused if str(defaults[name]) != str(kept.get(name)))
    if ignored:
        print(f'--cfg: {", ".join(ignored)}: no effect with --resume; the run keeps its own values')
    return {name: value for name, value in defaults.items() if name not in unused}


def dataset_of(options, file):
    """Return the HDF5 file that the options stored in the file or folder `file` name. Raises UserError without one."""
    dataset, data_dir = options.get('dataset'), options.get('data_dir')
    if not isinstance(dataset, str) or not isinstance(data_dir, (str, type(None))):
        raise UserError(f'{file}: its options do not say which data it was trained on; give a run folder that --train '
                        'made')
    return flags.dataset_file(argparse.Namespace(dataset=dataset, data_dir=data_dir))


def refuse_given(names, why):
    """Raise UserError if the command line sets one of these options, which have no effect; `why` says when."""
    for name in names:
        if name in GIVEN_FLAGS:
            raise UserError(f'--{name}: is not used {why}; leave it out')


def _check_has_checkpoint(run_dir, model):
    """Raise UserError if a run has no checkpoint, after removing what an interrupted first write left."""
    path = os.path.join(run_dir, f'{model}.pt')
    if not checkpoint.files_of(path):
        for written in (path, os.path.join(run_dir, ENCODER)):
            remove_leftovers(written)
        if os.path.isdir(path):
            raise UserError(f'{path}: is a folder, not the checkpoint of the run; restore the checkpoint')
        others = sorted(name for name in _names_in(run_dir) if name.endswith('.pt') and name != ENCODER)
        if others:
            raise UserError(f'{run_dir}: has no {model}.pt, but {others[0]}; to resume from that, use --resume '
                            f'{os.path.join(run_dir, others[0])}')
        raise UserError(f'{run_dir}: has no {model}.pt: the run ended before its first checkpoint, so it cannot be '
                        'resumed; start it again without --resume')


def _run_to_resume(parser, options):
    """Return (the run folder that `--resume` refers to, the model's name if that is FOLDER/NAME.pt, else None)."""
    named = options.resume
    if named is flags.NEWEST:
        wanted = {action.dest: getattr(options, action.dest) for action in parser._actions if action.selects_run
                  and (action.dest in GIVEN_FLAGS or getattr(options, action.dest) != action.default)}
        return find_run(options.out_dir, f'{options.model}.pt', **wanted), None
    if os.path.isfile(named):
        folder, name = os.path.split(os.path.abspath(named))
        if not name.endswith('.pt'):
            raise UserError(f'--resume {named}: is not a checkpoint NAME.pt; give a run folder')
        return folder, os.path.splitext(name)[0]
    if not has_options(named):
        is_new = os.path.isdir(named) and re.search(f'{STAMP}$', named)
        if is_new and all('.partial-' in name for name in _names_in(named)):
            remove_leftovers(os.path.join(named, OPTIONS))
            raise UserError(f'{named}: the run ended before its first file was written; start it again without '
                            '--resume')
        raise UserError(f'--resume {named}: is not a run folder: it has no {OPTIONS}; give a run folder')
    return os.path.abspath(named), None


def _kept_options(parser, run_dir, trains):
    """Return the options that a run stored, as {flag: value}. Raises UserError if the parser refuses one.

    When the run is used to generate images rather than resumed, the checkpoint it started from is omitted.
    """
    kept = read_options(run_dir)
    if kept.get('train') is False and not any('.pt' in name for name in _names_in(run_dir)):
        raise UserError(f'{run_dir}: holds the output of a trained model, no training; give the folder of a run '
                        'that --train made')
    names = {action.dest for action in parser._actions} - {'help', 'resume', 'train', 'out_dir'}
    names -= set() if trains else {'checkpoint'}
    if kept.get('data_dir') and not os.path.isdir(str(kept['data_dir'])):
        print(f'{run_dir}: its data was in {kept["data_dir"]}, which does not exist; using the default folder '
              '(--data_dir sets another)')
        del kept['data_dir']
    kept = {name: kept[name] for name in names & kept.keys()}
    flags.check_values(parser, kept, os.path.join(run_dir, OPTIONS))
    return kept
