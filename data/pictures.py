"""Decode untrusted image files in limited memory and time, or refuse them with the reason."""
import contextlib
import io
import os
import warnings

from PIL import Image, UnidentifiedImageError

# Pillow reads more formats, but they are not for photographs, and some (EPS) start programs.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'PPM', 'TIFF', 'GIF')
PIXELS = 50_500_000    # of the largest image, from a camera of 50 megapixels: decoding it takes 400 MB
SCANNED = 12 * PIXELS  # pixels of all scans of a JPEG together; each of its usual ten or fewer scans covers the image
ORIENTATION = 0x0112   # EXIF tag
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}

# Threads would print these warnings without the image's name. Images that are too large are refused, the rest is fine.
warnings.filterwarnings('error', category=Image.DecompressionBombWarning)
warnings.filterwarnings('ignore', category=UserWarning, module=r'PIL\.')


class BadPicture(ValueError):
    """An image that cannot be used; the text is the reason, in one line."""


def read_picture(source, part=None):
    """Return the image in `source`, a path or the bytes of a file, as an upright PIL image in RGB.

    With `part`, it is cropped to the box `part(size)`, (left, top, right, bottom). Size and box refer to the image as
    it is stored, before its EXIF orientation is applied, like the boxes of CUB-200-2011. Transparent pixels become
    white. Raises BadPicture if the image cannot be decoded, is too large, or has more than 8 bits per channel.
    """
    with _convert_errors():
        picture = _decode(source)
        turn = UPRIGHT.get(_orientation(picture))
        picture = on_white(picture.crop(part(picture.size)) if part else picture)
        return picture.transpose(turn) if turn is not None else picture


def on_white(picture):
    """Convert a PIL image to RGB, with transparent areas in white."""
    if not picture.has_transparency_data:
        return picture.convert('RGB') if picture.mode != 'RGB' else picture
    picture = picture.convert('RGBA')
    white = Image.new('RGB', picture.size, 'white')
    white.paste(picture, mask=picture)  # takes half the memory of Image.alpha_composite
    return white


def check_header(path):
    """Raise BadPicture if a file does not begin like a supported image, or if the image is too large."""
    with _convert_errors(), opened(path):
        pass


@contextlib.contextmanager
def _convert_errors():
    try:
        yield
    except BadPicture:
        raise
    except UnidentifiedImageError as error:
        raise BadPicture(f'it is not an image in a supported format: {", ".join(FORMATS)}') from error
    except Exception as error:  # damaged files make Pillow raise errors of any kind
        raise BadPicture(' '.join(str(error).split())[:200] or type(error).__name__) from error


def _decode(source):
    """Return the image as it is stored."""
    with opened(source) as picture:
        picture.load()
        return picture


@contextlib.contextmanager
def opened(source, formats=FORMATS):
    """Yield a PIL image of `source`, a path or the bytes of a file of `formats`, with only its header read.

    Raises BadPicture if it is too large or has more than 8 bits per channel, and Pillow's errors if it is not an image.
    """
    is_file = not isinstance(source, bytes)
    if is_file and not os.path.isfile(source):  # opening a pipe would wait forever
        raise BadPicture('there is no such file')
    with open(source, 'rb') if is_file else io.BytesIO(source) as file, Image.open(file, formats=formats) as picture:
        width, height = picture.size
        most = PIXELS // 2 if picture.format == 'WEBP' or picture.mode == 'CMYK' else PIXELS  # these take more memory
        if not 0 < width * height <= most:
            raise BadPicture(f'it has {width} x {height} pixels; the limit is {most / 1e6:.0f} million')
        if picture.format in ('JPEG', 'MPO') and _count_scans(file) * width * height > SCANNED:
            raise BadPicture('it is a JPEG with too many scans')
        if picture.mode.startswith(('I', 'F')):  # which Pillow makes black or white
            raise BadPicture('it has more than 8 bits per channel; save it with 8')
        yield picture


def _count_scans(file):
    """Return the number of scans of a JPEG. Within a scan, no byte after 0xff looks like a marker."""
    start, scans = file.tell(), 0
    file.seek(0)
    while piece := file.read(1 << 20):
        scans += piece.count(b'\xff\xda')
    file.seek(start)
    return scans


def _orientation(picture):
    """Return the EXIF orientation, or 1 if the entry is damaged, in which case the image is still usable."""
    try:
        return picture.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1
