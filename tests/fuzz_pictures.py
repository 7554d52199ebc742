"""Hostile images: valid ones of every format with changed bytes, and malicious files."""
import functools
import io
import os
import struct
import zlib

import numpy as np
from PIL import Image

from data.multiscale_dataset import crop_box, frame
from data.pictures import BadPicture, check_header, read_picture

SMALL = (48, 36)
INTERESTING = (0, 1, 2, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1)
KINDS = (('JPEG', 'RGB', {}), ('JPEG', 'RGB', {'progressive': True}), ('JPEG', 'CMYK', {}), ('JPEG', 'L', {}),
         ('PNG', 'RGBA', {}), ('PNG', 'P', {}), ('PNG', 'I;16', {}), ('PNG', '1', {}), ('WEBP', 'RGB', {}),
         ('WEBP', 'RGBA', {'lossless': True}), ('GIF', 'P', {}), ('BMP', 'RGB', {}), ('BMP', 'P', {}),
         ('PPM', 'RGB', {}), ('TIFF', 'RGB', {}), ('TIFF', 'RGB', {'compression': 'tiff_lzw'}), ('TIFF', 'F', {}),
         ('TIFF', 'L', {'compression': 'jpeg'}), ('TIFF', '1', {'compression': 'group4'}))


def read(path):
    """Read an image in all the ways in which our code reads them."""
    with open(path, 'rb') as file:
        data = file.read()
    for source, part in ((path, None), (data, lambda size: crop_box(size, (5, 5, 20, 10)))):
        try:
            picture = read_picture(source, part)
        except BadPicture as error:
            assert str(error) and '\n' not in str(error)
            continue
        assert picture.mode == 'RGB'
        assert picture.resize((64, 64)).size == (64, 64) and min(frame(picture, 64).size) == 76
    try:
        check_header(path)
    except BadPicture:
        pass


@functools.cache
def _valid(kind):
    file_format, mode, options = KINDS[kind]
    pixels = np.random.default_rng(kind).integers(0, 60, (SMALL[1], SMALL[0], 3)) + np.arange(0, 144, 3)[:, None]
    picture, buffer = Image.fromarray(pixels.astype(np.uint8)), io.BytesIO()
    picture = picture.convert('L').convert('I').convert(mode) if mode == 'I;16' else picture.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif_options = {'exif': exif} if file_format in ('JPEG', 'PNG', 'WEBP', 'TIFF') else {}
    picture.save(buffer, file_format, **options, **exif_options)
    return buffer.getvalue()


def changed_bytes(rng, folder):
    """Read a valid image with bits flipped, bytes or numbers overwritten, parts moved, or the end cut off."""
    data = bytearray(_valid(rng.randrange(len(KINDS))))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place, size = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(200, len(data))), 1
        how = rng.randrange(5)
        if how == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif how == 1:
            data[place] = rng.randrange(256)
        elif how == 2:
            number, size = rng.choice(INTERESTING), rng.choice((1, 2, 4))
            number = (number % 256 ** size).to_bytes(size, rng.choice(('little', 'big')))
            data[place:place + size] = number[:len(data) - place]
        elif how == 3:
            part = data[rng.randrange(len(data)):][:rng.randrange(1, 64)]
            data[place:place + len(part)] = part[:len(data) - place]
        elif len(data) > 20 and rng.random() < 0.2:
            del data[max(place, 10):]
    read(_write(folder, data))


def png(width, height, data=b'', depth=8, color=2, extra=b''):
    """Return a PNG that claims to have this size."""
    def chunk(kind, content):
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    header = struct.pack('>IIBBBBB', width, height, depth, color, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + extra + chunk(b'IDAT', data) + chunk(b'IEND', b'')


def _saved(size, file_format='JPEG', mode='RGB', **options):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, file_format, **options)
    return buffer.getvalue()


def many_scans():
    """Return a progressive JPEG of 3000 x 3000 pixels whose last scan is repeated a thousand times."""
    data = _saved((3000, 3000), progressive=True)
    last = data.rindex(b'\xff\xda')
    return data[:last] + (data[last:-2]) * 1000 + data[-2:]


# Files that make a careless reader take all memory, hang, or start programs; the bytes are made when they are needed.
BOMBS = {
    'a PNG of 2^31 x 2^31': lambda: png(2 ** 31 - 1, 2 ** 31 - 1),
    'a PNG of 60000 x 60000': lambda: png(60000, 60000, zlib.compress(bytes(100_000))),
    'a PNG of 12000 x 12000': lambda: png(12000, 12000, zlib.compress(bytes(36001 * 10))),
    'a GIF of 65535 x 65535': lambda: b'GIF89a\xff\xff\xff\xff' + bytes(3) + b',' + bytes(9) + b'\2\0;',
    'a BMP of 2^31': lambda: b'BM' + struct.pack('<I4xIIiiHH24x', 60, 54, 40, 2 ** 31 - 1, 2 ** 31 - 1, 1, 24),
    'a PPM of 90000 x 90000': lambda: b'P6 90000 90000 255\n' + bytes(100),
    'a JPEG of 65000 x 1': lambda: _saved((65000, 1)),
    'a PNG of 3000 x 1': lambda: _saved((3000, 1), 'PNG'),
    'a PNG of 1 x 50000': lambda: _saved((1, 50000), 'PNG'),
    'a JPEG of a thousand scans': many_scans,
    'an EPS': lambda: b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(secret) print\n%%EOF\n',
    'a PSD': lambda: b'8BPS' + struct.pack('>H6xHIIHH', 1, 3, 30000, 30000, 8, 3) + bytes(100),
    'an icon of icons': lambda: b'\0\0\1\0\xff\xff' + bytes(16 * 100),
    'a PNG of a text that inflates': lambda: png(9, 9, zlib.compress(bytes(28 * 9)), extra=_inflating()),
    'nothing': lambda: b'',
    'a page': lambda: b'<html>404 Not Found</html>',
}
BIGGEST = ('a JPEG of a thousand scans',)  # takes long to make


def _inflating():
    content = b'Comment\0\0' + zlib.compress(bytes(50_000_000), 9)
    return struct.pack('>I', len(content)) + b'zTXt' + content + struct.pack('>I', zlib.crc32(b'zTXt' + content))


@functools.cache
def bomb(name):
    """Return the bytes of one of BOMBS."""
    return BOMBS[name]()


def bombs(rng, folder):
    """Read one of BOMBS, most with bytes changed near the start."""
    data = bytearray(bomb(rng.choice([name for name in BOMBS if name not in BIGGEST])))
    for _ in range(rng.choice((0, 1, 2, 8)) if data else 0):
        data[rng.randrange(min(len(data), 100))] = rng.randrange(256)
    read(_write(folder, data))


def _write(folder, data):
    path = os.path.join(folder, 'picture.jpg')
    with open(path, 'wb') as file:
        file.write(data)
    return path


TARGETS = {'picture bytes': changed_bytes, 'picture bombs': bombs}
