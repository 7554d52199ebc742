"""The forms in which the two networks of text2image are stored: ours, and those of the chapter's own scripts."""
import os

from common import checkpoint


def read(path, name):
    """Return (the file that was read, its contents): a dict with the state dicts `netG` and `netD`, or one of them.

    `path` is a checkpoint, or a folder with NAME.pt in it, or with the two files of the chapter's own `save_to`,
    NAME_G.pt and NAME_D.pt. A checkpoint of ours also holds optimizers, progress and notes; a plain state dict is of
    one of the two networks. Raises UserError where the file is missing, damaged or refused.
    """
    file = checkpoint.newest(os.path.join(path, f'{name}.pt')) if os.path.isdir(path or '.') else path
    pair = {net: f'{file.removesuffix(".pt")}_{net[-1]}.pt' for net in ('netG', 'netD')}
    if os.path.isfile(pair['netG']) and not os.path.isfile(file):
        return file, {net: checkpoint.load(one) for net, one in pair.items()}
    contents = checkpoint.load(file)
    if contents.keys() >= pair.keys():
        return file, contents
    is_discriminator = any('output.0.weight' in str(key) for key in contents)
    return file, {'netD' if is_discriminator else 'netG': contents}
