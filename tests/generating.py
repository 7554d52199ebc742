"""Train a tiny run of each of the three GANs, to generate images with."""
import os

import torch

from stackgan_v1 import main as stackgan_v1
from stackgan_v2 import main as stackgan_v2
from tests import tiny
from tests.commands import DATA, Caller, newest
from text2image import main as text2image

TRAIN = ['--train', *DATA, '--epochs', '1', '--batch_size', '4', '--out_dir', 'out']
NARROW = {text2image: ['--average', '0.5'],
          stackgan_v1: ['--gf_dim', '8', '--df_dim', '2', '--condition_dim', '6', '--workers', '0'],
          stackgan_v2: ['--branches', '2', '--gf_dim', '4', '--df_dim', '4', '--z_dim', '5', '--workers', '0']}


def trained(section, folder, monkeypatch, capsys):
    """Return a `Caller` of the section's main.py in a folder with data, an encoder and a run."""
    tiny.with_encoder(folder, {'train': {'001.Auk': 2, '002.Jay': 2}})
    call = Caller(section, folder, monkeypatch, capsys)
    call(*TRAIN, *NARROW[section])
    make_vivid(newest(folder / 'out', 'tiny') / f'{os.path.basename(section.HERE)}.pt')
    return call


def make_vivid(file, factor=10):
    """Enlarge a generator's weights, so that its images are not all gray as after one epoch."""
    contents = torch.load(file, weights_only=True)
    for name in {'netG', 'average_G'} & set(contents):
        contents[name] = {key: value * factor if value.dim() == 4 else value for key, value in contents[name].items()}
    torch.save(contents, file)
