"""Train as the chapter's scripts do, for comparison in `train_speed.py`: the same numbers, with more work.

Worker processes load items one by one: each reads its HDF5 objects and decodes its own and a wrong image. Networks
compute in float32, in contiguous memory format and layer by layer; Adam is not fused, freed memory goes back to the
system, and gradients are computed that no step uses.
"""
import io
import warnings

import h5py
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data.multiscale_dataset import DRAWS, crop, crop_box, frame

WORKERS = 8


def device(kind):
    """Return the device 'cpu' or 'cuda', as a plain script does, with TF32 switched off."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device(kind)


def loader(dataset, batch_size):
    """Return a DataLoader with the chapter's settings."""
    warnings.filterwarnings('ignore', 'This DataLoader will create')  # more workers than cores
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=WORKERS, drop_last=True)


class CaptionItems(Dataset):
    """Load the items of text2image, one per caption, from the HDF5 file every time."""

    def __init__(self, path):
        self.path, self.split = path, None
        with h5py.File(path) as file:
            self.keys = list(file['train'])

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, index):
        right = self._group(self.keys[index])
        wrong = self._of_another_class(right)
        return {'right_images': load_64(right), 'right_embed': right['embeddings'][()],
                'wrong_images': load_64(wrong), 'inter_embed': self._group(sample_one(self.keys))['embeddings'][()],
                'txt': right['txt'].asstr()[()]}

    def _group(self, key):
        self.split = self.split or h5py.File(self.path)['train']  # each worker opens the file once
        return self.split[key]

    def _of_another_class(self, right):
        wrong = self._group(sample_one(self.keys))
        while wrong['class'][()] == right['class'][()]:
            wrong = self._group(sample_one(self.keys))
        return wrong


class PhotographItems(CaptionItems):
    """Load the items of the StackGANs, one per photograph, from the HDF5 file every time.

    With several `sizes`, these are the items of StackGAN++; with one, those of StackGAN, which has no wrong images.
    """

    def __init__(self, path, sizes):
        super().__init__(path)
        self.sizes, self.keys_of = sizes, {}
        for key in self.keys:
            self.keys_of.setdefault(key.rpartition('_')[0], []).append(key)
        self.names = list(self.keys_of)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        right = self._group(sample_one(self.keys_of[self.names[index]]))
        item = {'right_embed': right['embeddings'][()], 'txt': right['txt'].asstr()[()]}
        if len(self.sizes) == 1:
            return {'right_images': self._views(right)[0], **item}
        return {'right_images': self._views(right), 'wrong_images': self._views(self._of_another_class(right)), **item}

    def _views(self, group):
        """Return one random crop of the photograph at all sizes, as the authors' code prepares it."""
        image = decode(group)
        bird = image.crop(crop_box(image.size, group['bbox'][()] if 'bbox' in group else None))
        framed = frame(bird, self.sizes[-1])
        largest = Image.fromarray(crop(np.asarray(framed), self.sizes[-1], *torch.rand(DRAWS).tolist()))
        return [to_floats(largest.resize((size, size), Image.BILINEAR)) for size in self.sizes]


def sample_one(keys):
    """Return a random key, sampled with PyTorch's generator."""
    return keys[int(torch.randint(len(keys), ()))]


def decode(group):
    """Return the photograph of an HDF5 group as a PIL image."""
    return Image.open(io.BytesIO(bytes(np.array(group['img'])))).convert('RGB')


def load_64(group):
    """Return the photograph of an HDF5 group, resized to 64 x 64, as float32 [3, 64, 64] in [-1, 1]."""
    return to_floats(decode(group).resize((64, 64)))


def to_floats(image):
    """Return a PIL image as float32 [3, H, W] in [-1, 1]."""
    return (np.array(image, np.float32).transpose(2, 0, 1) - 127.5) / 127.5


def text2image_step(model, batch):
    """Train for one step as the chapter's loop does, with gradients of both losses in both networks."""
    image, embed = batch['right_images'].to(model.device), batch['right_embed'].to(model.device)
    real, fake = torch.ones(len(image), device=model.device), torch.zeros(len(image), device=model.device)

    model.optim_D.zero_grad()
    loss_D = model.loss_adv(model.netD(image, embed)[0], real)
    loss_D = loss_D + model.loss_adv(model.netD(model.netG(noise_for(image), embed), embed)[0], fake)
    loss_D.backward()
    model.optim_D.step()

    model.optim_G.zero_grad()
    image_fake = model.netG(noise_for(image), embed)
    out_fake, act_fake = model.netD(image_fake, embed)
    _, act_real = model.netD(image, embed)
    loss_G = (model.loss_adv(out_fake, real)
              + model.l1_coef * model.loss_l1(act_fake.mean(0), act_real.mean(0).detach())
              + model.l2_coef * model.loss_l2(image_fake, image))
    loss_G.backward()
    model.optim_G.step()


def noise_for(image):
    """Return noise [B, 100, 1, 1] for a batch of images."""
    return torch.randn((len(image), 100, 1, 1), device=image.device)


def stackgan_step(model, batch):
    """Train for one step as the authors' loops do.

    Unlike ours, they compute gradients of the discriminators in the generator's step, and read the losses every step.
    """
    for netD in model.netsD if hasattr(model, 'netsD') else [model.netD]:
        netD.zero_grad()
    for value in model.train_step(batch).values():
        for loss in value if isinstance(value, list) else [value]:
            loss.item()


def slow_down(model, nets):
    """Undo the savings of our Model: frozen networks and fused optimizers."""
    for net in nets:
        net.requires_grad_ = lambda flag, net=net: net  # nothing is frozen
    for value in vars(model).values():
        for optimizer in value if isinstance(value, list) else [value]:
            if isinstance(optimizer, torch.optim.Optimizer):
                for group in optimizer.param_groups:
                    group['fused'] = None
