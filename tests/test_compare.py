"""evaluation/compare.py: runs side by side."""
import sys

import pytest
import torch
from PIL import Image

from common.errors import UserError
from evaluation import compare
from tests import tiny
from tests.errors import one_line
from text2image import main


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, 'argv', [module.__file__, *map(str, arguments)])
    return module.main()


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs of one epoch, two steps of 4 and 2 captions, that differ in --l1_coef."""
    tiny.with_encoder(tmp_path, {'train': {'001.Auk': 1, '002.Jay': 2}})
    for l1_coef in (0, 50):
        run(monkeypatch, main, '--data_dir', tmp_path / 'data', '--dataset', 'tiny', '--epochs', 1, '--batch_size', 4,
            '--out_dir', tmp_path / str(l1_coef), '--l1_coef', l1_coef)
    return [next((tmp_path / str(l1_coef)).iterdir()) for l1_coef in (0, 50)]


def test_a_sheet_of_two_runs(runs, tmp_path, monkeypatch, capsys):
    sheets = [tmp_path / name for name in ('both.png', 'again.png', 'twice.png')]
    for sheet, chosen in zip(sheets, (runs, runs, [runs[0], runs[0]])):
        run(monkeypatch, compare, *chosen, '--text', 'a small red bird', '--text', 'a blue one', '--out', sheet)
    assert f'2 runs, 2 sentences: {sheets[0]}' in capsys.readouterr().out
    both, again, twice = map(Image.open, sheets)
    assert both.size[0] == compare.CAPTION * compare.LETTER + 2 * compare.GAP + 2 * (compare.SIDE + compare.GAP)
    assert both.tobytes() == again.tobytes()

    def column(sheet, number):
        right = sheet.size[0] - (1 - number) * (compare.SIDE + compare.GAP)
        return sheet.crop((right - compare.SIDE - compare.GAP, sheet.size[1] - 2 * (compare.SIDE + compare.GAP),
                           right - compare.GAP, sheet.size[1])).tobytes()

    assert column(twice, 0) == column(twice, 1) and column(both, 0) != column(both, 1)


def test_a_copy_made_of_links_is_resumed_without_changing_the_run(runs, tmp_path, monkeypatch):
    original, copy = runs[0], tmp_path / 'copy'
    for path in original.rglob('*'):
        if path.is_file():
            (copy / path.relative_to(original)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(original)).symlink_to(path)
    before = {path: path.read_bytes() for path in original.rglob('*') if path.is_file()}
    run(monkeypatch, main, '--train', '--resume', copy, '--epochs', 2)
    assert {path: path.read_bytes() for path in original.rglob('*') if path.is_file()} == before
    assert torch.load(copy / 'text2image.pt', weights_only=True)['progress']['epoch'] == 2
    assert (copy / 'log.txt').read_text().startswith((original / 'log.txt').read_text())
    assert '"epochs": 2' in (copy / 'options.json').read_text()


def test_titles_say_what_differs(runs):
    found = compare.differences([{'l1_coef': 0, 'lr': 1, 'out_dir': 'a'}, {'l1_coef': 50, 'lr': 1, 'out_dir': 'b'}])
    assert found == ['--l1_coef 0', '--l1_coef 50']
    assert compare.differences([{'l1_coef': 50}, {'l1_coef': 50.0}]) == ['the same options'] * 2


def test_errors_are_one_line(runs, tmp_path, monkeypatch):
    with pytest.raises(UserError, match='contains no sentence'):
        run(monkeypatch, compare, *runs)
    assert 'no such checkpoint' in one_line(run, monkeypatch, compare, tmp_path / 'none', '--text', 'a bird')
    for wrong in ({'dataset': 5}, {'dataset': 'tiny', 'data_dir': 7}, {'l1_coef': 1}):
        contents = torch.load(runs[0] / 'text2image.pt', weights_only=True)
        torch.save(contents | {'options': wrong}, tmp_path / 'odd.pt')
        assert 'odd.pt: its options do not say which data' in one_line(run, monkeypatch, compare, tmp_path / 'odd.pt',
                                                                      '--text', 'a bird')
    (tmp_path / 'many.txt').write_text('a bird\n' * 257)
    assert 'too many for one sheet' in one_line(run, monkeypatch, compare, *runs, '--text_file', tmp_path / 'many.txt')
    assert 'ends in .png' in one_line(run, monkeypatch, compare, *runs, '--text', 'a bird', '--out', 'a.jpg')


def test_a_sheet_shows_sentences_in_any_script():
    red, blue = (compare.sheet([[torch.zeros(3, 64, 64)]], ['a run'], [sentence]).tobytes() for sentence in '红蓝')
    assert red != blue  # not the box that stands for a letter the font lacks
