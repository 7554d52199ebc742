"""Plot the chapter's argument: word numbers, which say nothing about similarity, beside a map of word vectors."""
import torch
from PIL import Image, ImageDraw
from torch.nn.functional import pad

from common.pictures import font_and_text

COLORS = {
    'black': '#000000', 'charcoal': '#36454f', 'blackish': '#2b2b2b', 'slate': '#708090', 'gray': '#808080',
    'grey': '#808080', 'grayish': '#9a9a94', 'greyish': '#9a9a94', 'silver': '#c0c0c0', 'white': '#ffffff',
    'whitish': '#f4f0e6', 'cream': '#fff3c4', 'beige': '#e8dcb5', 'buff': '#dfc07a', 'tan': '#d2b48c',
    'brown': '#7b4a1e', 'brownish': '#8a6443', 'rufous': '#a81c07', 'maroon': '#800000', 'red': '#e0101c',
    'reddish': '#c8473c', 'pink': '#ff9fb6', 'pinkish': '#f3b6c0', 'peach': '#ffcba4', 'orange': '#ff8c00',
    'gold': '#e6b800', 'golden': '#e6b800', 'yellow': '#ffe119', 'yellowish': '#ece27a', 'green': '#2ca02c',
    'greenish': '#6bab6b', 'teal': '#008080', 'turquoise': '#40e0d0', 'blue': '#1f4fdc', 'bluish': '#6f8fe0',
    'purple': '#800080', 'purplish': '#955c9c', 'violet': '#8f00ff',
}
PARTS = {'abdomen', 'back', 'beak', 'belly', 'bill', 'body', 'breast', 'cap', 'cheek', 'chest', 'coverts', 'crest',
         'crown', 'eye', 'eyebrow', 'eyering', 'eyes', 'face', 'feathers', 'feet', 'flank', 'head', 'legs', 'nape',
         'neck', 'plumage', 'primaries', 'rump', 'secondaries', 'tail', 'tarsus', 'throat', 'underside', 'wing',
         'wingbars', 'wings'}
SHOWN = 18                        # number of colors, and of parts, in the image: the most frequent
SIZE, COLUMN, LINE = (1440, 940), 300, 24  # pixels: image, width of its column of numbers, height of a line
INK, PAPER = '#202020', '#ffffff'


def pca(vectors):
    """Project vectors onto the two directions in which they vary most: [N, D] -> [N, 2]."""
    centered = vectors - vectors.mean(0)
    directions = torch.linalg.svd(centered, full_matrices=False).Vh[:2]
    return pad(centered @ directions.T, (0, 2 - len(directions)))  # vectors of length 1 have only one direction


def shown_words(vocabulary):
    """Return the words to plot, ordered by number: colors and parts of a bird.

    If the captions are about something else, these are the most frequent words.
    """
    colors = [word for word in vocabulary.words if word in COLORS][:SHOWN]
    parts = [word for word in vocabulary.words if word in PARTS][:SHOWN]
    return sorted(colors + parts, key=vocabulary.number) if colors and parts else vocabulary.words[:2 * SHOWN]


def draw_words(words, numbers, vectors):
    """Return one PIL image: a column of words with their `numbers`, beside a map of their `vectors` [words, N].

    A color is marked by a dot of that color, a part of a bird by a square.
    """
    image = Image.new('RGB', SIZE, PAPER)
    draw, (width, height) = ImageDraw.Draw(image), SIZE
    write(draw, 30, 30, 'word numbers')
    write(draw, COLUMN + 30, 30, 'word vectors, in the two directions in which they differ most')
    draw.line([(COLUMN, 20), (COLUMN, height - 20)], fill='#c0c0c0')
    for row, (word, number) in enumerate(zip(words, numbers)):
        y = 66 + row * LINE
        write(draw, 30, y, f'{number + 1:03}')
        mark(draw, 100, y, word)
    places = pca(vectors)
    places = (places - places.amin(0)) / (places.amax(0) - places.amin(0)).clamp(min=1e-9)     # in [0, 1]
    taken = []
    for word, (across, down) in zip(words, places.tolist()):
        x, y = COLUMN + 40 + across * (width - COLUMN - 220), 90 + down * (height - 150)
        mark(draw, x, free_line(x, y, word, taken), word)
    return image


def free_line(x, y, word, taken):
    """Return the height nearest to `y` where a word at `x` overlaps none of those in `taken`, and add it to them."""
    right = x + 40 + 12 * len(word)
    for step in range(2 * len(taken) + 1):
        line = y + (step + 1) // 2 * LINE * (-1) ** step
        if all(right < left or x > end or abs(line - other) >= LINE for left, end, other in taken):
            break
    taken.append((x, right, line))
    return line


def mark(draw, x, y, word):
    """Draw a word, after a mark that shows what it names: a color or a part of a bird."""
    box = (x, y - 8, x + 16, y + 8)
    if word in COLORS:
        draw.ellipse(box, fill=COLORS[word], outline=INK)
    elif word in PARTS:
        draw.rectangle(box, fill='#dddddd', outline=INK)
    write(draw, x + 24, y, word)


def write(draw, x, y, text):
    """Draw text whose left end is at `x`, vertically centered at `y`."""
    font, text = font_and_text(text)
    draw.text((x, y), text, fill=INK, font=font.font_variant(size=20), anchor='lm')
