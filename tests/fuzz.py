"""Feed hostile files to our readers, and report those that are neither read nor refused in one line.

    python tests/fuzz.py                                       100,000 inputs over all targets: `make fuzz`
    python tests/fuzz.py --seed 7 --only hdf5 --input 12345    one of them once more, with its traceback

Every module tests/fuzz_*.py has targets: `TARGETS = {name: function}`. `function(rng, folder)` makes one input from a
`random.Random`, in an empty folder if needed, and passes it to a reader. It returns 'accepted', 'refused' or None;
any exception is a finding, as are more than 5 s of processor time, more than 500 MB of memory above what the process
had at its start, and a crash. Findings are printed and make the exit status 1, but stop nothing else. The inputs of a
target depend only on the seed and their numbers. A module may also have `WEIGHTS = {name: share}`, 1 by default;
slow targets get fewer inputs than quick ones.
"""
import argparse
import contextlib
import faulthandler
import importlib
import itertools
import multiprocessing
import os
import queue
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PROBE = 50        # inputs of each target that show how fast it is
CHUNK = 250       # inputs that a worker is given at a time
SHOWN = 3         # findings of a kind that are printed
START = 120       # seconds that a worker may take to import everything
MB = 2 ** 20


@dataclass(frozen=True)
class Limits:
    """Limits per input: processor time, and time that counts as a hang; memory, and where allocations fail."""
    seconds: float = 5
    hang: float = 60
    megabytes: float = 500
    ceiling: float = 4000


@dataclass
class Seen:
    """Outcomes of the inputs of a target."""
    inputs: int = 0
    outcomes: Counter = field(default_factory=Counter)
    spent: float = 0.0
    slowest: tuple = (0.0, 0)  # seconds, and the number of the input
    largest: tuple = (0.0, 0)  # megabytes, and the number of the input
    findings: Counter = field(default_factory=Counter)


# --- in the process that is watched -----------------------------------------------------------------------------------

def work(connection, folder, modules, limits, seed):
    """Answer every (target, number) with the outcome of that input, until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    stack = _stay_quiet(folder)
    targets, _ = load_targets(modules)
    ready, inputs = set(), os.path.join(folder, 'input')
    os.makedirs(inputs)
    baseline = _memory('VmRSS')
    _set_ceiling(limits)
    connection.send('ready')
    with contextlib.suppress(EOFError):
        while True:
            name, number = connection.recv()
            stack.seek(0), stack.truncate()
            signal.setitimer(signal.ITIMER_PROF, 3 * limits.seconds)  # of processor time; then it ends with a stack
            if name not in ready:  # the first makes what all the others are made of, and keeps it
                before = _memory('VmRSS')
                _attempt(targets[name], _rng(seed, name, number), inputs)
                baseline += _memory('VmRSS') - before
                signal.setitimer(signal.ITIMER_PROF, 3 * limits.seconds)
                ready.add(name)
            Path('/proc/self/clear_refs').write_text('5')  # from here on the largest memory is that of this input
            start = time.process_time()
            outcome, reason, trace = _attempt(targets[name], _rng(seed, name, number), inputs)
            seconds = time.process_time() - start
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send((outcome, reason, trace, seconds, (_memory('VmHWM') - baseline) / MB))


def load_targets(modules):
    """Return ({name: function}, {name: weight}) of modules with `TARGETS`."""
    targets, weights = {}, {}
    for module in map(importlib.import_module, modules):
        targets |= module.TARGETS
        weights |= getattr(module, 'WEIGHTS', {})
    return targets, weights


def _rng(seed, name, number):
    return random.Random(f'{seed}/{name}/{number}')


def _stay_quiet(folder):
    """Silence the process; return the file to which it writes its stack on a crash or on request."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    stack = open(os.path.join(folder, 'stack.txt'), 'w')
    faulthandler.enable(stack, all_threads=False)
    faulthandler.register(signal.SIGPROF, stack, all_threads=False, chain=True)
    return stack


def _set_ceiling(limits):
    """Make allocations fail long before the machine is out of memory."""
    ceiling = _memory('VmData') + int(limits.ceiling * MB)
    resource.setrlimit(resource.RLIMIT_DATA, (ceiling, ceiling))


def _memory(line):
    """Return the bytes in this line of /proc/self/status."""
    status = Path('/proc/self/status').read_text()
    return 1024 * int(status.partition(f'\n{line}:')[2].split(None, 1)[0])


def _attempt(target, rng, folder):
    """Return (outcome, reason, traceback) of one input, and empty the folder."""
    try:
        return target(rng, folder) or 'done', '', ''
    except BaseException as error:  # whatever gets here is what is looked for
        return 'unexpected', _reason(error), traceback.format_exc()
    finally:
        if not os.path.isdir(folder) or os.listdir(folder):
            shutil.rmtree(folder, ignore_errors=True)
            os.makedirs(folder)


def _reason(error):
    """Return one line: what was raised and where, preferably in our code."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)[1:]]
    return f'{type(error).__name__}{_where(places[::-1])}: {" ".join(str(error).split())[:200]}'


def _where(places):
    """Return ' in FILE:LINE' for the first (file, line) in our code, else for the first."""
    ours = [place for place in places if place[0].startswith(f'{ROOT}{os.sep}')
            and '.venv' not in place[0] and place[0] != __file__]
    return ''.join(f' in {file.removeprefix(f"{ROOT}{os.sep}")}:{line}' for file, line in (ours or places)[:1])


# --- in the process that watches --------------------------------------------------------------------------------------

class Worker:
    """A process that tries inputs; it is replaced when an input kills it."""

    def __init__(self, modules, seed, limits):
        self.modules, self.seed, self.limits, self.process = modules, seed, limits, None

    def start(self):
        context = multiprocessing.get_context('spawn')
        self.folder = tempfile.mkdtemp(prefix='fuzz-')
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, daemon=True,
                                       args=(other, self.folder, self.modules, self.limits, self.seed))
        self.process.start()
        other.close()
        if not self.connection.poll(START) or self._receive() != 'ready':
            raise SystemExit(f'the worker does not start: status {self.process.exitcode}, {self._stack()}')

    def attempt(self, name, number):
        """Return (outcome, reason, traceback, seconds, megabytes) of an input."""
        if self.process is None:
            self.start()
        self.connection.send((name, number))
        if not self.connection.poll(self.limits.hang):
            os.kill(self.process.pid, signal.SIGPROF)  # tells where it hangs, and ends
        answer = self._receive()
        if answer is None:
            reason, stack = self._reason_of_death(), self._stack()
            self.stop()
            return 'unexpected', reason, stack, 0.0, 0.0
        return self._judge(*answer)

    def _judge(self, outcome, reason, trace, seconds, megabytes):
        if seconds > self.limits.seconds:
            outcome, reason = 'unexpected', f'slow: more than {self.limits.seconds} s of processor time'
        elif megabytes > self.limits.megabytes:
            outcome, reason = 'unexpected', f'large: more than {self.limits.megabytes} MB of memory'
        return outcome, reason, trace, seconds, megabytes

    def _receive(self):
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            return None

    def _reason_of_death(self):
        if self.process.exitcode == -signal.SIGPROF:
            what = f'hangs (over {3 * self.limits.seconds:g} s of processor time, or {self.limits.hang} s)'
        else:
            what = f'dies with exit status {self.process.exitcode}'
        return what + _where(re.findall(r'File "(.*)", line (\d+)', self._stack()))

    def _stack(self):
        with contextlib.suppress(OSError):
            return Path(self.folder, 'stack.txt').read_text(errors='replace')
        return ''

    def stop(self):
        if self.process is not None:
            self.connection.close()
            self.process.join(10)
            self.process.kill()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.process = None


class Fuzzing:
    """Feed inputs to `targets` (names), and collect the outcomes in `seen`."""

    def __init__(self, workers, targets, weights, seed, verbose=False):
        self.workers, self.targets, self.weights, self.seed = workers, targets, weights, seed
        self.verbose, self.lock = verbose, threading.Lock()
        self.seen = {name: Seen() for name in targets}

    def run(self, inputs):
        """Try so many inputs, most of them for quick targets."""
        probe = min(PROBE, -(-inputs // len(self.targets)))
        self.try_all(self._chunks(dict.fromkeys(self.targets, (0, probe))))
        left = inputs - sum(seen.inputs for seen in self.seen.values())
        pace = {name: self.weights.get(name, 1) / (seen.spent / seen.inputs + 1e-3) ** 0.5
                for name, seen in self.seen.items()}
        ends = [round(left * part / sum(pace.values())) for part in itertools.accumulate(pace.values(), initial=0)]
        shares = {name: (self.seen[name].inputs, end - start)
                  for name, start, end in zip(self.targets, ends, ends[1:])}
        self.try_all(self._chunks(shares))

    def _chunks(self, shares):
        """Yield lists of (name, number), from {name: (first number, count)}, alternating between targets."""
        chunks = [[[(name, number) for number in range(start, min(start + CHUNK, first + count))]
                   for start in range(first, first + count, CHUNK)] for name, (first, count) in shares.items()]
        return [chunk for by_turns in itertools.zip_longest(*chunks) for chunk in by_turns if chunk]

    def try_all(self, chunks):
        """Try the inputs in these lists of (name, number); each worker gets one list at a time."""
        waiting = queue.SimpleQueue()
        for chunk in chunks:
            waiting.put(chunk)

        def empty_queue(worker):
            with contextlib.suppress(queue.Empty):
                while True:
                    for name, number in waiting.get_nowait():
                        self.note(name, number, *worker.attempt(name, number))

        with ThreadPoolExecutor(len(self.workers)) as threads:
            list(threads.map(empty_queue, self.workers))

    def note(self, name, number, outcome, reason, trace, seconds, megabytes):
        """Count the outcome of an input, and print it if it is among the first findings of its kind."""
        with self.lock:
            seen = self.seen[name]
            seen.inputs += 1
            seen.outcomes[outcome] += 1
            seen.spent += seconds
            seen.slowest, seen.largest = max(seen.slowest, (seconds, number)), max(seen.largest, (megabytes, number))
            if outcome == 'unexpected':
                kind = reason.partition(': ')[0]
                seen.findings[kind] += 1
                if seen.findings[kind] <= SHOWN:
                    print(f'UNEXPECTED: --seed {self.seed} --only {name} --input {number}: {reason}', flush=True)
                    if self.verbose:
                        print(trace)

    def summary(self):
        """Return a line for every target, one for every frequent kind of finding, and the total."""
        for name, seen in self.seen.items():
            outcomes = ', '.join(f'{count:,} {outcome}' for outcome, count in sorted(seen.outcomes.items()))
            mean = 1000 * seen.spent / max(1, seen.inputs)
            yield (f'{name:20} {seen.inputs:7,} inputs: {outcomes}; mean {mean:.1f} ms, '
                   f'slowest {seen.slowest[0]:.1f} s (input {seen.slowest[1]}), '
                   f'largest {seen.largest[0]:.0f} MB (input {seen.largest[1]})')
            yield from (f'{name}: {count} times {kind}' for kind, count in seen.findings.items() if count > SHOWN)
        all_seen = self.seen.values()
        yield (f'{sum(seen.inputs for seen in all_seen):,} inputs over {len(self.seen)} targets: {self.unexpected()} '
               f'unexpected, slowest {max(seen.slowest[0] for seen in all_seen):.1f} s, '
               f'largest {max(seen.largest[0] for seen in all_seen):.0f} MB')

    def unexpected(self):
        return sum(seen.outcomes['unexpected'] for seen in self.seen.values())


def main(arguments=None, modules=None, limits=Limits()):
    """Parse the flags and run. Returns the exit status: 0 if there were no findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--inputs', type=int, default=100_000, help='of all targets together (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=random.randrange(10 ** 6), help='default: another each time')
    parser.add_argument('--only', nargs='+', metavar='NAME', help='targets (default: all)')
    parser.add_argument('--input', type=int, metavar='N', help='only this one')
    parser.add_argument('--parallel', type=int, default=2, metavar='N', help='processes (default: %(default)s)')
    parser.add_argument('--verbose', action='store_true', help='with tracebacks')
    args = parser.parse_args(arguments)
    modules = modules or sorted(f'tests.{path.stem}' for path in (ROOT / 'tests').glob('fuzz_*.py'))
    targets, weights = load_targets(modules)
    if not targets:
        parser.error('there are no targets in tests/fuzz_*.py')
    if unknown := set(args.only or ()) - set(targets):
        parser.error(f'--only {unknown.pop()}: the targets are {", ".join(targets)}')
    workers = [Worker(modules, args.seed, limits) for _ in range(args.parallel if args.input is None else 1)]
    fuzzing = Fuzzing(workers, args.only or list(targets), weights, args.seed, args.verbose or args.input is not None)
    start = time.monotonic()
    try:
        if args.input is None:
            fuzzing.run(args.inputs)
        else:
            fuzzing.try_all([[(name, args.input)] for name in fuzzing.targets])
    finally:
        for worker in workers:
            worker.stop()
    for line in fuzzing.summary():
        print(line)
    print(f'{(time.monotonic() - start) / 60:.1f} minutes, --seed {args.seed}')
    return bool(fuzzing.unexpected())


if __name__ == '__main__':
    sys.exit(main())
