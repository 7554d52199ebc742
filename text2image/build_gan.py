"""Train and evaluate the text-to-image GAN (section "GAN architecture and training")."""
import torch
from torch import nn

from common import checkpoint
from common.average import RunningAverage
from common.errors import UserError
from common.pictures import real_over_generated
from common.progress import new_progress
from common.sampling import fixed_batch, truncate
from common.training_run import TrainingRun
from text2image import checkpoints
from text2image.gan import Discriminator, Generator

SAMPLES = 32  # pairs of images in a sample grid


def _weights_init(m):
    """Initialize convolutions from N(0, 0.02^2) and the scales of batch norms from N(1, 0.02^2).

    Linear layers keep PyTorch's default initialization.
    """
    if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(m.weight, 1.0, 0.02)


class Model:
    """Train the generator and the discriminator, and generate images.

    `data_loader` yields batches as in `data/txt2image_dataset.py`. `l1_coef` is the weight of feature matching,
    `l2_coef` that of the pixel loss. Two losses of Reed et al. (ICML 2016) that the chapter leaves out have the weights
    `cls_coef` (GAN-CLS, section 4.2) and `int_coef` (GAN-INT, section 4.3), both 0 by default. `embed_dim` is the width
    of the sentence embeddings.
    """

    lr_ratio = 1  # the discriminator's learning rate, divided by the generator's

    def __init__(self, name, device, data_loader, channels, l1_coef, l2_coef, cls_coef=0.0, int_coef=0.0,
                 embed_dim=1024):
        self.name, self.device, self.data_loader, self.channels = name, torch.device(device), data_loader, channels
        self.netG = Generator(self.channels, embed_dim=embed_dim).apply(_weights_init).to(self.device)
        self.netD = Discriminator(self.channels, embed_dim=embed_dim).apply(_weights_init).to(self.device)
        self.loss_adv = nn.BCELoss()
        self.loss_l1 = nn.L1Loss()
        self.loss_l2 = nn.MSELoss()
        self.l1_coef, self.l2_coef, self.cls_coef, self.int_coef = l1_coef, l2_coef, cls_coef, int_coef
        self.optim_G = self.optim_D = None
        self.average_G = None  # see `keep_average`
        self.progress = new_progress()
        self.options, self.data, self.keep = {}, {}, checkpoint.KEEP

    def create_optim(self, lr, alpha=0.5, beta=0.999):
        """Create an Adam optimizer for each network, with betas (`alpha`, `beta`)."""
        self.optim_G = torch.optim.Adam(self.netG.parameters(), lr=lr, betas=(alpha, beta), fused=True)
        self.optim_D = torch.optim.Adam(self.netD.parameters(), lr=lr * self.lr_ratio, betas=(alpha, beta), fused=True)

    def keep_average(self, decay):
        """Keep a running average of the generator's weights, and generate images with it; with `decay` 0, do not.

        The chapter does not; StackGAN++ does, with a decay of 0.999 per step. Call it after `create_optim`, and after a
        checkpoint to continue from is loaded.
        """
        if decay:
            self.average_G = self.average_G or RunningAverage(self.netG)
            self.average_G.follow(self.optim_G, decay, self.progress['step'])
        else:
            self.average_G = None

    def set_lr(self, lr):
        """Set the learning rate of all optimizers, overriding that of a loaded checkpoint."""
        for optimizer, ratio in ((self.optim_G, 1), (self.optim_D, self.lr_ratio)):
            for group in optimizer.param_groups:
                group['lr'] = lr * ratio

    def train(self, epochs, log_interval=100, out_dir='', verbose=True):
        """Train until `epochs` epochs are done, including those of a loaded checkpoint.

        `common.training_run.TrainingRun` writes logs, samples and checkpoints, and handles interruptions.
        """
        if self.optim_G is None:
            raise UserError('call create_optim(lr) before train()')
        self.netG.train()
        self.netD.train()
        with TrainingRun(self, epochs, log_interval, out_dir, verbose, self.sample_grid) as run:
            for _ in run.epochs():
                for batch in run.batches():
                    losses = self.train_step(batch)
                    run.log(losses)

    def train_step(self, batch):
        """Train D for one step, then G: the body of the chapter's loop.

        In the comments, x is an image, t the embedding of its sentence and z noise; losses are means over the batch.
        Returns a dict of scalar tensors: `loss_D` and `loss_G`.
        """
        image, embed = batch['right_images'].to(self.device), batch['right_embed'].to(self.device)
        real_label = torch.ones(len(image), device=self.device)
        fake_label = torch.zeros(len(image), device=self.device)

        # Train D: d_loss = -log D(x, t) - log(1 - D(G(z, t), t))
        self.netD.requires_grad_(True)
        self.optim_D.zero_grad()
        out_real, _ = self.netD(image, embed)
        loss_d_real = self.loss_adv(out_real, real_label)

        noise = torch.randn((len(image), self.netG.latent_dim, 1, 1), device=self.device)
        with torch.no_grad():  # G does not learn here
            image_fake = self.netG(noise, embed)
        out_fake, _ = self.netD(image_fake, embed)
        loss_d_fake = self.loss_adv(out_fake, fake_label)

        d_loss = loss_d_real + loss_d_fake
        if self.cls_coef:  # GAN-CLS: d_loss -= cls_coef * log(1 - D(x', t)), where x' is an image of another class
            out_wrong, _ = self.netD(batch['wrong_images'].to(self.device), embed)
            d_loss = d_loss + self.cls_coef * self.loss_adv(out_wrong, fake_label)
        d_loss.backward()
        self.optim_D.step()

        # Train G: g_loss = -log D(G(z, t), t) + l1_coef * l1_loss + l2_coef * l2_loss
        #   l1_loss = |E f(G(z, t)) - E f(x)|, the mean over the features f of D, where E is the mean over the batch
        #   l2_loss = (G(z, t) - x)^2, the mean over all pixels
        self.netD.requires_grad_(False)  # D does not learn here, so act_real needs no detach()
        self.optim_G.zero_grad()
        noise = torch.randn((len(image), self.netG.latent_dim, 1, 1), device=self.device)
        image_fake = self.netG(noise, embed)
        out_fake, act_fake = self.netD(image_fake, embed)
        _, act_real = self.netD(image, embed)

        l1_loss = self.loss_l1(act_fake.mean(0), act_real.mean(0))
        l2_loss = self.loss_l2(image_fake, image)
        g_loss = self.loss_adv(out_fake, real_label) + self.l1_coef * l1_loss + self.l2_coef * l2_loss
        if self.int_coef:  # GAN-INT: g_loss -= int_coef * log D(G(z, t'), t'), where t' = (t + another sentence's) / 2
            between = 0.5 * (embed + batch['inter_embed'].to(self.device))
            noise = torch.randn((len(image), self.netG.latent_dim, 1, 1), device=self.device)
            out_between, _ = self.netD(self.netG(noise, between), between)
            g_loss = g_loss + self.int_coef * self.loss_adv(out_between, real_label)
        g_loss.backward()
        self.optim_G.step()
        return {'loss_D': d_loss.detach(), 'loss_G': g_loss.detach()}

    def sample_grid(self):
        """Return a PIL image with generated images below the real ones, for the same sentences and noise every time."""
        if not hasattr(self, 'sample_batch'):
            self.sample_batch = fixed_batch(self.data_loader.dataset, SAMPLES)
        fake = self.generate(self.sample_batch['right_embed'])
        return real_over_generated(self.sample_batch['right_images'], fake, self.sample_batch['txt'])

    @torch.no_grad()
    def generate(self, embed, seed=0, truncation=None):
        """Generate images [B, channels, 64, 64] in [-1, 1] for sentence embeddings [B, D].

        `seed` sets the noise, and `truncation` limits it (see `common.sampling.truncate`).
        """
        generator = torch.Generator().manual_seed(seed)
        noise = truncate(torch.randn((len(embed), self.netG.latent_dim, 1, 1), generator=generator), truncation)
        was_training = self.netG.training
        self.netG.eval()
        netG = self.average_G or self.netG
        image = netG(noise.to(self.device), torch.as_tensor(embed).to(self.device))
        self.netG.train(was_training)
        return image

    def eval(self, batch_size=None):
        """Generate images for the first `batch_size` captions of the data loader's first batch (default: all of it).

        Returns (images [B, channels, 64, 64] in [-1, 1], list of captions).
        """
        batch = next(iter(self.data_loader))
        size = min(batch_size or len(batch['txt']), len(batch['txt']))
        return self.generate(batch['right_embed'][:size]), batch['txt'][:size]

    def save_to(self, path='', name=None, verbose=True):
        """Save networks, optimizers and progress to `path/NAME.pt` in one atomic write, and return the file."""
        average = {'average_G': self.average_G.state_dict()} if self.average_G else {}
        return checkpoint.save_model(self, self._parts(), path, name, verbose, **average)

    def load_from(self, path='', name=None, verbose=True):
        """Load a checkpoint: what `save_to` wrote, or another format that `checkpoints.read` knows.

        `path` is the file or its folder. If `create_optim` has been called, the states of the optimizers and the
        progress are loaded, too. Raises UserError if the file is missing, damaged, unsafe to load, or belongs to
        another network; the model then stays as it was.
        """
        file, contents = checkpoints.read(path, name or self.name)
        self._load(self._parts(), contents, file)
        if verbose:
            print(f'loaded {file}' + ('' if 'netD' in contents else '; it has no discriminator: ours stays untrained'))

    def _load(self, parts, contents, file):
        average = None
        if 'average_G' in contents:
            average = RunningAverage(self.netG, contents['average_G'], f'{file}: its average_G')
        checkpoint.load_model(self, parts, contents, file)
        self.average_G = average

    def _parts(self):
        return {'netG': self.netG, 'netD': self.netD, 'optim_G': self.optim_G, 'optim_D': self.optim_D}


def load_generator(path, name='text2image', device='cpu', data_loader=None, channels=3):
    """Load a generator for embeddings of any width, whatever its discriminator was.

    Returns (Model that only generates, file that was read).

    `path` and errors are as in `Model.load_from`. Also raises UserError if the file holds no generator.
    """
    file, contents = checkpoints.read(path, name, mapped=True)
    if 'netG' not in contents:
        raise UserError(f'{file}: holds a discriminator, no generator; give the file of the generator')
    model = Model(name, device, data_loader, channels, l1_coef=0, l2_coef=0,
                  embed_dim=checkpoints.embed_dim_of(contents['netG'], file))
    model._load({'netG': model.netG}, contents, file)
    return model, file
