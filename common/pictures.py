"""Pictures for people: grids of tensors, and sheets with the sentence under each picture."""
import contextlib
import functools
import textwrap
import unicodedata

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import interpolate, pad

LINE = 2    # pixels between the pictures of a grid
LINES = 12  # of a caption on a sheet
NO_LETTER = chr(0x10FFFF)
# Of Linux, macOS and Windows: for most alphabets, for Chinese, Japanese and Korean, and for those of India.
FONTS = ('DejaVuSans.ttf', 'NotoSans-Regular.ttf', 'Arial Unicode.ttf', 'arial.ttf',
         'NotoSansCJK-Regular.ttc', 'wqy-zenhei.ttc', 'PingFang.ttc', 'msyh.ttc', 'simsun.ttc',
         'NotoSansDevanagari-Regular.ttf', 'Lohit-Devanagari.ttf', 'Kohinoor.ttc', 'Nirmala.ttf')


def to_pixels(images):
    """A float tensor in [-1, 1] as uint8, on its device: a quarter of the bytes to bring from there."""
    return (images.detach().float() + 1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def to_pil(image):
    """A tensor [C, H, W], float in [-1, 1] or uint8, as a PIL image."""
    pixels = (image if image.dtype == torch.uint8 else to_pixels(image)).cpu()
    pixels = pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def grid(images, columns):
    """Pictures [B, C, H, W] as one [C, rows * (H + 2) + 2, columns * (W + 2) + 2], with two white pixels between.

    It is torchvision's make_grid, which takes longer to import than a sentence takes to be drawn.
    """
    white = 255 if images.dtype == torch.uint8 else 1.0
    rows = -(-len(images) // columns)
    images = pad(images, (LINE, 0, LINE, 0), value=white)
    blank = images.new_full((rows * columns - len(images), *images.shape[1:]), white)
    height, width = images.shape[2:]
    tiles = torch.cat([images, blank]).unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    sheet = tiles.reshape(-1, rows * height, columns * width)
    return pad(sheet, (0, LINE, 0, LINE), value=white)


def real_over_generated(real, fake):
    """One PIL image: every row of real pictures [B, C, H, W] in [-1, 1] with a row of generated ones below it.

    A row has up to eight; pictures that do not fill the last one are left out.
    """
    columns = min(8, len(real))
    rows = [torch.cat(pair) for pair in zip(real.cpu().split(columns), fake.cpu().split(columns))
            if len(pair[0]) == columns]
    return to_pil(grid(torch.cat(rows), columns))


def caption_sheet(images, captions, columns=8, size=128):
    """One PIL image: every PIL image of `images` at `size` x `size` with its caption below it, up to `LINES` lines."""
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
    """(a font that has all letters of the caption, the caption); letters that no font here has are their code points.

    Pillow's own font has those of English; for others there is what the system has installed.
    """
    letters = set(caption)
    for font in fonts():
        if all(map(functools.partial(has_letter, font), letters)):
            return font, caption
    own = fonts()[0]
    return own, ''.join(letter if has_letter(own, letter) else f'<{ord(letter):X}>' for letter in caption)


def letter_width(text):
    """Pixels, about: Chinese and Japanese letters are twice as wide as others."""
    return 11 if any(unicodedata.east_asian_width(letter) in 'WF' for letter in text) else 6


@functools.cache
def fonts():
    """Pillow's own font, and those of `FONTS` that the system has."""
    found = [ImageFont.load_default(11)]
    for name in FONTS:
        with contextlib.suppress(OSError):
            found.append(ImageFont.truetype(name, 11))
    return found


@functools.cache
def has_letter(font, letter):
    """Whether the font draws something else for this letter than for one that does not exist."""
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask(NO_LETTER))


def side_by_side(columns, size):
    """One PIL image, a row for each item: `columns` are batches [B, 3, S, S] in [-1, 1], shown at `size` x `size`."""
    shown = [interpolate(column.float().cpu(), size=(size, size), mode='area') for column in columns]
    return to_pil(grid(torch.stack(shown, 1).flatten(0, 1), len(columns)))
