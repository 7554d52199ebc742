"""Convert a folder of pictures with captions to data/NAME/NAME.hdf5 (layout: data/layout.py).

    python data/folder/prepare.py --images PICTURES --name NAME                      with NAME.txt beside each picture
    python data/folder/prepare.py --images PICTURES --captions captions.csv --name NAME
    python data/folder/prepare.py --images coco --captions annotations --name coco   with COCO's captions_*.json

data/README.md says how captions, classes, boxes and splits can be given.
"""
import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # while the imports take seconds

import argparse
import random
import re
import time
from functools import partial

from common.argument_types import fraction, path, plain_name
from common.errors import UserError, run_command
from data import converting, layout
from data.bounded_files import files_in, normalized, read_lines, read_numbered, some
from data.boxes import read_box, read_boxes, read_voc, read_yolo
from data.converting import Entry, skip
from data.folder import captions
from data.folder.pictures import SPLITS, list_pictures, named_by, paths_beside

DATA = os.path.dirname(HERE)
TEST_SHARE = 0.1  # of the pictures, if nothing is said about splits
SPLIT_WORDS = SPLITS | {'eval': 'valid', 'evaluation': 'valid'}  # in the names of folders that may mean splits
BOX_ENDINGS = {'.xml': read_voc, '.txt': read_yolo}


def parse_args():
    """Parse the command line."""
    parser = converting.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=path, required=True, metavar='DIR',
                        help='folder of the pictures: JPEG, PNG or WebP')
    parser.add_argument('--captions', type=path, metavar='FILE_OR_DIR',
                        help='folder of NAME.txt in the same subfolders as the pictures, of metadata.csv or '
                             "metadata.jsonl, or of COCO's captions_*.json; or one of these files (default: the folder "
                             'of the pictures)')
    parser.add_argument('--name', type=plain_name, required=True, help='name of the data set, for --dataset NAME')
    parser.add_argument('--classes', choices=('given', 'own'), default='given',
                        help="given: classes are the subfolders of --images, the column class, or COCO's objects, and "
                             'a picture without a class forms a class of its own; own: every picture does (default: '
                             'given)')
    parser.add_argument('--boxes', type=path, metavar='FILE_OR_DIR',
                        help="folder of NAME.txt (YOLO) or NAME.xml (Pascal VOC), or CUB's bounding_boxes.txt with "
                             'images.txt beside it (default: no boxes)')
    converting.add_flags(parser, None, 'data/NAME/NAME.hdf5', 'a share of the pictures')
    for split in layout.SPLITS:
        parser.add_argument(f'--{split}_list', type=path, metavar='FILE',
                            help=f'text file with the pictures of /{split}, one path below --images on each line')
    for split in layout.SPLITS[1:]:
        parser.add_argument(f'--{split}_share', type=fraction, metavar='S',
                            help=f'share of the pictures for /{split}, chosen at random (default: '
                                 f'{TEST_SHARE if split == "test" else 0})')
    parser.add_argument('--share_of', choices=('pictures', 'classes'), default='pictures',
                        help='whether shares are of the pictures, or of the classes, so that /test has classes that '
                             'are never seen in training (default: pictures)')
    parser.add_argument('--seed', type=int, help='seed of the random shares (default: 1)')
    return parser.parse_args()


def output(args):
    """Return the path of the HDF5 file. Raises UserError if --dataset NAME would not find it, or it is another's."""
    if args.name.endswith(('.hdf5', '.h5')):
        raise UserError(f'--name {args.name}: give the name without its ending, {os.path.splitext(args.name)[0]}')
    if os.path.exists(os.path.join(DATA, args.name, 'prepare.py')) and not args.out:
        raise UserError(f'--name {args.name}: is the name of the data set of data/{args.name}/prepare.py; give another')
    out = os.path.abspath(args.out or os.path.join(DATA, args.name, f'{args.name}.hdf5'))
    layout.check_name(out)
    if os.path.splitext(os.path.basename(out))[0] != args.name:
        raise UserError(f'--out {args.out}: --dataset {args.name} would not find it; call it {args.name}.hdf5')
    return out


def list_entries(args, skipped):
    """Return (an `Entry` without a split for each picture, {path: split} that the files say); print what is odd."""
    pictures, strange, others = list_pictures(args.images)
    for file in strange:
        skip(skipped, file, 'its name has control characters or is not UTF-8')
    if others:
        print(f'not pictures: {others.total()} files ({some(others)}); JPEG, PNG and WebP are read')
    found = captions.find(pictures, args.captions or args.images, args.images, args.classes == 'given')
    print(f'captions: {found.source}')
    if found.absent:
        print(f'not in {args.images}: {len(found.absent)} pictures that have captions ({some(found.absent)})')
    box_of = find_boxes(args.boxes, found.folder, pictures)
    entries, single = [], 0
    for picture in pictures:
        given = found.classes.get(picture.file) or (None if found.is_coco else picture.class_name)
        own = normalized(picture.file).replace('/', '-')
        class_name = given if given and args.classes == 'given' else own
        name = picture.name if class_name == picture.class_name else picture.key
        entries.append(Entry(None, class_name, name.replace('/', '-'), picture.key, picture.path, found.of(picture),
                             box_of(picture)))
        single += class_name == own
    if found.is_coco and not found.classes and args.classes == 'given' and any(one.class_name for one in pictures):
        print("subfolders are not classes, as the captions are COCO's; its objects would be: see data/README.md")
    print(f'classes: {len({entry.class_name for entry in entries})}' + (
        f', {single} of them single pictures: for each of these, any other picture is a wrong one' if single else ''))
    roots = (args.images, args.captions or args.images)
    unread = 0 if found.folder else sum(
        any(os.path.exists(os.path.join(root, f'{entry.key}.txt')) for root in roots) and not has_captions(entry)
        for entry in entries)
    if unread:
        print(f'not read as captions: {unread} NAME.txt files of pictures without captions in {found.source}')
    splits = {picture.file: picture.split for picture in pictures if picture.split} | found.splits
    return entries, {picture.path: splits[picture.file] for picture in pictures if picture.file in splits}


def find_boxes(given, captions_folder, pictures):
    """Return a function that returns for each of the `pictures` the function that reads its box: `Entry.box`.

    Raises UserError if NAME.txt would be read as captions, too, which are in `captions_folder`, or if it is not clear
    whose box one is.
    """
    if not given:
        return lambda picture: converting.no_box
    if os.path.isdir(given):
        endings = BOX_ENDINGS
        if captions_folder and os.path.samefile(given, captions_folder):
            endings = ('.xml',)
            if not any(file.lower().endswith(endings) for file in files_in(given)):
                raise UserError(f'--boxes {given}: its NAME.txt are read as captions; give --captions another folder, '
                                'or boxes as NAME.xml')
        path_of = {ending: paths_beside(given, ending) for ending in endings}
        if not any(os.path.exists(find(picture)) for find in path_of.values() for picture in pictures):
            print(f'--boxes {given}: holds no {" or ".join(f"NAME{ending}" for ending in endings)} of the pictures')
        return lambda picture: partial(_box_beside, {ending: path_of[ending](picture) for ending in endings})
    advice = "give --boxes a folder of YOLO's or Pascal VOC's files, or CUB's bounding_boxes.txt with images.txt beside"
    if not os.path.exists(given):
        raise UserError(f'--boxes {given}: no such file or folder; {advice}')
    images = os.path.join(os.path.dirname(given), 'images.txt')
    pairs = read_numbered(images, advice)
    boxes = read_boxes(given, images, pairs, advice)
    if not boxes:
        raise UserError(f'{given}: holds no boxes; {advice}')
    numbers, find = {}, named_by([picture.file for picture in pictures])
    for number, line in pairs:
        file = find(line, images)
        if file and numbers.setdefault(file, number) != number:
            raise UserError(f'{images}: {file} has two numbers, {numbers[file]} and {number}, so its box is ambiguous; '
                            'list it once')
    return lambda picture: lambda size: read_box(boxes.get(numbers.get(picture.file)))


def _box_beside(paths, size):
    """Return the box in the first file that exists of `paths`, {ending: path}, or None if there is none."""
    for ending, file in paths.items():
        if os.path.exists(file):
            return BOX_ENDINGS[ending](file, size)
    return None


# --- splits -----------------------------------------------------------------------------------------------------------

def split_entries(entries, args, known):
    """Return the entries with their splits, from class lists, picture lists, shares, or `known`, {path: split}.

    Raises UserError if several of these are given, or a list is not of this data.
    """
    lists = converting.class_lists(args)
    has_shares = args.share_of == 'classes' or not (args.valid_share is args.test_share is args.seed is None)
    picture_lists = {split: getattr(args, f'{split}_list') for split in layout.SPLITS}
    given = any(lists.values()) + any(picture_lists.values()) + has_shares
    if given > 1:
        raise UserError('--..._classes, --..._list, and --..._share, --share_of or --seed: several of these are given; '
                        'give one kind only')
    if known and given:
        print('splits: as the flags say; those of folders or caption files are ignored')
    if any(lists.values()):
        split_of = converting.split_of_classes(converting.read_class_lists(lists))
        entries = [entry._replace(split=split_of.get(entry.class_name)) for entry in entries]
        converting.check_lists(entries, lists, args.images)
        return entries, split_of
    if any(picture_lists.values()):
        split_of = read_picture_lists(picture_lists, entries, args.images)
    elif known and not given:
        print('splits: as the folders of the pictures, or the files of captions, say')
        split_of = known
    else:
        if not given:
            check_no_other_splits(entries, args.images)
        split_of = share_out(entries, args)
    return [entry._replace(split=split_of.get(entry.image_path)) for entry in entries], {}


def check_no_other_splits(entries, folder):
    """Raise UserError if folders look like splits, such as a/train or test2017, but are not used as such.

    If all of them look like the same split, print only that.
    """
    named = {}
    for place in {os.path.dirname(entry.key) for entry in entries}:
        parts = place.split('/')
        for depth, part in enumerate(parts, 1):
            for word in re.findall('[a-z]+', part.lower()):
                if word in SPLIT_WORDS:
                    named.setdefault(SPLIT_WORDS[word], set()).add('/'.join(parts[:depth]))
    if len(named) == 1:
        print(f'{min(*named.values())}: looks like a split, but is not used as one, as there is no other')
    if len(named) > 1:
        found = ' and '.join(sorted(map(min, named.values())))
        raise UserError(f'--images {folder}: {found} look like splits, but would be mixed; give a folder with train, '
                        'validation or test, and no others, directly in it; or lists, such as --train_list; or, to mix '
                        f'them, shares, such as --test_share {TEST_SHARE}')


def read_picture_lists(picture_lists, entries, folder):
    """Return {path: split} from {split: list of pictures}, each with or without ending, as a path in `folder`.

    Raises UserError if a list is empty, or a picture is unknown or in two lists, or a line could be two pictures.
    """
    paths = {os.path.relpath(entry.image_path, folder).replace(os.sep, '/'): entry.image_path for entry in entries}
    split_of, find = {}, named_by(paths)
    for split, file in picture_lists.items():
        advice = f'--{split}_list takes a file with one path of a picture on each line'
        lines = read_lines(file, advice) if file else ()
        if file and not lines:
            raise UserError(f'{file}: is empty; {advice}')
        for line in lines:
            path = paths.get(find(line, file))
            if path is None:
                raise UserError(f'{file}: {line[:100]!r} is not a picture in the folder; write paths such as '
                                f'{entries[0].key}')
            if split_of.setdefault(path, split) != split:
                raise UserError(f'{file}: {line[:100]!r} is in the lists of both {split_of[path]} and {split}; '
                                'keep it in only one')
    return split_of


def share_out(entries, args):
    """Return {path: split}, chosen at random: shares of the pictures, or of the classes, which stay whole.

    Shares are of those with captions: others are left out later, whatever their split.
    """
    shares = {'valid': args.valid_share or 0, 'test': TEST_SHARE if args.test_share is None else args.test_share}
    of_classes = args.share_of == 'classes'
    item_of = {entry.image_path: entry.class_name if of_classes else entry.image_path for entry in entries}
    usable = list(filter(has_captions, entries)) or entries
    items, split_of, at = sorted({item_of[entry.image_path] for entry in usable}), {}, 0
    random.Random(1 if args.seed is None else args.seed).shuffle(items)
    for split, part in shares.items():
        count = max(1, round(part * len(items))) if part else 0
        split_of |= dict.fromkeys(items[at:at + count], split)
        at += count
    if at >= len(items):
        raise UserError(f'{len(items)} {args.share_of} are too few for these shares: none would be left to train on; '
                        'give --test_share 0, or smaller shares')
    return {path: split_of.get(item, 'train') for path, item in item_of.items()}


def has_captions(entry):
    """Return whether the captions of an `Entry` can be used."""
    try:
        return bool(entry.captions())
    except ValueError:
        return False


def advice_for(trained, args):
    """Return what to do about the pictures `trained`, which are all of /train and of one class."""
    if len(trained) == 1:
        return 'give more pictures'
    if args.train_classes:
        return f'list more classes in {args.train_classes[-1]}'
    if args.share_of == 'classes':
        return 'give smaller shares'
    common = os.path.commonpath([os.path.dirname(entry.key) for entry in trained])
    is_folder = normalized(common.partition('/')[0]) == trained[0].class_name
    if is_folder and any('/' in os.path.relpath(entry.key, common) for entry in trained):
        return f'if the folders in {common} are the classes, give --images {os.path.join(args.images, common)}'
    return 'add --classes own, so that each picture is a class'


def main():
    """List the pictures, convert those that can be used, and print a report."""
    start, args, skipped = time.time(), parse_args(), []
    args.out = output(args)
    entries, known = list_entries(args, skipped)
    entries, split_of = split_entries(entries, args, known)
    chosen = [entry for entry in entries if entry.split]
    converting.check_names(chosen)
    converting.convert(chosen, skipped, args.out, args.dry_run, args.images,
                       'data/README.md says how captions can be given, and what works without')
    without = sum(line.endswith(converting.NO_CAPTIONS) for line in skipped)
    if without:
        print(f'without captions: {without} photographs; data/README.md says what they can still be used for')
    if any(split_of):
        converting.report_unlisted(entries, split_of)
    elif len(chosen) < len(entries):
        has_lists = args.train_list or args.valid_list or args.test_list
        where = 'that no list contains' if has_lists else 'to which neither a folder nor a caption file gives a split'
        print(f'left out: {len(entries) - len(chosen)} photographs {where}')
    trained = [entry for entry in chosen if entry.split == 'train']
    if len({entry.class_name for entry in trained}) == 1:
        print(f'one class only in /train: a sentence encoder cannot be trained with it; {advice_for(trained, args)}')
    converting.report_end(args.out, args.dry_run, skipped, start)


if __name__ == '__main__':
    run_command(main)
