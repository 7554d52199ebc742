"""Checkpoints: what is written, loaded and refused, and what a loaded model generates."""
import os
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from common import checkpoint
from common.errors import UserError
from tests.small_training import EPOCHS, STEPS, make_dataset, new_model
from text2image.build_gan import Model

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def trained(dataset, tmp_path_factory):
    """Return the checkpoint of a finished training."""
    folder, model = str(tmp_path_factory.mktemp('run')), new_model(dataset)
    model.train(EPOCHS, 1, folder, verbose=False)
    return os.path.join(folder, 'text2image.pt')


def same_weights(model, contents, nets=('netG', 'netD')):
    return all(torch.equal(value, contents[net][key])
               for net in nets for key, value in getattr(model, net).state_dict().items())


def test_a_checkpoint_holds_the_whole_state_and_no_code(trained, dataset, tmp_path, capsys):
    contents = torch.load(trained, weights_only=True)
    assert set(contents) == {'netG', 'netD', 'optim_G', 'optim_D', 'progress', 'options', 'data'}
    assert (contents['progress']['epoch'], contents['progress']['step']) == (EPOCHS, EPOCHS * STEPS)
    model = new_model(dataset)
    model.options = {'lr': 2e-4, 'text': None, 'dataset': 'birds'}
    file = model.save_to(str(tmp_path / 'deep' / 'er'), 'other')
    assert capsys.readouterr().out == f'saved {file}\n' and os.path.basename(file) == 'other.pt'
    other = new_model(dataset, seed=5)
    other.load_from(str(tmp_path / 'deep' / 'er'), 'other')
    assert capsys.readouterr().out == f'loaded {file}\n' and other.options == model.options


def test_a_run_resumes_in_another_memory_format(trained, dataset):
    """Fused Adam assumes that weights and moments have the same memory format."""
    stepped = []
    for dims in ((0, 2, 3, 1), (0, 1, 2, 3), (2, 3, 0, 1)):  # channels last as in the run, contiguous, as `DoubledConv`
        model = new_model(dataset)
        for weight in (one for one in model.netD.parameters() if one.dim() == 4):
            back = sorted(range(4), key=dims.__getitem__)
            weight.data = weight.data.permute(dims).contiguous().permute(back)
        model.load_from(trained, verbose=False)
        torch.manual_seed(0)
        for parameter in model.netD.parameters():
            parameter.grad = torch.empty_like(parameter).copy_(1e-3 * torch.randn(parameter.shape))
        model.optim_D.step()
        stepped.append(model.netD.state_dict())
    for other in stepped[1:]:
        for name, value in stepped[0].items():
            torch.testing.assert_close(other[name], value, msg=name)


def test_folder_names_need_not_be_utf8(trained, tmp_path):
    path = os.path.join(tmp_path, 'lat\udcf6', 'a.pt')
    checkpoint.save(path, torch.load(trained, weights_only=True))
    assert all(checkpoint.load(path, mapped).keys() >= {'netG', 'netD'} for mapped in (False, True))


def test_load_from_reads_every_kind_of_state_dict(trained, tmp_path):
    contents = torch.load(trained, weights_only=True)
    netG, netD = contents['netG'], contents['netD']
    parallel = {f'module.{key}': value for key, value in netG.items()}
    files = {'G': netG, 'D': netD, 'parallel': parallel, 'parallel_D': {f'module.{k}': v for k, v in netD.items()},
             'both': {'netG': parallel, 'netD': netD}, 'chapter_G': netG, 'chapter_D': netD}
    for name, state in files.items():
        torch.save(state, tmp_path / f'{name}.pt')
    for path, name, nets in [(trained, None, ['netG', 'netD']), (os.path.dirname(trained), None, ['netG', 'netD']),
                             (tmp_path / 'G.pt', None, ['netG']), (tmp_path / 'D.pt', None, ['netD']),
                             (tmp_path, 'parallel', ['netG']), (tmp_path, 'parallel_D', ['netD']),
                             (tmp_path, 'both', ['netG', 'netD']), (tmp_path, 'chapter', ['netG', 'netD'])]:
        model = Model('text2image', 'cpu', None, 3, 50, 100)  # without optimizers, as for generating
        others = [net for net in ('netG', 'netD') if net not in nets]
        kept = {net: {k: v.clone() for k, v in getattr(model, net).state_dict().items()} for net in others}
        model.load_from(str(path), name, verbose=False)
        assert same_weights(model, contents, nets) and same_weights(model, kept, others), path


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


def refusal(path):
    model = Model('text2image', 'cpu', None, 3, 50, 100)
    with pytest.raises(UserError) as caught:
        model.load_from(str(path), verbose=False)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


def test_pickled_modules_are_refused_without_running_them(tmp_path):
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))):
        write({'netG': Trap(str(tmp_path / 'sprung'))}, tmp_path / 'text2image.pt')
        assert 'refused' in refusal(tmp_path)
    torch.save(torch.nn.Linear(2, 2), tmp_path / 'text2image.pt')
    assert 'refused' in refusal(tmp_path) and 'state_dict()' in refusal(tmp_path)
    assert not os.path.exists(tmp_path / 'sprung')


def test_damaged_and_foreign_files_are_one_line_errors(trained, tmp_path):
    file = tmp_path / 'text2image.pt'
    assert f'{file}: no such checkpoint' == refusal(tmp_path)
    with open(trained, 'rb') as whole:
        start = whole.read(100_000)
    torch.save({'a': torch.ones(3)}, tmp_path / 'old', _use_new_zipfile_serialization=False)
    old = (tmp_path / 'old').read_bytes()
    for damaged in [b'', b'\x80', b'PK\x03\x04', b'no checkpoint\n' * 50, start, old[:3], old[:30], old[:-4]]:
        file.write_bytes(damaged)
        assert str(file) in refusal(tmp_path)
    torch.save(torch.ones(3), file)
    assert 'holds a Tensor' in refusal(tmp_path)
    for state in ({}, {'model.0.weight': torch.ones(2)}, {'output.0.weight': torch.ones(2)}, {'netG': {}, 'netD': {}}):
        torch.save(state, file)
        assert 'does not fit' in refusal(tmp_path)
    state = torch.load(trained, weights_only=True)
    state['netG']['model.0.weight'] = state['netG']['model.0.weight'][:, :7]
    torch.save(state, file)
    assert 'does not fit Generator' in refusal(tmp_path) and 'model.0.weight' in refusal(tmp_path)


@pytest.mark.parametrize('error, raised', [
    (OSError('No space left'), UserError),
    (RuntimeError('unexpected pos 1\nat 2'), UserError),  # what torch makes of a full disk
    (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch, error, raised):
    path = str(tmp_path / 'a.pt')
    checkpoint.save(path, {'a': torch.ones(3)})

    def half(contents, file, **_):
        file.write(b'half')
        raise error

    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(raised) as caught:
        checkpoint.save(path, {'a': torch.zeros(3)})
    assert '\n' not in str(caught.value)
    assert os.listdir(tmp_path) == ['a.pt'] and torch.equal(checkpoint.load(path)['a'], torch.ones(3))


def test_a_folder_that_cannot_be_created_is_a_one_line_error(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot be written'):
        checkpoint.save(str(tmp_path / 'file' / 'a.pt'), {})


# --- generating -------------------------------------------------------------------------------------------------------

def test_generate_depends_only_on_its_seed(dataset, trained):
    model = new_model(dataset)
    model.load_from(trained, verbose=False)
    embed, state = dataset.embeddings[:3], torch.get_rng_state()
    images = model.generate(embed)
    assert images.shape == (3, 3, 64, 64) and images.abs().max() <= 1 and not images.requires_grad
    assert torch.equal(torch.get_rng_state(), state) and model.netG.training
    torch.manual_seed(1234)
    assert torch.equal(images, model.generate(embed.numpy()))
    assert not torch.equal(images, model.generate(embed, seed=1))
    assert torch.equal(images[0], model.generate(embed[[0, 2, 2]])[0])  # whatever else is in the batch


def test_eval_generates_for_the_loaders_captions(dataset):
    model = new_model(dataset)
    model.data_loader = DataLoader(dataset, 4, collate_fn=dataset.collate)
    for size, expected in ((None, 4), (3, 3), (100, 4)):
        images, captions = model.eval(size)
        assert images.shape == (expected, 3, 64, 64) and captions == dataset.captions[:expected]
