"""Lay out a comparison of runs as one HTML file, without scripts and without references to other files."""
import os

from common.history import logged, measured_alike
from common.page import COLORS, document, picture, plot, table, text
from common.pictures import to_pil
from common.run_page import frames

FRAMES, FRAME = 6, 260  # samples shown of each run, and their width in pixels
GENERATOR = 'evaluation/compare.py'


def page(runs, differing, sentences, columns):
    """Return the page as a string, for `TrainedRun`s.

    `differing` has a dict for each run of what differs, the options as typed, and `columns` has its images,
    [B, 3, S, S] in [-1, 1], one for each of the sentences.
    """
    names = [os.path.basename(os.path.abspath(run.folder)) for run in runs]
    heads = [f'<span style="color:{COLORS[i % len(COLORS)]}">&#9632;</span> {text(name)}'
             for i, name in enumerate(names)]
    parts = ['<h1>Runs side by side</h1>', '<h2>What differs</h2>', _options(runs, heads, differing),
             '<h2>Images of the same sentences and the same noise</h2>', _images(heads, sentences, columns),
             '<h2>Losses</h2>', losses(runs), '<h2>Measured by metrics.py</h2>', _metrics(runs, heads),
             '<h2>Samples during training</h2>', _films(runs, heads)]
    return document(', '.join(names), GENERATOR, parts)


def _options(runs, heads, differing):
    names = sorted({name for of_run in differing for name in of_run})
    rows = [[f'<code>{text(name)}</code>', *(text(of_run.get(name, '')) for of_run in differing)] for name in names]
    return table(['', *heads], [['section', *(run.section for run in runs)], *rows,
                                ['steps', *(f'{run.step:,}' for run in runs)],
                                ['epochs', *(str(run.epoch) for run in runs)]])


def _images(heads, sentences, columns):
    rows = [[text(sentence), *(picture(to_pil(images[row]), sentence) for images in columns)]
            for row, sentence in enumerate(sentences)]
    return table(['', *heads], rows, 'images')


def losses(runs):
    """Return figures of the losses of `TrainedRun`s over one another, each run in the color of its place, as HTML."""
    curves = [logged(run.folder) for run in runs]
    names = list(dict.fromkeys(name for of_run in curves for name in of_run))
    return '\n'.join(plot(name, [of_run.get(name, []) for of_run in curves]) for name in names) or (
        '<p>No run has a log of its losses.</p>')


def _metrics(runs, heads):
    found = measured_alike([run.folder for run in runs])
    names = list(dict.fromkeys(name for of_run in found for name in of_run))
    if not names:
        return '<p>Nothing yet: <code>python evaluation/metrics.py RUN RUN...</code> measures runs.</p>'
    return table(['', *heads], [[text(name), *(text(of_run.get(name, '')) for of_run in found)] for name in names])


def _films(runs, heads):
    return '\n'.join(f'<h3>{head}</h3>\n<div>{"".join(frames(run.folder, FRAMES, FRAME)) or "no samples"}</div>'
                     for run, head in zip(runs, heads))
