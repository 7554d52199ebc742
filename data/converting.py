"""Convert photographs that a data set lists to one HDF5 file, whole or not at all, and report what was left out.

The `prepare.py` of each data set lists its photographs as `Entry`s. Those that cannot be used are named and skipped.
"""
import argparse
import contextlib
import io
import os
import time
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor

from PIL import ExifTags, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from common import signals
from common.argument_types import path
from common.errors import OneLineParser, UserError
from common.files import check_can_write, check_space
from common.letters import LENGTH, unread
from data import layout
from data.bounded_files import contents, normalized, read_lines, some
from data.boxes import to_stored_orientation
from data.pictures import PIXELS, on_white, opened
from data.plain_hdf5 import TEXT_BYTES

CHUNK = 32  # photographs that are read ahead
READERS = 4  # threads at most: decoding one of the largest photographs takes half a GB
SHOWN = 20  # unknown letters that are printed

PHOTOGRAPH_BYTES, CAPTIONS_BYTES = 4 * PIXELS, 16 << 20  # of a file that is read
MAX_CAPTIONS = 1000  # of a photograph
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height

NO_CAPTIONS = ('its captions are missing', 'it has no captions')

# A photograph to convert. `split` is None if it is left out; `key` is how it is called in messages, and by published
# embeddings. `captions()` returns its captions, and `box(size)` its box in the upright image of `size` (width, height),
# or None; both raise ValueError with the reason if they cannot.
Entry = namedtuple('Entry', 'split class_name name key image_path captions box')

NO_BOX, BOX_OUTSIDE, BOX_APART, MADE_JPEG = (
    'no bounding box', 'bounding box reaches outside', 'bounding box lies outside', 'stored as JPEG')
REMARKS = {  # about photographs that are used nevertheless
    NO_BOX: 'their crops are of the whole image',
    BOX_OUTSIDE: 'the part inside is used; data/README.md says how boxes are given',
    BOX_APART: 'the whole image is used; give boxes in pixels of these images, not of another resolution',
    MADE_JPEG: 'they were PNG or WebP; transparent areas are now white',
}


class Parser(OneLineParser):
    """A parser that refuses a flag with one value that is given twice: one of the two would be ignored."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.register('action', None, _Once)


class _Once(argparse.Action):
    def __call__(self, parser, namespace, value, flag=None):
        if getattr(namespace, self.dest) is not self.default:
            raise argparse.ArgumentError(self, 'is given twice; give it once')
        setattr(namespace, self.dest, value)


def add_flags(parser, default, out, lists):
    """Add the flags of all data sets: `--out` with its `default` path, described by `out`, class lists, `--dry_run`.

    `lists` says what happens without class lists.
    """
    parser.add_argument('--out', type=path, default=default, metavar='FILE',
                        help=f'HDF5 file to write, .hdf5 or .h5 (default: {out})')
    for split in layout.SPLITS:
        parser.add_argument(f'--{split}_classes', type=path, nargs='+', action='extend', default=[], metavar='FILE',
                            help=f'text files with the classes of /{split}, one on each line (default, if there are '
                                 f'no class lists: {lists})')
    parser.add_argument('--dry_run', action='store_true', help='print what would be written and skipped, write nothing')


# --- which photographs ------------------------------------------------------------------------------------------------

def class_lists(args):
    """Return {split: paths of its class lists} from the flags."""
    return {split: getattr(args, f'{split}_classes') for split in layout.SPLITS}


def read_class_lists(list_paths):
    """Return {split: class names} from {split: paths of class lists}. Raises UserError if a list cannot be read."""
    return {split: [name for path in paths for name in
                    read_lines(path, f'--{split}_classes takes a file with one class name on each line')]
            for split, paths in list_paths.items()}


def split_of_classes(lists):
    """Return {class name: split} from {split: class names}. Raises UserError if a class is in two splits."""
    split_of = {}
    for split, class_names in lists.items():
        for class_name in map(normalized, class_names):
            if split_of.setdefault(class_name, split) != split:
                raise UserError(f'{class_name}: is in the class lists of both {split_of[class_name]} and {split}; '
                                'in a zero-shot split, keep every class in one list only')
    return split_of


def check_lists(entries, list_paths, folder):
    """Raise UserError if the class lists of a split name no class of the entries, which are named as in `folder`."""
    for split, paths in list_paths.items():
        if paths and entries and not any(entry.split == split for entry in entries):
            raise UserError(f'{", ".join(paths)}: lists no class of the data, such as {entries[0].class_name}; write '
                            f'one class name on each line, as the folders in {folder} are named')


def check_names(entries):
    """Raise UserError if two photographs, even in two folders, have the same class and name."""
    for key, count in Counter((entry.class_name, entry.name) for entry in entries).items():
        if count > 1:
            paths = [entry.image_path for entry in entries if (entry.class_name, entry.name) == key]
            if paths[0] == paths[1]:
                raise UserError(f'{paths[0]}: is listed {count} times; list it, or its folder, once')
            raise UserError(f'{"/".join(key)}: {count} photographs have this class and name ({paths[0]} and '
                            f'{paths[1]}); remove one')


def skip(skipped, key, reason):
    """Print that a photograph is skipped, and why; add that to the list `skipped`."""
    skipped.append(f'{key}: {reason}')
    tqdm.write(f'skipped {skipped[-1]}')


# --- one photograph ---------------------------------------------------------------------------------------------------

def read_jpeg(path):
    """Return (bytes of a JPEG, (width, height) as stored, EXIF orientation, whether it was converted from PNG or WebP).

    Raises ValueError if the image does not decode completely, or is larger than `data.pictures` reads.
    """
    data = contents(path, 'its photograph is', PHOTOGRAPH_BYTES)
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


def read_captions(path):
    """Return the captions of a photograph, one on each line. Raises ValueError if there are none or one is too long."""
    try:
        text = contents(path, 'its captions are', CAPTIONS_BYTES).decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'its captions are unreadable ({error})') from error
    return checked_captions(io.StringIO(text, newline=None))


def checked_captions(lines):
    """Return the captions among lines, those that are not blank. Raises ValueError as `read_captions` does."""
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise ValueError('it has no captions')
    if len(captions) > MAX_CAPTIONS:
        raise ValueError(f'it has {len(captions):,} captions; at most {MAX_CAPTIONS:,} are read')
    if any('\0' in caption for caption in captions):
        raise ValueError('its captions contain a NUL character')
    try:
        longest = max(len(caption.encode()) for caption in captions)
    except UnicodeEncodeError as error:
        raise ValueError('its captions contain half of a character (a lone surrogate)') from error
    if longest > TEXT_BYTES:
        raise ValueError(f'one of its captions has more than {TEXT_BYTES:,} bytes; write one caption on each line')
    return captions


def no_box(size):
    """Return None, as the `Entry.box` of photographs without boxes."""


def read_photograph(entry, look_up=None):
    """Return (`layout.Photograph`, list of REMARKS) for an entry. Raises ValueError if it cannot be used."""
    captions = entry.captions()
    jpeg, size, orientation, was_another = read_jpeg(entry.image_path)
    box = entry.box(size[::-1] if orientation in SIDEWAYS else size)
    box = box and to_stored_orientation(box, size, orientation)
    is_apart = box and not all(start < most and start + length > 0
                               for start, length, most in zip(box, box[2:], size))
    photograph = layout.Photograph(entry.name, entry.class_name, jpeg, captions, bbox=None if is_apart else box)
    if look_up:
        photograph.embeddings = look_up(entry.key)
        if len(photograph.embeddings) != len(captions):
            raise ValueError(f'it has {len(captions)} captions but {len(photograph.embeddings)} embeddings')
    holds = {MADE_JPEG: was_another, NO_BOX: box is None, BOX_APART: is_apart,
             BOX_OUTSIDE: box and not is_apart and (min(box[:2]) < -1 or box[0] + box[2] > size[0] + 1
                                                    or box[1] + box[3] > size[1] + 1)}
    return photograph, [remark for remark in REMARKS if holds[remark]]


# --- all photographs --------------------------------------------------------------------------------------------------

def read_all(entries, look_up, skipped):
    """Yield (split, Photograph, remarks) for every entry; add those that cannot be used to `skipped`."""
    def attempt(entry):
        try:
            return entry, read_photograph(entry, look_up)
        except ValueError as error:
            return entry, error
        except MemoryError:
            return entry, ValueError('its files need more memory than there is')

    for entry, result in tqdm(read_ahead(attempt, entries), total=len(entries), unit=' photographs', disable=None):
        signals.deliver_held()
        if isinstance(result, ValueError):
            skip(skipped, entry.key, result)
        else:
            yield entry.split, *result


def read_ahead(function, items):
    """Yield the results of a function of each item, in order; threads compute a chunk while the last one is used."""
    pool, waiting = ThreadPoolExecutor(min(os.cpu_count(), READERS)), ()
    try:
        for start in range(0, len(items) + CHUNK, CHUNK):
            done, waiting = waiting, pool.map(function, items[start:start + CHUNK])
            yield from done
    finally:
        pool.shutdown(cancel_futures=True)


def expected_size(entries, has_embeddings):
    """Return about how many bytes the file will have, with ten captions per photograph."""
    sizes = (os.path.getsize(entry.image_path) for entry in entries if os.path.isfile(entry.image_path))
    jpegs = sum(size for size in sizes if size <= PHOTOGRAPH_BYTES)
    caption = layout.CAPTION_BYTES + (layout.EMBEDDING_BYTES if has_embeddings else 0)
    return jpegs + len(entries) * 10 * caption


def convert(entries, skipped, out, dry_run, where, advice, source=None, look_up=None):
    """Read the photographs of `entries`, write them to the HDF5 file `out` unless `dry_run`, and print a report.

    Adds those that cannot be used to `skipped`. `look_up` finds the embeddings of a photograph in `source`, if there
    are any. Raises UserError, with `where` the photographs are and `advice`, if no photograph can be used.
    """
    count, letters = Counter(), set()
    if os.path.exists(out):
        print(f'{out}: exists; {"would be" if dry_run else "will be"} replaced, with the embeddings that it may hold')
    with contextlib.nullcontext() if dry_run else layout.replace_file(out) as file:
        if file is None:
            check_can_write(out)
        check_space(out, expected_size(entries, look_up))
        for split, photograph, remarks in read_all(entries, look_up, skipped):
            count.update({(split, 'photographs'): 1, (split, 'captions'): len(photograph.captions),
                          'bytes': len(photograph.jpeg), **dict.fromkeys(remarks, 1)})
            for strange, beyond in map(unread, photograph.captions):
                letters |= strange
                count.update(strange=bool(strange), long=bool(beyond))
            if file is not None:
                layout.write_photograph(file, split, photograph)
        if not count:
            reasons = Counter(line.partition(': ')[2] for line in skipped)
            why = f', mostly because {reasons.most_common(1)[0][0]}' if skipped else ''
            raise UserError(f'{where}: no usable photograph ({len(skipped)} skipped{why}), so nothing is written; '
                            f'{advice}')
        if source and file is not None:
            file.attrs['embeddings'] = source
    report(count, letters, source)


def report(count, letters, source):
    """Print the number of photographs and captions in every split, remarks about them, the embeddings and the bytes."""
    for split in layout.SPLITS:
        print(f'{split}: {count[split, "photographs"]} photographs, {count[split, "captions"]} captions')
    for remark, explanation in REMARKS.items():
        if count[remark]:
            print(f'{remark}: {count[remark]} photographs ({explanation})')
    if count['strange']:
        shown = [letter if letter.isprintable() else ascii(letter)[1:-1] for letter in sorted(letters)[:SHOWN]]
        print(f'characters that the sentence encoder cannot read: in {count["strange"]} captions '
              f'({" ".join(shown)}{" ..." if len(letters) > SHOWN else ""})')
    if count['long']:
        print(f'longer than the {LENGTH} characters that the sentence encoder reads: {count["long"]} captions')
    print(f'embeddings: {source or "none yet; see data/README.md"}')
    print(f'JPEGs: {count["bytes"] / 1e6:.1f} MB')
    if not count['train', 'photographs']:
        print('nothing to train on: /train is empty')


def report_unlisted(entries, split_of):
    """Print how many photographs belong to a class in no list, and how many classes in the user's lists have none."""
    left_out = [entry.class_name for entry in entries if entry.split is None]
    if left_out:
        print(f'left out: {len(left_out)} photographs of {len(set(left_out))} classes that no class list contains')
    absent = set(split_of) - {entry.class_name for entry in entries}
    if absent:
        print(f'not in the data: {len(absent)} of the {len(split_of)} classes in the class lists ({some(absent)})')


def report_end(out, dry_run, skipped, start):
    """Print which file was written, how long that took since `start`, and how many photographs are not in it."""
    done = 'would write' if dry_run else f'wrote {os.path.getsize(out) / 1e6:.1f} MB to'
    print(f'{done} {out} ({time.time() - start:.0f} s); skipped {len(skipped)} photographs')
