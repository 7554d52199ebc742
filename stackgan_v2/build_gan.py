"""Training and evaluation of StackGAN++ (chapter: training StackGAN++; Zhang et al., TPAMI 2018)."""
import os

import torch
from torch import nn

from common import checkpoint
from common.errors import UserError
from common.loop import new_progress, train_loop

AVERAGE_DECAY = 0.999  # of the running average of the generator's parameters, every step
COVARIANCE_WEIGHT = 5  # of colour covariances against colour means (paper, equation 12)


def init_weights(module):
    """Orthogonal convolutions and linear maps, batch-norm scales from N(1, 0.02), biases of both 0."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.orthogonal_(module.weight)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def kl_to_standard_normal(mu, logvar):
    """KL divergence of N(mu, exp(logvar)) from N(0, 1), both [B, K] -> the mean over all elements, a scalar."""
    return -0.5 * (1 + logvar - mu ** 2 - logvar.exp()).mean()


def color_statistics(image):
    """[B, 3, H, W] -> the mean colour [B, 3, 1] and the covariances of the channels over the pixels [B, 3, 3]."""
    pixels = image.flatten(2)
    mean = pixels.mean(2, keepdim=True)
    centred = pixels - mean
    return mean, centred @ centred.transpose(1, 2) / pixels.shape[2]


class Model:
    """The tree of generators, a discriminator for each of its sizes, their losses and optimisers.

    `data_loader` yields batches as in `data.multiscale_dataset`. `kl_coef` weighs the conditioning augmentation's KL
    divergence, `uncond_coef` the unconditional losses, `color_coef` the colour consistency of neighbouring branches.
    """

    def __init__(self, name, device, data_loader, generator, discriminators, kl_coef=2.0, uncond_coef=1.0,
                 color_coef=0.0):
        self.name, self.device, self.data_loader = name, torch.device(device), data_loader
        self.kl_coef, self.uncond_coef, self.color_coef = kl_coef, uncond_coef, color_coef
        self.netG = generator.to(self.device)
        self.netsD = [netD.to(self.device) for netD in discriminators]
        self.averaged = [parameter.detach().clone() for parameter in self.netG.parameters()]
        self.loss_adv, self.loss_color = nn.BCELoss(), nn.MSELoss()
        self.optim_G, self.optims_D = None, []
        self.progress = new_progress()
        self.options = {}

    def create_optim(self, lr, alpha=0.5, beta=0.999):
        """Adam for every network, with betas (`alpha`, `beta`)."""
        self.optim_G = torch.optim.Adam(self.netG.parameters(), lr=lr, betas=(alpha, beta))
        self.optims_D = [torch.optim.Adam(netD.parameters(), lr=lr, betas=(alpha, beta)) for netD in self.netsD]

    def set_lr(self, lr):
        """Go on with another learning rate than that of a loaded checkpoint."""
        for optimiser in (self.optim_G, *self.optims_D):
            for group in optimiser.param_groups:
                group['lr'] = lr

    def train_step(self, batch):
        """One step of every discriminator, then one of the generator, whose pictures are drawn once for both.

        Returns `loss_D` (a list, one for each branch), `loss_G` and, with text, its part `loss_KL`: scalar tensors.
        """
        embed = batch['right_embed'].to(self.device) if self.netG.conditional else None
        noise = torch.randn((len(batch['right_images'][0]), self.netG.z_dim), device=self.device)
        images_fake, mu, logvar = self.netG(noise, embed)

        losses_D = []
        for branch, netD in enumerate(self.netsD):
            netD.requires_grad_(True)
            self.optims_D[branch].zero_grad()
            loss_D = self._discriminator_loss(branch, batch, images_fake[branch].detach(), mu)
            loss_D.backward()
            self.optims_D[branch].step()
            losses_D.append(loss_D.detach())

        loss_G = sum(self._generator_loss(branch, image, mu) for branch, image in enumerate(images_fake))
        if self.color_coef:
            loss_G = loss_G + self.color_coef * self._color_loss(images_fake)
        losses = {'loss_D': losses_D}
        if self.netG.conditional:
            loss_KL = self.kl_coef * kl_to_standard_normal(mu, logvar)
            loss_G = loss_G + loss_KL
            losses['loss_KL'] = loss_KL.detach()
        self.optim_G.zero_grad()
        loss_G.backward()
        self.optim_G.step()
        self._update_average()
        return {**losses, 'loss_G': loss_G.detach()}

    def _discriminator_loss(self, branch, batch, image_fake, mu):
        """Real pictures are real, generated ones fake; given the condition, real ones of another class are fake too."""
        netD, image_real = self.netsD[branch], batch['right_images'][branch].to(self.device)
        if not netD.conditional:
            real, fake = netD(image_real)[0], netD(image_fake)[0]
            return self._be_real(real) + self._be_fake(fake)
        condition = mu.detach()
        real, real_uncond = netD(image_real, condition)
        wrong, wrong_uncond = netD(batch['wrong_images'][branch].to(self.device), condition)
        fake, fake_uncond = netD(image_fake, condition)
        if not self.uncond_coef:
            return self._be_real(real) + 0.5 * (self._be_fake(wrong) + self._be_fake(fake))
        return (self._be_real(real) + self._be_fake(wrong) + self._be_fake(fake)
                + self.uncond_coef * (self._be_real(real_uncond) + self._be_real(wrong_uncond)
                                      + self._be_fake(fake_uncond)))

    def _generator_loss(self, branch, image_fake, mu):
        """The discriminator should call the picture real. It only judges, so its parameters need no gradient."""
        netD = self.netsD[branch].requires_grad_(False)
        real, *uncond = netD(image_fake, mu)
        loss = self._be_real(real)
        if uncond and self.uncond_coef:
            loss = loss + self.uncond_coef * self._be_real(uncond[0])
        return loss

    def _color_loss(self, images):
        """Each branch should keep the colours of the branch below it (paper, equation 12)."""
        loss = 0
        for small, large in zip(images, images[1:]):
            mean_small, covariance_small = color_statistics(small.detach())
            mean_large, covariance_large = color_statistics(large)
            loss = loss + (self.loss_color(mean_large, mean_small)
                           + COVARIANCE_WEIGHT * self.loss_color(covariance_large, covariance_small))
        return loss

    def _be_real(self, probability):
        return self.loss_adv(probability, torch.ones_like(probability))

    def _be_fake(self, probability):
        return self.loss_adv(probability, torch.zeros_like(probability))

    @torch.no_grad()
    def _update_average(self):
        torch._foreach_lerp_(self.averaged, list(self.netG.parameters()), 1 - AVERAGE_DECAY)

    @property
    def average_G(self):
        """The generator's state dict with the running averages in place of its parameters."""
        names = [name for name, _ in self.netG.named_parameters()]
        return {**self.netG.state_dict(), **dict(zip(names, self.averaged))}
