"""Read the files of CUB-200-2011 and its captions as published: class lists, photographs, boxes, sentences.

One photograph that cannot be used does not stop the conversion: `read_photograph` raises ValueError with the reason. If
a whole folder cannot be used, functions raise UserError.
"""
import io
import json
import os
import re
import unicodedata
from collections import Counter, namedtuple

import numpy as np
from PIL import ExifTags, ImageOps, UnidentifiedImageError

from common.errors import UserError
from common.files import check_is_file
from data import layout
from data.pictures import PIXELS, on_white, opened
from data.plain_hdf5 import TEXT_BYTES

DEFAULT_SPLIT = os.path.join(os.path.dirname(os.path.realpath(__file__)), 'split_150_50.json')

MAX_BYTES = {'list': 64 << 20, 'captions': 16 << 20, 'photograph': 4 * PIXELS}  # of a file that is read
MAX_CAPTIONS = 1000  # of a photograph
MAX_COORDINATE = 1e9  # pixels; boxes are stored as float32, which is exact only for small numbers

SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height

# A line of images.txt; `key` is CLASS/NAME, `box` the text after the photograph's number in bounding_boxes.txt.
Entry = namedtuple('Entry', 'split class_name name key image_path text_path box')

NO_BOX, BOX_OUTSIDE, MADE_JPEG = 'no bounding box', 'bounding box reaches outside', 'stored as JPEG'
CONTROL = re.compile(r'[\x00-\x1f\x7f-\x9f]')  # control characters, which a terminal may obey
REMARKS = {  # about photographs that are used nevertheless
    NO_BOX: 'bounding_boxes.txt is absent or does not name them',
    BOX_OUTSIDE: 'bounding_boxes.txt gives x, y, width and height in pixels, with x and y of the upper left corner',
    MADE_JPEG: 'they were PNG or WebP; transparent areas are now white',
}


def read_lines(path, advice):
    """Return the lines of a UTF-8 text file, with any line ends, without blank ones. Raises UserError with `advice`."""
    try:
        check_is_file(path)
        if os.path.getsize(path) > MAX_BYTES['list']:
            raise OSError(f'it has {os.path.getsize(path):,} bytes; the limit is {MAX_BYTES["list"]:,}')
        with open(path, encoding='utf-8-sig') as file:
            return [line.strip() for line in file if line.strip()]
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror or error}); {advice}') from error
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: is not a UTF-8 text file; {advice}') from error


def read_split(list_paths):
    """Return {class name: split} from `list_paths`, {split: paths of class lists}, or else for the 150/50 split.

    Raises UserError if a list cannot be read or a class is in two lists.
    """
    if any(list_paths.values()):
        lists = {split: [name for path in paths for name in
                         read_lines(path, f'--{split}_classes takes a file with one class name on each line')]
                 for split, paths in list_paths.items()}
    else:
        with open(DEFAULT_SPLIT, encoding='utf-8') as file:
            lists = json.load(file)
    split_of = {}
    for split, class_names in lists.items():
        for class_name in map(normalized, class_names):
            if split_of.setdefault(class_name, split) != split:
                raise UserError(f'{class_name}: is in the class lists of both {split_of[class_name]} and {split}; '
                                'in a zero-shot split, leave every class in one list only')
    return split_of


def normalized(name):
    """Return a name with composed letters (é, not e and an accent): macOS stores file names decomposed."""
    return unicodedata.normalize('NFC', name)


def read_numbered(path, advice):
    """Return (image number, value) pairs from the lines of one of CUB's files. Raises UserError with `advice`."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f'{path}: is not a file; {advice}')
    pairs = [line.split(None, 1) for line in read_lines(path, advice)]
    for pair in pairs:
        if len(pair) != 2:
            raise UserError(f'{path}: the line {pair[0][:60]!r} does not have a number and a value; {advice}')
    return [(number.lstrip('0') or number[-1:], value) for number, value in pairs]  # 001 is 1


def list_photographs(cub, text, split_of):
    """Return (an `Entry` for each line CLASS/NAME.jpg of images.txt, the other lines).

    The split of an entry is None if no list has its class. Other lines are not read, as they could lead outside the
    folder. Raises UserError if the folders are not those of CUB-200-2011.
    """
    advice = 'give --cub the folder CUB_200_2011 as published, with images.txt, bounding_boxes.txt and images/'
    pairs = read_numbered(os.path.join(cub, 'images.txt'), advice)
    if not pairs:
        raise UserError(f'{os.path.join(cub, "images.txt")}: is empty; {advice}')
    boxes_path = os.path.join(cub, 'bounding_boxes.txt')
    boxes = read_numbered(boxes_path, advice) if os.path.exists(boxes_path) else []
    for path, numbered in ((os.path.join(cub, 'images.txt'), pairs), (boxes_path, boxes)):
        number, count = Counter(number for number, _ in numbered).most_common(1)[0] if numbered else (None, 1)
        if count > 1:
            raise UserError(f'{path}: {count} lines have the number {number}, so boxes are ambiguous; {advice}')
    boxes = dict(boxes)
    if boxes and ('0' in boxes) != ('0' in dict(pairs)):  # photographs may lack boxes, and boxes photographs
        raise UserError(f'{boxes_path}: only one of this file and images.txt counts from 0, so boxes would be of '
                        'the wrong photographs; number both the same way')
    if not os.path.isdir(os.path.join(cub, 'images')):
        raise UserError(f'{os.path.join(cub, "images")}: no such folder; {advice}')
    entries, strange = [], []
    for number, path in pairs:
        path = path.replace('\\', '/')  # of Windows
        key = os.path.splitext(path)[0]
        parts = key.split('/')
        if len(parts) != 2 or set(parts) & {'', '.', '..'} or CONTROL.search(path):
            strange.append(CONTROL.sub('?', path))
            continue
        class_name, name = normalized(parts[0]), parts[1]
        entries.append(Entry(split_of.get(class_name), class_name, name, key, os.path.join(cub, 'images', path),
                             os.path.join(text, f'{key}.txt'), boxes.get(number)))
    classes = {entry.key.partition('/')[0] for entry in entries}  # as the folders are named
    if classes and not any(os.path.isdir(os.path.join(text, class_name)) for class_name in classes):
        raise UserError(f'{text}: holds none of the class folders of {cub}; '
                        'give --text the folder text_c10, which holds CLASS/NAME.txt')
    return entries, strange


def check_names(entries):
    """Raise UserError if two photographs, even in two folders, have the same class and name."""
    for key, count in Counter((entry.class_name, entry.name) for entry in entries).items():
        if count > 1:
            paths = [entry.image_path for entry in entries if (entry.class_name, entry.name) == key]
            if paths[0] == paths[1]:
                raise UserError(f'{paths[0]}: is listed {count} times; list it, or its folder, once')
            raise UserError(f'{"/".join(key)}: {count} photographs have this class and name ({paths[0]} and '
                            f'{paths[1]}); remove one')


def read_jpeg(path):
    """Return (bytes of a JPEG, (width, height) as stored, EXIF orientation, whether it was converted from PNG or WebP).

    Raises ValueError if the image does not decode completely, or is larger than `data.pictures` reads.
    """
    data = _contents(path, 'its photograph is', MAX_BYTES['photograph'])
    try:
        with opened(data, ['JPEG', 'PNG', 'WEBP']) as image:
            size, orientation = image.size, image.getexif().get(ExifTags.Base.Orientation, 1)
            if image.format in ('PNG', 'WEBP'):
                return _as_jpeg(image), size[::-1] if orientation in SIDEWAYS else size, 1, True
            image.draft(None, (1, 1))  # decode at an eighth of the size: it detects damage with less memory
            image.load()
    except UnidentifiedImageError as error:
        raise ValueError('its photograph is not a JPEG, PNG or WebP image') from error
    except Exception as error:      # a damaged image makes Pillow raise errors of any kind
        raise ValueError(f'its photograph is unreadable ({" ".join(str(error).split())})') from error
    return data, size, orientation, False


def _as_jpeg(image):
    """Convert an image to the bytes of a JPEG, upright, with a white background."""
    jpeg = io.BytesIO()
    on_white(ImageOps.exif_transpose(image)).save(jpeg, 'JPEG', quality=95)
    return jpeg.getvalue()


def _contents(path, what, most):
    """Return the bytes of a file. Raises ValueError, beginning with `what`, if it has more than `most` bytes."""
    if not os.path.isfile(path):
        raise ValueError(f'{what} missing')
    try:
        with open(path, 'rb') as file:
            if (size := os.fstat(file.fileno()).st_size) > most:
                raise ValueError(f'{what} too large ({size:,} bytes; at most {most:,} are read)')
            return file.read()
    except OSError as error:
        raise ValueError(f'{what} unreadable ({error.strerror})') from error


def read_captions(path):
    """Return the captions of a photograph, one on each line. Raises ValueError if there are none or one is too long."""
    try:
        text = _contents(path, 'its captions are', MAX_BYTES['captions']).decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'its captions are unreadable ({error})') from error
    captions = [line.strip() for line in io.StringIO(text, newline=None) if line.strip()]
    if not captions:
        raise ValueError('it has no captions')
    if len(captions) > MAX_CAPTIONS:
        raise ValueError(f'it has {len(captions):,} captions; at most {MAX_CAPTIONS:,} are read')
    if '\0' in text:
        raise ValueError('its captions contain a NUL character')
    if max(len(caption.encode()) for caption in captions) > TEXT_BYTES:
        raise ValueError(f'one of its captions has more than {TEXT_BYTES:,} bytes; write one caption on each line')
    return captions


def read_box(text):
    """Return (x, y, width, height) in pixels, or None without a box. Raises ValueError if the numbers are not valid."""
    if text is None:
        return None
    try:
        box = tuple(map(float, text.split()))
    except ValueError:
        box = ()
    if len(box) != 4 or not all(abs(number) < MAX_COORDINATE for number in box) or not min(np.float32(box[2:])) > 0:
        raise ValueError(f'its bounding box {text[:60]!r} is not x, y, width and height')
    if max(box) <= 1:
        raise ValueError(f'its bounding box {text[:60]!r} is in fractions of the image, as in files for YOLO; give '
                         'x and y of the upper left corner, width and height in pixels')
    return box


def to_stored_orientation(box, size, orientation):
    """Convert a box (x, y, width, height) in the upright image to the stored image, to which `data.layout` refers.

    `size` is (width, height) of the stored image, and `orientation` the EXIF orientation that turns it upright.
    """
    (x, y, w, h), (width, height) = box, size
    return {2: (width - x - w, y, w, h), 3: (width - x - w, height - y - h, w, h), 4: (x, height - y - h, w, h),
            5: (y, x, h, w), 6: (y, height - x - w, h, w), 7: (width - y - h, height - x - w, h, w),
            8: (width - y - h, x, h, w)}.get(orientation, box)


def read_photograph(entry, look_up=None):
    """Return (`layout.Photograph`, list of REMARKS) for an entry. Raises ValueError if it cannot be used."""
    captions, box = read_captions(entry.text_path), read_box(entry.box)
    jpeg, size, orientation, was_another = read_jpeg(entry.image_path)
    box = box and to_stored_orientation(box, size, orientation)
    photograph = layout.Photograph(entry.name, entry.class_name, jpeg, captions, bbox=box)
    if look_up:
        photograph.embeddings = look_up(entry.key)
        if len(photograph.embeddings) != len(captions):
            raise ValueError(f'it has {len(captions)} captions but {len(photograph.embeddings)} embeddings')
    holds = {MADE_JPEG: was_another, NO_BOX: box is None,
             BOX_OUTSIDE: box and (min(box[:2]) < -1 or box[0] + box[2] > size[0] + 1
                                   or box[1] + box[3] > size[1] + 1)}
    return photograph, [remark for remark in REMARKS if holds[remark]]
