"""Improvements beyond the chapter. All are off by default; `--recipe improved` switches them on.

The training step stays the chapter's. `improve` gives a `Model` another discriminator (`PretrainedDiscriminator`), or
changes the images that its discriminator sees (`augment`). README.md has the measurements.
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from common.efficientnet import load_efficientnet
from text2image.gan import Embedding

PRETRAINED = 'pretrained'
DISCRIMINATORS = ('chapter', PRETRAINED)
RECIPES = {'chapter': {},  # values of flags
           'improved': {'discriminator': PRETRAINED, 'augment': True, 'flip': True, 'pairs': True, 'l1_coef': 20,
                        'l2_coef': 10, 'cls_coef': 1, 'lr_ratio': 4, 'average': 0.999}}


def improve(model, discriminator, augment_images, pairs, lr_ratio):
    """Give a Model the `discriminator`, one of `DISCRIMINATORS`.

    `augment_images` says whether it sees images changed by `augment`, and `pairs` whether batches consist of pairs
    (`data/txt2image_dataset.py`). `lr_ratio` is the discriminator's learning rate divided by the generator's (Heusel et
    al., NIPS 2017, section 2). Call this before the optimizers are created. Raises UserError if the pretrained network
    is not installed.
    """
    model.lr_ratio = lr_ratio
    if discriminator == PRETRAINED:
        model.netD = PretrainedDiscriminator(model.netG.embed_dim).to(model.device)
        model.loss_adv = BCELossOfAll()
    if augment_images:
        model.netD.register_forward_pre_hook(lambda _, inputs: (augment(inputs[0], pairs), *inputs[1:]))


def augment(images, pairs=False):
    """Change the colors of images, move them by up to an eighth, and erase a square: [B, C, H, W] -> the same.

    This keeps the discriminator from memorizing a few thousand photographs. Real and generated images are augmented
    alike, and gradients pass through: these are the three policies of Zhao et al., "Differentiable Augmentation for
    Data-Efficient GAN Training", NeurIPS 2020. With `pairs`, both halves of the batch are augmented alike: their images
    share sentences, so two generated images of a sentence can differ only because of the noise.
    """
    count, _, height, width = images.shape

    def draw(low, high):
        drawn, half = low + (high - low) * torch.rand((count, 1, 1, 1), device=images.device), count // 2
        return torch.cat([drawn[:half], drawn[:half], drawn[2 * half:]]) if pairs else drawn

    images = images + draw(-0.5, 0.5)                                                       # brightness
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * draw(0, 2)                                            # saturation
    middle = images.mean((1, 2, 3), keepdim=True)
    images = middle + (images - middle) * draw(0.5, 1.5)                                    # contrast

    rows = torch.arange(height, device=images.device)[:, None]                              # [H, 1]
    columns = torch.arange(width, device=images.device)                                     # [W]
    from_rows = rows + draw(-height / 8, height / 8).round()                                # [B, 1, H, 1]
    from_columns = columns + draw(-width / 8, width / 8).round()                            # [B, 1, 1, W]
    outside = (from_rows < 0) | (from_rows >= height) | (from_columns < 0) | (from_columns >= width)
    places = from_rows.clamp(0, height - 1) * width + from_columns.clamp(0, width - 1)      # [B, 1, H, W]
    places = places.long().flatten(2).expand(-1, images.shape[1], -1)
    images = images.flatten(2).gather(2, places).view_as(images)                            # translation

    top, left = draw(0, height), draw(0, width)
    erased = ((rows - top).abs() < height / 4) & ((columns - left).abs() < width / 4)       # cutout
    return images.masked_fill(outside | erased, 0)


class BCELossOfAll(nn.BCELoss):
    """The chapter's adversarial loss for N probabilities of each image, [B, N], with labels [B]."""

    def forward(self, probabilities, labels):
        return super().forward(probabilities, labels[:, None].expand_as(probabilities))


class PretrainedDiscriminator(nn.Module):
    """Judge images by features of a network that was trained on ImageNet and stays as it is.

    x [B, 3, 64, 64] in [-1, 1] and text [B, embed_dim] -> probabilities [B, 3], one for each depth of the network, and
    features [B, 5568], whose means over a batch the generator's L1 loss compares:
        f [1856]       features of the last depth at all places, and means of the others over all places
        f ** 2 [1856]  so that variances agree as well
        |f - f'|       with the f' of the image with the most similar sentence: 0 if the noise has no effect

    After Sauer et al., "Projected GANs Converge Faster", NeurIPS 2021, without their random projections. The network is
    efficientnet_lite1; not efficientnet_lite0, with which evaluation/metrics.py measures.
    """

    def __init__(self, embed_dim=1024, embed_out_dim=128):
        super().__init__()
        network = load_efficientnet(1, f'--discriminator {PRETRAINED}')
        self.stem = nn.Sequential(FrozenConv(network._conv_stem, network._bn0), nn.ReLU6())
        self.stages = nn.ModuleList(FrozenStage(network._blocks[start:end]) for start, end in ((0, 4), (4, 7), (7, 15)))
        self.heads = nn.ModuleList(Head(channels, size, embed_dim, embed_out_dim)
                                   for channels, size in ((24, 16), (40, 8), (112, 4)))
        self.output = nn.Sigmoid()

    def forward(self, x, text):
        features = []                                       # [B, 24, 16, 16], [B, 40, 8, 8], [B, 112, 4, 4]
        # On a CPU, gradients of depthwise convolutions take twice as long in bf16 as in fp32, so the generator's step,
        # in which this network does not learn, is in fp32.
        is_learning = next(self.heads.parameters()).requires_grad
        with torch.autocast('cpu', enabled=torch.is_autocast_enabled('cpu') and is_learning):
            x = self.stem(x)
            for stage in self.stages:
                x = stage(x)
                features.append(stage.normalize(x))
        similarity = similarities(text)
        logits = [head(one, text, similarity) for head, one in zip(self.heads, features)]
        out = torch.cat([features[-1].flatten(1), *(one.mean((2, 3)) for one in features[:-1])], 1)     # [B, 1856]
        out = torch.cat([out, out.square(), (out - out[similarity.argmax(1)]).abs()], 1)
        return self.output(torch.cat(logits, 1)), out


class Head(nn.Module):
    """Judge features: x [B, channels, size, size] and text [B, embed_dim] -> logits [B, 1].

    `similarity` [B, B] is that of the sentences.
    """

    def __init__(self, channels, size, embed_dim, embed_out_dim, width=128):
        super().__init__()
        halvings = size.bit_length() - 3                                                    # 16 -> 2, 8 -> 1, 4 -> 0
        layers = [(4, 2, 1)] * halvings or [(1,)]                                           # kernel, stride, padding
        self.model = nn.Sequential(*(                                                       # [B, width, 4, 4]
            nn.Sequential(nn.Conv2d(width if i else channels, width, *layer), nn.BatchNorm2d(width), nn.LeakyReLU(0.2))
            for i, layer in enumerate(layers)))
        self.text_embedding = Embedding(embed_dim, embed_out_dim)                           # [B, width + 128, 4, 4]
        self.output = nn.Sequential(
            nn.Conv2d(width + embed_out_dim + 2, 128, kernel_size=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(128, 1, kernel_size=4))                                               # [B, 1, 1, 1]

    def forward(self, x, text, similarity):
        out = self.text_embedding(self.model(x), text)
        spread = spread_in_batch(x, similarity)[:, :, None, None].expand(-1, -1, *out.shape[2:])  # [B, 2, 4, 4]
        return self.output(torch.cat([out, spread.to(out)], 1)).flatten(1)


def spread_in_batch(x, similarity):
    """Return how far each image is from those with similar sentences, and how different all are: [B, 2].

    x are features [B, ...], and `similarity` [B, B] is that of the sentences. So a discriminator notices a generator
    that ignores the noise: its images of one sentence are too similar. The second number is that of Karras et al.,
    "Progressive Growing of GANs", ICLR 2018, section 3.
    """
    x = x.flatten(1)
    pairs = torch.triu_indices(len(x), len(x), 1, device=x.device).unbind()
    distances = x.new_zeros(similarity.shape).index_put(pairs, torch.pdist(x) / x.shape[1] ** 0.5)
    distances = distances + distances.T
    similar = ((similarity / 0.1).softmax(1) * distances).sum(1)
    return torch.stack([similar, x.std(0).mean().expand_as(similar)], 1)


def similarities(text):
    """Return the cosines between sentence embeddings [B, D] after subtracting their mean: [B, B], diagonal -inf."""
    direction = F.normalize(text - text.mean(0))
    return (direction @ direction.T).float().fill_diagonal_(-torch.inf)


class FrozenConv(nn.Module):
    """A convolution and the batch norm after it, in one, with weights that are neither trained nor stored."""

    def __init__(self, conv, norm):
        super().__init__()
        weight, bias = fuse_conv_bn_weights(conv.weight, None, norm.running_mean, norm.running_var, norm.eps,
                                            norm.weight, norm.bias)
        # channels_last, which the images then have as well, takes a quarter less time on a CPU.
        weight = weight.detach().contiguous(memory_format=torch.channels_last)
        self.register_buffer('weight', weight, persistent=False)
        self.register_buffer('bias', bias.detach(), persistent=False)
        self.stride, self.groups, is_strided = conv.stride, conv.groups, max(conv.stride) > 1
        self.pad = conv.static_padding if is_strided else nn.Identity()  # more on one side than on the other
        self.padding = 0 if is_strided else conv.kernel_size[0] // 2

    def forward(self, x):
        return F.conv2d(self.pad(x), self.weight, self.bias, self.stride, self.padding, groups=self.groups)


class FrozenBlock(nn.Module):
    """An inverted residual block (Sandler et al., CVPR 2018) of the pretrained network."""

    def __init__(self, block):
        super().__init__()
        expand = [FrozenConv(block._expand_conv, block._bn0), nn.ReLU6()] if hasattr(block, '_expand_conv') else []
        self.layers = nn.Sequential(*expand, FrozenConv(block._depthwise_conv, block._bn1), nn.ReLU6(),
                                    FrozenConv(block._project_conv, block._bn2))
        self.has_skip = max(block._depthwise_conv.stride) == 1 and (
            self.layers[0].weight.shape[1] == block._project_conv.out_channels)

    def forward(self, x):
        return x + self.layers(x) if self.has_skip else self.layers(x)


class FrozenStage(nn.Module):
    """Some blocks of the pretrained network, one after another."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.Sequential(*map(FrozenBlock, blocks))
        # From the last block without a skip connection on, results of batch norms are added up. On ImageNet, the mean
        # of one is its bias, and its variance the square of its weight.
        first = max(place for place, block in enumerate(self.blocks) if not block.has_skip)
        norms = [block._bn2 for block in blocks[first:]]
        self.register_buffer('mean', sum(norm.bias for norm in norms).detach(), persistent=False)
        self.register_buffer('std', sum(norm.weight ** 2 for norm in norms).sqrt().detach(), persistent=False)

    def forward(self, x):
        return self.blocks(x)

    def normalize(self, x):
        """Give features [B, C, H, W] a mean of about 0 and a variance of about 1."""
        return (x - self.mean[:, None, None]) / self.std[:, None, None]
