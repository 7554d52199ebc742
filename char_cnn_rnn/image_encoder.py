"""The image side of the joint embedding: features of photographs.

Reed et al. (CVPR 2016) use a GoogLeNet that was trained on ImageNet and do not train it further. So the features of a
photograph are computed once and cached in a file.
"""
import io
import os
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from char_cnn_rnn.encoder import EMBED_DIM
from common import checkpoint
from common.efficientnet import MEAN, STD, load_efficientnet
from common.errors import CannotWrite, UserError
from common.files import check_is_file
from data import checked_files, layout
from data.cache import cache_folder, load_split
from data.pictures import BadPicture, read_picture
from data.txt2image_dataset import preprocess

FEATURES = {'googlenet': 1024, 'efficientnet_lite0': 1280}
SIZE, SCRATCH_SIZE = 224, 64
BATCH = 32


class ScratchCNN(nn.Module):
    """Compute features of norm 10 with a small, jointly trained network: uint8 [B, 3, 64, 64] -> [B, 1024].

    The norm determines what the sentence encoder learns on toy_birds: with a larger one, the loss becomes small while
    the embeddings still depend mostly on the initial weights; with a smaller one, they use only a few directions.
    """

    LENGTH = 10

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 128, 256)
        layers = [nn.Sequential(nn.Conv2d(a, b, 4, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
                  for a, b in zip(widths, widths[1:])]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 4 * 4, EMBED_DIM),
                                    nn.BatchNorm1d(EMBED_DIM, affine=False))

    def forward(self, images):
        return self.LENGTH * F.normalize(self.layers(images.float() / 127.5 - 1))


class ColorGrid(nn.Module):
    """Compute which colors are where in an image, as features of norm 10: uint8 [B, 3, 64, 64] -> [B, 1024].

    Like the paper's GoogLeNet, it is not trained further after `fit`. Random color features of the pixels (Rahimi and
    Recht, NIPS 2007) are averaged over an 8 x 8 grid and whitened (Coates, Lee and Ng, AISTATS 2011). So each part of
    a bird adds its color, whatever the colors of the others, and small parts weigh as much as large ones: the sentence
    encoder learns to read the parts of pairs that it never sees together. The ten colors of bodies and the ten of wings
    change these features along 18 directions. With many more than that, what was learned about the one had more in
    common with what was learned about the other, and a GAN mixed them up (docs/results.md).
    """

    LENGTH, COLORS, CELL, DIRECTIONS = 10, 48, 8, 24
    FIT_IMAGES = 2000

    def __init__(self):
        super().__init__()
        cells = self.COLORS * (SCRATCH_SIZE // self.CELL) ** 2
        self.register_buffer('weight', 1.5 * torch.randn(self.COLORS, 3, 1, 1))
        self.register_buffer('bias', torch.randn(self.COLORS))
        self.register_buffer('mean', torch.zeros(cells))
        self.register_buffer('whitening', torch.zeros(cells, self.DIRECTIONS))
        self.register_buffer('rotation', torch.linalg.qr(torch.randn(EMBED_DIM, self.DIRECTIONS))[0].T.contiguous())

    def fit(self, images):
        """Determine mean and whitening from training images, uint8 [N, 3, 64, 64], of which it takes up to 2,000."""
        images = images[::-(-len(images) // self.FIT_IMAGES)]
        grids = torch.cat([self._grid(batch.to(self.mean.device)) for batch in images.split(100)])
        self.mean = grids.mean(0)
        _, sizes, directions = torch.svd_lowrank(grids - self.mean, min(self.DIRECTIONS, len(grids)), niter=8)
        kept = sizes > 1e-4 * sizes[0]  # fewer than DIRECTIONS if there are only a few different images
        self.whitening[:, :kept.sum()] = directions[:, kept] / sizes[kept]

    def _grid(self, images):
        colors = F.relu(F.conv2d(images.float() / 127.5 - 1, self.weight, self.bias))
        return F.avg_pool2d(colors, self.CELL).flatten(1)

    def forward(self, images):
        return self.LENGTH * F.normalize((self._grid(images) - self.mean) @ self.whitening @ self.rotation)


OF_IMAGES = {'color_grid': ColorGrid, 'scratch': ScratchCNN}  # those that read images
CHOICES = (*FEATURES, *OF_IMAGES)


def image_side(name):
    """Return the module that maps rows of `load_photographs` to [B, 1024], for a name in `CHOICES`.

    The paper compares sentences with GoogLeNet's 1,024 features directly; features of another width go through a linear
    layer that is trained.
    """
    if name in OF_IMAGES:
        return OF_IMAGES[name]()
    return nn.Identity() if FEATURES[name] == EMBED_DIM else nn.Linear(FEATURES[name], EMBED_DIM)


def load_photographs(name, path, split, weights=None, device='cpu'):
    """Return the input of the image side: one row per photograph of a split of the HDF5 file `path`, in index order.

    These are uint8 images [N, 3, 64, 64] for a name in `OF_IMAGES`, else float32 features [N, 1024 or 1280], cached for
    `path`. `weights` is the file of a state dict for GoogLeNet. In a dry run, features that are not cached are those of
    a few photographs, repeated. Raises UserError if the pretrained network is missing.
    """
    if name in OF_IMAGES:
        return load_split(path, split, SCRATCH_SIZE, preprocess).pictures
    photographs = load_split(path, split)
    checksums = _checksums(photographs.jpegs, weights)
    folder, cached = cache_folder(path), f'{name}_{split}.npz'
    features = _read_cached(folder, cached, checksums)
    if features is None:
        with torch.random.fork_rng(devices=[]):  # initial weights must not change a run's random numbers
            network = pretrained(name, weights)
        count, start = len(checksums), time.perf_counter()
        photos = checked_files.few(count) if checked_files.is_dry_run() else range(count)
        features = _compute(photographs, photos, split, *network, torch.device(device))
        if checked_files.is_dry_run():
            seconds = (time.perf_counter() - start) * count / len(photos)
            features = features[np.arange(count) % len(photos)]
            size = len(_npz(photographs=checksums, features=features))
            checked_files.plan(os.path.join(folder, cached), size, seconds)
        else:
            _write_cache(folder, cached, checksums, features)
    return torch.from_numpy(features)


def _checksums(jpegs, weights):
    """Return a checksum of each photograph and of the file `weights`: what the cached features depend on."""
    start = 0
    if weights:
        try:
            check_is_file(weights)
            with open(weights, 'rb') as stored:
                start = zlib.crc32(stored.read())
        except OSError as error:
            raise UserError(f'{weights}: cannot be read ({error.strerror or error}); --image_weights takes a state '
                            'dict of googlenet') from error
    photos = tqdm(range(len(jpegs.places)), 'checksums of photographs', unit='', leave=False, disable=None, delay=2)
    return np.array([zlib.crc32(*jpegs.read([photo]), start) for photo in photos], np.uint32)


def _read_cached(folder, cached, checksums):
    """Return the cached features, or None if they are of other photographs or damaged."""
    try:
        with np.load(io.BytesIO(checked_files.read(folder, cached)), allow_pickle=False) as stored:
            return stored['features'] if np.array_equal(stored['photographs'], checksums) else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write_cache(folder, cached, checksums, features):
    try:
        with checked_files.write(folder, cached) as file:
            file.write(_npz(photographs=checksums, features=features))
    except CannotWrite as error:
        print(f'{error}; the features will be computed again next time')


def _npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getbuffer()


@torch.inference_mode()
def _compute(photographs, photos, split, network, mean, std, width, device):
    """Compute features float32 [N, width] of the N whole photographs `photos`, resized to 224 x 224."""
    network = network.eval().to(device, memory_format=torch.channels_last)
    mean, std = (torch.tensor(value, device=device).view(-1, 1, 1) for value in (mean, std))
    index, jpegs = photographs.index, photographs.jpegs
    features = np.empty((len(photos), width), np.float32)

    def decode(photo):
        try:
            photograph = read_picture(*jpegs.read([photo]))
        except BadPicture as error:
            raise layout.cannot_be_decoded(jpegs.path, split, index.names[photo], error) from error
        return np.asarray(photograph.resize((SIZE, SIZE), Image.Resampling.BICUBIC))

    with ThreadPoolExecutor(os.cpu_count()) as threads, tqdm(
            total=len(features), desc=f'{split}: features of photographs', unit='', leave=False, disable=None) as bar:
        for start in range(0, len(features), BATCH):
            pixels = np.stack(list(threads.map(decode, photos[start:start + BATCH])))
            pixels = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
            features[start:start + BATCH] = network((pixels - mean) / std).cpu().numpy()
            bar.update(len(pixels))
    return features


def pretrained(name, weights=None):
    """Return (network that computes pooled features, mean and std of its pixels in [0, 255], number of features).

    Raises UserError if the network or its weights are missing.
    """
    if name == 'googlenet':
        return _googlenet(weights), (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), FEATURES[name]
    return load_efficientnet(0, f'--image_encoder {name}'), (MEAN,) * 3, (STD,) * 3, FEATURES[name]


def _googlenet(weights):
    from torchvision.models import googlenet
    try:
        if not weights:
            network = googlenet(weights='DEFAULT')
        else:
            state_dict = checkpoint.load(weights)
            network = googlenet(weights=None, init_weights=False, transform_input=True,
                                aux_logits=any('aux1' in key for key in state_dict))
            checkpoint.load_weights(network, state_dict, weights)
    except (OSError, RuntimeError) as error:  # no connection (URLError is an OSError), or an interrupted download
        raise UserError(f'the ImageNet weights of googlenet cannot be downloaded ({error}); give a file of them with '
                        '--image_weights FILE, or use --image_encoder efficientnet_lite0') from error
    network.fc = nn.Identity()
    return network
