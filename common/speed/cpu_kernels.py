"""Compute convolutions and gated linear units faster on a CPU, with the same results except for rounding.

These modules replace PyTorch's, with the same names and the same parameters.
"""
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

# Which rows of the 3 x 3 kernel on the doubled map add up to each row of the 4 x 4 kernel on the original map, and the
# same for rows and columns at once, [3 * 3, 4 * 4].
ROWS = torch.tensor([[0., 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
ROWS_AND_COLUMNS = torch.einsum('ai,bj->ijab', ROWS, ROWS).reshape(9, 16)

WEIGHTS_PER_POSITION = 2 ** 14  # from here on, for each position of the smaller map, a product beats a convolution


def place_all(net):
    """Replace all layers of `net` that this file computes faster. Convolutions that follow a doubling come first."""
    place_doubled_convs(net)
    place_product_convs(net)
    place_products_of_halves(net)


def place_doubled_convs(net):
    """Replace each convolution of `net` that follows a doubling of its map by a `DoubledConv`."""
    for layers in filter(lambda module: isinstance(module, nn.Sequential), net.modules()):
        for (above, upsample), (name, conv) in itertools.pairwise(list(layers.named_children())):
            if _doubles(upsample) and _is_plain(conv) and _keeps_size(conv):
                setattr(layers, above, nn.Identity())
                setattr(layers, name, DoubledConv(conv))


def place_product_convs(net):
    """Replace each convolution of `net` that a `ProductConv` can compute, and each transposed one without a bias."""
    for parent in list(net.modules()):
        for name, conv in list(parent.named_children()):
            if _is_plain(conv):
                setattr(parent, name, ProductConv(conv))
            elif _is_plain(conv, nn.ConvTranspose2d) and conv.bias is None and not any(conv.output_padding):
                setattr(parent, name, ProductConvTranspose(conv))


def place_products_of_halves(net):
    """Replace each `nn.GLU` of `net` over channels by a `ProductOfHalves`."""
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.GLU and layer.dim == 1:
                setattr(parent, name, ProductOfHalves())


def _doubles(layer):
    return isinstance(layer, nn.Upsample) and (layer.scale_factor, layer.mode) == (2, 'nearest')


def _is_plain(layer, kind=nn.Conv2d):
    return (type(layer) is kind and layer.groups == 1 and layer.dilation == (1, 1)
            and layer.padding_mode == 'zeros' and not isinstance(layer.padding, str))


def _keeps_size(conv):
    return (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((3, 3), (1, 1), (1, 1), None)


class DoubledConv(nn.Module):
    """Apply the 3 x 3 convolution `conv` to the doubled map: [B, C, H, W] -> [B, D, 2H, 2W].

    Nearest-neighbor doubling shows each number to the convolution four times. Adding up the weights that meet it first
    leaves 4 products where there were 9, and no doubled map to keep for the gradient. Of large kernels on small maps,
    `conv_transpose` makes a matrix product.
    """

    def __init__(self, conv):
        super().__init__()
        self.weight = conv.weight
        self.weight.data = conv.weight.data.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)  # in memory 3, 3, D, C

    def forward(self, features):
        with torch.autocast('cpu', enabled=False):  # weights must not be rounded before they are added up
            kernel = ROWS_AND_COLUMNS.T.to(self.weight.dtype) @ self.weight.permute(2, 3, 0, 1).reshape(9, -1)
        kernel = kernel.view(4, 4, *self.weight.shape[:2]).permute(3, 2, 0, 1)      # [C, D, 4, 4]
        return conv_transpose(features, kernel, stride=(2, 2), padding=(1, 1))


class ProductConv(nn.Module):
    """Apply `conv`, [B, C, H, W] -> [B, D, H', W'], as a matrix product where that is faster.

    It is where there are many weights for few positions, since PyTorch's convolution reorders all weights in each pass.
    For the gradient, a product keeps all windows: with a 4 x 4 kernel and stride 2, four times its input.
    """

    def __init__(self, conv):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding = conv.stride, conv.padding

    def forward(self, features):
        positions = math.prod([1 + (side + 2 * margin - kernel) // step for side, margin, kernel, step in
                               zip(features.shape[2:], self.padding, self.weight.shape[2:], self.stride)])
        if not is_product(self.weight, positions):
            return F.conv2d(features, self.weight, self.bias, self.stride, self.padding)
        seen = Windows.apply(features.permute(0, 2, 3, 1), self.weight.shape[2:], self.stride, self.padding)
        weight = self.weight.permute(0, 2, 3, 1)                                    # [D, K, K, C]
        return F.linear(seen.flatten(3), weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class ProductConvTranspose(nn.Module):
    """Apply the transposed convolution `conv`, [B, C, H, W] -> [B, D, H', W'], as `ProductConv` does others."""

    def __init__(self, conv):
        super().__init__()
        self.weight = conv.weight
        self.stride, self.padding = conv.stride, conv.padding

    def forward(self, features):
        return conv_transpose(features, self.weight, self.stride, self.padding)


def is_product(weight, positions):
    """Return whether to compute a convolution as a product, with `positions` in the smaller of its two maps.

    A single position is always a product: there, PyTorch 2.14 computes some shapes wrongly in bf16 and channels last.
    """
    return positions == 1 or weight.numel() >= WEIGHTS_PER_POSITION * positions


def conv_transpose(features, weight, stride, padding):
    """Return PyTorch's `conv_transpose2d`, computed as a matrix product where that is faster."""
    if not is_product(weight, features.shape[2] * features.shape[3]):
        return F.conv_transpose2d(features, weight, stride=stride, padding=padding)
    weight = weight.permute(2, 3, 1, 0)                                             # [K, K, D, C]
    features = features.permute(0, 2, 3, 1)                                         # [B, H, W, C]
    seen = F.linear(features.flatten(0, 2), weight.flatten(0, 2)).view(*features.shape[:3], *weight.shape[:3])
    return WindowSum.apply(seen, stride, padding).permute(0, 3, 1, 2)


class ProductOfHalves(nn.Module):
    """Compute `nn.GLU(dim=1)`, [B, 2 * C, ...] -> [B, C, ...], with a gradient in the memory format of the input.

    PyTorch's returns it contiguous, and the batch norm before it, whose input is in channels last, takes six times as
    long.
    """

    def forward(self, features):
        values, gates = features.chunk(2, 1)
        return values * gates.sigmoid()


class Windows(torch.autograd.Function):
    """Collect the window that a convolution sees at each position: [B, H, W, C] -> [B, H', W', K, K, C]."""

    @staticmethod
    def forward(ctx, features, kernel_size, stride, padding):
        ctx.shape, ctx.stride, ctx.padding = features.shape, stride, padding
        return windows(features, kernel_size, stride, padding)

    @staticmethod
    def backward(ctx, gradient):
        return window_sum(gradient, ctx.shape[1:3], ctx.stride, ctx.padding), None, None, None


class WindowSum(torch.autograd.Function):
    """Add up the windows that a transposed convolution makes of each position: [B, H', W', K, K, C] -> [B, H, W, C]."""

    @staticmethod
    def forward(ctx, seen, stride, padding):
        ctx.kernel_size, ctx.stride, ctx.padding = seen.shape[3:5], stride, padding
        size = [step * (count - 1) + kernel - 2 * margin for count, kernel, step, margin in
                zip(seen.shape[1:3], ctx.kernel_size, stride, padding)]
        return window_sum(seen, size, stride, padding)

    @staticmethod
    def backward(ctx, gradient):
        return windows(gradient, ctx.kernel_size, ctx.stride, ctx.padding), None, None


def windows(features, kernel_size, stride, padding):
    """Return the windows of features [B, H, W, C], padded with zeros: [B, H', W', K, K, C]."""
    features = F.pad(features, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    seen = features.unfold(1, kernel_size[0], stride[0]).unfold(2, kernel_size[1], stride[1])
    return seen.permute(0, 1, 2, 4, 5, 3).contiguous()


def window_sum(seen, size, stride, padding):
    """Return the sum [B, *size, C] of overlapping windows; that of bf16 is rounded once, as in a convolution."""
    batch, down, across, rows, columns, channels = seen.shape
    (height, width), (top, left) = size, padding
    total = torch.zeros(batch, height + 2 * top, width + 2 * left, channels, device=seen.device,
                        dtype=torch.promote_types(seen.dtype, torch.float32))
    for row in range(rows):
        for column in range(columns):
            total[:, row:row + stride[0] * down:stride[0],
                  column:column + stride[1] * across:stride[1]] += seen[:, :, :, row, column]
    return total[:, top:top + height, left:left + width].to(seen.dtype)
