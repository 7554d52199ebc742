"""Does bf16 draw as well as fp32? text2image, trained in both from the same seeds for the same number of steps.

    python benchmarks/precision_quality.py [--steps 500] [--seeds 3] [--batch_size 256] [--lr 0.0002]

The measure is the Fréchet distance (Heusel et al., NIPS 2017) between the photographs of held-out classes and the
pictures drawn for a caption of each; instead of Inception's features it is that of efficientnet_lite0's. Precisions
are as good as each other where their means differ by less than seeds do. Where the hardware has no bf16, its products
are computed in float32 from the same bfloat16 operands and rounded to bfloat16, as the hardware does it, but slower.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # while the imports take seconds

import argparse
import contextlib

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader
from tqdm import tqdm

from char_cnn_rnn.image_encoder import SIZE, pretrained
from char_cnn_rnn.reading import require_embeddings
from common import flags, speed
from common.errors import UserError, run_command
from common.speed import precision
from data.txt2image_dataset import Text2ImageDataset
from text2image.build_gan import Model

PRECISIONS = ('fp32', 'bf16')
BATCH = 8  # pictures that are drawn and looked at together: few enough for a CPU's cache
PRODUCTS = {torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default,
            torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--file', type=flags.path, default=os.path.join(ROOT, 'data', 'birds', 'birds.hdf5'),
                        help='with embeddings (default: data/birds/birds.hdf5)')
    parser.add_argument('--steps', type=flags.positive(int), default=500, help='of each training (default: 500)')
    parser.add_argument('--seeds', type=flags.positive(int), default=3, help='trainings of a precision (default: 3)')
    parser.add_argument('--batch_size', type=flags.positive(int), default=256, help='(default: 256)')
    parser.add_argument('--lr', type=flags.positive(float), default=0.0002, help='(default: 0.0002)')
    options = parser.parse_args()
    device = flags.choose_device(torch.cuda.is_available())
    dataset = require_embeddings(Text2ImageDataset(options.file, drawn=False)).to(device)
    if len(dataset) < options.batch_size:
        raise UserError(f'{options.file}: has {len(dataset)} captions in /train, which is not a batch; '
                        'give a smaller --batch_size')
    held_out = require_embeddings(Text2ImageDataset.held_out(options.file))
    embeddings = held_out.embeddings[np.unique(held_out.photo_of, return_index=True)[1]]  # each one's first caption
    look = Looker(device)
    photographs = look(held_out.pictures.split(BATCH))
    print(f'{len(photographs)} photographs of /{held_out.split}; {options.steps} steps of {options.batch_size}, '
          f'{device.type}{"" if precision.has_bf16(device) else ", bf16 imitated"}', flush=True)

    found = {name: [] for name in PRECISIONS}
    for seed in range(1, options.seeds + 1):
        for name in PRECISIONS:
            model = train(name, seed, dataset, options, device)
            drawn = (model.generate(part, noise) for noise, part in enumerate(embeddings.split(BATCH)))
            found[name].append(frechet_distance(look((pixels + 1) * 127.5 for pixels in drawn), photographs))
            print(f'seed {seed}  {name}  {found[name][-1]:.2f}', flush=True)
    print('\n| precision | mean | lowest | highest |\n|---|---|---|---|')
    for name, distances in found.items():
        print(f'| {name} | {sum(distances) / len(distances):.2f} | {min(distances):.2f} | {max(distances):.2f} |')


def train(name, seed, dataset, options, device):
    """A Model that was trained for `--steps` steps in the precision `name`; it draws without bf16, as main.py does."""
    torch.manual_seed(seed)
    batches = DataLoader(dataset, options.batch_size, shuffle=True, collate_fn=dataset.collate, drop_last=True)
    model = Model('quality', device, None, 3, l1_coef=50, l2_coef=100)
    imitated = name == 'bf16' and not precision.has_bf16(device)
    with RoundedProducts() if imitated else contextlib.nullcontext():
        speed.prepare(model.netG.train(), [model.netD.train()], device=device, precision=name, compile=False,
                      batch_size=options.batch_size)
        model.create_optim(options.lr)
        for batch, _ in zip(endless(batches), tqdm(range(options.steps), name, leave=False, disable=None)):
            model.train_step(batch)
    drawing = Model('quality', device, None, 3, l1_coef=0, l2_coef=0)
    drawing.netG.load_state_dict(model.netG.state_dict())
    return drawing


def endless(batches):
    while True:
        yield from batches


class RoundedProducts(TorchDispatchMode):
    """Computes products of bfloat16 tensors as hardware does: exactly, summed in float32, and rounded once."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator not in PRODUCTS or args[1].dtype != torch.bfloat16:
            return operator(*args, **(kwargs or {}))
        result = operator(*tree_map_only(torch.Tensor, torch.Tensor.float, args), **(kwargs or {}))
        return tree_map_only(torch.Tensor, torch.Tensor.bfloat16, result)


class Looker:
    """efficientnet_lite0's features [N, 1280] of batches of pictures with pixels in [0, 255]."""

    def __init__(self, device):
        network, mean, std, _ = pretrained('efficientnet_lite0')
        self.network = network.eval().to(device, memory_format=torch.channels_last)
        self.device = device
        self.mean, self.std = (torch.tensor(value, device=device).view(-1, 1, 1) for value in (mean, std))

    @torch.no_grad()
    def __call__(self, batches):
        features = []
        for pixels in batches:
            pixels = F.interpolate(pixels.to(self.device).float(), size=SIZE, mode='bicubic', antialias=True)
            pixels = (pixels.clamp(0, 255) - self.mean) / self.std
            features.append(self.network(pixels.contiguous(memory_format=torch.channels_last)))
        return torch.cat(features)


def frechet_distance(features, others):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of the means m and covariances S of two sets [N, D] and [M, D].

    S = A'A for centered features A divided by sqrt(N - 1), so tr (S1 S2)^(1/2) is the sum of A1 A2's singular values:
    no root of a D x D matrix is taken, which would be ill-conditioned with fewer pictures than features.
    """
    features, others = features.double(), others.double()
    centered, others_centred = ((values - values.mean(0)) / (len(values) - 1) ** .5 for values in (features, others))
    shared = torch.linalg.svdvals(centered @ others_centred.T).sum()
    return float((features.mean(0) - others.mean(0)).square().sum()
                 + centered.square().sum() + others_centred.square().sum() - 2 * shared)


if __name__ == '__main__':
    run_command(main)
