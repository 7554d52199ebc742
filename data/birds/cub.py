"""The files of CUB-200-2011 and its captions, as they are published: class lists, photographs, boxes, sentences.

One photograph that cannot be used is no reason to stop: `read_photograph` raises ValueError with the reason. What makes
a whole folder unusable is a UserError.
"""
import io
import json
import os
import re
from collections import Counter, namedtuple

import numpy as np
from PIL import ExifTags, ImageOps, UnidentifiedImageError

from common.errors import UserError
from common.files import check_is_file
from data import layout
from data.pictures import PIXELS, on_white, opened
from data.plain_hdf5 import TEXT_BYTES

DEFAULT_SPLIT = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'split_150_50.json')

MOST = {'list': 64 << 20, 'captions': 16 << 20, 'photograph': 4 * PIXELS}  # bytes of a file that is read
FARTHEST = 1e9  # pixels; a box is stored as float32, which is exact only near the corner

SIDEWAYS = (5, 6, 7, 8)  # of EXIF's orientations, those that make of a picture's width its height

# A line of images.txt; `key` is CLASS/NAME, `box` the text behind the photograph's number in bounding_boxes.txt.
Entry = namedtuple('Entry', 'split class_name name key image_path text_path box')

NO_BOX, BOX_OUTSIDE, MADE_JPEG = 'no bounding box', 'bounding box reaches outside', 'stored as JPEG'
CONTROL = re.compile(r'[\x00-\x1f\x7f-\x9f]')  # what a terminal may obey
REMARKS = {  # about photographs that are used all the same
    NO_BOX: 'bounding_boxes.txt is absent or does not name them',
    BOX_OUTSIDE: 'bounding_boxes.txt gives x, y, width and height in pixels, with x and y of the upper left corner',
    MADE_JPEG: 'they are PNG or WebP; what is transparent in them is now white',
}


def read_lines(path, advice):
    """The lines of a UTF-8 text file, whatever its line ends, without blank ones."""
    try:
        check_is_file(path)
        if os.path.getsize(path) > MOST['list']:
            raise OSError(f'it has {os.path.getsize(path):,} bytes, and {MOST["list"]:,} are the most')
        with open(path, encoding='utf-8-sig') as file:
            return [line.strip() for line in file if line.strip()]
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror or error}); {advice}') from error
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: is not a UTF-8 text file; {advice}') from error


def read_split(list_paths):
    """Which split each class belongs to. `list_paths` maps splits to paths of class lists; none is the 150/50 split."""
    if any(list_paths.values()):
        lists = {split: [name for path in paths for name in
                         read_lines(path, f'--{split}_classes takes a file with a class name a line')]
                 for split, paths in list_paths.items()}
    else:
        with open(DEFAULT_SPLIT, encoding='utf-8') as file:
            lists = json.load(file)
    split_of = {}
    for split, class_names in lists.items():
        for class_name in class_names:
            if split_of.setdefault(class_name, split) != split:
                raise UserError(f'{class_name}: is in the class lists of both {split_of[class_name]} and {split}; '
                                'a zero-shot split has every class in one list only')
    return split_of


def read_numbered(path, advice):
    """A file of CUB's whose lines are an image number and something about that image: (number, something) pairs."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f'{path}: is not a file; {advice}')
    pairs = [line.split(None, 1) for line in read_lines(path, advice)]
    for pair in pairs:
        if len(pair) != 2:
            raise UserError(f'{path}: the line {pair[0][:60]!r} is not a number and a value; {advice}')
    return [(number.lstrip('0') or number, value) for number, value in pairs]  # 001 is 1


def list_photographs(cub, text, split_of):
    """The `Entry` of every line of images.txt such as CLASS/NAME.jpg, its split None where no list has the class.

    Also returns the lines that are not, so that nothing outside the folder is read.
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
            raise UserError(f'{path}: {count} lines have the number {number}, so boxes cannot be told apart; {advice}')
    boxes = dict(boxes)
    if stray := boxes.keys() - dict(pairs).keys():
        raise UserError(f'{boxes_path}: {len(stray)} of its numbers, such as {min(stray)[:60]!r}, are not in '
                        'images.txt, so boxes may be of other photographs; number both alike')
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
        class_name, name = parts
        entries.append(Entry(split_of.get(class_name), class_name, name, key, os.path.join(cub, 'images', path),
                             os.path.join(text, f'{key}.txt'), boxes.get(number)))
    classes = {entry.class_name for entry in entries}
    if classes and not any(os.path.isdir(os.path.join(text, class_name)) for class_name in classes):
        raise UserError(f'{text}: holds none of the class folders of {cub}; '
                        'give --text the folder text_c10, which holds CLASS/NAME.txt')
    return entries, strange


def check_names(entries):
    """Raise UserError where two photographs have the same class and name, be it in two folders."""
    for key, count in Counter((entry.class_name, entry.name) for entry in entries).items():
        if count > 1:
            paths = [entry.image_path for entry in entries if (entry.class_name, entry.name) == key]
            raise UserError(f'{"/".join(key)}: {count} photographs have this class and name ({paths[0]} and '
                            f'{paths[1]}); leave one out')


def read_jpeg(path):
    """(bytes of a JPEG, its (width, height) as stored, EXIF's number for how it is turned, whether it was PNG or WebP).

    Raises ValueError where the picture does not decode wholly, or is of a size that is not read later
    (`data.pictures`).
    """
    data = _contents(path, 'its photograph is', MOST['photograph'])
    try:
        with opened(data, ['JPEG', 'PNG', 'WEBP']) as image:
            size, orientation = image.size, image.getexif().get(ExifTags.Base.Orientation, 1)
            if image.format in ('PNG', 'WEBP'):
                return _as_jpeg(image), size[::-1] if orientation in SIDEWAYS else size, 1, True
            image.draft(None, (1, 1))  # an eighth of its width and height: damage shows as well, in less memory
            image.load()
    except UnidentifiedImageError as error:
        raise ValueError('its photograph is not a JPEG, PNG or WebP picture') from error
    except Exception as error:      # a damaged picture makes Pillow raise nearly anything
        raise ValueError(f'its photograph is unreadable ({" ".join(str(error).split())})') from error
    return data, size, orientation, False


def _as_jpeg(image):
    """A picture as the bytes of a JPEG, upright and on white."""
    jpeg = io.BytesIO()
    on_white(ImageOps.exif_transpose(image)).save(jpeg, 'JPEG', quality=95)
    return jpeg.getvalue()


def _contents(path, what, most):
    """The bytes of a file, `most` or fewer. Raises ValueError, which starts with `what`; a pipe would never end."""
    if not os.path.isfile(path):
        raise ValueError(f'{what} missing')
    try:
        with open(path, 'rb') as file:
            if (size := os.fstat(file.fileno()).st_size) > most:
                raise ValueError(f'{what} too large ({size:,} bytes, and {most:,} are the most)')
            return file.read()
    except OSError as error:
        raise ValueError(f'{what} unreadable ({error.strerror})') from error


def read_captions(path):
    """The captions of a photograph, one a line. Raises ValueError where there are none."""
    try:
        text = _contents(path, 'its captions are', MOST['captions']).decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'its captions are unreadable ({error})') from error
    captions = [line.strip() for line in io.StringIO(text, newline=None) if line.strip()]
    if not captions:
        raise ValueError('it has no captions')
    if '\0' in text:
        raise ValueError('its captions hold a NUL character')
    if max(len(caption.encode()) for caption in captions) > TEXT_BYTES:
        raise ValueError(f'its captions have one of more than {TEXT_BYTES:,} bytes; write a caption a line')
    return captions


def read_box(text):
    """(x, y, width, height) in pixels, None without a box. Raises ValueError where it is not four sensible numbers."""
    if text is None:
        return None
    try:
        box = tuple(map(float, text.split()))
    except ValueError:
        box = ()
    if len(box) != 4 or not all(abs(number) < FARTHEST for number in box) or not min(np.float32(box[2:])) > 0:
        raise ValueError(f'its bounding box {text[:60]!r} is not x, y, width and height')
    if max(box) <= 1:
        raise ValueError(f'its bounding box {text[:60]!r} is in fractions of the picture, as in files for YOLO; give '
                         'x and y of the upper left corner, width and height in pixels')
    return box


def as_stored(box, size, orientation):
    """A box (x, y, width, height) of a picture as it is seen, in the picture of `size` as it is stored, before EXIF's
    `orientation` turns it upright: that is what later readers cut from.
    """
    (x, y, w, h), (width, height) = box, size
    return {2: (width - x - w, y, w, h), 3: (width - x - w, height - y - h, w, h), 4: (x, height - y - h, w, h),
            5: (y, x, h, w), 6: (y, height - x - w, h, w), 7: (width - y - h, height - x - w, h, w),
            8: (width - y - h, x, h, w)}.get(orientation, box)


def read_photograph(entry, look_up=None):
    """(`layout.Photograph`, list of REMARKS) of an entry. Raises ValueError with the reason where it cannot be used."""
    captions, box = read_captions(entry.text_path), read_box(entry.box)
    jpeg, size, orientation, was_another = read_jpeg(entry.image_path)
    box = box and as_stored(box, size, orientation)
    photograph = layout.Photograph(entry.name, entry.class_name, jpeg, captions, bbox=box)
    if look_up:
        photograph.embeddings = look_up(entry.key)
        if len(photograph.embeddings) != len(captions):
            raise ValueError(f'it has {len(captions)} captions but {len(photograph.embeddings)} embeddings')
    holds = {MADE_JPEG: was_another, NO_BOX: box is None,
             BOX_OUTSIDE: box and (min(box[:2]) < -1 or box[0] + box[2] > size[0] + 1
                                   or box[1] + box[3] > size[1] + 1)}
    return photograph, [remark for remark in REMARKS if holds[remark]]
