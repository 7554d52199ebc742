"""Arrange images for display: grids of tensors, and sheets with the caption below each image."""
import contextlib
import functools
import textwrap
import unicodedata

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import interpolate, pad

LINE = 2    # pixels between the images of a grid
LINES = 12  # lines of a caption on a sheet, at most
NO_LETTER = chr(0x10FFFF)
# Fonts of Linux, macOS and Windows: for most alphabets, then for Chinese, Japanese and Korean, then for Indian scripts.
FONTS = ('DejaVuSans.ttf', 'NotoSans-Regular.ttf', 'Arial Unicode.ttf', 'arial.ttf',
         'NotoSansCJK-Regular.ttc', 'wqy-zenhei.ttc', 'PingFang.ttc', 'msyh.ttc', 'simsun.ttc',
         'NotoSansDevanagari-Regular.ttf', 'Lohit-Devanagari.ttf', 'Kohinoor.ttc', 'Nirmala.ttf')


def to_pixels(images):
    """Convert images, float in [-1, 1], to uint8 on their device: a quarter of the bytes to copy from there."""
    return (images.detach().float() + 1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def to_pil(image):
    """Convert an image [C, H, W], float in [-1, 1] or uint8, to a PIL image."""
    pixels = (image if image.dtype == torch.uint8 else to_pixels(image)).cpu()
    pixels = pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def grid(images, columns):
    """Return images [B, C, H, W] as one image [C, rows * (H + 2) + 2, columns * (W + 2) + 2] with white lines between.

    Like torchvision's make_grid, whose import takes longer than generating an image from a sentence.
    """
    white = 255 if images.dtype == torch.uint8 else 1.0
    rows = -(-len(images) // columns)
    images = pad(images, (LINE, 0, LINE, 0), value=white)
    blank = images.new_full((rows * columns - len(images), *images.shape[1:]), white)
    height, width = images.shape[2:]
    tiles = torch.cat([images, blank]).unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    sheet = tiles.reshape(-1, rows * height, columns * width)
    return pad(sheet, (0, LINE, 0, LINE), value=white)


def real_over_generated(real, fake, captions=()):
    """Return a PIL image with each row of real images [B, C, H, W] in [-1, 1] above a row of generated ones.

    A row has up to eight images; those that do not fill the last row are left out. Notes the captions in it, one for
    each pair of images.
    """
    columns = min(8, len(real))
    rows = [torch.cat(pair) for pair in zip(real.cpu().split(columns), fake.cpu().split(columns))
            if len(pair[0]) == columns]
    full = [captions[start:start + columns] for start in range(0, len(captions) - columns + 1, columns)]
    return with_captions(to_pil(grid(torch.cat(rows), columns)), full,
                         'Above: the real image. Below: the image generated for its caption.')


def generated_beside_real(fake, real, size, captions=()):
    """Return a PIL image with a row for each item: its generated images, then the real one, each `size` x `size`.

    `fake` is a list of images [B, 3, S, S] in [-1, 1], small to large. Notes the captions in the image, one a row.
    """
    return with_captions(side_by_side([*fake, real], size), [[caption] for caption in captions],
                         'From left to right: the generated images, small to large, and the real image.')


def with_captions(image, rows, what):
    """Note in a PIL image the captions of its items, a list for each row of items, and `what` an item shows.

    `image.info['captions']` is a string with a line for each row and tabs between captions, below the line `# WHAT`. An
    item may consist of several images. Without rows, nothing is noted. Returns the image.
    """
    if rows:
        lines = ['\t'.join(' '.join(caption.split()) for caption in row) for row in rows]
        image.info['captions'] = '\n'.join([f'# {what}', *lines, ''])
    return image


def caption_sheet(images, captions, columns=8, size=128):
    """Return a PIL image of all `images`, PIL images, at `size` x `size`, each above its caption."""
    texts = [font_and_text(caption) for caption in captions]
    wrapped = [textwrap.wrap(text, size // letter_width(text), max_lines=LINES, placeholder=' ...')
               for _, text in texts]
    text_height = 14 * max(map(len, wrapped)) + 8
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new('RGB', (columns * (size + 8) + 8, rows * (size + text_height + 8) + 8), 'white')
    draw = ImageDraw.Draw(sheet)
    for i, (image, (font, _), lines) in enumerate(zip(images, texts, wrapped)):
        x, y = 8 + i % columns * (size + 8), 8 + i // columns * (size + text_height + 8)
        sheet.paste(image.convert('RGB').resize((size, size), Image.Resampling.BICUBIC), (x, y))
        draw.multiline_text((x, y + size + 4), '\n'.join(lines), fill='black', font=font, spacing=2)
    return sheet


def font_and_text(caption):
    """Return (a font that has all letters of the caption, the caption): Pillow's own, or else one of the system's.

    If no font has all letters, those that Pillow's font lacks are replaced by their code points.
    """
    letters = set(caption)
    for font in fonts():
        if all(map(functools.partial(has_letter, font), letters)):
            return font, caption
    own = fonts()[0]
    return own, ''.join(letter if has_letter(own, letter) else f'<{ord(letter):X}>' for letter in caption)


def letter_width(text):
    """Return the approximate width of a letter in pixels: Chinese and Japanese ones are twice as wide as others."""
    return 11 if any(unicodedata.east_asian_width(letter) in 'WF' for letter in text) else 6


@functools.cache
def fonts():
    """Return Pillow's own font and those of `FONTS` that the system has."""
    found = [ImageFont.load_default(11)]
    for name in FONTS:
        with contextlib.suppress(OSError):
            found.append(ImageFont.truetype(name, 11))
    return found


@functools.cache
def has_letter(font, letter):
    """Return whether the font has a glyph for this letter, other than that of letters that do not exist."""
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask(NO_LETTER))


def side_by_side(columns, size):
    """Return a PIL image of `size` x `size` tiles with a row for each item of the `columns` [B, 3, S, S] in [-1, 1]."""
    shown = [interpolate(column.float().cpu(), size=(size, size), mode='area') for column in columns]
    return to_pil(grid(torch.stack(shown, 1).flatten(0, 1), len(columns)))
