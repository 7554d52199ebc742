"""Put runs of text2image side by side: the same sentences, the same noise, one column per run.

    python evaluation/compare.py RUN RUN... --text SENTENCE [--text_file FILE] [--out compare.png]

Above each column are the options in which its run differs from the others, and its number of training steps.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # while the imports take seconds

import argparse
import textwrap

import torch
from PIL import Image, ImageDraw, ImageFont

from char_cnn_rnn import reading
from common import checkpoint, flags, run
from common.errors import UserError, run_command
from common.files import atomic_write
from common.pictures import font_and_text, letter_width, to_pil
from common.sampling import in_batches
from text2image import checkpoints
from text2image.build_gan import load_generator

SIDE, GAP = 96, 8          # pixels of an image on the sheet, and between two of them
LETTER, LINE = 6, 14       # pixels of a letter and of a line of text
CAPTION = 30               # letters in a line of a caption
BATCH, ROWS = 64, 256      # images generated at once, and sentences on a sheet
# Options that say where a run is and how it computes, not what it learns.
NOT_SHOWN = {'compile', 'cuda', 'data_dir', 'encoder', 'keep', 'log_interval', 'model', 'out_dir',
             'precision', 'resume', 'text', 'text_file', 'train'}


def main():
    """Generate the images of every run and write the sheet."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=flags.path, metavar='RUN', help='run folders of text2image')
    parser.add_argument('--text', action='append', metavar='SENTENCE', help='sentence; can be repeated')
    parser.add_argument('--text_file', type=flags.path, metavar='FILE', help='file of sentences, one per line')
    parser.add_argument('--seed', type=flags.seed, default=1, help='seed of the noise (default: 1)')
    parser.add_argument('--out', type=flags.path, default='compare.png', metavar='FILE',
                        help='PNG file to write (default: compare.png)')
    options = parser.parse_args()
    if not options.out.lower().endswith('.png'):
        raise UserError(f'--out {options.out}: is written as a PNG; give a name that ends in .png')
    sentences = flags.read_sentences(options.text, options.text_file)
    if len(sentences) > ROWS:
        raise UserError(f'{len(sentences)} sentences: too many for one sheet; give {ROWS} or fewer')
    device = flags.choose_device(torch.cuda.is_available())
    columns = [generate(path, sentences, options.seed, device) for path in options.runs]
    titles = differences([run_options for run_options, _, _ in columns])
    titles = [f'{title}, {steps:,} steps' for title, (_, steps, _) in zip(titles, columns)]
    with atomic_write(options.out) as file:
        sheet([images for _, _, images in columns], titles, sentences).save(file, 'PNG')
    print(f'{len(columns)} runs, {len(sentences)} sentences: {options.out}')


def generate(path, sentences, seed, device):
    """Return (the options of a run, its number of training steps, images [B, 3, 64, 64] for the sentences)."""
    file = run.existing(path, 'text2image', checkpoints.find)
    model, _ = load_generator(file, device=device)
    if not model.options:
        raise UserError(f'{file}: is no checkpoint of a run, which says what it was trained with; give a run folder')
    hdf5_file = run.dataset_of(model.options, file)
    embeddings = reading.read(sentences, file, model.data, None, hdf5_file, device)
    steps = checkpoint.count_in(checkpoint.load(file, mapped=True), file, 'step')
    images = in_batches(model.generate, embeddings, BATCH, seed)
    return model.options, steps, torch.cat([part.cpu() for part in images])


def differences(all_options):
    """Return for each run a line with the options in which it differs from another one."""
    def shown(options, name):  # a default of 50 and a typed 50.0 are the same
        value = options.get(name)
        return f'{value:g}' if type(value) in (int, float) else str(value)

    names = sorted(set.union(*map(set, all_options)) - NOT_SHOWN)
    differing = [name for name in names if len({shown(one, name) for one in all_options}) > 1]
    return [' '.join(f'--{name} {shown(one, name)}' for name in differing) or 'the same options' for one in all_options]


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
