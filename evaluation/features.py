"""Compute features of images with networks that were trained on ImageNet: what the distances of `measures.py` compare.

A distance between features is only comparable with one of the same network, so its name is part of the measure's name.
"""
import io
import os
import tempfile
import zipfile
import zlib

import numpy as np
import torch
from tqdm import tqdm

from common import checkpoint
from common.efficientnet import BATCH, feature_extractor
from common.errors import CannotWrite, UserError
from data import checked_files
from data.cache import cache_folder

NETWORKS = ('efficientnet_lite0', 'inception')
INCEPTION_WEIGHTS = 'weights-inception-2015-12-05-6726825d.pth'


class FeatureExtractor:
    """Compute efficientnet_lite0's pooled features of images, after resizing them to 224 x 224.

    Called with batches of images [B, 3, H, W] in [0, 255], it returns (features [N, 1280], None).
    """

    def __init__(self, device):
        self.extract = feature_extractor(0, '--features efficientnet_lite0', device)

    def __call__(self, batches):
        return self.extract(batches).cpu(), None


class InceptionExtractor:
    """Compute the features that published FIDs and Inception scores are about, with the package torch-fidelity.

    Called with batches of images [B, 3, H, W] in [0, 255], it returns (features [N, 2048], logits [N, 1008]). `weights`
    is torch-fidelity's file of them. Raises UserError if the package or the file is missing, damaged or unsafe to load.
    """

    def __init__(self, device, weights):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except ImportError as error:
            raise UserError('torch-fidelity is not installed; --features inception needs: pip install torch-fidelity'
                            ) from error
        if not weights:
            raise UserError('--features inception: needs the weights of the network; download '
                            f'{URL_INCEPTION_V3} and name the file with --inception_weights')
        with tempfile.TemporaryDirectory() as folder:
            # torch-fidelity's own loading would run code in the file: it is given a copy that holds only tensors.
            copy = os.path.join(folder, INCEPTION_WEIGHTS)
            checkpoint.save(copy, checkpoint.load(weights))
            try:
                network = FeatureExtractorInceptionV3('inception-v3-compat', ['2048', 'logits_unbiased'],
                                                      feature_extractor_weights_path=copy)
            except RuntimeError as error:
                raise UserError(f'{weights}: is not the Inception network of torch-fidelity; download '
                                f'{URL_INCEPTION_V3}') from error
        self.network, self.device = network.to(device), device

    @torch.no_grad()
    def __call__(self, batches):
        parts = [self.network(pixels.to(self.device).round().clamp(0, 255).to(torch.uint8)) for pixels in batches]
        return tuple(torch.cat(part).cpu() for part in zip(*parts))


def extractor(name, device, weights=None):
    """Return the extractor called `name`, one of `NETWORKS`; `weights` is the file of Inception's."""
    return FeatureExtractor(device) if name == 'efficientnet_lite0' else InceptionExtractor(device, weights)


def of_photographs(extract, name, dataset, prepared, weights=None):
    """Return (features, logits or None) of all photographs of a data set, which are cached beside its file.

    `prepared` says how the data set prepares them, such as 'crop_64'. `name` is that of the extractor `extract`, and
    `weights` the file of its weights.
    """
    checksum = 0
    if weights:
        with open(weights, 'rb') as file:
            checksum = zlib.crc32(file.read())
    prints = dataset.fingerprint  # boxes are among the captions'
    key = f'{prints["captions"]} {prints["pictures"]} {name} {checksum} {prepared}'
    folder, cached = cache_folder(dataset.file), f'{name}_{prepared}_{dataset.split}.npz'
    found = _read(folder, cached, key)
    if found is None:
        photos = range(len(dataset.classes))
        pixels = (torch.from_numpy(np.stack([dataset.photograph(photo) for photo in photos[start:start + BATCH]]))
                  for start in tqdm(photos[::BATCH], f'/{dataset.split}: features of photographs', leave=False,
                                    disable=None))
        found = extract(pixels)
        _write(folder, cached, key, found)
    return found


def _read(folder, cached, key):
    """Return cached features, or None if they are of other photographs or damaged."""
    try:
        with np.load(io.BytesIO(checked_files.read(folder, cached)), allow_pickle=False) as stored:
            if str(stored['key']) != key:
                return None
            logits = torch.from_numpy(stored['logits']) if 'logits' in stored else None
            return torch.from_numpy(stored['features']), logits
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(folder, cached, key, found):
    arrays = {name: part.numpy() for name, part in zip(('features', 'logits'), found) if part is not None}
    buffer = io.BytesIO()
    np.savez(buffer, key=key, **arrays)
    try:
        with checked_files.write(folder, cached) as file:
            file.write(buffer.getbuffer())
    except CannotWrite as error:
        print(f'{error}; the features will be computed again next time')
