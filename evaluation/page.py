"""Lay out a comparison of runs as one HTML file, without scripts and without references to other files."""
import base64
import html
import io
import json
import os
import re
from contextlib import suppress

from common.files import check_is_file
from common.log import LOG
from common.pictures import to_pil
from data.pictures import BadPicture, read_picture

POINTS, WIDTH, HEIGHT = 300, 560, 200  # of a curve: points at most, and pixels
FRAMES, FRAME = 6, 260                 # samples shown of each run, and their width in pixels
LONGEST = 50_000_000                   # characters of a log that are read
MOST = 20                              # losses, and measures, of a run that are shown
GENERATOR = '<meta name="generator" content="evaluation/compare.py">'
COLORS = ('#3366cc', '#dc3912', '#109618', '#ff9900', '#990099', '#0099c6', '#dd4477', '#66aa00')
LOGGED = re.compile(r'^epoch \S+  step (\d{1,15})  (.*)  \S+ \S+/s$')
STYLE = """
:root { color-scheme: light dark; --line: #8884; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
.wide { overflow-x: auto; }
figure { display: inline-block; margin: 0 1rem 1rem 0; }
figcaption { font-size: .85rem; }
svg { max-width: 100%; height: auto; }
svg text { fill: currentColor; font-size: 11px; }
.images img { width: 128px; image-rendering: auto; }
"""


def page(runs, differing, sentences, columns):
    """Return the page, a text, for `TrainedRun`s.

    `differing` has a dict for each run of the options in which it differs, and `columns` has its images, [B, 3, S, S]
    in [-1, 1], one for each of the sentences.
    """
    names = [os.path.basename(os.path.abspath(run.folder)) for run in runs]
    heads = [f'<span style="color:{COLORS[i % len(COLORS)]}">&#9632;</span> {html.escape(name)}'
             for i, name in enumerate(names)]
    parts = ['<h1>Runs side by side</h1>', '<h2>What differs</h2>', _options(runs, heads, differing),
             '<h2>Images of the same sentences and the same noise</h2>', _images(heads, sentences, columns),
             '<h2>Losses</h2>', losses(runs), '<h2>Measured by metrics.py</h2>', _metrics(runs, heads),
             '<h2>Samples during training</h2>', _films(runs, heads)]
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{GENERATOR}\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<title>{html.escape(", ".join(names))}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n'
            + '\n'.join(parts) + '\n</body>\n</html>\n')


def _table(head, rows, kind=''):
    """Return a table; its cells are HTML."""
    lines = [f'<tr>{"".join(f"<th>{cell}</th>" for cell in head)}</tr>']
    lines += [f'<tr><th>{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows]
    return f'<div class="wide"><table class="{kind}">\n' + '\n'.join(lines) + '\n</table></div>'


def _options(runs, heads, differing):
    rows = [[f'<code>--{html.escape(name)}</code>', *(html.escape(of_run[name]) for of_run in differing)]
            for name in differing[0]]
    return _table(['', *heads], [['section', *(run.section for run in runs)], *rows,
                                 ['steps', *(f'{run.step:,}' for run in runs)],
                                 ['epochs', *(str(run.epoch) for run in runs)]])


def _images(heads, sentences, columns):
    rows = [[html.escape(sentence), *(picture(to_pil(images[row]), sentence) for images in columns)]
            for row, sentence in enumerate(sentences)]
    return _table(['', *heads], rows, 'images')


def picture(image, text, file_format='PNG'):
    """Return an image as an element that contains its own bytes."""
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    code = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/{file_format.lower()};base64,{code}" alt="{html.escape(text)}">'


def losses(runs):
    """Return figures of the losses of `TrainedRun`s over one another, each run in the color of its place, as HTML."""
    curves = [logged(run.folder) for run in runs]
    names = list(dict.fromkeys(name for of_run in curves for name in of_run))
    return '\n'.join(_plot(name, [of_run.get(name, []) for of_run in curves]) for name in names) or (
        '<p>No run has a log of its losses.</p>')


def logged(folder):
    """Return {name of a loss: [(step, value), ...]} from a run's log; of steps that were repeated, the last."""
    found = {}
    for step, losses in (match.groups() for match in map(LOGGED.match, _text(folder, LOG).splitlines()) if match):
        for name, value in re.findall(r'([^\s]{1,40}) (\S+)', losses):
            if name in found or len(found) < MOST:
                with suppress(ValueError):
                    found.setdefault(name, {})[int(step)] = float(value)
    return {name: sorted((step, value) for step, value in points.items() if abs(value) < float('inf'))
            for name, points in found.items()}


def _text(folder, name):
    """Return the text of a file in a run folder, or '' if there is none."""
    path = os.path.join(folder, name)
    try:
        check_is_file(path)
        with open(path, encoding='utf-8', errors='replace') as file:
            return file.read(LONGEST)
    except OSError:
        return ''


def _plot(name, curves):
    """Return a figure with one curve for each run."""
    curves = [_thinned(points) for points in curves]
    steps, values = zip(*(point for points in curves for point in points)) if any(curves) else ((0,), (0,))
    low, high, last = min(values), max(values), max(*steps, 1)
    scale = (HEIGHT - 40) / ((high - low) or 1)
    lines = [f'<polyline fill="none" stroke="{COLORS[i % len(COLORS)]}" stroke-width="1.5" points="' + ' '.join(
        f'{50 + (WIDTH - 60) * step / last:.1f},{HEIGHT - 25 - scale * (value - low):.1f}' for step, value in points)
        + '"/>' for i, points in enumerate(curves)]
    return (f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{html.escape(name)}">'
            f'<text x="0" y="20">{high:.4g}</text><text x="0" y="{HEIGHT - 25}">{low:.4g}</text>'
            f'<text x="50" y="{HEIGHT - 5}">0</text>'
            f'<text x="{WIDTH - 10}" y="{HEIGHT - 5}" text-anchor="end">step {last:,.0f}</text>'
            f'{"".join(lines)}</svg><figcaption>{html.escape(name)}</figcaption></figure>')


def _thinned(points):
    """Return at most POINTS points, each the mean of neighbors."""
    size = -(-len(points) // POINTS) or 1
    groups = [points[start:start + size] for start in range(0, len(points), size)]
    return [tuple(sum(values) / len(group) for values in zip(*group)) for group in groups]


def _metrics(runs, heads):
    found = [measured(run.folder) for run in runs]
    names = list(dict.fromkeys(name for of_run in found for name in of_run))
    if not names:
        return '<p>Nothing yet: <code>python evaluation/metrics.py RUN RUN...</code> measures runs.</p>'
    return _table(['', *heads], [[html.escape(name), *(html.escape(of_run.get(name, '')) for of_run in found)]
                                 for name in names])


def measured(folder):
    """Return the newest line of a run's metrics.jsonl as {name: text}; {} if there is none, or it is damaged."""
    with suppress(ValueError, RecursionError):
        for newest in map(json.loads, _text(folder, 'metrics.jsonl').splitlines()[-1:]):
            items = list(newest.items() if isinstance(newest, dict) else ())[:MOST]
            return {name[:40]: f'{value:.4g}' if isinstance(value, float) else str(value)[:40] for name, value in items}
    return {}


def _films(runs, heads):
    return '\n'.join(f'<h3>{head}</h3>\n<div>{"".join(_frames(run.folder)) or "no samples"}</div>'
                     for run, head in zip(runs, heads))


def _frames(folder):
    """Yield figures of samples, evenly spread over the epochs, the newest last."""
    folder = os.path.join(folder, 'samples')
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith('.png'))
    except OSError:
        names = []
    count = min(FRAMES, len(names))
    for place in range(count):
        name = names[(len(names) - 1) * place // (count - 1) if count > 1 else -1]
        caption = os.path.splitext(name)[0].replace('_', ' ')
        try:
            check_is_file(os.path.join(folder, name))
            image = read_picture(os.path.join(folder, name))
        except (OSError, BadPicture) as error:
            shown = html.escape(str(error))
        else:
            image.thumbnail((FRAME, 4 * FRAME))
            shown = picture(image, caption, 'JPEG')
        yield f'<figure>{shown}<figcaption>{html.escape(caption)}</figcaption></figure>'
