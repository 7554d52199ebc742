"""Choose the most realistic of several generated images: the one whose features are nearest to those of photographs.

The features are those of efficientnet_lite1, which was trained on ImageNet; not of efficientnet_lite0, with which
evaluation/metrics.py measures. That distances to the nearest photographs tell good images from bad ones is the idea of
the realism score of Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models",
NeurIPS 2019, section 5; here, they are averaged, and not compared with distances between photographs.
"""
import os
import zipfile

import numpy as np
import torch
from tqdm import tqdm

from common import run
from common.efficientnet import BATCH, FEATURES, feature_extractor
from common.errors import CannotWrite
from common.files import atomic_write

FILE = 'photographs.npz'  # in the run folder
NEIGHBORS = 3             # photographs that an image is compared with
DIRECTIONS = 128          # of the features, along which photographs differ most


class Realism:
    """Compute how far generated images are from real photographs.

    `photographs` is a dict as `describe` returns it. Raises UserError if the network is not installed.
    """

    def __init__(self, photographs, device):
        self.mean, self.directions, self.features = (torch.from_numpy(photographs[name]).to(device).float()
                                                     for name in ('mean', 'directions', 'features'))
        self.extract = feature_extractor(1, '--best_of', device)

    @torch.no_grad()
    def distances(self, images):
        """Return the mean distance [B] of images [B, 3, S, S] in [-1, 1] to the `NEIGHBORS` nearest photographs."""
        found = self.extract((part.float() + 1) * 127.5 for part in images.split(BATCH))
        distances = torch.cdist((found - self.mean) @ self.directions, self.features)
        return distances.topk(min(NEIGHBORS, len(self.features)), largest=False).values.mean(1).cpu()


@torch.no_grad()
def describe(dataset, prepared, device):
    """Return {'mean', 'directions', 'features', 'key'} of the photographs of a data set, as NumPy arrays and a string.

    These are the mean of their features [1280]; the directions of the largest variance [1280, D], where D is up to
    `DIRECTIONS`; their features along these [N, D], all in 16 bits; and what they depend on (see `_key`). `prepared`
    says how the data set prepares photographs, such as 'crop_64'.
    """
    shown = tqdm(range(0, len(dataset.classes), BATCH), 'features of photographs', unit_scale=BATCH, unit='',
                 leave=False, disable=None)
    numbers = (range(start, min(start + BATCH, len(dataset.classes))) for start in shown)
    extract = feature_extractor(1, '--best_of', device)
    found = extract(torch.from_numpy(np.stack([dataset.photograph(photo) for photo in some])) for some in numbers).cpu()
    mean = found.mean(0)
    _, directions = torch.linalg.eigh((found - mean).T.double() @ (found - mean).double())  # variances ascend
    directions = directions[:, -min(DIRECTIONS, len(found)):].float()
    return {'mean': mean.half().numpy(), 'directions': directions.half().numpy(),
            'features': ((found - mean) @ directions).half().numpy(), 'key': _key(dataset.fingerprint, prepared)}


def _key(fingerprint, prepared):
    """Return what features depend on: the photographs, their boxes (among the captions), and the preparation."""
    return ' '.join((fingerprint.get('pictures') or '', fingerprint.get('captions') or '', prepared))


def of_run(file, model, prepared, open_dataset, device, data_file):
    """Return the `Realism` of the photographs that a model was trained on. Raises UserError as `features_of_run` does.

    The arguments are those of `features_of_run`.
    """
    photographs, _ = features_of_run(file, model, prepared, open_dataset, device, data_file)
    return Realism(photographs, device)


def features_of_run(file, model, prepared, open_dataset, device, data_file):
    """Return (what `describe` returns for the photographs of a run, whether the model was trained on these).

    `file` is the model's checkpoint. The features are read from the run folder, or if they are not there, computed and
    written there. The data is the HDF5 file that the run was trained on, or if it does not say, or the command line has
    `--data_dir`, `data_file`; `open_dataset` opens it, and prepares photographs as `prepared` says. Raises UserError if
    there is no data either, or if the network is not installed.
    """
    folder = os.path.dirname(os.path.abspath(file))
    if not run.has_options(folder) and run.has_options(os.path.dirname(folder)):
        folder = os.path.dirname(folder)  # a snapshot is in RUN/Model
    kept, key = os.path.join(folder, FILE), _key(model.data, prepared)
    is_known = bool(model.data.get('pictures'))  # not in a snapshot
    photographs = _read(kept)
    if photographs and (photographs['key'] == key or not is_known and photographs['key'].endswith(f' {prepared}')):
        return photographs, True
    options = run.read_options(folder) if run.has_options(folder) else model.options
    if options and 'data_dir' not in run.GIVEN_FLAGS:
        data_file = run.dataset_of(options, file)
    dataset = open_dataset(data_file)
    print(f'computing features of {len(dataset.classes):,} photographs', flush=True)
    photographs = describe(dataset, prepared, device)
    if is_known and photographs['key'] != key:
        print(f'{file}: was trained on different photographs or captions from those in {dataset.file} now; images are '
              'compared with these')
        return photographs, False
    try:
        write(kept, photographs)
    except CannotWrite as error:
        print(f'{error}; the features will be computed again next time')
    return photographs, True


def write(path, photographs):
    """Write what `describe` returned to a file, whole or not at all. Raises CannotWrite."""
    with atomic_write(path, follow_links=False) as file:
        np.savez(file, **photographs)


def _read(path):
    """Return what `write` wrote, or None if there is no such file, or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = {name: stored[name] for name in ('mean', 'directions', 'features', 'key')}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    mean, directions, features = (found[name] for name in ('mean', 'directions', 'features'))
    is_right = (mean.shape == (FEATURES,) and directions.ndim == features.ndim == 2 and features.size > 0
                and directions.shape == (FEATURES, features.shape[1])
                and all(part.dtype == np.float16 and np.isfinite(part).all() for part in (mean, directions, features)))
    return found | {'key': str(found['key'])} if is_right else None


def keep_best(batches, count, distances):
    """Keep, of every `count` consecutive images, the one with the least distance to photographs.

    `batches` yields pairs: a list of images [B, 3, S, S] per size, small to large, and a list of B records. The same is
    yielded, with fewer images. `distances` is as `Realism.distances`.
    """
    number, least, best = 0, None, None
    for images, records in batches:
        kept = []
        for row, distance in enumerate(distances(images[-1]).nan_to_num(nan=torch.inf).tolist()):
            if number % count == 0 or distance < least:
                least, best = distance, ([of_size[row].clone() for of_size in images], records[row])
            number += 1
            if number % count == 0:
                kept.append(best)
        if kept:
            images, records = zip(*kept)
            yield [torch.stack(of_size) for of_size in zip(*images)], list(records)
