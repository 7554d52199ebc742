"""How the chapter's scripts train, for `train_speed.py` to compare with: the same numbers, with more work.

Items are made one by one in worker processes: each opens its HDF5 objects and decodes its own and a wrong picture.
Networks compute in float32 in PyTorch's first memory order, layer by layer; Adam is not fused, the C library gives
memory back, and gradients are computed that nobody uses.
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
    """'cpu' or 'cuda' as a plain script has it, but that GPUs, too, multiply float32 as float32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device(kind)


def loader(dataset, batch_size):
    warnings.filterwarnings('ignore', 'This DataLoader will create')  # that it has more workers than there are cores
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=WORKERS, drop_last=True)


class CaptionItems(Dataset):
    """The items of text2image, one for each caption, read from the HDF5 file each time."""

    def __init__(self, path):
        self.path, self.split = path, None
        with h5py.File(path) as file:
            self.keys = list(file['train'])

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, index):
        right = self._group(self.keys[index])
        wrong = self._of_another_class(right)
        return {'right_images': squashed(right), 'right_embed': right['embeddings'][()],
                'wrong_images': squashed(wrong), 'inter_embed': self._group(one_of(self.keys))['embeddings'][()],
                'txt': right['txt'].asstr()[()]}

    def _group(self, key):
        self.split = self.split or h5py.File(self.path)['train']  # a worker opens the file once
        return self.split[key]

    def _of_another_class(self, right):
        wrong = self._group(one_of(self.keys))
        while wrong['class'][()] == right['class'][()]:
            wrong = self._group(one_of(self.keys))
        return wrong


class PhotographItems(CaptionItems):
    """The items of the StackGANs, one for each photograph: with several `sizes` those of StackGAN++, with one those of
    StackGAN, whose wrong pairs are made of the batch.
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
        right = self._group(one_of(self.keys_of[self.names[index]]))
        item = {'right_embed': right['embeddings'][()], 'txt': right['txt'].asstr()[()]}
        if len(self.sizes) == 1:
            return {'right_images': self._views(right)[0], **item}
        return {'right_images': self._views(right), 'wrong_images': self._views(self._of_another_class(right)), **item}

    def _views(self, group):
        """Cropped around the bird, resized, cut and flipped as the authors do, and reduced to the smaller sizes."""
        picture = decoded(group)
        bird = picture.crop(crop_box(picture.size, group['bbox'][()] if 'bbox' in group else None))
        framed = frame(bird, self.sizes[-1])
        largest = Image.fromarray(crop(np.asarray(framed), self.sizes[-1], *torch.rand(DRAWS).tolist()))
        return [to_floats(largest.resize((size, size), Image.BILINEAR)) for size in self.sizes]


def one_of(keys):
    return keys[int(torch.randint(len(keys), ()))]


def decoded(group):
    return Image.open(io.BytesIO(bytes(np.array(group['img'])))).convert('RGB')


def squashed(group):
    return to_floats(decoded(group).resize((64, 64)))


def to_floats(picture):
    return (np.array(picture, np.float32).transpose(2, 0, 1) - 127.5) / 127.5


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
    for netD in model.netsD if hasattr(model, 'netsD') else [model.netD]:
        netD.zero_grad()
    for value in model.train_step(batch).values():
        for loss in value if isinstance(value, list) else [value]:
            loss.item()


def slow_down(model, nets):
    """Let a new model of ours compute as the scripts' do."""
    for net in nets:
        net.requires_grad_ = lambda flag, net=net: net  # the generator's loss also goes to the discriminators' weights
    for value in vars(model).values():
        for optimizer in value if isinstance(value, list) else [value]:
            if isinstance(optimizer, torch.optim.Optimizer):
                for group in optimizer.param_groups:
                    group['fused'] = None
