"""Grids and sheets of images, and imports that they must not wait for."""
import os
import subprocess
import sys

import pytest
import torch
from torchvision.utils import make_grid

from common.pictures import LINES, caption_sheet, font_and_text, fonts, grid, has_letter, to_pil, to_pixels
from common.sampling import write_images


@pytest.mark.parametrize('count, columns', [(1, 1), (2, 1), (3, 3), (5, 3), (9, 8)])
def test_grids_equal_torchvisions(count, columns):
    images = torch.rand(count, 3, 5, 7) * 2 - 1
    expected = make_grid(images, nrow=columns, padding=2, pad_value=1.0)
    if count == 1:  # torchvision draws no line around a single image
        assert torch.equal(grid(images, columns)[:, 2:-2, 2:-2], expected)
    else:
        assert torch.equal(grid(images, columns), expected)
    assert to_pil(grid(to_pixels(images), columns)).tobytes() == to_pil(grid(images, columns)).tobytes()


def test_pixels_are_rounded_and_clipped():
    assert to_pixels(torch.tensor([-1.5, -1, 0.002, 1, 1.5])).tolist() == [0, 0, 128, 255, 255]


def test_drawing_sheets_imports_no_slow_modules():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    mains = 'import text2image.main, stackgan_v1.main, stackgan_v2.main, sys'
    slow = '{"torchvision", "torch._dynamo", "torch.utils.tensorboard", "sympy"}'
    command = [sys.executable, '-c', f'{mains}; print({slow} & set(sys.modules))']
    assert subprocess.run(command, cwd=root, capture_output=True, text=True).stdout == 'set()\n'


def test_sheets_show_captions_in_any_script():
    assert font_and_text('a red bird') == (fonts()[0], 'a red bird')
    for caption in ('un oiseau “coloré”', 'красная птица', '红色的小鸟', 'एक चिड़िया', '\U0001f426'):
        font, shown = font_and_text(caption)
        assert all(has_letter(font, letter) for letter in shown)
        # With a font that has the letters, they are shown; without one, their code points.
        assert shown == caption or '<' in shown


def test_long_captions_are_cut_on_sheets():
    image = to_pil(torch.zeros(3, 8, 8))
    sheet = caption_sheet([image, image], ['word ' * 100_000, 'a crow'])
    assert sheet.height < 128 + 14 * (LINES + 2) + 32


def test_a_caption_takes_one_line(tmp_path, capsys):
    write_images(str(tmp_path), [([torch.zeros(1, 3, 8, 8)], None)], ['a red\nbird\twith\r\nwings'])
    assert (tmp_path / 'captions.txt').read_text() == '001.png\ta red bird with wings\n'
    assert '001.png  a red bird with wings\n' in capsys.readouterr().out
    write_images(str(tmp_path), [([torch.zeros(1, 3, 8, 8)], None)], ['a \x1b[31mred\x07 bird'])  # terminals obey it
    assert (tmp_path / 'captions.txt').read_text() == '001.png\ta \ufffd[31mred\ufffd bird\n'
    assert '\x1b' not in capsys.readouterr().out
