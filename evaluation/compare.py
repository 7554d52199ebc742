"""Put runs of the three GANs side by side: the same sentences, the same noise, one column per run.

    python evaluation/compare.py RUN RUN... [--text SENTENCE] [--text_file FILE] [--out compare.png]

Writes a sheet, and beside it a page for the browser (compare.html) that also shows the options in which the runs
differ, their losses and samples during training, and what metrics.py has measured.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path.insert(0, ROOT)

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # while the imports take seconds

import argparse
import textwrap

import torch
from PIL import Image, ImageDraw, ImageFont

from char_cnn_rnn import reading
from common import flags
from common.errors import UserError, run_command
from common.files import atomic_write
from common.page import head_of
from common.pictures import font_and_text, letter_width, to_pil
from evaluation.page import GENERATOR, page
from evaluation.trained_runs import TrainedRun

SIDE, GAP = 96, 8          # pixels of an image on the sheet, and between two of them
LETTER, LINE = 6, 15       # pixels of a letter and of a line of text
CAPTION = 30               # letters in a line of a caption
ROWS = 256                 # sentences on a sheet
SHOWN = 8                  # held-out captions that are shown if no sentence is given
LONGEST = 100              # letters of a value that is shown
# Options that say where a run is and how it computes, not what it learns.
NOT_SHOWN = {'--cache', '--compile', '--count', '--cuda', '--data_dir', '--encoder', '--gpu', '--keep',
             '--log_interval', '--model', '--out_dir', '--precision', '--resume', '--text', '--text_file', '--train',
             '--workers'}


def main():
    """Generate the images of every run, and write the sheet and the page."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=flags.path, metavar='RUN', help='run folders of the three GANs')
    parser.add_argument('--text', action='append', metavar='SENTENCE',
                        help=f'sentence; can be repeated (default: {SHOWN} captions of /test of the first run\'s data)')
    parser.add_argument('--text_file', type=flags.path, metavar='FILE', help='file of sentences, one per line')
    parser.add_argument('--seed', type=flags.seed, default=1, help='seed of the noise (default: 1)')
    parser.add_argument('--out', type=flags.path, default='compare.png', metavar='FILE',
                        help='PNG file to write; the page has the same name with .html (default: compare.png)')
    options = parser.parse_args()
    if not options.out.lower().endswith('.png'):
        raise UserError(f'--out {options.out}: is written as a PNG; give a name that ends in .png')
    page_file = f'{os.path.splitext(options.out)[0]}.html'
    check_are_ours(options.out, page_file)
    device = flags.choose_device(torch.cuda.is_available())
    runs = [TrainedRun(path, device) for path in options.runs]
    if options.text or options.text_file:
        sentences = flags.read_sentences(options.text, options.text_file)
    else:
        sentences = held_out_captions(runs[0])
        if len({run.learned_from['captions'] for run in runs}) > 1:
            print(f'The sentences are captions of /test of {runs[0].hdf5_file}; a run with other data may have been '
                  'trained on them.')
    if len(sentences) > ROWS:
        raise UserError(f'{len(sentences)} sentences: too many for one sheet; give {ROWS} or fewer')
    columns = [generate(run, sentences, options.seed, device) for run in runs]
    differing = differing_options(runs)
    sections = [run.section for run in runs] if len({run.section for run in runs}) > 1 else [''] * len(runs)
    titles = [f'{section} {title_of(of_run)}, {run.step:,} steps'.strip()
              for section, run, of_run in zip(sections, runs, differing)]
    with atomic_write(options.out) as file:
        sheet(columns, titles, sentences).save(file, 'PNG')
    with atomic_write(page_file) as file:
        file.write(page(runs, differing, sentences, columns).encode(errors='backslashreplace'))
    print(f'{len(runs)} runs, {len(sentences)} sentences: {options.out} and {page_file}')


def check_are_ours(sheet_file, page_file):
    """Raise UserError if either file exists and another program wrote it: a sheet always has its page beside it."""
    for path, reason in ((page_file, 'was not written by this program'),
                         (sheet_file, 'has no page of this program beside it')):
        if os.path.lexists(path) and head_of(page_file, GENERATOR) is None:
            raise UserError(f'{path}: exists and {reason}, so it is not replaced; give another name with --out')


def held_out_captions(run):
    """Return captions spread over /test of a run's data. Raises UserError if it has none."""
    try:
        captions = run.dataset('test').captions
    except UserError as error:
        raise UserError(f'{error}; or give sentences with --text') from error
    places = torch.linspace(0, len(captions) - 1, min(SHOWN, len(captions))).long().tolist()
    return list(dict.fromkeys(' '.join(captions[place].split()) for place in places))


def generate(run, sentences, seed, device):
    """Return images of a run for the sentences, [B, 3, S, S] in [-1, 1] on the CPU."""
    embeddings, _ = reading.read(sentences, run.file, run.model.data, None, run.hdf5_file, device, run.embed_dim)
    return run.generate(embeddings, seed)


def described(run):
    """Return everything in which a run can differ from others: its options as typed, --NAME, and its data."""
    return {**{f'--{name}': value for name, value in run.options.items()}, **run.learned_from}


def differing_options(runs):
    """Return the `differences` of each run from all others, and those from the others of the same GAN."""
    found = differences([described(run) for run in runs])
    for section in {run.section for run in runs}:
        same = [number for number, run in enumerate(runs) if run.section == section]
        for number, within in zip(same, differences([described(runs[number]) for number in same])):
            found[number] = dict(sorted({**found[number], **within}.items()))
    return found


def differences(all_options):
    """Return, for each run, the `described` entries whose values differ between the runs: a dict of strings.

    Entries that not all runs have, such as options of another section, are left out.
    """
    def whole(options, name):  # a default of 50 and a typed 50.0 are the same
        value = options[name]
        return str(int(value) if isinstance(value, float) and value.is_integer() else value)

    names = sorted(set.intersection(*map(set, all_options)) - NOT_SHOWN)
    differing = [name for name in names if len({whole(one, name) for one in all_options}) > 1]
    return [{name: shortened(whole(one, name)) for name in differing} for one in all_options]


def shortened(value):
    """Return the end of a long value, a path, in which two are more likely to differ."""
    return value if len(value) <= LONGEST else f'...{value[3 - LONGEST:]}'


def title_of(differing):
    """Return what differs in one line, options as they are typed."""
    return ' '.join(f'{name} {value}' for name, value in differing.items()) or 'the same options'


def sheet(columns, titles, sentences):
    """Return one PIL image: a row per sentence, which stands at its left, and a column per run, under its title."""
    font, left = ImageFont.load_default(11), CAPTION * LETTER + 2 * GAP
    wrapped = [textwrap.wrap(title, SIDE // LETTER) for title in titles]
    top = max(map(len, wrapped)) * LINE + 2 * GAP
    image = Image.new('RGB', (left + len(columns) * (SIDE + GAP), top + len(sentences) * (SIDE + GAP)), 'white')
    pen = ImageDraw.Draw(image)
    for row, sentence in enumerate(sentences):
        letters, text = font_and_text(sentence)
        text = textwrap.fill(text, CAPTION * LETTER // letter_width(text), max_lines=SIDE // LINE, placeholder=' ...')
        pen.multiline_text((GAP, top + row * (SIDE + GAP)), text, 'black', letters)
    for column, (images, lines) in enumerate(zip(columns, wrapped)):
        x = left + column * (SIDE + GAP)
        pen.multiline_text((x, GAP), '\n'.join(lines), 'black', font)
        for row, one in enumerate(images):
            image.paste(to_pil(one).resize((SIDE, SIDE), Image.Resampling.BICUBIC), (x, top + row * (SIDE + GAP)))
    return image


if __name__ == '__main__':
    run_command(main)
