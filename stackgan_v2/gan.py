"""The networks of StackGAN++ (Zhang et al., TPAMI 2018): a tree of generators, and one discriminator per image size.

Attributes are named as in the authors' code, so that their checkpoints load.
"""
import torch
from torch import nn

BASE_SIZE = 64


def conv3x3(size_in, size_out):
    """Return a convolution [B, size_in, H, W] -> [B, size_out, H, W]."""
    return nn.Conv2d(size_in, size_out, 3, padding=1, bias=False)


def gated_conv(size_in, size_out):
    """Return layers [B, size_in, H, W] -> [B, size_out, H, W] that end in a gated linear unit: a * sigmoid(b)."""
    return [conv3x3(size_in, 2 * size_out), nn.BatchNorm2d(2 * size_out), nn.GLU(dim=1)]


def upsample(size_in, size_out):
    """Return a block that doubles height and width: [B, size_in, H, W] -> [B, size_out, 2H, 2W]."""
    return nn.Sequential(nn.Upsample(scale_factor=2, mode='nearest'), *gated_conv(size_in, size_out))


def prepend_condition(condition, features):
    """Prepend a condition [B, K] to features [B, C, H, W] at every location: -> [B, K + C, H, W]."""
    condition = condition.to(features.dtype)[:, :, None, None].expand(-1, -1, *features.shape[2:])
    return torch.cat([condition, features], 1)


class ConditioningAugmentation(nn.Module):
    """Sample a condition c ~ N(mu(t), sigma(t)^2) for a sentence embedding t (paper, section 3.1).

    text [B, text_dim] -> (c, mu, logvar), each [B, embedding_dim], where logvar = log sigma^2.
    """

    def __init__(self, text_dim, embedding_dim):
        super().__init__()
        self.fc = nn.Linear(text_dim, 4 * embedding_dim)
        self.glu = nn.GLU(dim=1)

    def forward(self, text):
        mu, logvar = self.glu(self.fc(text)).chunk(2, dim=1)
        epsilon = torch.randn(mu.shape, device=mu.device)
        # c = mu + sigma * epsilon, with epsilon ~ N(0, 1)
        return mu + epsilon * torch.exp(logvar / 2), mu, logvar


class InitialStage(nn.Module):
    """Compute h_0 = F_0(c, z): concatenated condition and noise [B, size_in] -> features [B, width / 16, 64, 64]."""

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
    """Compute x + F(x) for features x [B, width, H, W], where F is two convolutions."""

    def __init__(self, width):
        super().__init__()
        self.block = nn.Sequential(*gated_conv(width, width), conv3x3(width, width), nn.BatchNorm2d(width))

    def forward(self, x):
        return x + self.block(x)


class NextStage(nn.Module):
    """Compute h_i = F_i(h_(i-1), c) with twice the height and width.

    features [B, width, H, W] and condition [B, condition_dim] -> features [B, width / 2, 2H, 2W].
    """

    def __init__(self, width, condition_dim, residuals):
        super().__init__()
        self.jointConv = nn.Sequential(*gated_conv(condition_dim + width, width))
        self.residual = nn.Sequential(*[ResidualBlock(width) for _ in range(residuals)])
        self.upsample = upsample(width, width // 2)

    def forward(self, features, condition):
        x = self.jointConv(prepend_condition(condition, features))
        return self.upsample(self.residual(x))


class ToImage(nn.Module):
    """Compute the image of a branch, s_i = G_i(h_i): features [B, width, H, W] -> [B, 3, H, W] in [-1, 1]."""

    def __init__(self, width):
        super().__init__()
        self.img = nn.Sequential(conv3x3(width, 3), nn.Tanh())

    def forward(self, features):
        return self.img(features)


class Generator(nn.Module):
    """Generate one image per branch from noise and sentence embeddings (paper, section 4.1).

    noise [B, z_dim] and text [B, text_dim] -> (images, mu, logvar), where images is a list, small to large, of
    [B, 3, S, S] in [-1, 1] for S = 64, 128, 256, ..., and mu and logvar [B, embedding_dim] are the distribution of the
    condition. If not `conditional`, there is no text, noise takes the place of the condition, and both are None.
    """

    def __init__(self, branches=3, gf_dim=64, z_dim=100, text_dim=1024, embedding_dim=128, residuals=2,
                 conditional=True):
        super().__init__()
        self.branches, self.z_dim, self.text_dim, self.conditional = branches, z_dim, text_dim, conditional
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


def conv_bn_lrelu(size_in, size_out, kernel_size, stride):
    """Return layers [B, size_in, H, W] -> [B, size_out, H / stride, W / stride]."""
    return [nn.Conv2d(size_in, size_out, kernel_size, stride, padding=1, bias=False),
            nn.BatchNorm2d(size_out), nn.LeakyReLU(0.2, inplace=True)]


def downsample(size_in, size_out):
    """Return layers that halve height and width: [B, size_in, H, W] -> [B, size_out, H/2, W/2]."""
    return conv_bn_lrelu(size_in, size_out, kernel_size=4, stride=2)


def conv3x3_bn_lrelu(size_in, size_out):
    """Return layers that keep height and width: [B, size_in, H, W] -> [B, size_out, H, W]."""
    return conv_bn_lrelu(size_in, size_out, kernel_size=3, stride=1)


def probability_head(size_in):
    """Return layers that compute a probability: [B, size_in, 4, 4] -> [B, 1, 1, 1] in [0, 1]."""
    return nn.Sequential(nn.Conv2d(size_in, 1, kernel_size=4, stride=4), nn.Sigmoid())


class Discriminator(nn.Module):
    """Compute D_i(x, c) and D_i(x): joint conditional and unconditional (JCU; paper, section 4.2).

    image [B, 3, image_size, image_size] in [-1, 1] and condition [B, embedding_dim] -> a list of two probabilities [B]:
    that the image is real and matches the condition, and that it is real, whatever it shows. Both share one encoding of
    the image. If not `conditional`, the list holds only the probability that the image is real.
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
        # Larger images: halve the map and double the channels until it is 4 x 4, then reduce the channels to 8 df_dim.
        halvings = (image_size // BASE_SIZE).bit_length() - 1
        for i in range(halvings):
            self._append(f'img_code_s{32 << i}', downsample(width << i, width << (i + 1)))
        for i in range(halvings, 0, -1):
            self._append(f'img_code_s{16 << halvings}_{halvings - i + 1}',
                         conv3x3_bn_lrelu(width << i, width << (i - 1)))
        self.logits = probability_head(width)
        self.conditional = conditional
        if conditional:
            self.jointConv = nn.Sequential(*conv3x3_bn_lrelu(width + embedding_dim, width))
            self.uncond_logits = probability_head(width)

    def _append(self, name, layers):
        setattr(self, name, nn.Sequential(*layers))
        self.image_code.append(name)

    def forward(self, image, condition=None):
        code = image
        for name in self.image_code:
            code = getattr(self, name)(code)                                                     # [B, 8 df_dim, 4, 4]
        if not self.conditional:
            return [self.logits(code).flatten()]
        joint = self.jointConv(prepend_condition(condition, code))
        return [self.logits(joint).flatten(), self.uncond_logits(code).flatten()]
