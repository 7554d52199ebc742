"""Read checkpoints of StackGAN: our own format, and the authors' netG_epoch_N.pth."""
import os
import re

from common import checkpoint
from common.errors import UserError
from stackgan_v1.gan import Stage1Generator, Stage2Generator

LAST_DISCRIMINATOR = 'netD_epoch_last'
SNAPSHOTS = 'netG_*[0-9].pth', 'Model/netG_*[0-9].pth'


def find(path, name):
    """Return the checkpoint file for `path`: a file itself, or NAME.pt or the latest snapshot in a folder."""
    return checkpoint.find(path, name, SNAPSHOTS)


def read(path, name, mapped=False):
    """Return (file that was read, contents in the layout of `Model.save_to`, {'netD': [file of the discriminator]}).

    `path` is a file, or a folder that holds NAME.pt, netG_epoch_N.pth or Model/netG_epoch_N.pth (the highest N wins).
    The last dict is empty unless the discriminator comes from a file of its own: netD_epoch_last.pth beside the
    authors' generator. With `mapped`, for generating only, it is not read. Raises UserError if a file is missing,
    damaged or unsafe to load.
    """
    file = find(path, name)
    contents = checkpoint.load(file, mapped)
    if 'netD' in contents or checkpoint.is_network_alone(contents):
        return file, contents, {}
    beside = os.path.join(os.path.dirname(file), f'{LAST_DISCRIMINATOR}.pth')
    if mapped or not os.path.isfile(beside):
        return file, {'netG': contents}, {}
    return file, {'netG': contents, 'netD': checkpoint.load(beside)}, {'netD': [beside]}


def build_generator(contents, file, stage=None):
    """Build a generator, still untrained, of the shape that the weights of a checkpoint have.

    Raises UserError if the contents hold no generator, or one of another stage than `stage` (1, 2 or None for any).
    """
    weights = checkpoint.without_module(contents.get('netG'), file)
    netG = checkpoint.build(lambda: _build_like(weights, file), weights, file)
    found = 2 if isinstance(netG, Stage2Generator) else 1
    if stage not in (None, found):
        raise UserError(f'{file}: holds a Stage-{"I" * found} generator, but Stage-{"I" * stage} is asked for here')
    return netG


def _build_like(weights, file):
    """Build a generator that has weights of these names and shapes."""
    try:
        condition_dim, text_dim = len(weights['ca_net.fc.weight']) // 2, weights['ca_net.fc.weight'].shape[1]
        if 'encoder.0.weight' not in weights:
            width, size_in = weights['fc.0.weight'].shape
            return Stage1Generator(width // (8 * 4 * 4), size_in - condition_dim, text_dim, condition_dim)
        stage1 = {key.removeprefix('STAGE1_G.'): value for key, value in weights.items() if key.startswith('STAGE1_G.')}
        residuals = sum(re.fullmatch(r'residual\.\d+\.block\.0\.weight', key) is not None for key in weights)
        stage1 = _build_like(stage1, file)
        if stage1.text_dim != text_dim:
            raise UserError(f'{file}: Stage-I reads embeddings of {stage1.text_dim} numbers, Stage-II of {text_dim}')
        return Stage2Generator(stage1, len(weights['encoder.0.weight']), condition_dim, text_dim, residuals)
    except (KeyError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise UserError(f'{file}: holds no generator of StackGAN (no weights of a Stage-I or Stage-II)') from error
