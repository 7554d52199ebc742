"""Compare our word vectors with gensim's: how many of the words nearest to colors are colors?

    pip install gensim
    python benchmarks/word2vec_gensim.py [--file data/birds/birds.hdf5] [--epochs 20] [--seeds 3]

Both use the same vocabulary, vector size, window, epochs, number of negative samples, and one thread. gensim uses SGD
with its own learning rates (0.025, falling to 0.0001), one word after the other; ours uses Adam on batches of words.
For each seed, prints how many of the five words nearest to each color are colors, summed over all colors, and the
processor time of training; for CBOW with negative sampling and the first seed, also prints the words.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path.insert(0, ROOT)

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # the imports below take seconds

import argparse
import time

import torch

from common import flags
from common.errors import UserError, run_command
from data.cache import load_split
from word2vec.build_embedding import Model
from word2vec.corpus import Vocabulary, Windows, words_of
from word2vec.plot import COLORS

VECTOR_SIZE, WINDOW, MIN_COUNT, NEGATIVE, LR, BATCH_SIZE = 100, 5, 5, 5, 0.003, 512  # defaults of word2vec/main.py


def main():
    """Parse the flags, train all models, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--file', type=flags.path, default=os.path.join(ROOT, 'data', 'birds', 'birds.hdf5'),
                        help='HDF5 file with captions in /train (default: data/birds/birds.hdf5)')
    parser.add_argument('--epochs', type=flags.positive(int), default=20, help='number of epochs (default: 20)')
    parser.add_argument('--seeds', type=flags.positive(int), default=3,
                        help='number of runs of each kind (default: 3)')
    options = parser.parse_args()
    torch.set_num_threads(1)
    captions = load_split(options.file, 'train').index.captions
    vocabulary = Vocabulary.of(captions, MIN_COUNT)
    colors = [word for word in vocabulary.words if word in COLORS]
    nearest = {}  # {way: {color: the words nearest to it}}
    print(f'{len(captions)} captions, {len(vocabulary)} words, {len(colors)} of them colors, {options.epochs} epochs\n')
    print(f'| | colors among the {5 * len(colors)} nearest words, for each seed | seconds |\n|---|---|---|')
    for model in ('cbow', 'skipgram'):
        for way, train in (('gensim, negative sampling', train_gensim),
                           ('ours, negative sampling', trainer('negative')), ('ours, softmax', trainer('softmax'))):
            found, seconds = [], []
            for seed in range(1, options.seeds + 1):
                started = time.process_time()
                trained = train(model, captions, vocabulary, options.epochs, seed)
                seconds.append(time.process_time() - started)
                found.append(trained.eval(COLORS))
            print(f'| {model}: {way} | {", ".join(str(sum(map(count, one.values()))) for one in found)} '
                  f'| {sum(seconds) / len(seconds):.1f} |', flush=True)
            if model == 'cbow' and 'negative' in way:
                nearest[way] = found[0]
    print_neighbors(colors, nearest)


def trainer(loss):
    """Return a function that trains a `Model` of ours with this loss."""
    def train(name, captions, vocabulary, epochs, seed):
        flags.seed_everything(seed)
        windows = Windows(captions, vocabulary, BATCH_SIZE, WINDOW)
        model = Model(name, 'cpu', windows, vocabulary, VECTOR_SIZE, loss, NEGATIVE)
        model.create_optim(LR)
        model.train(epochs, verbose=False)
        return model
    return train


def train_gensim(name, captions, vocabulary, epochs, seed):
    """Train with gensim. Returns a `Model` that holds gensim's vectors."""
    try:
        from gensim.models import Word2Vec
    except ImportError as error:
        raise UserError('gensim is not installed; this comparison needs: pip install gensim') from error
    trained = Word2Vec([words_of(caption) for caption in captions], vector_size=VECTOR_SIZE, window=WINDOW,
                       min_count=MIN_COUNT, negative=NEGATIVE, sample=0, epochs=epochs, sg=int(name == 'skipgram'),
                       seed=seed, workers=1).wv
    model = Model(name, 'cpu', None, vocabulary, VECTOR_SIZE)
    model.net.W.data = torch.tensor(trained[vocabulary.words])
    return model


def count(words):
    """Return the number of colors among words."""
    return sum(word in COLORS for word in words)


def print_neighbors(colors, nearest):
    """Print a table of the words nearest to each color in both ways, with colors in bold."""
    print(f'\n| color | {" | ".join(nearest)} |\n|---|{"---|" * len(nearest)}')
    for color in colors:
        cells = (', '.join(f'**{word}**' if word in COLORS else word for word in found[color])
                 for found in nearest.values())
        print(f'| {color} | {" | ".join(cells)} |')


if __name__ == '__main__':
    run_command(main)
