"""The networks of StackGAN++ (Zhang et al., TPAMI 2018): a tree of generators, and a discriminator for each size.

Attributes are named as in the authors' code, so that their checkpoints load.
"""
import torch
from torch import nn

BASE_SIZE = 64


def conv3x3(size_in, size_out):
    """[B, size_in, H, W] -> [B, size_out, H, W]."""
    return nn.Conv2d(size_in, size_out, 3, padding=1, bias=False)


def gated_conv(size_in, size_out):
    """Layers [B, size_in, H, W] -> [B, size_out, H, W]: half of the channels say how much of the rest gets through."""
    return [conv3x3(size_in, 2 * size_out), nn.BatchNorm2d(2 * size_out), nn.GLU(dim=1)]


def upsample(size_in, size_out):
    """[B, size_in, H, W] -> [B, size_out, 2H, 2W]."""
    return nn.Sequential(nn.Upsample(scale_factor=2, mode='nearest'), *gated_conv(size_in, size_out))


def concatenate_everywhere(condition, features):
    """[B, C, H, W], the condition [B, K] repeated at every place in front of them -> [B, K + C, H, W]."""
    condition = condition.to(features.dtype)[:, :, None, None].expand(-1, -1, *features.shape[2:])
    return torch.cat([condition, features], 1)


class ConditioningAugmentation(nn.Module):
    """A sentence embedding [B, text_dim] becomes a normal distribution, and a condition [B, embedding_dim] is drawn."""

    def __init__(self, text_dim, embedding_dim):
        super().__init__()
        self.fc = nn.Linear(text_dim, 4 * embedding_dim)
        self.glu = nn.GLU(dim=1)

    def forward(self, text):
        mu, logvar = self.glu(self.fc(text)).chunk(2, dim=1)
        epsilon = torch.randn(mu.shape, device=mu.device)
        return mu + epsilon * torch.exp(logvar / 2), mu, logvar


class InitialStage(nn.Module):
    """Noise and condition, concatenated to [B, size_in], -> features [B, width / 16, 64, 64]."""

    def __init__(self, size_in, width):
        super().__init__()
        self.width = width
        self.fc = nn.Sequential(nn.Linear(size_in, 2 * width * 4 * 4, bias=False),
                                nn.BatchNorm1d(2 * width * 4 * 4), nn.GLU(dim=1))
        self.upsample1 = upsample(width, width // 2)
        self.upsample2 = upsample(width // 2, width // 4)
        self.upsample3 = upsample(width // 4, width // 8)
        self.upsample4 = upsample(width // 8, width // 16)

    def forward(self, noise_and_condition):
        x = self.fc(noise_and_condition).view(-1, self.width, 4, 4)
        x = self.upsample1(x)       # [B, width / 2, 8, 8]
        x = self.upsample2(x)       # [B, width / 4, 16, 16]
        x = self.upsample3(x)       # [B, width / 8, 32, 32]
        return self.upsample4(x)    # [B, width / 16, 64, 64]


class ResidualBlock(nn.Module):
    """Features [B, width, H, W] and what is to be added to them, again [B, width, H, W]."""

    def __init__(self, width):
        super().__init__()
        self.block = nn.Sequential(*gated_conv(width, width), conv3x3(width, width), nn.BatchNorm2d(width))

    def forward(self, x):
        return x + self.block(x)


class NextStage(nn.Module):
    """Features [B, width, H, W] and a condition [B, condition_dim] -> features [B, width / 2, 2H, 2W]."""

    def __init__(self, width, condition_dim, residuals):
        super().__init__()
        self.jointConv = nn.Sequential(*gated_conv(condition_dim + width, width))
        self.residual = nn.Sequential(*[ResidualBlock(width) for _ in range(residuals)])
        self.upsample = upsample(width, width // 2)

    def forward(self, features, condition):
        x = self.jointConv(concatenate_everywhere(condition, features))
        return self.upsample(self.residual(x))


class ToImage(nn.Module):
    """Features [B, width, H, W] -> an image [B, 3, H, W] in [-1, 1]."""

    def __init__(self, width):
        super().__init__()
        self.img = nn.Sequential(conv3x3(width, 3), nn.Tanh())

    def forward(self, features):
        return self.img(features)


class Generator(nn.Module):
    """Noise [B, z_dim] and sentence embeddings [B, text_dim] to (images, mu, logvar).

    `images` is a list, small to large, of [B, 3, S, S] in [-1, 1] for S = 64, 128, 256, ..., one for each branch. `mu`
    and `logvar` [B, embedding_dim] are the distribution of the condition. Where the tree is not `conditional`, it
    takes no text, the noise is repeated where the condition would be, and both are None.
    """

    def __init__(self, branches=3, gf_dim=64, z_dim=100, text_dim=1024, embedding_dim=128, residuals=2,
                 conditional=True):
        super().__init__()
        self.branches, self.z_dim, self.conditional = branches, z_dim, conditional
        condition_dim = embedding_dim if conditional else z_dim
        if conditional:
            self.ca_net = ConditioningAugmentation(text_dim, embedding_dim)
        self.h_net1 = InitialStage(z_dim + conditional * embedding_dim, 16 * gf_dim)
        self.img_net1 = ToImage(gf_dim)
        for branch in range(2, branches + 1):
            width = gf_dim >> (branch - 2)
            # As in the authors' code, the stages beyond 256 pixels have one residual block.
            setattr(self, f'h_net{branch}', NextStage(width, condition_dim, residuals if branch <= 3 else 1))
            setattr(self, f'img_net{branch}', ToImage(width // 2))

    def forward(self, noise, text=None):
        if self.conditional:
            condition, mu, logvar = self.ca_net(text)
            features = self.h_net1(torch.cat([condition, noise], 1))
        else:
            condition, mu, logvar = noise, None, None
            features = self.h_net1(noise)
        images = [self.img_net1(features)]
        for branch in range(2, self.branches + 1):
            features = getattr(self, f'h_net{branch}')(features, condition)
            images.append(getattr(self, f'img_net{branch}')(features))
        return images, mu, logvar


def normalized_conv(size_in, size_out, kernel_size, stride):
    """Layers [B, size_in, H, W] -> [B, size_out, H / stride, W / stride]."""
    return [nn.Conv2d(size_in, size_out, kernel_size, stride, padding=1, bias=False),
            nn.BatchNorm2d(size_out), nn.LeakyReLU(0.2, inplace=True)]


def downsample(size_in, size_out):
    """Layers [B, size_in, H, W] -> [B, size_out, H/2, W/2]."""
    return normalized_conv(size_in, size_out, kernel_size=4, stride=2)


def narrow(size_in, size_out):
    """Layers [B, size_in, H, W] -> [B, size_out, H, W]."""
    return normalized_conv(size_in, size_out, kernel_size=3, stride=1)


def probability(size_in):
    """Layers [B, size_in, 4, 4] -> [B, 1, 1, 1] in [0, 1]."""
    return nn.Sequential(nn.Conv2d(size_in, 1, kernel_size=4, stride=4), nn.Sigmoid())


class Discriminator(nn.Module):
    """Images [B, 3, image_size, image_size] in [-1, 1] and conditions [B, embedding_dim] to a list of probabilities.

    Two of [B]: that the image is real and shows what the condition says, and that it is real, whatever it shows. Both
    read the same code of the image (joint conditional and unconditional, JCU). Where it is not `conditional`, only that
    it is real.
    """

    def __init__(self, image_size, df_dim=64, embedding_dim=128, conditional=True):
        super().__init__()
        width = 8 * df_dim
        self.img_code_s16 = nn.Sequential(                                                       # of a 64 x 64 image:
            nn.Conv2d(3, df_dim, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True),          # [B, df_dim, 32, 32]
            *downsample(df_dim, 2 * df_dim),                                                     # [B, 2 df_dim, 16, 16]
            *downsample(2 * df_dim, 4 * df_dim),                                                 # [B, 4 df_dim, 8, 8]
            *downsample(4 * df_dim, width))                                                      # [B, 8 df_dim, 4, 4]
        self.image_code = ['img_code_s16']
        # Larger images: halve the map and double the channels until it is 4 x 4, then narrow the channels to 8 df_dim.
        halvings = (image_size // BASE_SIZE).bit_length() - 1
        for i in range(halvings):
            self._append(f'img_code_s{32 << i}', downsample(width << i, width << (i + 1)))
        for i in range(halvings, 0, -1):
            self._append(f'img_code_s{16 << halvings}_{halvings - i + 1}', narrow(width << i, width << (i - 1)))
        self.logits = probability(width)
        self.conditional = conditional
        if conditional:
            self.jointConv = nn.Sequential(*narrow(width + embedding_dim, width))
            self.uncond_logits = probability(width)

    def _append(self, name, layers):
        setattr(self, name, nn.Sequential(*layers))
        self.image_code.append(name)

    def forward(self, image, condition=None):
        code = image
        for name in self.image_code:
            code = getattr(self, name)(code)                                                     # [B, 8 df_dim, 4, 4]
        if not self.conditional:
            return [self.logits(code).flatten()]
        joint = self.jointConv(concatenate_everywhere(condition, code))
        return [self.logits(joint).flatten(), self.uncond_logits(code).flatten()]
