"""Read the bounding box of a photograph from CUB's list, from YOLO's text file or from Pascal VOC's XML file.

Except for `read_boxes`, functions return (x, y, width, height) in pixels of the photograph as it is seen, with x and y
of the upper left corner, or None without a box. They raise ValueError with the reason if it cannot be used.
"""
import os
from collections import Counter
from xml.parsers import expat

import numpy as np

from common.errors import UserError
from data.bounded_files import contents, read_numbered

MAX_BYTES = 1 << 20  # of a photograph's file of boxes
MAX_COORDINATE = 1e9  # pixels; boxes are stored as float32, which is exact only for small numbers
DEPTH = ('annotation', 'object', 'bndbox')  # where an XML file has the sides of a box
SIDES = ('xmin', 'ymin', 'xmax', 'ymax')


def read_boxes(boxes_path, images_path, pairs, advice):
    """Return {image number: text of its box} for the (number, path) pairs of images.txt at `images_path`.

    There are none without the file. Raises UserError with `advice` if it is not clear whose box a line is.
    """
    boxes = read_numbered(boxes_path, advice) if os.path.exists(boxes_path) else []
    for path, numbered in ((images_path, pairs), (boxes_path, boxes)):
        number, count = Counter(number for number, _ in numbered).most_common(1)[0] if numbered else (None, 1)
        if count > 1:
            raise UserError(f'{path}: {count} lines have the number {number}, so boxes are ambiguous; {advice}')
    boxes = dict(boxes)
    if boxes and ('0' in boxes) != ('0' in dict(pairs)):  # photographs may lack boxes, and boxes photographs
        raise UserError(f'{boxes_path}: only one of this file and images.txt counts from 0, so boxes would be of '
                        'the wrong photographs; number both the same way')
    return boxes


def read_box(text):
    """Return (x, y, width, height) in pixels, or None without a box. Raises ValueError if the numbers are not valid."""
    if text is None:
        return None
    try:
        box = tuple(map(float, text.split()))
    except ValueError:
        box = ()
    if len(box) != 4 or not _is_valid(box):
        raise ValueError(f'its bounding box {text[:60]!r} is not x, y, width and height')
    if max(box) <= 1:
        raise ValueError(f'its bounding box {text[:60]!r} is in fractions of the image, as in files for YOLO; give '
                         'x and y of the upper left corner, width and height in pixels')
    return box


def _is_valid(box):
    return all(abs(number) < MAX_COORDINATE for number in box) and min(np.float32(box[2:])) > 0


def to_stored_orientation(box, size, orientation):
    """Convert a box (x, y, width, height) in the upright image to the stored image, to which `data.layout` refers.

    `size` is (width, height) of the stored image, and `orientation` the EXIF orientation that turns it upright.
    """
    (x, y, w, h), (width, height) = box, size
    return {2: (width - x - w, y, w, h), 3: (width - x - w, height - y - h, w, h), 4: (x, height - y - h, w, h),
            5: (y, x, h, w), 6: (y, height - x - w, h, w), 7: (width - y - h, height - x - w, h, w),
            8: (width - y - h, x, h, w)}.get(orientation, box)


def read_yolo(path, size):
    """Return the box around all boxes of a YOLO file, for an upright image of `size` (width, height).

    A line is CLASS, then x and y of the center, width and height, all four in fractions of the image.
    """
    boxes = []
    for line in _text(path).splitlines():
        if not line.strip():
            continue
        try:
            x, y, width, height = map(float, line.split()[1:])
        except ValueError as error:
            raise ValueError(f'its line {line[:60]!r} of boxes is not a class and four numbers') from error
        if not all(0 <= number <= 1 for number in (x, y, width, height)):
            raise ValueError(f'its line {line[:60]!r} of boxes has numbers that are not fractions of the image')
        boxes.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
    return _around([tuple(side * size[k % 2] for k, side in enumerate(box)) for box in boxes])


def read_voc(path, size):
    """Return the box around all boxes of an XML file of Pascal VOC, for an upright image of `size` (width, height).

    Its sides are counted from 1, and belong to the box. Nothing is expanded: a document type is refused.
    """
    found, sides, at, text = [], {}, [], []

    def start(name, _):
        at.append(name)
        text.clear()

    def end(name):
        where = tuple(at)
        at.pop()
        if where[:-1] == DEPTH:
            sides[name] = ''.join(text)
        elif where == DEPTH:
            found.append([_number(sides.get(side, '')) for side in SIDES])
            sides.clear()
        elif where[:-1] == ('annotation', 'size') and name in ('width', 'height'):
            given, real = _number(''.join(text)), size[name == 'height']
            if given not in (0, real):  # some programs write 0
                raise ValueError(f'its boxes are of an image with a {name} of {given:.0f} pixels, but it has {real}')

    def refuse(*_):
        raise ValueError('its boxes have a document type, which is not read')

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = text.append, refuse
    try:
        parser.Parse(_bytes(path), True)
    except (expat.ExpatError, LookupError) as error:  # of an unknown encoding
        raise ValueError(f'its boxes are not valid XML ({error})') from error
    return _around([(left - 1, top - 1, right, bottom) for left, top, right, bottom in found])


def _around(boxes):
    """Return (x, y, width, height) around boxes (left, top, right, bottom), or None if there are none."""
    if not boxes:
        return None
    left, top, right, bottom = zip(*boxes)
    box = min(left), min(top), max(right) - min(left), max(bottom) - min(top)
    if not _is_valid(box) or not all(one[0] < one[2] and one[1] < one[3] for one in boxes):
        raise ValueError('one of its boxes has no area')
    if max(box) <= 1:  # in a file, this means fractions
        raise ValueError('its boxes have only the first pixel')
    return box


def _number(text):
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f'its boxes have {text[:60]!r} in place of a number') from error


def _bytes(path):
    return contents(path, 'its file of boxes is', MAX_BYTES)


def _text(path):
    try:
        return _bytes(path).decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'its file of boxes is unreadable ({error})') from error
