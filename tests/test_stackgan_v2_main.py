"""Run stackgan_v2/main.py from another folder, on tiny files, with the chapter's commands."""
import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from common import run
from common.errors import UserError
from common.flags import ROOT, choose_device
from common.sampling import _file_name, write_evaluation
from data import layout
from stackgan_v2 import main
from tests import tiny
from tests.commands import DATA, captions_of, files_below, newest, run_in
from tests.errors import one_line

pytestmark = pytest.mark.usefixtures('one_thread')

SCRIPT = os.path.abspath(main.__file__)
NARROW = ['--branches', '2', '--gf_dim', '4', '--df_dim', '4', '--z_dim', '5', '--workers', '0']
WITHOUT_TEXT = ['--epochs', '2', '--batch_size', '2', '--log_interval', '1', *NARROW]
TRAINING = [*WITHOUT_TEXT, '--embedding_dim', '6']

AUTHORS = """
CONFIG_NAME: '3stages'

DATASET_NAME: 'birds'
EMBEDDING_TYPE: 'cnn-rnn'
DATA_DIR: '../data/birds'
GPU_ID: '0'
WORKERS: 4

TREE:
    BRANCH_NUM: 3
    BASE_SIZE: 64

TRAIN:
    FLAG: True
    NET_G: ''
    NET_D: ''
    BATCH_SIZE: 24
    MAX_EPOCH: 600
    VIS_COUNT: 64
    SNAPSHOT_INTERVAL: 2000
    DISCRIMINATOR_LR: 0.0002
    GENERATOR_LR: 0.0002
    COEFF:
        KL: 1.5
        UNCOND_LOSS: 0.25
        COLOR_LOSS: 3.0

GAN:
    EMBEDDING_DIM: 120
    DF_DIM: 48
    GF_DIM: 32
    Z_DIM: 90
    R_NUM: 3
    NETWORK_TYPE: 'default'
    B_CONDITION: True

TEXT:
    DIMENSION: 1024

TEST:
    B_EXAMPLE: False
    SAMPLE_NUM: 30000
"""


@pytest.fixture(scope='module')
def trained(folder):
    """Train with the chapter's command, in a process of its own."""
    said = run_in(folder, SCRIPT, '--cfg', 'cfg/birds_3stages.yml', '--gpu', '0', *DATA, *TRAINING, '--out_dir', 'out')
    run_dir, = (folder / 'out').iterdir()
    return SimpleNamespace(run=str(run_dir), stdout=said)


# --- training ---------------------------------------------------------------------------------------------------------

def test_the_chapters_command_trains(folder, trained):
    table = dict(re.findall(r'^  (\w+) +(.*)$', trained.stdout, re.MULTILINE))
    expected = {'config_name': '3stages', 'epochs': '2', 'batch_size': '2', 'gf_dim': '4', 'branches': '2',
                'conditional': 'True', 'kl_coef': '2.0', 'uncond_coef': '1.0', 'snapshot_interval': '2000'}
    assert {name: table[name] for name in expected} == expected
    assert '--cuda True, but PyTorch finds no CUDA device: using the CPU' in trained.stdout
    assert re.fullmatch(r'tiny_3stages_\d{8}_\d{6}', os.path.basename(trained.run))
    assert {'options.json', 'log.txt', 'samples', 'stackgan_v2.pt', 'encoder.pt', 'Model'} <= set(
        os.listdir(trained.run))
    assert sorted(os.listdir(os.path.join(trained.run, 'Model'))) == ['netD0.pth', 'netD1.pth', 'netG_4.pth']


def test_a_run_resumes_with_its_options(folder, trained, call, tmp_path):
    call(*DATA, *TRAINING, '--epochs', '1', '--out_dir', tmp_path)
    first = newest(tmp_path, 'tiny')
    shutil.copy(first / 'stackgan_v2.pt', tmp_path / 'kept.pt')
    said = call('--train', '--resume', '--out_dir', tmp_path, '--epochs', '2')
    assert 'step 4' in said and 'step 2 ' not in said
    shutil.copy(tmp_path / 'kept.pt', first / 'stackgan_v2.pt')  # the second epoch once more, with another snapshot
    before = (first / 'Model' / 'netG_4.pth').read_bytes()
    call('--train', '--resume', first, '--epochs', '2', '--lr', '0.01')
    assert (first / 'Model' / 'netG_4.pth').read_bytes() != before
    shutil.copy(tmp_path / 'kept.pt', first / 'kept.pt')
    said = call('--train', '--resume', first / 'kept.pt', '--epochs', '2', '--lr', '0.0002')
    assert f'{first}: continues from kept.pt, as kept.pt; stackgan_v2.pt stays as it is' in said
    (first / 'kept.pt').rename(first / 'stackgan_v2.pt')
    resumed = torch.load(newest(tmp_path, 'tiny') / 'stackgan_v2.pt', weights_only=True)
    straight = torch.load(os.path.join(trained.run, 'stackgan_v2.pt'), weights_only=True)
    for part in ('netG', 'average_G'):
        assert all(torch.equal(value, straight[part][key]) for key, value in resumed[part].items())
    assert resumed['options']['gf_dim'] == 4 and resumed['options']['dataset'] == 'tiny'


def test_a_run_starts_from_a_checkpoint(trained, call, tmp_path):
    said = call(*DATA, *TRAINING, '--epochs', '1', '--checkpoint', os.path.join(trained.run, 'Model'), '--lr', '1e-9',
                '--out_dir', tmp_path)
    assert 'loaded ' in said and 'netG_4.pth' in said
    started = torch.load(newest(tmp_path, 'tiny') / 'stackgan_v2.pt', weights_only=True)
    before = torch.load(os.path.join(trained.run, 'stackgan_v2.pt'), weights_only=True)
    assert started['progress']['step'] == 2
    torch.testing.assert_close(started['average_G'], before['average_G'], rtol=0, atol=1e-6)


@pytest.mark.parametrize('place', ['', 'Model'])
def test_branches_can_be_added_to_a_trained_tree(trained, call, tmp_path, place):
    said = call(*DATA, *TRAINING, '--branches', '3', '--epochs', '1', '--lr', '1e-9', '--out_dir', tmp_path,
                '--checkpoint', os.path.join(trained.run, place))
    assert f'loaded {trained.run}' in said and 'the tree grows from 2 to 3 branches' in said
    grown = torch.load(newest(tmp_path, 'tiny') / 'stackgan_v2.pt', weights_only=True)
    before = torch.load(os.path.join(trained.run, 'stackgan_v2.pt'), weights_only=True)
    kept = {key: value for key, value in grown['average_G'].items() if key in before['average_G']}
    torch.testing.assert_close(kept, before['average_G'], rtol=0, atol=1e-5)  # two steps nearer to the live ones
    assert {key.split('.')[0] for key in grown['average_G'].keys() - kept.keys()} == {'h_net3', 'img_net3'}
    for netD, old in zip(grown['netsD'], before['netsD']):
        torch.testing.assert_close(netD['img_code_s16.0.weight'], old['img_code_s16.0.weight'], rtol=0, atol=1e-6)
    assert len(grown['netsD']) == 3
    error = call.error('--train', '--resume', trained.run, '--branches', '3')
    assert 'has 2 of 3 branches, and a resumed run cannot add branches' in error and 'with --checkpoint' in error


# --- generating -------------------------------------------------------------------------------------------------------

def test_evaluation_writes_every_held_out_caption(folder, trained, call):
    text = (folder / 'eval.yml')
    text.write_text('train: False\nbatch_size: 4\nTRAIN:\n    NET_G: '
                    f'"{os.path.relpath(trained.run, folder)}/Model/netG_4.pth"\n')
    said = call('--cfg', 'eval.yml', '--gpu', '0', *DATA)
    generated = os.path.join(trained.run, 'Model', 'iteration4', 'single_samples', 'valid')
    assert 'generates images for 6 captions of /test' in said
    assert os.path.join('iteration4', 'single_samples', 'valid') in said
    assert files_below(generated) == sorted(f'{name}_128_sentence{k}.png' for name, k in captions_of(folder))
    pictures = set()
    for name in files_below(generated):
        with Image.open(os.path.join(generated, name)) as picture:
            assert picture.size == (128, 128) and picture.mode == 'RGB'
            pictures.add(picture.tobytes())
    assert len(pictures) == 6


def test_example_writes_a_grid_per_photograph(folder, trained, call):
    call('--cfg', 'cfg/eval_birds.yml', *DATA, '--out_dir', 'out', '--example', 'True', '--batch_size', '4')
    generated = os.path.join(trained.run, 'iteration4', 'super', 'valid')
    assert files_below(generated) == sorted({f'{name}_128.png' for name, _ in captions_of(folder)})
    for name in files_below(generated):
        with Image.open(os.path.join(generated, name)) as grid:
            assert grid.size == (2 * 130 + 2, 130 + 2)  # two captions


@pytest.mark.parametrize('name', ['A_k', 'A?k'])
def test_photographs_of_one_name_are_refused_before_anything_is_written(tmp_path, name):
    index = layout.Index(['a_0', 'b_0'], ['a bird'] * 2, [0, 1], ['A_k', name], ['bird'] * 2)
    dataset = SimpleNamespace(file='birds.hdf5', split='test', index=index, photo_of=torch.tensor(index.photo_of))
    assert one_line(write_evaluation, str(tmp_path / 'new'), dataset, None, 1, 0).startswith(
        'birds.hdf5: two photographs of /test have the class bird and the name A_k, so their images would')
    assert not os.listdir(tmp_path)


def test_images_of_other_data_stay(tmp_path, capsys):
    os.makedirs(tmp_path / 'single_samples' / 'valid' / 'other')
    index = layout.Index(['a_0'], ['a bird'], [0], ['a'], ['bird'])
    dataset = SimpleNamespace(captions=index.captions, index=index, photo_of=torch.tensor([0]),
                              embeddings=torch.zeros(1, 1024))
    write_evaluation(str(tmp_path), dataset, lambda embeddings, seed: torch.zeros(1, 3, 8, 8), 1, 0)
    assert 'valid: already exists; images of the same name are replaced, others stay' in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / 'single_samples' / 'valid')) == ['bird', 'other']


def test_names_in_a_data_file_cannot_leave_the_folder():
    names = {'../../etc': '_.._etc', '..': '_', 'a/b\\c': 'a_b_c', '001.Auk': '001.Auk'}
    assert [_file_name(name) for name in names] == list(names.values())


def test_images_are_generated_for_sentences(folder, trained, call):
    (folder / 'sentences.txt').write_text('un oiseau coloré\n', encoding='utf-8')
    said = call('--train', 'False', '--out_dir', 'out', '--text', 'a red bird', '--text', 'a crow',
                '--text_file', 'sentences.txt')
    generated = newest(folder / 'out', 'text_')
    assert f'{trained.run}/stackgan_v2.pt generates images for sentences embedded by {trained.run}/encoder.pt' in said
    assert '001.png  a red bird' in said and '003.png  un oiseau coloré' in said
    assert sorted(os.listdir(generated)) == ['001.png', '002.png', '003.png', 'branches.png', 'captions.txt',
                                         'options.json', 'sheet.png']
    with Image.open(generated / '001.png') as one, Image.open(generated / '002.png') as other:
        assert one.size == (128, 128) and one.tobytes() != other.tobytes()
    with Image.open(generated / '002.png') as picture, Image.open(generated / 'branches.png') as sheet:
        assert sheet.size == (2 * 130 + 2, 3 * 130 + 2)
        assert sheet.crop((132, 132, 260, 260)).tobytes() == picture.tobytes()


def test_snapshots_find_the_encoder_of_their_run(trained, call):
    snapshot = os.path.join(trained.run, 'Model', 'netG_4.pth')
    said = call('--train', 'False', '--out_dir', 'out', '--text', 'a crow', '--checkpoint', snapshot)
    assert f'embedded by {trained.run}/encoder.pt' in said


def test_interpolate_writes_a_strip(folder, trained, call):
    said = call('--train', 'False', '--out_dir', 'out', '--interpolate', 'a red bird', 'a crow')
    strip = newest(folder / 'out', 'interpolate_') / 'strip.png'
    assert f'from "a red bird" to "a crow": {strip}' in said
    call('--train', 'False', '--out_dir', 'ends', '--text', 'a red bird', '--checkpoint', trained.run)
    with Image.open(strip) as picture, Image.open(newest(folder / 'ends', 'text_') / '001.png') as end:
        assert picture.size == (9 * 130 + 2, 132)
        frames = [torch.tensor(list(picture.crop((2 + 130 * k, 2, 130 * k + 130, 130)).tobytes())).float()
                  for k in range(9)]
        assert (frames[0] - torch.tensor(list(end.tobytes())).float()).abs().max() <= 1
    steps = [(b - a).abs().mean() for a, b in zip(frames, frames[1:])]
    assert 0 < max(steps) < (frames[-1] - frames[0]).abs().mean()  # noise that changed would make every step a jump


# --- without text -----------------------------------------------------------------------------------------------------

def test_image_folders_train_and_generate_without_text(folder, call, tmp_path):
    for name in ('cats', 'dogs', 'other'):
        os.makedirs(tmp_path / 'pets' / name)
        for seed in range(2):
            (tmp_path / 'pets' / name / f'{seed}.jpg').write_bytes(tiny.jpeg(seed))
    os.remove(tmp_path / 'pets' / 'other' / '1.jpg')
    single = ['--image_folder', tmp_path / 'pets', '--classes', 'other', *WITHOUT_TEXT, '--out_dir', tmp_path / 'none']
    assert 'each process has only 1' in call.error(*single) and not (tmp_path / 'none').exists()
    said = call('--image_folder', tmp_path / 'pets', '--classes', 'cats', 'dogs', *WITHOUT_TEXT, '--color_coef', '50',
                '--uncond_coef', '0', '--out_dir', tmp_path / 'out')
    trained, = os.listdir(tmp_path / 'out')
    assert 'Training on 4 images' in said and 'loss_KL' not in said and trained.startswith('pets_2stages_')
    with open(tmp_path / 'out' / trained / 'options.json', encoding='utf-8') as file:
        options = json.load(file)
    assert (options['conditional'], options['dataset'], options['classes']) == (False, 'pets', ['cats', 'dogs'])
    said = call('--train', 'False', '--out_dir', tmp_path / 'out', '--count', '5', '--batch_size', '2')
    generated = newest(tmp_path / 'out', 'sample_')
    assert '5 images in ' in said
    assert sorted(os.listdir(generated)) == [*(f'0000{k}.png' for k in range(1, 6)), 'options.json', 'sheet.png']
    with Image.open(generated / '00005.png') as last, Image.open(generated / '00001.png') as first:
        assert last.size == (128, 128) and first.tobytes() != last.tobytes()
    call('--train', 'False', '--out_dir', tmp_path / 'out', '--count', '5', '--batch_size', '2', '--seed', '2')
    pngs = [*generated.glob('0*.png'), *newest(tmp_path / 'out', 'sample_').glob('0*.png')]
    assert len({Image.open(png).tobytes() for png in pngs}) == 10  # another seed gives other images in all batches
    checkpoint = ['--train', 'False', '--checkpoint', tmp_path / 'out' / trained]
    assert 'was trained without text' in call.error(*checkpoint, '--text', 'a cat')
    resume = ['--resume', tmp_path / 'out' / trained, '--epochs', '3']
    assert 'Training on 4 images' in call(*resume)
    (tmp_path / 'pets' / 'cats' / '1.jpg').write_bytes(tiny.jpeg(1, (60, 40)))
    assert 'was trained on different pictures from those that pets holds now; restore' in call.error(*resume[:-1], '4')


def test_captioned_images_train_without_text(call, tmp_path):
    said = call(*DATA, *WITHOUT_TEXT, '--epochs', '1', '--conditional', 'False', '--out_dir', tmp_path)
    assert 'Training on 4 images' in said and 'loss_KL' not in said
    assert 'encoder.pt' not in os.listdir(newest(tmp_path, 'tiny'))


# --- configuration files ----------------------------------------------------------------------------------------------

def test_typed_flags_override_the_file_and_the_file_defaults(folder, call):
    (folder / 'mine.yml').write_text('lr: 1e-3\nepochs: 7\ncuda: no\nclasses: [a, b]\nlsun: data\nencoder:\n')
    options = call.options('--cfg', 'mine.yml', '--epochs', '9')
    assert (options.lr, options.epochs, options.cuda, options.batch_size) == (1e-3, 9, False, 24)
    assert options.classes == ['a', 'b'] and options.encoder is None and options.conditional is False
    assert call.options('--cfg', 'mine.yml', '--classes', 'c', '--epochs', '9').classes == ['c']
    run_dir = run.new_run(str(folder / 'old'), 'x', {'epochs': 1, 'lr': 5, 'seed': 8})
    torch.save({}, os.path.join(run_dir, 'stackgan_v2.pt'))
    options = call.options('--cfg', 'mine.yml', '--epochs', '9', '--resume', run_dir)
    assert (options.epochs, options.lr, options.seed) == (9, 1e-3, 8)


def test_a_resumed_run_keeps_what_a_file_cannot_change(folder, call):
    run_dir = run.new_run(str(folder / 'kept'), 'x', {'seed': 8, 'config_name': 'tree'})
    torch.save({}, os.path.join(run_dir, 'stackgan_v2.pt'))
    (folder / 'again.yml').write_text('seed: 99\ncheckpoint: absent.pt\nconfig_name: tree\nepochs: 2\n')
    options = call.options('--resume', run_dir, '--cfg', 'again.yml')
    assert (options.seed, options.checkpoint, options.config_name, options.epochs) == (8, None, 'tree', 2)
    assert '--cfg: checkpoint, seed: no effect with --resume; the run keeps its own values' in options.said


def test_values_of_a_file_are_parsed_like_typed_flags(folder, call):
    (folder / 'mine.yml').write_text('epochs: 010\nbatch_size: 031\nconfig_name: on\ndataset: no\ncuda: off\n'
                                     'TRAIN: {GENERATOR_LR: 2.0e-4, DISCRIMINATOR_LR: 0.0002}\nGPU_ID:\n')
    options = call.options('--cfg', 'mine.yml')
    assert (options.epochs, options.batch_size, options.config_name, options.dataset, options.cuda, options.lr,
            options.gpu) == (10, 31, 'on', 'no', False, 2e-4, 0)


def test_classes_may_be_repeated(folder, call):
    assert call.options('--lsun', 'x', '--classes', 'a', 'b', '--classes', 'c').classes == ['a', 'b', 'c']
    run_dir = run.new_run(str(folder / 'lists'), 'x', {'lsun': 'x', 'classes': ['a', 'b']})
    torch.save({}, os.path.join(run_dir, 'stackgan_v2.pt'))
    assert call.options('--resume', run_dir).classes == ['a', 'b']
    (folder / 'mine.yml').write_text('classes: [c]')
    assert call.options('--resume', run_dir, '--cfg', 'mine.yml').classes == ['c']


def test_configuration_errors_name_the_file(folder, call):
    for text, message in [('batch_size: 24\nTRAIN: {BATCH_SIZE: 8}', 'batch_size is also set by one of the authors'),
                          ('checkpoint: a\nTRAIN: {NET_G: b}', 'checkpoint is also set by one of the authors'),
                          ('batchsize: 3', "unknown key 'batchsize'; did you mean 'batch_size'?"),
                          ('NET_G: x.pth', "unknown key 'NET_G'; did you mean 'TRAIN.NET_G'?"),
                          ('TRAIN: {NETG: x}', "unknown key 'TRAIN.NETG'"), ('resume: newest', "unknown key 'resume'"),
                          ('lr: -1', 'argument --lr: -1 is not above zero'),
                          ('lr: [1, 2]', 'a list in place of one value'), ('lr: fast', 'argument --lr'),
                          ('train: perhaps', "'perhaps' is neither True nor False"),
                          ('TREE: {BASE_SIZE: 32}', 'TREE.BASE_SIZE is 32, but can only be 64 here'),
                          ('TRAIN: {GENERATOR_LR: 1, DISCRIMINATOR_LR: 2}', 'learn at one rate'),
                          ('epochs: 0x10', "invalid positive int value: '0x10'"), ('epochs: 1:30', "value: '1:30'"),
                          ('epochs: 0o10', "value: '0o10'"), ('lr: .nan', "invalid positive float value: '.nan'"),
                          ('lr: 1.0e+400', 'is too large'), (f'epochs: {5000 * "9"}', 'argument --epochs'),
                          ('GAN: {B_CONDITION: maybe}', "B_CONDITION: 'maybe' is neither True nor False"),
                          ('train: []', 'train: the list'), ('classes: [a, --epochs, 5]', 'classes: the list'),
                          ('- lr', 'holds a list'), ('lr: [', 'cannot be read as YAML'),
                          ('lr: !!python/object/apply:os.system ["touch sprung"]', 'line 1: tags (')]:
        (folder / 'wrong.yml').write_text(text)
        error = call.error('--cfg', 'wrong.yml')
        assert error.startswith('error: wrong.yml: ') and message in error, text
    assert not (folder / 'sprung').exists()
    for place in ('no.yml', '.'):
        said = call.error('--cfg', place)
        assert said.startswith(f'error: {place}: cannot be read (')
        assert said.endswith("; --cfg takes a YAML file, such as those in the section's folder cfg")
    other = os.path.join(ROOT, 'stackgan_v1', 'cfg', 'birds_s2.yml')
    assert call.error('--cfg', other).endswith(' (a file of another section has others)')


def test_the_authors_configuration_is_accepted_unchanged(folder, call):
    (folder / 'authors.yml').write_text(AUTHORS)
    options = call.options('--cfg', 'authors.yml')
    expected = {'config_name': '3stages', 'dataset': 'birds', 'gpu': 0, 'workers': 4, 'branches': 3, 'train': True,
                'batch_size': 24, 'epochs': 600, 'snapshot_interval': 2000, 'lr': 2e-4, 'kl_coef': 1.5,
                'uncond_coef': 0.25, 'color_coef': 3.0, 'embedding_dim': 120, 'df_dim': 48, 'gf_dim': 32, 'z_dim': 90,
                'residuals': 3, 'conditional': True, 'example': False, 'count': None, 'checkpoint': None,
                'data_dir': None, 'image_folder': None}
    assert {name: getattr(options, name) for name in expected} == expected
    assert options.said.count('\n') == 1
    assert options.said.startswith('authors.yml: these keys have no effect here and are ignored: ')
    assert {'TRAIN.VIS_COUNT', 'EMBEDDING_TYPE', 'GAN.NETWORK_TYPE', 'TEST.SAMPLE_NUM'} <= set(
        re.findall(r'[A-Z._]{6,}', options.said))
    evaluating = AUTHORS.replace("GPU_ID: '0'", 'GPU_ID: -1').replace('FLAG: True', 'FLAG: False')
    (folder / 'authors.yml').write_text(evaluating)
    options = call.options('--cfg', 'authors.yml', '--batch_size', '7')
    assert (options.gpu, options.train, options.batch_size) == (-1, False, 7)
    short = re.sub(r'( +BATCH_SIZE| +UNCOND_LOSS| +KL).*\n', '', AUTHORS).replace("'../data/birds'", "'data'")
    (folder / 'authors.yml').write_text(short.replace("'0'", "'2,3'"))
    options = call.options('--cfg', 'authors.yml')
    assert (options.batch_size, options.uncond_coef, options.kl_coef) == (64, 0, 2.0)  # their defaults
    assert options.data_dir == str(folder / 'data') and options.gpu == 2 and 'GPU_ID 3' in options.said


@pytest.mark.parametrize('folder_name, expected', [
    ('../data/imagenet', {'image_folder': 'imagenet', 'lsun': None}),
    ('../data/lsun/church_outdoor_train_lmdb', {'lsun': 'lsun', 'classes': ['church_outdoor_train']}),
    ('../data/lsun', {'lsun': 'lsun', 'classes': ['church_outdoor_train']})])
def test_the_authors_configurations_without_text_are_accepted(folder, call, folder_name, expected):
    (folder / 'authors.yml').write_text(AUTHORS.replace("'../data/birds'", f"'{folder_name}'").replace(
        "'birds'", "'church'").replace('B_CONDITION: True', 'B_CONDITION: False'))
    options = call.options('--cfg', 'authors.yml')
    assert (options.conditional, options.dataset, options.count, options.data_dir) == (False, 'church', 30000, None)
    for name, value in expected.items():
        found = getattr(options, name)
        assert (os.path.basename(found) if isinstance(found, str) else found) == value


def test_checkpoint_paths_in_a_configuration_are_found(folder, call):
    os.makedirs(folder / 'code' / 'cfg', exist_ok=True)
    os.makedirs(folder / 'code' / 'output' / 'Model', exist_ok=True)
    (folder / 'code' / 'output' / 'Model' / 'netG_220800.pth').touch()
    net_g = "TRAIN:\n FLAG: False\n NET_G: '../output/Model/netG_{}.pth'\n"
    (folder / 'code' / 'cfg' / 'eval.yml').write_text(net_g.format(220800))
    options = call.options('--cfg', 'code/cfg/eval.yml')
    assert options.checkpoint == str(folder / 'code' / 'output' / 'Model' / 'netG_220800.pth')
    os.makedirs(folder / 'models')  # the authors' paths start in code/
    (folder / 'models' / 'netG_210000.pth').touch()
    (folder / 'code' / 'cfg' / 'eval.yml').write_text("TRAIN: {FLAG: False, NET_G: '../models/netG_210000.pth'}")
    assert call.options('--cfg', 'code/cfg/eval.yml').checkpoint == str(folder / 'models' / 'netG_210000.pth')
    (folder / 'code' / 'cfg' / 'eval.yml').write_text(net_g.format(1))
    error = call.error('--cfg', 'code/cfg/eval.yml', *DATA)
    assert '../output/Model/netG_1.pth: no such checkpoint here' in error


SHIPPED = {'birds_3stages': ('birds', 600, True, 1, 0), 'eval_birds': ('birds', 600, True, 1, 0),
           'dog_3stages_color': ('dog', 100, False, 0, 50), 'cat_3stages_color': ('cat', 800, False, 0, 50),
           'bedroom_3stages_color': ('bedroom', 5, False, 0, 50), 'church_3stages_color': ('church', 50, False, 0, 50)}


def test_the_files_in_cfg_are_accepted(call):
    assert sorted(os.listdir(os.path.join(main.HERE, 'cfg'))) == sorted(f'{name}.yml' for name in SHIPPED)
    for name, expected in SHIPPED.items():
        options = call.options('--cfg', f'cfg/{name}.yml')
        assert (options.dataset, options.epochs, options.conditional, options.uncond_coef,
                options.color_coef) == expected
        assert (options.batch_size, options.lr, options.branches) == (24, 2e-4, 3) and options.said == ''
        assert options.train is (name != 'eval_birds')


# --- errors -----------------------------------------------------------------------------------------------------------

def test_errors_say_what_to_do(folder, trained, call):
    assert 'add --train False' in call.error('--text', 'a red bird')
    assert 'add --train False' in call.error('--interpolate', 'a', 'b')
    assert 'too narrow for 5 branches' in call.error('--branches', '5', '--gf_dim', '8')
    assert 'give only one of them' in call.error('--image_folder', 'a', '--lsun', 'b')
    assert '--classes church_outdoor_train' in call.error('--lsun', 'b')
    assert 'used only with --image_folder' in call.error('--classes', 'b')
    assert 'has no sentences' in call.error('--image_folder', 'a', '--conditional', 'True')
    for flags, name in [(['--branches', '1'], 'residuals'), (['--branches', '1'], 'color_coef'),
                        (['--conditional', 'False'], 'kl_coef'), (['--image_folder', 'a'], 'embedding_dim'),
                        (['--image_folder', 'a'], 'data_dir'), (['--lsun', 'a', '--classes', 'b'], 'cache')]:
        assert f'--{name}: is not used with' in call.error('--train', *flags, f'--{name}', '1')
    (folder / 'wide.yml').write_text('kl_coef: 3\ncolor_coef: 50')  # a file may be meant for several trainings
    assert call.options('--cfg', 'wide.yml', '--branches', '1', '--conditional', 'False').kl_coef == 3
    assert 'data/birds/prepare.py --cub' in call.error('--data_dir', 'nowhere', '--out_dir', 'none')
    evaluate = ['--train', 'False', *DATA]
    assert 'no run of --dataset tiny' in call.error(*evaluate, '--out_dir', 'none')
    assert 'no.pth: no such checkpoint' in call.error(*evaluate, '--checkpoint', 'no.pth')
    assert '--interpolate: the sentence is empty' in call.error('--train', 'False', '--interpolate', 'a', ' ')
    assert '--dataset NAME' in call.error('--image_folder', 'x' * 130)
    huge = ['--gf_dim', '8', '--z_dim', '2000000000', '--out_dir', 'none']
    assert 'out of memory' in call.error(*DATA, *huge)
    assert 'give 2 or less' in call.error(*DATA, *TRAINING, '--accumulate', '9', '--out_dir', 'none')
    assert 'reads sentences' in call.error(*evaluate, '--checkpoint', trained.run, '--count', '3')
    assert not (folder / 'none').exists()


def test_gpu_numbers_are_checked(call, monkeypatch, capsys):
    assert choose_device(True, -1).type == 'cpu' and capsys.readouterr().out == ''
    assert choose_device(True, 3).type == 'cpu' and 'no CUDA device' in capsys.readouterr().out
    chosen = []
    monkeypatch.setattr(torch, 'cuda', SimpleNamespace(is_available=lambda: True, device_count=lambda: 2,
                                                       set_device=chosen.append))
    assert choose_device(True, 1) == torch.device('cuda', 1) and chosen == [1]
    with pytest.raises(UserError, match='--gpu 2: there is no such GPU; this machine has 2'):
        choose_device(True, 2)
