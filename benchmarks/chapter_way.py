"""How the chapter's scripts train, for `train_speed.py` to compare with: the same numbers, with more work.

Items are made one by one in worker processes: each opens its HDF5 objects and decodes its own and a wrong picture.
Networks compute in float32 in PyTorch's first memory order, Adam is not fused, and gradients are computed that nobody
uses.
"""
import io

import h5py
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

WORKERS = 8


def loader(dataset, batch_size):
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=WORKERS, drop_last=True)


class CaptionItems(Dataset):
    """The items of text2image, read from the HDF5 file each time."""

    def __init__(self, path):
        self.path, self.split = path, None
        with h5py.File(path) as file:
            self.keys = list(file['train'])

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, index):
        self.split = self.split or h5py.File(self.path)['train']  # a worker opens the file once
        right = self.split[self.keys[index]]
        wrong = self._drawn()
        while wrong['class'][()] == right['class'][()]:
            wrong = self._drawn()
        return {'right_images': decode(right), 'right_embed': right['embeddings'][()], 'wrong_images': decode(wrong),
                'inter_embed': self._drawn()['embeddings'][()], 'txt': right['txt'].asstr()[()]}

    def _drawn(self):
        return self.split[self.keys[int(torch.randint(len(self.keys), ()))]]


def decode(item):
    picture = Image.open(io.BytesIO(bytes(np.array(item['img'])))).convert('RGB').resize((64, 64))
    return (np.array(picture, np.float32).transpose(2, 0, 1) - 127.5) / 127.5


class OneByOne(Dataset):
    """The items of a data set of crops, each made by itself."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


def text2image_step(model, batch):
    """The chapter's loop: both losses go back through both networks."""
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
    return torch.randn((len(image), 100, 1, 1), device=image.device)


def stackgan_step(model, batch):
    """The authors' loops are ours, but for gradients of the discriminators in the generator's step, and for losses
    that are read in every step.
    """
    for value in model.train_step(batch).values():
        [float(loss) for loss in (value if isinstance(value, list) else [value])]


def slow_down(model, nets):
    """Let a new model of ours compute as the scripts' do."""
    for net in nets:
        net.to(memory_format=torch.contiguous_format)
        net.requires_grad_ = lambda flag, net=net: net  # the generator's loss also goes to the discriminators' weights
    for value in vars(model).values():
        for optimiser in value if isinstance(value, list) else [value]:
            if isinstance(optimiser, torch.optim.Optimizer):
                for group in optimiser.param_groups:
                    group['fused'] = None
