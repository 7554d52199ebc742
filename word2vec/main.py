"""Word vectors: train them on the captions of a data set, then ask for similar words, analogies and a map.

    python main.py --train                                      CBOW on the captions of data/birds/birds.hdf5
    python main.py --train --model skipgram --loss negative     the other network, the other loss
    python main.py --train --resume                             go on with the newest run
    python main.py --train False                                how many neighbors of colors are colors
    python main.py --query red                                  the nearest words
    python main.py --analogy light lighter dark                 light is to lighter as dark is to ...
    python main.py --plot                                       a map of colors and parts of birds
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # while the imports take seconds

import argparse

import torch

from common import flags, ranks, run
from common.errors import UserError, run_command
from data.cache import load_split
from word2vec.build_embedding import LOSSES, NETWORKS, OPTIMIZERS, Model, load_model
from word2vec.corpus import Vocabulary, Windows
from word2vec.plot import COLORS, draw_words, shown_words

QUERY, ANALOGY, PLOT = ASKING = 'query', 'analogy', 'plot'  # modes of its own
MODES = (*flags.TRAINING, flags.EVALUATE, *ASKING)
NEGATIVE = 5
NEAREST = 5  # words that a query finds, or an analogy

WIDEST = 1000  # --window
MOST = 10_000  # --negative


def parse_flags():
    """(options, the folder of the run to go on with or None)."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_run_flags(parser, model='cbow', epochs=20, batch_size=512, lr=0.003, section_dir=HERE,
                        all_modes=MODES, seed_modes=(flags.TRAIN,), resume_modes=(flags.RESUME,),
                        data_modes=flags.TRAINING, models=list(NETWORKS))
    parser.set_defaults(train=None)  # which `mode_of` sets: words can be asked for without typing --train False
    parser.add_argument('--loss', choices=LOSSES, default='softmax', modes=(flags.TRAIN,),
                        help='softmax over the whole vocabulary, or negative sampling (default: softmax)')
    parser.add_argument('--negative', type=flags.positive(int), metavar='N', modes=(flags.TRAIN,),
                        help=f'random words for each word to be predicted, with --loss negative (default: {NEGATIVE})')
    parser.add_argument('--vector_size', type=flags.positive(int), default=100, metavar='N', modes=(flags.TRAIN,),
                        help='numbers in the vector of a word (default: 100)')
    parser.add_argument('--window', type=flags.positive(int), default=5, metavar='N', modes=(flags.TRAIN,),
                        help='words of context to each side, at most (default: 5)')
    parser.add_argument('--min_count', type=flags.positive(int), default=5, metavar='N', modes=(flags.TRAIN,),
                        help='leave out words that occur less often (default: 5)')
    parser.add_argument('--sample', type=flags.non_negative(float), default=0, metavar='T', modes=(flags.TRAIN,),
                        help='leave out words more frequent than this share of all, at random; 0: none; for large '
                             'corpora 0.001 (default: 0)')
    parser.add_argument('--optimizer', choices=OPTIMIZERS, default='adam', modes=(flags.TRAIN,),
                        help='adam, or sgd, plain gradient descent as in the paper (default: adam)')
    parser.add_argument('--query', action='append', metavar='WORD', modes=(QUERY,),
                        help=f'print the {NEAREST} words nearest to this one; can be repeated')
    parser.add_argument('--analogy', nargs=3, metavar=('A', 'B', 'C'), modes=(ANALOGY,),
                        help='print what is to C as B is to A')
    flags.add_boolean(parser, '--plot', False, 'plot colors and parts of birds by number and by vector', modes=(PLOT,))
    parser.add_argument('--checkpoint', type=flags.path, metavar='FILE', modes=(flags.EVALUATE, *ASKING),
                        help='ask this run, or its .pt file (default: the newest run of the model on DATASET)')
    return run.parse_options(parser, mode_of)


def mode_of(options):
    """What the options ask for, one of `MODES`. Sets `train` where it was not typed: True, unless words are asked for.
    """
    if options.train is None:
        options.train = not any(getattr(options, mode) for mode in ASKING)
    return flags.mode_of(options, *ASKING)


def main():
    """Flags, then what they ask for: train, evaluate, or ask for words."""
    options, resumed = parse_flags()
    if ranks.world_size() > 1:
        raise UserError('word vectors train in one process; start it with python, not with torchrun')
    device = flags.choose_device(options.cuda)
    if mode_of(options) in flags.TRAINING:
        train(options, device, resumed)
    else:
        ask(options, device)


def train(options, device, resumed):
    """Train in a new run folder, or continue the run in the folder `resumed`."""
    if options.negative and options.loss != 'negative':
        raise UserError('--negative: has no effect with --loss softmax; add --loss negative')
    if options.window > WIDEST:
        raise UserError(f'--window {options.window}: captions have some tens of words; give {WIDEST} or less')
    if options.negative and options.negative > MOST:
        raise UserError(f'--negative {options.negative}: 5 to 20 are usual; give {MOST} or less')
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
        with torch.random.fork_rng(devices=[]):  # raises UserError where there is nothing to train on
            next(iter(windows))
    data = {'file': os.path.basename(path), 'captions': split.fingerprint['captions']}  # all that it reads
    run_dir = run.begin(model, [], resumed, options.out_dir, options.dataset, vars(options), data)
    model.keep = options.keep
    print(f'Training on {len(split.index.captions)} captions: {len(windows.words)} words, {len(vocabulary)} of them '
          f'different; everything goes to {run_dir}', flush=True)
    model.train(options.epochs, options.log_interval, run_dir)
    print(f'done: {run_dir} holds log.txt, TensorBoard curves and {options.model}.pt')


def ask(options, device):
    """Print the words that are asked for, or write the map of words."""
    file = run.checkpoint_file(options.model, options.out_dir, options.checkpoint, None, dataset=options.dataset)
    model = load_model(file, device)
    if 'model' in run.GIVEN_FLAGS and options.model != model.name:
        raise UserError(f'--model {options.model}: {file} is of {model.name}; leave out --model, or give another file')
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
        print(f'colors and parts of birds by number and by vector: {sheet}')
    else:
        print_colors(model.eval(COLORS))


def print_nearest(question, found):
    print('\n'.join([f'{question}:', *(f'  {cosine:5.2f}  {word}' for word, cosine in found)]))


def print_colors(neighbors):
    """Print a table of colors and the words nearest to them, and count the colors among those."""
    right = {color: sum(word in COLORS for word in words) for color, words in neighbors.items()}
    for color, words in neighbors.items():
        print(f'  {color:<10} {right[color]} of {len(words)}  {", ".join(words)}')
    print(f'{sum(right.values())} of the {sum(map(len, neighbors.values()))} words nearest to {len(right)} colors '
          'are colors')


if __name__ == '__main__':
    run_command(main)
