"""Describe a run on a page, index.html in its folder: options, losses, samples, measures, and how to continue."""
import functools
import html
import json
import os
import re
import shlex
import sys
import time
from contextlib import suppress

from PIL import Image

from common import ranks, run
from common.errors import CannotWrite
from common.files import atomic_write, check_is_file
from common.flags import ROOT
from common.history import LARGEST, MOST, TAIL, History, as_text, measurements
from common.log import CAPTIONS
from common.page import document, head_of, picture, plain, plot, table, text
from common.pictures import LINE

PAGE = 'index.html'
GENERATOR = 'common/run_page.py'
SHARE = 200                          # how many times longer than writing a page the training goes on without the next
FRAMES, FRAME = 40, 340              # samples in the film strip, and their width in pixels
TILES, TILE = 16, 512                # images of the newest sample that are shown with captions, and their largest width
PIXELS = 50_000_000                  # of the largest sample that is decoded
COMMAND = re.compile(r' data-command="([^"]*)"')
EVENTS = re.compile(r'events\.out\.tfevents\.(\d{1,11})\.')  # the time is in seconds
STARTED = re.compile(r'_(\d{8}_\d{6})(_\d+)?$')


class RunPage:
    """The page of a run that is being trained, renewed so rarely that it takes less than a hundredth of the time.

    `log` is the `common.log.Log` that reports what cannot be written, and `progress` that of the training, which ends
    after `epochs` epochs.
    """

    def __init__(self, run_dir, log, progress, epochs):
        self.run_dir, self.log, self.progress, self.epochs = run_dir, log, progress, epochs
        self.due, self.history, self.warned = 0, History(run_dir), False

    def renew(self, at_once=False):
        """Write the page if it is time, or `at_once`; only a folder with options, which is a run's, has one."""
        start = time.monotonic()
        if not (self.run_dir and run.has_options(self.run_dir)) or start < self.due and not at_once:
            return
        if is_foreign(self.run_dir):
            if not self.warned:
                self.log.line(f'{os.path.join(self.run_dir, PAGE)}: was not written by this program, so it is kept, '
                              'and the run has no page; rename the file to get one')
            self.warned = True
            return
        with self.log.attempt('the page'):
            done = self.progress['epoch']
            at = [done + (self.progress['batch'] > 0), done, self.epochs, self.progress['step']]
            write(self.run_dir, self.history, command_of_this_process() | {'position': at})
        self.due = time.monotonic() + SHARE * (time.monotonic() - start)


def command_of_this_process():
    """Return what a page has to know about the training's command: its script and the default values of its flags."""
    script = os.path.realpath(sys.argv[0])
    inside = os.path.relpath(script, ROOT)
    return {'script': script if inside.startswith(os.pardir) else inside, 'ranks': ranks.world_size(),
            'defaults': {name: value for name, value in run.DEFAULTS.items() if name != 'out_dir'}}


def is_foreign(run_dir):
    """Return whether the folder has an index.html that this program did not write."""
    path = os.path.join(run_dir, PAGE)
    return os.path.lexists(path) and head_of(path, GENERATOR) is None


def renew(run_dir):
    """Write the page of a run anew, with the command that is noted on it; without a page, do nothing.

    Raises CannotWrite.
    """
    if head_of(os.path.join(run_dir, PAGE), GENERATOR) is not None:
        write(run_dir, History(run_dir), noted(run_dir))


def noted(run_dir):
    """Return what the page of a run notes about its training, a dict; {} if it has no page."""
    with suppress(ValueError, RecursionError, TypeError):
        command = json.loads(html.unescape(COMMAND.search(head_of(os.path.join(run_dir, PAGE), GENERATOR))[1]))
        if isinstance(command, dict):
            return command
    return {}


def position(history, command):
    """Return (epochs begun, epochs done, epochs in all, steps) as the page notes them in `command`, or as the log says.

    The log is newer while a training goes on, but it does not say whether the epoch of its last line is done.
    """
    found = command.get('position')
    if isinstance(found, list) and len(found) == 4 and all(type(number) is int and 0 <= number < LARGEST
                                                           for number in found) and found[3] >= history.step:
        begun, *others = found
        return history.epoch if found[3] == history.step > 0 else begun, *others
    return history.epoch, history.epoch - (history.epoch < history.epochs), history.epochs, history.step


def epoch_shown(at, between):
    """Return in which epoch a run is, such as '2/5', from its `position`, with `between` the two numbers."""
    begun, done, epochs, _ = at
    return f'{begun:,}{between}{epochs:,}{" (not done)" if done < begun == epochs else ""}'


def write(run_dir, history, command):
    """Write the page of a run. Raises CannotWrite, also for an error of another kind: a page must stop no training."""
    path = os.path.join(run_dir, PAGE)
    try:
        history.read()
        content = page(run_dir, history, command)
    except Exception as error:
        raise CannotWrite(f'{path}: cannot be made ({type(error).__name__}: {plain(error)})') from error
    with atomic_write(path, follow_links=False) as file:  # a copy of a run may be made of links
        file.write(content.encode(errors='backslashreplace'))


def page(run_dir, history, command):
    """Return the page as a string."""
    name = os.path.basename(os.path.abspath(run_dir))
    options = run.read_options(run_dir)
    (legend, captions), at = read_captions(run_dir), position(history, command)
    parts = [f'<h1>{text(name)}</h1>', f'<p>{_summary(run_dir, options, at)}</p>',
             *_tiles(run_dir, legend, captions),
             '<h2>Losses</h2>', _losses(history), *_film(run_dir), *_measured(run_dir),
             '<h2>Options</h2>', _options(options, command.get('defaults')),
             '<h2>Commands</h2>', _commands(run_dir, options, command, captions, at)]
    as_json = html.escape(json.dumps(command, sort_keys=True, default=str))
    return document(name, GENERATOR, parts, f' data-command="{as_json}"')


def _summary(run_dir, options, at):
    facts = [f'started {started(run_dir)}', f'data: {text(options.get("dataset"))}']
    if at[2]:
        facts.append(f'epoch {epoch_shown(at, " of ")}, step {at[3]:,}')
    facts += [shown_size(size_of(run_dir)), f'this page: {time.strftime("%Y-%m-%d %H:%M")}']
    return f'<strong>{text(options.get("model"))}</strong> &middot; ' + ' &middot; '.join(facts)


def started(run_dir):
    """Return when a run was started, as its folder's name says, or else the names of its curves, or its options."""
    stamp = STARTED.search(os.path.basename(os.path.abspath(run_dir)))
    with suppress(ValueError, TypeError):
        return time.strftime('%Y-%m-%d %H:%M', time.strptime(stamp[1], '%Y%m%d_%H%M%S'))
    try:
        seconds = [int(found[1]) for found in map(EVENTS.match, os.listdir(run_dir)) if found]
        first = min(seconds, default=None) or os.path.getmtime(os.path.join(run_dir, run.OPTIONS))
        return time.strftime('%Y-%m-%d %H:%M', time.localtime(first))
    except (OSError, OverflowError, ValueError):
        return 'at an unknown time'


def size_of(folder):
    """Return the number of bytes in the files of a folder and those below it, without following links."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


def shown_size(count):
    """Return a number of bytes in a readable form."""
    for unit in ('bytes', 'kB', 'MB', 'GB'):
        if count < 1000 or unit == 'GB':
            return f'{count:.3g} {unit}' if count < 1000 else f'{count:,.0f} {unit}'
        count /= 1000


def _options(options, defaults):
    """Return the options that differ from their defaults in a table, and all others below it."""
    options = {name: _typed(value) for name, value in sorted(options.items()) if name not in ('train', 'resume')}
    defaults = {name: _typed(value) for name, value in (defaults if isinstance(defaults, dict) else {}).items()}
    changed = [name for name in options if options[name] != defaults.get(name, options[name])]
    rows = [[f'<code>--{text(name)}</code>', text(options[name]), text(defaults[name])] for name in changed]
    others = ' '.join(f'<code>--{text(name)} {text(options[name])}</code>' for name in options if name not in changed)
    return (table(['changed', 'value', 'default'], rows) if rows else '') + f'<p class="options">{others}</p>'


def _typed(value):
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return '-' if value in (None, '') else ' '.join(map(str, value)) if isinstance(value, list) else str(value)


def _losses(history):
    curves = history.curves()
    return '\n'.join(plot(name, [points]) for name, points in curves.items() if points) or '<p>None logged yet.</p>'


def _measured(run_dir):
    """Return a table of what was measured last, and curves of what was measured in the same way before."""
    lines = measurements(run_dir)
    if not lines:
        return []
    same = [line for line in lines if all(line.get(name) == lines[-1].get(name) for name in ('split', 'images'))]
    curves = {name: {line['step']: line[name] for line in same if _is_point(line.get('step'), line.get(name))}
              for name in [name for name, value in lines[-1].items() if isinstance(value, float)][:MOST]}
    plots = [plot(name, [sorted(points.items())]) for name, points in curves.items() if len(points) > 1]
    rows = [[text(name), text(value)] for name, value in as_text(lines[-1]).items()]
    return ['<h2>Measured by metrics.py</h2>', table(['', 'newest'], rows), *plots]


def _is_point(step, value):
    return type(step) is int and 0 <= step < LARGEST and isinstance(value, float) and abs(value) < LARGEST


def _commands(run_dir, options, command, captions, at):
    """Return the commands that continue the run and generate with it, as they are typed in the repository's root."""
    place = os.path.relpath(os.path.abspath(run_dir), ROOT)
    place = shlex.quote(os.path.abspath(run_dir) if place.startswith(os.pardir) else place)
    script, count = shlex.quote(plain(command.get('script', 'main.py'))), command.get('ranks')
    launcher = f'torchrun --nproc_per_node={count}' if type(count) is int and count > 1 else 'python'
    _, done, epochs, _ = at
    longer = f' --epochs {2 * epochs}' if epochs and done >= epochs else ''
    lines = [('Continue', f'{launcher} {script} --train --resume {place}{longer}')]
    if 'text' in options:
        sentence = f' --text {shlex.quote(plain(captions[0][0]))}' if captions else ''
        lines.append(('Generate', f'python {script} --train False --resume {place}{sentence}'))
    return '\n'.join(f'<h3>{title}</h3>\n<pre tabindex="0"><code>{html.escape(line)}</code></pre>'
                     for title, line in lines)


def sample_names(run_dir):
    """Return the names of a run's samples, in the order of their epochs."""
    try:
        names = [name for name in os.listdir(os.path.join(run_dir, 'samples')) if name.endswith('.png')]
        return sorted(names, key=lambda name: (len(name), name))  # epoch_10000 after epoch_9999
    except OSError:
        return []


def title_of(name):
    """Return what a sample shows, from the name of its file: 'epoch 12' for epoch_0012.png."""
    return re.sub('_0*', ' ', os.path.splitext(name)[0])


def open_sample(path):
    """Return a sample as a PIL image in RGB. Raises ValueError, in one line, if it cannot be read."""
    try:
        check_is_file(path)
        with Image.open(path, formats=['PNG']) as image:
            if image.width * image.height > PIXELS:
                raise ValueError(f'it has {image.width} x {image.height} pixels')
            return image.convert('RGB')
    except Exception as error:  # damaged files make Pillow raise errors of any kind
        raise ValueError(f'cannot be read: {plain(error, 100)}') from error


def frames(run_dir, most, width):
    """Yield figures of samples: at most so many, evenly spread over the epochs, and the newest.

    Every second, fourth, ... sample is shown, so that most figures stay the same when there are more.
    """
    names, step = sample_names(run_dir), 1
    while len(names) > most * step:
        step *= 2
    for name in dict.fromkeys([*names[::step], *names[-1:]]):
        path = os.path.join(run_dir, 'samples', name)
        try:
            shown = _shrunk(path, os.stat(path).st_mtime_ns, width)
        except (OSError, ValueError) as error:
            shown = text(error)
        yield f'<figure>{shown}<figcaption>{text(title_of(name))}</figcaption></figure>'


@functools.lru_cache(maxsize=64)
def _shrunk(path, _, width):
    """Return a sample as an element; `_` is when it was written, so that one that was replaced is read again."""
    image = open_sample(path)
    image.thumbnail((width, 4 * width))
    return picture(image, title_of(os.path.basename(path)), 'JPEG')


def _film(run_dir):
    strip = ''.join(frames(run_dir, FRAMES, FRAME))
    return ['<h2>Samples by epoch</h2>', f'<div class="film" tabindex="0" role="region" aria-label="samples by epoch">'
            f'{strip}</div>'] if strip else []


def read_captions(run_dir):
    """Return what an item of a run's samples shows, and a list of captions for each row of items; '', [] if unknown."""
    try:
        path = os.path.join(run_dir, CAPTIONS)
        check_is_file(path)
        with open(path, encoding='utf-8', errors='replace') as file:
            legend, *rows = file.read(TAIL).rstrip('\n').split('\n')
    except OSError:
        return '', []
    return legend.removeprefix('# '), [row.split('\t') for row in rows]


def _tiles(run_dir, legend, captions):
    """Return the images of the newest sample, each above its caption."""
    names = sample_names(run_dir)
    if not (names and captions):
        return []
    try:
        sheet = open_sample(os.path.join(run_dir, 'samples', names[-1]))
    except ValueError:
        return []
    columns, title, figures = len(captions[0]), title_of(names[-1]), []
    width, height = (sheet.width - LINE) // columns, (sheet.height - LINE) // len(captions)
    if min(width, height) <= LINE:
        return []
    shown = [(row, column, caption) for row, of_row in enumerate(captions)
             for column, caption in enumerate(of_row[:columns])]
    for row, column, caption in shown[:TILES]:
        x, y = column * width, row * height
        tile = sheet.crop((x + LINE, y + LINE, x + width, y + height))
        tile.thumbnail((TILE, 4 * TILE))
        figures.append(f'<figure>{picture(tile, f"{title}: {caption}", "JPEG")}'
                       f'<figcaption>{text(caption)}</figcaption></figure>')
    kind = 'tiles rows' if width > height else 'tiles'
    return [f'<h2>Images at {text(title)}</h2>', f'<p>{text(legend)}</p>',
            f'<div class="{kind}">{"".join(figures)}</div>']


