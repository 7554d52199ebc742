"""Convert Oxford-102 flowers with Reed's captions to data/flowers/flowers.hdf5 (layout: data/layout.py).

    python data/flowers/prepare.py --images jpg --text text_c10

`--images` is the published folder of image_00001.jpg to image_08189.jpg, and `--text` Reed's folder that holds
class_00001/image_06734.txt, which says what class a photograph is of. His class lists are read if they are beside it.
"""
import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # while the imports take seconds

import time
from collections import Counter
from functools import partial

from common.argument_types import path
from common.errors import UserError, run_command
from data import converting, layout
from data.birds.published_embeddings import ICML, open_icml
from data.bounded_files import files_in, is_plain, normalized, shown, some
from data.converting import Entry, read_captions, skip

LISTS = {'train': 'trainclasses.txt', 'valid': 'valclasses.txt', 'test': 'testclasses.txt'}  # as Reed calls them


def parse_args():
    """Parse the command line."""
    parser = converting.Parser(description=__doc__.split('\n')[0])
    parser.add_argument('--images', type=path, required=True, metavar='DIR', help='folder of the photographs, NAME.jpg')
    parser.add_argument('--text', type=path, required=True, metavar='DIR', help='folder of captions, CLASS/NAME.txt')
    converting.add_flags(parser, os.path.join(HERE, 'flowers.hdf5'), 'flowers.hdf5 beside this script',
                         "Reed's trainclasses.txt, valclasses.txt and testclasses.txt in --text or the folder above")
    parser.add_argument('--icml', type=path, metavar='DIR', help="folder of Reed's embeddings: CLASS/NAME.t7")
    return parser.parse_args()


def find_lists(args):
    """Return {split: paths of class lists}: those of the flags, or else Reed's. Raises UserError without any."""
    lists = converting.class_lists(args)
    if any(lists.values()):
        return lists
    above = os.path.dirname(os.path.abspath(args.text))
    for folder in (args.text, above):
        found = {split: os.path.join(folder, file) for split, file in LISTS.items()}
        if os.path.exists(found['train']):
            return {split: [file] if os.path.exists(file) else [] for split, file in found.items()}
    raise UserError(f"{args.text}: neither this folder nor {above} has trainclasses.txt; put Reed's class lists "
                    'there, or give your own with --train_classes FILE and --test_classes FILE')


def list_photographs(images, text, split_of):
    """Return (an `Entry` for each CLASS/NAME.txt in `text`, unusable names). Raises UserError if there are none."""
    for flag, folder in (('--images', images), ('--text', text)):
        if not os.path.isdir(folder):
            raise UserError(f'{flag} {folder}: no such folder; give it as published')
    entries, strange = [], []
    for file in files_in(text):
        key, ending = os.path.splitext(file)
        if ending.lower() != '.txt' or key.count('/') != 1:
            continue
        if not is_plain(file):
            strange.append(shown(file))
            continue
        class_name, name = key.split('/')
        class_name = normalized(class_name)
        entries.append(Entry(split_of.get(class_name), class_name, name, key, os.path.join(images, f'{name}.jpg'),
                             partial(read_captions, os.path.join(text, file)), converting.no_box))
    for name, count in Counter(entry.name for entry in entries).items():
        if count > 1:
            keys = [entry.key for entry in entries if entry.name == name]
            raise UserError(f'{text}: {keys[0]}.txt and {keys[1]}.txt are both for {name}.jpg; keep only one')
    if not entries:
        raise UserError(f'{text}: holds no CLASS/NAME.txt; give --text the folder text_c10 of the flowers')
    return entries, strange


def main():
    """List the photographs, convert those that can be used, and print a report."""
    start, args, skipped = time.time(), parse_args(), []
    args.out = os.path.abspath(args.out)
    layout.check_name(args.out)
    lists = find_lists(args)
    split_of = converting.split_of_classes(converting.read_class_lists(lists))
    entries, strange = list_photographs(args.images, args.text, split_of)
    for file in strange:
        skip(skipped, file, 'its name has control characters or is not UTF-8')
    converting.check_lists(entries, lists, args.text)
    chosen = [entry for entry in entries if entry.split]
    source = (ICML, open_icml(args.icml)) if args.icml else ()
    converting.convert(chosen, skipped, args.out, args.dry_run, args.images,
                       'check --images, --text and the class lists', *source)
    with_captions = {entry.name for entry in entries}
    without = [name for name, ending in map(os.path.splitext, os.listdir(args.images))
               if ending.lower() in ('.jpg', '.jpeg') and name not in with_captions]
    if without:
        print(f'without captions: {len(without)} photographs ({some(without)})')
    converting.report_unlisted(entries, split_of)
    converting.report_end(args.out, args.dry_run, skipped, start)


if __name__ == '__main__':
    run_command(main)
