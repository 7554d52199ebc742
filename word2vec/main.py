"""Train word vectors on the captions of a data set, then query similar words and analogies, or plot a map.

    python main.py --train                                      CBOW on the captions of data/birds/birds.hdf5
    python main.py --train --model skipgram --loss negative     skip-gram with negative sampling
    python main.py --train --resume                             continue the newest run
    python main.py --train False                                count the colors among the neighbors of colors
    python main.py --query red                                  print the nearest words
    python main.py --analogy light lighter dark                 complete: light is to lighter as dark is to ...
    python main.py --plot                                       plot a map of colors and parts of birds
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

from common import dry_run, flags, ranks, run
from common.errors import UserError, run_command
from data import checked_files
from data.cache import load_split
from word2vec.build_embedding import LOSSES, NETWORKS, OPTIMIZERS, Model, load_model
from word2vec.corpus import Vocabulary, Windows
from word2vec.plot import COLORS, draw_words, shown_words

QUERY, ANALOGY, PLOT = ASKING = 'query', 'analogy', 'plot'  # modes that only this section has
MODES = (*flags.TRAINING, flags.EVALUATE, *ASKING)
NEGATIVE = 5
NEAREST = 5  # words printed for a query or an analogy

WIDEST = 1000  # limit of --window
MOST = 10_000  # limit of --negative


def parse_flags():
    """Return (options, folder of the run to resume or None)."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_run_flags(parser, model='cbow', epochs=20, batch_size=512, lr=0.003, section_dir=HERE,
                        all_modes=MODES, seed_modes=(flags.TRAIN,), resume_modes=(flags.RESUME,),
                        data_modes=flags.TRAINING, models=list(NETWORKS))
    parser.set_defaults(train=None)  # `mode_of` sets it, so that a query needs no --train False
    parser.add_argument('--loss', choices=LOSSES, default='softmax', modes=(flags.TRAIN,),
                        help='loss: softmax over the whole vocabulary, or negative sampling (default: softmax)')
    parser.add_argument('--negative', type=flags.positive(int), metavar='N', modes=(flags.TRAIN,),
                        help=f'negative samples per predicted word, with --loss negative (default: {NEGATIVE})')
    parser.add_argument('--vector_size', type=flags.positive(int), default=100, metavar='N', modes=(flags.TRAIN,),
                        help='length of the word vectors (default: 100)')
    parser.add_argument('--window', type=flags.positive(int), default=5, metavar='N', modes=(flags.TRAIN,),
                        help='maximum number of context words on each side (default: 5)')
    parser.add_argument('--min_count', type=flags.positive(int), default=5, metavar='N', modes=(flags.TRAIN,),
                        help='minimum number of occurrences of a word; rarer words are ignored (default: 5)')
    parser.add_argument('--sample', type=flags.non_negative(float), default=0, metavar='T', modes=(flags.TRAIN,),
                        help='randomly drop words that make up more than this share of the text; 0.001 is usual for '
                             'large corpora, 0 drops none (default: 0)')
    parser.add_argument('--optimizer', choices=OPTIMIZERS, default='adam', modes=(flags.TRAIN,),
                        help='optimizer: adam, or sgd, the plain gradient descent of the paper (default: adam)')
    parser.add_argument('--query', action='append', metavar='WORD', modes=(QUERY,),
                        help=f'print the {NEAREST} words nearest to this word; can be repeated')
    parser.add_argument('--analogy', nargs=3, metavar=('A', 'B', 'C'), modes=(ANALOGY,),
                        help='print the words that are to C as B is to A')
    flags.add_boolean(parser, '--plot', False, 'plot the numbers and vectors of words for colors and bird parts',
                      modes=(PLOT,))
    parser.add_argument('--checkpoint', type=flags.path, metavar='FILE', modes=(flags.EVALUATE, *ASKING),
                        help='checkpoint to query: a run folder or its .pt file (default: the newest run of the '
                             'model on DATASET)')
    return run.parse_options(parser, mode_of)


def mode_of(options):
    """Return the mode that the options select, one of `MODES`.

    Sets `options.train`, if it was not typed, to False for a query and True otherwise.
    """
    if options.train is None:
        options.train = not any(getattr(options, mode) for mode in ASKING)
    return flags.mode_of(options, *ASKING)


def main():
    """Parse the flags, then train, evaluate, or query word vectors."""
    options, resumed = parse_flags()
    if ranks.world_size() > 1:
        raise UserError('word vectors train in one process; start it with python, not with torchrun')
    device = flags.choose_device(options.cuda)
    if mode_of(options) in flags.TRAINING:
        with checked_files.only_read(options.dry_run):
            train(options, device, resumed)
    else:
        ask(options, device)


def train(options, device, resumed):
    """Train in a new run folder, or resume the run in the folder `resumed`."""
    if options.negative and options.loss != 'negative':
        raise UserError('--negative: has no effect with --loss softmax; add --loss negative')
    if options.window > WIDEST:
        raise UserError(f'--window {options.window}: too large, captions have a few dozen words; give {WIDEST} or less')
    if options.negative and options.negative > MOST:
        raise UserError(f'--negative {options.negative}: too many, 5 to 20 are usual; give {MOST} or less')
    flags.print_options(options)
    flags.seed_everything(options.seed)
    path = flags.dataset_file(options)
    split = load_split(path, 'train')
    vocabulary = Vocabulary.of(split.index.captions, options.min_count)
    windows = Windows(split.index.captions, vocabulary, options.batch_size, options.window, options.sample)
    model = Model(options.model, device, windows, vocabulary, options.vector_size, options.loss,
                  options.negative or NEGATIVE)
    model.create_optim(options.lr, options.optimizer)
    if not resumed:
        with torch.random.fork_rng(devices=[]):  # raises UserError if there is nothing to train on
            next(iter(windows))
    data = {'file': os.path.basename(path), 'captions': split.fingerprint['captions']}  # no embeddings or images
    run_dir = run.begin(model, [], resumed, options.out_dir, options.dataset, vars(options), data,
                        dry_run=options.dry_run)
    model.keep = options.keep
    if options.dry_run:
        return dry_run.report(model, {'net': model.net}, options.epochs, options.log_interval,
                              run_dir,
                              caches=checked_files.planned(), unit='words', smallest=1)
    print(f'Training on {len(split.index.captions)} captions: {len(windows.words)} words, {len(vocabulary)} of them '
          f'different; everything goes to {run_dir}', flush=True)
    model.train(options.epochs, options.log_interval, run_dir)
    print(f'done: {run_dir} holds log.txt, TensorBoard curves and {options.model}.pt')


def ask(options, device):
    """Print the answer to `--query` or `--analogy`, plot the map of words, or evaluate."""
    if options.checkpoint:
        run.refuse_given(['dataset'] + ([] if options.plot else ['out_dir']), 'with --checkpoint, which names the run')
    file = run.checkpoint_file(options.model, options.out_dir, options.checkpoint, None, dataset=options.dataset)
    model = load_model(file, device)
    if 'model' in run.GIVEN_FLAGS and options.model != model.name:
        raise UserError(f'--model {options.model}: {file} holds {model.name}; leave out --model, or give another file')
    print(f'{file} ({len(model.vocabulary)} words):')
    if options.query:
        for word in options.query:
            print_nearest(f'nearest to {word}', model.nearest(model.vectors([word])[0], NEAREST, without=[word]))
    elif options.analogy:
        a, b, c = options.analogy
        print_nearest(f'{a} is to {b} as {c} is to', model.analogy(a, b, c, NEAREST))
    elif options.plot:
        words = shown_words(model.vocabulary)
        sheet = os.path.join(run.new_run(options.out_dir, PLOT, vars(options)), 'words.png')
        draw_words(words, map(model.vocabulary.number, words), model.vectors(words).cpu()).save(sheet)
        print(f'map of colors and parts of birds, by number and by vector: {sheet}')
    else:
        print_colors(model.eval(COLORS))


def print_nearest(question, found):
    """Print a question and the words found for it, with their cosines."""
    print('\n'.join([f'{question}:', *(f'  {cosine:5.2f}  {word}' for word, cosine in found)]))


def print_colors(neighbors):
    """Print a table of colors and their nearest words, and the number of colors among these words."""
    right = {color: sum(word in COLORS for word in words) for color, words in neighbors.items()}
    for color, words in neighbors.items():
        print(f'  {color:<10} {right[color]} of {len(words)}  {", ".join(words)}')
    print(f'{sum(right.values())} of the {sum(map(len, neighbors.values()))} words nearest to {len(right)} colors '
          'are colors')


if __name__ == '__main__':
    run_command(main)
