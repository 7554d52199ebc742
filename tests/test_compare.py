"""evaluation/compare.py: runs side by side."""
import json
import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from common import history
from common import page as page_module
from common.history import measured_alike, measurements
from common.sampling import save_sheet
from evaluation import compare, metrics
from evaluation.trained_runs import TrainedRun
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
            '--out_dir', tmp_path / str(l1_coef), '--l1_coef', l1_coef, '--log_interval', 1)
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


@pytest.mark.parametrize('link', [os.symlink, os.link])
def test_a_copy_made_of_links_is_resumed_without_changing_the_run(link, runs, tmp_path, monkeypatch):
    original, copy = runs[0], tmp_path / 'copy'
    (original / 'samples' / 'epoch_0002.png').write_bytes(b'of a longer training')
    save_sheet(Image.new('RGB', (8, 8)), str(original / 'nearest.png'))
    (original / 'metrics.jsonl').write_text('{"step": 2, "species": 0.5}\n')
    for path in original.rglob('*'):
        if path.is_file():
            (copy / path.relative_to(original)).parent.mkdir(parents=True, exist_ok=True)
            link(path, copy / path.relative_to(original))
    before = {path: path.read_bytes() for path in original.rglob('*') if path.is_file()}
    run(monkeypatch, main, '--train', '--resume', copy, '--epochs', 2)
    save_sheet(Image.new('RGB', (9, 9)), str(copy / 'nearest.png'))
    metrics.keep(SimpleNamespace(folder=str(copy), file='text2image.pt', step=4, epoch=2),
                 SimpleNamespace(split='test', best_of=1), 50, {'species': .25})
    assert {path: path.read_bytes() for path in original.rglob('*') if path.is_file()} == before
    assert torch.load(copy / 'text2image.pt', weights_only=True)['progress']['epoch'] == 2
    assert (copy / 'log.txt').read_text().startswith((original / 'log.txt').read_text())
    assert '"epochs": 2' in (copy / 'options.json').read_text()
    assert [line['species'] for line in measurements(copy)] == [.5, .25]


def test_runs_of_other_data_are_said_to_differ(runs, tmp_path, monkeypatch, capsys):
    tiny.with_encoder(tmp_path / 'other', {'train': {'003.Owl': 2}, 'test': {'001.Auk': 1}})
    run(monkeypatch, main, '--data_dir', tmp_path / 'other' / 'data', '--dataset', 'tiny', '--epochs', 1,
        '--batch_size', 4, '--out_dir', tmp_path / 'out', '--l1_coef', 50, '--log_interval', 1)
    of_other = next((tmp_path / 'out').iterdir())
    run(monkeypatch, compare, of_other, runs[1], '--out', tmp_path / 'both.png')
    assert 'The sentences are captions of /test of ' in capsys.readouterr().out
    found = compare.differing_options([TrainedRun(str(path), torch.device('cpu')) for path in (of_other, runs[1])])
    assert set(found[0]) >= {'captions', 'pictures'} and '--l1_coef' not in found[0]
    assert all(found[0][name] != found[1][name] for name in found[0])
    page = (tmp_path / 'both.html').read_text()
    assert '<code>captions</code>' in page and found[0]['captions'] in page


def test_a_run_and_its_data_are_found_where_they_moved_and_changed_data_is_said(runs, tmp_path, capsys):
    os.makedirs(tmp_path / 'moved')
    for name in ('data', '0'):  # options.json has their old places
        os.rename(tmp_path / name, tmp_path / 'moved' / name)
    trained = TrainedRun(str(tmp_path / 'moved' / '0' / runs[0].name), torch.device('cpu'))
    assert trained.hdf5_file == str(tmp_path / 'moved' / 'data' / 'tiny.hdf5')
    trained.check(trained.dataset('train'))
    assert 'was trained on' not in capsys.readouterr().out
    tiny.with_encoder(tmp_path / 'moved', {'train': {'001.Auk': 2, '003.Owl': 2}, 'test': {'002.Jay': 2}})
    trained.check(trained.dataset('test'))
    assert 'was trained on different captions and pictures from those in ' in capsys.readouterr().out


def test_titles_say_what_differs(runs):
    found = compare.differences([{'--l1_coef': 0, '--lr': 1, '--out_dir': 'a'},
                                 {'--l1_coef': 50, '--lr': 1, '--out_dir': 'b'}])
    assert [compare.title_of(one) for one in found] == ['--l1_coef 0', '--l1_coef 50']
    same = compare.differences([{'--l1_coef': 50}, {'--l1_coef': 50.0}])
    assert [compare.title_of(one) for one in same] == ['the same options'] * 2
    seeds = compare.differences([{'seed': 12345678, 'stage': 1}, {'seed': 12345679, 'branches': 2}])
    assert seeds == [{'seed': '12345678'}, {'seed': '12345679'}]  # no option that the other section lacks


def test_long_values_are_compared_as_a_whole():
    first, second = (f'/home/{"long/" * 30}run{number}/text2image.pt' for number in (1, 2))
    found = compare.differences([{'checkpoint': first}, {'checkpoint': second}])
    assert found[0] != found[1] and all(len(one['checkpoint']) == 100 for one in found)


def test_titles_say_what_differs_among_runs_of_a_gan_beside_those_of_another():
    runs = [SimpleNamespace(section=section, options=options, learned_from={}) for section, options in (
        ('a', {'lr': 1, 'l1_coef': 0}), ('b', {'lr': 2, 'stage': 1}), ('a', {'lr': 1, 'l1_coef': 50}))]
    assert compare.differing_options(runs) == [{'--lr': '1', '--l1_coef': '0'}, {'--lr': '2'},
                                               {'--lr': '1', '--l1_coef': '50'}]


def test_a_page_shows_the_runs_and_needs_no_other_file(runs, tmp_path, monkeypatch, capsys):
    numbers = {'step': 2, 'species': 0.0625, 'name <b>': 'x'}
    (runs[1] / 'metrics.jsonl').write_text('{"species": 0.5}\n' + json.dumps(numbers) + '\n')
    run(monkeypatch, compare, *runs, '--text', 'a <small> "red" bird', '--out', tmp_path / 'both.png')
    assert f'both.png and {tmp_path / "both.html"}' in capsys.readouterr().out
    page = (tmp_path / 'both.html').read_text()
    assert re.findall('(?:src|href)="([^"]{,5})', page) == ['data:'] * 4  # an image and a sample of each run
    assert 'http' not in page and '<script' not in page and '<small>' not in page and 'name &lt;b&gt;' in page
    assert re.search('--l1_coef</code></th><td>0</td><td>50</td>', page)
    assert '<th>species</th><td></td><td>0.0625</td>' in page
    for loss in ('loss_D', 'loss_G'):
        figure, = re.findall(f'<figure><svg[^>]*aria-label="{loss}">.*?</figure>', page)
        assert figure.count('<polyline') == 2 and len(re.findall(r'\d+\.\d,\d+\.\d', figure)) == 2 * 2
    assert [run.name in page for run in runs] == [True, True]


def test_a_page_of_damaged_records(runs, tmp_path, monkeypatch):
    (runs[0] / 'log.txt').write_bytes(b'epoch 1/2  step 1  loss_D nan  loss_G x  3 images/s\n\xff\nstep 2\n'
                                      b'epoch 1/2  step ' + b'9' * 400 + b'  loss_D 1  3 images/s')
    (runs[0] / 'metrics.jsonl').write_text('[1]\n')
    (runs[1] / 'metrics.jsonl').write_text('{"a": 1')
    (runs[1] / 'log.txt').unlink()
    os.mkfifo(runs[1] / 'log.txt')
    for sample in (runs[0] / 'samples').iterdir():
        sample.write_bytes(b'PNG')
    run(monkeypatch, compare, *runs, '--text', 'a bird', '--out', tmp_path / 'both.png')
    page = (tmp_path / 'both.html').read_text()
    assert 'Nothing yet' in page and page.count('data:image') == 3
    assert page.count('alt="epoch') == 1 and page.count('<figcaption>epoch') == 2  # one cannot be decoded
    (runs[0] / 'metrics.jsonl').write_text(json.dumps({'a': '\ud800', 'b': 10 ** 400}))
    run(monkeypatch, compare, *runs, '--text', 'a bird', '--out', tmp_path / 'both.png')  # replaces its own page
    assert 'd800' in (tmp_path / 'both.html').read_text()


def test_curves_are_thinned_and_repeated_steps_replaced(tmp_path):
    lines = [f'epoch 1/2  step {step}  loss_D {step}.0  loss_G 2  3.1 images/s' for step in (*range(900), 5)]
    (tmp_path / 'log.txt').write_text('\n'.join(['loaded', *lines, 'epoch 1/2  step 5  loss_D 7.5  3.1 images/s']))
    curves = history.logged(str(tmp_path))
    assert len(curves['loss_D']) == len(curves['loss_G']) == 900 and curves['loss_D'][5] == (5, 7.5)
    assert page_module.thinned(curves['loss_D'])[1:3] == [(4, pytest.approx((3 + 4 + 7.5) / 3)), (7, 7)]


def test_held_out_captions_are_shown_without_a_sentence(tmp_path, monkeypatch, capsys):
    tiny.with_encoder(tmp_path, tiny.SPLITS)
    run(monkeypatch, main, '--data_dir', tmp_path / 'data', '--dataset', 'tiny', '--epochs', 1, '--batch_size', 8,
        '--out_dir', tmp_path / 'out')
    trained, = (tmp_path / 'out').iterdir()
    run(monkeypatch, compare, trained, '--out', tmp_path / 'one.png')
    assert '1 runs, 8 sentences' in capsys.readouterr().out
    assert 'Wren_1' in (tmp_path / 'one.html').read_text()


def test_errors_are_one_line(runs, tmp_path, monkeypatch):
    assert '/test holds no captions; or give sentences with --text' in one_line(run, monkeypatch, compare, *runs)
    assert 'is not a run folder' in one_line(run, monkeypatch, compare, tmp_path / 'none', '--text', 'a bird')
    kept = json.loads((runs[0] / 'options.json').read_text())
    for wrong in ({'dataset': 5}, {'dataset': None}, {'data_dir': 7, 'seen_from_run': {}}):
        (runs[0] / 'options.json').write_text(json.dumps(kept | wrong))
        assert 'its options do not say which data' in one_line(run, monkeypatch, compare, runs[0], '--text', 'a bird')
    (runs[0] / 'options.json').write_text(json.dumps(kept))
    (tmp_path / 'many.txt').write_text('a bird\n' * 257)
    assert 'too many for one sheet' in one_line(run, monkeypatch, compare, *runs, '--text_file', tmp_path / 'many.txt')
    (tmp_path / 'mine.html').write_text('<!doctype html>mine')
    assert 'mine.html: exists and was not written by this program' in one_line(
        run, monkeypatch, compare, *runs, '--text', 'a bird', '--out', tmp_path / 'mine.png')
    assert (tmp_path / 'mine.html').read_text() == '<!doctype html>mine' and not (tmp_path / 'mine.png').exists()
    (tmp_path / 'photo.png').write_text('mine, too')
    assert 'photo.png: exists and has no page of this program beside it' in one_line(
        run, monkeypatch, compare, *runs, '--text', 'a bird', '--out', tmp_path / 'photo.png')
    assert (tmp_path / 'photo.png').read_text() == 'mine, too' and not (tmp_path / 'photo.html').exists()
    assert 'ends in .png' in one_line(run, monkeypatch, compare, *runs, '--text', 'a bird', '--out', 'a.jpg')


def test_a_sheet_shows_sentences_in_any_script():
    red, blue = (compare.sheet([[torch.zeros(3, 64, 64)]], ['a run'], [sentence]).tobytes() for sentence in '红蓝')
    assert red != blue  # not the box that stands for a letter the font lacks


def test_measures_side_by_side_are_alike(tmp_path):
    plain = {'split': 'test', 'images': 50, 'species': 0.5}
    chosen = {'split': 'test', 'images': 50, 'species_best_of_16': 0.7}
    for name, found in (('a', [plain, chosen]), ('b', [plain | {'images': 60}, plain | {'species': 0.25}]), ('c', [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, found)))
    a, b, c = measured_alike([tmp_path / name for name in 'abc'])
    assert (a['species'], b['species'], b['images'], c) == ('0.5', '0.25', '50', {})
    assert list(measured_alike([tmp_path / 'a'])[0]) == ['split', 'images', 'species_best_of_16']
    (tmp_path / 'b' / 'metrics.jsonl').write_text(json.dumps(plain | {'images': 60}))  # nothing alike: the newest
    assert measured_alike([tmp_path / 'a', tmp_path / 'b'])[1]['images'] == '60'
