"""Read checkpoints of StackGAN++: our own format, and the authors' netG_COUNT.pth, netD0.pth, ..."""
import os
import re

import torch

from common import checkpoint
from common.errors import UserError
from stackgan_v2.gan import Generator

SNAPSHOTS = 'netG_*[0-9].pth', 'Model/netG_*[0-9].pth'


def find(path, name):
    """Return the checkpoint file for `path`: a file itself, or NAME.pt or the latest snapshot in a folder."""
    return checkpoint.find(path, name, SNAPSHOTS)


def read(path, name, mapped=False):
    """Return (file that was read, contents in the layout of `Model.save_to`, {'netsD': [files of discriminators]}).

    `path` is a file, or a folder that holds NAME.pt, netG_COUNT.pth or Model/netG_COUNT.pth (the highest COUNT wins).
    The authors' netG is an average already, so it becomes `average_G`, too; their `netsD` are read if netD0.pth, ...
    are beside it, and the last dict then names these files. With `mapped`, for generating only, they are not read.
    Raises UserError if a file is missing, damaged or unsafe to load.
    """
    file = find(path, name)
    contents = checkpoint.load(file, mapped)
    is_ours = 'netG' in contents
    if not is_ours:
        contents = {'netG': contents, 'average_G': contents}
    contents = contents | {key: checkpoint.without_module(contents[key], file) for key in ('netG', 'average_G')
                           if key in contents}
    branches = shape_of(contents['netG'], file)['branches']
    is_training = is_ours and not checkpoint.is_network_alone(contents)
    if is_training and (not isinstance(contents.get('netsD'), list) or len(contents['netsD']) != branches):
        raise UserError(f'{file}: its netsD is not a list of {branches} state dicts, one per branch')
    beside = [os.path.join(os.path.dirname(file), f'netD{i}.pth') for i in range(branches)]
    if is_ours or mapped or not all(map(os.path.isfile, beside)):
        return file, contents, {}
    return file, contents | {'netsD': [checkpoint.load(one) for one in beside]}, {'netsD': beside}


def shape_of(weights, file):
    """Return the arguments for a `Generator` whose weights have these names and shapes.

    Raises UserError if the weights are not those of a generator.
    """
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


def build_generator(contents, file):
    """Build a `Generator`, still untrained, of the shape that the weights of a checkpoint have."""
    shape = shape_of(contents['netG'], file)
    return checkpoint.build(lambda: Generator(**shape), contents['netG'], file)


def grow(contents, file, netG, netsD, is_training):
    """Return the contents of a checkpoint, filled up to the branches of `netG` and `netsD`.

    Branches that the checkpoint lacks get the weights that `netG` and `netsD` have. Raises UserError if the checkpoint
    has more branches, or if `is_training` and it holds optimizer states, which cannot be filled up.
    """
    branches = shape_of(contents['netG'], file)['branches']
    if not netsD or branches == len(netsD):
        return contents
    if branches > len(netsD):
        raise UserError(f'{file}: has {branches} branches, more than the {len(netsD)} asked for; '
                        f'give --branches {branches}')
    if is_training and 'optim_G' in contents:
        raise UserError(f'{file}: has {branches} of {len(netsD)} branches, and a resumed run cannot add branches; '
                        'start a new run from it with --checkpoint')
    print(f'{file}: the tree grows from {branches} to {len(netsD)} branches; the new ones are untrained')
    untrained = {name: value for name, value in netG.state_dict().items() if name not in contents['netG']}
    grown = contents | {name: untrained | contents[name] for name in ('netG', 'average_G') if name in contents}
    if 'netsD' in contents:
        grown['netsD'] = contents['netsD'] + [netD.state_dict() for netD in netsD[branches:]]
    return grown


def average_of(contents, file, netG):
    """Return the averaged parameters of a checkpoint, a list of tensors in the order of `netG.parameters()`.

    If the checkpoint has no averages, these are its weights.
    """
    weights = contents['netG']
    buffers = {name: weights[name] for name, _ in netG.named_buffers() if name in weights}
    average = checkpoint.checked_weights(netG, buffers | contents.get('average_G', weights), file)
    return [torch.empty_like(parameter).copy_(average[name]) for name, parameter in netG.named_parameters()]
