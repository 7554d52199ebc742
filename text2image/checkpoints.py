"""Read checkpoints of text2image: our own format, and those of the chapter's scripts."""
import os

import torch

from common import checkpoint
from data import layout


def find(path, name):
    """Return the checkpoint file for `path`: a file itself, or NAME.pt or the chapter's NAME_G.pt in a folder."""
    return checkpoint.find(path, name, [f'{name}_G.pt'])


def read(path, name, mapped=False):
    """Return (file that was read, contents): a dict with the state dicts `netG` and `netD`, or one of them.

    `path` is a file or a folder, as in `find`. Our checkpoints also hold optimizers, progress and notes; those in
    `pretrained/` have no `netD`. With the chapter's NAME_G.pt, the NAME_D.pt beside it is read, too; any other plain
    state dict is that of one network. `mapped` is as in `checkpoint.load`. Raises UserError if a file is missing,
    damaged or unsafe to load.
    """
    file = find(path, name)
    contents = checkpoint.load(file, mapped)
    if 'netG' in contents and ('netD' in contents or checkpoint.is_network_alone(contents)):
        return file, contents
    beside = f'{file.removesuffix("_G.pt")}_D.pt'
    if file.endswith('_G.pt') and os.path.isfile(beside):
        return file, {'netG': contents, 'netD': checkpoint.load(beside, mapped)}
    is_discriminator = any('output.0.weight' in str(key) for key in contents)
    return file, {'netD' if is_discriminator else 'netG': contents}


def embed_dim_of(weights, file):
    """Return the width of the embeddings that a generator with these weights reads.

    If the weights do not show a possible width, return the chapter's; loading such weights fails later.
    """
    first = checkpoint.without_module(weights, file).get('text_embedding.0.weight')
    is_possible = torch.is_tensor(first) and first.dim() == 2 and 0 < first.shape[1] <= layout.WIDEST
    return first.shape[1] if is_possible else layout.EMBED_DIM
