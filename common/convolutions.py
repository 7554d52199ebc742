"""Networks for large pictures, with their convolutions computed in the way that is fastest on a device."""
import types

import torch
import torch.nn.functional as F
from torch import nn

from common.precision import has_bf16

# A row or column of a doubled map is read by three weights, of which those that meet the same row of the map before can
# be one: which of three add up to each of four, for rows [4, 3] and for rows and columns [3 * 3, 4 * 4].
ROWS = torch.tensor([[0., 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
ROWS_AND_COLUMNS = torch.einsum('ai,bj->ijab', ROWS, ROWS).reshape(9, 16)


def make_fast(net, device):
    """Let `net` compute the same, but for rounding, as is fastest on `device`. Returns it."""
    device = torch.device(device)
    net.to(memory_format=memory_order(device))
    return share_products(net) if device.type == 'cpu' else net


def memory_order(device):
    """The `memory_format` in which networks for large pictures train fastest on a torch.device.

    Channels last is for GPUs and for products in bf16. In float32 on a CPU it makes a step of StackGAN's Stage-II a
    fifth longer.
    """
    return torch.channels_last if device.type == 'cuda' or has_bf16(device) else torch.contiguous_format


def share_products(net):
    """Let every 3 x 3 convolution after a doubling of the map read the map before, with sums of its weights.

    Nearest-neighbour doubling shows each number to the convolution four times. With the weights that meet it added up
    first, there are 4 products where there were 9, and there is no doubled map to keep for the gradient. Returns `net`.
    """
    for layers in net.modules():
        if isinstance(layers, nn.Sequential):
            for upsample, conv in zip(layers, layers[1:]):
                if isinstance(upsample, nn.Upsample):
                    # Bound methods, so that a copy of the network computes with its own weights.
                    upsample.forward = types.MethodType(_as_it_was, upsample)
                    conv.forward = types.MethodType(_doubled_and_convolved, conv)
    return net


def _as_it_was(_, features):
    return features


def _doubled_and_convolved(conv, features):
    """[B, C, H, W] -> what the 3 x 3 convolution makes of the doubled map, [B, D, 2H, 2W]."""
    with torch.autocast('cpu', enabled=False):  # sums, to be rounded once
        shared = (conv.weight.flatten(2) @ ROWS_AND_COLUMNS).unflatten(2, (4, 4))  # [D, C, 4, 4]
    return F.conv_transpose2d(features, shared.transpose(0, 1).contiguous(), stride=2, padding=1)
