"""Networks for large pictures, computed in ways that are faster on some devices."""
import torch
import torch.nn.functional as F
from torch import nn

from common.precision import has_bf16

# Which rows of the 3 x 3 kernel of a doubled map add up to each row of the 4 x 4 kernel of the map before, and the same
# for rows and columns at once, [3 * 3, 4 * 4].
ROWS = torch.tensor([[0., 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
ROWS_AND_COLUMNS = torch.einsum('ai,bj->ijab', ROWS, ROWS).reshape(9, 16)


def make_fast(net, device):
    """Let `net` compute the same, but for rounding, faster on `device`. Returns it."""
    net.to(memory_format=memory_order(torch.device(device)))
    return share_products(net)


def memory_order(device):
    """The `memory_format` in which networks for large pictures train fastest on a torch.device.

    Channels last is for GPUs and for products in bf16. In float32 on a CPU it makes a step of StackGAN's Stage-II a
    quarter longer.
    """
    return torch.channels_last if device.type == 'cuda' or has_bf16(device) else torch.contiguous_format


def share_products(net):
    """Let every 3 x 3 convolution of a doubled map, in float32 on a CPU, read the map before. Returns `net`.

    Nearest-neighbour doubling shows each number to the convolution four times. With the weights that meet it added up
    first, there are 4 products where there were 9, and there is no doubled map to keep for the gradient.
    """
    for layers in net.modules():
        if isinstance(layers, nn.Sequential):
            for upsample, conv in zip(layers, layers[1:]):
                if isinstance(upsample, nn.Upsample):
                    upsample.__class__, conv.__class__ = UpsampleLater, DoubledConv  # weights and names stay
    return net


def is_shared(features):
    """Elsewhere it has not been measured, and sums of weights would be rounded once more in bf16."""
    return features.device.type == 'cpu' and not torch.is_autocast_enabled('cpu')


class UpsampleLater(nn.Upsample):
    """Leaves [B, C, H, W] to a DoubledConv."""

    def forward(self, features):
        return features if is_shared(features) else super().forward(features)


class DoubledConv(nn.Conv2d):
    """[B, C, H, W] -> what the 3 x 3 convolution makes of the doubled map, [B, D, 2H, 2W]."""

    def forward(self, features):
        if not is_shared(features):
            return super().forward(features)
        kernel = (self.weight.flatten(2) @ ROWS_AND_COLUMNS.to(self.weight.dtype)).unflatten(2, (4, 4))  # [D, C, 4, 4]
        return F.conv_transpose2d(features, kernel.transpose(0, 1).contiguous(), stride=2, padding=1)
