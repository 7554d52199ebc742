"""Images from unknown sources are read upright and in RGB, or refused with a reason."""
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from common.flags import ROOT
from data import cache, layout, pictures
from data.image_folder import image_folder
from data.multiscale_dataset import MultiscaleDataset, frame
from data.pictures import BadPicture, read_picture
from data.txt2image_dataset import preprocess
from tests import tiny
from tests.errors import one_line
from tests.fuzz_pictures import BOMBS, bomb
from tests.scenes import TINY, slope

# What the corners of `slope`, stored as each orientation of EXIF says, are once it is upright.
TURNED = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
          5: lambda a: a.swapaxes(0, 1), 6: lambda a: a.swapaxes(0, 1)[:, ::-1],
          7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: a.swapaxes(0, 1)[::-1]}
# What they are refused for; the others can be used, and are then squeezed or cut.
REFUSED = {
    'a PNG of 2^31 x 2^31': 'exceeds limit', 'a PNG of 60000 x 60000': 'exceeds limit',
    'a PNG of 12000 x 12000': '12000 x 12000|exceeds limit', 'a GIF of 65535 x 65535': 'exceeds limit|65535',
    'a BMP of 2^31': 'exceeds limit', 'a PPM of 90000 x 90000': 'exceeds limit',
    'a JPEG of a thousand scans': 'too many scans',
    'an EPS': 'not an image in a supported', 'a PSD': 'not an image in', 'an icon of icons': 'not an image in',
    'nothing': 'not an image in', 'a page': 'not an image in', 'a PNG of a text that inflates': 'too large'}


def stored(picture, orientation=None, file_format='PNG', **options):
    """Return a PIL image encoded as the bytes of a file."""
    buffer = io.BytesIO()
    if orientation:
        options['exif'] = Image.Exif()
        options['exif'][0x0112] = orientation
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize('file_format', ['PNG', 'JPEG', 'TIFF', 'WEBP'])
@pytest.mark.parametrize('orientation', TURNED)
def test_images_are_upright(orientation, file_format):
    picture = slope((60, 40))
    expected = np.asarray(Image.open(io.BytesIO(stored(picture, None, file_format))).convert('RGB'))
    found = read_picture(stored(picture, orientation, file_format))
    assert np.array_equal(np.asarray(found), TURNED[orientation](expected))


def test_boxes_refer_to_the_stored_orientation():
    picture = Image.new('RGB', (50, 40), 'white')
    picture.paste((250, 0, 0), (30, 0, 50, 20))
    picture.paste((0, 0, 250), (40, 0, 50, 20))
    part = read_picture(stored(picture, 6), lambda size: (30, 0, 50, 20) if size == (50, 40) else None)
    red, blue = (np.asarray(part) == color for color in ((250, 0, 0), (0, 0, 250)))
    assert part.size == (20, 20) and red.all(2)[:10].all() and blue.all(2)[10:].all()  # turned to the right


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_a_damaged_orientation_is_ignored():
    for exif in (b'Exif\0\0', b'Exif\0\0II*\0\xff\xff\xff\xff', os.urandom(100)):
        assert read_picture(stored(slope(), None, 'JPEG', exif=exif)).size == (60, 40)


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGBA', 'CMYK'])
def test_every_mode_is_converted_to_rgb(mode):
    file_format = 'TIFF' if mode in ('CMYK', 'LA') else 'PNG'
    assert read_picture(stored(slope().convert(mode), None, file_format)).mode == 'RGB'


@pytest.mark.parametrize('mode, file_format', [('I;16', 'PNG'), ('I;16', 'TIFF'), ('I', 'TIFF'), ('F', 'TIFF')])
def test_more_than_8_bits_are_refused(mode, file_format, tmp_path):
    (tmp_path / 'deep').write_bytes(stored(Image.new(mode, (9, 9)), None, file_format))
    for read in (read_picture, pictures.check_header):
        with pytest.raises(BadPicture, match='it has more than 8 bits per channel; save it with 8'):
            read(str(tmp_path / 'deep'))


@pytest.mark.parametrize('mode, color, options', [
    ('RGBA', (200, 0, 0, 0), {}), ('LA', (0, 0), {}), ('P', 0, {'transparency': 0}),
    ('RGB', 0, {'transparency': (0, 0, 0)})])
def test_what_is_transparent_becomes_white(mode, color, options):
    picture = stored(Image.new(mode, (9, 9), color), **options)
    for part in (None, lambda size: (2, 2, 6, 6)):
        assert read_picture(picture, part).getcolors()[0][1] == (255, 255, 255)


@pytest.mark.parametrize('name', BOMBS)
def test_decompression_bombs_take_little_memory(name, tmp_path):
    """Read in a process of its own, whose memory is measured."""
    (tmp_path / 'bomb').write_bytes(bomb(name))
    script = ('import resource, sys, time\n'
              'from data import pictures\n'
              'from data.multiscale_dataset import frame\n'
              'measure = lambda: resource.getrusage(resource.RUSAGE_SELF)\n'
              'before = measure()\n'
              'try:\n'
              '    picture = pictures.read_picture(sys.argv[1])\n'
              '    print(frame(picture, 256).size, picture.resize((64, 64)).size)\n'
              'except pictures.BadPicture as error:\n'
              '    print("refused:", error)\n'
              'after = measure()\n'
              'print(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)\n'
              'print((after.ru_maxrss - before.ru_maxrss) / (1e6 if sys.platform == "darwin" else 1e3))')
    ended = subprocess.run([sys.executable, '-c', script, str(tmp_path / 'bomb')], cwd=ROOT, capture_output=True,
                           text=True)
    assert not ended.stderr
    said, seconds, megabytes = ended.stdout.splitlines()
    assert float(seconds) < 5 and float(megabytes) < 200
    assert said.startswith('refused: ') == (name in REFUSED)


@pytest.mark.filterwarnings('error::PIL.Image.DecompressionBombWarning')  # pytest forgets what `data.pictures` set
@pytest.mark.parametrize('name', REFUSED)
def test_decompression_bombs_are_refused_with_a_reason(name):
    with pytest.raises(BadPicture, match=REFUSED[name]):
        read_picture(bomb(name))


@pytest.mark.parametrize('error', [Image.DecompressionBombError, Image.DecompressionBombWarning, SyntaxError,
                                   ValueError, OSError, MemoryError, IndexError, ZeroDivisionError, AssertionError])
def test_any_pillow_error_names_the_photograph(error, tmp_path, monkeypatch):
    path = tiny.make(tmp_path / 'birds.hdf5', {'train': {'001.Auk': 1, '002.Jay': 1}})

    def fail(*_):
        raise error('two\nlines')

    monkeypatch.setattr(Image.Image, 'convert', fail)
    monkeypatch.setattr('PIL.JpegImagePlugin.JpegImageFile.load', fail)
    for read in (lambda: cache.load_split(path, 'train', 64, preprocess), MultiscaleDataset(path, **TINY).cached,
                 lambda: MultiscaleDataset(path, **TINY)[0]):
        one_line(read, match=r'the photograph (Auk|Jay)_0 of /train cannot be decoded \(two lines\); make the file')


def test_special_files_do_not_block(tmp_path):
    os.mkfifo(tmp_path / 'pipe.jpg')
    for path in (tmp_path / 'pipe.jpg', tmp_path, tmp_path / 'absent.jpg'):
        for read in (read_picture, pictures.check_header):
            with pytest.raises(BadPicture, match='no such file'):
                read(str(path))


def test_the_largest_image_is_accepted_and_larger_ones_are_refused(monkeypatch):
    monkeypatch.setattr(pictures, 'PIXELS', 60 * 40)
    assert read_picture(stored(slope())).size == (60, 40)
    for picture, options in ((slope((61, 40)), {}), (slope().convert('CMYK'), {'file_format': 'JPEG'}),
                             (slope(), {'file_format': 'WEBP'})):  # the last two take twice as much memory
        with pytest.raises(BadPicture, match='pixels; the limit'):
            read_picture(stored(picture, **options))


def test_frame_sizes_are_limited():
    for size in ((3000, 1), (1, 3000), (3000, 140), (65000, 1)):
        width, height = frame(Image.new('RGB', size), 256).size
        assert min(width, height) == 304 and max(width, height) <= 20 * 304 + 304
    middle = Image.new('RGB', (100, 3), 'white')
    middle.paste((250, 0, 0), (20, 0, 80, 3))
    assert frame(middle, 64).getcolors() == [(76 * 76 * 20, (250, 0, 0))]


def test_frames_of_narrow_photographs_are_limited(tmp_path):
    path = str(tmp_path / 'birds.hdf5')
    with layout.replace_file(path) as file:
        for name, size in (('Auk_0', (3000, 1)), ('Jay_0', (1, 3000))):
            layout.write_photograph(file, 'train', layout.Photograph(
                name, name[:3], stored(Image.new('RGB', size)), ['a bird'], bbox=(0, 0, 3000, 1)))
    MultiscaleDataset(path).cached()[0]
    assert os.path.getsize(tmp_path / 'birds.cache' / 'train' / 'frames_304.bin') < 15e6


# --- folders of images ------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    """Return a class folder of four files: valid, a web page, truncated, and with a wrong extension."""
    (tmp_path / 'all').mkdir()
    slope().save(tmp_path / 'all' / 'a.png')
    (tmp_path / 'all' / 'b.jpg').write_bytes(b'<html>')
    (tmp_path / 'all' / 'c.jpg').write_bytes(tiny.jpeg()[:-400])
    slope().save(tmp_path / 'all' / 'd.jpg', 'PNG')
    return tmp_path


def test_files_that_are_not_images_are_reported_and_skipped(folder, capsys):
    dataset = image_folder(str(folder), **TINY)
    said = capsys.readouterr()
    assert len(dataset) == 3 and said.out.count('skipped ') == 1
    assert f'skipped {folder}/all/b.jpg: it is not an image in a supported format' in said.out
    for _ in range(2):
        assert [item['right_images'][-1].shape for item in dataset.__getitems__([0, 1, 2, 1])] == [(3, 64, 64)] * 4
    said = capsys.readouterr()
    assert said.err.count('cannot be decoded') == 1
    assert 'all/c.jpg: cannot be decoded (' in said.err and 'the next image takes its place' in said.err


def test_a_folder_of_damaged_images_is_an_error(folder):
    for name in ('a.png', 'd.jpg'):
        (folder / 'all' / name).unlink()
    dataset = image_folder(str(folder), **TINY)
    assert 'all/c.jpg: cannot be decoded (' in one_line(dataset.__getitem__, 0)
