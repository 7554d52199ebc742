"""Training and evaluation of StackGAN (chapter: high-resolution text-to-image synthesis; Zhang et al., ICCV 2017)."""
import os
import re

import torch
from torch import nn

from common import checkpoint
from common.errors import UserError
from common.loop import train_loop
from common.pictures import side_by_side
from common.progress import new_progress
from common.sampling import reproducible, same_items
from stackgan_v1.gan import Stage1Discriminator, Stage1Generator, Stage2Discriminator, Stage2Generator

SNAPSHOT_INTERVAL = 50  # epochs between two generators in Model/
SAMPLES = 8             # rows of a sample grid
LAST_DISCRIMINATOR = 'netD_epoch_last'


def init_weights(module):
    """Convolutions and linear maps from N(0, 0.02), batch-norm scales from N(1, 0.02); biases of the last two 0."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if isinstance(module, (nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)


def make_networks(stage1=None, gf_dim=128, df_dim=64, z_dim=100, text_dim=1024, condition_dim=128, residuals=4,
                  device='cpu'):
    """A new generator and discriminator of Stage-I or, around the trained Stage-I generator `stage1`, of Stage-II.

    They are on `device` with their first weights. Stage-I has no `residuals`, and in Stage-II `z_dim` is that of
    `stage1`.
    """
    if stage1 is None:
        nets = Stage1Generator(gf_dim, z_dim, text_dim, condition_dim), Stage1Discriminator(df_dim, condition_dim)
    else:
        nets = (Stage2Generator(stage1, gf_dim, condition_dim, text_dim, residuals),
                Stage2Discriminator(df_dim, condition_dim))
    for net in nets:
        for part in net.children():
            if part is not stage1:
                part.apply(init_weights)
        net.to(device)
    return nets


def kl_to_standard_normal(mu, logvar):
    """KL divergence of N(mu, exp(logvar)) from N(0, 1), both [B, K] -> the mean over all elements, a scalar."""
    return -0.5 * (1 + logvar - mu ** 2 - logvar.exp()).mean()


class Model:
    """A stage's generator and discriminator, their losses and optimisers.

    `data_loader` yields batches as in `data.cropped_dataset`, at 64 or 256 pixels; `kl_coef` weighs the conditioning
    augmentation's KL divergence. The learning rate is halved every `lr_decay_epoch` epochs, where that is not None.
    A Model that only draws needs neither a data loader nor a discriminator.
    """

    def __init__(self, name, device, data_loader, generator, discriminator, kl_coef=2.0):
        self.name, self.device, self.data_loader = name, torch.device(device), data_loader
        self.netG, self.netD = generator.to(self.device), discriminator and discriminator.to(self.device)
        self.kl_coef, self.lr, self.lr_decay_epoch = kl_coef, None, None
        self.snapshot_interval = SNAPSHOT_INTERVAL
        self.loss_adv = nn.BCELoss()
        self.optim_G = self.optim_D = None
        self.progress = new_progress()
        self.options, self.data, self.keep = {}, {}, checkpoint.KEEP

    def create_optim(self, lr, alpha=0.5, beta=0.999):
        """Adam for both networks, with betas (`alpha`, `beta`); a Stage-I inside the generator is not trained."""
        trained = [parameter for parameter in self.netG.parameters() if parameter.requires_grad]
        self.optim_G = torch.optim.Adam(trained, lr=lr, betas=(alpha, beta), fused=True)
        self.optim_D = torch.optim.Adam(self.netD.parameters(), lr=lr, betas=(alpha, beta), fused=True)
        self.lr = lr

    def set_lr(self, lr):
        """Go on with another first learning rate; what became of it by now follows from the number of epochs."""
        self.lr = lr

    def train_step(self, batch):
        """One step of the discriminator, then one of the generator, whose picture is drawn once for both.

        Returns scalar tensors, as the authors log them: `loss_D` and its parts for real, wrong and generated pictures,
        `loss_G`, and beside it `loss_KL` without its weight.
        """
        image, embed = batch['right_images'].to(self.device), batch['right_embed'].to(self.device)
        noise = torch.randn((len(image), self.netG.z_dim), device=self.device)
        _, image_fake, mu, logvar = self.netG(embed, noise)
        condition = mu.detach()

        # Train D: real pictures with their condition are real; with another's, or generated, they are fake.
        self.netD.requires_grad_(True)
        losses = self._discriminator_losses(image, image_fake.detach(), condition)
        losses['loss_D'].backward()
        self.optim_D.step()
        self.optim_D.zero_grad()  # here, so that their memory is free for the generator's step

        # Train G: D should call its pictures real. D only judges here, so its parameters need no gradient.
        self.netD.requires_grad_(False)
        self.optim_G.zero_grad()
        loss_G, loss_KL = self._generator_loss(image_fake, condition), kl_to_standard_normal(mu, logvar)
        (loss_G + self.kl_coef * loss_KL).backward()
        self.optim_G.step()
        return {name: loss.detach() for name, loss in {**losses, 'loss_G': loss_G, 'loss_KL': loss_KL}.items()}

    def _discriminator_losses(self, image, image_fake, condition):
        """A wrong pair is a real picture with the condition of the next: both are in the batch already."""
        netD = self.netD
        code_real, code_fake = netD(image), netD(image_fake)
        real = self._be_real(netD.get_cond_logits(code_real, condition))
        wrong = self._be_fake(netD.get_cond_logits(code_real[:-1], condition[1:]))
        fake = self._be_fake(netD.get_cond_logits(code_fake, condition))
        loss_D = real + 0.5 * (fake + wrong)
        if netD.get_uncond_logits is not None:  # Stage-II
            real_uncond = self._be_real(netD.get_uncond_logits(code_real))
            fake_uncond = self._be_fake(netD.get_uncond_logits(code_fake))
            loss_D = (real + real_uncond) / 2 + (fake + wrong + fake_uncond) / 3
            real, fake = (real + real_uncond) / 2, (fake + fake_uncond) / 2
        return {'loss_D': loss_D, 'loss_D_real': real, 'loss_D_wrong': wrong, 'loss_D_fake': fake}

    def _generator_loss(self, image_fake, condition):
        code = self.netD(image_fake)
        loss = self._be_real(self.netD.get_cond_logits(code, condition))
        if self.netD.get_uncond_logits is not None:  # Stage-II
            loss = loss + self._be_real(self.netD.get_uncond_logits(code))
        return loss

    def _be_real(self, probability):
        return self.loss_adv(probability, torch.ones_like(probability))

    def _be_fake(self, probability):
        return self.loss_adv(probability, torch.zeros_like(probability))

    def train(self, epochs, log_interval=100, out_dir='', verbose=True):
        """Train until `epochs` epochs are done, those of a loaded checkpoint included. See `common.loop.train_loop`.

        With `out_dir`, also writes the networks in the authors' form every `snapshot_interval` epochs and at the end.
        """
        if self.optim_G is None:
            raise UserError('call create_optim(lr) before train()')
        self.netG.train()
        self.netD.train()
        self._decay_lr()

        def after_epoch():
            self._decay_lr()
            epoch = self.progress['epoch']
            if out_dir and (epoch % self.snapshot_interval == 0 or epoch == epochs):
                self.save_snapshot(out_dir)

        train_loop(self, epochs, log_interval, out_dir, verbose, after_epoch=after_epoch,
                   sample=self._sample_grid if hasattr(self.data_loader, 'dataset') else None)

    def _decay_lr(self):
        """The learning rate of the epoch under way, which follows from its number alone: exact after `--resume`."""
        halvings = self.progress['epoch'] // self.lr_decay_epoch if self.lr_decay_epoch else 0
        for group in (*self.optim_G.param_groups, *self.optim_D.param_groups):
            group['lr'] = self.lr * 0.5 ** halvings

    def _sample_grid(self):
        """A row for each of some items, always the same: the sketch, in Stage-II its refinement, and a real picture."""
        if not hasattr(self, 'sample_batch'):
            self.sample_batch = same_items(self.data_loader.dataset, SAMPLES)
        real = self.sample_batch['right_images']
        return side_by_side([*self.generate(self.sample_batch['right_embed']), real], real.shape[-1])

    def generate(self, embed, seed=0):
        """Images, a list of [B, 3, S, S] in [-1, 1], for sentence embeddings [B, text_dim]: the sketch, S = 64, and in
        Stage-II its refinement, S = 256. The same for the same `seed`, which draws noise and conditions.
        """
        embed = torch.as_tensor(embed).to(self.device)
        with reproducible(self.netG, self.device, seed):
            sketch, image, _, _ = self.netG(embed, torch.randn((len(embed), self.netG.z_dim), device=self.device))
        return [image] if sketch is None else [sketch, image]

    def eval(self, batch_size=None):
        """Draw for the first `batch_size` items of the data loader (default: its first batch).

        Returns (generated images, a list as `generate` gives it, the captions).
        """
        batch = next(iter(self.data_loader))
        size = min(batch_size or len(batch['txt']), len(batch['txt']))
        return self.generate(batch['right_embed'][:size]), batch['txt'][:size]

    def save_to(self, path='', name=None, verbose=True):
        """Write networks, optimisers, progress and options to `path/NAME.pt`, whole or not at all. Returns the file."""
        return checkpoint.save_pair(self, path, name, verbose)

    def save_snapshot(self, run_dir):
        """Write `run_dir/Model/netG_epoch_N.pth` and netD_epoch_last.pth as the authors' code does: state dicts."""
        for name, net in ((f'netG_epoch_{self.progress["epoch"]}', self.netG), (LAST_DISCRIMINATOR, self.netD)):
            weights = {key: value.detach().cpu() for key, value in net.state_dict().items()}
            checkpoint.save(os.path.join(run_dir, 'Model', f'{name}.pth'), weights, old_format=True)

    def load_from(self, path='', name=None, verbose=True):
        """Read what `save_to` wrote, or the authors' netG_epoch_N.pth, and netD_epoch_last.pth if that is beside it.

        `path` is the file, or a folder with NAME.pt, or one with netG_epoch_N.pth in it or in its Model/ (of several
        the highest N). In place of a NAME.pt there that is damaged, what was kept from before it is read, which is
        said. With optimisers already made (`create_optim`), their states and the progress are read too. Raises
        UserError where the file is missing, damaged, refused or of another network; the model is then as it was.
        """
        file = checkpoint.find(path, name or self.name)
        contents = checkpoint.load(file)
        if 'netD' in contents:
            checkpoint.load_pair(self, contents, file)
        else:
            beside = os.path.join(os.path.dirname(file), f'{LAST_DISCRIMINATOR}.pth')
            with_it = [(self.netD, checkpoint.load(beside), beside)] if os.path.isfile(beside) else []
            checkpoint.load_all([(self.netG, contents, file), *with_it])
        if verbose:
            print(f'loaded {file}')


def load_generator(path, name, device='cpu', stage=None):
    """(a Model that only draws, of the shape that the checkpoint has; the checkpoint's file; its number of epochs).

    `path` and errors are as in `Model.load_from`; with `stage` (1 or 2) a generator of the other one is an error, too.
    """
    file = checkpoint.find(path, name)
    contents = checkpoint.load(file, mapped=True)
    weights = checkpoint.without_module(contents.get('netG', contents), file)
    netG = checkpoint.build(lambda: generator_of(weights, file), weights, file)
    is_of = 2 if isinstance(netG, Stage2Generator) else 1
    if stage not in (None, is_of):
        raise UserError(f'{file}: holds a Stage-{"I" * is_of} generator, but Stage-{"I" * stage} is asked for here')
    checkpoint.load_weights(netG, weights, file)
    return Model(name, device, None, netG, None), file, checkpoint.count_in(contents, file, 'epoch')


def generator_of(weights, file):
    """A generator whose weights have these names and shapes: of Stage-I, or of Stage-II with a Stage-I inside.

    Raises UserError if none has.
    """
    try:
        condition_dim, text_dim = len(weights['ca_net.fc.weight']) // 2, weights['ca_net.fc.weight'].shape[1]
        if 'encoder.0.weight' not in weights:
            width, size_in = weights['fc.0.weight'].shape
            return Stage1Generator(width // (8 * 4 * 4), size_in - condition_dim, text_dim, condition_dim)
        stage1 = {key.removeprefix('STAGE1_G.'): value for key, value in weights.items() if key.startswith('STAGE1_G.')}
        residuals = sum(re.fullmatch(r'residual\.\d+\.block\.0\.weight', key) is not None for key in weights)
        return Stage2Generator(generator_of(stage1, file), len(weights['encoder.0.weight']), condition_dim, text_dim,
                               residuals)
    except (KeyError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise UserError(f'{file}: holds no generator of StackGAN (no weights of a Stage-I or Stage-II)') from error
