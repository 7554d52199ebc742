"""Compare the quality of images after training in bf16 and in fp32, for text2image with the same seeds and steps.

    python benchmarks/precision_quality.py [--steps 500] [--seeds 3] [--batch_size 256] [--lr 0.0002]

The measure is the Fréchet distance (Heusel et al., NIPS 2017) between the photographs of held-out classes and images
generated for one caption of each, with features of efficientnet_lite0 in place of Inception's. Both precisions are
equally good if their means differ by less than the seeds do. Without bf16 hardware, products of bfloat16 operands are
computed in float32 and rounded to bfloat16: the same results as of such hardware, but slower.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path.insert(0, ROOT)

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # the imports below take seconds

import argparse
import contextlib

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader
from tqdm import tqdm

from char_cnn_rnn.reading import require_embeddings
from common import flags, speed
from common.errors import UserError, run_command
from common.speed import precision
from data.txt2image_dataset import Text2ImageDataset
from evaluation.features import BATCH, FeatureExtractor
from evaluation.measures import frechet_distance
from text2image.build_gan import Model

PRECISIONS = ('fp32', 'bf16')
PRODUCTS = {torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default,
            torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


def main():
    """Parse the flags, train and measure with every seed and precision, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--file', type=flags.path, default=os.path.join(ROOT, 'data', 'birds', 'birds.hdf5'),
                        help='HDF5 file with embeddings (default: data/birds/birds.hdf5)')
    parser.add_argument('--steps', type=flags.positive(int), default=500,
                        help='number of training steps (default: 500)')
    parser.add_argument('--seeds', type=flags.positive(int), default=3,
                        help='number of runs per precision (default: 3)')
    parser.add_argument('--batch_size', type=flags.positive(int), default=256, help='batch size (default: 256)')
    parser.add_argument('--lr', type=flags.positive(float), default=0.0002, help='learning rate (default: 0.0002)')
    options = parser.parse_args()
    device = flags.choose_device(torch.cuda.is_available())
    dataset = require_embeddings(Text2ImageDataset(options.file, drawn=False)).to(device)
    if len(dataset) < options.batch_size:
        raise UserError(f'{options.file}: has {len(dataset)} captions in /train, less than a batch; '
                        'give a smaller --batch_size')
    held_out = require_embeddings(Text2ImageDataset.held_out(options.file))
    first_captions = np.unique(held_out.photo_of, return_index=True)[1]
    embeddings = held_out.embeddings[first_captions]
    features_of = FeatureExtractor(device)
    photographs, _ = features_of(held_out.pictures.split(BATCH))
    print(f'{len(photographs)} photographs of /{held_out.split}; {options.steps} steps of {options.batch_size}, '
          f'{device.type}{"" if precision.has_bf16(device) else ", bf16 emulated"}', flush=True)

    found = {name: [] for name in PRECISIONS}
    for seed in range(1, options.seeds + 1):
        for name in PRECISIONS:
            model = train(name, seed, dataset, options, device)
            images = (model.generate(part, noise) for noise, part in enumerate(embeddings.split(BATCH)))
            found[name].append(frechet_distance(features_of((image + 1) * 127.5 for image in images)[0], photographs))
            print(f'seed {seed}  {name}  {found[name][-1]:.2f}', flush=True)
    print('\n| precision | mean | lowest | highest |\n|---|---|---|---|')
    for name, distances in found.items():
        print(f'| {name} | {sum(distances) / len(distances):.2f} | {min(distances):.2f} | {max(distances):.2f} |')


def train(name, seed, dataset, options, device):
    """Train for `--steps` steps in the precision `name`. Returns a Model that generates in fp32, as main.py does."""
    torch.manual_seed(seed)
    batches = DataLoader(dataset, options.batch_size, shuffle=True, collate_fn=dataset.collate, drop_last=True)
    model = Model('quality', device, None, 3, l1_coef=50, l2_coef=100)
    is_emulated = name == 'bf16' and not precision.has_bf16(device)
    with RoundedProducts() if is_emulated else contextlib.nullcontext():
        speed.prepare(model.netG.train(), [model.netD.train()], device=device, precision=name, compile=False,
                      batch_size=options.batch_size)
        model.create_optim(options.lr)
        for batch, _ in zip(endless(batches), tqdm(range(options.steps), name, leave=False, disable=None)):
            model.train_step(batch)
    trained = Model('quality', device, None, 3, l1_coef=0, l2_coef=0)
    trained.netG.load_state_dict(model.netG.state_dict())
    return trained


def endless(batches):
    """Yield batches, epoch after epoch, without end."""
    while True:
        yield from batches


class RoundedProducts(TorchDispatchMode):
    """Compute products of bfloat16 tensors as hardware does: exactly, summed in float32, and rounded once."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator not in PRODUCTS or args[1].dtype != torch.bfloat16:
            return operator(*args, **(kwargs or {}))
        result = operator(*tree_map_only(torch.Tensor, torch.Tensor.float, args), **(kwargs or {}))
        return tree_map_only(torch.Tensor, torch.Tensor.bfloat16, result)


if __name__ == '__main__':
    run_command(main)
