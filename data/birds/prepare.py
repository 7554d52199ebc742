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

import time

from common.argument_types import path
from common.errors import UserError, run_command
from data import converting, layout
from data.birds import cub, published_embeddings


def parse_args():
    """Parse the command line, which may name one source of embeddings."""
    parser = converting.Parser(description=__doc__.split('\n')[0])
    parser.add_argument('--cub', type=path, nargs='+', action='extend', required=True, metavar='DIR',
                        help='folders that hold images.txt; several go into one file')
    parser.add_argument('--text', type=path, nargs='+', action='extend', required=True, metavar='DIR',
                        help='folders of the captions, CLASS/NAME.txt, one for each --cub, in the same order')
    converting.add_flags(parser, os.path.join(HERE, 'birds.hdf5'), 'birds.hdf5 beside this script',
                         "StackGAN's 150 and 50")
    source = parser.add_mutually_exclusive_group()
    source.add_argument('--pickles', type=path, metavar='DIR',
                        help="folder of StackGAN's embeddings: train/ and test/ with their pickles")
    source.add_argument('--icml', type=path, metavar='DIR', help="folder of Reed's embeddings: CLASS/NAME.t7")
    return parser.parse_args()


def open_embeddings(args):
    """Return (name of the source, function that looks up a photograph's embeddings), or (None, None)."""
    if args.pickles:
        return 'StackGAN pickles', published_embeddings.open_pickles(args.pickles)
    if args.icml:
        return published_embeddings.ICML, published_embeddings.open_icml(args.icml)
    return None, None


def main():
    """List the photographs, convert those that can be used, and print a report."""
    start, args = time.time(), parse_args()
    args.out = os.path.abspath(args.out)
    layout.check_name(args.out)
    if len(args.cub) != len(args.text):
        raise UserError(f'--cub has {len(args.cub)} folders but --text has {len(args.text)}; give one --text for each '
                        '--cub')
    lists = converting.class_lists(args)
    split_of, entries, skipped = cub.read_split(lists), [], []
    for folder, text in zip(args.cub, args.text):
        listed, strange = cub.list_photographs(folder, text, split_of)
        entries += listed
        for line in strange:
            converting.skip(skipped, line, 'images.txt must name a photograph as CLASS/NAME.jpg')
    chosen = [entry for entry in entries if entry.split]
    if entries and not chosen and not any(lists.values()):
        raise UserError(f'{args.cub[0]}: its classes (such as {entries[0].class_name}) are none of the 200 of '
                        'CUB-200-2011; give your own lists, one class name on each line, with --train_classes FILE and '
                        '--test_classes FILE')
    converting.check_lists(entries, lists, os.path.join(args.cub[0], 'images'))
    converting.check_names(chosen)
    converting.convert(chosen, skipped, args.out, args.dry_run, args.cub[0], 'check --cub, --text and the class lists',
                       *open_embeddings(args))
    converting.report_unlisted(entries, split_of if any(lists.values()) else {})
    converting.report_end(args.out, args.dry_run, skipped, start)


if __name__ == '__main__':
    run_command(main)
