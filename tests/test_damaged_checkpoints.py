"""Damaged, malicious and foreign checkpoints: a one-line error, no harm, and the previous checkpoint is used."""
import errno
import os
import random
import shutil
import time
import zipfile

import pytest
import torch

from common import checkpoint, run
from common.errors import CannotWrite, UserError
from stackgan_v1 import build_gan as stackgan_v1
from stackgan_v2 import build_gan as stackgan_v2
from tests import fuzz_checkpoints as fuzz
from tests import hostile_checkpoints as hostile
from tests.errors import one_line

MODELS = fuzz.MODELS
pytestmark = pytest.mark.usefixtures('one_thread')


def contents_of(name):
    return hostile.copied(fuzz._contents(name))


def write(path, data):
    path.write_bytes(data)
    return str(path)


# --- the file ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('mapped', [False, True])
def test_bytes_without_a_checksum_change_nothing(tmp_path, mapped):
    """With a flipped bit in headers, padding or directory, a file is refused or its contents are unchanged."""
    data, refused = fuzz._file(True), 0
    places = random.Random(mapped).sample(range(len(data)), 800)
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        contents = fuzz._refused(checkpoint.load, write(tmp_path / 'a.pt', bytes(changed)), mapped=mapped)
        refused += contents is None
        assert contents is None or fuzz._same(contents, fuzz.WHOLE), place
    assert refused > len(places) / 2


def test_the_legacy_format_is_checksummed(tmp_path):
    data, rng = fuzz._file(False), random.Random(0)
    assert fuzz._same(checkpoint.load(write(tmp_path / 'a.pth', data)), fuzz.WHOLE)
    assert fuzz._same(torch.load(tmp_path / 'a.pth', weights_only=True), fuzz.WHOLE)  # as others read it
    for place in rng.sample(range(len(data)), 300):
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        one_line(checkpoint.load, write(tmp_path / 'a.pth', bytes(changed)))
    for length in (len(data) - 1, len(data) - 100, 1000, 500, 20):
        one_line(checkpoint.load, write(tmp_path / 'a.pth', data[:length]))


def test_files_of_other_programs_need_no_checksum(tmp_path):
    torch.save(fuzz.WHOLE, tmp_path / 'a.pth', _use_new_zipfile_serialization=False)
    assert fuzz._same(checkpoint.load(str(tmp_path / 'a.pth')), fuzz.WHOLE)
    data = (tmp_path / 'a.pth').read_bytes()
    one_line(checkpoint.load, write(tmp_path / 'b.pth', data[:-1]), match='truncated: 1 bytes')
    crc32 = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(fuzz.WHOLE, tmp_path / 'b.pth')
    finally:
        torch.serialization.set_crc32_options(crc32)
    assert fuzz._same(checkpoint.load(str(tmp_path / 'b.pth')), fuzz.WHOLE)


def test_files_of_python_2_and_pytorch_0_3_load(tmp_path):
    """They hold byte strings, an OrderedDict of a list of pairs, and tensors built by _rebuild_tensor."""
    torch.save({'a': torch.arange(4.)}, tmp_path / 'a.pth', _use_new_zipfile_serialization=False)
    data = (tmp_path / 'a.pth').read_bytes()
    place = data.index(b'X', data.index(b'FloatStorage\n')) + 1
    key = data[place + 4:place + 4 + data[place]]
    tensor = (b'ctorch._utils\n_rebuild_tensor\n((U\x07storagectorch\nFloatStorage\nU' + bytes([len(key)]) + key
              + b'U\x03cpuK\x04NtQK\x00K\x04\x85K\x01\x85tR')
    program = b'\x80\x02ccollections\nOrderedDict\n(]](U\x01a' + tensor + b'eatR.'
    start, end = data.index(b'\x80\x02}q\x00X\x01\x00\x00\x00a'), data.index(b'\x80\x02]q\x00')
    contents = checkpoint.load(write(tmp_path / 'b.pth', data[:start] + program + data[end:]))
    assert list(contents) == ['a'] and torch.equal(contents['a'], torch.arange(4.))


@pytest.mark.parametrize('mapped', [False, True])
@pytest.mark.parametrize('method', [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_recompressed_archives_are_refused_and_stored_ones_load(tmp_path, mapped, method):
    data = fuzz._file(True)
    one_line(checkpoint.load, write(tmp_path / 'a.pt', hostile.packed(data, method)), mapped, match='is compressed')
    assert fuzz._same(checkpoint.load(write(tmp_path / 'b.pt', hostile.packed(data)), mapped), fuzz.WHOLE)


def test_a_zip_bomb_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.pt', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('a/data.pkl', hostile.entry(hostile.tensor(numel=75 * 10 ** 6, size=(75 * 10 ** 6,))))
        archive.writestr('a/data/0', bytes(3 * 10 ** 8))
    start = time.process_time()
    one_line(checkpoint.load, str(tmp_path / 'a.pt'), match='is compressed')
    assert os.path.getsize(tmp_path / 'a.pt') < 10 ** 6 and time.process_time() - start < 2


@pytest.mark.parametrize('name', hostile.ATTACKS)
def test_malicious_pickles_are_refused(tmp_path, name, monkeypatch):
    """For some of these, torch.load alone crashes, fills the memory, or reads wrong numbers."""
    monkeypatch.chdir(tmp_path)
    path, start = write(tmp_path / 'a.pt', hostile.with_pickle(hostile.ATTACKS[name])), time.process_time()
    for mapped in (False, True):
        contents = fuzz._refused(checkpoint.load, path, mapped=mapped)
        assert contents is None or name in ('lists nested deep', 'dicts nested deep', 'a tuple of 2^100 items',
                                            'a list in itself')
    assert time.process_time() - start < 10 and os.listdir(tmp_path) == ['a.pt']


def test_files_of_other_types_are_named(tmp_path):
    for data, message in [(b'', 'is empty'), (b'<!DOCTYPE html>\n<html>', 'is a web page, not a checkpoint'),
                          (b'\n <html lang="en">', 'download the file itself'), (b'404: not found\n', 'is text'),
                          (b'version https://git-lfs.github.com/spec/v1\noid', 'git lfs pull'),
                          (b'\x89PNG\r\n\x1a\n\0\0', 'damaged, or not a checkpoint')]:
        assert message in one_line(checkpoint.load, write(tmp_path / 'a.pth', data))
    with zipfile.ZipFile(tmp_path / 'a.pt', 'w') as archive:
        archive.writestr('a.txt', 'a')
    one_line(checkpoint.load, str(tmp_path / 'a.pt'), match='is a zip archive, but not a checkpoint')
    with zipfile.ZipFile(tmp_path / 'a.pt', 'w') as archive:
        archive.writestr('a/data.pkl', 'a')
        archive.writestr('a/constants.pkl', 'a')
    one_line(checkpoint.load, str(tmp_path / 'a.pt'), match='TorchScript')
    for value, message in [({'a': torch.ones(2).to_sparse()}, 'sparse'), ({'a': torch.ones(2, device='meta')}, 'meta'),
                           ({'a': torch.ones(2, dtype=torch.complex64)}, 'Complex')]:
        torch.save(value, tmp_path / 'a.pt')
        assert message in one_line(checkpoint.load, str(tmp_path / 'a.pt'))


# --- what is in it ----------------------------------------------------------------------------------------------------

def edit(contents, *path, value=None):
    for key in path[:-1]:
        contents = contents[key]
    if value is None:
        del contents[path[-1]]
    else:
        contents[path[-1]] = value(contents[path[-1]])


BAD_EDITS = [
    ('netG', lambda value: []), ('netG', lambda value: {1: 2}), ('netD', None), ('optim_D', None), ('progress', None),
    ('optim_G', lambda value: {'state': [], 'param_groups': []}), ('optim_G', lambda value: 3),
    ('options', lambda value: [1]), ('options', lambda value: {1: 'a'}), ('data', lambda value: {'encoder': 1}),
    ('data', lambda value: {**value, 'shown_embeddings': torch.ones(3)}),
    ('optim_G', 'state', lambda value: {99: value[0]}), ('optim_G', 'state', lambda value: {0: {}}),
    ('optim_G', 'state', 0, lambda value: {**value, 'step': -1}),
    ('optim_G', 'state', 0, lambda value: {**value, 'step': torch.ones(3)}),
    ('optim_G', 'state', 0, lambda value: {**value, 'exp_avg': value['exp_avg'].flatten()}),
    ('optim_G', 'state', 0, lambda value: {**value, 'exp_avg': value['exp_avg'].bool()}),
    ('optim_G', 'state', 0, lambda value: {**value, 'exp_avg': value['exp_avg'] * torch.nan}),
    ('optim_G', 'state', 0, 'exp_avg_sq', lambda value: -1 - value), ('optim_G', 'state', 0, 'exp_avg_sq', None),
    ('optim_G', 'param_groups', lambda value: value * 2),
    ('optim_G', 'param_groups', 0, 'params', lambda value: value[:-1]), ('optim_G', 'param_groups', 0, 'params', None),
    ('optim_G', 'param_groups', 0, 'betas', lambda value: 0.5), ('optim_G', 'param_groups', 0, 'lr', lambda value: 'x'),
    ('optim_G', 'param_groups', 0, 'amsgrad', lambda value: True),
    ('optim_G', 'param_groups', 0, 'foreach', lambda value: True),
    ('progress', lambda value: [1]), ('progress', 'epoch', lambda value: -1),
    ('progress', 'step', lambda value: 2 ** 80),
    ('progress', 'batch', lambda value: 0.5), ('progress', 'epoch_rng', lambda value: 3),
    ('progress', 'epoch_rng', None), ('progress', 'world_size', lambda value: 0),
    ('progress', 'rng', 'cpu', lambda value: value[:-1]), ('progress', 'rng', 'cpu', lambda value: value.float()),
    ('progress', 'rng', 'cpu', lambda value: torch.full_like(value, 255)), ('progress', 'rng', 'cuda', None),
    ('netG', '0.weight', None), ('netG', '0.weight', lambda value: value.bool()), ('netG', '0.weight', lambda value: 3),
    ('netG', '0.weight', lambda value: value.long()), ('netG', '0.weight', lambda value: value * torch.nan),
    ('netD', '1.running_var', lambda value: value[None]),
    ('netD', lambda value: {**value, 'two\nlines': value['0.bias']})]


@pytest.mark.parametrize('number', range(len(BAD_EDITS)))
def test_a_checkpoint_that_does_not_fit_leaves_the_model_unchanged(tmp_path, number):
    *path, value = BAD_EDITS[number]
    model, contents = hostile.small_model('text2image'), contents_of('text2image')
    edit(contents, *path, value=value)
    torch.save(contents, tmp_path / 'a.pt')
    before, progress, options = hostile.state_of(model), dict(model.progress), model.options
    error = one_line(model.load_from, str(tmp_path / 'a.pt'), None, False)
    assert str(tmp_path / 'a.pt') in error and len(error) < 400
    assert all(map(torch.equal, before, hostile.state_of(model)))
    assert model.progress == progress and model.options is options


@pytest.mark.parametrize('name', MODELS)
def test_randomly_edited_checkpoints_load_or_are_refused(tmp_path, name):
    rng, outcomes = random.Random(1), set()
    for _ in range(60):
        outcomes.add(fuzz.edits(rng, str(tmp_path), name))
    assert outcomes == {'accepted', 'refused'}


def test_equal_numbers_of_other_types_are_accepted(tmp_path):
    """Numbers may be float64 or float16, steps and groups as in older PyTorch, and names as in DataParallel."""
    model, contents = hostile.small_model('text2image'), contents_of('text2image')
    contents['netG'] = {f'module.{name}': value.double() if value.is_floating_point() else value
                        for name, value in contents['netG'].items() if not name.endswith('num_batches_tracked')}
    for state in contents['optim_G']['state'].values():
        state['step'] = int(state['step'])
    for name in ('maximize', 'foreach', 'capturable', 'differentiable', 'fused'):
        contents['optim_G']['param_groups'][0].pop(name)
    del contents['progress']['world_size'], contents['data']
    contents['optim_G']['param_groups'][0]['lr'] = 0.125
    torch.save(contents, tmp_path / 'a.pt')
    model.load_from(str(tmp_path / 'a.pt'), verbose=False)
    assert model.optim_G.param_groups[0]['lr'] == 0.125 and model.progress['world_size'] == 1 and model.data == {}
    hostile.take_a_step(model)
    assert model.optim_G.state_dict()['state'][0]['step'] == 2


@pytest.mark.parametrize('section', [stackgan_v1, stackgan_v2])
def test_huge_widths_in_a_file_are_refused(tmp_path, section):
    """A tensor of a few million numbers could otherwise request a network of terabytes."""
    name = section.__name__.partition('.')[0]
    contents = contents_of(name)['netG']
    key = 'STAGE1_G.fc.0.weight' if section is stackgan_v1 else 'img_net1.img.0.weight'
    for shape in ((10 ** 7, 1), (3, 10 ** 6, 1, 1), (1, 10 ** 7), (0, 0), (3, 0, 3, 3)):
        torch.save({**contents, key: torch.zeros(shape)}, tmp_path / 'netG_1.pth')
        start = time.process_time()
        one_line(section.load_generator, str(tmp_path / 'netG_1.pth'), name)
        assert time.process_time() - start < 10


# --- the one before ---------------------------------------------------------------------------------------------------

def spoil(path):
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    with open(path, 'r+b') as file:
        file.seek(largest.header_offset + largest.file_size // 2)
        file.write(os.urandom(64))


@pytest.mark.parametrize('name', MODELS)
def test_the_previous_checkpoint_replaces_a_damaged_one(tmp_path, name, capsys):
    model, folder = hostile.small_model(name), str(tmp_path)
    model.keep = 2
    for step in (1, 2, 3):
        model.progress['step'] = step
        newest = model.save_to(folder, verbose=False)
    assert sorted(os.listdir(tmp_path)) == [f'{name}.pt', f'{name}.pt.1']
    model.load_from(folder, verbose=False)
    assert model.progress['step'] == 3 and capsys.readouterr().out == ''
    spoil(newest)
    model.load_from(folder, verbose=False)
    said = capsys.readouterr().out
    assert model.progress['step'] == 2 and said.count('\n') == 1 and newest in said and f'{newest}.1' in said
    assert 'changed since it was written' in said
    one_line(model.load_from, newest, None, False, match='changed since')  # by its name: no other one
    os.remove(newest)
    model.load_from(folder, verbose=False)
    assert 'missing' in capsys.readouterr().out and model.progress['step'] == 2
    model.save_to(folder, verbose=False)
    spoil(newest)
    spoil(f'{newest}.1')
    one_line(model.load_from, folder, None, False, match=f'{name}.pt: damaged')


def test_a_damaged_checkpoint_takes_no_place_among_those_that_are_kept(tmp_path):
    model, folder = hostile.small_model('text2image'), str(tmp_path)
    model.keep = 2
    for step in (1, 2):
        model.progress['step'] = step
        newest = model.save_to(folder, verbose=False)
    spoil(newest)
    model.load_from(folder, verbose=False)
    for step, before in ((3, 1), (4, 3)):
        model.progress['step'] = step
        model.save_to(folder, verbose=False)
        steps = [torch.load(file, weights_only=True)['progress']['step'] for file in (newest, f'{newest}.1')]
        assert steps == [step, before]


@pytest.mark.parametrize('section', [stackgan_v1, stackgan_v2])
def test_generating_also_uses_the_previous_checkpoint(tmp_path, section, capsys):
    name, folder = section.__name__.partition('.')[0], str(tmp_path / 'run')
    model = hostile.small_model(name)
    model.keep = 2
    model.save_to(folder, verbose=False)
    spoil(model.save_to(folder, verbose=False))
    assert section.load_generator(folder, name)[1] == f'{folder}/{name}.pt.1'
    assert 'used in place of' in capsys.readouterr().out
    assert run.find_run(str(tmp_path), f'{name}.pt') == folder
    os.remove(f'{folder}/{name}.pt')
    assert run.find_run(str(tmp_path), f'{name}.pt') == folder


@pytest.mark.parametrize('with_links', [True, False])
def test_keep_sets_the_number_of_checkpoints(tmp_path, monkeypatch, with_links):
    def no_link(*_):
        raise OSError(errno.EPERM, 'Operation not permitted')

    if not with_links:
        monkeypatch.setattr(os, 'link', no_link)
    path = str(tmp_path / 'a.pt')
    held = lambda: {name: checkpoint.load(str(tmp_path / name))['a'] for name in sorted(os.listdir(tmp_path))}  # noqa: E731
    for number, keep, expected in [(1, 1, {'': 1}), (2, 1, {'': 2}), (3, 3, {'': 3, '.1': 2}),
                                   (4, 3, {'': 4, '.1': 3, '.2': 2}), (5, 3, {'': 5, '.1': 4, '.2': 3}),
                                   (6, 2, {'': 6, '.1': 5}), (7, 1, {'': 7}),
                                   (8, 2 ** 62, {'': 8, '.1': 7}), (9, 2 ** 62, {'': 9, '.1': 8, '.2': 7})]:
        checkpoint.save(path, {'a': number}, keep=keep)
        assert held() == {f'a.pt{suffix}': value for suffix, value in expected.items()}
    checkpoint.save(path, {'a': 10}, keep=2)
    (tmp_path / 'a.pt.partial-previous').write_bytes(b'left by a process that was killed')
    checkpoint.save(path, {'a': 11}, keep=2)
    assert held() == {'a.pt': 11, 'a.pt.1': 10}
    shutil.copy(path, f'{path}.20301231')  # someone's copy
    checkpoint.save(path, {'a': 12}, keep=2)
    assert held() == {'a.pt': 12, 'a.pt.1': 11, 'a.pt.20301231': 11}
    assert checkpoint.files_of(path) == [path, f'{path}.1']


def test_saving_leaves_the_target_of_a_link_as_it_is(tmp_path):
    checkpoint.save(str(tmp_path / 'run.pt'), {'a': 1})
    (tmp_path / 'link.pt').symlink_to('run.pt')
    (tmp_path / 'run.pt').chmod(0o444)
    checkpoint.save(str(tmp_path / 'link.pt'), {'a': 2}, keep=2)
    held = {name: checkpoint.load(str(tmp_path / name))['a'] for name in ('run.pt', 'link.pt', 'link.pt.1')}
    assert held == {'run.pt': 1, 'link.pt': 2, 'link.pt.1': 1}
    assert not (tmp_path / 'link.pt.1').is_symlink() and (tmp_path / 'link.pt').stat().st_mode & 0o200


class Filling:
    """Imitate a file on a disk that is full after so many bytes."""

    def __init__(self, file, left):
        self.file, self.left = file, left

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            raise OSError(errno.ENOSPC, 'No space left on device')
        return self.file.write(data)


@pytest.mark.parametrize('old_format', [False, True])
def test_a_full_disk(tmp_path, monkeypatch, old_format):
    path = str(tmp_path / 'a.pt')
    checkpoint.save(path, {'a': 1}, old_format)
    size = len(hostile.dumps(fuzz.WHOLE, not old_format))
    for left in (0, 10, 700, size // 2, size - 10):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, 'open', lambda *args: Filling(open(*args), left), raising=False)  # noqa: B023
            with pytest.raises(CannotWrite) as caught:
                checkpoint.save(path, fuzz.WHOLE, old_format, keep=2)
        assert str(caught.value).startswith(f'{path}: disk full') and '\n' not in str(caught.value)
        assert os.listdir(tmp_path) == ['a.pt'] and checkpoint.load(path) == {'a': 1}
    assert isinstance(caught.value, UserError)
