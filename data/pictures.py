"""Pictures of strangers: decoded in bounded memory and time, or refused with the reason."""
import contextlib
import io
import warnings

from PIL import Image

# Of all that Pillow reads. Others are not for photographs, and some (EPS) start programs.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'PPM', 'TIFF', 'GIF')
PIXELS = 50_500_000  # of the largest picture, which a camera of 50 megapixels takes
ASPECT = 20          # of the longer side to the shorter: what is cut from one of 304 pixels is then 6080 long at most
SCANS = 100          # of a JPEG, each of which goes through the whole picture; an ordinary one has up to ten
ORIENTATION = 0x0112  # the tag of EXIF
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}


class BadPicture(ValueError):
    """A picture that cannot be used; its text is the reason, in one line."""


def read_picture(source, part=None):
    """The picture in `source`, a path or the bytes of a file, as a PIL image in RGB, upright as EXIF says.

    With `part`, only what lies within the box `part(size)`, (left, top, right, bottom). Size and box are those of the
    picture as it is stored, before it is turned upright, as the boxes of CUB-200-2011 are.

    Raises BadPicture where it cannot be decoded, or it or its part is too large or too narrow.
    """
    try:
        with warnings.catch_warnings(action='ignore'):  # Pillow's, of what is refused here or does no harm
            picture = _decode(source)
            turn = UPRIGHT.get(_orientation(picture))
            if part:
                picture = picture.crop(part(picture.size))
                check_size(*picture.size)
            picture = picture.convert('RGB') if picture.mode != 'RGB' else picture
            return picture.transpose(turn) if turn is not None else picture
    except Exception as error:  # Pillow's readers raise whatever a damaged file makes them stumble over
        raise BadPicture(' '.join(str(error).split())[:200] or type(error).__name__) from error


def _decode(source):
    """The picture as it is stored."""
    with contextlib.nullcontext(io.BytesIO(source)) if isinstance(source, bytes) else open(source, 'rb') as file, \
            Image.open(file, formats=FORMATS) as picture:
        check_size(*picture.size)
        if picture.format in ('JPEG', 'MPO') and (scans := _count_scans(file)) > SCANS:
            raise BadPicture(f'a JPEG of {scans} scans')
        picture.load()
        return picture


def check_size(width, height):
    """Raise BadPicture where a picture of so many pixels, or a part of one, takes too much memory."""
    if width * height > PIXELS:
        raise BadPicture(f'it has {width} x {height} pixels, and the most are {PIXELS / 1e6:.1f} million')
    if max(width, height) > ASPECT * min(width, height):
        raise BadPicture(f'it has {width} x {height} pixels; the longer side can be {ASPECT} times the shorter')


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
