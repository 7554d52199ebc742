"""The generator and the discriminator of the chapter's text-to-image GAN (Reed et al., ICML 2016), at 64 x 64."""
import torch
from torch import nn


class TextProjection(nn.Sequential):
    """A sentence embedding [B, size_in] made shorter: [B, size_out]."""

    def __init__(self, size_in, size_out):
        super().__init__(nn.Linear(size_in, size_out), nn.BatchNorm1d(size_out), nn.LeakyReLU(0.2, inplace=True))


def upsample(size_in, size_out, stride=2, padding=1):
    """Layers [B, size_in, H, W] -> [B, size_out, 2H, 2W]; with stride 1 and no padding, 1 x 1 becomes 4 x 4."""
    return [nn.ConvTranspose2d(size_in, size_out, 4, stride, padding, bias=False),
            nn.BatchNorm2d(size_out), nn.ReLU(inplace=True)]


def downsample(size_in, size_out):
    """Layers [B, size_in, H, W] -> [B, size_out, H/2, W/2]."""
    return [nn.Conv2d(size_in, size_out, 4, stride=2, padding=1),
            nn.BatchNorm2d(size_out), nn.LeakyReLU(0.2, inplace=True)]


class Generator(nn.Module):
    """Noise [B, latent_dim, 1, 1] and sentence embeddings [B, embed_dim] to images [B, channels, 64, 64] in [-1, 1]."""

    def __init__(self, channels, latent_dim=100, embed_dim=1024, embed_out_dim=128):
        super().__init__()
        self.latent_dim = latent_dim
        self.text_embedding = TextProjection(embed_dim, embed_out_dim)
        self.model = nn.Sequential(
            *upsample(embed_out_dim + latent_dim, 512, stride=1, padding=0),      # [B, 512, 4, 4]
            *upsample(512, 256),                                                  # [B, 256, 8, 8]
            *upsample(256, 128),                                                  # [B, 128, 16, 16]
            *upsample(128, 64),                                                   # [B, 64, 32, 32]
            nn.ConvTranspose2d(64, channels, 4, stride=2, padding=1, bias=False),  # [B, channels, 64, 64]
            nn.Tanh())

    def forward(self, noise, text):
        condition = self.text_embedding(text)[:, :, None, None]                   # [B, 128, 1, 1]
        return self.model(torch.cat([condition, noise], 1))


class TextAtEveryPlace(nn.Module):
    """Shortens the sentence embedding and puts it behind the image features at every place of the map."""

    def __init__(self, embed_dim, embed_out_dim):
        super().__init__()
        self.text_embedding = TextProjection(embed_dim, embed_out_dim)

    def forward(self, features, text):
        condition = self.text_embedding(text)[:, :, None, None]
        return torch.cat([features, condition.expand(-1, -1, *features.shape[2:])], 1)


class Discriminator(nn.Module):
    """Images [B, channels, 64, 64] in [-1, 1] and sentence embeddings [B, embed_dim] to two outputs:

    the probability [B] that the image is real and shows what the sentence says, and the features [B, 512, 4, 4] of the
    image alone, which the generator's feature-matching loss compares.
    """

    def __init__(self, channels, embed_dim=1024, embed_out_dim=128):
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(channels, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True),  # [B, 64, 32, 32]
            *downsample(64, 128),                                                 # [B, 128, 16, 16]
            *downsample(128, 256),                                                # [B, 256, 8, 8]
            *downsample(256, 512))                                                # [B, 512, 4, 4]
        self.text_embedding = TextAtEveryPlace(embed_dim, embed_out_dim)
        self.output = nn.Sequential(nn.Conv2d(512 + embed_out_dim, 1, 4, bias=False), nn.Sigmoid())

    def forward(self, image, text):
        features = self.model(image)
        probability = self.output(self.text_embedding(features, text))            # [B, 1, 1, 1]
        return probability.flatten(), features
