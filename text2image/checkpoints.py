"""The forms in which the two networks of text2image are stored: ours, and those of the chapter's own scripts."""
import os

from common import checkpoint


def find(path, name):
    """Return the checkpoint file that `path` names: itself, NAME.pt in the folder, or the chapter's NAME_G.pt."""
    return checkpoint.find(path, name, [f'{name}_G.pt'])


def read(path, name):
    """Return (the file that was read, its contents): a dict with the state dicts `netG` and `netD`, or one of them.

    `path` is the file, or a folder as in `find`. A checkpoint of ours also holds optimizers, progress and notes; beside
    the chapter's NAME_G.pt, its NAME_D.pt is read, too; another plain state dict is of one of the two networks. Raises
    UserError where a file is missing, damaged or refused.
    """
    file = find(path, name)
    contents = checkpoint.load(file)
    if contents.keys() >= {'netG', 'netD'}:
        return file, contents
    beside = f'{file.removesuffix("_G.pt")}_D.pt'
    if file.endswith('_G.pt') and os.path.isfile(beside):
        return file, {'netG': contents, 'netD': checkpoint.load(beside)}
    is_discriminator = any('output.0.weight' in str(key) for key in contents)
    return file, {'netD' if is_discriminator else 'netG': contents}
