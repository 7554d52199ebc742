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
import itertools
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from common.errors import UserError, run_command  # noqa: E402
from data import layout  # noqa: E402
from data.birds import cub, published_embeddings  # noqa: E402

CHUNK = 256     # photographs in memory at a time, and in one go through the encoder
CAPTION_BYTES, EMBEDDING_BYTES = 800, 4400      # what a caption's group takes in the file, and its embedding (measured)


def parse_args():
    """The command line; at most one source of embeddings."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--cub', nargs='+', required=True, metavar='DIR', help='folders that hold images.txt')
    parser.add_argument('--text', nargs='+', required=True, metavar='DIR',
                        help='folders of the captions, CLASS/NAME.txt, as many as --cub has and in the same order')
    parser.add_argument('--out', default=os.path.join(HERE, 'birds.hdf5'), metavar='FILE')
    for split in layout.SPLITS:
        parser.add_argument(f'--{split}_classes', metavar='FILE',
                            help=f"classes of /{split}, one a line (default: StackGAN's 150 and 50 for all three)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument('--encoder', metavar='CKPT', help='sentence encoder trained by char_cnn_rnn/main.py')
    source.add_argument('--pickles', metavar='DIR', help="StackGAN's embeddings: train/ and test/ with their pickles")
    source.add_argument('--icml', metavar='DIR', help="Reed's embeddings: CLASS/NAME.t7")
    parser.add_argument('--dry_run', action='store_true', help='say what would be written and skipped; write nothing')
    return parser.parse_args()


def read_all(entries, look_up, skipped):
    """Yield (split, Photograph) lists of up to CHUNK; add the keys of those that cannot be used to `skipped`."""
    def attempt(entry):
        try:
            return entry, cub.read_photograph(entry, look_up)
        except ValueError as error:
            return entry, error

    with ThreadPoolExecutor() as pool, tqdm(total=len(entries), unit=' photographs', disable=None) as bar:
        waiting = ()
        for start in range(0, len(entries) + CHUNK, CHUNK):     # the pool reads a chunk while the last one is written
            done, waiting = waiting, pool.map(attempt, entries[start:start + CHUNK])
            usable = []
            for entry, result in done:
                bar.update()
                if isinstance(result, ValueError):
                    skipped.append(entry.key)
                    tqdm.write(f'skipped {entry.key}: {result}')
                else:
                    usable.append((entry.split, result))
            if usable:
                yield usable


def open_embeddings(args):
    """(source, look_up, encoder): who made the embeddings, and how to get at them, or what makes them; or all None."""
    if args.pickles:
        return 'StackGAN pickles', published_embeddings.open_pickles(args.pickles), None
    if args.icml:
        return 'icml2016 t7', published_embeddings.open_icml(args.icml), None
    if args.encoder:
        # `data` imports no chapter; only this command does, and only when it is asked to.
        from char_cnn_rnn.build_encoder import load_encoder
        return 'char_cnn_rnn encoder', None, load_encoder(args.encoder)
    return None, None, None


def check_space(entries, source, out):
    """Raise UserError where the disk cannot hold the file: HDF5 crashes when one fills up, and leaves half a file."""
    needed = sum(os.path.getsize(entry.jpeg_path) for entry in entries if os.path.isfile(entry.jpeg_path))
    needed += len(entries) * 10 * (CAPTION_BYTES + (EMBEDDING_BYTES if source else 0))
    free = shutil.disk_usage(os.path.dirname(out)).free
    if needed > free:
        raise UserError(f'{out}: needs about {needed / 1e6:.0f} MB, but its disk has {free / 1e6:.0f} MB left; '
                        'make room, or give --out another place')


def write(file, usable, encoder):
    """Write a list of (split, Photograph), which `encoder` gives their embeddings where there is one."""
    if encoder:
        from char_cnn_rnn.build_encoder import embed_captions
        captions = list(itertools.chain.from_iterable(photograph.captions for _, photograph in usable))
        rows = iter(embed_captions(encoder, captions, verbose=False))
        for _, photograph in usable:
            photograph.embeddings = list(itertools.islice(rows, len(photograph.captions)))
    for split, photograph in usable:
        layout.write_photograph(file, split, photograph)


def convert(entries, skipped, args):
    """Read the photographs of `entries` and write them to `args.out` unless it is a dry run.

    Adds those that cannot be used to `skipped`. Returns who made the embeddings (or None) and counts of what there was.
    """
    count = Counter()
    source, look_up, encoder = open_embeddings(args)
    with contextlib.nullcontext() if args.dry_run else layout.replace_file(args.out) as file:
        if not args.dry_run:
            check_space(entries, source, args.out)
        for usable in read_all(entries, look_up, skipped):
            for split, photograph in usable:
                count.update({(split, 'photographs'): 1, (split, 'captions'): len(photograph.captions),
                              'bytes': len(photograph.jpeg), 'boxless': photograph.bbox is None})
            if not args.dry_run:
                write(file, usable, encoder)
        if not count:
            raise UserError(f'{args.cub[0]}: no usable photograph ({len(skipped)} skipped), so nothing is written; '
                            'check --cub, --text and the class lists')
        if source and not args.dry_run:
            file.attrs['embeddings'] = source
    if encoder and not args.dry_run:
        from char_cnn_rnn.build_encoder import save_encoder
        save_encoder(encoder, args.out)
    return source, count


def report(count, source, out):
    """Print what there was: photographs and captions of every split, boxes, embeddings, and the size of the JPEGs."""
    for split in layout.SPLITS:
        print(f'{split}: {count[split, "photographs"]} photographs, {count[split, "captions"]} captions')
    if count['boxless']:
        print(f'no bounding box: {count["boxless"]} photographs (bounding_boxes.txt is absent or does not name them)')
    print(f'embeddings: {source or "none yet; make them with: " + layout.how_to_embed(out)}')
    print(f'JPEGs: {count["bytes"] / 1e6:.1f} MB')


def say_unlisted(entries, split_of):
    """Print how many photographs have a class in no list, and how many classes in the user's lists have none."""
    left_out = [entry.class_name for entry in entries if entry.split is None]
    if left_out:
        print(f'left out: {len(left_out)} photographs of {len(set(left_out))} classes that are in no class list')
    absent = set(split_of) - {entry.class_name for entry in entries}
    if absent:
        print(f'not in the data: {len(absent)} of the {len(split_of)} classes in the class lists')


def main():
    """List the photographs, convert those that can be used, and say what came of it."""
    start, args = time.time(), parse_args()
    args.out = os.path.abspath(args.out)
    if len(args.cub) != len(args.text):
        raise UserError(f'--cub has {len(args.cub)} folders but --text {len(args.text)}; give a --text for every --cub')
    if os.path.isdir(args.out):
        raise UserError(f'{args.out}: is a folder; --out takes the name of a file')
    lists = {split: getattr(args, f'{split}_classes') for split in layout.SPLITS}
    split_of, entries, skipped = cub.read_split(lists), [], []
    for folder, text in zip(args.cub, args.text):
        listed, strange = cub.list_photographs(folder, text, split_of)
        entries += listed
        skipped += strange
    for path in skipped:
        print(f'skipped {path}: images.txt must name a photograph as CLASS/NAME.jpg')
    cub.check_names(entries)
    source, count = convert([entry for entry in entries if entry.split], skipped, args)
    report(count, source, args.out)
    say_unlisted(entries, split_of if any(lists.values()) else {})
    done = 'would write' if args.dry_run else f'wrote {os.path.getsize(args.out) / 1e6:.1f} MB to'
    print(f'{done} {args.out} ({time.time() - start:.0f} s); skipped {len(skipped)} photographs')


if __name__ == '__main__':
    run_command(main)
