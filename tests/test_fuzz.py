"""tests/fuzz.py detects every kind of failure of a target; a short run over all real targets."""
import re

from tests import fuzz

TARGETS = '''
import ctypes, os, time

def fine(rng, folder):
    with open(os.path.join(folder, 'input'), 'x') as file:  # no other input may have left one
        file.write(str(rng.random()))
    return rng.choice(['accepted', 'refused'])

def wrong(rng, folder):
    return {}[rng.randrange(2)]

def slow(rng, folder):
    start = time.process_time()
    while time.process_time() < start + 0.3:
        pass

def large(rng, folder):
    return bytearray(b'x') * (70 * 2 ** 20) and None

def busy(rng, folder):
    while True:
        pass

def asleep(rng, folder):
    time.sleep(100)

def dies(rng, folder):
    ctypes.string_at(0)

def ends(rng, folder):
    raise SystemExit(0)

TARGETS = {one.__name__: one for one in (fine, wrong, slow, large, busy, asleep, dies, ends)}
WEIGHTS = {'fine': 5}
'''
LIMITS = fuzz.Limits(seconds=0.2, hang=8, megabytes=50, ceiling=1000)


def test_every_kind_of_finding_is_reported_and_none_stops_the_fuzzer(tmp_path, monkeypatch, capsys):
    (tmp_path / 'bad_targets.py').write_text(TARGETS)
    monkeypatch.syspath_prepend(tmp_path)
    assert fuzz.main(['--inputs', '8', '--seed', '1'], ['bad_targets'], LIMITS) == 1
    said = capsys.readouterr().out
    for name, reason in [('wrong', r'KeyError in .*bad_targets.py:\d+: '), ('slow', 'slow: '), ('large', 'large: '),
                         ('busy', r'hangs .* in .*bad_targets.py:\d+'), ('asleep', r'hangs .* in .*bad_targets.py:\d+'),
                         ('dies', 'dies with exit status -11 in '), ('ends', 'SystemExit ')]:
        assert re.search(f'^UNEXPECTED: --seed 1 --only {name} --input 0: {reason}', said, re.MULTILINE), said
    assert re.search(r'^fine +1 inputs: 1 (accepted|refused); mean [0-9.]+ ms, slowest 0.0 s ', said, re.MULTILINE)
    assert '8 inputs over 8 targets: 7 unexpected, slowest 0.' in said


def test_an_input_can_be_repeated(tmp_path, monkeypatch, capsys):
    (tmp_path / 'more_targets.py').write_text(TARGETS)
    monkeypatch.syspath_prepend(tmp_path)
    assert fuzz.main(['--inputs', '150', '--seed', '5', '--only', 'fine'], ['more_targets']) == 0
    assert '150 inputs over 1 targets: 0 unexpected' in capsys.readouterr().out
    asked = '--seed 1 --only wrong --input 12345'
    told = []
    for _ in range(2):
        assert fuzz.main(asked.split(), ['more_targets']) == 1
        told.append(re.search(r'KeyError.*: ([01])$', capsys.readouterr().out, re.MULTILINE)[1])
    assert told[0] == told[1]


def test_our_readers_accept_or_refuse_every_input(capsys):
    """Run a short form of `make fuzz`."""
    assert fuzz.main(['--inputs', '1000', '--seed', '1']) == 0, capsys.readouterr().out
