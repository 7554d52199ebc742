"""walkthrough.ipynb: its ten cells work one after another, with smaller numbers."""
import ast
import json
import os

import pytest
from PIL import Image

from common.flags import ROOT

pytestmark = pytest.mark.usefixtures('one_thread')

NUMBERS = 'BIRDS, ENCODER_EPOCHS, GAN_EPOCHS = 720, 40, 2'


def cells():
    """Return the code cells of the notebook."""
    with open(os.path.join(ROOT, 'walkthrough.ipynb'), encoding='utf-8') as file:
        return [cell for cell in json.load(file)['cells'] if cell['cell_type'] == 'code']


def test_the_cells_work_from_top_to_bottom(capsys):
    names, shown = {}, []
    assert NUMBERS in ''.join(cells()[0]['source']) and len(cells()) == 10
    for cell in cells():
        code = ast.parse(''.join(cell['source']).replace(NUMBERS, 'BIRDS, ENCODER_EPOCHS, GAN_EPOCHS = 100, 1, 1'))
        last = code.body.pop() if isinstance(code.body[-1], ast.Expr) else None  # what the notebook shows
        exec(compile(code, 'walkthrough.ipynb', 'exec'), names)
        if last:
            shown.append(eval(compile(ast.Expression(last.value), 'walkthrough.ipynb', 'eval'), names))
    assert sum(isinstance(image, Image.Image) for image in shown) == 4
    assert names['images'].shape == (8, 3, 64, 64) and names['images'].abs().max() <= 1
    said = capsys.readouterr().out
    assert "'right_images': (16, 3, 64, 64)" in said and 'colors exchanged' in said and 'loss_D' in said


def test_the_notebook_shows_what_its_cells_printed_and_drew():
    outputs = [output for cell in cells() for output in cell['outputs']]
    assert all(cell['outputs'] for cell in cells()[1:])
    assert all(output['output_type'] != 'error' for output in outputs)
    assert sum('image/jpeg' in output.get('data', {}) for output in outputs) == 4
    assert os.path.getsize(os.path.join(ROOT, 'walkthrough.ipynb')) < 300_000
