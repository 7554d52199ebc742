"""Run stackgan_v1/main.py from another folder, on tiny files, with the README's commands."""
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

from common.flags import ROOT
from common.speed import precision
from stackgan_v1 import main
from stackgan_v1.build_gan import load_generator
from stackgan_v2.build_gan import make_networks as make_tree
from tests import tiny
from tests.commands import DATA, captions_of, files_below, newest, run_in

pytestmark = pytest.mark.usefixtures('one_thread')

SCRIPT = os.path.abspath(main.__file__)
NARROW = ['--gf_dim', '8', '--df_dim', '2', '--condition_dim', '6', '--workers', '0']
TRAINING = ['--epochs', '2', '--batch_size', '2', '--log_interval', '1', *NARROW]

AUTHORS = """
CONFIG_NAME: 'stageII'

DATASET_NAME: 'coco'
EMBEDDING_TYPE: 'cnn-rnn'
GPU_ID: '0'
Z_DIM: 90
STAGE1_G: '../output/Model/netG_epoch_120.pth'
NET_G: ''
NET_D: ''
DATA_DIR: '../data/coco'
VIS_COUNT: 64
WORKERS: 4
IMSIZE: 256
STAGE: 2
TRAIN:
    FLAG: True
    BATCH_SIZE: 40
    MAX_EPOCH: 120
    LR_DECAY_EPOCH: 20
    SNAPSHOT_INTERVAL: 5
    PRETRAINED_MODEL: ''
    PRETRAINED_EPOCH: 600
    DISCRIMINATOR_LR: 0.0003
    GENERATOR_LR: 0.0003
    COEFF:
        KL: 1.5

GAN:
    CONDITION_DIM: 120
    DF_DIM: 96
    GF_DIM: 192
    R_NUM: 2

TEXT:
    DIMENSION: 1024
"""


@pytest.fixture(scope='module')
def stage1(folder):
    """Train Stage-I with the README's command, in a process of its own; return the run folder."""
    said = run_in(folder, SCRIPT, '--train', '--stage', '1', *DATA, *TRAINING, '--z_dim', '5', '--out_dir', 'out1',
                  '--precision', 'fp32')  # what it generates is almost all gray, and bf16 would round the rest away
    assert 'Training Stage-I on 4 photographs' in said
    run, = (folder / 'out1').iterdir()
    return run


@pytest.fixture(scope='module')
def stage2(folder, stage1):
    """Train Stage-II on top of `stage1`; return the run folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, 'argv', [SCRIPT, '--train', '--stage', '2', '--stage1', str(stage1), '--cuda', 'False',
                                    *DATA, *TRAINING, '--out_dir', 'out2'])
        main.main()
    run, = (folder / 'out2').iterdir()
    return run


@pytest.fixture(scope='module')
def vivid(stage2, tmp_path_factory):
    """Return a Stage-II with large weights, so that its images are not all gray as after two epochs."""
    weights = {key: value * 10 if value.dim() == 4 else value for key, value in weights_of(stage2).items()}
    run = tmp_path_factory.mktemp('vivid')
    torch.save(weights, run / 'netG_epoch_2.pth')
    shutil.copy(stage2 / 'encoder.pt', run)
    return run


def weights_of(run):
    return torch.load(run / 'stackgan_v1.pt', weights_only=True)['netG']


# --- training ---------------------------------------------------------------------------------------------------------

def test_both_stages_write_a_run_folder(stage1, stage2):
    for run, name in ((stage1, 'stageI'), (stage2, 'stageII')):
        assert re.fullmatch(rf'tiny_{name}_\d{{8}}_\d{{6}}', run.name)
        assert {'options.json', 'log.txt', 'samples', 'stackgan_v1.pt', 'encoder.pt', 'Model'} <= set(os.listdir(run))
        assert sorted(os.listdir(run / 'Model')) == ['netD_epoch_last.pth', 'netG_epoch_2.pth']
    inside, before = weights_of(stage2), weights_of(stage1)
    for key, value in before.items():
        if 'running_' not in key and 'num_batches' not in key:
            assert torch.equal(inside[f'STAGE1_G.{key}'], value)


def test_runs_resume_with_their_options(stage1, stage2, call, tmp_path):
    for run, options in ((stage1, ['--stage', '1', '--z_dim', '5', '--precision', 'fp32']),
                         (stage2, ['--stage', '2', '--stage1', stage1])):
        out = tmp_path / run.name
        call('--train', *options, *DATA, *TRAINING, '--epochs', '1', '--out_dir', out)
        said = call('--train', '--resume', '--out_dir', out, '--epochs', '2')
        assert 'step 4' in said and 'step 2 ' not in said
        resumed, straight = weights_of(newest(out, 'tiny')), weights_of(run)
        assert all(torch.equal(value, straight[key]) for key, value in resumed.items())


@pytest.mark.parametrize('stage', [1, 2])
def test_a_run_starts_from_a_checkpoint(stage1, stage2, call, tmp_path, stage):
    run = (stage1, stage2)[stage - 1]
    said = call('--train', '--stage', stage, *DATA, *TRAINING, '--z_dim', '5', '--epochs', '1', '--lr', '1e-9',
                '--checkpoint', run / 'Model', '--out_dir', tmp_path)
    assert 'loaded ' in said and 'netG_epoch_2.pth' in said
    started, before = weights_of(newest(tmp_path, 'tiny')), weights_of(run)
    for key, value in started.items():
        if 'running_' not in key and 'num_batches' not in key:
            torch.testing.assert_close(value, before[key], rtol=0, atol=1e-6)


def test_stage2_trains_on_the_authors_stage1(stage1, call, tmp_path):
    weights = {f'module.{key}': value for key, value in weights_of(stage1).items() if 'num_batches' not in key}
    torch.save(weights, tmp_path / 'netG_epoch_120.pth', _use_new_zipfile_serialization=False)
    call('--train', '--stage', '2', '--stage1', tmp_path / 'netG_epoch_120.pth', *DATA, *TRAINING, '--epochs', '1',
         '--gf_dim', '4', '--out_dir', tmp_path / 'out')  # of another width than Stage-I
    netG = load_generator(str(newest(tmp_path / 'out', 'tiny')), 'stackgan_v1', stage=2)[0].netG
    assert (netG.z_dim, netG.STAGE1_G.width, netG.encoder[0].weight.shape[0]) == (5, 8 * 8, 4)


def test_workers_ignore_signals_to_all_processes(folder, tmp_path):
    """`timeout`, schedulers and terminals also send signals to the processes that prepare images."""
    command = [sys.executable, SCRIPT, '--train', *DATA, *TRAINING, '--workers', '2', '--epochs', '10000',
               '--out_dir', tmp_path]
    training = subprocess.Popen(command, cwd=folder, start_new_session=True, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, env=os.environ | {'CUDA_VISIBLE_DEVICES': ''})
    for line in training.stdout:
        if 'epoch 2/' in line:
            os.killpg(training.pid, signal.SIGTERM)
            break
    said, _ = training.communicate(timeout=60)
    assert 'resume with: python' in said and 'Traceback' not in said and training.returncode == 143
    assert (newest(tmp_path, 'tiny') / 'stackgan_v1.pt').exists()


def test_failed_training_ends_its_workers(folder, tmp_path):
    script = ('import sys\n'
              'from common.errors import run_command\n'
              'from stackgan_v1 import build_gan, main\n'
              'build_gan.Model.train_step = lambda *_: 1 / 0\n'
              'run_command(main.main)')
    failed = subprocess.run([sys.executable, '-c', script, '--train', *DATA, *TRAINING, '--workers', '2', '--out_dir',
                             tmp_path], cwd=folder, capture_output=True, text=True, timeout=60,
                            env=os.environ | {'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': ROOT})
    assert failed.returncode == 1 and failed.stderr.endswith('ZeroDivisionError: division by zero\n')


def test_bf16_covers_every_convolution(folder, call, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, 'cpu_flags', lambda: {'avx512_bf16'})
    types, convolve = set(), torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, 'conv2d', lambda *args: types.add(
        (args[0].dtype, torch.is_autocast_enabled('cpu'))) or convolve(*args))
    out = call('--train', *DATA, *TRAINING, '--epochs', '1', '--out_dir', tmp_path)
    assert 'Computing in bf16' in out and {autocast for _, autocast in types} == {True}
    run, = tmp_path.iterdir()
    assert {value.dtype for value in weights_of(run).values()} == {torch.float32, torch.int64}
    monkeypatch.setattr(precision, 'cpu_flags', set)  # on another machine, auto is something else
    assert 'Computing in fp32' in call('--train', '--resume', run, '--epochs', '2')
    said = call.error('--train', '--resume', run, '--precision', 'bf16')
    assert '--precision bf16: this CPU does not support it' in said


# --- generating -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('stage', [1, 2])
def test_evaluation_writes_every_held_out_caption(folder, stage1, vivid, call, stage):
    run, size = ((stage1, 64), (vivid, 256))[stage - 1]
    where = ['--out_dir', 'out1'] if stage == 1 else ['--checkpoint', vivid]
    said = call('--train', 'False', *DATA, *where, '--batch_size', '4')  # of six captions
    generated = run / 'epoch2' / 'single_samples' / 'valid'
    assert 'generates images for 6 captions of /test' in said and f'done: {generated}' in said
    assert files_below(generated) == sorted(f'{name}_{size}_sentence{k}.png' for name, k in captions_of(folder))
    pictures = set()
    for name in files_below(generated):
        with Image.open(generated / name) as picture:
            assert picture.size == (size, size) and picture.mode == 'RGB'
            pictures.add(picture.tobytes())
    assert len(pictures) == 6


def test_the_newest_run_generates_images_for_sentences(folder, stage2, call):
    (folder / 'sentences.txt').write_text('un oiseau coloré\n', encoding='utf-8')
    said = call('--train', 'False', '--out_dir', 'out2', '--text', 'a red bird', '--text', 'a crow',
                '--text_file', 'sentences.txt')
    generated = newest(folder / 'out2', 'text_')
    assert f'{stage2}/stackgan_v1.pt generates images for sentences embedded by {stage2}/encoder.pt' in said
    assert '001.png  a red bird' in said and '003.png  un oiseau coloré' in said
    assert {'001.png', '002.png', '003.png', 'captions.txt', 'sheet.png', 'stages.png'} <= set(os.listdir(generated))
    with Image.open(generated / '003.png') as picture, Image.open(generated / 'stages.png') as sheet:
        assert picture.size == (256, 256) and sheet.size == (2 * 258 + 2, 3 * 258 + 2)
        assert sheet.crop((260, 2 * 258 + 2, 516, 3 * 258)).tobytes() == picture.tobytes()


def test_the_newest_run_of_a_stage_generates(stage1, stage2, call, tmp_path):
    for age, run in enumerate((stage2, stage1)):
        shutil.copytree(run, tmp_path / run.name)
        os.utime(tmp_path / run.name / 'stackgan_v1.pt', (100 + age, 100 + age))
    for stage, run in (([], stage1), (['--stage', '1'], stage1), (['--stage', '2'], stage2)):
        said = call('--train', 'False', *stage, '--text', 'a crow', '--out_dir', tmp_path)
        assert f'{tmp_path / run.name}/stackgan_v1.pt generates images' in said
    shutil.rmtree(tmp_path / stage2.name)
    assert 'no run of --stage 2 with a' in call.error('--train', 'False', '--stage', '2', '--text', 'a crow',
                                                     '--out_dir', tmp_path)


def test_many_sentences_are_generated_in_batches(vivid, call, tmp_path, monkeypatch):
    sizes, generate = [], main.Model.generate
    monkeypatch.setattr(main.Model, 'generate',
                        lambda self, embed, *more: sizes.append(len(embed)) or generate(self, embed, *more))
    call('--train', 'False', '--checkpoint', vivid, *['--text', 'a crow'] * 5, '--batch_size', '2',
         '--out_dir', tmp_path)
    pictures = [(newest(tmp_path, 'text_') / f'00{number}.png').read_bytes() for number in range(1, 6)]
    assert sizes == [2, 2, 1] and len(set(pictures)) == 5  # every batch has a noise of its own


def test_the_authors_checkpoint_generates(folder, stage1, call, tmp_path):
    torch.save(weights_of(stage1), tmp_path / 'netG_epoch_90.pth', _use_new_zipfile_serialization=False)
    said = call('--train', 'False', '--checkpoint', tmp_path / 'netG_epoch_90.pth', '--encoder', stage1 / 'encoder.pt',
                '--text', 'a crow', '--out_dir', tmp_path)
    assert f'{tmp_path}/netG_epoch_90.pth generates images for sentences embedded by {stage1}/encoder.pt' in said
    generated = newest(tmp_path, 'text_')
    assert sorted(os.listdir(generated)) == ['001.png', 'captions.txt', 'options.json', 'sheet.png']
    call('--train', 'False', '--checkpoint', tmp_path / 'netG_epoch_90.pth', *DATA)
    assert len(files_below(tmp_path / 'epoch90')) == 6


# --- configuration files ----------------------------------------------------------------------------------------------

def test_the_authors_configuration_is_accepted_unchanged(folder, call):
    (folder / 'authors.yml').write_text(AUTHORS)
    options = call.options('--cfg', 'authors.yml')
    expected = {'config_name': 'stageII', 'dataset': 'coco', 'gpu': 0, 'workers': 4, 'stage': 2, 'train': True,
                'batch_size': 40, 'epochs': 120, 'lr_decay_epoch': 20, 'snapshot_interval': 5, 'lr': 3e-4,
                'kl_coef': 1.5, 'condition_dim': 120, 'df_dim': 96, 'gf_dim': 192, 'z_dim': 90, 'residuals': 2,
                'stage1': '../output/Model/netG_epoch_120.pth', 'checkpoint': None, 'data_dir': None}
    assert {name: getattr(options, name) for name in expected} == expected
    assert options.said == ('authors.yml: these keys have no effect here and are ignored: EMBEDDING_TYPE, VIS_COUNT, '
                            'TRAIN.PRETRAINED_MODEL, TRAIN.PRETRAINED_EPOCH\n')
    os.makedirs(folder / 'code' / 'cfg')
    os.makedirs(folder / 'code' / 'output' / 'Model')
    (folder / 'code' / 'output' / 'Model' / 'netG_epoch_120.pth').touch()
    (folder / 'code' / 'cfg' / 's2.yml').write_text(AUTHORS)
    assert call.options('--cfg', 'code/cfg/s2.yml').stage1 == str(folder / 'code/output/Model/netG_epoch_120.pth')
    evaluating = AUTHORS.replace('FLAG: True', 'FLAG: False').replace("NET_G: ''", "NET_G: 'x.pth'").replace(
        "NET_D: ''", "NET_D: 'y.pth'").replace("GPU_ID: '0'", "GPU_ID: '1,2'").replace("'../data/coco'", "'data'")
    (folder / 'authors.yml').write_text(evaluating)
    options = call.options('--cfg', 'authors.yml', '--batch_size', '7')
    assert (options.train, options.checkpoint, options.gpu, options.batch_size) == (False, 'x.pth', 1, 7)
    assert options.data_dir == str(folder / 'data') and 'NET_D' in options.said and 'GPU_ID 2' in options.said
    first = re.sub(r'.*(STAGE1_G|STAGE:|BATCH_SIZE|LR_DECAY|SNAPSHOT|KL|R_NUM).*\n|.*COEFF:\n', '', AUTHORS)
    (folder / 'authors.yml').write_text(first.replace('256', '64'))
    options = call.options('--cfg', 'authors.yml')
    assert (options.stage, options.batch_size, options.lr_decay_epoch, options.snapshot_interval, options.kl_coef,
            options.residuals) == (1, 64, 600, 50, 2.0, 4)  # their defaults


SHIPPED = {'birds_s1': ('birds', 1, 600, 50, 64, 128, 64), 'birds_s2': ('birds', 2, 600, 100, 64, 128, 64),
           'coco_s1': ('coco', 1, 120, 20, 128, 192, 96), 'coco_s2': ('coco', 2, 120, 20, 40, 192, 96)}


def test_the_files_in_cfg_are_accepted(call):
    assert sorted(os.listdir(os.path.join(main.HERE, 'cfg'))) == sorted(f'{name}.yml' for name in SHIPPED)
    for name, expected in SHIPPED.items():
        options = call.options('--cfg', f'cfg/{name}.yml', *(['--stage1', 'a'] if name.endswith('2') else []))
        assert (options.dataset, options.stage, options.epochs, options.lr_decay_epoch, options.batch_size,
                options.gf_dim, options.df_dim) == expected
        assert options.residuals == (2 if name == 'coco_s2' else 4)
        assert (options.lr, options.kl_coef, options.train, options.said) == (2e-4, 2.0, True, '')


def test_defaults_are_the_authors_for_birds(call):
    for stage, decay in ((1, 50), (2, 100)):
        options = call.options('--train', '--stage', stage, *(['--stage1', 'a'] if stage == 2 else []))
        assert (options.epochs, options.batch_size, options.lr, options.lr_decay_epoch) == (600, 64, 2e-4, decay)
    assert call.options('--train').stage == 1 and call.options('--train', 'False').stage is None


# --- errors -----------------------------------------------------------------------------------------------------------

def test_other_data_is_refused_before_its_photographs_are_decoded(stage1, call, tmp_path):
    tiny.make(tmp_path / 'birds.hdf5')
    said = call.error('--train', '--resume', stage1, '--epochs', '3', '--data_dir', tmp_path, '--dataset', 'birds')
    assert (f'{stage1}: was trained on different captions and pictures and embeddings from those that birds.hdf5 holds '
            'now') in said
    assert 'train/index.json' in files_below(tmp_path / 'birds.cache')
    assert not any('frames' in name for name in files_below(tmp_path / 'birds.cache'))


def test_errors_say_what_to_do(folder, stage1, stage2, call, tmp_path):
    assert 'add --train False' in call.error('--text', 'a red bird')
    second = ['--train', '--stage', '2', *DATA, *TRAINING, '--out_dir', 'none']
    assert 'name its run with --stage1' in call.error(*second)
    assert 'add --stage 2' in call.error('--train', '--stage1', stage1)
    for flags in (['--train', *DATA], ['--train', '--resume', stage1]):
        assert '--residuals: is not used in Stage-I' in call.error(*flags, '--residuals', '3')
    shutil.copytree(stage1, tmp_path / 'run')
    (tmp_path / 'run' / 'options.json').write_text('{"stage": [1]}')
    assert 'not a run of StackGAN' in call.error('--train', '--resume', tmp_path / 'run')
    assert '--batch_size 1: a batch of one' in call.error('--train', *DATA, *TRAINING, '--batch_size', '1', '--out_dir',
                                                          'none')
    assert '--batch_size 1: a batch of one' in call.error('--train', '--resume', stage1, '--batch_size', '1')
    assert 'nowhere: no such checkpoint here; give a run folder' in call.error(*second, '--stage1', 'nowhere')
    assert 'holds a Stage-II generator, but Stage-I is asked for' in call.error(*second, '--stage1', stage2)
    assert 'holds a Stage-I generator, but Stage-II is asked for' in call.error(*second, '--checkpoint', stage1)
    assert 'a run of Stage-I; leave out --stage 2' in call.error(*second[:-2], '--resume', stage1)
    assert '--out_dir: is not used with --resume RUN' in call.error(*second, '--resume', stage1)
    assert '--out_dir: is not used in an evaluation of a given run' in call.error(
        '--train', 'False', *DATA, '--checkpoint', stage1, '--out_dir', 'none')
    said = call.error('--train', *DATA, *TRAINING, '--gf_dim', '16', '--out_dir', 'none', '--checkpoint', stage1)
    assert 'does not fit Stage1Generator: ' in said
    assert 'for a training the networks and widths that it was trained with' in said
    assert 'was trained with 5; leave out --z_dim' in call.error(*second, '--stage1', stage1, '--z_dim', '9')
    assert 'too narrow; give 4 or more' in call.error(*second, '--stage1', stage1, '--gf_dim', '3')
    assert 'data/birds/prepare.py --cub' in call.error('--train', '--data_dir', 'nowhere', '--out_dir', 'none')
    generate = ['--train', 'False', '--text', 'a crow', '--out_dir', 'none']
    tree, _ = make_tree(branches=2, gf_dim=4, df_dim=4)
    torch.save(tree.state_dict(), tmp_path / 'netG_1.pth')
    for wrong in (tmp_path / 'netG_1.pth', stage1 / 'encoder.pt', stage1 / 'Model' / 'netD_epoch_last.pth'):
        assert f'{wrong}: holds no generator of StackGAN' in call.error(*generate, '--checkpoint', wrong)
    assert 'holds a Stage-I generator' in call.error(*generate, '--stage', '2', '--checkpoint', stage1)
    assert 'no run with a stackgan_v1.pt' in call.error(*generate)
    assert 'no run of --dataset tiny' in call.error('--train', 'False', *DATA, '--out_dir', 'none')
    for text, message in [('stge: 2', "unknown key 'stge'; did you mean 'stage'?"),
                          ('NETG: x', "did you mean 'NET_G'?"),
                          ('{STAGE: 2, IMSIZE: 64}', 'IMSIZE is 64, but can only be 256 here'),
                          ('TEXT: {DIMENSION: 300}', 'can only be 1024'),
                          ('TRAIN: {GENERATOR_LR: 1, DISCRIMINATOR_LR: 2}', 'learn at one rate')]:
        (folder / 'wrong.yml').write_text(text)
        error = call.error('--cfg', 'wrong.yml')
        assert error.startswith('error: wrong.yml: ') and message in error, text
    assert not (folder / 'none').exists()
