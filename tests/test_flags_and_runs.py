"""Command-line flags and run folders."""
import argparse
import errno
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from char_cnn_rnn.image_encoder import _checksums
from common import argument_types, config, flags, run
from common.errors import UserError
from common.progress import new_progress, rng_state
from data.bounded_files import read_lines
from tests.errors import one_line


def test_sentences_come_from_the_command_line_and_from_a_file(tmp_path):
    file = tmp_path / 'sentences.txt'
    file.write_bytes('\ufeffa red bird\r\n\r\n  un oiseau coloré \n'.encode())
    assert flags.read_sentences(['a crow'], str(file)) == ['a crow', 'a red bird', 'un oiseau coloré']
    file.write_bytes('a red\u2028bird\na\tcrow\x85\n'.encode())
    assert flags.read_sentences(None, str(file)) == ['a red\u2028bird', 'a crow']
    file.write_bytes(b'a red\x1ebird\n')
    assert 'control characters' in one_line(flags.read_sentences, None, str(file))
    file.write_bytes(b'a red bird\n' * 400_000)
    assert f'{file}: has more than 4,000,000 characters' in one_line(flags.read_sentences, None, str(file))
    file.write_bytes(b'\n \n')
    for texts, name in (([' '], None), (None, str(file)), (None, str(tmp_path)), (None, str(tmp_path / 'no.txt'))):
        with pytest.raises(UserError) as caught:
            flags.read_sentences(texts, name)
        assert '\n' not in str(caught.value)
    for text in ('a \udcff bird', 'a \x1b[2Jbird', 'a\0bird'):  # not UTF-8, and what a terminal would obey
        assert 'control characters, or is not valid UTF-8' in one_line(flags.read_sentences, [text], None)
    assert flags.read_sentences(['a\tred   bird', 'क्‍ष 红鸟'], None) == ['a red bird', 'क्‍ष 红鸟']
    file.write_bytes(b'\xff\xfe\x00bird')
    with pytest.raises(UserError, match='UTF-8'):
        flags.read_sentences(None, str(file))


def test_hdf5_is_preferred_to_h5(tmp_path, capsys):
    options = SimpleNamespace(data_dir=str(tmp_path), dataset='birds')
    (tmp_path / 'birds.h5').touch()
    assert flags.dataset_file(options) == str(tmp_path / 'birds.h5') and capsys.readouterr().out == ''
    (tmp_path / 'birds.hdf5').touch()
    assert flags.dataset_file(options) == str(tmp_path / 'birds.hdf5')
    said = capsys.readouterr().out
    assert said == f'{tmp_path}/birds.h5: is not read, because {tmp_path}/birds.hdf5 exists as well\n'


def test_shell_pipes_are_read_and_named_pipes_refused(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    for place in (tmp_path / 'pipe', '/dev/zero'):
        for read in (lambda path: flags.read_sentences(None, path), config._load,
                     lambda path: read_lines(path, 'give another'), lambda path: _checksums(None, path)):
            said = one_line(read, str(place))
            assert said.startswith(f'{place}: ') and 'it is a pipe or a device, not a file' in said
    reading, writing = os.pipe()
    os.write(writing, b'a red bird')
    os.close(writing)
    assert flags.read_sentences(None, f'/dev/fd/{reading}') == ['a red bird']
    os.close(reading)


@pytest.mark.parametrize('args, expected', [([], True), (['--train'], True), (['--train', 'True'], True),
                                            (['--train', 'False'], False), (['--train', 'no'], False)])
def test_boolean_flags(args, expected):
    parser = flags.argparse.ArgumentParser()
    flags.add_boolean(parser, '--train', True, 'train')
    assert parser.parse_args(args).train is expected


@pytest.mark.parametrize('args', [['--lr', '0'], ['--lr', 'nan'], ['--lr', 'inf'], ['--seed', '1' * 23],
                                  ['--batch_size', '1' * 30], ['--dataset', '../birds'], ['--model', 'a/b'],
                                  ['--dataset', ''], ['--model', '..'], ['--model', 'encoder'],
                                  ['--model', '鳥' * 50], ['--resume', ''], ['--out_dir', ''], ['--epochs', '-1'],
                                  ['--epochs', '1.5'], ['--train', 'maybe'], ['--batch_size', 'x']])
def test_values_out_of_range_are_refused(args, capsys):
    parser = flags.Parser()
    flags.add_run_flags(parser, 'text2image', 200, 256, 0.0002, 'here')
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(args)
    assert caught.value.code == 2 and args[0] in capsys.readouterr().err


def test_a_resumed_run_keeps_options_unless_typed(tmp_path, monkeypatch):
    def parse(*args):
        parser = flags.Parser()
        flags.add_run_flags(parser, 'text2image', 200, 256, 0.0002, str(tmp_path))
        monkeypatch.setattr(sys, 'argv', ['main.py', *args])
        return run.parse_options(parser, lambda options: 'resume' if options.resume else 'train')

    options, _ = parse('--epochs', '7', '--batch_size', '4', '--train', '--model', 'mine')
    folder = run.new_run(str(tmp_path), 'birds', vars(options) | {'an_option_of_old': 1})
    open(os.path.join(folder, 'mine.pt'), 'w').close()
    resumed, run_dir = parse('--resume', folder, '--epochs', '9')
    assert run_dir == folder and (resumed.epochs, resumed.batch_size, resumed.model) == (9, 4, 'mine')
    run.write_options(folder, vars(resumed))
    assert parse('--resume', folder)[0].epochs == 9
    assert run.read_options(folder) == vars(resumed)
    for broken in (str(tmp_path), str(tmp_path / 'nothing')):
        with pytest.raises(UserError, match='is not a run folder'):
            parse('--resume', broken)


def parse(folder, monkeypatch, *typed):
    parser = flags.Parser()
    flags.add_run_flags(parser, 'text2image', 200, 256, 0.0002, str(folder))
    monkeypatch.setattr(sys, 'argv', ['main.py', *map(str, typed)])
    return run.parse_options(parser, flags.mode_of)


@pytest.mark.parametrize('text, message', [
    ('[1, 2]', 'options.json: holds a list, not the options of a run'), ('3', 'holds a int'),
    ('{"epochs": ', 'options.json: cannot be read'), ('[' * 100_000, 'options.json: cannot be read'),
    ('\x00', 'options.json: cannot be read'),
    ('{"epochs": "many"}', "options.json: argument --epochs: invalid positive int value: 'many'"),
    ('{"epochs": [1, 2]}', 'options.json: a list in place of one value: remove 2'),
    ('{"epochs": {"a": 1}}', 'options.json: argument --epochs'), ('{"seed": 1e400}', 'options.json: argument --seed'),
    ('{"model": "../../x"}', 'options.json: argument --model'), ('{"data_dir": 7}', '')])
def test_stored_options_are_checked(tmp_path, monkeypatch, text, message):
    (tmp_path / 'options.json').write_text(text)
    (tmp_path / 'text2image.pt').touch()
    if message:
        assert message in one_line(parse, tmp_path, monkeypatch, '--resume', tmp_path)
    else:
        assert parse(tmp_path, monkeypatch, '--resume', tmp_path)[0].data_dir is None


def test_a_run_is_found_by_its_folder_or_checkpoint(tmp_path, monkeypatch):
    folder = run.new_run(str(tmp_path), 'birds', {'model': 'mine', 'epochs': 7})
    for name in ('x.pt', 'mine.pt'):
        open(os.path.join(folder, name), 'w').close()
    for named, model in ((folder, 'mine'), (f'{folder}/mine.pt', 'mine'), (f'{folder}/x.pt', 'x')):
        options, resumed = parse(tmp_path, monkeypatch, '--resume', named)
        assert (resumed, options.model, options.epochs, options.out_dir) == (folder, model, 7, str(tmp_path))
    assert 'is not a run folder' in one_line(parse, tmp_path, monkeypatch, '--resume', f'{folder}/y.pt')
    assert 'give a run folder' in one_line(parse, tmp_path, monkeypatch, '--resume', f'{folder}/options.json')
    for name in ('x.pt', 'mine.pt'):
        os.rename(os.path.join(folder, name), os.path.join(folder, f'of_{name}'))
    advice = f'--resume {os.path.join(folder, "of_mine.pt")}'
    assert advice in one_line(parse, tmp_path, monkeypatch, '--resume', folder)


def test_resuming_a_run_without_a_checkpoint_is_an_error(tmp_path, monkeypatch):
    folder = run.new_run(str(tmp_path), 'birds', {'model': 'mine'})
    half = os.path.join(folder, 'mine.pt.partial-12345678')
    open(half, 'w').close()
    message = one_line(parse, tmp_path, monkeypatch, '--resume', folder)
    assert message.startswith(f'{folder}: has no mine.pt') and message.endswith('start it again without --resume')
    assert not os.path.exists(half)
    open(os.path.join(folder, 'mine.pt.1'), 'w').close()  # the one before, where the newest was lost
    assert parse(tmp_path, monkeypatch, '--resume', folder)[1] == folder


def test_a_run_resumes_whatever_its_stored_train_flag(tmp_path, monkeypatch):
    folder = run.new_run(str(tmp_path), 'birds', {'train': False})
    open(os.path.join(folder, 'text2image.pt'), 'w').close()
    assert parse(tmp_path, monkeypatch, '--resume', folder)[0].train is True
    assert parse(tmp_path, monkeypatch, '--resume', folder, '--train', 'False')[0].train is False


def test_only_training_runs_resume(tmp_path, monkeypatch):
    drawing = run.new_run(str(tmp_path), 'text', {'train': False, 'text': ['a crow', 'a wren']})
    assert 'no training; give the folder of a run' in one_line(parse, tmp_path, monkeypatch, '--resume', drawing)
    folder = run.new_run(str(tmp_path), 'birds', {'train': True})
    os.makedirs(os.path.join(folder, 'text2image.pt'))
    assert 'text2image.pt: is a folder, not' in one_line(parse, tmp_path, monkeypatch, '--resume', folder)


def test_an_unreadable_folder_is_a_one_line_error(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(errno.EACCES, 'Permission denied')

    monkeypatch.setattr(os, 'listdir', refuse)  # which root may always
    assert 'cannot be listed (Permission denied)' in one_line(run.find_run, str(tmp_path), 'a.pt')


@pytest.mark.parametrize('name', ['WORLD_SIZE', 'RANK', 'LOCAL_RANK'])
def test_invalid_numbers_of_torchrun_are_an_error(name):
    numbers = {'WORLD_SIZE': '2', 'RANK': '0', 'LOCAL_RANK': '0', name: 'abc', 'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run([sys.executable, os.path.join(flags.ROOT, 'text2image', 'main.py'), '--train'],
                          env=os.environ | numbers, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and f'{name}=abc' in done.stderr


def test_a_run_stopped_before_its_first_step_resumes():
    run.check_resumable('a run', SimpleNamespace(progress=new_progress() | {'rng': rng_state()}))
    one_line(run.check_resumable, 'a run', SimpleNamespace(progress=new_progress()), match='holds weights alone')


def test_an_unwritable_run_is_a_one_line_error(tmp_path):
    folder = run.new_run(str(tmp_path), 'birds', {})
    os.makedirs(os.path.join(folder, 'lock'))  # what a folder without write permission does to others than root
    assert 'lock: cannot be written' in one_line(run.lock, folder)
    os.remove(os.path.join(folder, 'options.json'))
    os.makedirs(os.path.join(folder, 'options.json', 'x'))
    assert 'options.json: cannot be written' in one_line(run.write_options, folder, {})


def test_runs_never_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run.time, 'strftime', lambda form: '20250102_030405')
    folders = [run.new_run(str(tmp_path), 'birds', {'epochs': k, 'text': ['é']}) for k in range(3)]
    name = str(tmp_path / 'birds_20250102_030405')
    assert folders == [name, f'{name}_1', f'{name}_2']
    assert [run.read_options(folder)['epochs'] for folder in folders] == [0, 1, 2]
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='--out_dir'):
        run.new_run(str(tmp_path / 'file'), 'birds', {})


def test_the_newest_run_is_the_one_trained_last(tmp_path):
    with pytest.raises(UserError, match='train one first'):
        run.find_run(str(tmp_path / 'nothing'), 'a.pt')
    for age, name in enumerate(['birds_20250103_000000', 'birds_20250102_000000_1', 'birds_more_20250101_000000']):
        os.makedirs(tmp_path / name)
        (tmp_path / name / 'a.pt').touch()
        os.utime(tmp_path / name / 'a.pt', (100 + age, 100 + age))
    os.makedirs(tmp_path / 'eval_20260101_000000')
    assert run.find_run(str(tmp_path), 'a.pt') == str(tmp_path / 'birds_more_20250101_000000')
    assert run.find_run(str(tmp_path), 'a.pt', dataset='birds') == str(tmp_path / 'birds_20250102_000000_1')
    with pytest.raises(UserError, match='no run of --dataset fish with a a.pt'):
        run.find_run(str(tmp_path), 'a.pt', dataset='fish')


def test_of_two_runs_that_on_the_data_of_data_dir_is_taken(tmp_path, capsys):
    runs = {}
    for age, (name, data_dir) in enumerate({'moved': str(tmp_path / 'data'), 'default': None, 'newer': '/b'}.items()):
        runs[name] = run.new_run(str(tmp_path), 'birds', {'dataset': 'birds', 'data_dir': data_dir})
        (tmp_path / runs[name] / 'a.pt').touch()
        os.utime(tmp_path / runs[name] / 'a.pt', (100 + age, 100 + age))
    for given, expected in {None: 'newer', '/b': 'newer', f'{tmp_path}/other/../data': 'moved',
                            os.path.join(flags.ROOT, 'data', 'birds'): 'default'}.items():
        assert run.find_run(str(tmp_path), 'a.pt', data_dir=given, dataset='birds') == runs[expected]
    assert not capsys.readouterr().out
    assert run.find_run(str(tmp_path), 'a.pt', data_dir='/c') == runs['newer']
    assert capsys.readouterr().out == f'{tmp_path}: no run on data in /c; taking {runs["newer"]}\n'


@pytest.mark.parametrize('options, age, is_named', [
    ({}, 200, True), ({'dataset': 'fish'}, 200, False), ({'train': False}, 200, False), ({'model': 'b'}, 200, False),
    ({}, 50, False)])
def test_a_newer_run_without_a_checkpoint_is_named(tmp_path, capsys, options, age, is_named):
    older, newer = (run.new_run(str(tmp_path), 'birds', {'dataset': 'birds', 'train': True, 'model': 'a'} | more)
                    for more in ({}, options))
    (tmp_path / older / 'a.pt').touch()
    os.utime(tmp_path / older / 'a.pt', (100, 100))
    os.utime(tmp_path / newer / 'options.json', (age, age))
    assert run.find_run(str(tmp_path), 'a.pt', dataset='birds') == older
    assert capsys.readouterr().out == is_named * (
        f'{newer}: has no a.pt (its training ended before the first one, or has not reached it yet); taking the older '
        f'run {older}\n')


def test_a_run_killed_before_its_first_file_is_named(tmp_path, monkeypatch):
    folder = run.new_run(str(tmp_path), 'birds', {'model': 'mine'})
    os.replace(os.path.join(folder, 'options.json'), os.path.join(folder, 'options.json.partial-12345678'))
    message = one_line(parse, tmp_path, monkeypatch, '--resume', folder)
    assert message.startswith(f'{folder}: the run ended before its first file') and 'start it again without' in message
    assert os.listdir(folder) == []


def test_a_run_with_odd_options_hides_no_other(tmp_path):
    for name, age in (('good', 1000), ('pipe', 2000), ('large', 3000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'mine.pt').write_bytes(b'')
        os.utime(tmp_path / name / 'mine.pt', (age, age))
    (tmp_path / 'good' / 'options.json').write_text('{"dataset": "birds"}')
    (tmp_path / 'large' / 'options.json').write_text(f'{{"dataset": "birds", "a": [{"[]," * 10 ** 6}1]}}')
    os.mkfifo(tmp_path / 'pipe' / 'options.json')
    assert run.find_run(str(tmp_path), 'mine.pt', dataset='birds') == str(tmp_path / 'good')
    assert 'it is a pipe or a device' in one_line(run.read_options, str(tmp_path / 'pipe'))
    assert 'it has more than' in one_line(run.read_options, str(tmp_path / 'large'))


def test_a_run_is_locked_by_one_process(tmp_path, monkeypatch):
    fcntl = pytest.importorskip('fcntl')
    script = 'import sys; from common import run; run.lock(sys.argv[1]); print("mine", flush=True); sys.stdin.read()'
    with subprocess.Popen([sys.executable, '-c', script, tmp_path], cwd=flags.ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == 'mine\n'
        with pytest.raises(UserError, match='another process is training in it'):
            run.lock(str(tmp_path))
        other.communicate()
    run.lock(str(tmp_path))

    def without_locks(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(fcntl, 'lockf', without_locks)  # as on some network file systems
    run.lock(str(tmp_path))


@pytest.mark.parametrize('data_dir, dataset, message', [
    (None, 'birds.hdf5', '--dataset birds.hdf5: give the name without its ending, birds'),
    ('FILE', 'birds', 'is a file; give its folder')])
def test_the_file_in_place_of_its_name_or_folder(tmp_path, data_dir, dataset, message):
    (tmp_path / 'birds.hdf5').touch()
    data_dir = str(tmp_path / 'birds.hdf5') if data_dir else str(tmp_path)
    assert message in one_line(flags.dataset_file, SimpleNamespace(data_dir=data_dir, dataset=dataset))


def test_the_home_folder_in_a_path(monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    assert (flags.path('~/runs'), flags.absolute_path('~/runs')) == ('/home/me/runs', '/home/me/runs')


def test_fractions_are_below_one():
    assert argument_types.fraction('0.999') == 0.999 and argument_types.fraction('0') == 0
    for text in ('1', '-0.1', 'nan', 'inf'):
        with pytest.raises(argparse.ArgumentTypeError):
            argument_types.fraction(text)


def test_numbers_can_have_a_limit():
    assert flags.up_to(100)('100') == 100
    for text in ('0', '101', '2147483647'):
        with pytest.raises(argparse.ArgumentTypeError, match='is not between 1 and 100'):
            flags.up_to(100)(text)


def test_a_run_without_a_checkpoint_is_called_that(tmp_path):
    folder = run.new_run(str(tmp_path), 'birds', {'model': 'text2image'})
    (tmp_path / folder / run.ENCODER).touch()
    with pytest.raises(UserError, match=f'^{folder}: is a run without a checkpoint: it has no text2image.pt, as its'):
        run.existing(folder, 'text2image')
    (tmp_path / folder / 'other.pt').touch()
    with pytest.raises(UserError, match=f'^{folder}: is a run, but not of this section or --model: it has no text2'):
        run.existing(folder, 'text2image')


def test_a_file_called_newest_is_not_the_newest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = run.new_run(str(tmp_path / 'out'), 'birds', {})
    (tmp_path / folder / 'x.pt').touch()
    (tmp_path / 'newest').touch()
    parser = argparse.ArgumentParser()
    parser._actions = []
    for named, expected in ((flags.NEWEST, folder), ('newest', None)):
        options = SimpleNamespace(resume=named, out_dir=str(tmp_path / 'out'), model='x')
        if expected:
            assert run._run_to_resume(parser, options) == (expected, None)
        else:
            with pytest.raises(UserError, match='--resume newest: is not a checkpoint'):
                run._run_to_resume(parser, options)


def test_too_many_images_are_refused():
    with pytest.raises(UserError, match='--count 60000: 120,000 images for 2 sentences; a command generates at most'):
        flags.repeated(['a', 'b'], None, 60_000)


@pytest.mark.parametrize('script', ['text2image/main.py', 'data/birds/prepare.py', 'evaluation/compare.py',
                                    'common/runs.py', 'word2vec/main.py'])
def test_a_command_starts_through_a_link(script, tmp_path):
    os.symlink(os.path.join(flags.ROOT, script), tmp_path / 'command.py')
    done = subprocess.run([sys.executable, 'command.py', '--help'], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '') and 'usage: ' in done.stdout
