"""List the photographs of CUB-200-2011 and its captions as published: class lists, boxes, sentences.

If a whole folder cannot be used, functions raise UserError.
"""
import json
import os
from functools import partial

from common.errors import UserError
from common.letters import CONTROL
from data.bounded_files import normalized, read_numbered
from data.boxes import read_box, read_boxes
from data.converting import Entry, read_captions, read_class_lists, split_of_classes

DEFAULT_SPLIT = os.path.join(os.path.dirname(os.path.realpath(__file__)), 'split_150_50.json')


def read_split(list_paths):
    """Return {class name: split} from `list_paths`, {split: paths of class lists}, or else for the 150/50 split.

    Raises UserError if a list cannot be read or a class is in two lists.
    """
    if any(list_paths.values()):
        return split_of_classes(read_class_lists(list_paths))
    with open(DEFAULT_SPLIT, encoding='utf-8') as file:
        return split_of_classes(json.load(file))


def list_photographs(cub, text, split_of):
    """Return (an `Entry` for each line CLASS/NAME.jpg of images.txt, the other lines).

    The split of an entry is None if no list has its class. Other lines are not read, as they could lead outside the
    folder. Raises UserError if the folders are not those of CUB-200-2011.
    """
    advice = 'give --cub the folder CUB_200_2011 as published, with images.txt, bounding_boxes.txt and images/'
    images_path, boxes_path = os.path.join(cub, 'images.txt'), os.path.join(cub, 'bounding_boxes.txt')
    pairs = read_numbered(images_path, advice)
    if not pairs:
        raise UserError(f'{images_path}: is empty; {advice}')
    boxes = read_boxes(boxes_path, images_path, pairs, advice)
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
                             partial(read_captions, os.path.join(text, f'{key}.txt')),
                             partial(_box, boxes.get(number))))
    classes = {entry.key.partition('/')[0] for entry in entries}  # as the folders are named
    if classes and not any(os.path.isdir(os.path.join(text, class_name)) for class_name in classes):
        raise UserError(f'{text}: holds none of the class folders of {cub}; '
                        'give --text the folder text_c10, which holds CLASS/NAME.txt')
    return entries, strange


def _box(text, size):
    """Return a box in pixels, which does not depend on the `size` of the image."""
    return read_box(text)
