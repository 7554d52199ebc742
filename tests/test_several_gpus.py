"""Training in two processes, as torchrun starts them, with Gloo on a CPU."""
import os
import re
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from char_cnn_rnn import main as encoder_main
from common import ranks
from common.errors import UserError
from common.flags import choose_device
from common.progress import new_progress
from common.training_run import adapt_progress
from data.multiscale_dataset import shuffled_batches
from stackgan_v2 import main
from tests import tiny, two_ranks
from tests.commands import DATA, files_below, newest
from tests.two_ranks import diverge_second, end_second, end_second_at_once, stop_second

pytestmark = pytest.mark.usefixtures('one_thread')

SHARE = 4  # photographs, of 9, that each of two ranks trains on in an epoch
NARROW = ['--gf_dim', 4, '--df_dim', 4, '--z_dim', 5, '--workers', 0]
SHAPES = {'text2image': [], 'stackgan_v1': [*NARROW, '--condition_dim', 6, '--accumulate', 2],
          'stackgan_v2': [*NARROW, '--embedding_dim', 6, '--branches', 1, '--snapshot_interval', 2]}
TRAINING = ['--epochs', 2, '--batch_size', 2, '--log_interval', 1, '--precision', 'fp32']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Return a folder as for other tests, with more photographs."""
    return tiny.with_encoder(tmp_path_factory.mktemp('ranks'),
                             {'train': {'001.Auk': 4, '002.Jay': 5}, 'test': {'004.Wren': 1, '005.Lark': 2}})


def train(folder, *args, chapter='stackgan_v2', at_step=None):
    return two_ranks.train(folder, chapter, *DATA, *TRAINING, *SHAPES[chapter], *args, at_step=at_step)


def as_rank(monkeypatch, rank, of):
    for name, value in (('RANK', rank), ('LOCAL_RANK', rank), ('WORLD_SIZE', of)):
        monkeypatch.setenv(name, str(value))


def items_of(seen, epoch):
    """Return the items that a rank trained on in an epoch."""
    return [item for its_epoch, items in seen['items'] if its_epoch == epoch for item in items]


def read(folder, name):
    return (folder / name).read_text(encoding='utf-8')


# --- a training, start to end -----------------------------------------------------------------------------------------

@pytest.fixture(scope='module', params=[*two_ranks.CHAPTERS, 'improved'])
def together(request, folder):
    """Return what two ranks of a section, or of text2image's improved recipe, have recorded and written."""
    before = files_below(folder)
    chapter, recipe = (('text2image', ['--recipe', 'improved']) if request.param == 'improved' else (request.param, []))
    (status, first), (other_status, second) = train(folder, '--out_dir', 'out', *recipe, chapter=chapter)
    assert (status, other_status) == (0, 0), read(folder, 'error_0.txt') + read(folder, 'error_1.txt')
    left = SimpleNamespace(chapter=chapter, repeats=2 if recipe else 1, first=first, second=second,
                           run=newest(folder / 'out', 'tiny'), said=read(folder, 'said_0.txt'),
                           files=sorted({*files_below(folder)} - {*before}))
    yield left
    shutil.rmtree(folder / 'out')


def test_gradients_are_averaged_and_weights_stay_equal(together):
    first, second = together.first, together.second
    assert len(first['gradients']) == len(first['means']) == 2  # of the discriminator, and of the generator
    for own, others, means, others_means in zip(*(seen[name] for name in ('gradients', 'means')
                                                  for seen in (first, second))):
        assert len(own) == len(others) == len(means) == len(others_means) > 0
        assert not all(map(torch.equal, own, others))
        assert all(map(torch.equal, means, others_means))
        for one, other, mean in zip(own, others, means):
            torch.testing.assert_close(mean, (one + other) / 2)
    assert len(first['weights']) > 4 and all(map(torch.equal, first['weights'], second['weights']))


def test_ranks_split_every_epoch_and_sample_different_noise(together):
    first, second = together.first, together.second
    for epoch in (0, 1):
        shares = items_of(first, epoch), items_of(second, epoch)
        count = 2 * SHARE if together.chapter == 'text2image' else SHARE  # an item for each caption
        assert len(shares[0]) == len(shares[1]) == count
        assert len({*shares[0], *shares[1]}) == 2 * count // together.repeats
    assert items_of(first, 0) != items_of(first, 1)
    noise = [noise for seen in (first, second) for noise in seen['noise']]
    assert len({tuple(one.flatten().tolist()) for one in noise}) == len(noise)


def test_only_rank_0_writes_and_prints(together, folder):
    assert os.listdir(folder / 'out') == [together.run.name]
    assert read(folder, 'said_1.txt') == ''
    assert re.search(r'^  batch_size +2$', together.said, re.MULTILINE) and together.said.count('done: ') == 1
    assert all(file.startswith((f'out/{together.run.name}/', 'data/', 'rank_', 'said_', 'error_'))
               for file in together.files)
    log = [line for line in read(together.run, 'log.txt').splitlines() if line.startswith('epoch')]
    assert len(log) == len(together.first['items'])
    for line, own, other in zip(log, together.first['losses'], together.second['losses']):
        assert f'  loss_G {(own + other) / 2:.4f}  ' in line
    left = {name.split('.')[0] for name in os.listdir(together.run)} - {'Model'}
    assert left == {'options', 'log', 'events', 'samples', 'sample_captions', 'index', 'encoder', 'lock',
                    together.chapter}
    assert len([name for name in os.listdir(together.run) if name.startswith('events')]) == 1
    saved = torch.load(together.run / f'{together.chapter}.pt', weights_only=True)
    ours = {tuple(weight.flatten()[:50].tolist()) for weight in together.first['weights']}
    assert {tuple(weight.flatten()[:50].tolist()) for name, weight in saved['netG'].items()
            if name.endswith('weight')} <= ours
    assert (saved['progress']['epoch'], saved['progress']['world_size']) == (2, 2)


# --- interruptions ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def stopped(folder):
    """Return the run of two ranks, the second of which was told to stop, and their records."""
    ends = train(folder, '--out_dir', 'stopped', at_step=stop_second)
    return SimpleNamespace(run=newest(folder / 'stopped', 'tiny'), said=read(folder, 'said_0.txt'), ends=ends)


@pytest.fixture
def copy(stopped, tmp_path):
    """Return a copy of that run to resume."""
    return shutil.copytree(stopped.run, tmp_path / stopped.run.name)


def progress_of(run):
    return torch.load(run / 'stackgan_v2.pt', weights_only=True)['progress']


def test_a_signal_to_one_rank_stops_all_after_the_same_step(stopped):
    assert [status for status, _ in stopped.ends] == [130, 143]  # the second alone got a SIGTERM
    assert [len(seen['items']) for _, seen in stopped.ends] == [3, 3]
    assert f'stopped after step 3; resume with: torchrun ... {os.path.abspath(main.__file__)} --train' in stopped.said
    progress = progress_of(stopped.run)
    assert (progress['epoch'], progress['batch'], progress['step']) == (1, 1, 3)
    assert all(seen['ended'] > os.path.getmtime(stopped.run / 'stackgan_v2.pt') for _, seen in stopped.ends)


def test_two_ranks_resume_the_rest_of_the_epoch(stopped, copy, folder):
    (status, first), (other_status, second) = train(folder, '--resume', copy)
    assert (status, other_status) == (0, 0)
    before = [item for _, seen in stopped.ends for item in items_of(seen, 1)]
    after = items_of(first, 1) + items_of(second, 1)
    assert len(before) == len(after) == 4 and len({*before, *after}) == 8
    assert all(map(torch.equal, first['weights'], second['weights']))
    assert progress_of(copy)['step'] == 4


def test_one_process_and_two_ranks_resume_each_others_runs(copy, folder, call, tmp_path):
    runs = [shutil.copytree(copy, tmp_path / name) for name in ('a', 'b')]
    for run in runs:
        call('--resume', run)
        progress = progress_of(run)  # 1 of 2 batches becomes 2 of 4
        assert (progress['epoch'], progress['step'], progress['world_size']) == (2, 5, 1)
    alone = [torch.load(run / 'stackgan_v2.pt', weights_only=True)['netG'] for run in runs]
    assert all(torch.equal(value, alone[1][name]) for name, value in alone[0].items())

    run = shutil.copytree(runs[0], tmp_path / 'c')  # this process keeps the lock of the first
    (status, first), (other_status, second) = train(folder, '--resume', run, '--epochs', 3)
    assert (status, other_status) == (0, 0)
    assert len({*items_of(first, 2), *items_of(second, 2)}) == 2 * SHARE
    assert all(map(torch.equal, first['weights'], second['weights']))
    assert (progress_of(run)['step'], progress_of(run)['world_size']) == (7, 2)


def test_a_non_finite_loss_on_one_rank_stops_all(folder):
    ends = train(folder, '--out_dir', 'diverged', at_step=diverge_second)
    assert [status for status, _ in ends] == [1, 1]
    assert 'error: loss_G is nan at step 3: training has diverged' in read(folder, 'error_0.txt')
    assert not (newest(folder / 'diverged', 'tiny') / 'stackgan_v2.pt').exists()


@pytest.mark.parametrize('end', [end_second, end_second_at_once])
def test_a_rank_reports_a_dead_partner_and_ends(folder, end):
    ends = train(folder, '--out_dir', 'alone', at_step=end)
    assert [status for status, _ in ends] == [1, 9]
    said = read(folder, 'error_0.txt')
    assert said.startswith('error: process 0 of 2 gave up waiting for another, which has ended or ')
    assert said.count('\n') == 1


# --- torchrun itself --------------------------------------------------------------------------------------------------

def steps_in(out_dir):
    """Return the log lines about steps in this folder."""
    return sum(line.startswith('epoch') for log in out_dir.glob('*/log.txt')
               for line in log.read_text(encoding='utf-8').splitlines())


def ended_by(act, folder, out_dir, *args):
    """Run a training under torchrun, call `act(torchrun)` after some steps, and return (exit status, output)."""
    before, begun = steps_in(out_dir), time.monotonic()
    args = [*DATA, *TRAINING, *SHAPES['stackgan_v2'], '--epochs', 100_000, *args]
    with two_ranks.torchrun(folder, *args) as started:
        while steps_in(out_dir) < before + 3:
            assert started.poll() is None and time.monotonic() - begun < two_ranks.PATIENCE
            time.sleep(0.1)
        act(started)
        said, _ = started.communicate(timeout=90)
    return started.returncode, said


def test_torchrun_ends_on_signals_and_dead_ranks(folder, tmp_path):
    _, said = ended_by(lambda started: started.send_signal(signal.SIGTERM), folder, tmp_path, '--out_dir', tmp_path)
    stopped_after = int(re.search(r'^stopped after step (\d+); resume with: ', said, re.MULTILINE)[1])
    run, = tmp_path.iterdir()
    assert progress_of(run)['step'] == stopped_after

    status, said = ended_by(lambda _: os.kill(int(read(folder, 'pid_1')), signal.SIGKILL), folder, tmp_path,
                            '--resume', run)
    assert status != 0 and 'SIGKILL' in said
    assert progress_of(run)['step'] == stopped_after


def test_ranks_save_and_end_when_torchrun_is_killed(folder, tmp_path):
    _, said = ended_by(lambda started: started.kill(), folder, tmp_path, '--out_dir', tmp_path)
    run, = tmp_path.iterdir()
    assert 'torchrun has ended: stopping its processes on this machine' in said and 'Traceback' not in said
    assert progress_of(run)['step'] == int(re.search(r'^stopped after step (\d+)', said, re.MULTILINE)[1])


# --- one process at a time --------------------------------------------------------------------------------------------

class Items(list):
    """Imitate a data set as far as a loader needs it before the first batch."""
    finish = None


@pytest.mark.parametrize('items', [8, 9, 10, 11])
@pytest.mark.parametrize('world_size', [2, 3])
def test_the_parts_of_ranks_are_disjoint_equal_and_complete(monkeypatch, items, world_size):
    shares = {}
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        torch.manual_seed(1)
        batches = shuffled_batches(Items(range(items)), 2, 0, torch.device('cpu'))
        for epoch in range(4):
            batches.sampler.set_epoch(epoch)
            shares[epoch, rank] = [number for batch in batches.batch_sampler for number, _ in batch]
    whole = items // world_size // 2 * 2
    for epoch in range(4):
        own = [shares[epoch, rank] for rank in range(world_size)]
        assert [len(share) for share in own] == [whole] * world_size
        assert len(set(sum(own, []))) == whole * world_size
    assert len({tuple(shares[epoch, 0]) for epoch in range(4)}) == 4


def test_random_numbers_depend_on_seed_rank_and_step(monkeypatch):
    def drawn(seed, rank, step):
        as_rank(monkeypatch, rank, 2)
        torch.manual_seed(seed)
        ranks.seed_apart(step)
        return torch.rand(()).item()

    cases = [(seed, rank, step) for seed in (1, 2, -1) for rank in (0, 1) for step in (0, 3)]
    assert len({drawn(*case) for case in cases}) == len(cases)
    assert drawn(*cases[3]) == drawn(*cases[3])


def test_progress_is_recounted_for_another_number_of_ranks(monkeypatch):
    progress = new_progress() | {'batch': 5, 'world_size': 4}
    as_rank(monkeypatch, 1, 2)
    adapt_progress(progress, range(20))
    assert progress['batch'] == 10
    as_rank(monkeypatch, 0, 3)
    adapt_progress(progress, range(20))
    assert progress['batch'] == 6
    as_rank(monkeypatch, 0, 1)
    adapt_progress(progress, range(17))
    assert progress['batch'] == 17


@pytest.mark.parametrize('before, now, batches', [(32, 32, 10), (32, 64, 5), (32, 16, 20), (32, 100, 3), (0, 64, 10)])
def test_batches_of_another_size_are_counted_anew(before, now, batches):
    progress = new_progress() | {'batch': 10, 'batch_size': before}  # 0: a checkpoint of an earlier version
    adapt_progress(progress, DataLoader(range(500), now))
    assert (progress['batch'], progress['batch_size']) == (batches, now)


def test_each_rank_uses_the_gpu_of_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda gpu: None)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)  # which is set with the device
    as_rank(monkeypatch, 1, 3)
    assert choose_device(True) == torch.device('cuda', 1) and choose_device(True, -1) == torch.device('cpu')
    as_rank(monkeypatch, 2, 3)
    with pytest.raises(UserError, match='torchrun started a process for GPU 2: there is no such GPU; this .* has 2'):
        choose_device(True)


def test_single_process_commands_refuse_torchrun(call, monkeypatch):
    as_rank(monkeypatch, 0, 2)
    assert call.error('--train', 'False') == (
        'error: --train False: runs in one process; start it with python, not with torchrun')
    call.main = encoder_main
    assert call.error(*DATA).startswith('error: the encoder runs in a single process')
    monkeypatch.delenv('LOCAL_RANK')  # a machine that numbers its jobs, but has not started several processes
    assert (ranks.world_size(), ranks.rank()) == (1, 0)
