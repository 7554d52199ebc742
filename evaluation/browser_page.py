"""Lay out the page of app.py with Gradio: type a sentence, see what runs generate for it."""
import html
import os
import threading
from functools import partial

import gradio

from char_cnn_rnn import reading
from char_cnn_rnn.encoder import CharCnnRnn
from common.argument_types import is_valid_text
from common.errors import UserError
from common.page import COLORS, picture
from common.pictures import to_pil
from evaluation.compare import described, differences
from evaluation.page import losses

EXAMPLE = 'a small red bird with black wings'
LONGEST = 1000                 # characters of a sentence; the encoder reads 201
MOST_IMAGES = 8                # of a sentence
MOST_CHOSEN = 16               # images of which the most realistic is shown
LARGEST_SEED = 2 ** 31 - 1
LARGE = 256                    # pixels from which an image is shown in its own size
LEAST_LIMIT, NO_LIMIT = 0.1, 3.0  # truncation: the smallest, and that from which noise is not limited
NEAREST, PHOTOGRAPH = 4, 320   # photographs shown, and their longer side in pixels
LOCK = threading.Lock()        # the noise comes from PyTorch's global generator, so one image batch at a time

STYLE = """
.gradio-container { max-width: 960px !important; margin: 0 auto !important; }
.gradio-container .html-container, .gradio-container fieldset { overflow-wrap: anywhere; }
.gradio-container .main { padding: .5rem !important; }
.gradio-container.gradio-container.gradio-container :focus-visible {
  outline: 3px solid #3b82f6 !important; outline-offset: 2px !important; }
.gradio-container .form { gap: 1rem !important; background: none !important; border: none !important; }
.gradio-container .html-container { padding: 0 !important; }
.gradio-container h1, .gradio-container h2 { margin: 1rem 0 0; }
.runs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 1.5rem; }
.runs h3, .runs p { margin: .2rem 0; }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)); gap: 8px; }
.row img { width: 100%; margin: 0; border-radius: 4px; }
.row figure { margin: 0; }
.small { --least: 200px; }
.large { --least: 256px; }
.runs svg { max-width: 100%; height: auto; }
.runs svg text { fill: currentColor; font-size: 11px; }
.warning { border-left: 4px solid #ff9900; padding-left: .6rem; margin: .4rem 0; }
@media (max-width: 500px) { .small { --least: 160px; } }
"""
THEME = gradio.themes.Base(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace']).set(
    body_text_color_subdued='*neutral_600', body_text_color_subdued_dark='*neutral_300',
    block_info_text_color='*neutral_600', block_info_text_color_dark='*neutral_300')
# Screen readers announce changes inside an element that has this role from the beginning.
ANNOUNCED = "element.setAttribute('role', 'status')"


def build(runs):
    """Return the page, a `gradio.Blocks`, for a list of `BrowsedRun`s."""
    with gradio.Blocks(title='From a sentence to an image', analytics_enabled=False, fill_width=True) as page:
        gradio.HTML('<h1>From a sentence to an image</h1>'
                    '<p>Sentences like the captions of the photographs work best: English, colors and parts of birds.'
                    '</p>')
        sentence = gradio.Textbox(EXAMPLE, label='Sentence', max_lines=1, max_length=LONGEST)
        with gradio.Row():
            count = slider(1, MOST_IMAGES, 4, step=1, label='Number of images')
            truncation = slider(LEAST_LIMIT, NO_LIMIT, NO_LIMIT, step=0.1, label='Truncation',
                                info=f'Limits the noise; {NO_LIMIT:g} is no limit.')
            best_of = slider(1, MOST_CHOSEN, 1, step=1, label='Best of',
                             info='Shows the most realistic of so many.')
            # Its limits are checked below: Gradio would only say `Error`, and print a traceback in the terminal.
            seed = gradio.Number(1, label='Seed', info='Sets the noise.')
        chosen = gradio.CheckboxGroup([(title(run), place) for place, run in enumerate(runs)], label='Runs',
                                      value=list(range(len(runs))), info='They get the same sentence and noise.',
                                      visible=len(runs) > 1)
        button = gradio.Button('Generate images', variant='primary')
        said = gradio.HTML(js_on_load=ANNOUNCED, elem_id='said')
        images = gradio.HTML(elem_id='images')

        gradio.HTML('<h2>Nearest real captions</h2><p>Of all captions that the run was trained on, these are nearest '
                    'to the sentence. The photographs are real.</p>')
        photographs = gradio.HTML(elem_id='photographs')

        gradio.HTML('<h2>Between two sentences</h2>')
        other = gradio.Textbox(label='Second sentence', max_lines=1, max_length=LONGEST,
                               placeholder='a small blue bird with white wings')
        place = slider(0, 1, 0.5, step=0.05, label='From the first sentence (0) to the second (1)')
        said_between = gradio.HTML(js_on_load=ANNOUNCED, elem_id='said_between')
        between = gradio.HTML(elem_id='between')

        gradio.HTML('<h2>Losses during training</h2><p>Reload the page to see newer values.</p>')
        curves = gradio.HTML(elem_id='curves')

        settings = [chosen, seed, count, truncation, best_of]
        quiet = {'api_visibility': 'private', 'show_progress': 'hidden'}
        gradio.on([button.click, sentence.submit], partial(answer, runs), [sentence, *settings],
                  [said, images, photographs], trigger_mode='always_last', **quiet)
        for event in (other.submit, place.change):
            event(partial(between_two, runs), [sentence, other, place, *settings],
                  [said_between, between], trigger_mode='always_last', **quiet)
        for event in (page.load, chosen.change):
            event(partial(curves_of, runs), chosen, curves, **quiet)
    return page


def slider(*numbers, **settings):
    """Return a slider that passes on what its number box holds; `checked_number` tests it.

    While the box is empty, Gradio's own test would show `Error`, and print a traceback in the terminal.
    """
    made = gradio.Slider(*numbers, buttons=[], **settings)
    made.preprocess = lambda value: value
    return made


def title(run):
    """Return how a run is called on the page."""
    return f'{run.name} ({run.section}, {run.step:,} steps)'


def answer(runs, sentence, numbers, seed, count, truncation, best_of):
    """Yield (status, images, nearest captions) for a sentence, as HTML; the first time, that it is being worked on.

    `numbers` are those of the chosen `runs`. A `truncation` of `NO_LIMIT` is none. Of every `best_of` images, the most
    realistic is shown.
    """
    try:
        sentence, chosen = checked(sentence), _of(runs, numbers)
        seed, count, truncation, best_of = checked_settings(seed, count, truncation, best_of)
        yield 'Generating images ...', '', ''
        embeddings = [run.embed(sentence) for run in chosen]
        columns = [_generate(run, embedding, seed, count, truncation, best_of)
                   for run, embedding in zip(chosen, embeddings)]
        yield (_status(f'{count} {"image" if count == 1 else "images"} of "{sentence}"', [sentence], chosen),
               _images(chosen, columns, sentence),
               '\n'.join(_photographs(run, embedding) for run, embedding in _by_data(chosen, embeddings)))
    except UserError as error:
        yield _warning(error), '', ''


def between_two(runs, first, second, place, numbers, seed, count, truncation, best_of):
    """Yield (status, images) for the sentence at `place`, from 0, the first one, to 1, the second one, as HTML."""
    try:
        first, second = checked(first), checked(second, 'second sentence')
        chosen, place = _of(runs, numbers), checked_number('place between the sentences', place, 0, 1)
        seed, count, truncation, best_of = checked_settings(seed, count, truncation, best_of)
        yield 'Generating images ...', gradio.skip()
        columns = [_generate(run, run.embed(first).lerp(run.embed(second), place), seed, count, truncation, best_of)
                   for run in chosen]
        where = f'{place:.0%} of the way from "{first}" to "{second}"'
        yield _status(where, [first, second], chosen), _images(chosen, columns, where)
    except UserError as error:
        yield _warning(error), ''


def curves_of(runs, numbers):
    """Return the losses of the `runs` with these numbers over one another, as HTML."""
    chosen = [runs[number] for number in sorted(numbers or ())]
    names = ''.join(f'<p><span style="color:{COLORS[place % len(COLORS)]}">&#9632;</span> {html.escape(title(run))}'
                    '</p>' for place, run in enumerate(chosen))
    return f'{names}<div class="runs">{losses(chosen)}</div>' if chosen else ''


def checked(sentence, name='sentence'):
    """Return a sentence without surplus spaces. Raises UserError if it is empty, too long, or no text."""
    sentence = ' '.join((sentence or '').split())
    if not sentence:
        raise UserError(f'The {name} is empty; type one, such as: {EXAMPLE}')
    if len(sentence) > LONGEST:
        raise UserError(f'The {name} has more than {LONGEST:,} characters; type a shorter one')
    if not is_valid_text(sentence):
        raise UserError(f'The {name} has control characters; type it again')
    return sentence


def checked_settings(seed, count, truncation, best_of):
    """Return the four numbers. Raises UserError as `checked_number` does."""
    return (checked_number('seed', seed, 0, LARGEST_SEED, int),
            checked_number('number of images', count, 1, MOST_IMAGES, int),
            checked_number('truncation', truncation, LEAST_LIMIT, NO_LIMIT),
            checked_number('"best of"', best_of, 1, MOST_CHOSEN, int))


def checked_number(name, value, least, most, kind=float):
    """Return a number of a type. Raises UserError if it is missing, of another type, or out of bounds."""
    if not isinstance(value, int | float) or not least <= value <= most or kind(value) != value:
        what = 'a whole number' if kind is int else 'a number'
        raise UserError(f'The {name} is {"empty" if value in (None, "") else value}; type {what} from {least:,} to '
                        f'{most:,}')
    return kind(value)


def _of(runs, numbers):
    """Return the runs with these numbers, in their order. Raises UserError if there is none."""
    chosen = [runs[number] for number in sorted(numbers or ())]
    if not chosen:
        raise UserError('No run is chosen; choose one')
    return chosen


def _generate(run, embedding, seed, count, truncation, best_of):
    """Return images of all sizes, as `TrainedRun.all_sizes` does, for `count` times the embedding [1, D]."""
    with LOCK:
        return run.all_sizes(embedding.repeat(count, 1), seed, truncation if truncation < NO_LIMIT else None, best_of)


def _status(done, sentences, runs):
    """Return what was done, and warnings, as HTML."""
    is_letters = any(isinstance(run.encoder, CharCnnRnn) for run in runs)  # others read other letters
    lines = [*(reading.unread_lines(sentences) if is_letters else ()), *(run.remark for run in runs if run.remark)]
    return f'<p>{html.escape(done)}</p>' + ''.join(map(_warning, lines))


def _warning(line):
    return f'<p class="warning">{html.escape(str(line))}</p>'


def _images(runs, columns, sentence):
    """Return a block for each run, side by side, with a row for each size of its images, as HTML."""
    blocks = []
    for place, (run, all_sizes) in enumerate(zip(runs, columns)):
        what = _what_differs(runs, place)
        heading = f'<h3>{html.escape(title(run))}</h3>' + (what and f'<p>{html.escape(what)}</p>')
        blocks.append(f'<section>{heading}{"".join(_row(images, sentence) for images in all_sizes)}</section>')
    return f'<div class="runs">{"".join(blocks)}</div>'


def _what_differs(runs, place):
    """Return in what the run at `place` differs from others of the same GAN, options as they are typed."""
    same = [number for number, run in enumerate(runs) if run.section == runs[place].section]
    options = differences([described(runs[number]) for number in same])[same.index(place)]
    return ' '.join(f'{name} {value}' for name, value in options.items())


def _row(images, sentence):
    size = images.shape[-1]
    shown = [picture(to_pil(image), f'{sentence}, image {number} of {len(images)}, {size} pixels')
             for number, image in enumerate(images, 1)]
    return (f'<p>{size} x {size} pixels</p><div class="row {"large" if size >= LARGE else "small"}">{"".join(shown)}'
            '</div>')


def _by_data(runs, embeddings):
    """Return pairs (run, embedding), of runs with the same data and the same embedding only the first."""
    found = {}
    for run, embedding in zip(runs, embeddings):
        found.setdefault((run.hdf5_file, embedding.numpy().tobytes()), (run, embedding))
    return found.values()


def _photographs(run, embedding):
    """Return the photographs with the captions nearest to an embedding [1, D], or why there are none, as HTML."""
    if run.captions is None:
        return f'<p>No photographs of {html.escape(title(run))}: {html.escape(run.no_captions)}</p>'
    try:
        found = run.nearest(embedding, NEAREST)
    except UserError as error:
        return _warning(error)
    figures = []
    for caption, photograph in found:
        photograph.thumbnail((PHOTOGRAPH, PHOTOGRAPH))
        figures.append(f'<figure>{picture(photograph, f"photograph: {caption}", "JPEG")}'
                       f'<figcaption>{html.escape(caption)}</figcaption></figure>')
    name = html.escape(os.path.basename(run.hdf5_file))
    return f'<p>From {name}</p><div class="row small">{"".join(figures)}</div>'
