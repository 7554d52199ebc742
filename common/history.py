"""Read what a run has logged and what was measured about it: log.txt and metrics.jsonl in its folder."""
import json
import os
import re
from contextlib import suppress

from common.files import check_is_file
from common.log import LOG
from common.page import plain

KEPT = 5_000            # points of a loss that are kept: 8 or more for each one that is drawn
MOST = 20               # losses, and measures, that are read
LONGEST, CHUNK = 50_000_000, 1 << 20  # bytes of a log that one call reads, and bytes read at once
LONGEST_LINE, TAIL = 10_000, 200_000  # bytes
LARGEST = 1e30          # value that is drawn
LOGGED = re.compile(r'^epoch (\d{1,9})/(\d{1,9})  step (\d{1,15})  (.*)  \S+ \S+/s$')


class History:
    """The losses in a run's log. `read` continues where the last call ended; long logs are thinned.

    `newest` has the losses of the last line, {name: text}, which is of `step` in epoch `epoch` (from 1) of `epochs`.
    """

    def __init__(self, run_dir):
        self.path = os.path.join(run_dir, LOG)
        self.place, self.rest, self.width, self.points = 0, b'', 1, {}
        self.newest, self.epoch, self.epochs, self.step = {}, 0, 0, 0

    def read(self, tail=None):
        """Read what was appended, or only the last `tail` bytes. A call reads at most LONGEST bytes. Returns itself."""
        with suppress(OSError):
            check_is_file(self.path)
            with open(self.path, 'rb') as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(min(self.place, size) if tail is None else max(0, size - tail))
                for _ in range(LONGEST // CHUNK):
                    piece = file.read(CHUNK)
                    self._add(piece)
                    if not piece:
                        break
                self.place = file.tell()
        return self

    def _add(self, piece):
        *lines, rest = (self.rest + piece).split(b'\n')
        if not piece and LOGGED.match(rest.decode(errors='replace')):  # the last line has no end yet
            lines.append(rest)
        self.rest = rest if len(rest) < LONGEST_LINE else b''
        for line in lines:
            if len(line) < LONGEST_LINE and (found := LOGGED.match(line.decode(errors='replace').rstrip('\r'))):
                self.epoch, self.epochs, self.step = map(int, found.groups()[:3])
                self.newest = dict(re.findall(r'([^\s]{1,40}) (\S{1,40})', found[4])[:MOST])
                for name, value in self.newest.items():
                    if name in self.points or len(self.points) < MOST:
                        with suppress(ValueError):
                            of_loss = self.points.setdefault(name, {})
                            of_loss[self.step // self.width] = self.step, float(value)
                            if len(of_loss) > KEPT:
                                self._thin()

    def _thin(self):
        """Keep one point of every two: the later one, as of steps that were repeated."""
        self.width *= 2
        self.points = {name: {step // self.width: (step, value) for step, value in points.values()}
                       for name, points in self.points.items()}

    def curves(self):
        """Return {name of a loss: [(step, value), ...]}; of steps that were repeated, the last."""
        return {name: sorted((step, value) for step, value in points.values() if abs(value) < LARGEST)
                for name, points in self.points.items()}


def logged(run_dir):
    """Return the `curves` of a run's log."""
    return History(run_dir).read().curves()


def measurements(run_dir):
    """Return the lines of a run's metrics.jsonl as a list of dicts, oldest first; those of damaged lines are missing.

    Of a long file, only the end is read.
    """
    path, found = os.path.join(run_dir, 'metrics.jsonl'), []
    with suppress(OSError):
        check_is_file(path)
        with open(path, 'rb') as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            for line in file.read(TAIL).decode(errors='replace').splitlines():
                with suppress(ValueError, RecursionError):
                    found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


def measured(run_dir):
    """Return the newest line of a run's metrics.jsonl as {name: text}; {} if there is none."""
    return as_text((measurements(run_dir) or [{}])[-1])


def measured_alike(run_dirs):
    """Return `measured` for each run, but of the newest lines that were measured in the same way, if there are any.

    That is: with the same captions, as many images, and the same measures.
    """
    lines = [measurements(run_dir) for run_dir in run_dirs]
    ways = [{_way(line): line for line in of_run} for of_run in lines]
    shared = [_way(line) for of_run in lines for line in of_run
              if all(_way(line) in of_other for of_other in ways if of_other)]
    return [as_text(of_run.get(shared[-1], {})) if shared else measured(run_dir)
            for of_run, run_dir in zip(ways, run_dirs)]


def _way(line):
    return str(line.get('split')), str(line.get('images')), *line


def as_text(line):
    """Return the first measures of a line of metrics.jsonl as {name: text}."""
    return {name[:40]: f'{value:.4g}' if isinstance(value, float) else plain(value, 40)
            for name, value in list(line.items())[:MOST]}
