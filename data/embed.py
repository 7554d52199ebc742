"""Write the embeddings of any sentence encoder into an HDF5 file of captioned images, in place of those it has.

    python data/embed.py birds --sentence_transformer FOLDER      a model of sentence-transformers
    python data/embed.py birds --open_clip ViT-B-32:FILE          the text side of a CLIP model
    python data/embed.py birds --npy FILE.npz                     embeddings that another program computed

The encoder that the chapter uses writes its own: python char_cnn_rnn/main.py --embed.
"""
import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # the imports below take seconds

import argparse

import torch

from common import flags
from common.errors import UserError, run_command
from data import layout
from data.cache import load_split
from data.embedding import embed_file, save_encoder
from data.embedding_file import EmbeddingFile
from data.sentence_encoders import ARRAY, CLIP, TRANSFORMER, SentenceEncoder, fingerprint_of

NOTE_BYTES = 10_000  # of the file that names the encoder


def parse_args():
    """Parse the command line, which names the data set and one source of embeddings."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('dataset', type=flags.plain_name, metavar='NAME', help='name of the HDF5 file, such as birds')
    parser.add_argument('--data_dir', type=flags.absolute_path, metavar='DIR',
                        help='folder of the HDF5 file (default: data/NAME in the repository)')
    source = parser.add_mutually_exclusive_group(required=True)
    for name, metavar, what in (
            (TRANSFORMER, 'DIR_OR_NAME', 'model of sentence-transformers: its folder, or its name on the hub'),
            (CLIP, 'ARCHITECTURE:FILE', 'CLIP model of open_clip: its architecture and a file of its weights'),
            (ARRAY, 'FILE', 'NPZ file with the arrays names and embeddings, one row for each caption')):
        source.add_argument(f'--{name}', type=flags.path, metavar=metavar, help=what).modes = None
    flags.add_boolean(parser, '--download', False, 'download a model that is not on this machine yet (and take '
                                                   'ARCHITECTURE:TAG for --open_clip)')
    options = parser.parse_args()
    if options.download and options.npy:
        raise UserError('--download: has no effect with --npy; leave it out')
    return options


def main():
    """Write the embeddings of the source that the flags name."""
    options = parse_args()
    path = flags.dataset_file(options)
    if not os.path.isfile(path):
        raise layout.no_such_file(path)
    encoder, width, embed = from_array(path, options.npy) if options.npy else from_encoder(path, options)
    count = embed_file(path, width, NOTE_BYTES, embed)
    beside = save_encoder(path, encoder.contents())
    print(f'done: {count} embeddings of {width} numbers in {path}; {beside} says which encoder they are of')


def from_encoder(path, options):
    """Return (the encoder that the flags name, the width of its embeddings, function for `embed_file`)."""
    kind = TRANSFORMER if options.sentence_transformer else CLIP
    encoder = SentenceEncoder(kind, getattr(options, kind), device=flags.choose_device(torch.cuda.is_available()),
                              download=options.download)
    print(f'{encoder.fingerprint}, {encoder.name} embeds the captions of {path}', flush=True)

    def embed(indexes):
        rows = {split: encoder.embed(index.captions, verbose=True) for split, index in indexes.items()}
        return rows, f'{kind}, {os.path.basename(encoder.name)}', encoder.fingerprint
    return encoder, encoder.width, embed


def from_array(path, file):
    """Return the same for an NPZ file, where the encoder is not on this machine."""
    count = sum(len(load_split(path, split).index.keys) for split in layout.SPLITS)
    found = EmbeddingFile(file, count)
    encoder = SentenceEncoder(ARRAY, os.path.basename(file) + (f' of {found.encoder}' if found.encoder else ''))

    def embed(indexes):
        rows = found.read({split: index.keys for split, index in indexes.items()})
        encoder.expected = fingerprint_of(ARRAY, rows.values())
        return rows, f'{ARRAY}, {encoder.name}', encoder.fingerprint
    return encoder, found.width, embed


if __name__ == '__main__':
    run_command(main)
