"""Networks for large pictures, computed in ways that are faster on some devices."""
import torch
import torch.nn.functional as F
from torch import nn

# Which rows of the 3 x 3 kernel of a doubled map add up to each row of the 4 x 4 kernel of the map before, and the same
# for rows and columns at once, [3 * 3, 4 * 4].
ROWS = torch.tensor([[0., 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
ROWS_AND_COLUMNS = torch.einsum('ai,bj->ijab', ROWS, ROWS).reshape(9, 16)

WEIGHTS_PER_PLACE = 2 ** 14  # with more for each place of the result, a product of matrices beats PyTorch's convolution


def make_fast(net, device):
    """Let `net` compute the same, but for rounding, faster on `device`. Returns it."""
    on_gpu = torch.device(device).type == 'cuda'
    net.to(memory_format=torch.channels_last if on_gpu else torch.contiguous_format)
    return rewrite(net)


def rewrite(net):
    """Let the convolutions of `net` compute on a CPU as the classes below do. Weights and names stay. Returns `net`.

    They are such as the StackGANs have: of one group, not dilated, padded with zeros, without biases after an Upsample.
    """
    for layers in net.modules():
        if isinstance(layers, nn.Sequential):
            for upsample, conv in zip(layers, layers[1:]):
                if isinstance(upsample, nn.Upsample):
                    upsample.__class__, conv.__class__ = UpsampleLater, DoubledConv
    for conv in net.modules():
        if type(conv) is nn.Conv2d:
            conv.__class__ = ProductConv
    return net


def on_cpu(features):
    """Elsewhere layers compute as they are written: what they would gain has not been measured."""
    return features.device.type == 'cpu'


class UpsampleLater(nn.Upsample):
    """Leaves [B, C, H, W] to a DoubledConv."""

    def forward(self, features):
        return features if on_cpu(features) else super().forward(features)


class DoubledConv(nn.Conv2d):
    """[B, C, H, W] -> what the 3 x 3 convolution makes of the doubled map, [B, D, 2H, 2W].

    Nearest-neighbour doubling shows each number to the convolution four times. With the weights that meet it added up
    first, there are 4 products where there were 9, and there is no doubled map to keep for the gradient.
    """

    def forward(self, features):
        if not on_cpu(features):
            return super().forward(features)
        with torch.autocast('cpu', enabled=False):  # sums of weights are not rounded before they are summed
            kernel = (self.weight.flatten(2) @ ROWS_AND_COLUMNS.to(self.weight.dtype)).unflatten(2, (4, 4))
        return F.conv_transpose2d(features, kernel.transpose(0, 1).contiguous(), stride=2, padding=1)


class ProductConv(nn.Conv2d):
    """[B, C, H, W] -> the convolution; where there are many weights for few places, as one product of matrices.

    PyTorch's own way brings all weights into another order in each pass: of a discriminator's last layers, whose
    maps are 4 x 4, that is most of the time. In bf16 the input's gradient is a sum of numbers rounded to bf16.
    """

    def forward(self, features):
        height, width = (1 + (side + 2 * padding - kernel) // stride for side, padding, kernel, stride in
                         zip(features.shape[2:], self.padding, self.kernel_size, self.stride))
        places = len(features) * height * width
        if not on_cpu(features) or self.weight.numel() < WEIGHTS_PER_PLACE * places:
            return super().forward(features)
        seen = F.unfold(features, self.kernel_size, padding=self.padding, stride=self.stride)  # [B, C * K * K, places]
        found = F.linear(seen.transpose(1, 2).flatten(0, 1), self.weight.flatten(1), self.bias)
        return found.view(-1, height, width, self.out_channels).permute(0, 3, 1, 2)
