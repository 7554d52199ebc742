"""evaluation/metrics.py, measures.py and features.py: what is measured about images."""
import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import compare, features, measures, metrics
from stackgan_v1 import main as stackgan_v1
from stackgan_v2 import main as stackgan_v2
from tests import tiny
from tests.errors import one_line
from text2image import main as text2image

pytestmark = pytest.mark.usefixtures('one_thread')


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, 'argv', [module.__file__, *map(str, arguments)])
    return module.main()


# --- measures ---------------------------------------------------------------------------------------------------------

def test_frechet_distance_of_gaussians_equals_the_formula():
    torch.manual_seed(0)
    noise = torch.randn(400, 3, dtype=torch.float64)
    centered = noise - noise.mean(0)
    white = centered @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(centered.T))).T  # of covariance 1
    one, other = torch.tensor([1., 2., 3.]), torch.tensor([4., 2., 0.5])
    shifted = white * other + torch.tensor([0., 3., 4.])
    assert measures.frechet_distance(white * one, shifted) == pytest.approx(
        25 + float((one - other).square().sum()))
    assert measures.frechet_distance(shifted, shifted) == pytest.approx(0, abs=1e-6)


def test_distances_and_score_equal_those_of_torch_fidelity():
    pytest.importorskip('torch_fidelity')
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    torch.manual_seed(0)
    one, other = torch.rand(300, 32), torch.rand(300, 32) ** 2
    fid = fid_statistics_to_metric(fid_features_to_statistics(one), fid_features_to_statistics(other), verbose=False)
    assert measures.frechet_distance(one, other) == pytest.approx(fid['frechet_inception_distance'], rel=1e-3)
    # One subset of all images: the paper's estimate on a subset is unbiased, too.
    kid = kid_features_to_metric(one, other, kid_subsets=1, kid_subset_size=300, kid_kernel='poly', verbose=False,
                                 kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1,
                                 rng_seed=0)
    assert measures.kernel_distance(one, other) == pytest.approx(kid['kernel_inception_distance_mean'], rel=1e-2)
    score = isc_features_to_metric(one * 9, splits=10)
    assert measures.inception_score(one * 9) == pytest.approx(score['inception_score_mean'], rel=0.05)


def test_images_of_a_kind_are_recognized_and_random_ones_are_not():
    torch.manual_seed(0)
    labels = torch.arange(200) % 4
    kinds = torch.eye(4, 16) * 5
    images = kinds[labels] + torch.randn(200, 16)
    noise = torch.randn(200, 16)
    assert measures.species_of_halves(images, labels) > 0.95
    assert measures.species_of_halves(noise, labels) < 0.5
    classify = measures.fit_species(images, labels)
    assert (classify(kinds + 0.1) == torch.arange(4)).all()


def test_r_precision_counts_captions_that_match_best():
    torch.manual_seed(0)
    labels = torch.arange(120) % 30
    embeddings = torch.randn(120, 64)
    assert measures.r_precision(embeddings, embeddings, labels) == 1
    assert measures.r_precision(3 * embeddings + 0.1, embeddings, labels) == 1  # the length does not matter
    assert measures.r_precision(embeddings[torch.randperm(120)], embeddings, labels) < 0.1
    assert measures.r_precision(torch.zeros(120, 64), embeddings, labels) == 0  # a tie is no hit


def test_distances_within_groups_and_to_the_nearest():
    points = torch.tensor([[0., 0], [0, 2], [5, 5], [5, 9], [7, 7]])
    assert measures.mean_distance_within(points, torch.tensor([0, 0, 1, 1, 2])) == 3  # a group of one has no pair
    distances, numbers = measures.nearest(points[:2], torch.tensor([[0., 3], [1, 0]]))
    assert numbers.tolist() == [1, 0] and distances.tolist() == [1, 1]


def test_a_linear_map_is_found():
    torch.manual_seed(0)
    rows = torch.randn(5000, 8)
    weights = torch.randn(8, 3)
    fitted = measures.fit_linear(rows, rows @ weights + 7)
    shrunk = 1 / (1 + measures.RIDGE / 1)  # every direction has about the same variance
    torch.testing.assert_close(fitted(rows[:9]).float(), rows[:9] @ weights * shrunk + 7, atol=0.2, rtol=0.05)


# --- the command ------------------------------------------------------------------------------------------------------

class Brightness:
    """Stand in for a network whose weights may be missing: the mean color of each quarter of an image."""

    def __call__(self, batches):
        pooled = [torch.nn.functional.adaptive_avg_pool2d(pixels.float(), 2).flatten(1) for pixels in batches]
        return torch.cat(pooled) / 50, None


SPLITS = {'train': {'001.Auk': 3, '002.Jay': 2}, 'valid': {f'{i:03}.A{i}': 1 for i in range(60, 120)},
          'test': {'004.Wren': 17, '005.Lark': 17, '006.Tern': 17}}
TRAINING = ('--dataset', 'tiny', '--epochs', 1)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A run of each GAN on the same data."""
    folder = tiny.with_encoder(tmp_path_factory.mktemp('runs'), SPLITS)
    with pytest.MonkeyPatch.context() as patch:
        for name, module, flags in [
                ('text2image', text2image, ('--batch_size', 4)),
                ('stackgan_v1', stackgan_v1, ('--batch_size', 2, '--gf_dim', 8, '--df_dim', 2, '--workers', 0)),
                ('stackgan_v2', stackgan_v2, ('--batch_size', 2, '--gf_dim', 8, '--df_dim', 2, '--workers', 0,
                                              '--branches', 2))]:
            run(patch, module, '--train', '--data_dir', folder / 'data', *TRAINING, '--out_dir', folder / name, *flags)
    return {name: next((folder / name).iterdir()) for name in ('text2image', 'stackgan_v1', 'stackgan_v2')}


def lines(folder):
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_all_gans_are_measured_and_twice_the_same(runs, monkeypatch, capsys):
    monkeypatch.setattr(features, 'FeatureExtractor', lambda device: Brightness())
    for _ in range(2):
        run(monkeypatch, metrics, *runs.values(), '--count', 50)
    said = capsys.readouterr().out
    assert said.count('50 captions of 51 photographs of 3 species in /test') == 6  # three preparations, twice
    names = ['frechet_efficientnet_lite0', 'kid_efficientnet_lite0', 'species', 'r_precision', 'diversity', 'nearest']
    rows = [line for line in said.splitlines() if line.startswith('|')]
    assert rows[0] == f'| | {" | ".join(names)} |'
    for title in ('text2image.pt, 3 steps', 'stackgan_v1.pt, 2 steps', 'stackgan_v2.pt, 2 steps'):
        first, second = (row for row in rows if title in row)
        assert first == second and first.count('|') == len(names) + 2
    assert sum('real photographs' in row for row in rows) == sum('shuffled captions' in row for row in rows) == 6
    for name, folder in runs.items():
        first, second = lines(folder)
        assert first == second and set(names) < first.keys() and first['images'] == 50
        assert first['checkpoint'] == f'{name}.pt' and first['epoch'] == 1
        size = 128 if name == 'stackgan_v2' else 64
        assert Image.open(folder / 'nearest.png').size == (2 * (size + 2) + 2, 16 * (size + 2) + 2)


def test_each_section_is_compared_with_photographs_as_it_prepares_them(runs):
    found = {}
    for name in ('text2image', 'stackgan_v1'):  # both of 64 pixels
        opened = metrics.TrainedRun(str(runs[name]), torch.device('cpu'))
        found[name] = features.of_photographs(Brightness(), 'both', opened.dataset('test'), opened.prepared)[0]
        assert opened.prepared == {'text2image': 'whole_64', 'stackgan_v1': 'crop_64'}[name]
    assert not torch.equal(*found.values())


def test_images_are_measured_not_their_run(runs, monkeypatch, capsys):
    """A generator that draws the photographs themselves reaches what real ones reach."""
    monkeypatch.setattr(features, 'FeatureExtractor', lambda device: Brightness())
    opened = metrics.TrainedRun(str(runs['text2image']), torch.device('cpu'))
    dataset = opened.dataset('test')
    image_of = {tuple(row[:4].tolist()): dataset.image(photo)
                for row, photo in zip(dataset.embeddings, dataset.photo_of)}
    monkeypatch.setattr(metrics.TrainedRun, 'generate', lambda self, embeddings, seed=0:
                        torch.stack([image_of.get(tuple(row[:4].tolist()), torch.zeros(3, 64, 64))
                                     for row in embeddings]))
    run(monkeypatch, metrics, runs['text2image'], '--count', 102)
    found = lines(runs['text2image'])[-1]
    assert found['frechet_efficientnet_lite0'] == pytest.approx(0, abs=1e-3)
    assert found['diversity'] == 0
    generated, real = ([float(cell) for cell in row.split('|')[2:-1]] for row in capsys.readouterr().out.splitlines()
                       if 'steps |' in row or '| real photographs' in row)
    assert generated[2] >= real[2] and generated[3] == real[3]  # the classifier knows these photographs
    assert generated[5] == pytest.approx(real[5], rel=0.01)


def test_features_of_photographs_are_cached_and_computed_again_when_damaged(runs, monkeypatch):
    dataset = metrics.TrainedRun(str(runs['text2image']), torch.device('cpu')).dataset('test')
    calls = []

    def extract(batches):
        calls.append(1)
        return Brightness()(batches)

    first, again = (features.of_photographs(extract, 'colors', dataset, 'whole_64')[0] for _ in range(2))
    assert len(calls) == 1 and torch.equal(first, again) and first.shape == (51, 12)
    cached, = (runs['text2image'].parents[1] / 'data').glob('*.cache/colors_whole_64_test.npz')
    cached.write_bytes(cached.read_bytes()[:-30])
    again, _ = features.of_photographs(extract, 'colors', dataset, 'whole_64')
    assert torch.equal(again, first) and len(calls) == 2


def test_real_features_tell_photographs_from_noise():
    pytest.importorskip('efficientnet_lite_pytorch')
    extract = features.FeatureExtractor(torch.device('cpu'))
    photograph = torch.from_numpy(np.array(Image.open(io.BytesIO(tiny.jpeg(1))))).permute(2, 0, 1)
    torch.manual_seed(0)
    noise = torch.rand(2, 3, 40, 50) * 255
    found, logits = extract([torch.stack([photograph, photograph.clamp(max=250)]).float(), noise])
    assert found.shape == (4, 1280) and logits is None
    assert (found[0] - found[1]).norm() < 0.5 * (found[0] - found[2]).norm()


def test_inception_reads_weights_without_running_code(tmp_path, monkeypatch):
    """With random weights: those that published numbers are about must be downloaded."""
    extractor = pytest.importorskip('torch_fidelity.feature_extractor_inceptionv3')
    file = str(tmp_path / 'weights.pth')
    with monkeypatch.context() as patch:
        patch.setattr(extractor, 'load_state_dict_from_url', lambda *_, **__: {})
        patch.setattr(extractor.FeatureExtractorInceptionV3, 'load_state_dict', lambda *_: None)
        torch.manual_seed(0)
        network = extractor.FeatureExtractorInceptionV3('inception-v3-compat', ['2048', 'logits_unbiased'])
    torch.save(network.state_dict(), file)
    pixels = torch.rand(2, 3, 64, 64) * 255
    found, logits = features.extractor('inception', torch.device('cpu'), file)([pixels])
    expected, expected_logits = network(pixels.round().to(torch.uint8))
    assert torch.equal(found, expected) and torch.equal(logits, expected_logits) and found.shape == (2, 2048)

    torch.save({'a': torch.zeros(1)}, file)
    assert 'is not the Inception network' in one_line(features.extractor, 'inception', torch.device('cpu'), file)


def test_errors_are_one_line(runs, tmp_path, monkeypatch):
    def error(*arguments):
        return one_line(run, monkeypatch, metrics, *arguments)

    monkeypatch.setattr(features, 'FeatureExtractor', lambda device: Brightness())
    assert 'is not a run folder' in error(tmp_path)
    (tmp_path / 'options.json').write_text('{"model": "cbow"}')
    assert 'is not a run of text2image, stackgan_v1 or stackgan_v2' in error(tmp_path)
    (tmp_path / 'options.json').write_text('{"model": "text2image", "l1_coef": 1, "dataset": "birds"}')
    assert 'it has no text2image.pt' in error(tmp_path)
    assert 'too few images' in error(runs['text2image'], '--count', 3)
    assert 'only read with --features inception' in error(runs['text2image'], '--inception_weights', 'a')
    other = shutil.copytree(runs['text2image'], tmp_path / 'other')
    contents = torch.load(other / 'text2image.pt', weights_only=True)
    contents['data'] |= {'encoder': '0' * 16, 'embeddings': '0' * 16, 'shown_embeddings': torch.ones(3, 1024)}
    torch.save(contents, other / 'text2image.pt')
    assert 'do not come from the sentence encoder that' in error(runs['text2image'], other)
    assert '/valid has 60 photographs of 60 classes, too few' in error(runs['text2image'], '--split', 'valid')
    assert '/train has 5 photographs of 2 classes, too few' in error(runs['text2image'], '--split', 'train')


def test_training_photographs_are_not_nearest_to_themselves(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features, 'FeatureExtractor', lambda device: Brightness())
    monkeypatch.setattr(metrics, 'FEWEST', 5)
    mine = shutil.copytree(runs['text2image'], tmp_path / 'mine', ignore=shutil.ignore_patterns('metrics*'))
    run(monkeypatch, metrics, mine, '--count', 5, '--split', 'train')
    generated, real = (row for row in capsys.readouterr().out.splitlines() if 'text2image.pt,' in row or 'real ' in row)
    assert real.endswith('|  |')
    assert float(generated.split('|')[-2]) == pytest.approx(lines(mine)[0]['nearest'], rel=.01)


def test_a_line_is_added_to_those_of_others(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(features, 'FeatureExtractor', lambda device: Brightness())
    mine = shutil.copytree(runs['text2image'], tmp_path / 'mine')
    (mine / 'metrics.jsonl').write_text('{"note": "mine"}')
    run(monkeypatch, metrics, mine, '--count', 50)
    assert [set(line) == {'note'} for line in lines(mine)] == [True, False]
    (mine / 'nearest.png').unlink()
    (mine / 'nearest.png').mkdir()
    assert 'nearest.png: cannot be written' in one_line(run, monkeypatch, metrics, mine)


def test_new_checkpoints_are_measured_and_tensorboard_shows_all_measures(runs, tmp_path, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    monkeypatch.setattr(features, 'FeatureExtractor', lambda device: Brightness())
    watched = shutil.copytree(runs['text2image'], tmp_path / 'watched',
                              ignore=shutil.ignore_patterns('metrics*'))

    waited = []

    def train_on(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            run(monkeypatch, text2image, '--train', '--resume', watched, '--epochs', 2)
        if len(waited) == 3:
            watched.rename(tmp_path / 'moved')

    monkeypatch.setattr(metrics.time, 'sleep', train_on)
    run(monkeypatch, metrics, watched, '--count', 50, '--watch')  # ends when no run is left
    said = capsys.readouterr().out
    assert f'is not a run folder (it has no options.json); give the run folder of a trained GAN; {watched} is' in said
    watched = tmp_path / 'moved'
    assert [line['step'] for line in lines(watched)] == [3, 6]
    assert said.count('waiting for the next checkpoint') == 2 and 'text2image.pt, 6 steps' in said
    curves = EventAccumulator(str(watched / 'metrics' / 'test_50')).Reload()
    assert [(event.step, event.value) for event in curves.Scalars('species')] == [
        (line['step'], pytest.approx(line['species'])) for line in lines(watched)]


def test_all_gans_are_put_side_by_side(runs, tmp_path, monkeypatch, capsys):
    run(monkeypatch, compare, *runs.values(), '--text', 'a small red bird', '--out', tmp_path / 'all.png')
    assert '3 runs, 1 sentences' in capsys.readouterr().out
    page = (tmp_path / 'all.html').read_text()
    assert all(folder.name in page for folder in runs.values())
    assert '<th>section</th><td>text2image</td><td>stackgan_v1</td><td>stackgan_v2</td>' in page
    assert 'gf_dim' not in page  # text2image has no such option
