"""Run folders: one per run, never cleared, never overwritten, and each says with what options it was made."""
import json
import os
import re
import time

from common import checkpoint, ranks
from common.errors import UserError
from common.locks import lock_file

LOCKS = []  # open files: a lock lasts as long as its file is open
STAMP = r'_\d{8}_\d{6}(_\d+)?'  # what `new_run` puts after the name
ENCODER = 'encoder.pt'  # the sentence encoder's name in a run folder


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
    """Note the options with which a run is made, or goes on: those that a later `--resume` takes over."""
    with open(os.path.join(run_dir, 'options.json'), 'w', encoding='utf-8') as file:
        json.dump(options, file, indent=1, sort_keys=True)


def find_run(out_dir, checkpoint, dataset='', stage=None):
    """The newest folder in `out_dir` that holds the file `checkpoint`; with `dataset` or `stage`, of such runs alone.

    Raises UserError where there is none.
    """
    found = []
    if os.path.isdir(out_dir):
        found = [os.path.join(out_dir, name, checkpoint) for name in os.listdir(out_dir)]
    found = [path for path in found if os.path.isfile(path) and
             (not dataset or _dataset_of(os.path.dirname(path)) == dataset) and
             (not stage or _option(os.path.dirname(path), 'stage') == stage)]
    if not found:
        runs = 'run' + f' of Stage-{"I" * (stage or 0)}' * bool(stage) + f' on {dataset}' * bool(dataset)
        raise UserError(f'{out_dir}: no {runs} with a {checkpoint} in it yet; train one first (--train)')
    return os.path.dirname(max(found, key=os.path.getmtime))


def _dataset_of(run_dir):
    """What the run was on: as its options say, or, where they are gone, its name."""
    return _option(run_dir, 'dataset') or re.sub(f'{STAMP}$', '', os.path.basename(run_dir))


def _option(run_dir, name):
    """What an option of a run was, or None where that is not known."""
    try:
        return read_options(run_dir).get(name)
    except UserError:
        return None


def read_options(run_dir):
    """The options with which the run was started. Raises UserError where they cannot be read."""
    path = os.path.join(run_dir, 'options.json')
    try:
        with open(path, encoding='utf-8') as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: cannot be read ({error}), so the run cannot go on') from error


def lock(run_dir):
    """Keep a run to this process until it ends. Raises UserError where another one is training in it."""
    locked = lock_file(os.path.join(run_dir, 'lock'))
    if locked is None:
        raise UserError(f'{run_dir}: another process is training in it')
    LOCKS.append(locked)


def begin(model, options, resumed, name):
    """The folder to train in: a new one called NAME_DATE, or, with the model as it was left there, `resumed`.

    It is kept to this process, which is rank 0: the others, that write nothing, get ''.
    """
    run_dir = ''
    if ranks.rank() == 0:
        run_dir = resumed or new_run(options.out_dir, name, vars(options))
        lock(run_dir)
    if resumed:
        model.load_from(resumed)
        model.set_lr(options.lr)
    if resumed and run_dir:
        write_options(resumed, vars(options))
    model.options = vars(options)
    ranks.unite(model.netG, *(model.netsD if hasattr(model, 'netsD') else [model.netD]))
    return run_dir


def checkpoint_file(options, resumed, of_dataset):
    """What to draw with: the run that `--resume` names, or `--checkpoint`, or the newest run (as `trained_checkpoint`).

    Raises UserError where there is none.
    """
    if options.checkpoint and not resumed:
        return existing(options.checkpoint, options)
    return trained_checkpoint(options, resumed, of_dataset)


def existing(path, options):
    """The checkpoint file that the flag's value `path` names. Raises UserError where there is none."""
    file = checkpoint.find(path, options.model)
    if not os.path.exists(file):
        beside = f', nor below the folder of {options.cfg}' if options.cfg else ''
        raise UserError(f'{file}: no such checkpoint here{beside}; give a run folder, its {options.model}.pt '
                        'or a snapshot in its Model/')
    return file


def trained_checkpoint(options, resumed=None, of_dataset=True):
    """The checkpoint of the run `resumed`, or else of the newest in `--out_dir`: of runs on `--dataset`, or of all.

    Where a `--stage` is asked for, of runs of that one.
    """
    name, stage = f'{options.model}.pt', vars(options).get('stage')
    return os.path.join(resumed or find_run(options.out_dir, name, options.dataset if of_dataset else '', stage), name)


def parse_options(parser, arguments=None):
    """Parse the command line; with `--resume`, options that it does not name keep the values of that run.

    `arguments` (a list of strings) takes the command line's place. Returns (options, the folder of the run to go on
    with or None).
    """
    options = parser.parse_args(arguments)
    if not options.resume:
        return options, None
    run_dir = options.resume
    if run_dir == 'newest':
        is_named = options.dataset != parser.get_default('dataset')
        run_dir = os.path.dirname(trained_checkpoint(options, of_dataset=is_named))
    parser.set_defaults(**{name: value for name, value in read_options(run_dir).items() if name in vars(options)})
    options = parser.parse_args(arguments)
    return options, run_dir
