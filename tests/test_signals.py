"""Ctrl-C, SIGTERM and a closed terminal at any moment of a command, and output that cannot be written."""
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from common import ranks, signals, training_run
from common.errors import CannotWrite, run_command
from common.locks import lock_file
from tests.small_training import EPOCHS, make_dataset, new_model
from tests.states import assert_same, everything

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ['text2image/main.py', 'stackgan_v1/main.py', 'stackgan_v2/main.py', 'char_cnn_rnn/main.py',
            'word2vec/main.py', 'data/birds/prepare.py', 'data/flowers/prepare.py', 'data/folder/prepare.py',
            'data/toy_birds/prepare.py', 'benchmarks/dataset_speed.py', 'benchmarks/eval_speed.py',
            'benchmarks/precision_quality.py', 'benchmarks/train_speed.py', 'benchmarks/word2vec_gensim.py']
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
PATIENCE = 60  # seconds, for a machine that is busy with other things


def start(*command, said='ready', prepare=None, **options):
    """Start a Python process that does not ignore SIGINT, and return it once it has printed the line `said`."""
    def prepare_all():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if prepare:
            prepare()

    options['env'] = os.environ | {'PYTHONPATH': str(ROOT)} | options.get('env', {})
    process = subprocess.Popen([sys.executable, *command], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=prepare_all, **options)
    assert process.stdout.readline() == f'{said}\n'
    return process


def script(body, imports='import os, sys, time'):
    """Return a command whose `main` is `body`."""
    return ['-c', f'{imports}\nfrom common.errors import UserError, run_command\ndef main():\n'
                  f'{textwrap.indent(textwrap.dedent(body), "    ")}\nrun_command(main)']


def end_of(process, *numbers):
    """Send signals, some time apart, and return (exit status, stderr)."""
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.3)
    _, said = process.communicate(timeout=PATIENCE)
    return process.returncode, said


@pytest.fixture(scope='module')
def slow_imports(tmp_path_factory):
    """Return a folder of packages that take an hour to import."""
    folder = tmp_path_factory.mktemp('packages')
    for name in ('torch', 'numpy', 'tqdm', 'h5py', 'PIL'):
        (folder / f'{name}.py').write_text('import time\nprint("ready", flush=True)\ntime.sleep(3600)')
    return {'PYTHONPATH': str(folder)}


@pytest.mark.parametrize('command', COMMANDS)
def test_signals_during_imports_end_silently(slow_imports, command):
    for number in (signal.SIGINT, signal.SIGTERM):
        assert end_of(start(str(ROOT / command), env=slow_imports), number) == (STATUS[number], '')


@pytest.mark.parametrize('number', STATUS)
def test_a_command_cleans_up_and_ends_silently(tmp_path, number):
    left = tmp_path / 'left'
    process = start(*script(f'''
        try:
            print('ready', flush=True)
            time.sleep(3600)
        finally:
            open({str(left)!r}, 'w').close()
    '''))
    assert end_of(process, number) == (STATUS[number], '') and left.exists()


def test_a_signal_lost_in_a_destructor_is_repeated():
    process = start(*script('''
        class Slow:
            def __del__(self):
                print('ready', flush=True)
                time.sleep(2)
        Slow()
        time.sleep(3600)
    '''))
    assert end_of(process, signal.SIGINT) == (130, '')


def test_a_signal_turned_into_another_error_is_recognized():
    process = start(*script('''
        try:
            print('ready', flush=True)
            time.sleep(3600)
        except BaseException:
            raise ImportError('a library has made this of it')
    '''))
    assert end_of(process, signal.SIGTERM) == (143, '')


def test_a_second_signal_ends_a_hanging_command():
    stuck = script('''
        try:
            print('ready', flush=True)
            time.sleep(3600)
        finally:
            time.sleep(3600)
    ''')
    assert end_of(start(*stuck), signal.SIGINT, signal.SIGINT) == (130, '')


def test_torchruns_signal_after_ctrl_c_does_not_count_twice(tmp_path):
    left = tmp_path / 'left'
    process = start(*script(f'''
        try:
            print('ready', flush=True)
            time.sleep(3600)
        finally:
            time.sleep(1)
            open({str(left)!r}, 'w').close()
    '''))
    assert end_of(process, signal.SIGINT, signal.SIGTERM) == (130, '') and left.exists()


def test_nohup_is_respected():
    process = start(*script('''
        print('ready', flush=True)
        time.sleep(1)
    '''), prepare=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert end_of(process, signal.SIGHUP) == (0, '')


# --- output -----------------------------------------------------------------------------------------------------------

def run(redirection):
    """Run a command that prints a lot in a shell with a `redirection`, and return (status, stderr)."""
    command = script("for number in range(10_000): print('line', number)")
    done = subprocess.run(['bash', '-c', f'set -o pipefail; "$0" "$@" {redirection}', sys.executable, *command],
                          env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize('redirection, end', [
    ('| head -1', (141, '')), ('>&-', (0, '')), ('2>&-', (0, '')),
    ('> /dev/full', (1, 'error: standard output cannot be written (No space left on device)\n'))])
def test_unwritable_output_is_handled(redirection, end):
    assert run(redirection) == end


def test_a_lock_that_cannot_be_created_is_reported(tmp_path):
    with pytest.raises(CannotWrite, match='missing/lock: cannot be written'):
        lock_file(str(tmp_path / 'missing' / 'lock'))


# --- a training -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp('data'))


class Stuck:
    """Imitate a loader with workers that yields some batches of an epoch and then blocks for an hour."""
    num_workers = 1

    def __init__(self, loader, batches):
        self.loader, self.batches = loader, batches

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        batches = iter(self.loader)
        for number in range(len(self)):
            if number == self.batches:
                self.is_waited_for.set()
                time.sleep(3600)
            yield next(batches)


def stop_when(event):
    """Send SIGTERM once `event` is set."""
    def stop():
        event.wait(PATIENCE)
        time.sleep(1)  # until the main thread has begun to wait: nothing interrupts a system call that is yet to begin
        signals.to_main_thread(signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()


@pytest.mark.parametrize('number', STATUS)
def test_interrupted_training_ends_with_the_status_of_its_signal(dataset, tmp_path, number):
    model = new_model(dataset)
    train_step = model.train_step

    def stopped(batch):
        if model.progress['step']:
            signal.raise_signal(number)
        return train_step(batch)

    model.train_step = stopped
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: model.train(1, 1, str(tmp_path), verbose=False))
    assert ended.value.code == STATUS[number] and (tmp_path / 'text2image.pt').exists()


@pytest.mark.usefixtures('one_thread')
@pytest.mark.parametrize('batches', [0, 1])
def test_a_signal_ends_waiting_for_workers_and_the_run_resumes(dataset, tmp_path, batches):
    straight = new_model(dataset)
    straight.train(EPOCHS, verbose=False)
    model = new_model(dataset)
    model.train(1, 1, str(tmp_path), verbose=False)
    model.data_loader = Stuck(model.data_loader, batches)
    model.data_loader.is_waited_for = threading.Event()
    stop_when(model.data_loader.is_waited_for)
    with pytest.raises(KeyboardInterrupt):
        model.train(EPOCHS, 1, str(tmp_path), verbose=False)
    again = new_model(dataset, seed=9)
    again.load_from(str(tmp_path), verbose=False)
    assert (again.progress['epoch'], again.progress['batch']) == (1, batches)
    again.train(EPOCHS, verbose=False)
    assert_same(everything(again), everything(straight))


def test_a_signal_interrupts_the_first_step(dataset, tmp_path):
    model, begun = new_model(dataset), threading.Event()

    def train_step(batch):
        begun.set()
        time.sleep(3600)

    model.train_step = train_step
    stop_when(begun)
    with pytest.raises(KeyboardInterrupt):
        model.train(1, 1, str(tmp_path), verbose=False)
    assert not (tmp_path / 'text2image.pt').exists()


def test_an_interrupted_rank_waits_for_the_others(dataset, monkeypatch):
    """If it stopped alone, the others would wait for it forever."""
    monkeypatch.setattr(ranks, 'world_size', lambda: 2)
    with signals.recorded() as stop, training_run._interruptible(stop, True):
        signal.raise_signal(signal.SIGTERM)
    assert stop == [signal.SIGTERM]
