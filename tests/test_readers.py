"""Properties of the small readers, tested with inputs that Hypothesis finds."""
import json
import math
import os
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import checkpoint, flags, run
from common.config import _flatten
from common.errors import UserError
from common.sampling import _file_name
from data.bounded_files import read_lines, read_numbered
from data.boxes import read_box
from data.converting import read_captions
from data.multiscale_dataset import crop_box
from stackgan_v1 import main as stackgan_v1
from stackgan_v2 import main as stackgan_v2
from stackgan_v2.checkpoints import find

# The same examples each time, and no deadline: the machine may be busy. The folder of all examples of a test is one.
settings.register_profile('readers', max_examples=150, derandomize=True, deadline=None, database=None,
                          suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile('readers')

TEXT = st.text() | st.sampled_from(['', ' ', '\ufeff', '\u2028', '\0', 'a\r\nb', '\ud800'])
BYTES = st.binary() | st.text().map(lambda text: text.encode('utf-8', 'surrogatepass')) | st.sampled_from(
    [b'\xff\xfe', b'\xef\xbb\xbf', b'\0' * 9, 'é'.encode('utf-16'), b'\n' * 99])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT


def read_or_refuse(file, read, *args):
    """Return `read(*args)`, or None if it refuses the file in one line that names it."""
    try:
        return read(*args)
    except UserError as error:
        assert str(file) in str(error) and '\n' not in str(error)


@given(st.none() | st.lists(TEXT), st.none() | BYTES)
def test_sentences_are_read_or_refused(tmp_path, texts, written):
    file = written is not None and tmp_path / 'sentences.txt'
    if file:
        file.write_bytes(written)
    is_empty_typed = not all(text.strip() for text in texts or [])
    blamed = '--text' if is_empty_typed or not file else file
    sentences = read_or_refuse(blamed, flags.read_sentences, texts, file and str(file))
    if sentences is None:
        return
    assert sentences and all(sentence == sentence.strip() != '' for sentence in sentences)
    typed = [text.strip() for text in texts or [] if text.strip()]
    assert sentences[:len(typed)] == typed
    assert not any('\n' in sentence or '\r' in sentence for sentence in sentences[len(typed):])


NAMES = st.text() | st.sampled_from(['seen_from_run', 'data_dir', 'cfg', 'lr'])


@given(st.recursive(SCALARS, lambda inside: st.lists(inside) | st.dictionaries(NAMES, inside)).map(
    lambda value: json.dumps(value).encode()) | BYTES)
def test_stored_options_are_read_or_refused(tmp_path, written):
    (tmp_path / 'options.json').write_bytes(written)
    options = read_or_refuse(tmp_path / 'options.json', run.read_options, str(tmp_path))
    assert options is None or isinstance(options, dict)


@given(st.recursive(st.dictionaries(st.text('ab'), SCALARS),
                    lambda inside: st.dictionaries(st.text('ab'), SCALARS | inside)))
def test_nested_keys_are_joined_with_dots(values):
    def value_of(key):
        inside = values
        for part in key.split('.'):
            inside = inside[part]
        return inside

    def count(inside):
        return sum(count(value) if isinstance(value, dict) else 1 for value in inside.values())

    flat = _flatten(values, 'a.yml')
    assert len(flat) == count(values) and all(value is value_of(key) for key, value in flat.items())


def yaml_of(main):
    """Generate YAML with keys that `main` knows and values of any type."""
    key = st.sampled_from([*main.KEYS, 'batch_size', 'lr', 'cuda', 'text', 'gf_dim', 'epochs', 'dataset', 'nothing'])
    value = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.sampled_from(['GF_DIM', 'KL', 'a']), SCALARS)
    lines = st.sampled_from(['a: [', '&a {b: *a}', 'lr: 2001-99-99', 'epochs: !!int x', '!!python/name:os.system a',
                             'lr: .nan', '- a', '%YAML 9.9', '\t', 'cuda: !!bool x', 'epochs: 1_0',
                             'seed: 0x' + 'f' * 99])
    return (st.dictionaries(key, value, max_size=4).map(lambda values: yaml.safe_dump(values, allow_unicode=True))
            | st.lists(lines, max_size=2).map('\n'.join))


@pytest.mark.parametrize('main', [stackgan_v1, stackgan_v2])
def test_configuration_files_are_read_or_refused(main, tmp_path, monkeypatch, capsys):
    """A file results in options or a one-line error, never in the usage message."""
    monkeypatch.setattr(sys, 'argv', ['main.py', '--cfg', str(tmp_path / 'our.yml')])

    @settings(max_examples=60)
    @given(yaml_of(main))
    def check(text):
        (tmp_path / 'our.yml').write_text(text, encoding='utf-8', errors='surrogatepass')
        try:
            options, resumed = main.parse_flags()
            assert isinstance(options.epochs, int) and resumed is None
        except UserError as error:
            assert '\n' not in str(error)

    check()


@given(st.sampled_from(['netG_', 'netG_epoch_', 'netG_epoch_x_']), st.integers(0, 10 ** 15))
def test_snapshot_numbers_are_read_from_names(start, number):
    assert checkpoint.count_of(f'a_7.pth/{start}{number}.pth') == number


@given(st.text(), st.sampled_from(['', '.pth', '_.pth', '_-1.pth', '_1.pth.gz', '_1.pt']))
def test_names_without_a_number_are_not_snapshots(start, end):
    assert checkpoint.count_of(start.rstrip('0123456789') + end) == 0 or end == '.pth'


@settings(max_examples=30)
@given(st.sets(st.integers(0, 10 ** 9), min_size=1, max_size=4), st.booleans())
def test_the_newest_snapshot_is_found(tmp_path_factory, numbers, is_beside):
    folder = tmp_path_factory.mktemp('[run]')  # what a pattern of file names would take for one letter
    (folder / 'Model').mkdir()
    for number in numbers:
        (folder / ('' if is_beside else 'Model') / f'netG_{number}.pth').touch()
    assert checkpoint.count_of(find(str(folder), 'name')) == max(numbers)


@given(TEXT | st.text('./\\:', max_size=4) | st.text('aé鳥', min_size=100, max_size=400))
def test_names_from_data_files_become_file_names(tmp_path, text):
    """The name can be created in the intended folder, together with its suffix."""
    path = tmp_path / f'{_file_name(text)}_256_sentence9.png'
    path.touch()
    assert path.resolve().parent == tmp_path.resolve() and _file_name(_file_name(text)) == _file_name(text)
    os.remove(path)


@given(st.lists(st.text('ab', min_size=120, max_size=300), unique=True, max_size=9))
def test_long_names_stay_different(texts):
    assert len({_file_name(text) for text in texts}) == len(texts)


NUMBERS = st.floats(-1e9, 1e9) | st.integers(-10 ** 9, 10 ** 9)


@given(st.tuples(st.integers(1, 10 ** 5), st.integers(1, 10 ** 5)), st.none() | st.tuples(*[NUMBERS] * 4))
def test_a_crop_box_is_inside_the_photograph(size, bbox):
    left, top, right, bottom = box = crop_box(size, bbox)
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1] and all(type(side) is int for side in box)
    if bbox is None:
        assert box == (0, 0, *size)


@given(st.none() | st.text('0123456789.-+e ') | st.tuples(*[st.floats()] * 4).map(lambda box: ' '.join(map(str, box)))
       | TEXT)
def test_bounding_boxes_are_four_valid_numbers(text):
    try:
        box = read_box(text)
    except ValueError as error:
        assert '\n' not in str(error)
        return
    assert (box is None) == (text is None)
    assert box is None or len(box) == 4 and all(map(math.isfinite, box)) and min(box[2:]) > 0


@given(BYTES)
def test_lists_are_read_or_refused(tmp_path, written):
    file = tmp_path / 'classes.txt'
    file.write_bytes(written)
    lines = read_or_refuse(file, read_lines, str(file), 'write a class a line')
    assert lines is None or all(line == line.strip() != '' for line in lines)
    pairs = read_or_refuse(file, read_numbered, str(file), 'write a number and a name a line')
    assert pairs is None or all(len(pair) == 2 for pair in pairs)


@given(BYTES)
def test_captions_are_read_or_refused(tmp_path, written):
    file = Path(tmp_path, 'captions.txt')
    file.write_bytes(written)
    try:
        captions = read_captions(str(file))
    except ValueError as error:
        assert '\n' not in str(error)
    else:
        assert captions and all(caption.strip() and '\0' not in caption for caption in captions)
