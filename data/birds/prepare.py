"""CUB-200-2011 with ten captions a photograph -> data/birds/birds.hdf5 (layout: data/layout.py).

    python data/birds/prepare.py --cub CUB_200_2011 --text text_c10

Both downloads as published: `--cub` is the folder that holds images.txt, `--text` the one that holds CLASS/NAME.txt.
The zero-shot split is that of StackGAN, 150 species to train on and 50 others to test with.
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
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
SHOWN = 20  # letters that the encoder does not read
ABSENT = 5  # classes that are named


def parse_args():
    """The command line; at most one source of embeddings."""
    parser = OneLineParser(description=__doc__.split('\n')[0])
    parser.add_argument('--cub', type=path, nargs='+', action='extend', required=True, metavar='DIR',
                        help='folders that hold images.txt')
    parser.add_argument('--text', type=path, nargs='+', action='extend', required=True, metavar='DIR',
                        help='folders of the captions, CLASS/NAME.txt, as many as --cub has and in the same order')
    parser.add_argument('--out', type=path, default=os.path.join(HERE, 'birds.hdf5'), metavar='FILE',
                        help='HDF5 file, .hdf5 or .h5 (default: birds.hdf5 beside this script)')
    for split in layout.SPLITS:
        parser.add_argument(f'--{split}_classes', type=path, nargs='+', action='extend', default=[], metavar='FILE',
                            help=f"classes of /{split}, one a line (default: StackGAN's 150 and 50 for all three)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument('--pickles', type=path, metavar='DIR',
                        help="StackGAN's embeddings: train/ and test/ with their pickles")
    source.add_argument('--icml', type=path, metavar='DIR', help="Reed's embeddings: CLASS/NAME.t7")
    parser.add_argument('--dry_run', action='store_true', help='say what would be written and skipped; write nothing')
    return parser.parse_args()


def path(text):
    """An argparse type: a path, which '' (an unset variable of the shell, say) is not."""
    if not text:
        raise argparse.ArgumentTypeError('is empty; leave out the flag, or give a path')
    return text


def skip(skipped, key, reason):
    """Print that a photograph is left out, and why; add that to the list `skipped`."""
    skipped.append(f'{key}: {reason}')
    tqdm.write(f'skipped {skipped[-1]}')


def read_all(entries, look_up, skipped):
    """Yield (split, Photograph, remarks) of every entry; add those that cannot be used to `skipped`."""
    def attempt(entry):
        try:
            return entry, cub.read_photograph(entry, look_up)
        except ValueError as error:
            return entry, error
        except MemoryError:
            return entry, ValueError('its files take more memory than there is')

    pool = ThreadPoolExecutor()
    try:
        with tqdm(total=len(entries), unit=' photographs', disable=None) as bar:
            waiting = ()
            for start in range(0, len(entries) + CHUNK, CHUNK):     # the pool reads a chunk while the last is written
                done, waiting = waiting, pool.map(attempt, entries[start:start + CHUNK])
                for entry, result in done:
                    signals.let_act()
                    bar.update()
                    if isinstance(result, ValueError):
                        skip(skipped, entry.key, result)
                    else:
                        yield entry.split, *result
    finally:
        pool.shutdown(cancel_futures=True)


def open_embeddings(args):
    """(source, look_up): who made the embeddings, and the function that finds a photograph's; or None, None."""
    if args.pickles:
        return 'StackGAN pickles', published_embeddings.open_pickles(args.pickles)
    if args.icml:
        return 'icml2016 t7', published_embeddings.open_icml(args.icml)
    return None, None


def expected_size(entries, has_embeddings):
    """About how many bytes the file will have, ten captions a photograph."""
    sizes = (os.path.getsize(entry.image_path) for entry in entries if os.path.isfile(entry.image_path))
    jpegs = sum(size for size in sizes if size <= cub.MOST['photograph'])
    caption = layout.CAPTION_BYTES + (layout.EMBEDDING_BYTES if has_embeddings else 0)
    return jpegs + len(entries) * 10 * caption


def convert(entries, skipped, args):
    """Read the photographs of `entries` and write them to `args.out` unless it is a dry run.

    Adds those that cannot be used to `skipped`. Returns who made the embeddings (or None), counts of what there was,
    and the letters of captions that the sentence encoder does not read.
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
            why = f', most because {reasons.most_common(1)[0][0]}' if skipped else ''
            raise UserError(f'{args.cub[0]}: no usable photograph ({len(skipped)} skipped{why}), so nothing is '
                            'written; check --cub, --text and the class lists')
        if source and file is not None:
            file.attrs['embeddings'] = source
    return source, count, letters


def report(count, letters, source, out):
    """Print what there was: photographs and captions of every split, what is odd about them, embeddings, bytes."""
    for split in layout.SPLITS:
        print(f'{split}: {count[split, "photographs"]} photographs, {count[split, "captions"]} captions')
    for remark, explanation in cub.REMARKS.items():
        if count[remark]:
            print(f'{remark}: {count[remark]} photographs ({explanation})')
    if count['strange']:
        shown = [letter if letter.isprintable() else ascii(letter)[1:-1] for letter in sorted(letters)[:SHOWN]]
        print(f'letters that the sentence encoder does not read: in {count["strange"]} captions '
              f'({" ".join(shown)}{" ..." if len(letters) > SHOWN else ""})')
    if count['long']:
        print(f'longer than the {LENGTH} characters that the sentence encoder reads: {count["long"]} captions')
    print(f'embeddings: {source or "none yet; data/README.md says how to write them"}')
    print(f'JPEGs: {count["bytes"] / 1e6:.1f} MB')


def say_unlisted(entries, split_of):
    """Print how many photographs have a class in no list, and how many classes in the user's lists have none."""
    left_out = [entry.class_name for entry in entries if entry.split is None]
    if left_out:
        print(f'left out: {len(left_out)} photographs of {len(set(left_out))} classes that are in no class list')
    absent = sorted(set(split_of) - {entry.class_name for entry in entries})
    if absent:
        print(f'not in the data: {len(absent)} of the {len(split_of)} classes in the class lists '
              f'({cub.CONTROL.sub("?", ", ".join(absent[:ABSENT]))}{", ..." if absent[ABSENT:] else ""})')


def main():
    """List the photographs, convert those that can be used, and say what came of it."""
    start, args = time.time(), parse_args()
    args.out = os.path.abspath(args.out)
    layout.check_name(args.out)
    if len(args.cub) != len(args.text):
        raise UserError(f'--cub has {len(args.cub)} folders but --text {len(args.text)}; give a --text for every --cub')
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
                        f'{entries[0].class_name}; write a class name a line, as folders in {args.cub[0]}/images have')
    if entries and not chosen:
        raise UserError(f'{args.cub[0]}: its classes ({entries[0].class_name} is one) are none of the 200 of '
                        'CUB-200-2011; give lists of your own, a class name a line, with --train_classes FILE and '
                        '--test_classes FILE')
    cub.check_names(chosen)
    source, count, letters = convert(chosen, skipped, args)
    report(count, letters, source, args.out)
    say_unlisted(entries, split_of if any(lists.values()) else {})
    done = 'would write' if args.dry_run else f'wrote {os.path.getsize(args.out) / 1e6:.1f} MB to'
    print(f'{done} {args.out} ({time.time() - start:.0f} s); skipped {len(skipped)} photographs')


if __name__ == '__main__':
    run_command(main)
