"""tests/chaos.py detects every kind of failure of a killed command; a few kills of real commands."""
import os
import re

import pytest

from tests import chaos
from tests.chaos import Chaos, Command

# What a command does with a file, in a third of a second. `write` is right: whole or not at all.
SCRIPT = '''
import signal, sys
if not sys.argv[0].endswith('traceback'):
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
import glob, os, subprocess, time

def write(path, text='whole'):
    for left in glob.glob(f'{path}.partial*'):
        os.remove(left)
    with open(f'{path}.partial', 'w') as file:
        for letter in text:
            file.write(letter)
            time.sleep(0.06)
    os.replace(f'{path}.partial', path)

def right():
    write('made.txt')

def half():
    if not os.path.exists('made.txt'):
        with open('made.txt', 'w') as file:
            file.write('who'), file.flush(), time.sleep(0.3), file.write('le')

def leaves():
    with open(f'made.txt.partial-{os.getpid()}', 'w') as file:
        time.sleep(0.3)
    os.replace(file.name, 'made.txt')

def deaf():
    signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_IGN)
    right()

def orphan():
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=False)
    try:
        right()
    finally:
        child.kill(), child.wait()

def traceback():
    time.sleep(1)
    right()

def train():
    run = sys.argv[sys.argv.index('--resume') + 1] if '--resume' in sys.argv else 'out/birds_20260101_120000'
    os.makedirs(run, exist_ok=True)
    write(f'{run}/model.pth.txt')

def lost():
    if '--resume' in sys.argv:
        sys.exit('error: cannot go on')
    train()

globals()[os.path.basename(sys.argv[0])]()
'''


@pytest.mark.parametrize('does, kind, what', [
    ('right', None, ''), ('train', None, ''), ('half', 'different', 'made.txt'),
    ('leaves', 'left behind', 'made.txt.partial-'), ('orphan', 'left behind', 'processes ['),
    ('deaf', 'badly ended', 'to its end'), ('traceback', 'badly ended', 'KeyboardInterrupt'),
    ('lost', 'lost', 'ends with status 1: error: cannot go on')])
def test_every_kind_of_finding_is_reported(does, kind, what, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(chaos, 'PATIENCE', 2 if does in ('deaf', 'orphan') else 9)  # these are waited for
    monkeypatch.setattr(chaos, 'GRACE', -9 if does == 'deaf' else 9)  # the machine may be busy
    monkeypatch.setattr(chaos, 'STARTUP', 0.3 if does == 'traceback' else 9)
    for name in ('code', 'data'):
        (tmp_path / name).mkdir()
    (tmp_path / 'code' / does).write_text(SCRIPT)
    command = Command(does, does, [], is_training=does in ('train', 'lost'))
    tried = Chaos([command], 8, 2, tmp_path / 'victims', tmp_path / 'code', tmp_path / 'data')
    summary, said = tried.run(parallel=4), capsys.readouterr().out
    assert re.match('8 kills over 1 commands: ', summary) and said.count(' -> ') == 8, said
    if kind is None:
        assert summary.endswith(': 0 lost, 0 different, 0 left behind, 0 badly ended'), said
        assert not os.listdir(tmp_path / 'victims')
    else:
        assert tried.found[kind] > 0 and re.search(f'^{kind.upper()}: {does}, in .*{re.escape(what)}', said, re.M), said


def test_killed_commands_end_with_the_results_of_undisturbed_ones(capfd):
    """Run a short form of `make chaos`."""
    names = ['stackgan_v1 stage 1', 'toy_birds']
    assert chaos.main(['--kills', '4', '--seed', '1', '--only', *names]) == 0, capfd.readouterr().out
