"""CUB-200-2011 as published -> HDF5 -> this project's reader, and the chapter's; and the chapter's file -> ours."""
import io
import os
import pickle
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import types

import h5py
import numpy as np
import pytest
from PIL import Image

from char_cnn_rnn.reading import how_to_embed
from common import flags
from common.errors import UserError
from data import layout, pictures
from data.birds import prepare
from data.boxes import to_stored_orientation
from data.cache import load_split
from data.pictures import read_picture

SCRIPT = prepare.__file__
KEPT = b'\x89HDF\r\n\x1a\nkept'  # an HDF5 file that is damaged, which may be replaced
ALBATROSS, ANI = '002.Laysan_Albatross', '004.Groove_billed_Ani'      # StackGAN trains on one, tests on the other


def jpeg(size=(40, 30), mode='RGB', seed=0):
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(buffer, 'JPEG')
    return buffer.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def make_cub(folder, photographs, line_end='\n', boxes=True, box='2.0 30.5 20.0', ending='.jpg'):
    """Write a tiny CUB_200_2011 and text_c10; `photographs` maps CLASS/NAME to (bytes or None, captions or None)."""
    cub, text = folder / 'CUB_200_2011', folder / 'text_c10'
    for key, (data, captions) in photographs.items():
        if data is not None:
            write(cub / 'images' / f'{key}{ending}', data)
        if captions is not None:
            write(text / f'{key}.txt', line_end.join([*captions, '']))
    write(cub / 'images.txt', ''.join(f'{k} {key}{ending}{line_end}' for k, key in enumerate(photographs, 1)))
    if boxes:
        lines = [f'{k} {k}.0 {box}{line_end}' for k in range(1, len(photographs) + 1)]
        write(cub / 'bounding_boxes.txt', ''.join(lines))
    return ['--cub', str(cub), '--text', str(text)]


def captions(name, count=10):
    return [f'a small bird, {name}, caption {k}.' for k in range(count)]


def birds():
    """Return six valid photographs: one is gray, one has captions beyond ASCII."""
    photographs = {f'{ALBATROSS}/Laysan_{k}': (jpeg(seed=k), captions(k)) for k in range(3)}
    photographs |= {f'{ANI}/Ani_{k}': (jpeg(seed=9 + k), captions(9 + k)) for k in range(3)}
    photographs[f'{ANI}/Ani_1'] = (jpeg(mode='L'), captions('gray'))
    photographs[f'{ALBATROSS}/Laysan_2'] = (jpeg(seed=2), ['un oiseau coloré – très petit “ébène”', *captions(2, 9)])
    return photographs


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['prepare.py', *map(str, args)])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        prepare.main()
    finally:
        signal.signal(signal.SIGTERM, handler)


def error(monkeypatch, *args):
    """Return the message of the UserError that the command ends with: one line."""
    with pytest.raises(UserError) as caught:
        run(monkeypatch, *args)
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def out(tmp_path):
    return tmp_path / 'made' / 'birds.hdf5'


# --- the file ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('line_end', ['\n', '\r\n'])
def test_written_data_is_read_back(tmp_path, monkeypatch, capsys, out, line_end):
    photographs = birds()
    run(monkeypatch, *make_cub(tmp_path, photographs, line_end), '--out', out)
    with layout.open_file(str(out)) as file:
        assert [len(file[split]) for split in layout.SPLITS] == [30, 0, 30]
        assert 'embeddings' not in file.attrs and not layout.has_embeddings(file, 'train')
        train, test = (layout.read_index(file, split) for split in ('train', 'test'))
        assert set(train.names) == {'Laysan_0', 'Laysan_1', 'Laysan_2'} and set(test.classes) == {ANI}
        for index, split in ((train, 'train'), (test, 'test')):
            for name, class_name, key in zip(index.names, index.classes, index.img_keys):
                assert layout.read_jpeg(file, split, key) == photographs[f'{class_name}/{name}'][0]
        for key, caption in zip(train.keys, train.captions):
            name, _, k = key.rpartition('_')
            assert caption == photographs[f'{ALBATROSS}/{name}'][1][int(k)]
        assert train.boxes[train.names.index('Laysan_1')] == [2.0, 2.0, 30.5, 20.0]
    said = capsys.readouterr().out
    assert 'train: 3 photographs, 30 captions' in said and 'valid: 0 photographs' in said
    assert said.splitlines()[-1].endswith('skipped 0 photographs') and str(out) in said.splitlines()[-1]
    assert os.listdir(out.parent) == ['birds.hdf5']


def test_a_photograph_is_stored_once(tmp_path, monkeypatch, out):
    big = jpeg((400, 300))
    run(monkeypatch, *make_cub(tmp_path, {f'{ANI}/Ani': (big, captions('x'))}), '--out', out)
    assert len(big) < out.stat().st_size < 1.5 * len(big)
    with h5py.File(out) as file:
        for field in ('img', 'name', 'class', 'bbox'):
            assert len({h5py.h5o.get_info(group[field].id).addr for group in file['test'].values()}) == 1
        assert len({h5py.h5o.get_info(group['txt'].id).addr for group in file['test'].values()}) == 10


def test_default_out_is_beside_the_script(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['prepare.py', '--cub', 'a', '--text', 'b'])
    assert prepare.parse_args().out == os.path.join(os.path.dirname(os.path.abspath(SCRIPT)), 'birds.hdf5')


def test_several_folders_and_class_lists(tmp_path, monkeypatch, capsys, out):
    first = make_cub(tmp_path / 'a', {'x/one': (jpeg(), captions(1)), 'y/two': (jpeg(), captions(2, 3))})
    second = make_cub(tmp_path / 'b', {'z/three': (jpeg(), captions(3)), 'w/four': (jpeg(), captions(4))}, boxes=False)
    for split, text in (('train', 'x\r\n\r\n'), ('valid', 'y\r\nunheard of\r\n'), ('test', 'z')):
        write(tmp_path / f'{split}.txt', text)
    lists = [f'--{split}_classes={tmp_path / split}.txt' for split in layout.SPLITS]
    run(monkeypatch, '--cub', first[1], second[1], '--text', first[3], second[3], *lists, '--out', out)
    with h5py.File(out) as file:
        assert [len(file[split]) for split in layout.SPLITS] == [10, 3, 10]
        assert 'bbox' in file['train/one_0'] and 'bbox' not in file['test/three_0']
    said = capsys.readouterr().out
    assert 'left out: 1 photographs of 1 classes' in said and 'not in the data: 1 of the 4 classes' in said
    assert 'classes in the class lists (unheard of)\n' in said
    assert said.count('no bounding box: 1 photographs') == 1


def test_a_repeated_flag_adds_values(tmp_path, monkeypatch, capsys, out):
    first = make_cub(tmp_path / 'a', {'x/one': (jpeg(), captions(1)), 'y/two': (jpeg(), captions(2))})
    second = make_cub(tmp_path / 'b', {'z/three': (jpeg(), captions(3))})
    for name in 'xyz':
        write(tmp_path / f'{name}.txt', name)
    lists = [f'--{split}_classes={tmp_path}/{name}.txt' for split, name in zip(('train', 'train', 'test'), 'xyz')]
    run(monkeypatch, *first, *second, *lists, '--out', out)
    assert 'train: 2 photographs' in (said := capsys.readouterr().out) and 'test: 1 photographs' in said


def test_split_150_50_is_that_of_stackgan():
    split_of = prepare.cub.read_split(dict.fromkeys(layout.SPLITS, ()))
    assert (len(split_of), list(split_of.values()).count('train')) == (200, 150)


def test_runs_from_any_folder(tmp_path):
    def command(*args):
        return subprocess.run([sys.executable, SCRIPT, *args], cwd=tmp_path, capture_output=True, text=True)

    done = command(*make_cub(tmp_path, birds()), '--out', 'here.hdf5')
    assert (done.returncode, done.stderr) == (0, '') and (tmp_path / 'here.hdf5').exists()
    done = command('--cub', '.', '--text', '.')
    assert done.returncode == 1 and done.stderr.startswith('error: ') and len(done.stderr.splitlines()) == 1


def test_two_classes_may_have_photographs_of_one_name(tmp_path, monkeypatch, out):
    photographs = {f'{name}/0000': (jpeg(seed=k), captions(name)) for k, name in enumerate(('red', 'blue', 'green'))}
    photographs |= {'blue/blue.0000': (jpeg(seed=8), captions('x', 2)), 'other/0000': (jpeg(), captions(9)),
                    'other2/0000': (jpeg(), captions(9))}
    write(tmp_path / 'list.txt', 'red\nblue\ngreen\n')
    run(monkeypatch, *make_cub(tmp_path, photographs), '--train_classes', tmp_path / 'list.txt', '--out', out)
    with layout.open_file(str(out)) as file:
        index = layout.read_index(file, 'train')
        assert sorted(zip(index.classes, index.names)) == [
            ('blue', '0000'), ('blue', 'blue.0000'), ('green', '0000'), ('red', '0000')]
        for number, (class_name, name, key) in enumerate(zip(index.classes, index.names, index.img_keys)):
            data, texts = photographs[f'{class_name}/{name}']
            assert layout.read_jpeg(file, 'train', key) == data
            assert [text for text, photo in zip(index.captions, index.photo_of) if photo == number] == texts


def picture(kind, mode='RGB', color=None, **options):
    buffer = io.BytesIO()
    Image.new(mode, (40, 30), color).save(buffer, kind, **options)
    return buffer.getvalue()


def test_png_and_webp_are_converted_to_jpeg(tmp_path, monkeypatch, capsys, out):
    given = {'png': picture('PNG', color='red'), 'webp': picture('WEBP', color='red', lossless=True),
             'clear': picture('PNG', 'RGBA', (0, 0, 0, 0)), 'half': picture('PNG', 'LA', (0, 128)),
             'palette': picture('PNG', 'P', 0, transparency=0), 'gray': picture('PNG', 'L', 100)}
    photographs = {f'{ANI}/{name}': (data, captions(name)) for name, data in given.items()}
    photographs[f'{ANI}/deep'] = (picture('PNG', 'I;16'), captions('deep'))
    photographs[f'{ANI}/jpeg'] = (jpeg(), captions('jpeg'))
    run(monkeypatch, *make_cub(tmp_path, photographs, ending='.png'), '--out', out)
    said = capsys.readouterr().out
    assert 'stored as JPEG: 6 photographs (they were PNG or WebP' in said
    assert f'skipped {ANI}/deep: its photograph is unreadable (it has more than 8 bits per channel' in said
    colors = {'png': (254, 0, 0), 'webp': (254, 0, 0), 'clear': (255, 255, 255), 'half': (127, 127, 127),
              'palette': (255, 255, 255), 'gray': (100, 100, 100)}
    with layout.open_file(str(out)) as file:
        for name, color in colors.items():
            image = Image.open(io.BytesIO(layout.read_jpeg(file, 'test', f'{name}_0')))
            assert (image.format, image.size, image.mode) == ('JPEG', (40, 30), 'RGB')
            assert np.abs(np.subtract(image.getpixel((20, 15)), color)).max() <= 2, name
        assert layout.read_jpeg(file, 'test', 'jpeg_0') == jpeg()


def test_jpegs_keep_their_bytes_and_orientation(tmp_path, monkeypatch, capsys, out):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = picture('JPEG', exif=exif), picture('PNG', exif=exif)
    photographs = {f'{ANI}/{k}': (data, captions(k)) for k, data in enumerate(turned)}
    run(monkeypatch, *make_cub(tmp_path, photographs, box='2.0 20.0 30.5'), '--out', out)
    with layout.open_file(str(out)) as file:
        assert layout.read_jpeg(file, 'test', '0_0') == turned[0]
        assert Image.open(io.BytesIO(layout.read_jpeg(file, 'test', '1_0'))).size == (30, 40)
    assert 'bounding box reaches' not in capsys.readouterr().out


def test_boxes_outside_the_photograph_are_counted(tmp_path, monkeypatch, capsys, out):
    run(monkeypatch, *make_cub(tmp_path, birds(), box='2.0 39.0 20.0'), '--out', out)
    assert 'bounding box reaches outside: 4 photographs (' in capsys.readouterr().out
    with layout.open_file(str(out)) as file:
        assert None not in layout.read_index(file, 'test').boxes
    for box, apart in (('40 2 9 9', 1), ('2 30 9 9', 1), ('-9 2 9 9', 1), ('2 -9 9 9', 1), ('39 29 99 99', 0)):
        write(tmp_path / 'CUB_200_2011/bounding_boxes.txt', f'1 {box}\n2 1 2 30 20\n')
        run(monkeypatch, '--cub', tmp_path / 'CUB_200_2011', '--text', tmp_path / 'text_c10', '--out', out)
        said = capsys.readouterr().out
        assert ('bounding box lies outside: 1 photographs (the whole image is used; ' in said) == apart
        assert ('bounding box reaches outside: 1 photographs (' in said) != apart
        assert 'no bounding box: 4 photographs (' in said
        with layout.open_file(str(out)) as file:
            stored = layout.read_index(file, 'train')
        assert (stored.boxes[stored.names.index('Laysan_0')] is None) == apart


def test_captions_with_unreadable_characters_are_counted(tmp_path, monkeypatch, capsys, out):
    texts = ['a red bird', 'красная птица', 'très petit', 'x' * 202, 'A tab\tin it, and \x1b']
    run(monkeypatch, *make_cub(tmp_path, {f'{ANI}/one': (jpeg(), texts)}), '--out', out)
    said = capsys.readouterr().out
    assert 'cannot read: in 3 captions (\\t \\x1b è а и к' in said
    assert 'longer than the 201 characters that the sentence encoder reads: 1 captions' in said


def test_every_command_finds_the_extension_h5(tmp_path, monkeypatch, capsys):
    run(monkeypatch, *make_cub(tmp_path, birds()), '--out', tmp_path / 'my birds.h5')
    assert 'embeddings: none yet; see data/README.md' in capsys.readouterr().out
    command = shlex.split(how_to_embed(str(tmp_path / 'my birds.h5')).split('&&')[1])
    options = dict(zip(command[3::2], command[4::2]))
    assert flags.dataset_file(types.SimpleNamespace(data_dir=options['--data_dir'], dataset=options['--dataset'])) == \
        str(tmp_path / 'my birds.h5')
    write(tmp_path / 'my birds.hdf5', '')
    found = flags.dataset_file(types.SimpleNamespace(data_dir=str(tmp_path), dataset='my birds'))
    assert found.endswith('.hdf5')


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252', 'utf-8'])
def test_unusual_names_never_stop_preparation(tmp_path, encoding):
    strange = os.fsdecode(os.path.join(os.fsencode(tmp_path), b'caf\xe9'))
    os.mkdir(strange)
    photographs = {'鳥/小鳥': (jpeg(), captions('红'))}
    photographs |= {f'鳥/{name}': (b'', captions(1)) for name in ('é\u2029x', '\x1b[31m')}
    args = make_cub(tmp_path, photographs)
    write(tmp_path / 'list.txt', '鳥\n')
    done = subprocess.run([sys.executable, SCRIPT, *args, '--train_classes', str(tmp_path / 'list.txt'),
                           '--out', os.path.join(strange, '鳥.h5')],
                          env=os.environ | {'PYTHONIOENCODING': encoding}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b'') and b'\x1b' not in done.stdout
    assert os.listdir(strange) == ['鳥.h5'] and done.stdout.count(b'skipped ') == 3, done.stdout


# --- what cannot be used ----------------------------------------------------------------------------------------------

def test_defects_are_reported_and_skipped(tmp_path, monkeypatch, capsys, out):
    whole = jpeg((200, 200))
    gif = io.BytesIO()
    Image.new('RGB', (9, 9)).save(gif, 'GIF')
    broken = {
        f'{ANI}/cut': (whole[:len(whole) // 2], captions(1), 'unreadable'),
        f'{ANI}/absent': (None, captions(1), 'missing'),
        f'{ANI}/empty': (b'', captions(1), 'not a JPEG'),
        f'{ANI}/gif': (gif.getvalue(), captions(1), 'not a JPEG'),
        f'{ANI}/silent': (whole, None, 'captions are missing'),
        f'{ANI}/blank': (whole, ['', '  '], 'no captions'),
        f'{ANI}/nul': (whole, ['a bird\0'], 'NUL'),
        f'{ANI}/log': (whole, ['a bird'] * 1001, 'it has 1,001 captions; at most 1,000 are read'),
        f'{ANI}/../../../secret': (whole, captions(1), 'CLASS/NAME.jpg'),
        '../../secret2': (whole, captions(1), 'CLASS/NAME.jpg'),
    }
    args = make_cub(tmp_path, birds() | {key: each[:2] for key, each in broken.items()})
    write(tmp_path / 'text_c10' / ANI / 'latin.txt', 'un oiseau color\xe9'.encode('latin1'))
    write(tmp_path / 'CUB_200_2011/images' / ANI / 'latin.jpg', whole)
    write(tmp_path / 'CUB_200_2011/images' / ANI / 'boxed.jpg', whole)
    write(tmp_path / 'text_c10' / ANI / 'boxed.txt', 'a bird')
    with open(tmp_path / 'CUB_200_2011/images.txt', 'a') as file:
        file.write(f'99 {ANI}/latin.jpg\n100 {ANI}/boxed.jpg\n')
    with open(tmp_path / 'CUB_200_2011/bounding_boxes.txt', 'a') as file:
        file.write('100 1 2 nan 4\n')
    run(monkeypatch, *args, '--out', out)
    said = capsys.readouterr().out.splitlines()
    for key, (_, _, reason) in broken.items():
        assert [reason in line for line in said if line.startswith(f'skipped {key}')] == [True], key
    assert any('latin' in line and 'unreadable' in line for line in said)
    assert any('boxed' in line and 'bounding box' in line for line in said)
    assert said[-1].endswith(f'skipped {len(broken) + 2} photographs')
    with h5py.File(out) as file:
        assert len(file['train']) == len(file['test']) == 30


def test_unreadable_data_is_not_written(tmp_path, monkeypatch, capsys, out):
    boxes = ['1 1e39 1 30 30', '2 1 1 1e-46 30', '3 1 -1e38 30 30', '4 1 1 30 1e10', '5 1 1 30 inf']
    args = make_cub(tmp_path, {f'{ANI}/{k}': (jpeg(), captions(k)) for k in range(5)} | {
        f'{ANI}/long': (jpeg(), ['é' * (1 << 19) + 'e']), f'{ANI}/longest': (jpeg(), ['é' * (1 << 19)])})
    write(tmp_path / 'CUB_200_2011/bounding_boxes.txt', '\n'.join([*boxes, '6 1 2 30 20', '7 1 2 30 20']))
    run(monkeypatch, *args, '--out', out)
    said = capsys.readouterr()
    assert said.out.count('is not x, y, width and height') == 5 and 'skipped 6 photographs' in said.out
    assert f'skipped {ANI}/long: one of its captions has more than 1,048,576 bytes' in said.out and said.err == ''
    assert load_split(str(out), 'test').index.names == ['longest']


HUGE = 10 << 40  # bytes of a file with nothing in it


@pytest.mark.parametrize('limit', [None, 3 << 29])
def test_files_too_large_for_memory_are_an_error(tmp_path, out, limit):
    args = make_cub(tmp_path, {f'{ANI}/{k}': (jpeg(), captions(k)) for k in range(3)})
    write(tmp_path / 'list.txt', f'{ANI}\n')
    for name in (f'text_c10/{ANI}/0.txt', f'CUB_200_2011/images/{ANI}/1.jpg', 'huge.txt',
                 'pickles/train/filenames.pickle'):
        write(tmp_path / name, '')
        os.truncate(tmp_path / name, HUGE)

    def command(*more):
        return subprocess.run([sys.executable, SCRIPT, *args, '--out', out, *more], capture_output=True, text=True,
                              preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))))
    done = command()
    assert (done.returncode, done.stderr) == (0, '') and 'skipped 2 photographs' in done.stdout
    assert f'skipped {ANI}/0: its captions are too large (10,995,116,277,760 bytes' in done.stdout
    assert f'skipped {ANI}/1: its photograph is too large (10,995,116,277,760 bytes' in done.stdout
    for flag, name, path in (('--test_classes', 'huge.txt', 'huge.txt'),
                             ('--pickles', 'pickles', 'pickles/train/filenames.pickle')):
        done = command(flag, tmp_path / name)
        assert done.returncode == 1 and done.stderr.startswith(f'error: {tmp_path}/{path}: cannot be read (it has ')
        assert done.stderr.count('\n') == 1


@pytest.mark.parametrize('error', ['MemoryError()', 'RuntimeError("can\'t start new thread")'])
def test_out_of_memory_is_a_one_line_error(error):
    script = ('import sys; sys.path.insert(0, {root!r})\n'
              'from common.errors import run_command\n'
              'def main(): raise {error}\n'
              'sys.modules["common.torch_errors"] = None  # as where there is no memory to import it\n'
              'run_command(main)').format(root=os.path.join(os.path.dirname(SCRIPT), '..', '..'), error=error)
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, 'error: out of memory; end other programs, or read smaller '
                                              'files\n')


def test_boxes_with_leading_zeros_are_read(tmp_path, monkeypatch, capsys, out):
    args = make_cub(tmp_path, {f'{ANI}/{k}': (jpeg(seed=k), captions(k)) for k in range(2)})
    write(tmp_path / 'CUB_200_2011/bounding_boxes.txt', '001 1 2 30.5 20\n002 2 2 30.5 20\n')
    run(monkeypatch, *args, '--out', out)
    assert 'no bounding box' not in capsys.readouterr().out
    with layout.open_file(str(out)) as file:
        assert layout.read_index(file, 'test').boxes == [[1, 2, 30.5, 20], [2, 2, 30.5, 20]]


@pytest.mark.parametrize('zero', ['0', '000'])
def test_boxes_that_count_from_0_are_refused(tmp_path, monkeypatch, out, zero):
    args = make_cub(tmp_path, {f'{ANI}/{k}': (jpeg(seed=k), captions(k)) for k in range(2)})
    write(tmp_path / 'CUB_200_2011/bounding_boxes.txt', f'{zero} 1 2 30.5 20\n1 2 2 30.5 20\n')
    said = error(monkeypatch, *args, '--out', out)
    assert 'bounding_boxes.txt: only one of this file and images.txt counts from 0' in said
    assert said.endswith('number both the same way') and not out.exists()


def test_paths_of_windows(tmp_path, monkeypatch, capsys, out):
    args = make_cub(tmp_path, {f'{ANI}/one': (jpeg(), captions(1))})
    write(tmp_path / 'CUB_200_2011/images.txt', f'1 {ANI}\\one.jpg\r\n2 ..\\..\\secret.jpg\r\n')
    run(monkeypatch, *args, '--out', out)
    said = capsys.readouterr().out
    assert 'test: 1 photographs, 10 captions' in said and 'skipped ../../secret.jpg: images.txt must name' in said


def test_a_missing_flag_is_a_one_line_error(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, '--cub', 'a')
    assert ended.value.code == 2
    assert capsys.readouterr().err == 'error: the following arguments are required: --text (--help lists the flags)\n'


@pytest.mark.parametrize('box', ['0.5 0.25 0.2', '1 1 1'])
def test_relative_boxes_are_recognized(tmp_path, monkeypatch, out, box):
    args = make_cub(tmp_path, {f'{ANI}/one': (jpeg(), captions(1))}, box=box)
    said = error(monkeypatch, *args, '--out', out)
    assert 'no usable photograph (1 skipped' in said and 'fractions of the image' in said and 'in pixels' in said


def test_classes_without_class_lists_are_split(tmp_path, monkeypatch, out):
    said = error(monkeypatch, *make_cub(tmp_path, {'rose/one': (jpeg(), captions(1))}), '--out', out)
    assert 'rose' in said and 'none of the 200 of CUB-200-2011' in said and '--train_classes FILE' in said


@pytest.mark.parametrize('orientation', range(1, 9))
def test_boxes_follow_the_orientation_of_the_photograph(orientation):
    """Boxes are drawn on the upright photograph, as most programs show it; CUB's own photographs are stored upright."""
    seen, box = Image.new('RGB', (400, 304)), (16, 200, 120, 80)
    seen.paste('red', (16, 200, 136, 280))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transpositions, from seen to stored
    stored = seen.transpose(undo[orientation]) if orientation > 1 else seen
    exif, jpeg = Image.Exif(), io.BytesIO()
    exif[274] = orientation
    stored.save(jpeg, 'JPEG', exif=exif, quality=95)
    x, y, width, height = to_stored_orientation(box, stored.size, orientation)
    cut = read_picture(jpeg.getvalue(), part=lambda size: (x, y, x + width, y + height))
    assert cut.size == (120, 80) and np.asarray(cut)[8:-8, 8:-8].mean((0, 1)) == pytest.approx([254, 0, 0], abs=3)


def test_photographs_with_too_many_pixels_are_skipped(tmp_path, monkeypatch, capsys, out):
    sizes = {'large': (300, 300), 'huge': (500, 500), 'long': (65000, 1)}
    photographs = birds() | {f'{ANI}/{name}': (jpeg(size), captions(1)) for name, size in sizes.items()}
    monkeypatch.setattr(pictures, 'PIXELS', 80000)
    run(monkeypatch, *make_cub(tmp_path, photographs), '--out', out)
    done = capsys.readouterr()
    assert done.out.count('pixels; the limit is') == 2 and 'skipped 2 photographs' in done.out and done.err == ''
    assert f'skipped {ANI}/long' not in done.out  # its middle is what is trained on


def test_pipes_do_not_block(tmp_path, monkeypatch, capsys, out):
    args = make_cub(tmp_path, birds() | {f'{ANI}/photograph': (None, captions(1)), f'{ANI}/text': (jpeg(), None)})
    os.mkfifo(tmp_path / 'CUB_200_2011/images' / ANI / 'photograph.jpg')
    os.mkfifo(tmp_path / 'text_c10' / ANI / 'text.txt')
    run(monkeypatch, *args, '--out', out)
    assert 'skipped 2 photographs' in capsys.readouterr().out
    os.remove(tmp_path / 'CUB_200_2011/images.txt')
    os.mkfifo(tmp_path / 'CUB_200_2011/images.txt')
    assert 'is not a file' in error(monkeypatch, *args, '--out', out)
    os.mkfifo(tmp_path / 'list.txt')
    said = error(monkeypatch, *args, '--test_classes', tmp_path / 'list.txt')
    assert 'list.txt: cannot be read (it is a pipe' in said


def test_dry_run_prints_the_same_and_writes_nothing(tmp_path, monkeypatch, capsys, out):
    photographs = birds() | {f'{ANI}/absent': (None, captions(1))}
    run(monkeypatch, *make_cub(tmp_path, photographs), '--out', out, '--dry_run')
    said = capsys.readouterr().out
    assert 'test: 3 photographs, 30 captions' in said and f'skipped {ANI}/absent: ' in said
    assert 'JPEGs: ' in said and 'would write' in said and said.splitlines()[-1].endswith('skipped 1 photographs')
    assert not out.parent.exists()
    os.mkfifo(tmp_path / 'pipe.h5')
    for path in (tmp_path / 'pipe.h5', '/proc/x.hdf5'):
        for more in ([], ['--dry_run']):
            said = error(monkeypatch, *make_cub(tmp_path, photographs), '--out', path, *more)
            assert said.startswith(f'{path}: cannot be written')


def test_errors_name_the_file_and_keep_old_data(tmp_path, monkeypatch, out):
    good = make_cub(tmp_path / 'good', birds())
    write(out, KEPT)
    end = ['--out', out]
    assert 'images.txt' in error(monkeypatch, '--cub', tmp_path, *good[2:], *end)
    assert 'no such folder' not in error(monkeypatch, *good[:2], '--text', tmp_path, *end)
    assert 'text_c10' in error(monkeypatch, *good[:2], '--text', tmp_path / 'absent', *end)
    assert '--text has 1' in error(monkeypatch, '--cub', good[1], good[1], *good[2:], *end)
    said = error(monkeypatch, '--cub', good[1], good[1], '--text', good[3], good[3], *end)
    assert 'Laysan_0.jpg: is listed 2 times' in said
    write(tmp_path / 'list.txt', f'{ANI}\n')
    both = ['--train_classes', tmp_path / 'list.txt', '--test_classes', tmp_path / 'list.txt']
    assert f'{ANI}: is in the class lists of both train and test' in error(monkeypatch, *good, *both, *end)
    assert 'absent.txt' in error(monkeypatch, *good, '--train_classes', tmp_path / 'absent.txt', *end)
    for text in ('Laysan_Albatross\n', ''):
        write(tmp_path / 'list.txt', text)
        said = error(monkeypatch, *good, '--test_classes', tmp_path / 'list.txt', *end)
        assert said.startswith(f'{tmp_path}/list.txt: lists no class of the data, such as {ALBATROSS}; write one ')
    nothing = make_cub(tmp_path / 'nothing', {f'{ANI}/x': (b'', captions(1))})
    assert '(1 skipped, mostly because its photograph is not a JPEG' in error(monkeypatch, *nothing, *end)
    assert 'is a folder' in error(monkeypatch, *good, '--out', tmp_path)
    assert 'give a name that ends in .hdf5 or .h5' in error(monkeypatch, *good, '--out', tmp_path / 'birds')
    write(tmp_path / 'x.hdf5', 'kept')
    assert 'would also refer to x.hdf5' in error(monkeypatch, *good, '--out', tmp_path / 'x.h5')
    write(tmp_path / 'good/CUB_200_2011/images.txt', '1\n')
    assert 'images.txt' in error(monkeypatch, *good, *end)
    write(tmp_path / 'good/CUB_200_2011/images.txt', '\n')
    assert 'images.txt: is empty; give --cub the folder' in error(monkeypatch, *good, *end)
    for place in ('x.hdf5', 'x.hdf5/deeper'):
        said = error(monkeypatch, *good, '--out', tmp_path / place / 'y.hdf5', '--dry_run')
        assert f'y.hdf5: {tmp_path}/x.hdf5 is a file, not a folder' in said
    assert out.read_bytes() == KEPT and os.listdir(out.parent) == ['birds.hdf5']


def test_a_full_disk_is_detected_before_writing(tmp_path, monkeypatch, out):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=1000))
    assert 'disk full' in error(monkeypatch, *make_cub(tmp_path, birds()), '--out', out, '--dry_run')
    assert not out.parent.exists()
    assert 'disk full' in error(monkeypatch, *make_cub(tmp_path, birds()), '--out', out)
    assert not out.parent.exists()


PAUSE = '''
import sys, time
sys.path.insert(0, {root!r})
from common import signals
from common.errors import run_command
from data import layout
from data.birds import prepare
write_photograph, written = layout.write_photograph, []
def pause_halfway(*args):
    write_photograph(*args)
    written.append(args)
    if len(written) == 3:
        print('halfway', flush=True)
        for _ in range(600):
            time.sleep(.1)
            signals.deliver_held()
layout.write_photograph = pause_halfway
run_command(prepare.main)
'''


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize('before', [None, KEPT])
def test_a_killed_preparation_leaves_the_old_file(tmp_path, out, how, before):
    if before:
        write(out, before)
    script = PAUSE.format(root=os.path.join(os.path.dirname(SCRIPT), '..', '..'))
    process = subprocess.Popen([sys.executable, '-c', script, *make_cub(tmp_path, birds()), '--out', str(out)],
                               stdout=subprocess.PIPE, text=True)
    if before:
        assert process.stdout.readline() == f'{out}: exists; will be replaced, with the embeddings that it may hold\n'
    assert process.stdout.readline() == 'halfway\n'
    process.send_signal(how)
    assert process.wait(20) != 0
    process.stdout.close()
    assert (out.read_bytes() if out.exists() else None) == before
    if how == signal.SIGTERM:
        assert os.listdir(out.parent) == [out.name] if before else not out.parent.exists()


# --- embeddings -------------------------------------------------------------------------------------------------------

def embedding(key, count=10):
    return np.random.default_rng(len(key)).normal(size=(count, 1024)).astype(np.float32) + sum(key.encode())


def make_pickles(folder, rows_of):
    """Write StackGAN's pickles, all under train/: their split does not determine ours."""
    for part, keys in (('train', list(rows_of)), ('test', [])):
        write(folder / part / 'filenames.pickle', pickle.dumps(keys, 2))
        write(folder / part / 'char-CNN-RNN-embeddings.pickle', pickle.dumps([rows_of[key] for key in keys], 2))
    return str(folder)


def test_embeddings_are_read_from_pickles(tmp_path, monkeypatch, capsys, out):
    photographs = birds() | {f'{ANI}/nine': (jpeg(), captions('x', 9)), f'{ANI}/none': (jpeg(), captions('y'))}
    rows_of = {key: embedding(key) for key in photographs if not key.endswith('none')}
    pickles = make_pickles(tmp_path / 'pickles', rows_of)
    run(monkeypatch, *make_cub(tmp_path, photographs), '--pickles', pickles, '--out', out)
    with layout.open_file(str(out)) as file:
        assert file.attrs['embeddings'] == 'StackGAN pickles' and layout.has_embeddings(file, 'test')
        for split, class_name in (('train', ALBATROSS), ('test', ANI)):
            index = layout.read_index(file, split)
            rows = layout.read_embeddings(file, split, index.keys)
            for key, row in zip(index.keys, rows):
                name, _, k = key.rpartition('_')
                np.testing.assert_array_equal(row, rows_of[f'{class_name}/{name}'][int(k)])
    said = capsys.readouterr().out
    assert f'skipped {ANI}/nine: it has 9 captions but 10 embeddings' in said
    assert f'skipped {ANI}/none: no embedding' in said and 'skipped 2 photographs' in said


def test_embeddings_are_read_from_torch7_files(tmp_path, monkeypatch, out):
    from tests.test_published_embeddings import t7_file
    photographs = birds()
    for key in photographs:
        t7_file(tmp_path / 'icml' / f'{key}.t7', embedding(key))
    run(monkeypatch, *make_cub(tmp_path, photographs), '--icml', tmp_path / 'icml', '--out', out)
    with layout.open_file(str(out)) as file:
        assert file.attrs['embeddings'] == 'icml2016 t7'
        row = layout.read_embeddings(file, 'test', ['Ani_1_7'])[0]
    np.testing.assert_array_equal(row, embedding(f'{ANI}/Ani_1')[7])


def test_two_sources_of_embeddings_are_an_error(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, '--cub', 'a', '--text', 'b', '--icml', 'c', '--pickles', 'd')
    assert caught.value.code != 0 and 'not allowed with' in capsys.readouterr().err


# --- the chapter's file and its reader --------------------------------------------------------------------------------

def read_as_the_chapter_does(path, split):
    """Return all examples of a split, read in the way of the chapter's own data set class.

    Its `astype(str)` fails with h5py 3 where a caption is not ASCII, in its own file as in ours; those are left out.
    """
    examples = []
    with h5py.File(path, mode='r') as file:
        for key in [str(key) for key in file[split].keys()]:
            example = file[split][key]
            if example['txt'][()].isascii():
                image = Image.open(io.BytesIO(bytes(np.array(example['img'])))).resize((64, 64))
                others = [other for other in file[split].values() if other['class'] != example['class']]
                examples.append({'class': str(np.array(example['class'])), 'name': str(np.array(example['name'])),
                                 'embedding': np.array(example['embeddings'], dtype=float), 'image': image,
                                 'txt': np.array(example['txt']).astype(str), 'others': len(others)})
    return examples


def test_the_chapters_reader_reads_our_file(tmp_path, monkeypatch, out):
    photographs = birds()
    pickles = make_pickles(tmp_path / 'pickles', {key: embedding(key) for key in photographs})
    run(monkeypatch, *make_cub(tmp_path, photographs), '--pickles', pickles, '--out', out)
    examples = read_as_the_chapter_does(out, 'train')
    assert len(examples) == 29
    for example in examples:
        assert example['image'].size == (64, 64)
        assert example['embedding'].shape == (1024,) and example['embedding'].dtype == float
        assert ALBATROSS in example['class'] and 'Laysan_' in example['name'] and example['others'] >= 20
    written = [caption for key in photographs if ALBATROSS in key for caption in photographs[key][1]]
    assert sorted(str(example['txt']) for example in examples) == sorted(filter(str.isascii, written))


def write_as_the_chapters_converter_does(path, photographs):
    """Write five captions per photograph with their line ends, each with a copy of the bytes, and no boxes."""
    text = h5py.special_dtype(vlen=str)
    with h5py.File(path, 'w') as file:
        for split, class_name in (('train', ALBATROSS), ('valid', None), ('test', ANI)):
            group = file.create_group(split)
            for key in (key for key in photographs if key.split('/')[0] == class_name):
                name = key.split('/')[1]
                for k, caption in enumerate(photographs[key][1][:5]):
                    example = group.create_group(f'{name}_{k}')
                    example.create_dataset('name', data=name)
                    example.create_dataset('img', data=np.void(photographs[key][0]))
                    example.create_dataset('embeddings', data=embedding(key)[k])
                    example.create_dataset('class', data=class_name)
                    example.create_dataset('txt', data=np.array(f'{caption}\n').astype(object), dtype=text)


def test_our_reader_reads_the_chapters_file(tmp_path):
    photographs, path = birds(), tmp_path / 'public.hdf5'
    write_as_the_chapters_converter_does(path, photographs)
    with layout.open_file(str(path)) as file:
        index = layout.read_index(file, 'test')
        assert index.names == ['Ani_0', 'Ani_1', 'Ani_2'] and set(index.classes) == {ANI} and index.boxes == [None] * 3
        assert index.captions == [caption for k in range(3) for caption in photographs[f'{ANI}/Ani_{k}'][1][:5]]
        assert layout.read_jpeg(file, 'test', index.img_keys[1]) == photographs[f'{ANI}/Ani_1'][0]
        assert layout.has_embeddings(file, 'test')
        row = layout.read_embeddings(file, 'test', ['Ani_2_4'])[0]
    np.testing.assert_array_equal(row, embedding(f'{ANI}/Ani_2')[4])


@pytest.mark.skipif('CUB_DATA' not in os.environ, reason='CUB_DATA names no folder with CUB_200_2011 and text_c10')
def test_real_photographs_are_prepared(tmp_path, monkeypatch, capsys):
    cub = os.environ['CUB_DATA']
    run(monkeypatch, '--cub', os.path.join(cub, 'CUB_200_2011'), '--text', os.path.join(cub, 'text_c10'),
        '--out', tmp_path / 'real.hdf5')
    assert capsys.readouterr().out.splitlines()[-1].endswith('skipped 0 photographs')


def test_class_names_of_macos(tmp_path, monkeypatch, capsys, out):
    """A decomposed é in the names of folders, and a composed one in what is typed, or the other way round."""
    for number, (stored, typed) in enumerate([('Me\u0301sange', 'Mésange'), ('Mésange', 'Me\u0301sange')]):
        folder = tmp_path / str(number)
        args = make_cub(folder, {f'{stored}/one': (jpeg(), captions(1))})
        write(folder / 'train.txt', f'{typed}\n')
        run(monkeypatch, *args, '--train_classes', folder / 'train.txt', '--out', out)
        assert 'train: 1 photographs' in capsys.readouterr().out


def test_a_list_without_a_class_of_the_data_is_refused_beside_a_good_one(tmp_path, monkeypatch, out):
    args = make_cub(tmp_path, {f'{name}/one': (jpeg(), captions(1)) for name in ('rose', 'tulip')})
    write(tmp_path / 'train.txt', 'rose/\n')
    write(tmp_path / 'test.txt', 'tulip\n')
    said = error(monkeypatch, *args, '--train_classes', tmp_path / 'train.txt', '--test_classes', tmp_path / 'test.txt',
                 '--out', out)
    assert f'{tmp_path / "train.txt"}: lists no class of the data, such as rose' in said and not out.exists()


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    run(monkeypatch, *make_cub(tmp_path, {f'{ANI}/one': (jpeg(), captions(1))}), '--out=~/data/birds.hdf5')
    assert (tmp_path / 'data' / 'birds.hdf5').is_file()


def test_a_folder_given_twice_is_named(tmp_path, monkeypatch, out):
    args = make_cub(tmp_path, {f'{ANI}/one': (jpeg(), captions(1))})
    said = error(monkeypatch, *args, *args, '--out', out)
    assert 'one.jpg: is listed 2 times; list it, or its folder, once' in said
