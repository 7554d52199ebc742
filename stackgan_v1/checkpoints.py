"""The forms in which the networks of StackGAN are stored: ours, and the authors' netG_epoch_N.pth."""
import os
import re

from common import checkpoint
from common.errors import UserError
from stackgan_v1.gan import Stage1Generator, Stage2Generator

LAST_DISCRIMINATOR = 'netD_epoch_last'
SNAPSHOTS = 'netG_*[0-9].pth', 'Model/netG_*[0-9].pth'


def find(path, name):
    """Return the checkpoint file that `path` names: itself, NAME.pt in the folder, or the latest snapshot there."""
    return checkpoint.find(path, name, SNAPSHOTS)


def read(path, name, mapped=False):
    """Return (the file that was read, its contents as `Model.save_to` writes them, the file of the discriminator).

    `path` is the file, or a folder with NAME.pt, or one with netG_epoch_N.pth in it or in its Model/ (of several the
    highest N). Beside the authors' generator, netD_epoch_last.pth is read where it is there, but not with `mapped`,
    which is for generating alone. Raises UserError where a file is missing, damaged or refused.
    """
    file = find(path, name)
    contents = checkpoint.load(file, mapped)
    if 'netD' in contents:
        return file, contents, {}
    beside = os.path.join(os.path.dirname(file), f'{LAST_DISCRIMINATOR}.pth')
    if mapped or not os.path.isfile(beside):
        return file, {'netG': contents}, {}
    return file, {'netG': contents, 'netD': checkpoint.load(beside)}, {'netD': [beside]}


def generator_of(contents, file, stage=None):
    """Build the generator, with its first weights, that the weights of a checkpoint fit into.

    With `stage` (1 or 2), a generator of the other one is an error. Raises UserError where there is none.
    """
    weights = checkpoint.without_module(contents.get('netG'), file)
    netG = checkpoint.build(lambda: _with_shapes_of(weights, file), weights, file)
    is_of = 2 if isinstance(netG, Stage2Generator) else 1
    if stage not in (None, is_of):
        raise UserError(f'{file}: holds a Stage-{"I" * is_of} generator, but Stage-{"I" * stage} is asked for here')
    return netG


def _with_shapes_of(weights, file):
    try:
        condition_dim, text_dim = len(weights['ca_net.fc.weight']) // 2, weights['ca_net.fc.weight'].shape[1]
        if 'encoder.0.weight' not in weights:
            width, size_in = weights['fc.0.weight'].shape
            return Stage1Generator(width // (8 * 4 * 4), size_in - condition_dim, text_dim, condition_dim)
        stage1 = {key.removeprefix('STAGE1_G.'): value for key, value in weights.items() if key.startswith('STAGE1_G.')}
        residuals = sum(re.fullmatch(r'residual\.\d+\.block\.0\.weight', key) is not None for key in weights)
        return Stage2Generator(_with_shapes_of(stage1, file), len(weights['encoder.0.weight']), condition_dim, text_dim,
                               residuals)
    except (KeyError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise UserError(f'{file}: holds no generator of StackGAN (no weights of a Stage-I or Stage-II)') from error
