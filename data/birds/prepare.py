"""Convert CUB-200-2011 with ten captions per photograph to data/birds/birds.hdf5 (layout: data/layout.py).

    python data/birds/prepare.py --cub CUB_200_2011 --text text_c10

`--cub` is the published folder that holds images.txt, `--text` the published folder that holds CLASS/NAME.txt. The
zero-shot split is that of StackGAN: 150 species to train on and 50 others to test with.
"""
import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # while the imports take seconds

import argparse
import contextlib
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from common.errors import OneLineParser, UserError, run_command
from common.files import check_can_write, check_space
from common.letters import LENGTH, unread
from data import layout
from data.birds import cub, published_embeddings

CHUNK = 32  # photographs that are read ahead
READERS = 4  # threads at most: decoding one of the largest photographs takes half a GB
SHOWN = 20  # unknown letters that are printed
ABSENT = 5  # missing classes that are printed


def parse_args():
    """Parse the command line, which may name one source of embeddings."""
    parser = OneLineParser(description=__doc__.split('\n')[0])
    parser.add_argument('--cub', type=path, nargs='+', action='extend', required=True, metavar='DIR',
                        help='folders that hold images.txt; several go into one file')
    parser.add_argument('--text', type=path, nargs='+', action='extend', required=True, metavar='DIR',
                        help='folders of the captions, CLASS/NAME.txt, one for each --cub, in the same order')
    parser.add_argument('--out', type=path, default=os.path.join(HERE, 'birds.hdf5'), metavar='FILE',
                        help='HDF5 file to write, .hdf5 or .h5 (default: birds.hdf5 beside this script)')
    for split in layout.SPLITS:
        parser.add_argument(f'--{split}_classes', type=path, nargs='+', action='extend', default=[], metavar='FILE',
                            help=f'text files with the classes of /{split}, one on each line (default, if there are '
                                 "no class lists: StackGAN's 150 and 50)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument('--pickles', type=path, metavar='DIR',
                        help="folder of StackGAN's embeddings: train/ and test/ with their pickles")
    source.add_argument('--icml', type=path, metavar='DIR', help="folder of Reed's embeddings: CLASS/NAME.t7")
    parser.add_argument('--dry_run', action='store_true', help='print what would be written and skipped, write nothing')
    return parser.parse_args()


def path(text):
    """Check text as an argparse type: any path except '', which is often an unset variable of the shell."""
    if not text:
        raise argparse.ArgumentTypeError('is empty; leave out the flag, or give a path')
    return os.path.expanduser(text)  # which the shell does not do in --flag=~/x


def skip(skipped, key, reason):
    """Print that a photograph is skipped, and why; add that to the list `skipped`."""
    skipped.append(f'{key}: {reason}')
    tqdm.write(f'skipped {skipped[-1]}')


def read_all(entries, look_up, skipped):
    """Yield (split, Photograph, remarks) for every entry; add those that cannot be used to `skipped`."""
    def attempt(entry):
        try:
            return entry, cub.read_photograph(entry, look_up)
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


def open_embeddings(args):
    """Return (name of the source, function that looks up a photograph's embeddings), or (None, None)."""
    if args.pickles:
        return 'StackGAN pickles', published_embeddings.open_pickles(args.pickles)
    if args.icml:
        return 'icml2016 t7', published_embeddings.open_icml(args.icml)
    return None, None


def expected_size(entries, has_embeddings):
    """Return about how many bytes the file will have, with ten captions per photograph."""
    sizes = (os.path.getsize(entry.image_path) for entry in entries if os.path.isfile(entry.image_path))
    jpegs = sum(size for size in sizes if size <= cub.MAX_BYTES['photograph'])
    caption = layout.CAPTION_BYTES + (layout.EMBEDDING_BYTES if has_embeddings else 0)
    return jpegs + len(entries) * 10 * caption


def convert(entries, skipped, args):
    """Read the photographs of `entries` and write them to `args.out` unless it is a dry run.

    Adds those that cannot be used to `skipped`. Returns the source of the embeddings (or None), counts of what was
    read, and the letters in the captions that the sentence encoder does not know. Raises UserError if there is no
    photograph.
    """
    count, letters = Counter(), set()
    source, look_up = open_embeddings(args)
    with contextlib.nullcontext() if args.dry_run else layout.replace_file(args.out) as file:
        if file is None:
            check_can_write(args.out)
        check_space(args.out, expected_size(entries, look_up))
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
            raise UserError(f'{args.cub[0]}: no usable photograph ({len(skipped)} skipped{why}), so nothing is '
                            'written; check --cub, --text and the class lists')
        if source and file is not None:
            file.attrs['embeddings'] = source
    return source, count, letters


def report(count, letters, source, out):
    """Print the number of photographs and captions in every split, remarks about them, the embeddings and the bytes."""
    for split in layout.SPLITS:
        print(f'{split}: {count[split, "photographs"]} photographs, {count[split, "captions"]} captions')
    for remark, explanation in cub.REMARKS.items():
        if count[remark]:
            print(f'{remark}: {count[remark]} photographs ({explanation})')
    if count['strange']:
        shown = [letter if letter.isprintable() else ascii(letter)[1:-1] for letter in sorted(letters)[:SHOWN]]
        print(f'letters that the sentence encoder does not know: in {count["strange"]} captions '
              f'({" ".join(shown)}{" ..." if len(letters) > SHOWN else ""})')
    if count['long']:
        print(f'longer than the {LENGTH} characters that the sentence encoder reads: {count["long"]} captions')
    print(f'embeddings: {source or "none yet; see data/README.md"}')
    print(f'JPEGs: {count["bytes"] / 1e6:.1f} MB')


def report_unlisted(entries, split_of):
    """Print how many photographs belong to a class in no list, and how many classes in the user's lists have none."""
    left_out = [entry.class_name for entry in entries if entry.split is None]
    if left_out:
        print(f'left out: {len(left_out)} photographs of {len(set(left_out))} classes that no class list contains')
    absent = sorted(set(split_of) - {entry.class_name for entry in entries})
    if absent:
        print(f'not in the data: {len(absent)} of the {len(split_of)} classes in the class lists '
              f'({cub.CONTROL.sub("?", ", ".join(absent[:ABSENT]))}{", ..." if absent[ABSENT:] else ""})')


def main():
    """List the photographs, convert those that can be used, and print a report."""
    start, args = time.time(), parse_args()
    args.out = os.path.abspath(args.out)
    layout.check_name(args.out)
    if len(args.cub) != len(args.text):
        raise UserError(f'--cub has {len(args.cub)} folders but --text has {len(args.text)}; give one --text for each '
                        '--cub')
    lists = {split: getattr(args, f'{split}_classes') for split in layout.SPLITS}
    split_of, entries, skipped = cub.read_split(lists), [], []
    for folder, text in zip(args.cub, args.text):
        listed, strange = cub.list_photographs(folder, text, split_of)
        entries += listed
        for path in strange:
            skip(skipped, path, 'images.txt must name a photograph as CLASS/NAME.jpg')
    chosen = [entry for entry in entries if entry.split]
    if entries and not chosen and any(lists.values()):
        raise UserError(f'{", ".join(sum(lists.values(), []))}: lists no class of the data, such as '
                        f'{entries[0].class_name}; write one class name on each line, as the folders in '
                        f'{args.cub[0]}/images are named')
    if entries and not chosen:
        raise UserError(f'{args.cub[0]}: its classes (such as {entries[0].class_name}) are none of the 200 of '
                        'CUB-200-2011; give your own lists, one class name on each line, with --train_classes FILE and '
                        '--test_classes FILE')
    for split, paths in lists.items():
        if paths and chosen and not any(entry.split == split for entry in chosen):
            raise UserError(f'{", ".join(paths)}: lists no class of the data, such as {entries[0].class_name}; write '
                            f'one class name on each line, as the folders in {args.cub[0]}/images are named')
    cub.check_names(chosen)
    source, count, letters = convert(chosen, skipped, args)
    report(count, letters, source, args.out)
    report_unlisted(entries, split_of if any(lists.values()) else {})
    done = 'would write' if args.dry_run else f'wrote {os.path.getsize(args.out) / 1e6:.1f} MB to'
    print(f'{done} {args.out} ({time.time() - start:.0f} s); skipped {len(skipped)} photographs')


if __name__ == '__main__':
    run_command(main)
