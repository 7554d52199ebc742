"""Invalid and malicious configuration files are refused quickly, in one line that names the file."""
import time

import pytest

from common import config
from tests.errors import one_line

BOMB = ''.join(f'a{i}: &a{i} [{", ".join(9 * [f"*a{i - 1}"])}]\n' for i in range(1, 30))


def load(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return config._load(str(path))


def test_values_keep_their_spelling_as_text(tmp_path):
    assert load(tmp_path / 'a.yml', '''
lr: 0.1
TRAIN: {COEFF: {KL: 2.0}}
classes: [a, b]
train: no   # a bool
"name": "1"
x: 2e-4
day: 2001-99-99
count: 010
none:
"null": "null"
''') == {'lr': '0.1', 'TRAIN': {'COEFF': {'KL': '2.0'}}, 'classes': ['a', 'b'], 'train': 'no', 'name': '1', 'x': '2e-4',
         'day': '2001-99-99', 'count': '010', 'none': None, 'null': 'null'}
    for encoding in ('utf-16', 'utf-8-sig'):  # as editors on Windows write them
        assert load(tmp_path / 'a.yml', 'dataset: ébène'.encode(encoding)) == {'dataset': 'ébène'}
    for empty in ('', '# nothing\n', '~'):
        assert load(tmp_path / 'a.yml', empty) == {}


@pytest.mark.parametrize('text, message', [
    ('a: 1\nlr: !!int x', 'line 2: tags'), ('lr: !!bool x', 'line 1: tags'),
    ('lr: !!binary aaaa', 'tags'), ('lr: !mine x', 'tags'),
    (3000 * '[', 'line 1'), ('a: ' + 3000 * '{b: ', 'line 1: is nested too deeply'), ('- ' * 3000, 'line 1'),
    ('&a {b: *a}', 'line 1: anchors (&) and aliases (*)'), (f'a0: &a0 [x]\n{BOMB}', 'line 1: anchors'),
    ('a: 1\nb: 2\na: 3', "line 3: 'a' occurs twice"), ('? [a]\n: 1', 'a key must be a single word'),
    ('a: [[1]]', 'a list must hold single values'), ('lr: "\\0"', 'control character'),
    ('lr: \0', 'cannot be read as YAML'),
    ('a: "\\ud800"', 'control character'), ('a: "\\UFFFFFFFF"', 'cannot be read as YAML'),
    (f'%YAML {5000 * "9"}.1\n---\na: 1', 'cannot be read as YAML'), ('a: 1\n---\nb: 2', 'holds 2 documents'),
    (f'a: {10 ** 6 * "x"}', 'too long for a configuration'), ('hello', 'holds a str'), ('[1]', 'holds a list'),
    (b'a: \xe9', 'cannot be read as YAML'), ('a: b\n\tc: d', 'cannot be read as YAML'), (10 ** 5 * ']', 'too long')])
def test_hostile_configurations_are_refused_quickly(tmp_path, text, message):
    start = time.monotonic()
    error = one_line(load, tmp_path / 'a.yml', text)
    assert error.startswith(f'{tmp_path / "a.yml"}: ') and message in error and len(error) < 500
    assert time.monotonic() - start < 20


def test_a_key_with_two_values_is_an_error(tmp_path):
    for text in ('lr: {a: 1}', 'TRAIN: {LR: [1, 2]}', 'TRAIN: {LR: {a: 1}}'):
        (tmp_path / 'a.yml').write_text(text)
        one_line(config._read, str(tmp_path / 'a.yml'), {'lr'}, ('TRAIN.LR',), match='takes one value|unknown key')
    one_line(config._read, str(tmp_path / 'absent.yml'), {'lr'}, (), match='cannot be read')
    (tmp_path / 'a.yml').write_text('TRAIN: {LR: 1}\nTRAIN.LR: 2')
    one_line(config._read, str(tmp_path / 'a.yml'), {'lr'}, ('TRAIN.LR',), match="'TRAIN.LR' occurs twice; keep one")
    (tmp_path / 'a.yml').write_text('1: 2\n<<: {lr: 1}')
    one_line(config._read, str(tmp_path / 'a.yml'), {'lr'}, (), match="unknown key '1'")
