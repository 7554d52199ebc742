"""List runs, the oldest first: when, on what data, epochs, losses, measures, and the size of the folder.

    python common/runs.py [DIR]

DIR is a run folder, a folder of runs, or one that has runs in `output/` or in `FOLDER/output/` (default: this
repository).
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # the imports below take seconds

import argparse
import glob
import itertools
import re
import shutil
import textwrap
import unicodedata
from collections import Counter

from common import flags, run
from common.errors import OneLineParser, UserError, run_command
from common.history import TAIL, History, measured
from common.page import plain
from common.run_page import epoch_shown, noted, position, shown_size, size_of, started

HEAD = ('run', 'started', 'data', 'epoch', 'size', 'losses', 'measured')
GAP = 2        # spaces between two columns
NARROWEST = 20  # letters of a line
HOW = ('checkpoint', 'epoch', 'split', 'images')  # of a measurement: no measure itself


def main():
    """Print a table of runs, or paragraphs if it is wider than the terminal."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?', type=flags.path, default=flags.ROOT, metavar='DIR',
                        help='a run, a folder of runs, or a folder like this repository (default: this repository)')
    folder = parser.parse_args().folder
    if not os.path.isdir(folder):
        raise UserError(f'{folder}: is not a folder; give one that has runs in it')
    rows, skipped, generated = find(folder)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    if rows:
        print('\n'.join(lines(rows, width)))
    else:
        print(f'{plain(folder)}: no runs here yet; python SECTION/main.py --train makes one')
    if generated:
        print(f'not listed: {", ".join(f"{count} of {name}" for name, count in sorted(generated.items()))} '
              '(folders of generated images)')
    for reason in skipped:
        print(f'skipped: {reason}')


def find(folder):
    """Return what a folder holds: (rows of `HEAD`, sorted by time, reasons for damaged runs, {name: count}).

    The counts are those of folders with what a trained model generated, by the first part of their names.
    """
    rows, skipped, generated = [], [], Counter()
    for path in candidates(folder):
        try:
            options = run.read_options(path)
        except UserError as error:
            skipped.append(plain(error))
            continue
        if options.get('train') is not True:
            generated[plain(os.path.basename(path).partition('_')[0])] += 1
        else:
            rows.append(row(path, options))
    return sorted(rows, key=lambda row: (row[1], row[0])), skipped, generated


def candidates(folder):
    """Return the folders that are runs or, by their names, were: `folder`, or those in it, in `output` and below.

    All others are foreign, and not mentioned.
    """
    if run.has_options(folder):
        return [folder]
    found = []
    below = (glob.glob(os.path.join(glob.escape(folder), *parts)) for parts in (['output'], ['*', 'output']))
    for place in [folder, *itertools.chain(*below)]:
        try:
            names = sorted(os.listdir(place))
        except OSError as error:
            print(f'skipped: {plain(place)}: its files cannot be listed ({error.strerror})')
            continue
        paths = [os.path.join(place, name) for name in names]
        found += [path for path in paths if os.path.isdir(path)
                  and (run.has_options(path) or re.search(f'{run.STAMP}$', path))]
    return found


def row(path, options):
    """Return the cells of a run's row."""
    history = History(path).read(tail=TAIL)
    at = position(history, noted(path))
    numbers = measured(path)
    measures = [f'{name} {value}' for name, value in numbers.items() if name not in HOW]
    if 'images' in numbers and 'split' in numbers:
        measures.append(f'({numbers["images"]} images of /{numbers["split"]})')
    shortest = min(os.path.relpath(path), path, key=len)
    return [plain(shortest), started(path), plain(options.get('dataset'), 40),
            epoch_shown(at, '/') if at[2] else '-', shown_size(size_of(path)),
            ' '.join(f'{plain(name)} {plain(value)}' for name, value in history.newest.items()) or '-',
            ' '.join(map(plain, measures)) or '-']


def lines(rows, width):
    """Return the rows as lines: a table if it fits into `width` letters or that is None, else paragraphs."""
    widths = [max(map(width_of, column)) for column in zip(HEAD, *rows)]
    if width is None or sum(widths) + GAP * (len(widths) - 1) <= width:
        return [(' ' * GAP).join(cell + ' ' * (wide - width_of(cell)) for cell, wide in zip(cells, widths)).rstrip()
                for cells in (HEAD, *rows)]
    found = []
    for name, when, data, epoch, size, *numbers in rows:
        found += textwrap.wrap(name, max(width, NARROWEST))
        for part in (f'{when}, {data}, epoch {epoch}, {size}', *(cell for cell in numbers if cell != '-')):
            found += textwrap.wrap(part, max(width, NARROWEST), initial_indent='  ', subsequent_indent='    ')
    return found


def width_of(cell):
    """Return the width of text in a terminal: Chinese and Japanese letters are two wide, and accents have none."""
    return sum(2 if unicodedata.east_asian_width(letter) in 'WF' else not unicodedata.combining(letter)
               for letter in cell)


if __name__ == '__main__':
    run_command(main)
