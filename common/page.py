"""Build pages for the browser: one HTML file each, without scripts and without references to other files."""
import base64
import html
import io
import unicodedata

from common.files import check_is_file

POINTS, WIDTH, HEIGHT = 300, 380, 190  # of a curve: points at most, and pixels
LEFT, BOTTOM, TOP = 46, 22, 10         # pixels around a curve
HEAD = 50_000                          # characters at the start of a page that name the program that wrote it
COLORS = ('#3b82f6', '#ef4444', '#16a34a', '#d97706', '#a855f7', '#0891b2', '#ec4899', '#65a30d')
TURNS = {*range(0x202a, 0x202f), *range(0x2066, 0x206a)}  # letters that change the direction of those after them
STYLE = """
:root { color-scheme: light dark; --line: #8884; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 1200px; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: clamp(1.2rem, 5vw, 1.6rem); margin-bottom: .3rem; }
h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
.wide, .film { overflow-x: auto; }
.film { display: flex; gap: .8rem; align-items: flex-start; scroll-snap-type: x proximity; }
.film figure { flex: none; margin: 0; max-width: 88vw; scroll-snap-align: start; }
.tiles { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); }
.tiles.rows { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.tiles figure { margin: 0; }
@media (max-width: 30rem) { .tiles { grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)); } }
.tiles img { width: 100%; max-width: 512px; }
figure { display: inline-block; margin: 0 1rem 1rem 0; max-width: 100%; vertical-align: top; }
figcaption { font-size: .85rem; line-height: 1.35; }
img, svg { max-width: 100%; height: auto; }
svg text { fill: currentColor; font-size: 11px; }
.images img { width: 128px; image-rendering: auto; }
h3 { font-size: 1rem; margin: .8rem 0 .2rem; }
pre { margin: 0; white-space: pre-wrap; padding: .6rem .8rem; border: 1px solid var(--line); border-radius: .3rem; }
.options code { display: inline-block; margin: 0 1rem .2rem 0; }
:focus-visible { outline: 2px solid #3b82f6; }
@media print {
  body { max-width: none; margin: 0; font-size: 11pt; }
  .film { flex-wrap: wrap; } .film figure { max-width: 31%; }
  h2 { break-after: avoid; } figure, tr { break-inside: avoid; }
}
"""


def document(title, generator, parts, attributes=''):
    """Return a page as a string of HTML, built from `parts`; `generator` is the program that writes it."""
    return (f'<!doctype html>\n<html lang="en"{attributes}>\n<head>\n<meta charset="utf-8">\n{generator_tag(generator)}'
            '\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n'
            + '\n'.join(parts) + '\n</body>\n</html>\n')


def generator_tag(generator):
    """Return the element by which a program recognizes its own pages."""
    return f'<meta name="generator" content="{generator}">'


def head_of(path, generator):
    """Return the start of the page that this `generator` wrote to `path`, or None if there is another file or none."""
    try:
        check_is_file(path)
        with open(path, encoding='utf-8', errors='replace') as file:
            head = file.read(HEAD)
    except OSError:
        return None
    return head if generator_tag(generator) in head else None


def plain(value, most=300):
    """Return a value as text of one line, at most so long, without characters that a terminal or a browser obeys."""
    letters = ' '.join(str(value)[:4 * most].split())
    kept = ''.join(letter for letter in letters if unicodedata.category(letter) != 'Cc' and ord(letter) not in TURNS)
    kept = kept.encode(errors='backslashreplace').decode()  # what was no UTF-8
    return kept if len(kept) <= most else f'{kept[:most - 4]} ...'


def text(value, most=300):
    """Return a value as HTML that shows its text, whatever that contains."""
    return html.escape(plain(value, most))


def table(head, rows, kind=''):
    """Return a table; its cells are HTML."""
    lines = [f'<tr>{"".join(f"<th>{cell}</th>" for cell in head)}</tr>']
    lines += [f'<tr><th>{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows]
    return f'<div class="wide" tabindex="0"><table class="{kind}">\n' + '\n'.join(lines) + '\n</table></div>'


def picture(image, alt, file_format='PNG'):
    """Return a PIL image as an element that contains its own bytes."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, quality=82)  # which only a JPEG has
    code = base64.b64encode(buffer.getvalue()).decode()
    return (f'<img src="data:image/{file_format.lower()};base64,{code}" width="{image.width}" height="{image.height}" '
            f'alt="{text(alt)}">')


def plot(name, curves):
    """Return a figure with one curve for each list of points (step, value)."""
    curves = [thinned(points) for points in curves]
    steps, values = zip(*(point for points in curves for point in points)) if any(curves) else ((0,), (0,))
    low, high, last = min(values), max(values), max(*steps, 1)
    right, base = WIDTH - 8, HEIGHT - BOTTOM
    scale = (base - TOP) / ((high - low) or 1)

    def line(color, points):
        places = ' '.join(f'{LEFT + (right - LEFT) * step / last:.1f},{base - scale * (value - low):.1f}'
                          for step, value in points)
        return (f'<polyline fill="none" stroke="{color}" stroke-width="1.5" stroke-linecap="round" '
                f'points="{places}"/>')

    marks = [(TOP, high), ((TOP + base) / 2, (low + high) / 2), (base, low)] if high > low else [(base, low)]
    scales = ''.join(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="currentColor" stroke-opacity=".2"/>'
                     f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>' for y, value in marks)
    lines = ''.join(line(COLORS[i % len(COLORS)], points) for i, points in enumerate(curves))
    return (f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{text(name)}">'
            f'{scales}<text x="{LEFT}" y="{HEIGHT - 5}">0</text>'
            f'<text x="{right}" y="{HEIGHT - 5}" text-anchor="end">step {last:,.0f}</text>'
            f'{lines}</svg><figcaption>{text(name)}</figcaption></figure>')


def thinned(points):
    """Return at most POINTS points, each the mean of neighbors."""
    size = -(-len(points) // POINTS) or 1
    groups = [points[start:start + size] for start in range(0, len(points), size)]
    return [tuple(sum(values) / len(group) for values in zip(*group)) for group in groups]
