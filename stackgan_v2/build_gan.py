"""Train and evaluate StackGAN++ (section "From StackGAN to StackGAN++"; Zhang et al., TPAMI 2018)."""
import os

import torch
from torch import nn

from common import checkpoint
from common.errors import UserError
from common.pictures import generated_beside_real
from common.progress import new_progress
from common.sampling import fixed_batch, reproducible, truncate
from common.training_run import TrainingRun
from stackgan_v2 import checkpoints
from stackgan_v2.gan import BASE_SIZE, Discriminator, Generator

AVERAGE_DECAY = 0.999     # per step, of the running average of the generator's parameters
COVARIANCE_WEIGHT = 5     # of the color consistency, beside color means with weight 1 (authors' code)
SNAPSHOT_INTERVAL = 2000  # steps between two snapshots in Model/
SAMPLES = 8               # rows of a sample grid
SAMPLE_SIZE = 256         # width in pixels of the largest images in it


def init_weights(module):
    """Initialize a layer: orthogonal convolution and linear weights, batch norm scales from N(1, 0.02^2), biases 0."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.orthogonal_(module.weight)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def make_networks(branches=3, gf_dim=64, df_dim=64, z_dim=100, text_dim=1024, embedding_dim=128, residuals=2,
                  conditional=True, device='cpu'):
    """Return (generator, list of discriminators from small to large) with initialized weights, on `device`."""
    netG = Generator(branches, gf_dim, z_dim, text_dim, embedding_dim, residuals, conditional)
    netsD = [Discriminator(BASE_SIZE << branch, df_dim, embedding_dim, conditional) for branch in range(branches)]
    for net in (netG, *netsD):
        net.to(device).apply(init_weights)
    return netG, netsD


def kl_to_standard_normal(mu, logvar):
    """Return D_KL(N(mu, sigma^2) || N(0, 1)), the mean over all elements of mu and logvar = log sigma^2 [B, K]."""
    return -0.5 * (1 + logvar - mu ** 2 - logvar.exp()).mean()


def color_statistics(image):
    """Return the mean color [B, 3, 1] and the color covariance [B, 3, 3] over the pixels of images [B, 3, H, W]."""
    pixels = image.flatten(2)
    mean = pixels.mean(2, keepdim=True)
    centered = pixels - mean
    return mean, centered @ centered.transpose(1, 2) / pixels.shape[2]


class Model:
    """Train the tree of generators with one discriminator per image size, and generate images.

    `data_loader` yields batches as in `data/multiscale_dataset.py`. `kl_coef` is the weight of the KL divergence of
    conditioning augmentation, `uncond_coef` that of the unconditional losses, and `color_coef` that of the color
    consistency of neighboring branches.
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
        self.snapshot_interval = SNAPSHOT_INTERVAL
        self.progress = new_progress()
        self.options, self.data, self.keep = {}, {}, checkpoint.KEEP

    def create_optim(self, lr, alpha=0.5, beta=0.999):
        """Create an Adam optimizer for each network, with betas (`alpha`, `beta`)."""
        self.optim_G, *self.optims_D = [torch.optim.Adam(net.parameters(), lr=lr, betas=(alpha, beta), fused=True)
                                        for net in (self.netG, *self.netsD)]

    def set_lr(self, lr):
        """Set the learning rate of all optimizers, overriding that of a loaded checkpoint."""
        for optimizer in (self.optim_G, *self.optims_D):
            for group in optimizer.param_groups:
                group['lr'] = lr

    def train_step(self, batch):
        """Train every discriminator for one step, then the tree of generators, with the same generated images in both.

        In the comments, branch i generates the image s_i and has the discriminator D_i; x_i is a real image of its
        size, x'_i one of another class, and mu the mean of the condition (paper, section 4). Returns a dict of scalar
        tensors: `loss_D` (a list, one per branch), `loss_G` and, with text, `loss_KL`, its weighted KL divergence.
        """
        embed = batch['right_embed'].to(self.device) if self.netG.conditional else None
        noise = torch.randn((len(batch['right_images'][0]), self.netG.z_dim), device=self.device)
        images_fake, mu, logvar = self.netG(noise, embed)

        # L_D_i = -log D_i(x_i, mu) - log(1 - D_i(s_i, mu)) - log(1 - D_i(x'_i, mu))         conditional
        #         + uncond_coef * [-log D_i(x_i) - log(1 - D_i(s_i)) - log D_i(x'_i)]        unconditional
        losses_D = []
        for branch, netD in enumerate(self.netsD):
            netD.requires_grad_(True)
            loss_D = self._discriminator_loss(branch, batch, images_fake[branch].detach(), mu)
            loss_D.backward()
            self.optims_D[branch].step()
            self.optims_D[branch].zero_grad()  # free the gradients' memory for the generator's step
            losses_D.append(loss_D.detach())

        # L_G = sum_i L_G_i + color_coef * L_C + kl_coef * D_KL(N(mu, sigma^2) || N(0, 1)),
        # where L_G_i = -log D_i(s_i, mu) - uncond_coef * log D_i(s_i)
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
        """Return L_D_i, the sum of a conditional and an unconditional loss, as in the authors' code.

        Conditional: -log D_i(x_i, c) - log(1 - D_i(s_i, c)) - log(1 - D_i(x'_i, c)), where x'_i is a real image of
        another class. Unconditional, times uncond_coef: -log D_i(x_i) - log(1 - D_i(s_i)) - log D_i(x'_i). c is the
        mean mu of the condition. If uncond_coef is 0, both fake terms of the conditional loss are halved. Without text,
        L_D_i = -log D_i(x_i) - log(1 - D_i(s_i)).
        """
        netD, image_real = self.netsD[branch], batch['right_images'][branch].to(self.device)
        real_label, fake_label = self._labels(image_real)
        if not netD.conditional:
            return self.loss_adv(netD(image_real)[0], real_label) + self.loss_adv(netD(image_fake)[0], fake_label)
        condition = mu.detach()
        out_real, out_real_uncond = netD(image_real, condition)
        out_wrong, out_wrong_uncond = netD(batch['wrong_images'][branch].to(self.device), condition)
        out_fake, out_fake_uncond = netD(image_fake, condition)
        real = self.loss_adv(out_real, real_label)
        wrong, fake = self.loss_adv(out_wrong, fake_label), self.loss_adv(out_fake, fake_label)
        if not self.uncond_coef:
            return real + 0.5 * (wrong + fake)
        uncond = (self.loss_adv(out_real_uncond, real_label) + self.loss_adv(out_wrong_uncond, real_label)
                  + self.loss_adv(out_fake_uncond, fake_label))
        return real + wrong + fake + self.uncond_coef * uncond

    def _generator_loss(self, branch, image_fake, mu):
        """Return L_G_i = -log D_i(s_i, c) - uncond_coef * log D_i(s_i), where c is mu; without text, -log D_i(s_i)."""
        netD = self.netsD[branch].requires_grad_(False)  # D does not learn here
        real_label, _ = self._labels(image_fake)
        out_fake, *out_fake_uncond = netD(image_fake, mu)
        loss = self.loss_adv(out_fake, real_label)
        if out_fake_uncond and self.uncond_coef:
            loss = loss + self.uncond_coef * self.loss_adv(out_fake_uncond[0], real_label)
        return loss

    def _color_loss(self, images):
        """Return the color consistency L_C of neighboring branches (paper, section 4.3; the chapter's last equation).

        L_C = sum_i |mean(s_i) - mean(s_(i-1))|^2 + 5 |cov(s_i) - cov(s_(i-1))|^2, over the colors of an image's pixels,
        the mean over the batch. As in the authors' code, s_(i-1) gets no gradient, and |.|^2 is the mean of the squares
        of 3 or 9 numbers: in the paper's terms, with sums, lambda_1 is 1/3 and lambda_2 is 5/9.
        """
        loss = 0
        for small, large in zip(images, images[1:]):
            mean_small, covariance_small = color_statistics(small.detach())
            mean_large, covariance_large = color_statistics(large)
            loss = loss + (self.loss_color(mean_large, mean_small)
                           + COVARIANCE_WEIGHT * self.loss_color(covariance_large, covariance_small))
        return loss

    def _labels(self, image):
        return image.new_ones(len(image)), image.new_zeros(len(image))

    @torch.no_grad()
    def _update_average(self):
        torch._foreach_lerp_(self.averaged, list(self.netG.parameters()), 1 - AVERAGE_DECAY)

    @property
    def average_G(self):
        """Return the generator's state dict with the running averages in place of its parameters."""
        names = [name for name, _ in self.netG.named_parameters()]
        return {**self.netG.state_dict(), **dict(zip(names, self.averaged))}

    def train(self, epochs, log_interval=100, out_dir='', verbose=True):
        """Train until `epochs` epochs are done, including those of a loaded checkpoint.

        With `out_dir`, also saves the networks in the authors' format every `snapshot_interval` steps and at the end.
        `common.training_run.TrainingRun` writes logs, samples and checkpoints, and handles interruptions.
        """
        if self.optim_G is None:
            raise UserError('call create_optim(lr) before train()')
        for net in (self.netG, *self.netsD):
            net.train()
        with TrainingRun(self, epochs, log_interval, out_dir, verbose, self.sample_grid) as run:
            for _ in run.epochs():
                for batch in run.batches():
                    losses = self.train_step(batch)
                    run.log(losses)
                    run.write('the snapshot', self.save_snapshot, out_dir, every=self.snapshot_interval)
            if out_dir and self.progress['step'] % self.snapshot_interval:
                self.save_snapshot(out_dir)

    def sample_grid(self):
        """Return a PIL image with one row per sample item, the same every time: all branches' images and the real one.
        """
        if not hasattr(self, 'sample_batch'):
            self.sample_batch = fixed_batch(self.data_loader.dataset, SAMPLES)
        real = self.sample_batch['right_images'][-1]
        fake = self.generate(self.sample_batch.get('right_embed'), count=len(real))
        captions = self.sample_batch['txt'] if self.netG.conditional else ()
        return generated_beside_real(fake, real, min(SAMPLE_SIZE, real.shape[-1]), captions)

    def generate(self, embed=None, seed=0, truncation=None, count=None):
        """Generate images with the running average of the generator's parameters.

        `embed` holds sentence embeddings [B, text_dim]; a generator without text generates `count` images instead.
        `seed` sets the noise and the conditions, and `truncation` limits the noise (see `common.sampling.truncate`).
        Returns a list, small to large, of images [B, 3, S, S] in [-1, 1].
        """
        embed = torch.as_tensor(embed).to(self.device) if self.netG.conditional else None
        with reproducible(self.netG, self.device, seed):
            noise = torch.randn((count if embed is None else len(embed), self.netG.z_dim), device=self.device)
            noise = truncate(noise, truncation)
            images, _, _ = torch.func.functional_call(self.netG, self.average_G, (noise, embed))
        return images

    def eval(self, batch_size=None):
        """Generate images for the first `batch_size` items of the data loader's first batch (default: all of it).

        Returns (list of images, as from `generate`, list of captions or None).
        """
        batch = next(iter(self.data_loader))
        size = min(batch_size or len(batch['right_images'][0]), len(batch['right_images'][0]))
        if not self.netG.conditional:
            return self.generate(count=size), None
        return self.generate(batch['right_embed'][:size]), batch['txt'][:size]

    def save_to(self, path='', name=None, verbose=True):
        """Save networks, running average, optimizers and progress to `path/NAME.pt` in one atomic write.

        Returns the file.
        """
        names = [name for name, _ in self.netG.named_parameters()]
        return checkpoint.save_model(self, self._parts(), path, name, verbose,
                                     average_G=dict(zip(names, self.averaged)))

    def save_snapshot(self, run_dir):
        """Save Model/netG_COUNT.pth, where COUNT is the number of steps, and Model/netD0.pth, ... in `run_dir`.

        As the authors' code expects, these are state dicts whose keys start with `module.`; netG holds the averages.
        """
        file = self._snapshot_file(run_dir)
        files = {os.path.join(os.path.dirname(file), f'netD{i}.pth'): netD.state_dict()
                 for i, netD in enumerate(self.netsD)}
        for path, state_dict in {file: self.average_G, **files}.items():
            weights = {f'module.{key}': value.detach().cpu() for key, value in state_dict.items()}
            checkpoint.save(path, weights, old_format=True)

    def _snapshot_file(self, run_dir):
        return os.path.join(run_dir, 'Model', f'netG_{self.progress["step"]}.pth')

    def load_from(self, path='', name=None, verbose=True):
        """Load a checkpoint: what `save_to` wrote, or another format that `checkpoints.read` knows.

        `path` is the file or its folder. The checkpoint may have fewer branches: the others keep their weights. If
        `create_optim` has been called, the states of the optimizers and the progress are loaded, too. Raises UserError
        if the file is missing, damaged, unsafe to load, or belongs to another network; the model then stays as it was.
        """
        file, contents, files_D = checkpoints.read(path, name or self.name)
        contents = checkpoints.grow(contents, file, self.netG, self.netsD, self.optim_G is not None)
        averaged = checkpoints.average_of(contents, file, self.netG)
        checkpoint.load_model(self, self._parts(), contents, file, files_D)
        self.averaged = averaged
        if verbose:
            print(f'loaded {file}')

    def _parts(self):
        return {'netG': self.netG, 'netsD': self.netsD, 'optim_G': self.optim_G, 'optims_D': self.optims_D}


def load_generator(path, name, device='cpu'):
    """Load a generator of any width. Returns (Model that only generates, file that was read, number of steps).

    `path` and errors are as in `Model.load_from`.
    """
    file, contents, _ = checkpoints.read(path, name, mapped=True)
    netG = checkpoints.build_generator(contents, file)
    model = Model(name, device, None, netG, [])
    averaged = checkpoints.average_of(contents, file, netG)
    checkpoint.load_model(model, {'netG': netG}, contents, file)
    model.averaged = averaged
    return model, file, checkpoint.count_in(contents, file, 'step')
