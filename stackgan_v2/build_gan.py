"""Training and evaluation of StackGAN++ (chapter: training StackGAN++; Zhang et al., TPAMI 2018)."""
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
from stackgan_v2.gan import BASE_SIZE, Discriminator, Generator

AVERAGE_DECAY = 0.999     # of the running average of the generator's parameters, every step
COVARIANCE_WEIGHT = 5     # of colour covariances against colour means (paper, equation 12)
SNAPSHOT_INTERVAL = 2000  # steps between two generators in Model/
SAMPLES = 8               # rows of a sample grid
SAMPLE_SIZE = 256         # pixels of its largest pictures


def init_weights(module):
    """Orthogonal convolutions and linear maps, batch-norm scales from N(1, 0.02), biases of both 0."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.orthogonal_(module.weight)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def make_networks(branches=3, gf_dim=64, df_dim=64, z_dim=100, text_dim=1024, embedding_dim=128, residuals=2,
                  conditional=True, device='cpu'):
    """A new generator and its discriminators, a list, small to large, on `device` and with their first weights."""
    netG = Generator(branches, gf_dim, z_dim, text_dim, embedding_dim, residuals, conditional)
    netsD = [Discriminator(BASE_SIZE << branch, df_dim, embedding_dim, conditional) for branch in range(branches)]
    for net in (netG, *netsD):
        net.to(device).apply(init_weights)
    return netG, netsD


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
        self.snapshot_interval = SNAPSHOT_INTERVAL
        self.progress = new_progress()
        self.options, self.data, self.keep = {}, {}, checkpoint.KEEP

    def create_optim(self, lr, alpha=0.5, beta=0.999):
        """Adam for every network, with betas (`alpha`, `beta`)."""
        self.optim_G, *self.optims_D = [torch.optim.Adam(net.parameters(), lr=lr, betas=(alpha, beta), fused=True)
                                        for net in (self.netG, *self.netsD)]

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
            loss_D = self._discriminator_loss(branch, batch, images_fake[branch].detach(), mu)
            loss_D.backward()
            self.optims_D[branch].step()
            self.optims_D[branch].zero_grad()  # here, so that their memory is free for the generator's step
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

    def train(self, epochs, log_interval=100, out_dir='', verbose=True):
        """Train until `epochs` epochs are done, those of a loaded checkpoint included. See `common.loop.train_loop`.

        With `out_dir`, also writes the networks in the authors' form every `snapshot_interval` steps and at the end.
        """
        if self.optim_G is None:
            raise UserError('call create_optim(lr) before train()')
        for net in (self.netG, *self.netsD):
            net.train()

        def snapshot():
            if out_dir and self.progress['step'] % self.snapshot_interval == 0:
                self.save_snapshot(out_dir)

        train_loop(self, epochs, log_interval, out_dir, verbose, after_step=snapshot,
                   sample=self._sample_grid if hasattr(self.data_loader, 'dataset') else None)
        if out_dir and not os.path.isfile(self._snapshot_file(out_dir)):
            self.save_snapshot(out_dir)

    def _sample_grid(self):
        """A row for each of some items, always the same: every branch's picture, small to large, and a real one."""
        if not hasattr(self, 'sample_batch'):
            self.sample_batch = same_items(self.data_loader.dataset, SAMPLES)
        real = self.sample_batch['right_images'][-1]
        fake = self.generate(self.sample_batch.get('right_embed'), count=len(real))
        return side_by_side([*fake, real], min(SAMPLE_SIZE, real.shape[-1]))

    def generate(self, embed=None, seed=0, count=None):
        """Images, a list small to large of [B, 3, S, S] in [-1, 1], drawn with the running average.

        For sentence embeddings [B, text_dim], or, from a generator without text, `count` of them. The same for the
        same `seed`, which draws noise and conditions.
        """
        embed = torch.as_tensor(embed).to(self.device) if self.netG.conditional else None
        with reproducible(self.netG, self.device, seed):
            noise = torch.randn((count if embed is None else len(embed), self.netG.z_dim), device=self.device)
            images, _, _ = torch.func.functional_call(self.netG, self.average_G, (noise, embed))
        return images

    def eval(self, batch_size=None):
        """Draw for the first `batch_size` items of the data loader (default: its first batch).

        Returns (generated images, a list small to large of [B, 3, S, S] in [-1, 1], the captions or None).
        """
        batch = next(iter(self.data_loader))
        size = min(batch_size or len(batch['right_images'][0]), len(batch['right_images'][0]))
        if not self.netG.conditional:
            return self.generate(count=size), None
        return self.generate(batch['right_embed'][:size]), batch['txt'][:size]

    def save_to(self, path='', name=None, verbose=True):
        """Write networks, running average, optimisers, progress and options to `path/NAME.pt`, whole or not at all.

        Returns the file.
        """
        file = os.path.join(path, f'{name or self.name}.pt')
        names = [name for name, _ in self.netG.named_parameters()]
        contents = {'netG': self.netG.state_dict(), 'netsD': [netD.state_dict() for netD in self.netsD],
                    'average_G': dict(zip(names, self.averaged)), 'progress': self.progress, 'options': self.options,
                    'data': self.data}
        if self.optim_G is not None:
            contents |= {'optim_G': self.optim_G.state_dict(),
                         'optims_D': [optimiser.state_dict() for optimiser in self.optims_D]}
        checkpoint.save(file, contents, keep=self.keep)
        if verbose:
            print(f'saved {file}')
        return file

    def save_snapshot(self, run_dir):
        """Write `run_dir/Model/netG_COUNT.pth`, COUNT steps, and netD0.pth, ... beside it, so that the authors' code
        loads them: plain state dicts, every key behind `module.`, the generator's parameters averaged.
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
        """Read what `save_to` wrote, or the authors' netG_COUNT.pth, with netD0.pth, ... where those are beside it.

        `path` is the file, or a folder with NAME.pt, or one with netG_COUNT.pth in it or in its Model/ (of several the
        highest COUNT). In place of a NAME.pt there that is damaged, what was kept from before it is read, which is
        said. With optimisers already made (`create_optim`), their states and the progress are read too. Raises
        UserError where the file is missing, damaged, refused or of another network; the model is then as it was.
        """
        file = checkpoint.find(path, name or self.name)
        self._take(checkpoint.load(file), file)
        if verbose:
            print(f'loaded {file}')

    def _take(self, contents, file):
        """Take over what a checkpoint holds. The authors' is of averaged weights: they count as live ones too.

        Of one with fewer branches, those: the tree grows, and the others start with the weights that they have.
        """
        live = checkpoint.without_module(contents.get('netG', contents), file)
        branches, is_training = shape_of(live, file)['branches'], self.optim_G is not None and 'optim_G' in contents
        untrained = {}
        if branches < len(self.netsD):
            if is_training:
                raise UserError(f'{file}: has {branches} of {len(self.netsD)} branches; a run cannot grow, but a new '
                                'one can start from it, with --checkpoint')
            print(f'{file}: the tree grows from {branches} to {len(self.netsD)} branches; the new ones are untrained')
            untrained = {name: value for name, value in self.netG.state_dict().items() if name not in live}
        buffers = {name: live[name] for name, _ in self.netG.named_buffers() if name in live}
        average = checkpoint.without_module(contents.get('average_G', live), file)
        average = checkpoint.checked_weights(self.netG, {**untrained, **buffers, **average}, file)
        networks, optimizers = [(self.netG, {**untrained, **live}, file)], []
        if 'netG' not in contents:
            networks += self._discriminators_beside(file, branches)
        elif self.netsD:
            networks += [(netD, weights, file)
                         for netD, weights in zip(self.netsD, _listed(contents, 'netsD', branches, file))]
        if is_training:
            optimizers = [(self.optim_G, contents['optim_G'], f'{file}: its optim_G')]
            optimizers += [(optimizer, state, f'{file}: one of its optims_D') for optimizer, state in
                           zip(self.optims_D, _listed(contents, 'optims_D', branches, file))]
        checkpoint.take_over(self, contents, file, networks, optimizers)
        self.averaged = [torch.empty_like(parameter).copy_(average[name])
                         for name, parameter in self.netG.named_parameters()]

    def _discriminators_beside(self, file, branches):
        """What `checkpoint.load_all` takes of the authors' netD0.pth, ..., where they are all beside `file`."""
        files = [os.path.join(os.path.dirname(file), f'netD{i}.pth') for i in range(branches)]
        if not all(map(os.path.isfile, files)):
            return []
        return [(netD, checkpoint.load(path), path) for netD, path in zip(self.netsD, files)]


def _listed(contents, name, count, file):
    """The list `name` of a checkpoint. Raises UserError where it has not one entry for each of `count` branches."""
    if not isinstance(contents.get(name), list) or len(contents[name]) != count:
        raise UserError(f'{file}: its {name} is no list of {count} state dicts, one for each branch')
    return contents[name]


def load_generator(path, name, device='cpu'):
    """(a Model that only draws, of the shape that the checkpoint has; the checkpoint's file; its number of steps).

    `path` and errors are as in `Model.load_from`.
    """
    file = checkpoint.find(path, name)
    contents = checkpoint.load(file, mapped=True)
    weights = contents.get('netG', contents)
    shape = shape_of(weights, file)
    netG = checkpoint.build(lambda: Generator(**shape), weights, file)
    model = Model(name, device, None, netG, [])
    model._take(contents, file)
    return model, file, checkpoint.count_in(contents, file, 'step')


def shape_of(state_dict, file):
    """The arguments of the `Generator` that has weights of these names and shapes. Raises UserError if none has."""
    weights = checkpoint.without_module(state_dict, file)
    try:
        conditional = 'ca_net.fc.weight' in weights
        embedding_dim, text_dim = weights['ca_net.fc.weight'].shape if conditional else (0, 1024)
        return {'branches': sum(re.fullmatch(r'img_net\d+\.img\.0\.weight', key) is not None for key in weights),
                'gf_dim': weights['img_net1.img.0.weight'].shape[1],
                'z_dim': weights['h_net1.fc.0.weight'].shape[1] - embedding_dim // 4,
                'text_dim': text_dim, 'embedding_dim': embedding_dim // 4, 'conditional': conditional,
                'residuals': sum(re.fullmatch(r'h_net2\.residual\.\d+\.block\.0\.weight', key) is not None
                                 for key in weights)}
    except (KeyError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f'{file}: holds no generator of StackGAN++ (no weights named img_net1.img.0.weight)') from error
