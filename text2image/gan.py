"""The networks of the chapter's text-to-image GAN, 64 x 64 (section "GAN architecture and training").

The model follows Reed et al., "Generative Adversarial Text to Image Synthesis" (ICML 2016), section 4.1. With an image
x, the embedding t of a sentence, and noise z, the generator computes G(z, t) and the discriminator D(x, t).
"""
import torch
from torch import nn


class Generator(nn.Module):
    """Generate images from noise and sentence embeddings: G(z, t).

    noise [B, latent_dim, 1, 1] and text [B, embed_dim] -> images [B, channels, 64, 64] in [-1, 1].
    """

    def __init__(self, channels, latent_dim=100, embed_dim=1024, embed_out_dim=128):
        super().__init__()
        self.channels = channels
        self.latent_dim = latent_dim
        self.embed_dim = embed_dim
        self.embed_out_dim = embed_out_dim

        self.text_embedding = nn.Sequential(                                              # [B, embed_out_dim]
            nn.Linear(self.embed_dim, self.embed_out_dim),
            nn.BatchNorm1d(self.embed_out_dim),
            nn.LeakyReLU(0.2, inplace=True))

        self.model = nn.Sequential(
            *self._create_layer(self.embed_out_dim + self.latent_dim, 512, stride=1, padding=0),  # [B, 512, 4, 4]
            *self._create_layer(512, 256),                                                        # [B, 256, 8, 8]
            *self._create_layer(256, 128),                                                        # [B, 128, 16, 16]
            *self._create_layer(128, 64),                                                         # [B, 64, 32, 32]
            *self._create_layer(64, self.channels, output=True))                             # [B, channels, 64, 64]

    def _create_layer(self, size_in, size_out, kernel_size=4, stride=2, padding=1, output=False):
        """Return layers that double height and width: [B, size_in, H, W] -> [B, size_out, 2H, 2W].

        With stride 1 and no padding, 1 x 1 becomes 4 x 4.
        """
        layers = [nn.ConvTranspose2d(size_in, size_out, kernel_size, stride, padding, bias=False)]
        return layers + ([nn.Tanh()] if output else [nn.BatchNorm2d(size_out), nn.ReLU(inplace=True)])

    def forward(self, noise, text):
        text = self.text_embedding(text)[:, :, None, None]     # [B, embed_out_dim, 1, 1]
        z = torch.cat([text, noise], 1)                        # [B, embed_out_dim + latent_dim, 1, 1]
        return self.model(z)


class Embedding(nn.Module):
    """Project a sentence embedding to `size_out` numbers and append it to image features at every location.

    x [B, C, H, W] and text [B, size_in] -> [B, C + size_out, H, W].
    """

    def __init__(self, size_in, size_out):
        super().__init__()
        self.text_embedding = nn.Sequential(
            nn.Linear(size_in, size_out),
            nn.BatchNorm1d(size_out),
            nn.LeakyReLU(0.2, inplace=True))

    def forward(self, x, text):
        embed_out = self.text_embedding(text)[:, :, None, None]               # [B, size_out, 1, 1]
        embed_out_resize = embed_out.expand(-1, -1, *x.shape[2:])             # [B, size_out, H, W]
        return torch.cat([x, embed_out_resize], 1)


class Discriminator(nn.Module):
    """Compute D(x, t), the probability that an image is real and matches the sentence, and features of the image.

    x [B, channels, 64, 64] in [-1, 1] and text [B, embed_dim] -> probabilities [B] and features [B, 512, 4, 4]. The
    features depend on the image alone; the generator's L1 loss compares those of real and generated images.
    """

    def __init__(self, channels, embed_dim=1024, embed_out_dim=128):
        super().__init__()
        self.channels = channels
        self.embed_dim = embed_dim
        self.embed_out_dim = embed_out_dim

        self.model = nn.Sequential(
            *self._create_layer(self.channels, 64, normalize=False),                      # [B, 64, 32, 32]
            *self._create_layer(64, 128),                                                 # [B, 128, 16, 16]
            *self._create_layer(128, 256),                                                # [B, 256, 8, 8]
            *self._create_layer(256, 512))                                                # [B, 512, 4, 4]
        self.text_embedding = Embedding(self.embed_dim, self.embed_out_dim)               # [B, 640, 4, 4]
        self.output = nn.Sequential(
            nn.Conv2d(512 + self.embed_out_dim, 1, kernel_size=4, bias=False),            # [B, 1, 1, 1]
            nn.Sigmoid())

    def _create_layer(self, size_in, size_out, kernel_size=4, stride=2, padding=1, normalize=True):
        """Return layers that halve height and width: [B, size_in, H, W] -> [B, size_out, H/2, W/2]."""
        layers = [nn.Conv2d(size_in, size_out, kernel_size, stride, padding)]
        return layers + [nn.BatchNorm2d(size_out)] * normalize + [nn.LeakyReLU(0.2, inplace=True)]

    def forward(self, x, text):
        x_out = self.model(x)
        out = self.text_embedding(x_out, text)
        out = self.output(out)
        return out.flatten(), x_out
