"""Pictures of strangers: decoded in bounded memory and time, or refused with the reason."""
import io
import warnings

from PIL import Image, ImageOps

PIXELS = 64_000_000  # of the largest picture: 192 MB in RGB, 192 more while it is converted or turned
ASPECT = 20          # of the longer side to the shorter: a frame of 304 pixels is then 6080 long at most


class BadPicture(ValueError):
    """A picture that cannot be used; its text is the reason."""


def read_picture(source):
    """The picture in `source`, a path or the bytes of a file, as a PIL image: upright (EXIF) and in RGB.

    Raises BadPicture where it cannot be decoded, is too large or too narrow.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
                check_size(*picture.size)
                return ImageOps.exif_transpose(picture).convert('RGB')
    except BadPicture:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a damaged file made them stumble over
        raise BadPicture(' '.join(str(error).split()) or type(error).__name__) from error


def check_size(width, height):
    """Raise BadPicture where a picture of this size would take too much memory, here or in a cache."""
    if width * height > PIXELS:
        raise BadPicture(f'it has {width} x {height} pixels, and {PIXELS:,} are the most that are decoded')
    if max(width, height) > ASPECT * min(width, height):
        raise BadPicture(f'it has {width} x {height} pixels; a picture is at most {ASPECT} times as long as wide')
