"""Every flag of every command is used or refused in every mode; `python -m tests.test_modes` prints the table."""
import argparse
import os
import sys

import pytest

from char_cnn_rnn import main as char_cnn_rnn
from common import argument_types, flags, run
from common.errors import UserError
from stackgan_v1 import main as stackgan_v1
from stackgan_v2 import main as stackgan_v2
from text2image import main as text2image
from word2vec import main as word2vec

pytestmark = pytest.mark.usefixtures('one_thread')

SECTIONS = {'text2image': text2image, 'stackgan_v1': stackgan_v1, 'stackgan_v2': stackgan_v2,
            'char_cnn_rnn': char_cnn_rnn, 'word2vec': word2vec}
TYPED = {'train': ['--train'], 'resume': ['--resume', 'RUN'], 'evaluate': ['--train', 'False'],
         'text': ['--train', 'False', '--text', 'a crow'], 'like': ['--train', 'False', '--like', 'LIKE'],
         'interpolate': ['--train', 'False', '--interpolate', 'a', 'b'],
         'query': ['--train', 'False', '--query', 'bird'], 'embed': ['--embed'],
         'analogy': ['--analogy', 'a', 'small', 'red'], 'plot': ['--plot']}
SWITCHES = {'train', 'resume', 'text', 'text_file', 'like', 'interpolate', 'query', 'embed', 'analogy',  # modes' flags
            'plot'}


class Parsed(Exception):
    """Raised in place of everything after parsing the flags."""


def parser_of(section):
    """Return the parser of a section's main.py, before anything is parsed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags.Parser, 'parse_args', stop)
        with pytest.raises(Parsed) as caught:
            section.parse_flags()
    return caught.value.args[0]


def stop(parser, *_):
    raise Parsed(parser)


def flags_of(section):
    return [action for action in parser_of(section)._actions if action.dest != 'help']


def modes_of(section):
    return [mode for mode in TYPED if any(mode in action.modes for action in flags_of(section))]


def value_of(action):
    """Return a valid value of the flag, as it is typed."""
    if action.choices:
        return [str(list(action.choices)[0])]
    count = action.nargs if isinstance(action.nargs, int) else 1
    if action.metavar == 'BOOL':
        return ['True']
    if action.type is argument_types.fraction:
        return ['0.5']
    return ['name' if action.type in (None, os.path.abspath, flags.plain_name) else '3'] * count


def cells(section):
    """Return (flag, mode, whether the flag is used in it) as the parser declares it."""
    return [(action, mode, mode in action.modes) for action in flags_of(section) for mode in modes_of(section)]


def refusal(section, monkeypatch, *arguments):
    """Return the message of the UserError that parsing flags of `section` raises, or '' if they are accepted."""
    monkeypatch.setattr(sys, 'argv', ['main.py', *arguments])
    try:
        section.parse_flags()
    except UserError as error:
        return str(error)
    return ''


@pytest.mark.parametrize('name', SECTIONS)
def test_every_flag_declares_its_modes(name):
    for action in flags_of(SECTIONS[name]):
        assert action.modes, f'{action.dest} says nothing about modes'
        assert set(action.modes) <= set(TYPED), action.dest


@pytest.mark.parametrize('name', SECTIONS)
def test_flags_without_effect_are_refused(name, monkeypatch, tmp_path):
    section = SECTIONS[name]
    monkeypatch.chdir(tmp_path)
    run_dir = run.new_run(str(tmp_path), 'x', {'stage': 1} if name == 'stackgan_v1' else {})
    for action, mode, is_used in cells(section):
        if action.dest not in SWITCHES:
            flag, typed = action.option_strings[0], [run_dir if part == 'RUN' else part for part in TYPED[mode]]
            said = refusal(section, monkeypatch, *typed, flag, *value_of(action))
            assert said.startswith(f'{flag}: has no effect with') is not is_used, (flag, mode, said)


@pytest.mark.parametrize('name, typed, message', [
    ('text2image', '--train --text crow', '--text: has no effect with --train; add --train False'),
    ('text2image', '--train False --lr 1', '--lr: has no effect with --train False; leave it out'),
    ('text2image', '--resume x --seed 1', '--seed: has no effect with --resume; the run keeps its own value; leave it '
                                          'out, or start a new run'),
    ('text2image', '--resume x --text_file a', '--text_file: has no effect with --resume; add --train False'),
    ('text2image', '--resume x --checkpoint y', '--checkpoint: has no effect with --resume'),
    ('stackgan_v2', '--train False --interpolate a b --text c', '--text: has no effect with --interpolate; leave'),
    ('stackgan_v2', '--interpolate a b', '--interpolate: has no effect with --train; add --train False'),
    ('stackgan_v1', '--resume x --stage1 y', '--stage1: has no effect with --resume'),
    ('char_cnn_rnn', '--embed --query a', '--query: has no effect with --embed; leave it out'),
    ('char_cnn_rnn', '--embed --resume x', '--resume: has no effect with --embed; leave it out'),
    ('char_cnn_rnn', '--embed --train', '--train: has no effect with --embed; leave it out'),
    ('char_cnn_rnn', '--train False --query a --resume x', '--resume: has no effect with --query; leave it out'),
    ('char_cnn_rnn', '--train --query a', '--query: has no effect with --train; add --train False'),
    ('word2vec', '--train --plot', '--plot: has no effect with --train; add --train False'),
    ('word2vec', '--query a --data_dir b', '--data_dir: has no effect with --query; leave it out'),
    ('word2vec', '--resume x --optimizer sgd', '--optimizer: has no effect with --resume; the run keeps its')])
def test_contradictions_are_refused(monkeypatch, name, typed, message):
    assert refusal(SECTIONS[name], monkeypatch, *typed.split()).startswith(message)


# --- whether a flag that counts as used is read --------------------------------------------------------------------

READ = set()  # names of the options that have been read


class Watched(argparse.Namespace):
    """Record which options are read."""

    def __getattribute__(self, name):
        READ.add(name)
        return object.__getattribute__(self, name)


TRAINING = ['--epochs', '1', '--batch_size', '2', '--log_interval', '1']
NARROW = {'text2image': [], 'char_cnn_rnn': ['--variant', 'birds_cvpr', '--image_encoder', 'scratch'],
          'word2vec': ['--loss', 'negative', '--negative', '1', '--vector_size', '4', '--min_count', '1'],
          'stackgan_v1': ['--gf_dim', '8', '--df_dim', '2', '--condition_dim', '6', '--workers', '0'],
          'stackgan_v2': ['--branches', '2', '--gf_dim', '4', '--df_dim', '4', '--z_dim', '5', '--embedding_dim', '6',
                          '--workers', '0']}
# Read before or beside the options that are watched: by the parser, the configuration file, the mode, for pictures
# without text, in one stage only, or where a GPU or several processes are.
ELSEWHERE = {'cfg', 'train', 'resume', 'embed', 'image_folder', 'lsun', 'classes', 'stage1', 'count', 'encoder',
             'image_weights', 'image_encoder'}
AT_PARSING = {'resume': {'out_dir'}, 'train': {'recipe'}}  # where the newest run is looked for; other defaults


@pytest.mark.parametrize('name', SECTIONS)
def test_used_flags_are_read(name, folder, monkeypatch, tmp_path, capsys):
    section = SECTIONS[name]
    monkeypatch.chdir(folder)
    unread = {}
    for mode in modes_of(section):
        out = ['--out_dir', str(tmp_path), '--dataset', 'tiny', '--cuda', 'False']
        if any(action.dest == 'data_dir' and mode in action.modes for action in flags_of(section)):
            out += ['--data_dir', 'data']
        typed = {'train': [*out, *TRAINING, *NARROW[name]], 'resume': ['--out_dir', str(tmp_path), '--resume',
                                                                       '--epochs', '2']}.get(mode, [*TYPED[mode], *out])
        typed = [str(next(tmp_path.glob('text_*/001.png'))) if part == 'LIKE' else part for part in typed]
        read = names_read(section, monkeypatch, typed)
        unread[mode] = {action.dest for action in flags_of(section)
                        if mode in action.modes and action.dest not in read | ELSEWHERE | AT_PARSING.get(mode, set())}
    assert not any(unread.values()), unread
    capsys.readouterr()


def names_read(section, monkeypatch, typed):
    """Run a section's main.py with typed flags, and return the names of the options read after parsing."""
    parse_flags = section.parse_flags

    def parse():
        options, resumed = parse_flags()
        READ.clear()
        return Watched(**vars(options)), resumed

    with monkeypatch.context() as patch:
        patch.setattr(sys, 'argv', [section.__file__, *typed])
        patch.setattr(section, 'parse_flags', parse)
        section.main()
    return set(READ)


def table():
    """Return the table of all flags and modes of every command, as Markdown."""
    lines = []
    for name, section in SECTIONS.items():
        modes = modes_of(section)
        lines += [f'| {name} | {" | ".join(modes)} |', f'|---|{"---|" * len(modes)}']
        for action in flags_of(section):
            marks = ('used' if mode in action.modes else 'refused' for mode in modes)
            lines.append(f'| `{action.option_strings[0]}` | {" | ".join(marks)} |')
        lines.append('')
    return '\n'.join(lines)


if __name__ == '__main__':
    print(table())
