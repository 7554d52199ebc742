"""Compute convolutions faster on a CPU, with the same results except for rounding.

These modules replace PyTorch's, with the same names and the same parameters.
"""
import itertools

import torch
import torch.nn.functional as F
from torch import nn

# Which rows of the 3 x 3 kernel on the doubled map add up to each row of the 4 x 4 kernel on the original map, and the
# same for rows and columns at once, [3 * 3, 4 * 4].
ROWS = torch.tensor([[0., 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
ROWS_AND_COLUMNS = torch.einsum('ai,bj->ijab', ROWS, ROWS).reshape(9, 16)

WEIGHTS_PER_PLACE = 2 ** 14  # with more per position of the result, a matrix product beats PyTorch's convolution


def place_doubled_convs(net):
    """Replace each convolution of `net` that follows a doubling of its map by a `DoubledConv`."""
    for layers in filter(lambda module: isinstance(module, nn.Sequential), net.modules()):
        for (above, upsample), (name, conv) in itertools.pairwise(list(layers.named_children())):
            if _doubles(upsample) and _is_plain(conv) and _keeps_size(conv):
                setattr(layers, above, nn.Identity())
                setattr(layers, name, DoubledConv(conv))


def place_product_convs(net):
    """Replace each convolution of `net` that a `ProductConv` can compute."""
    for parent in list(net.modules()):
        for name, conv in list(parent.named_children()):
            if _is_plain(conv):
                setattr(parent, name, ProductConv(conv))


def _doubles(layer):
    return isinstance(layer, nn.Upsample) and (layer.scale_factor, layer.mode) == (2, 'nearest')


def _is_plain(layer):
    return (type(layer) is nn.Conv2d and layer.groups == 1 and layer.dilation == (1, 1)
            and layer.padding_mode == 'zeros' and not isinstance(layer.padding, str))


def _keeps_size(conv):
    return (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((3, 3), (1, 1), (1, 1), None)


class DoubledConv(nn.Module):
    """Apply the 3 x 3 convolution `conv` to the doubled map: [B, C, H, W] -> [B, D, 2H, 2W].

    Nearest-neighbor doubling shows each number to the convolution four times. Adding up the weights that meet it first
    leaves 4 products where there were 9, and no doubled map to keep for the gradient.
    """

    def __init__(self, conv):
        super().__init__()
        self.weight = conv.weight

    def forward(self, features):
        with torch.autocast('cpu', enabled=False):  # weights must not be rounded before they are added up
            kernel = (self.weight.flatten(2) @ ROWS_AND_COLUMNS.to(self.weight.dtype)).unflatten(2, (4, 4))
        return F.conv_transpose2d(features, kernel.transpose(0, 1).contiguous(), stride=2, padding=1)


class ProductConv(nn.Module):
    """Apply `conv`, [B, C, H, W] -> [B, D, H', W'], as a matrix product if there are many weights for few positions.

    PyTorch's convolution reorders all weights in each pass, which takes most of the time if maps are small. In bf16 the
    input's gradient is a sum of numbers rounded to bf16.
    """

    def __init__(self, conv):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding

    def forward(self, features):
        height, width = (1 + (side + 2 * padding - kernel) // stride for side, padding, kernel, stride in
                         zip(features.shape[2:], self.padding, self.kernel_size, self.stride))
        places = len(features) * height * width
        if self.weight.numel() < WEIGHTS_PER_PLACE * places:
            return F.conv2d(features, self.weight, self.bias, self.stride, self.padding)
        seen = F.unfold(features, self.kernel_size, padding=self.padding, stride=self.stride)  # [B, C * K * K, places]
        found = F.linear(seen.transpose(1, 2).flatten(0, 1), self.weight.flatten(1), self.bias)
        return found.view(-1, height, width, len(self.weight)).permute(0, 3, 1, 2)
