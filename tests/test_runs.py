"""common/runs.py: the list of runs."""
import json
import os
import subprocess
import sys

import pytest

from common import runs
from common.errors import run_command
from tests.errors import one_line

LINE = 'epoch 2/5  step 40  loss_D 1.25  loss_G -3  9 images/s\n'


def make_run(folder, name, **options):
    """Make a run folder of 1,000 bytes and its options, log and measures, without a training."""
    place = folder / name
    place.mkdir(parents=True)
    (place / 'options.json').write_text(json.dumps({'dataset': 'birds', 'train': True} | options))
    (place / 'text2image.pt').write_bytes(bytes(1000))
    return place


@pytest.fixture
def listed(monkeypatch, capsys):
    """Return a function that lists a folder, as in a terminal so many letters wide or else in a pipe."""
    def call(*folder, width=None):
        monkeypatch.setattr(sys, 'argv', [runs.__file__, *map(str, folder)])
        monkeypatch.setattr(sys.stdout, 'isatty', lambda: width is not None, raising=False)
        monkeypatch.setenv('COLUMNS', str(width or 80))
        runs.main()
        return capsys.readouterr().out.splitlines()
    return call


def test_runs_are_listed_by_time(tmp_path, listed, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a path is given relative to this folder if it is then shorter
    second = make_run(tmp_path / 'b' / 'output', 'birds_20260102_030405', dataset='owls')
    first = make_run(tmp_path / 'c' / 'output', 'toy_20250102_030405')
    make_run(tmp_path, 'text_20250102_030405', train=False)
    make_run(tmp_path, 'color_20250102_030405', train=None)  # of a command that has no such flag
    (second / 'log.txt').write_text('epoch 1/5  step 20  loss_D 2  9 images/s\n' + LINE + 'stopped after step 40\n')
    (second / 'metrics.jsonl').write_text('{"step": 20, "split": "train", "images": 60, "species": 0.5}\n')
    (tmp_path / 'notes').mkdir()  # is foreign
    head, *rows, last = listed(tmp_path)
    assert head.split() == list(runs.HEAD) and len(rows) == 2
    assert rows[0].split() == ['c/output/toy_20250102_030405', '2025-01-02', '03:04', 'birds', '-', f'{size(first)}',
                               'kB', '-', '-']
    assert rows[1].split() == ['b/output/birds_20260102_030405', '2026-01-02', '03:04', 'owls', '2/5',
                               f'{size(second)}', 'kB', 'loss_D', '1.25', 'loss_G', '-3', 'step', '20', 'species',
                               '0.5', '(60', 'images', 'of', '/train)']
    assert rows[0].index('birds') == rows[1].index('owls') == head.index('data')
    assert last == 'not listed: 1 of color, 1 of text (folders of generated images)'
    for folder in (second, second.parent, second.parent.parent):
        assert [line.split() for line in listed(folder)] == [head.split(), rows[1].split()]


def size(folder):
    return f'{sum(path.stat().st_size for path in folder.iterdir()) / 1000:.3g}'


def test_a_narrow_terminal_gets_paragraphs(tmp_path, listed):
    place = make_run(tmp_path, '鳥' * 9 + '_20260102_030405')
    (place / 'log.txt').write_text(LINE)
    lines = listed(tmp_path, width=30)
    assert max(map(len, lines)) <= 30 and '  loss_D 1.25 loss_G -3' in lines
    assert '  2026-01-02 03:04, birds,' in lines and f'    epoch 2/5, {size(place)} kB' in lines
    assert len(listed(tmp_path, width=400)) == 2
    head, row = listed(tmp_path)
    assert runs.width_of(row[:row.index('2026-01-02 ')]) == head.index('started')


def test_damaged_runs_are_named_and_nothing_obeys_them(tmp_path, listed):
    strange = make_run(tmp_path, 'a\x1b[31m\u202e_20260102_030405', dataset='\x1b]0;x\x07<b>')
    (strange / 'log.txt').write_bytes(b'epoch 1/2  step 3  loss\x1b[2J nan\x9b  1 images/s')
    (strange / 'metrics.jsonl').write_text('{"a\x1b": "\x1b"}\n[1')
    (strange / 'circle').symlink_to(strange)
    os.mkfifo(strange / 'pipe')
    make_run(tmp_path, 'b_20260102_030405').joinpath('options.json').write_text('[]')
    (tmp_path / 'c_20260102_030405').mkdir()
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd' / 'options.json').mkdir()
    lines = listed(tmp_path)
    assert len(lines) == 4 and 'a[31m_20260102_030405' in lines[1] and ']0;x<b>' in lines[1] and '1/2' in lines[1]
    assert all(line.isprintable() for line in lines)
    assert ['b_2026' in lines[2], 'not the options of a run' in lines[2], 'c_2026' in lines[3]] == [True] * 3


def test_a_folder_without_runs(tmp_path, listed):
    assert listed(tmp_path) == [f'{tmp_path}: no runs here yet; python SECTION/main.py --train makes one']
    (tmp_path / 'file').write_text('')
    assert one_line(listed, tmp_path / 'file') == f'{tmp_path}/file: is not a folder; give one that has runs in it'


@pytest.mark.parametrize('encoding', ['ascii', 'utf-8', 'cp1252'])
def test_output_survives_any_encoding_and_a_closed_pipe(tmp_path, encoding):
    for k in range(3):
        make_run(tmp_path, f'vögel鳥{k}_20260102_030405')
    make_run(tmp_path, os.fsdecode(b'\xff_20260102_030405'))
    environment = os.environ | {'PYTHONIOENCODING': encoding}
    command = [sys.executable, runs.__file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b'') and done.stdout.count(b'\n') == 5
    if encoding == 'ascii':
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        assert process.stderr.read() == b'' and process.wait() == 141


def test_the_default_is_this_repository(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [runs.__file__])
    run_command(runs.main)
    assert capsys.readouterr().out
