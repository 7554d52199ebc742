"""Pictures of strangers: decoded in bounded memory and time, or refused with the reason."""
import contextlib
import io
import os
import warnings

from PIL import Image, UnidentifiedImageError

# Of all that Pillow reads. Others are not for photographs, and some (EPS) start programs.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'PPM', 'TIFF', 'GIF')
PIXELS = 50_500_000      # of the largest picture, which a camera of 50 megapixels takes: 400 MB while it is decoded
SCANNED = 12 * PIXELS    # pixels of all scans of a JPEG, each of which goes through the picture; there are ten at most
ORIENTATION = 0x0112  # the tag of EXIF
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}

# Both come from threads, without the picture's name: what is too large is refused here, and the rest does no harm.
warnings.filterwarnings('error', category=Image.DecompressionBombWarning)
warnings.filterwarnings('ignore', category=UserWarning, module=r'PIL\.')


class BadPicture(ValueError):
    """A picture that cannot be used; its text is the reason, in one line."""


def read_picture(source, part=None):
    """The picture in `source`, a path or the bytes of a file, as a PIL image in RGB, upright as EXIF says.

    With `part`, only what lies within the box `part(size)`, (left, top, right, bottom). Size and box are those of the
    picture as it is stored, before it is turned upright, as the boxes of CUB-200-2011 are.

    What is transparent becomes white.

    Raises BadPicture where it cannot be decoded, is too large, or has more than 8 bits per channel.
    """
    with _explained():
        picture = _decode(source)
        turn = UPRIGHT.get(_orientation(picture))
        picture = on_white(picture.crop(part(picture.size)) if part else picture)
        return picture.transpose(turn) if turn is not None else picture


def on_white(picture):
    """A PIL image in RGB, with white where it is transparent."""
    if not picture.has_transparency_data:
        return picture.convert('RGB') if picture.mode != 'RGB' else picture
    picture = picture.convert('RGBA')
    white = Image.new('RGB', picture.size, 'white')
    white.paste(picture, mask=picture)  # takes half the memory of Image.alpha_composite
    return white


def check_header(path):
    """Raise BadPicture where the first bytes of a file are not those of a picture that is read, or it is too large."""
    with _explained(), opened(path):
        pass


@contextlib.contextmanager
def _explained():
    try:
        yield
    except BadPicture:
        raise
    except UnidentifiedImageError as error:
        raise BadPicture(f'it is no picture of a kind that is read: {", ".join(FORMATS)}') from error
    except Exception as error:  # Pillow's readers raise whatever a damaged file makes them stumble over
        raise BadPicture(' '.join(str(error).split())[:200] or type(error).__name__) from error


def _decode(source):
    """The picture as it is stored."""
    with opened(source) as picture:
        picture.load()
        return picture


@contextlib.contextmanager
def opened(source, formats=FORMATS):
    """A PIL image of `source`, a path or the bytes of a file of `formats`, of which only the header has been read.

    Raises BadPicture where it is too large or has more than 8 bits per channel, and what Pillow does where it is none.
    """
    is_file = not isinstance(source, bytes)
    if is_file and not os.path.isfile(source):  # opening a pipe would wait for ever
        raise BadPicture('there is no such file')
    with open(source, 'rb') if is_file else io.BytesIO(source) as file, Image.open(file, formats=formats) as picture:
        width, height = picture.size
        most = PIXELS // 2 if picture.format == 'WEBP' or picture.mode == 'CMYK' else PIXELS  # these take more memory
        if not 0 < width * height <= most:
            raise BadPicture(f'it has {width} x {height} pixels, and {most / 1e6:.0f} million are the most')
        if picture.format in ('JPEG', 'MPO') and _count_scans(file) * width * height > SCANNED:
            raise BadPicture('it is a JPEG of too many scans')
        if picture.mode.startswith(('I', 'F')):  # which Pillow makes black or white
            raise BadPicture('it has more than 8 bits per channel; save it with 8')
        yield picture


def _count_scans(file):
    """How many scans a JPEG has. Within one, the byte 0xff is followed by none that looks like a marker."""
    start, scans = file.tell(), 0
    file.seek(0)
    while piece := file.read(1 << 20):
        scans += piece.count(b'\xff\xda')
    file.seek(start)
    return scans


def _orientation(picture):
    """EXIF's number for how a picture is to be turned; a damaged entry does not make the picture useless."""
    try:
        return picture.getexif().get(ORIENTATION, 1)
    except Exception:  # as above
        return 1
