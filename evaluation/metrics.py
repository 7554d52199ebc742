"""Measure the images that runs of the three GANs generate for captions of species they were not trained on.

    python evaluation/metrics.py RUN RUN... [--count 1500] [--split test] [--features efficientnet_lite0]

Prints a table with a row for each run, one for real photographs (what could be reached) and one for shuffled captions
(what chance reaches). Adds a line of JSON to RUN/metrics.jsonl, and writes RUN/nearest.png: generated images, each
beside the training photograph that is most like it. evaluation/README.md describes the measures.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path.insert(0, ROOT)

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # the imports below take seconds

import argparse
import itertools
import json
import time

import numpy as np
import torch
from tqdm import tqdm

from common import flags, run_page
from common.errors import UserError, run_command
from common.files import atomic_write, check_can_write
from common.log import Curves
from common.pictures import side_by_side
from common.sampling import save_sheet
from evaluation import features, measures
from evaluation.features import BATCH
from evaluation.trained_runs import TrainedRun

SHOWN = 16             # images in nearest.png
REPEATED, NOISES = 32, 8  # captions of which several images are generated, and how many of each
ORDERS = 20            # of captions, whose mean is chance
SECONDS = 5            # between two looks at the checkpoints of runs that are being trained
FEWEST = 50            # images or photographs, below which distances say nothing


def main():
    """Measure every run and print a table for each kind of data and size of images."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=flags.path, metavar='RUN', help='run folders, or NAME.pt in them')
    parser.add_argument('--split', choices=('test', 'valid', 'train'), default='test',
                        help='split whose captions are read (default: test)')
    parser.add_argument('--count', type=flags.positive(int), default=1500,
                        help='number of images; distances depend on it (default: 1500)')
    parser.add_argument('--best_of', type=flags.up_to(flags.MOST_CHOSEN), default=1, metavar='N',
                        help='measure images generated with --best_of N (default: 1)')
    parser.add_argument('--features', choices=features.NETWORKS, default='efficientnet_lite0',
                        help='network whose features are compared; inception is that of published numbers '
                             '(default: efficientnet_lite0)')
    parser.add_argument('--inception_weights', type=flags.path, metavar='FILE',
                        help='weights for --features inception, a file of torch-fidelity')
    flags.add_boolean(parser, '--watch', False, 'then measure every new checkpoint of the runs, until Ctrl-C')
    options = parser.parse_args()
    if options.count < FEWEST:
        raise UserError(f'--count {options.count}: too few images to compare distributions; give {FEWEST} or more')
    if options.inception_weights and options.features != 'inception':
        raise UserError('--inception_weights: is only read with --features inception')
    device = flags.choose_device(torch.cuda.is_available())
    runs = [TrainedRun(path, device, options.best_of) for path in options.runs]
    for run in runs:
        for name in ('nearest.png', 'metrics.jsonl'):
            check_can_write(os.path.join(run.folder, name))
    extract = features.extractor(options.features, device, options.inception_weights)
    print_tables(runs, options, extract)
    watched = {path: (run.file, run.saved_ns) for path, run in zip(options.runs, runs)} if options.watch else {}
    del runs
    while watched:
        print('waiting for the next checkpoint; Ctrl-C ends this', flush=True)
        path = wait_for_checkpoint(watched)
        del watched[path]
        try:
            run = TrainedRun(path, device, options.best_of)
            print_tables([run], options, extract)
            watched[path] = run.file, run.saved_ns  # now the last: no run is forgotten while others save often
        except UserError as error:
            print(f'{error}; {path} is not watched any more', flush=True)


def wait_for_checkpoint(watched):
    """Return the first path whose checkpoint is new or gone; `watched` is {path: (checkpoint, when it was saved)}."""
    while True:
        for path, (file, saved_ns) in watched.items():
            try:
                is_new = os.stat(file).st_mtime_ns != saved_ns
            except OSError:
                return path
            if is_new:
                return path
        time.sleep(SECONDS)


def print_tables(runs, options, extract):
    """Measure runs, and print a table for each kind of data and size of images."""
    for _, same_data in itertools.groupby(sorted(runs, key=_data_of), _data_of):
        print_table(list(same_data), options, extract)


def _data_of(run):
    return os.path.abspath(run.hdf5_file), run.prepared


def print_table(runs, options, extract):
    """Measure runs on the same data at the same size, and print them below one another."""
    real = Photographs(runs[0], options.split, options.features, extract, options.inception_weights)
    captions = torch.linspace(0, len(real.embeddings) - 1, min(options.count, len(real.embeddings))).long()
    print(f'{len(captions)} captions of {len(real.features)} photographs of {int(real.species.max()) + 1} species in '
          f'/{options.split} of {real.dataset.file}, {runs[0].prepared.replace("_", ", ")} pixels\n', flush=True)
    for run in runs:
        run.check(real.dataset)
    chosen = f', best of {options.best_of}' * (options.best_of > 1)
    rows = [(f'{run.file}, {run.step:,} steps{chosen}', measure(run, real, captions, options, extract)) for run in runs]
    rows += [('real photographs', of_real(real, captions, options.split)),
             ('shuffled captions', of_shuffled(real, captions))]
    names = list(rows[0][1])
    print(f'| | {" | ".join(names)} |\n|{"---|" * (len(names) + 1)}')
    for title, found in rows:
        print(f'| {title} | ' + ' | '.join(_shown(found.get(name)) for name in names) + ' |')
    print()


def _shown(value):
    return '' if value is None else f'{value:.1f}' if abs(value) >= 100 else f'{value:.3g}'


class Photographs:
    """The photographs that generated images are compared with: features, species and captions of a split.

    Also `train_features` of the training data, and `read(features)`, which reads the embedding of a caption off an
    image: a linear map from the features of training photographs to the mean embeddings of their captions. No GAN was
    trained with it.
    """

    def __init__(self, run, split, name, extract, weights=None):
        dataset, train = run.dataset(split), run.dataset('train')
        self.dataset, self.train, self.name = dataset, train, name
        self.embeddings, self.photo_of = dataset.embeddings, dataset.photo_of
        self.species = torch.from_numpy(np.unique(dataset.classes, return_inverse=True)[1]).long()
        counts = torch.bincount(self.species)
        if len(self.species) < FEWEST or len(counts) < 2 or counts.max() < 2:
            raise UserError(f'{dataset.file}: /{split} has {len(self.species)} photographs of {len(counts)} classes, '
                            f'too few to compare with: {FEWEST} are needed, of two or more classes, with two or more '
                            'of some class; give another --split')
        self.features, self.logits = features.of_photographs(extract, name, dataset, run.prepared, weights)
        self.train_features, _ = features.of_photographs(extract, name, train, run.prepared, weights)
        described = torch.zeros(len(train.classes), train.embeddings.shape[1])
        described.index_add_(0, train.photo_of, train.embeddings)
        described /= torch.bincount(train.photo_of)[:, None]
        self.center = described.mean(0)
        self.read = measures.fit_linear(self.train_features, described - self.center)
        self.classify = measures.fit_species(self.features, self.species)


@torch.no_grad()
def measure(run, real, captions, options, extract):
    """Generate an image for each of the captions (long [N]) and return {name of a measure: number}."""
    embeddings = real.embeddings[captions]
    shown, spread = [], torch.linspace(0, len(captions) - 1, min(SHOWN, len(captions))).long().tolist()

    def images():
        bar = tqdm(embeddings.split(BATCH), 'generating', unit_scale=BATCH, unit=' images', leave=False, disable=None)
        for number, part in enumerate(bar):
            generated = run.generate(part, number)
            shown.extend(generated[i - number * BATCH] for i in spread if i // BATCH == number)
            yield (generated + 1) * 127.5

    found, logits = extract(images())
    species = real.species[real.photo_of[captions]]
    repeated = torch.linspace(0, len(captions) - 1, min(REPEATED, len(captions))).long().tolist()
    bar = tqdm(repeated, 'generating for diversity', unit=' captions', leave=False, disable=None, delay=2)
    varied, _ = extract((run.generate(embeddings[i].expand(NOISES, -1), i) + 1) * 127.5 for i in bar)
    distances, nearest = measures.nearest(found, real.train_features)
    numbers = {
        **distribution(found, logits, real.features, real.name),
        'species': float((real.classify(found) == species).double().mean()),
        'r_precision': measures.r_precision(real.read(found), embeddings - real.center, species),
        'diversity': measures.mean_distance_within(varied, torch.arange(len(repeated)).repeat_interleave(NOISES)),
        'nearest': float(distances.mean()),
    }
    photographs = [torch.from_numpy(real.train.photograph(int(nearest[i]))) for i in spread]
    save_sheet(side_by_side([torch.stack(shown), torch.stack(photographs) / 127.5 - 1], run.size),
               os.path.join(run.folder, 'nearest.png'))
    keep(run, options, len(captions), numbers)
    return numbers


def distribution(found, logits, others, name):
    """Return the measures that compare all images with all photographs, with the features' name in theirs."""
    score = {} if logits is None else {'inception_score': measures.inception_score(logits)}
    return {f'frechet_{name}': measures.frechet_distance(found, others),
            f'kid_{name}': measures.kernel_distance(found, others), **score}


def of_real(real, captions, split):
    """Return the measures of real photographs: what a perfect generator would reach.

    The Fréchet distance is that of two halves. Fewer images give larger distances, so it is an upper bound.
    """
    photos, half = real.photo_of[captions], measures.half_of(real.species)
    return {
        **distribution(real.features[half], real.logits, real.features[~half], real.name),
        'species': measures.species_of_halves(real.features, real.species),
        'r_precision': measures.r_precision(real.read(real.features[photos]), real.embeddings[captions] - real.center,
                                            real.species[photos]),
        'diversity': measures.mean_distance_within(real.features, real.species),
        # Of a training photograph, the nearest one is itself.
        'nearest': None if split == 'train' else float(measures.nearest(real.features, real.train_features)[0].mean()),
    }


def of_shuffled(real, captions):
    """Return what photographs reach if each is judged by the caption of another one: chance, averaged over orders."""
    generator = torch.Generator().manual_seed(0)
    photos, found = real.photo_of[captions], []
    for _ in tqdm(range(ORDERS), 'shuffled captions', unit=' orders', leave=False, disable=None, delay=2):
        others = photos[torch.randperm(len(captions), generator=generator)]
        found.append((float((real.species[others] == real.species[photos]).double().mean()),
                      measures.r_precision(real.read(real.features[others]), real.embeddings[captions] - real.center,
                                           real.species[photos])))
    return dict(zip(('species', 'r_precision'), np.mean(found, 0).tolist()))


def keep(run, options, count, numbers):
    """Add a line with the numbers to RUN/metrics.jsonl, and points to the curves in RUN/metrics.

    With `--best_of`, the names say so: such numbers are not compared with others.
    """
    if options.best_of > 1:
        numbers = {f'{name}_best_of_{options.best_of}': number for name, number in numbers.items()}
    path = os.path.join(run.folder, 'metrics.jsonl')
    line = {'checkpoint': os.path.basename(run.file), 'step': run.step, 'epoch': run.epoch, 'split': options.split,
            'images': count, **numbers}
    before = b''
    if os.path.isfile(path):
        with open(path, 'rb') as file:
            before = file.read()
    with atomic_write(path, follow_links=False) as file:
        file.write(before + b'\n' * (before[-1:] not in (b'', b'\n')) + json.dumps(line).encode() + b'\n')
    try:
        place = os.path.join(run.folder, 'metrics', f'{options.split}_{count}')  # only these numbers are one curve
        os.makedirs(place, exist_ok=True)
        curves = Curves(place)
        curves.add(numbers, run.step)
        curves.close()
    except (OSError, UserError) as error:
        print(f'{error}; the numbers are in {path}')
    try:
        run_page.renew(run.folder)
    except UserError as error:
        print(f'{error}; the numbers are in {path}')


if __name__ == '__main__':
    run_command(main)
