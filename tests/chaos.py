"""Kill trainings and conversions at random moments, restart them, and compare their results.

    python tests/chaos.py                                       50 kills over all commands: `make chaos`
    python tests/chaos.py --only text2image --kills 5 --seed 7  some more of one command

Every command first runs undisturbed to measure its time and the expected files. Then its victims get one to three
kills each: SIGKILL, SIGTERM or SIGINT (which a terminal sends to workers, too), after a random part of that time, and
every other one only once a file is being written. A training is restarted with `--resume RUN`, all else with the same
command. In the end, its files must be bitwise identical to those of the undisturbed command.

The victims run a copy of the code that differs in one number: trainings write a checkpoint after every step, not every
five minutes. Failures are printed and make the exit status 1; the folder of a failed victim is kept.
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from char_cnn_rnn.build_encoder import embed_captions, save_encoder
from char_cnn_rnn.encoder import CharCnnRnn
from common import checkpoint
from common.run import STAMP
from data import layout
from data.cache import load_split
from data.toy_birds import prepare
from stackgan_v1.build_gan import Model, make_networks

STOPPED = {signal.SIGKILL: {-9}, signal.SIGTERM: {143, -15}, signal.SIGINT: {130, -2}}  # and their exit statuses
MOST_KILLS = 3              # of a victim
PATIENCE = 60               # seconds that whatever should take none may take on a busy machine
GRACE = 1                   # second, and half the time of a command: what goes on for longer has not heard a signal
STARTUP = 0.1               # seconds in which Python itself answers Ctrl-C, with a traceback
PARTIAL = '*.partial*'      # the names of files that are being written
UNCOMPARED = {'lock', 'checksums.json', 'index.html'}  # files that say nothing of their own
OF_A_START = {'resume', 'stamp', 'changed_ns'}  # keys of JSON and checkpoints that are not compared: how or when
IS_CHECKPOINT = re.compile(r'.*\.pth?(\.\d+)?').fullmatch  # also the one before, NAME.pt.1
KINDS = ('lost', 'different', 'left behind', 'badly ended')

CODE = ('char_cnn_rnn', 'common', 'data', 'stackgan_v1', 'stackgan_v2', 'text2image', 'word2vec')
BIRDS, CAPTIONS = 20, 2     # in the data that most commands read
PHOTOGRAPHS = 120           # in a folder like that of CUB-200-2011


@dataclass
class Command:
    """A command line to run in a folder that holds `data/birds.hdf5`. A training creates its run in `out/`."""
    name: str
    script: str
    arguments: list
    is_training: bool = False


def all_commands(inputs):
    """Return every command that writes files, to run on the files of `make_inputs`."""
    read = '--data_dir data --dataset birds --cuda False'
    gan = f'--train {read} --out_dir out --log_interval 1 --precision fp32 --compile False'
    narrow = '--gf_dim 4 --df_dim 4 --batch_size 8 --snapshot_interval 1'
    words = f'--train {read} --out_dir out --log_interval 1 --min_count 1 --epochs 2 --batch_size 64'
    encoder = f'--train {read} --out_dir out --log_interval 1 --variant birds_cvpr --batch_size 8'
    lists = ' '.join(f'--{split}_classes {inputs}/{split}.txt' for split in ('train', 'test'))
    trainings = {
        'text2image': ('text2image', f'{gan} --epochs 2 --batch_size 12'),
        'stackgan_v1 stage 1': ('stackgan_v1', f'{gan} {narrow} --condition_dim 6 --z_dim 5 --epochs 3 --workers 0'),
        'stackgan_v1 stage 2': ('stackgan_v1', f'{gan} {narrow} --condition_dim 6 --epochs 2 --workers 1 --stage 2 '
                                                 f'--stage1 {inputs}/stage1'),
        'stackgan_v2': ('stackgan_v2', f'{gan} {narrow} --embedding_dim 6 --z_dim 5 --epochs 2 --workers 1'),
        'word2vec': ('word2vec', words),
        'char_cnn_rnn': ('char_cnn_rnn', f'{encoder} --image_encoder scratch --epochs 3'),
        'char_cnn_rnn, features': ('char_cnn_rnn', f'{encoder} --image_encoder efficientnet_lite0 --epochs 1')}
    others = {
        'char_cnn_rnn --embed': ('char_cnn_rnn/main.py', f'--embed {read} --encoder {inputs}/encoder.pt'),
        'birds/prepare.py': ('data/birds/prepare.py', f'--cub {inputs}/cub --text {inputs}/text {lists} '
                                                      '--out data/made.hdf5'),
        'folder/prepare.py': ('data/folder/prepare.py', f'--images {inputs}/cub/images --captions {inputs}/text '
                                                        '--name made --out data/made.hdf5'),
        'toy_birds/prepare.py': ('data/toy_birds/prepare.py', '--count 150 --out data/made.hdf5')}
    return ([Command(name, f'{section}/main.py', typed.split(), True) for name, (section, typed) in trainings.items()]
            + [Command(name, script, typed.split()) for name, (script, typed) in others.items()])


class Chaos:
    """Start `commands` with the code in `code` in folders below `folder`, and kill them `kills` times in total.

    `data` is the folder that each victim finds as its `data/`. `found` counts what was wrong, by kind.
    """

    def __init__(self, commands, kills, seed, folder, code, data):
        self.commands, self.kills, self.seed = commands, kills, seed
        self.folder, self.code, self.data = Path(folder), Path(code), data
        self.left, self.done, self.found, self.lock = kills, 0, Counter(), threading.Lock()

    def run(self, parallel=2):
        """Run all victims, `parallel` at a time. Returns the summary, one line."""
        numbers = itertools.count()
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of what a shell starts in the background, and
            signal.signal(signal.SIGINT, signal.default_int_handler)  # of all that this starts in its turn

        def torment_all():
            while self.left > 0:
                number = next(numbers)
                self.torment(number, self.commands[number % len(self.commands)])

        with ThreadPoolExecutor(parallel) as threads:
            names = [command.name for command in self.commands]
            self.undisturbed = dict(zip(names, threads.map(self.watch, self.commands)))
            for tormentor in [threads.submit(torment_all) for _ in range(parallel)]:
                tormentor.result()
        return (f'{self.done} kills over {len(self.commands)} commands: '
                + ', '.join(f'{self.found[kind]} {kind}' for kind in KINDS))

    def watch(self, command):
        """Run a command undisturbed. Returns (seconds, contents of its files)."""
        victim = Victim(command, self.code, self.folder / re.sub(r'\W+', '_', command.name), self.data)
        start = time.monotonic()
        victim.start()
        if victim.wait(10 * PATIENCE) != 0:
            raise SystemExit(f'{command.name}: does not even end well undisturbed: {victim.last_words()}')
        seconds = time.monotonic() - start
        self.say(f'{command.name}: {seconds:.1f} s undisturbed')
        files = contents(victim.folder)
        victim.clear()
        return seconds, files

    def torment(self, number, command):
        """Kill victim `number` up to MOST_KILLS times, let it finish, and check its files."""
        rng, found_before = random.Random(f'{self.seed}/{number}'), sum(self.found.values())
        victim = Victim(command, self.code, self.folder / str(number), self.data)
        seconds, expected = self.undisturbed[command.name]
        kills = rng.randint(1, MOST_KILLS)
        while True:
            victim.start()
            is_struck = kills > 0 and self.strike(victim, rng, seconds)
            kills -= is_struck
            status = victim.status if is_struck else victim.wait(10 * seconds + PATIENCE)
            if status == 0:
                break
            if not is_struck and not victim.give_up_empty_run():
                what = 'hangs' if status is None else f'ends with status {status}'
                self.report('lost', victim, f'{" ".join(victim.arguments)} {what}: {victim.last_words()}')
                return victim.end()
        self.judge(victim, expected)
        if sum(self.found.values()) == found_before:
            victim.clear()

    def strike(self, victim, rng, seconds):
        """Kill a victim within `seconds` after its start. Returns False if it finished before."""
        number, delay, then = rng.choice(list(STOPPED)), rng.uniform(0, seconds), rng.uniform(0, 0.05)
        is_in_write = rng.random() < 0.5
        with self.lock:
            if self.left == 0:
                return False
            self.left -= 1
        victim.wait(delay)
        while is_in_write and victim.status is None and not any(victim.folder.rglob(PARTIAL)):
            time.sleep(0.002)
        if victim.wait(then if is_in_write else 0) is not None:
            with self.lock:
                self.left += 1
            return False
        at = victim.age()
        victim.kill(number)
        victim.wait(seconds + PATIENCE)
        with self.lock:
            self.done += 1
            print(f'[{self.done:2}/{self.kills}] {victim.command.name}: {number.name} at {at:.2f} s'
                  f'{", in a write" if is_in_write else ""} -> {victim.status}', flush=True)
        self.judge_end(victim, number, at, seconds)
        return True

    def judge_end(self, victim, number, at, seconds):
        """Return whether a victim ended on signal `number`, sent `at` this age, without a traceback."""
        status, took, said = victim.status, victim.age() - at, victim.said()
        is_python = 'KeyboardInterrupt' in said and (at < STARTUP or str(self.code) not in said)
        if status is None:
            victim.end()
            self.report('badly ended', victim, f'{number.name} does not end it')
        elif status == 0 and took > GRACE + seconds / 2:
            self.report('badly ended', victim, f'goes on for {took:.1f} s after {number.name}, to its end')
        elif not is_python and ('Traceback' in said or status not in {0, *STOPPED[number]}):
            self.report('badly ended', victim, f'status {status} after {number.name}: {victim.last_words()}')

    def judge(self, victim, expected):
        """Return whether a finished victim left exactly the `expected` files."""
        if processes := victim.orphans():
            self.report('left behind', victim, f'processes {processes}')
        left = [str(path.relative_to(victim.folder)) for path in victim.folder.rglob(PARTIAL)]
        if left or len(victim.runs()) > 1:
            self.report('left behind', victim, ', '.join(left + [run.name for run in victim.runs()[1:]]))
        found = contents(victim.folder)
        differing = sorted(what for what in {**found, **expected} if found.get(what) != expected.get(what)
                           and not Path(what).match(PARTIAL))
        if differing:
            self.report('different', victim, f'{len(differing)}: {", ".join(differing[:4])} ...')

    def report(self, kind, victim, what):
        with self.lock:
            self.found[kind] += 1
        self.say(f'{kind.upper()}: {victim.command.name}, in {victim.folder}: {what}')

    def say(self, line):
        with self.lock:
            print(line, flush=True)


class Victim:
    """A command, and the folder in which it is started repeatedly."""

    def __init__(self, command, code, place, data):
        self.command, self.script, self.arguments = command, code / command.script, command.arguments
        self.place, self.folder, self.empty_runs = place, place / 'here', []
        shutil.copytree(data, self.folder / 'data')
        (place / 'tmp').mkdir()

    @property
    def status(self):
        return self.process.poll()

    def start(self):
        """Start the command, or resume its run."""
        runs = self.runs()
        self.arguments = ['--train', '--resume', str(runs[0])] if runs else self.command.arguments
        environment = os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONIOENCODING': 'utf-8',
                                    'TMPDIR': str(self.place / 'tmp')}
        self.started = time.monotonic()
        with open(self.place / 'said.txt', 'w') as said:
            self.process = subprocess.Popen([sys.executable, self.script, *self.arguments], cwd=self.folder,
                                            stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment,
                                            start_new_session=True)

    def age(self):
        """Return the seconds since it was started."""
        return time.monotonic() - self.started

    def wait(self, seconds):
        """Return its exit status, or None if it is still running after so many seconds."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self, number):
        """Send a signal to the main process, as the kernel does, or to all processes, as a terminal does."""
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            os.kill(self.process.pid, number)

    def runs(self):
        """Return the folders of resumable runs, oldest first."""
        found = sorted((self.folder / 'out').glob('*'), key=os.path.getctime) if self.command.is_training else []
        return [run for run in found if run not in self.empty_runs]

    def give_up_empty_run(self):
        """Return whether it refused to resume a run that was killed before its first checkpoint, and reported it."""
        runs = self.runs()
        if not runs or self.process.returncode != 1 or 'Traceback' in self.said():
            return False
        weights = [file for file in runs[0].rglob('*') if IS_CHECKPOINT(file.name) and file.name != 'encoder.pt']
        if weights or 'start it again' not in self.said():
            return False
        self.empty_runs.append(runs[0])
        return True

    def said(self):
        return (self.place / 'said.txt').read_text(encoding='utf-8', errors='replace')

    def last_words(self):
        return ([line.strip() for line in self.said().splitlines() if line.strip()] or ['nothing'])[-1][:300]

    def orphans(self):
        """Return its processes that are still running a while after all were killed or ended."""
        for _ in range(PATIENCE):
            if not (found := self.processes()):
                break
            time.sleep(1)
        self.end()
        return found

    def processes(self):
        """Return all processes that it has started; their environment names its temporary folder."""
        found = []
        for folder in Path('/proc').glob('[0-9]*'):
            with contextlib.suppress(OSError):  # ended meanwhile, or another user's
                if f'TMPDIR={self.place / "tmp"}\0'.encode() in (folder / 'environ').read_bytes():
                    found.append(int(folder.name))
        return found

    def end(self):
        """End all processes that it has started."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def clear(self):
        shutil.rmtree(self.place)


def contents(folder):
    """Return {key: value or checksum} for the contents of all files below `folder`, except dates, speeds and locks."""
    for path in folder.glob('data/*.hdf5'):
        if path.with_suffix('.cache').exists():  # what a cache gives counts, not whether it is older than its file
            for split in layout.SPLITS:
                load_split(str(path), split)
    found = {}
    for path in folder.rglob('*'):
        if path.is_file() and path.name not in UNCOMPARED and 'tfevents' not in path.name:
            name = re.sub(STAMP, '_DATE', str(path.relative_to(folder)))
            found |= {f'{name}{key}': value for key, value in parts_of(path, str(folder))}
    return found


def parts_of(path, folder):
    """Yield (key, value or checksum) for each part of a file."""
    if IS_CHECKPOINT(path.name):
        return flatten(checkpoint.load(str(path)), folder)
    if path.suffix == '.json':
        return flatten(json.loads(path.read_text(encoding='utf-8')), folder)
    if path.suffix == '.npz':
        with np.load(path) as arrays:
            return flatten(dict(arrays), folder)
    if path.suffix == '.hdf5':
        with h5py.File(path) as file:
            return flatten(tree(file), folder)
    if path.name == 'log.txt':  # a step may be there twice, with one loss
        return [(f':{line}', True) for line in re.findall(r'step \d+ .*(?=  )', path.read_text(encoding='utf-8'))]
    return [('', hashlib.sha256(path.read_bytes()).hexdigest())]


def tree(group):
    """Return an HDF5 group as a dict."""
    return {'attributes': dict(group.attrs),
            **{key: tree(one) if isinstance(one, h5py.Group) else one[()] for key, one in group.items()}}


def flatten(value, folder, key=''):
    """Return [(key, value)] for all values in nested containers: arrays as checksums, paths without `folder`."""
    if isinstance(value, dict):
        return [part for name, one in value.items() if name not in OF_A_START
                for part in flatten(one, folder, f'{key}:{name}')]
    if isinstance(value, (list, tuple)):
        return [part for number, one in enumerate(value) for part in flatten(one, folder, f'{key}:{number}')]
    if torch.is_tensor(value):
        value = value.numpy()
    if isinstance(value, (np.ndarray, np.void)):
        value = f'{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}'
    if isinstance(value, int) and not isinstance(value, bool):
        value = float(value)  # a flag's default may be 50, and 50.0 once it has been typed
    return [(key, str(value).replace(folder, ''))]


def copy_code(folder):
    """Copy the code, with one change: trainings write a checkpoint after every step."""
    for path in itertools.chain.from_iterable((ROOT / part).rglob('*') for part in CODE):
        if path.suffix in ('.py', '.yml', '.json'):
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    loop = folder / 'common' / 'training_run.py'
    often, count = re.subn(r'(?m)^(SECONDS_BETWEEN_CHECKPOINTS = )\d+', r'\g<1>0', loop.read_text(encoding='utf-8'))
    assert count == 1, 'common/training_run.py does not say how often checkpoints are written'
    loop.write_text(often, encoding='utf-8')
    return folder


def make_inputs(folder):
    """Write toy birds as data/birds.hdf5 and in the format of CUB-200-2011, encoders, and a trained Stage-I."""
    torch.manual_seed(0)
    encoders = CharCnnRnn('birds_cvpr').eval(), CharCnnRnn('birds_cvpr').eval()
    data = str(folder / 'data' / 'birds.hdf5')
    with layout.replace_file(data) as file:
        for number in range(PHOTOGRAPHS):
            split, bird = prepare.make(number, seed=1)
            write_as_cub(folder, split, bird, number)
            if number < BIRDS:
                bird.captions = bird.captions[:CAPTIONS]
                bird.embeddings = embed_captions(encoders[0], bird.captions, verbose=False)
                layout.write_photograph(file, split, bird)
    save_encoder(encoders[0], data)
    save_encoder(encoders[1], str(folder / 'hdf5')), (folder / 'hdf5.encoder.pt').rename(folder / 'encoder.pt')
    stage1 = make_networks(gf_dim=4, df_dim=4, z_dim=5, condition_dim=6)
    Model('stackgan_v1', 'cpu', None, *stage1).save_to(str(folder / 'stage1'), verbose=False)
    return folder


def write_as_cub(folder, split, bird, number):
    """Add a photograph to a folder in the format of CUB-200-2011, and its class to the list of its split."""
    image, text = (folder / f'{kind}/{bird.class_name}/{bird.name}{end}' for kind, end in
                   (('cub/images', '.jpg'), ('text', '.txt')))
    for path, written in ((image, bird.jpeg), (text, '\n'.join(bird.captions).encode())):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(written)
    for path, line in ((folder / 'cub' / 'images.txt', f'{number} {bird.class_name}/{bird.name}.jpg'),
                       (folder / 'cub' / 'bounding_boxes.txt', f'{number} {" ".join(map(str, bird.bbox))}'),
                       (folder / f'{split}.txt', bird.class_name)):
        with open(path, 'a', encoding='utf-8') as file:
            file.write(f'{line}\n')


def main(arguments=None):
    """Parse the flags and run. Returns the exit status: 0 if nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=50, help='default: %(default)s')
    parser.add_argument('--seed', type=int, default=random.randrange(10 ** 6), help='of the moments (default: another)')
    parser.add_argument('--only', nargs='+', metavar='NAME', default=[''], help='commands whose names begin with these')
    parser.add_argument('--parallel', type=int, default=2, metavar='N', help='victims at a time (default: %(default)s)')
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix='chaos-'))
    commands = [command for command in all_commands(folder / 'inputs') if command.name.startswith(tuple(args.only))]
    if not commands:
        parser.error(f'--only: the commands are {", ".join(command.name for command in all_commands(folder))}')
    print(f'--seed {args.seed}, in {folder}', flush=True)
    chaos = Chaos(commands, args.kills, args.seed, folder, copy_code(folder / 'code'),
                  make_inputs(folder / 'inputs') / 'data')
    print(chaos.run(args.parallel), f'({(time.monotonic() - start) / 60:.1f} minutes)')
    if not chaos.found:
        shutil.rmtree(folder)
    return bool(chaos.found)


if __name__ == '__main__':
    sys.exit(main())
