"""Choose the most realistic of several generated images: the one whose features are nearest to those of photographs.

The features are those of efficientnet_lite1, which was trained on ImageNet; not of efficientnet_lite0, with which
evaluation/metrics.py measures. That distances to the nearest photographs tell good images from bad ones is the idea of
the realism score of Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models",
NeurIPS 2019, section 5; here, they are averaged, and not compared with distances between photographs.
"""
import os

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import checkpoint, run
from common.efficientnet import FEATURES, MEAN, STD, load_efficientnet
from common.errors import CannotWrite, UserError
from common.speed import allocator

FILE = 'photographs.pt'  # in the run folder
SIZE = 240               # pixels of the images that the network was trained on
NEIGHBORS = 3            # photographs that an image is compared with
DIRECTIONS = 128         # of the features, along which photographs differ most
BATCH = 8                # images that the network sees at once: few enough for a CPU's cache


class Realism:
    """Compute how far generated images are from real photographs.

    `photographs` is a dict as `describe` returns it, read from the file `path`. Raises UserError if it is no such dict,
    or the network is not installed.
    """

    def __init__(self, photographs, path, device):
        parts = [photographs.get(name) for name in ('mean', 'directions', 'features')]
        shapes = [tuple(part.shape) if torch.is_tensor(part) else () for part in parts]
        count, directions = (*shapes[2], 0, 0)[:2]
        is_right = count and directions and shapes == [(FEATURES,), (FEATURES, directions), (count, directions)]
        if not is_right or not all(part.is_floating_point() and part.isfinite().all() for part in parts):
            raise UserError(f'{path}: does not hold the features of photographs, or is damaged; delete it, and it is '
                            'made again from the data')
        self.mean, self.directions, self.features = (part.to(device).float() for part in parts)
        self.extract = _extractor(device)

    @torch.no_grad()
    def distances(self, images):
        """Return the mean distance [B] of images [B, 3, S, S] in [-1, 1] to the `NEIGHBORS` nearest photographs."""
        found = self.extract((part.float() + 1) * 127.5 for part in images.split(BATCH))
        distances = torch.cdist((found - self.mean) @ self.directions, self.features)
        return distances.topk(min(NEIGHBORS, len(self.features)), largest=False).values.mean(1).cpu()


def _extractor(device):
    network = load_efficientnet(1, '--best_of').to(device, memory_format=torch.channels_last)
    if device.type == 'cpu':
        allocator.keep_freed_memory()

    def extract(batches):
        """Return the features [N, 1280] of batches of images [B, 3, S, S] in [0, 255]."""
        resized = (F.interpolate(batch.to(device), size=SIZE, mode='bicubic', antialias=True) for batch in batches)
        return torch.cat([network(((batch.clamp(0, 255) - MEAN) / STD).contiguous(memory_format=torch.channels_last))
                          for batch in resized])
    return extract


@torch.no_grad()
def describe(dataset, device):
    """Return {'mean', 'directions', 'features', 'pictures'} of the photographs of a data set.

    These are the mean of their features [1280]; the directions of the largest variance [1280, D], where D is up to
    `DIRECTIONS`; their features along these [N, D], all in 16 bits; and the fingerprint of the photographs.
    """
    photos = torch.arange(len(dataset.classes)).split(BATCH)
    shown = tqdm(photos, 'features of photographs', unit_scale=BATCH, unit='', leave=False, disable=None)
    batches = (torch.stack([torch.from_numpy(dataset.photograph(photo)) for photo in some.tolist()]).float()
               for some in shown)
    found = _extractor(device)(batches).cpu()
    mean = found.mean(0)
    _, directions = torch.linalg.eigh((found - mean).T.double() @ (found - mean).double())  # variances ascend
    directions = directions[:, -min(DIRECTIONS, len(found)):].float()
    return {'mean': mean.half(), 'directions': directions.half(), 'features': ((found - mean) @ directions).half(),
            'pictures': dataset.fingerprint['pictures']}


def of_run(file, model, open_dataset, device):
    """Return the `Realism` of the photographs that a model was trained on. Raises UserError as `features_of_run` does.

    `file` is the model's checkpoint, and `open_dataset(path)` returns the training data in an HDF5 file.
    """
    return Realism(*features_of_run(file, model, open_dataset, device), device)


def features_of_run(file, model, open_dataset, device):
    """Return (what `describe` returns for the photographs that a model was trained on, file in the run folder).

    They are read from that file, or if it is not there, computed from the data and written to it. Raises UserError if
    there is no data either, or if the network is not installed.
    """
    folder = os.path.dirname(os.path.abspath(file))
    if not run.has_options(folder) and run.has_options(os.path.dirname(folder)):
        folder = os.path.dirname(folder)  # a snapshot is in RUN/Model, and holds no options
    options = model.options or (run.read_options(folder) if run.has_options(folder) else {})
    kept, pictures = os.path.join(folder, FILE), model.data.get('pictures')
    if os.path.isfile(kept):
        photographs = checkpoint.load(kept)
        if not pictures or photographs.get('pictures') == pictures:
            return photographs, kept
    dataset = open_dataset(run.dataset_of(options, file))
    print(f'computing features of {len(dataset.classes):,} photographs, once for this run', flush=True)
    photographs = describe(dataset, device)
    if pictures and photographs['pictures'] != pictures:
        print(f'{file}: was trained on different photographs from those in {dataset.file} now; images are compared '
              'with these')
    else:
        try:
            checkpoint.save(kept, photographs)
        except CannotWrite as error:
            print(f'{error}; the features will be computed again next time')
    return photographs, kept


def keep_best(batches, count, distances):
    """Keep, of every `count` consecutive images, the one with the least distance to photographs.

    `batches` yields pairs: a list of images [B, 3, S, S] per size, small to large, and a list of B records. The same is
    yielded, with fewer images. `distances` is as `Realism.distances`.
    """
    number, least, best = 0, None, None
    for images, records in batches:
        kept = []
        for row, distance in enumerate(distances(images[-1]).tolist()):
            if number % count == 0 or distance < least:
                least, best = distance, ([of_size[row].clone() for of_size in images], records[row])
            number += 1
            if number % count == 0:
                kept.append(best)
        if kept:
            images, records = zip(*kept)
            yield [torch.stack(of_size) for of_size in zip(*images)], list(records)
