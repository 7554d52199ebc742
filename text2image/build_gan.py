"""Training and evaluation of the text-to-image GAN (chapter: GAN architecture and training)."""
import os

import torch
from torch import nn

from common import checkpoint
from common.errors import UserError
from common.loop import train_loop
from common.pictures import real_over_generated
from common.progress import new_progress
from common.sampling import same_items
from text2image.gan import Discriminator, Generator

SAMPLES = 32  # pairs of pictures in a sample grid


def init_weights(module):
    """Convolutions from N(0, 0.02), batch-norm scales from N(1, 0.02); linear layers keep PyTorch's own start."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)


class Model:
    """The two networks, their losses and optimisers.

    `data_loader` yields batches as in `data.txt2image_dataset`; `l1_coef` weighs feature matching, `l2_coef` the pixel
    loss. Two terms of Reed et al. (ICML 2016) that the chapter leaves out are 0: `cls_coef` (GAN-CLS: a real picture
    with a sentence about another one is fake) and `int_coef` (GAN-INT: pictures for sentences between two sentences).
    """

    def __init__(self, name, device, data_loader, channels, l1_coef, l2_coef, cls_coef=0.0, int_coef=0.0):
        self.name, self.device, self.data_loader, self.channels = name, torch.device(device), data_loader, channels
        self.l1_coef, self.l2_coef, self.cls_coef, self.int_coef = l1_coef, l2_coef, cls_coef, int_coef
        self.netG = Generator(channels).apply(init_weights).to(self.device)
        self.netD = Discriminator(channels).apply(init_weights).to(self.device)
        self.loss_adv, self.loss_l1, self.loss_l2 = nn.BCELoss(), nn.L1Loss(), nn.MSELoss()
        self.optim_G = self.optim_D = None
        self.progress = new_progress()
        self.options, self.data, self.keep = {}, {}, checkpoint.KEEP

    def create_optim(self, lr, alpha=0.5, beta=0.999):
        """Adam for both networks, with betas (`alpha`, `beta`)."""
        self.optim_G = torch.optim.Adam(self.netG.parameters(), lr=lr, betas=(alpha, beta), fused=True)
        self.optim_D = torch.optim.Adam(self.netD.parameters(), lr=lr, betas=(alpha, beta), fused=True)

    def set_lr(self, lr):
        """Go on with another learning rate than that of a loaded checkpoint."""
        for group in (*self.optim_G.param_groups, *self.optim_D.param_groups):
            group['lr'] = lr

    def train_step(self, batch):
        """One step of the discriminator, then one of the generator. Returns `loss_D` and `loss_G`, scalar tensors."""
        image, embed = batch['right_images'].to(self.device), batch['right_embed'].to(self.device)
        real_label = torch.ones(len(image), device=self.device)
        fake_label = torch.zeros(len(image), device=self.device)

        # Train D: real pictures are real, generated ones fake. G only draws here, so it needs no graph.
        self.netD.requires_grad_(True)
        self.optim_D.zero_grad()
        out_real, _ = self.netD(image, embed)
        with torch.no_grad():
            image_fake = self.netG(self._noise(len(image)), embed)
        out_fake, _ = self.netD(image_fake, embed)
        loss_D = self.loss_adv(out_real, real_label) + self.loss_adv(out_fake, fake_label)
        if self.cls_coef:
            out_wrong, _ = self.netD(batch['wrong_images'].to(self.device), embed)
            loss_D = loss_D + self.cls_coef * self.loss_adv(out_wrong, fake_label)
        loss_D.backward()
        self.optim_D.step()

        # Train G: D should call its pictures real, see the same features, and the pixels should be near.
        # D only judges here, so its parameters need no gradient.
        self.netD.requires_grad_(False)
        self.optim_G.zero_grad()
        image_fake = self.netG(self._noise(len(image)), embed)
        out_fake, act_fake = self.netD(image_fake, embed)
        _, act_real = self.netD(image, embed)
        loss_G = (self.loss_adv(out_fake, real_label)
                  + self.l1_coef * self.loss_l1(act_fake.mean(0), act_real.mean(0))
                  + self.l2_coef * self.loss_l2(image_fake, image))
        if self.int_coef:
            between = 0.5 * (embed + batch['inter_embed'].to(self.device))
            out_between, _ = self.netD(self.netG(self._noise(len(image)), between), between)
            loss_G = loss_G + self.int_coef * self.loss_adv(out_between, real_label)
        loss_G.backward()
        self.optim_G.step()
        return {'loss_D': loss_D.detach(), 'loss_G': loss_G.detach()}

    def _noise(self, size):
        return torch.randn((size, self.netG.latent_dim, 1, 1), device=self.device)

    def train(self, epochs, log_interval=100, out_dir='', verbose=True):
        """Train until `epochs` epochs are done, those of a loaded checkpoint included. See `common.loop.train_loop`."""
        if self.optim_G is None:
            raise UserError('call create_optim(lr) before train()')
        self.netG.train()
        self.netD.train()
        train_loop(self, epochs, log_interval, out_dir, verbose,
                   sample=self._sample_grid if hasattr(self.data_loader, 'dataset') else None)

    def _sample_grid(self):
        """Real over generated, always for the same sentences and noise, so that the grids of a run can be compared."""
        if not hasattr(self, 'sample_batch'):
            self.sample_batch = same_items(self.data_loader.dataset, SAMPLES)
        fake = self.generate(self.sample_batch['right_embed'])
        return real_over_generated(self.sample_batch['right_images'], fake)

    @torch.no_grad()
    def generate(self, embed, seed=0):
        """Images [B, channels, 64, 64] in [-1, 1] for sentence embeddings [B, 1024], the same for the same `seed`."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((len(embed), self.netG.latent_dim, 1, 1), generator=generator)
        was_training = self.netG.training
        self.netG.eval()
        image = self.netG(noise.to(self.device), torch.as_tensor(embed).to(self.device))
        self.netG.train(was_training)
        return image

    def eval(self, batch_size=None):
        """Draw for the first `batch_size` captions of the data loader (default: its first batch).

        Returns (generated images [B, channels, 64, 64] in [-1, 1], the captions).
        """
        batch = next(iter(self.data_loader))
        size = min(batch_size or len(batch['txt']), len(batch['txt']))
        return self.generate(batch['right_embed'][:size]), batch['txt'][:size]

    def save_to(self, path='', name=None, verbose=True):
        """Write networks, optimisers, progress and options to `path/NAME.pt`, whole or not at all. Returns the file."""
        return checkpoint.save_pair(self, path, name, verbose)

    def load_from(self, path='', name=None, verbose=True):
        """Read what `save_to` wrote, or a plain state dict of either network; `path` is the file or its folder.

        A folder may also hold the two files of the chapter's own `save_to`, NAME_G.pt and NAME_D.pt. In place of a
        damaged NAME.pt in a folder, what was kept from before it is read.
        With optimisers already made (`create_optim`), their states and the progress are read too. Raises UserError
        where the file is missing, damaged, refused or of another network.
        """
        file = checkpoint.newest(os.path.join(path, f'{name or self.name}.pt')) if os.path.isdir(path or '.') else path
        pair = {net: f'{file.removesuffix(".pt")}_{net[-1]}.pt' for net in ('netG', 'netD')}
        if os.path.isfile(pair['netG']) and not os.path.isfile(file):
            contents = {net: checkpoint.load(one) for net, one in pair.items()}
        else:
            contents = checkpoint.load(file)
        if not contents.keys() >= pair.keys():
            is_discriminator = any('output.0.weight' in str(key) for key in contents)
            checkpoint.load_weights(self.netD if is_discriminator else self.netG, contents, file)
        else:
            checkpoint.load_pair(self, contents, file)
        if verbose:
            print(f'loaded {file}')
