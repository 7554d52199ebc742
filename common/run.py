"""Run folders: one per run, never cleared, never overwritten, and each says with what options it was made."""
import json
import os
import re
import sys
import time

from common import checkpoint, flags, ranks
from common.checkpoint import files_of
from common.errors import UserError
from common.files import atomic_write, convert_os_errors, remove_leftovers
from common.locks import lock_file

GIVEN_FLAGS = []  # names of the options that the command line named
PATH_FLAGS = []  # names of those that are paths of what is read
LOCKS = []  # open files: a lock lasts as long as its file is open
STAMP = r'_\d{8}_\d{6}(_\d+)?'  # what `new_run` puts after the name
ENCODER = 'encoder.pt'  # the sentence encoder's name in a run folder
OPTIONS = 'options.json'


def new_run(out_dir, name, options):
    """Make the folder `out_dir/NAME_DATE_TIME`, write `options` (a dict) into it, return its path."""
    stamp = time.strftime('%Y%m%d_%H%M%S')
    for attempt in range(1000):
        run_dir = os.path.join(out_dir, f'{name}_{stamp}' + (f'_{attempt}' if attempt else ''))
        try:
            os.makedirs(run_dir)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f'{run_dir}: cannot be made ({error}); '
                            'give a folder that can be written with --out_dir') from error
    write_options(run_dir, options)
    return run_dir


def write_options(run_dir, options):
    """Note the options with which a run is made, or goes on: those that a later `--resume` takes over.

    Of the paths in it, it is noted, too, where they are as seen from the run: they may move together.
    """
    seen_from_run = {name: os.path.relpath(options[name], run_dir) for name in PATH_FLAGS if options.get(name)}
    with atomic_write(os.path.join(run_dir, OPTIONS)) as file:
        file.write(json.dumps(options | {'seen_from_run': seen_from_run}, indent=1, sort_keys=True).encode())


def has_options(run_dir):
    """Whether the folder has the options that make it a run."""
    return os.path.isfile(os.path.join(run_dir, OPTIONS))


def find_run(out_dir, checkpoint, **wanted):
    """Return the newest folder in `out_dir` that holds the file `checkpoint`, of a run with the `wanted` options.

    Those that are None do not count. Raises UserError where there is none.
    """
    wanted = {name: value for name, value in wanted.items() if value}
    found = [os.path.join(out_dir, name, checkpoint) for name in _names_in(out_dir)]
    found = [path for path in found if files_of(path) and
             all(_option(os.path.dirname(path), name) == value for name, value in wanted.items())]
    if not found:
        which = ' and '.join(f'--{name} {value}' for name, value in wanted.items())
        raise UserError(f'{out_dir}: no run{which and f" of {which}"} with a {checkpoint} in it yet; train one first '
                        '(--train)')
    return os.path.dirname(max(found, key=lambda path: os.path.getmtime(files_of(path)[0])))


def _names_in(folder):
    """What is in a folder, nothing where it is none. Raises UserError where it cannot be listed."""
    try:
        return os.listdir(folder) if os.path.isdir(folder) else []
    except OSError as error:
        raise UserError(f'{folder}: its files cannot be listed ({error.strerror}); make it readable, or give another '
                        'folder') from error


def _option(run_dir, name):
    """Return what an option of a run was, None where that is not known. The folder of a run bears its data set's name.
    """
    try:
        found = read_options(run_dir).get(name)
    except UserError:
        found = None
    return found or (re.sub(f'{STAMP}$', '', os.path.basename(run_dir)) if name == 'dataset' else None)


def read_options(run_dir):
    """The options with which the run was started, a dict. Raises UserError where they cannot be read.

    A path that is no longer there is found again where it was as seen from the run.
    """
    path = os.path.join(run_dir, OPTIONS)
    try:
        with open(path, encoding='utf-8') as file:
            options = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        remove_leftovers(path)
        raise UserError(f'{path}: cannot be read ({error}), so the run cannot go on; start it again without --resume'
                        ) from error
    if not isinstance(options, dict):
        raise UserError(f'{path}: holds a {type(options).__name__} where a run notes its options; put back the file '
                        'that the run made, or start a new run')
    seen_from_run = options.pop('seen_from_run', {})
    for name, place in seen_from_run.items() if isinstance(seen_from_run, dict) else ():
        moved = os.path.join(run_dir, str(place))
        if name in PATH_FLAGS and not os.path.exists(str(options.get(name))) and os.path.exists(moved):
            options[name] = os.path.abspath(moved)
    return options


def lock(run_dir):
    """Keep a run to this process until it ends. Raises UserError where another one is training in it."""
    path = os.path.join(run_dir, 'lock')
    with convert_os_errors(path):
        locked = lock_file(path)
    if locked is None:
        raise UserError(f'{run_dir}: another process is training in it')
    LOCKS.append(locked)


def begin(model, networks, resumed, out_dir, name, options, data, prepare=None):
    """Return the folder to train in: a new one, `out_dir/NAME_DATE`, or `resumed`, with the model as it was left there.

    `options`, a dict, are noted in it; `data` says what is trained on, as of `describe`; `prepare()`, which may take
    minutes, is called after all that can be refused. The folder is locked for this process, if it is rank 0; other
    ranks write nothing and get ''. All ranks have the same weights in `networks` afterwards. Raises UserError where a
    run would start again, or go on with other data than it was trained on.
    """
    if resumed:
        if ranks.rank() == 0:
            lock(resumed)
        model.load_from(resumed)
        check_resumable(resumed, model)
        check_same_data(resumed, model.data, data)
    if prepare:
        prepare()
    run_dir = ''
    if ranks.rank() == 0:
        run_dir = resumed or new_run(out_dir, name, options)
    if run_dir and resumed:
        write_options(resumed, options)
    elif run_dir:
        lock(run_dir)
    model.options, model.data = options, data
    ranks.synchronize(networks)
    return run_dir


def check_batches(batch_size, items):
    """Raise UserError where none of the batches is of two `items` or more, which batch norms need."""
    if batch_size < 2:
        raise UserError(f'--batch_size {batch_size}: a batch of one has no batch statistics; give 2 or more')
    if items < 2:
        raise UserError(f'the data has {items} to train on in each process, and a batch needs 2; add pictures to it')


def check_resumable(run_dir, model):
    """Raise UserError where what has been loaded says nothing of a training: it would silently start again."""
    if not model.progress['step'] and model.progress['rng'] is None:  # stopped before its first step, it has the latter
        raise UserError(f'{run_dir}: its checkpoint holds weights alone, no training to go on with; start a new run '
                        'from them, with --checkpoint in place of --resume')


def check_same_data(run_dir, before, now):
    """Raise UserError where the descriptions of what a run was trained on, and is to go on with, differ.

    What one of them does not say is not compared: a run of an earlier version says nothing, and goes on.
    """
    changed = [part for part in ('captions', 'pictures', 'embeddings')
               if before.get(part) and now.get(part) and before[part] != now[part]]
    if changed:
        raise UserError(f'{run_dir}: was trained on other {" and ".join(changed)} than {now.get("file", "the data")} '
                        'holds now; put back what it was trained on, or start a new run')
    if not before:
        print(f'{run_dir}: does not say what it was trained on, so nobody can tell whether the data is still the same')


def checkpoint_file(model, out_dir, typed, resumed, find=checkpoint.find, **wanted):
    """Return the file to generate with: the checkpoint `typed`, or that of the run `resumed`, or of the newest run.

    `model` is the name of the checkpoint; `find(path, model)` finds it in a folder; `wanted` are as in `find_run`.
    Raises UserError where there is none, or two are named.
    """
    if typed and resumed:
        raise UserError(f'--resume {resumed} and --checkpoint {typed}: give one of them')
    if typed:
        return existing(typed, model, find)
    return checkpoint.newest(os.path.join(resumed or find_run(out_dir, f'{model}.pt', **wanted), f'{model}.pt'))


def existing(path, model, find=checkpoint.find):
    """Return the checkpoint file that the value `path` of a flag names. Raises UserError where there is none."""
    file = find(path, model)
    if not os.path.exists(file):
        raise UserError(f'{file}: no such checkpoint here; give a run folder, its {model}.pt or a snapshot in its '
                        'Model/')
    return file


def if_given(name, value):
    """Return the value of an option where the command line named it, else None."""
    return value if name in GIVEN_FLAGS else None


def parse_options(parser, mode_of, from_file=None):
    """Parse the command line; with `--resume`, options that it does not name keep the values of that run.

    `mode_of(options)` says what is asked for, and flags that have no effect in that mode are refused. `from_file`, a
    dict {flag: value}, is what the command line wins over. Returns (options, the folder of the run to go on with or
    None).
    """
    typed = sys.argv[1:]
    GIVEN_FLAGS[:] = [action.dest for action in parser.given(typed)]
    PATH_FLAGS[:] = set(parser.paths()) - {'out_dir'}
    from_file = {name: value for name, value in (from_file or {}).items() if value not in (None, '')}

    def parse(values):
        untyped = {name: value for name, value in values.items() if name not in GIVEN_FLAGS}  # lists would be added up
        return parser.parse_args([*flags.as_arguments(untyped), *typed])

    options, run_dir = parse(from_file), None
    parser.refuse_unused(typed, mode_of(options))
    if options.resume:
        run_dir, name = _run_to_resume(parser, options)
        parser.set_defaults(out_dir=os.path.dirname(run_dir))
        options = parse(_kept_options(parser, run_dir, options.train) | from_file)
        options.model = name or options.model
        _check_has_checkpoint(run_dir, options.model)
    return options, run_dir


def refuse_given(names, why):
    """Raise UserError where the command line named one of these options, of which `why` says that it has no effect."""
    for name in names:
        if name in GIVEN_FLAGS:
            raise UserError(f'--{name}: is not used {why}; leave it out')


def _check_has_checkpoint(run_dir, model):
    """Raise UserError where a run has no checkpoint, and remove half of one, which nothing else ever would."""
    path = os.path.join(run_dir, f'{model}.pt')
    if not checkpoint.files_of(path):
        remove_leftovers(path)
        if os.path.isdir(path):
            raise UserError(f'{path}: is a folder where the run had its checkpoint; put that back in its place')
        others = sorted(name for name in _names_in(run_dir) if name.endswith('.pt') and name != ENCODER)
        if others:
            raise UserError(f'{run_dir}: has no {model}.pt, but {others[0]}; to go on from that, give it: --resume '
                            f'{os.path.join(run_dir, others[0])}')
        raise UserError(f'{run_dir}: has no {model}.pt: it ended before its first checkpoint, so it cannot go on; '
                        'start it again without --resume')


def _run_to_resume(parser, options):
    """The run's folder that `--resume` names, and the name of its model where that is named, too, by a checkpoint."""
    named = options.resume
    if named == 'newest' and not os.path.exists(named):
        wanted = {action.dest: getattr(options, action.dest) for action in parser._actions if action.selects_run
                  and (action.dest in GIVEN_FLAGS or getattr(options, action.dest) != action.default)}
        return find_run(options.out_dir, f'{options.model}.pt', **wanted), None
    if os.path.isfile(named):
        folder, name = os.path.split(os.path.abspath(named))
        if not name.endswith('.pt'):
            raise UserError(f'--resume {named}: is no checkpoint NAME.pt; give the folder of a run')
        return folder, os.path.splitext(name)[0]
    if not has_options(named):
        raise UserError(f'--resume {named}: is no folder of a run, which would have an {OPTIONS}')
    return os.path.abspath(named), None


def _kept_options(parser, run_dir, trains):
    """The options that a run noted, {flag: value}. Raises UserError where the parser refuses one.

    When the run is not to go on but to generate, what it once started from is left out.
    """
    kept = read_options(run_dir)
    if kept.get('train') is False and not any('.pt' in name for name in _names_in(run_dir)):
        raise UserError(f'{run_dir}: holds what a trained model was asked for, no training; give the folder of a run '
                        'that --train made')
    names = {action.dest for action in parser._actions} - {'help', 'resume', 'train', 'out_dir'}
    names -= set() if trains else {'checkpoint'}
    if kept.get('data_dir') and not os.path.isdir(str(kept['data_dir'])):
        print(f'{run_dir}: its data was in {kept["data_dir"]}, which is not here; looking for it in the default folder '
              '(or say where it is with --data_dir)')
        del kept['data_dir']
    kept = {name: kept[name] for name in names & kept.keys()}
    flags.check_values(parser, kept, os.path.join(run_dir, OPTIONS))
    return kept
