"""benchmarks: that they run and measure what they claim, not how fast anything is."""
import argparse
import functools
import itertools
import os
import re
import subprocess
import sys

import pytest
import torch

import stackgan_v1.build_gan
import stackgan_v2.build_gan
from benchmarks import chapter_way, dataset_speed, eval_speed, kernels, train_speed
from common.speed.cpu_kernels import DoubledConv, ProductConv, ProductConvTranspose, ProductOfHalves
from tests.errors import one_line

pytestmark = pytest.mark.usefixtures('one_thread')


def test_the_table_has_a_row_for_every_way(birds):
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    command = [sys.executable, train_speed.__file__, '--device', 'cpu', '--file', birds, '--batch_size', '2',
               '--steps', '1', '--seconds', '0', '--repeats', '1']
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip('|').split('|')]
            for line in done.stdout.splitlines() if line.startswith('|')]
    assert rows[0][:3] == ['way', 'images/s', 'ratio'] and [row[0] for row in rows[2:4]] == [
        'chapter', 'fp32 (auto)' if len(rows) == 4 else 'fp32']
    assert rows[2][2] == '1.00' and all(re.fullmatch(r'[\d.]+%?', cell) for row in rows[2:] for cell in row[1:])


@pytest.fixture
def narrow(monkeypatch):
    """Make the StackGANs narrow, to save time."""
    for chapter in (stackgan_v1.build_gan, stackgan_v2.build_gan):
        monkeypatch.setattr(chapter, 'make_networks', functools.partial(chapter.make_networks, gf_dim=4, df_dim=4))


def options_of(file, **more):
    return argparse.Namespace(**{'file': file, 'device': 'cpu', 'batch_size': 2, 'accumulate': 1, 'steps': 1,
                                 'seconds': 0, **more})


@pytest.mark.parametrize('chapter', ['stackgan_v1', 'stackgan_v2'])
@pytest.mark.parametrize('way', ['chapter', 'fp32'])
def test_stackgans_are_measured(chapter, way, birds, narrow):
    options = options_of(birds, chapter=chapter, way=way)
    found = train_speed.measure(*train_speed.prepare(options), options)
    assert set(found) == {'speed', 'step', 'waiting', 'memory', 'first'} and all(value >= 0 for value in found.values())
    assert found['speed'] * found['step'] == pytest.approx(2)


@pytest.mark.parametrize('chapter', train_speed.BATCH_SIZES)
def test_the_chapters_items_are_like_ours(chapter, birds, narrow):
    chapters, ours = (train_speed.prepare(options_of(birds, chapter=chapter, way=way))[0].dataset[0]
                      for way in ('chapter', 'fp32'))
    assert len(chapters['right_embed']) == len(ours['right_embed']) == 1024
    assert ('wrong_images' in chapters) == (chapter != 'stackgan_v1')  # there, wrong pairs are made of the batch
    for name in {'right_images', 'wrong_images'} & set(ours):
        assert len(chapters[name]) == len(ours[name])
        for image, other in zip(chapters[name], ours[name]):
            image = torch.as_tensor(image)
            assert image.shape == other.shape and image.dtype == torch.float32 and -1 <= image.min() < image.max() <= 1


@pytest.fixture
def chapters_model(monkeypatch):
    """Return a list to which models are added that train the chapter's way."""
    models, slow_down = [], chapter_way.slow_down
    monkeypatch.setattr(chapter_way, 'slow_down', lambda model, nets: models.append(model) or slow_down(model, nets))
    return models


def nets_of(model):
    return model.netG, *(model.netsD if hasattr(model, 'netsD') else [model.netD])


def optimizers_of(model):
    return model.optim_G, *(model.optims_D if hasattr(model, 'optims_D') else [model.optim_D])


@pytest.mark.parametrize('chapter', train_speed.BATCH_SIZES)
def test_the_chapters_way_computes_the_same(chapter, birds, narrow, chapters_model):
    options = [options_of(birds, chapter=chapter, way=way) for way in ('fp32', 'chapter')]
    (batches, our_step), (_, chapters_step) = map(train_speed.prepare, options)
    ours, chapters, batch = our_step.__self__, *chapters_model, next(iter(batches))
    for model, step in ((ours, our_step), (chapters, chapters_step)):
        for optimizer in optimizers_of(model):
            optimizer.param_groups[0]['eps'] = 1e-3  # so that gradients of next to nothing make no whole steps
        torch.manual_seed(1)
        step(batch)
    for one, other in zip(nets_of(ours), nets_of(chapters), strict=True):
        for name, value in one.state_dict().items():  # weights have moved by up to the learning rate, 2e-4
            torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize('chapter', train_speed.BATCH_SIZES)
def test_the_chapters_way_has_none_of_our_gains(chapter, birds, narrow, chapters_model):
    batches, step = train_speed.prepare(options_of(birds, chapter=chapter, way='chapter'))
    step(next(iter(batches)))
    layers = {type(layer) for net in nets_of(*chapters_model) for layer in net.modules()}
    assert not layers & {DoubledConv, ProductConv, ProductConvTranspose, ProductOfHalves}
    assert not any(group['fused'] for optimizer in optimizers_of(*chapters_model) for group in optimizer.param_groups)
    _, *netsD = nets_of(*chapters_model)  # the generator's step has left gradients that nobody uses
    assert all(parameter.grad.any() for netD in netsD for parameter in netD.parameters() if parameter.dim() > 1)


def test_the_chapters_images_equal_ours(birds):
    chapters, ours = chapter_way.CaptionItems(birds), train_speed.Text2ImageDataset(birds)
    assert len(chapters) == len(ours) > 0
    by_caption = {(item['txt'], tuple(item['right_embed'][:5].tolist())): item['right_images'] for item in ours}
    for item in (chapters[i] for i in range(len(chapters))):
        image = by_caption.pop((item['txt'], tuple(item['right_embed'][:5].tolist())))
        assert torch.equal(torch.as_tensor(item['right_images']), image)


@pytest.mark.parametrize('way', ['chapter', 'fp32'])
def test_too_few_items_for_a_batch_are_an_error(way, birds, narrow):
    options = options_of(birds, chapter='stackgan_v2', way=way, batch_size=8)
    assert f'{birds}: has 7 items in /train, less than a batch' in one_line(train_speed.prepare, options)


def test_endless_batches_are_full_when_workers_have_prefetched_all():
    class Loader(list):  # of epochs of seven batches
        num_workers, prefetch_factor, collate_fn = 8, 2, None

    feed = train_speed.EndlessBatches(Loader(range(7)))
    assert list(itertools.islice(feed, 8)) == [0, 1, 2, 3, 4, 5, 6, 0] and feed.ahead == 16
    feed.counted.calls.value = 13
    assert not feed.is_full()
    feed.counted.calls.value = 14  # the second epoch's batches are all made, and the third has not begun
    assert feed.is_full()


# --- the other benchmarks ---------------------------------------------------------------------------------------------

def typed(benchmark, monkeypatch, capsys, *args):
    """Run a benchmark with arguments and return what it prints."""
    monkeypatch.setattr('sys.argv', [benchmark.__file__, *map(str, args)])
    benchmark.main()
    return capsys.readouterr().out


def test_a_missing_data_file_says_what_to_run(tmp_path, monkeypatch, capsys):
    missing = str(tmp_path / 'none.hdf5')
    assert 'prepare.py' in one_line(typed, train_speed, monkeypatch, capsys, '--file', missing)


@pytest.mark.parametrize('gan', ['text2image', 'stage-I', 'stage-II', 'stackgan_v2'])
def test_kernels_prints_a_row_per_optimization(gan, narrow, monkeypatch, capsys):
    parts = ['DoubledConv', 'ProductConv', 'ProductOfHalves', 'channels_last']
    said = typed(kernels, monkeypatch, capsys, '--gan', gan, '--batch_size', '2', '--steps', '1',
                 *(word for part in parts for word in ('--only', part)))
    assert re.findall(r'^\| (\w+) \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$', said, re.MULTILINE) == parts


def test_dataset_speed_prints_its_measurements(birds, monkeypatch, capsys):
    said = typed(dataset_speed, monkeypatch, capsys, '--file', birds)
    assert re.fullmatch(r'opening 14 cached items: [\d.]+ s, [\d.]+ GB\n'
                        r'what main.py trains on: [\d,]+ items/s .*\nwith wrong images: [\d,]+ items/s .*\n', said)


def test_eval_speed_prints_its_measurement(narrow, monkeypatch, capsys):
    monkeypatch.setattr(eval_speed, 'make_networks', stackgan_v2.build_gan.make_networks)
    said = typed(eval_speed, monkeypatch, capsys, '--device', 'cpu', '--count', 3, '--batch_size', 2)
    assert re.search(r'^3 images .*[\d.]+ s', said, re.MULTILINE)
