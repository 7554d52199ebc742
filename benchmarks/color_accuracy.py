"""Zero-shot ability on toy_birds: are birds drawn in colours that were never trained on together?

    python benchmarks/color_accuracy.py [--checkpoint FILE] [--count 500]

Draws sentences of /test, whose body and wing colours occur in /train only with other partners, with text2image's newest
run on toy_birds, and measures the colours of the pictures. The last two lines are for shuffled colours: chance.
"""
import argparse
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch

from common import flags, run
from common.errors import run_command
from common.sampling import write_pictures
from data.toy_birds.prepare import color_accuracy, colors_of
from data.txt2image_dataset import Text2ImageDataset
from text2image.build_gan import Model

BATCH = 100
SHOWN = 32


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', default=os.path.join(ROOT, 'data', 'toy_birds'))
    parser.add_argument('--out_dir', default=os.path.join(ROOT, 'text2image', 'output'), help='where the runs are')
    parser.add_argument('--checkpoint', help='default: of the newest run on toy_birds')
    parser.add_argument('--count', type=flags.positive(int), default=500, help='sentences to draw (default: 500)')
    options = parser.parse_args()
    dataset = Text2ImageDataset(os.path.join(options.data_dir, 'toy_birds.hdf5'), split=2).require_embeddings()
    file = options.checkpoint or os.path.join(
        run.find_run(options.out_dir, 'text2image.pt', dataset='toy_birds'), 'text2image.pt')
    model = Model('text2image', flags.choose_device(torch.cuda.is_available()), None, 3, 0, 0)
    model.load_from(file, verbose=False)

    captions = torch.linspace(0, len(dataset) - 1, min(options.count, len(dataset))).long()
    parts = dataset.embeddings[captions].split(BATCH)
    images = torch.cat([model.generate(part, seed).cpu() for seed, part in enumerate(parts)])
    colors = [colors_of(dataset.classes[photo]) for photo in dataset.photo_of[captions].tolist()]
    shuffled = [colors[i] for i in torch.randperm(len(colors), generator=torch.Generator().manual_seed(0)).tolist()]
    some = torch.linspace(0, len(images) - 1, min(SHOWN, len(images))).long()
    write_pictures(options, 'color_accuracy', [[images[some]]], [dataset.captions[i] for i in captions[some].tolist()])
    print(f'{file}: {len(images)} pictures for sentences with colours never trained on together')
    for what, pairs in (('asked for', colors), ('shuffled', shuffled)):
        for part, accuracy in zip(('body', 'wings'), color_accuracy(images, *map(list, zip(*pairs)))):
            print(f'  {part:5} has the colour {what}: {accuracy:.3f}')


if __name__ == '__main__':
    run_command(main)
