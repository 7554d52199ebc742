"""Train and evaluate StackGAN (section "High-resolution text-to-image synthesis"; Zhang et al., ICCV 2017)."""
import os

import torch
from torch import nn

from common import checkpoint
from common.errors import UserError
from common.pictures import generated_beside_real
from common.progress import new_progress
from common.sampling import fixed_batch, reproducible, truncate
from common.training_run import TrainingRun
from stackgan_v1 import checkpoints
from stackgan_v1.gan import Stage1Discriminator, Stage1Generator, Stage2Discriminator, Stage2Generator

SNAPSHOT_INTERVAL = 50  # epochs between two snapshots in Model/
SAMPLES = 8             # rows of a sample grid


def init_weights(module):
    """Initialize convolutions and linear layers from N(0, 0.02^2), the scales of batch norms from N(1, 0.02^2)."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if isinstance(module, (nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)


def make_networks(stage1=None, gf_dim=128, df_dim=64, z_dim=100, text_dim=1024, condition_dim=128, residuals=4,
                  device='cpu'):
    """Create the generator and the discriminator of Stage-I, or of Stage-II on top of the Stage-I generator `stage1`.

    Returns (generator, discriminator) on `device`. Stage-I ignores `residuals`; Stage-II takes `z_dim` from `stage1`.
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
    """Return D_KL(N(mu, sigma^2) || N(0, 1)), the mean over all elements of mu and logvar = log sigma^2 [B, K]."""
    return -0.5 * (1 + logvar - mu ** 2 - logvar.exp()).mean()


class Model:
    """Train the generator and the discriminator of a stage, and generate images.

    `data_loader` yields batches as in `data/cropped_dataset.py`, at 64 or 256 pixels; `kl_coef` is the weight of the
    KL divergence of conditioning augmentation. The learning rate is halved every `lr_decay_epoch` epochs, unless that
    is None. For generating only, `data_loader` and `discriminator` can be None.
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
        """Create an Adam optimizer for each network, with betas (`alpha`, `beta`); Stage-I stays frozen in Stage-II."""
        trained = [parameter for parameter in self.netG.parameters() if parameter.requires_grad]
        self.optim_G = torch.optim.Adam(trained, lr=lr, betas=(alpha, beta), fused=True)
        self.optim_D = torch.optim.Adam(self.netD.parameters(), lr=lr, betas=(alpha, beta), fused=True)
        self.lr = lr

    def train_step(self, batch):
        """Train D for one step, then G, with the same generated images in both steps (paper, equations 3 to 6).

        In the comments, x is an image, t the embedding of its sentence, z noise and c ~ N(mu(t), sigma(t)^2) a
        condition; Stage-II computes G(s_0, c), where s_0 is the image of Stage-I. As in the authors' code, D reads mu
        in place of t. Returns a dict of scalar tensors, the values that the authors log: `loss_D`; `loss_D_real`,
        `loss_D_wrong` and `loss_D_fake`, in Stage-II means of its two outputs, which do not add up to `loss_D`;
        `loss_G` without the KL divergence; and `loss_KL`, unweighted.
        """
        image, embed = batch['right_images'].to(self.device), batch['right_embed'].to(self.device)
        noise = torch.randn((len(image), self.netG.z_dim), device=self.device)
        _, image_fake, mu, logvar = self.netG(embed, noise)
        condition = mu.detach()

        # Train D (3, 5). Stage-I: min -log D(x, mu) - [log(1 - D(G(z, c), mu)) + log(1 - D(x, mu'))] / 2, where mu' is
        # the condition of another image. Stage-II has unconditional terms and other weights (`_discriminator_losses`)
        self.netD.requires_grad_(True)
        losses = self._discriminator_losses(image, image_fake.detach(), condition)
        losses['loss_D'].backward()
        self.optim_D.step()
        self.optim_D.zero_grad()  # free the gradients' memory for the generator's step

        # Train G (4, 6): min -log D(G(z, c), mu) + kl_coef * D_KL(N(mu, sigma^2) || N(0, 1)), in Stage-II also
        # -log D(G(s_0, c)); the paper's first term is log(1 - D), whose gradient vanishes where D is sure
        self.netD.requires_grad_(False)  # D does not learn here
        self.optim_G.zero_grad()
        loss_G, loss_KL = self._generator_loss(image_fake, condition), kl_to_standard_normal(mu, logvar)
        (loss_G + self.kl_coef * loss_KL).backward()
        self.optim_G.step()
        return {name: loss.detach() for name, loss in {**losses, 'loss_G': loss_G, 'loss_KL': loss_KL}.items()}

    def _discriminator_losses(self, image, image_fake, condition):
        """Return the discriminator's loss and its parts, with the weights of the authors' code.

        real = -log D(x_i, mu_i), fake = -log(1 - D(G(z, c)_i, mu_i)), and wrong = -log(1 - D(x_i, mu_(i+1))), a real
        image with the condition of the next one. Stage-I: loss_D = real + (fake + wrong) / 2. Stage-II has a second,
        unconditional output, and loss_D = (real + real_uncond) / 2 + (fake + wrong + fake_uncond) / 3.
        """
        netD, (real_label, fake_label) = self.netD, self._labels(image)
        code_real, code_fake = netD(image), netD(image_fake)
        real = self.loss_adv(netD.get_cond_logits(code_real, condition), real_label)
        wrong = self.loss_adv(netD.get_cond_logits(code_real[:-1], condition[1:]), fake_label[1:])
        fake = self.loss_adv(netD.get_cond_logits(code_fake, condition), fake_label)
        loss_D = real + 0.5 * (fake + wrong)
        if netD.get_uncond_logits is not None:  # Stage-II
            real_uncond = self.loss_adv(netD.get_uncond_logits(code_real), real_label)
            fake_uncond = self.loss_adv(netD.get_uncond_logits(code_fake), fake_label)
            loss_D = (real + real_uncond) / 2 + (fake + wrong + fake_uncond) / 3
            real, fake = (real + real_uncond) / 2, (fake + fake_uncond) / 2
        return {'loss_D': loss_D, 'loss_D_real': real, 'loss_D_wrong': wrong, 'loss_D_fake': fake}

    def _generator_loss(self, image_fake, condition):
        """Return the generator's adversarial loss: -log D(G(z, c), mu), and in Stage-II also -log D(G(z, c))."""
        code, (real_label, _) = self.netD(image_fake), self._labels(image_fake)
        loss = self.loss_adv(self.netD.get_cond_logits(code, condition), real_label)
        if self.netD.get_uncond_logits is not None:  # Stage-II
            loss = loss + self.loss_adv(self.netD.get_uncond_logits(code), real_label)
        return loss

    def _labels(self, image):
        return image.new_ones(len(image)), image.new_zeros(len(image))

    def train(self, epochs, log_interval=100, out_dir='', verbose=True):
        """Train until `epochs` epochs are done, including those of a loaded checkpoint.

        With `out_dir`, also saves the networks in the authors' format every `snapshot_interval` epochs and at the end.
        `common.training_run.TrainingRun` writes logs, samples and checkpoints, and handles interruptions.
        """
        if self.optim_G is None:
            raise UserError('call create_optim(lr) before train()')
        self.netG.train()
        self.netD.train()
        with TrainingRun(self, epochs, log_interval, out_dir, verbose, self.sample_grid) as run:
            for epoch in run.epochs():
                self._decay_lr(epoch)
                for batch in run.batches():
                    losses = self.train_step(batch)
                    run.log(losses)
                if (epoch + 1) % self.snapshot_interval == 0 or epoch + 1 == epochs:
                    run.write('the snapshot', self.save_snapshot, out_dir, epoch + 1)

    def _decay_lr(self, epoch):
        """Set the learning rate of an epoch from its number alone, so that it is the same after `--resume`."""
        halvings = epoch // self.lr_decay_epoch if self.lr_decay_epoch else 0
        for group in (*self.optim_G.param_groups, *self.optim_D.param_groups):
            group['lr'] = self.lr * 0.5 ** halvings

    def sample_grid(self):
        """Return a PIL image with one row per sample item, the same items every time.

        A row shows the Stage-I image, in Stage-II the refined image, and the real image.
        """
        if not hasattr(self, 'sample_batch'):
            self.sample_batch = fixed_batch(self.data_loader.dataset, SAMPLES)
        real = self.sample_batch['right_images']
        fake = self.generate(self.sample_batch['right_embed'])
        return generated_beside_real(fake, real, real.shape[-1], self.sample_batch['txt'])

    def generate(self, embed, seed=0, truncation=None):
        """Generate images for sentence embeddings [B, text_dim]; `seed` sets the noise and the conditions.

        `truncation` limits the noise (see `common.sampling.truncate`). Returns a list of [B, 3, S, S] in [-1, 1]:
        Stage-I images (S = 64) and, in Stage-II, the refined ones (S = 256).
        """
        embed = torch.as_tensor(embed).to(self.device)
        with reproducible(self.netG, self.device, seed):
            noise = truncate(torch.randn((len(embed), self.netG.z_dim), device=self.device), truncation)
            stage1_image, image, _, _ = self.netG(embed, noise)
        return [image] if stage1_image is None else [stage1_image, image]

    def eval(self, batch_size=None):
        """Generate images for the first `batch_size` items of the data loader's first batch (default: all of it).

        Returns (list of images, as from `generate`, list of captions).
        """
        batch = next(iter(self.data_loader))
        size = min(batch_size or len(batch['txt']), len(batch['txt']))
        return self.generate(batch['right_embed'][:size]), batch['txt'][:size]

    def save_to(self, path='', name=None, verbose=True):
        """Save networks, optimizers and progress to `path/NAME.pt` in one atomic write, and return the file."""
        return checkpoint.save_model(self, self._parts(), path, name, verbose)

    def save_snapshot(self, run_dir, epoch):
        """Save Model/netG_epoch_EPOCH.pth and Model/netD_epoch_last.pth, state dicts in the authors' format."""
        for name, net in ((f'netG_epoch_{epoch}', self.netG), (checkpoints.LAST_DISCRIMINATOR, self.netD)):
            weights = {key: value.detach().cpu() for key, value in net.state_dict().items()}
            checkpoint.save(os.path.join(run_dir, 'Model', f'{name}.pth'), weights, old_format=True)

    def load_from(self, path='', name=None, verbose=True):
        """Load a checkpoint: what `save_to` wrote, or another format that `checkpoints.read` knows.

        `path` is the file or its folder. If `create_optim` has been called, the states of the optimizers and the
        progress are loaded, too. Raises UserError if the file is missing, damaged, unsafe to load, or belongs to
        another network; the model then stays as it was.
        """
        file, contents, file_D = checkpoints.read(path, name or self.name)
        checkpoint.load_model(self, self._parts(), contents, file, file_D)
        if verbose:
            print(f'loaded {file}')

    def _parts(self):
        return {'netG': self.netG, 'netD': self.netD, 'optim_G': self.optim_G, 'optim_D': self.optim_D}


def load_generator(path, name, device='cpu', stage=None):
    """Load a generator of any width. Returns (Model that only generates, file that was read, number of epochs).

    `path` and errors are as in `Model.load_from`. Also raises UserError if the generator is of another stage than
    `stage` (1, 2 or None for any).
    """
    file, contents, _ = checkpoints.read(path, name, mapped=True)
    netG = checkpoints.build_generator(contents, file, stage)
    model = Model(name, device, None, netG, None)
    checkpoint.load_model(model, {'netG': netG}, contents, file)
    return model, file, checkpoint.count_in(contents, file, 'epoch')
