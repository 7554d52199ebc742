"""Measure how well text2image generates toy birds in pairs of colors that it never saw together in training.

    python evaluation/color_accuracy.py [--checkpoint FILE] [--count 500]

The newest run of text2image on toy_birds generates images for sentences of /test. Each color in them occurs in /train,
but no pair of body and wing color does. The lines with shuffled colors show what chance would reach.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path.insert(0, ROOT)

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # the imports below take seconds

import argparse
import functools
import random

import numpy as np
import torch
from PIL import Image, ImageDraw

from char_cnn_rnn import reading
from common import checkpoint, flags, run
from common.errors import UserError, run_command
from common.sampling import write_images
from data.toy_birds.drawing import PALETTE, SCENES, random_bird, shapes
from data.toy_birds.prepare import CLASSES, colors_of
from data.txt2image_dataset import Text2ImageDataset
from text2image import checkpoints
from text2image.build_gan import load_generator

BATCH = 100  # images generated at once
SHOWN = 32   # images on the sheet


def main():
    """Generate images, write a sheet with some of them, and print the four accuracies."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', type=flags.path, default=os.path.join(ROOT, 'data', 'toy_birds'), metavar='DIR',
                        help='folder of toy_birds.hdf5 (default: data/toy_birds)')
    parser.add_argument('--out_dir', type=flags.path, default=os.path.join(ROOT, 'text2image', 'output'), metavar='DIR',
                        help='folder of the runs (default: text2image/output)')
    parser.add_argument('--checkpoint', type=flags.path, metavar='FILE',
                        help='checkpoint to measure (default: that of the newest run on toy_birds)')
    parser.add_argument('--count', type=flags.positive(int), default=500, help='number of sentences (default: 500)')
    options = parser.parse_args()
    hdf5_file = flags.dataset_file(argparse.Namespace(data_dir=options.data_dir, dataset='toy_birds'))
    dataset = Text2ImageDataset(hdf5_file, split=2)
    reading.require_embeddings(dataset)
    if unknown := set(dataset.classes) - set(CLASSES):
        raise UserError(f'{dataset.file}: {min(unknown)} is not a class of toy birds; create the file with: '
                        'python data/toy_birds/prepare.py')
    file = (run.existing(options.checkpoint, 'text2image', checkpoints.find) if options.checkpoint else
            newest_checkpoint(options.out_dir))
    model, _ = load_generator(file, device=flags.choose_device(torch.cuda.is_available()))
    reading.check_embeddings(model.data, dataset, file, model.netG.embed_dim)

    captions = torch.linspace(0, len(dataset) - 1, min(options.count, len(dataset))).long()
    parts = dataset.embeddings[captions].split(BATCH)
    images = torch.cat([model.generate(part, seed).cpu() for seed, part in enumerate(parts)])
    colors = [colors_of(dataset.classes[photo]) for photo in dataset.photo_of[captions].tolist()]
    shuffled = [colors[i] for i in torch.randperm(len(colors), generator=torch.Generator().manual_seed(0)).tolist()]
    some = torch.linspace(0, len(images) - 1, min(SHOWN, len(images))).long()
    folder = write_images(run.new_run(options.out_dir, 'color_accuracy', vars(options)), [([images[some]], None)],
                          [dataset.captions[i] for i in captions[some].tolist()])
    print(f'{file}: {len(images)} images for sentences with pairs of colors that are not in /train')
    for what, pairs in (('asked for', colors), ('shuffled', shuffled)):
        for part, accuracy in zip(('body', 'wings'), color_accuracy(images, *map(list, zip(*pairs)))):
            print(f'  {part:5} has the color {what}: {accuracy:.3f}')
    print(f'{len(some)} of the images, above their sentences: {os.path.join(folder, "sheet.png")}')


def newest_checkpoint(out_dir):
    """Return the checkpoint of the newest run on toy_birds in `out_dir`. Raises UserError where there is none."""
    try:
        return checkpoint.newest(os.path.join(run.find_run(out_dir, 'text2image.pt', dataset='toy_birds'),
                                              'text2image.pt'))
    except UserError as error:
        raise UserError(f'{out_dir}: no run on toy_birds with a text2image.pt; train one with: python '
                        'text2image/main.py --train --dataset toy_birds, or name one with --checkpoint FILE') from error


def color_accuracy(images, body_colors, wing_colors):
    """Return the shares of images whose body, and whose wings, have the requested color: two numbers in [0, 1].

    `images` is float [B, 3, 64, 64] in [-1, 1] (or another size that 32 divides); the colors are B names each (see
    `colors_of`). Images that ignore the requested colors score about 1/10.
    """
    guesses = [guess_colors(image) for image in images.detach().cpu().float().numpy()]
    hits = [(body == asked_body, wings == asked_wings)
            for (body, wings), asked_body, asked_wings in zip(guesses, body_colors, wing_colors, strict=True)]
    return tuple(float(share) for share in np.mean(hits, 0))


def guess_colors(image):
    """Return the most likely (body color, wing color) of an image, float [3, 64, 64] in [-1, 1].

    A pixel is a mixture of background, body and wing, as frequent as in drawings of a pose at that place; each has one
    of its colors, with some noise. The likelihood of a pose and a pair of colors is the product over all pixels.
    """
    pixels = image.reshape(3, 32, image.shape[1] // 32, 32, -1).mean((2, 4)).reshape(3, -1).T * 127.5 + 127.5
    rest, body, wings = pose_masks()
    colors = likelihood(pixels, list(PALETTE.values()))
    scene = likelihood(pixels, [tone for tones in SCENES.values() for tone in tones]).max(0)
    body, wings = body[:, None] * colors, wings[:, None] * colors
    # The constant accounts for pixels that are none of these: beak, eye, crown.
    pixel = (rest * scene + .02)[:, None, None] + body[:, :, None] + wings[:, None]
    score = np.log(pixel).sum(-1).max(0)
    np.fill_diagonal(score, -np.inf)
    names = list(PALETTE)
    best = np.unravel_index(score.argmax(), score.shape)
    return names[best[0]], names[best[1]]


def likelihood(pixels, colors, spread=40):
    """Return exp(-|pixel - color|^2 / (2 spread^2)) for pixels [N, 3] and C colors, both in [0, 255]: [C, N]."""
    distance = ((pixels - np.array(colors, np.float32)[:, None]) ** 2).sum(-1)
    return np.exp(-distance / (2 * spread ** 2))


@functools.lru_cache(maxsize=1)
def pose_masks(samples=40):
    """Return how often a pixel shows background, body or wing in the pose of each scene: float32 [3, 6, 32 * 32]."""
    rng, poses = random.Random(0), []
    for scene in SCENES:
        labels = [label_map(random_bird(rng, 'red', 'blue', scene=scene)) for _ in range(samples)]
        poses.append([np.mean(np.equal(labels, part), 0) for part in range(3)])
    return np.array(poses, np.float32).swapaxes(0, 1)


def label_map(bird):
    """Return the part that each pixel of a drawing shows, [32 * 32]: 0 background, 1 body, 2 wing or tail."""
    mask = Image.new('L', (32, 32))
    parts = shapes(bird)
    for part in ('far wing', 'tail', 'body', 'wing'):
        if part in parts:
            ImageDraw.Draw(mask).polygon([tuple(point) for point in 32 * parts[part]], fill=1 if part == 'body' else 2)
    return np.asarray(mask).ravel()


if __name__ == '__main__':
    run_command(main)
