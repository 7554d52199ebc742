"""The networks of StackGAN (Zhang et al., ICCV 2017): Stage-I generates 64 x 64 images, Stage-II refines them to 256.

Attributes are named as in the authors' code, so that their checkpoints load.
"""
import torch
from torch import nn

SIZES = {1: 64, 2: 256}  # of each stage's images, in pixels


def conv3x3(size_in, size_out):
    """Return a convolution [B, size_in, H, W] -> [B, size_out, H, W]."""
    return nn.Conv2d(size_in, size_out, 3, padding=1, bias=False)


def upsample(size_in, size_out):
    """Return a block that doubles height and width: [B, size_in, H, W] -> [B, size_out, 2H, 2W]."""
    return nn.Sequential(nn.Upsample(scale_factor=2, mode='nearest'),
                         conv3x3(size_in, size_out), nn.BatchNorm2d(size_out), nn.ReLU(inplace=True))


def to_image(size_in):
    """Return layers that turn features [B, size_in, H, W] into images [B, 3, H, W] in [-1, 1]."""
    return nn.Sequential(conv3x3(size_in, 3), nn.Tanh())


def append_condition(features, condition):
    """Append a condition [B, K] to features [B, C, H, W] at every location: -> [B, C + K, H, W]."""
    condition = condition.to(features.dtype)[:, :, None, None].expand(-1, -1, *features.shape[2:])
    return torch.cat([features, condition], 1)


class ConditioningAugmentation(nn.Module):
    """Sample a condition c ~ N(mu(t), sigma(t)^2) for a sentence embedding t (paper, section 3.2).

    text [B, text_dim] -> (c, mu, logvar), each [B, condition_dim], where logvar = log sigma^2.
    """

    def __init__(self, text_dim, condition_dim):
        super().__init__()
        self.fc = nn.Linear(text_dim, 2 * condition_dim)

    def forward(self, text):
        mu, logvar = torch.relu(self.fc(text)).chunk(2, dim=1)  # the ReLU is the authors': mu >= 0 and sigma >= 1
        epsilon = torch.randn(mu.shape, device=mu.device)
        # c = mu + sigma * epsilon, with epsilon ~ N(0, 1)
        return mu + epsilon * torch.exp(logvar / 2), mu, logvar


class Stage1Generator(nn.Module):
    """Generate Stage-I images from sentence embeddings and noise: G_0(z, c_0) (paper, section 3.3).

    text [B, text_dim] and noise [B, z_dim] -> (None, image [B, 3, 64, 64] in [-1, 1], mu, logvar), where mu and logvar
    [B, condition_dim] are the distribution of c_0. In place of None, Stage-II returns the image of Stage-I.
    """

    def __init__(self, gf_dim=128, z_dim=100, text_dim=1024, condition_dim=128):
        super().__init__()
        self.z_dim, self.text_dim, self.width = z_dim, text_dim, 8 * gf_dim
        self.ca_net = ConditioningAugmentation(text_dim, condition_dim)
        self.fc = nn.Sequential(nn.Linear(z_dim + condition_dim, self.width * 4 * 4, bias=False),
                                nn.BatchNorm1d(self.width * 4 * 4), nn.ReLU(inplace=True))
        self.upsample1 = upsample(self.width, self.width // 2)
        self.upsample2 = upsample(self.width // 2, self.width // 4)
        self.upsample3 = upsample(self.width // 4, self.width // 8)
        self.upsample4 = upsample(self.width // 8, self.width // 16)
        self.img = to_image(self.width // 16)

    def forward(self, text, noise):
        condition, mu, logvar = self.ca_net(text)
        x = self.fc(torch.cat([noise, condition], 1)).view(-1, self.width, 4, 4)  # [B, 8 gf_dim, 4, 4]
        x = self.upsample1(x)                                                     # [B, 4 gf_dim, 8, 8]
        x = self.upsample2(x)                                                     # [B, 2 gf_dim, 16, 16]
        x = self.upsample3(x)                                                     # [B, gf_dim, 32, 32]
        x = self.upsample4(x)                                                     # [B, gf_dim / 2, 64, 64]
        return None, self.img(x), mu, logvar


class ResidualBlock(nn.Module):
    """Compute relu(x + F(x)) for features x [B, width, H, W], where F is two convolutions."""

    def __init__(self, width):
        super().__init__()
        self.block = nn.Sequential(conv3x3(width, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                                   conv3x3(width, width), nn.BatchNorm2d(width))

    def forward(self, x):
        return torch.relu(x + self.block(x))


class Stage2Generator(nn.Module):
    """Refine images of a trained Stage-I to 256 x 256: G(s_0, c), where s_0 = G_0(z, c_0) (paper, section 3.4).

    text [B, text_dim] and noise [B, z_dim] -> (s_0 [B, 3, 64, 64], image [B, 3, 256, 256], mu, logvar), images in
    [-1, 1]; mu and logvar [B, condition_dim] are the distribution of c, Stage-II's own condition. The weights of
    `stage1` are frozen; its batch norms follow `train()` and `eval()`, as in the authors' code.
    """

    def __init__(self, stage1, gf_dim=128, condition_dim=128, text_dim=1024, residuals=4):
        super().__init__()
        self.STAGE1_G = stage1.requires_grad_(False)
        self.z_dim, self.text_dim = stage1.z_dim, text_dim
        self.ca_net = ConditioningAugmentation(text_dim, condition_dim)
        self.encoder = nn.Sequential(
            conv3x3(3, gf_dim), nn.ReLU(inplace=True),                                   # [B, gf_dim, 64, 64]
            nn.Conv2d(gf_dim, 2 * gf_dim, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * gf_dim), nn.ReLU(inplace=True),                           # [B, 2 gf_dim, 32, 32]
            nn.Conv2d(2 * gf_dim, 4 * gf_dim, 4, 2, 1, bias=False),
            nn.BatchNorm2d(4 * gf_dim), nn.ReLU(inplace=True))                           # [B, 4 gf_dim, 16, 16]
        self.hr_joint = nn.Sequential(conv3x3(4 * gf_dim + condition_dim, 4 * gf_dim),
                                      nn.BatchNorm2d(4 * gf_dim), nn.ReLU(inplace=True))
        self.residual = nn.Sequential(*[ResidualBlock(4 * gf_dim) for _ in range(residuals)])
        self.upsample1 = upsample(4 * gf_dim, 2 * gf_dim)
        self.upsample2 = upsample(2 * gf_dim, gf_dim)
        self.upsample3 = upsample(gf_dim, gf_dim // 2)
        self.upsample4 = upsample(gf_dim // 2, gf_dim // 4)
        self.img = to_image(gf_dim // 4)

    def forward(self, text, noise):
        with torch.no_grad():
            _, stage1_image, _, _ = self.STAGE1_G(text, noise)
        condition, mu, logvar = self.ca_net(text)
        x = self.hr_joint(append_condition(self.encoder(stage1_image), condition))        # [B, 4 gf_dim, 16, 16]
        x = self.residual(x)                                                              # [B, 4 gf_dim, 16, 16]
        x = self.upsample1(x)                                                             # [B, 2 gf_dim, 32, 32]
        x = self.upsample2(x)                                                             # [B, gf_dim, 64, 64]
        x = self.upsample3(x)                                                             # [B, gf_dim / 2, 128, 128]
        x = self.upsample4(x)                                                             # [B, gf_dim / 4, 256, 256]
        return stage1_image, self.img(x), mu, logvar


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


def downsample_16x(df_dim):
    """Return layers that encode images [B, 3, H, W] as [B, 8 df_dim, H/16, W/16]: 64 x 64 pixels become 4 x 4."""
    return [nn.Conv2d(3, df_dim, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True),  # [B, df_dim, H/2, W/2]
            *downsample(df_dim, 2 * df_dim),                                             # [B, 2 df_dim, H/4, W/4]
            *downsample(2 * df_dim, 4 * df_dim),                                         # [B, 4 df_dim, H/8, W/8]
            *downsample(4 * df_dim, 8 * df_dim)]


class ProbabilityHead(nn.Module):
    """Compute the probability that an image is real and, with `condition_dim`, that it matches the condition.

    code [B, width, 4, 4] and, with `condition_dim`, condition [B, condition_dim] -> probabilities [B].
    """

    def __init__(self, width, condition_dim=0):
        super().__init__()
        joint = conv3x3_bn_lrelu(width + condition_dim, width) if condition_dim else []
        self.outlogits = nn.Sequential(*joint, nn.Conv2d(width, 1, kernel_size=4, stride=4), nn.Sigmoid())

    def forward(self, code, condition=None):
        if condition is not None:
            code = append_condition(code, condition)
        return self.outlogits(code).flatten()


class Stage1Discriminator(nn.Module):
    """Encode images [B, 3, 64, 64] in [-1, 1] as codes [B, 8 df_dim, 4, 4].

    `get_cond_logits(code, condition)` computes D_0, the probabilities [B] (not logits, despite the authors' name)
    that the images are real and match their conditions.
    """

    def __init__(self, df_dim=64, condition_dim=128):
        super().__init__()
        self.encode_img = nn.Sequential(*downsample_16x(df_dim))
        self.get_cond_logits = ProbabilityHead(8 * df_dim, condition_dim)
        self.get_uncond_logits = None

    def forward(self, image):
        return self.encode_img(image)


class Stage2Discriminator(nn.Module):
    """Encode images [B, 3, 256, 256] in [-1, 1] as codes [B, 8 df_dim, 4, 4].

    `get_cond_logits(code, condition)` is as in Stage-I; `get_uncond_logits(code)` computes the probabilities [B] that
    the images are real, whatever they show.
    """

    def __init__(self, df_dim=64, condition_dim=128):
        super().__init__()
        self.encode_img = nn.Sequential(
            *downsample_16x(df_dim),                     # [B, 8 df_dim, 16, 16]
            *downsample(8 * df_dim, 16 * df_dim),   # [B, 16 df_dim, 8, 8]
            *downsample(16 * df_dim, 32 * df_dim),  # [B, 32 df_dim, 4, 4]
            *conv3x3_bn_lrelu(32 * df_dim, 16 * df_dim),      # [B, 16 df_dim, 4, 4]
            *conv3x3_bn_lrelu(16 * df_dim, 8 * df_dim))       # [B, 8 df_dim, 4, 4]
        self.get_cond_logits = ProbabilityHead(8 * df_dim, condition_dim)
        self.get_uncond_logits = ProbabilityHead(8 * df_dim)

    def forward(self, image):
        return self.encode_img(image)
