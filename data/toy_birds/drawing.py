"""Draw birds with Pillow at 256 x 256 pixels, in varied poses, sizes and scenes."""
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 256
PALETTE = {
    'red': (222, 26, 36), 'yellow': (250, 222, 40), 'green': (44, 180, 66), 'blue': (32, 76, 220),
    'black': (26, 26, 30), 'white': (250, 250, 250), 'orange': (246, 126, 16), 'purple': (124, 36, 170),
    'pink': (248, 118, 190), 'brown': (120, 70, 34),
}
BEAKS = {'yellow': (238, 190, 40), 'orange': (226, 116, 30), 'black': (44, 42, 46), 'grey': (112, 114, 122)}
# Muted colors of medium lightness, far from every color in the palette, including black and white.
SCENES = {
    'sky': ((160, 186, 206), (192, 206, 212)), 'grass': ((178, 194, 200), (150, 170, 132)),
    'water': ((190, 196, 196), (136, 166, 178)), 'branch': ((172, 186, 168), (190, 194, 174)),
    'sand': ((184, 194, 200), (202, 186, 160)), 'plain': ((190, 174, 180), (178, 174, 192)),
}
BARK = (132, 114, 100)
# How a bird holds itself in each scene: (facing right 1 or left -1, wings raised, tilt in radians). So a sentence that
# names the scene determines the outline, and a generator need not average over outlines.
POSES = {'sky': (1, True, .3), 'grass': (1, False, -.3), 'water': (-1, False, 0), 'branch': (-1, False, .35),
         'sand': (-1, True, 0), 'plain': (1, False, .1)}

# Outlines in the bird's own coordinates: it faces right, y points down, its body is about 2 wide and 1.5 high. Wings
# leave head, breast and flanks visible, so that every pose shows about as much of one color as of the other.
BODY = [(.99, -.58), (.86, -.90), (.56, -.99), (.26, -.84), (-.08, -.60), (-.55, -.34), (-.98, .06), (-.80, .46),
        (-.30, .76), (.28, .76), (.74, .44), (.94, -.06)]
CROWN = [(.98, -.66), (.86, -.90), (.56, -.99), (.29, -.85), (.5, -.78), (.76, -.73)]
TAIL = [(-.72, -.08), (-1.05, -.04), (-1.40, .0), (-1.46, .18), (-1.10, .34), (-.74, .32)]
FOLDED = [(.34, -.22), (.04, -.58), (-.46, -.50), (-.98, -.14), (-1.40, .26), (-.95, .44), (-.40, .50), (.14, .32)]
RAISED = [(.24, -.20), (.18, -.64), (-.06, -1.06), (-.46, -1.40), (-.80, -1.32), (-1.02, -1.02), (-1.02, -.56),
          (-.76, -.06), (-.24, .16)]


@dataclass
class Bird:
    """The visible attributes of a bird: colors by name, lengths as a fraction of the image's side."""
    body: str
    wings: str
    crown: str
    beak: str               # color
    beak_length: str        # short or long
    beak_shape: str         # pointed or curved
    raised: bool            # wings up, else folded on the back
    scene: str
    facing: int             # 1 to the right, -1 to the left
    scale: float            # length of one unit of the outlines
    tilt: float             # in radians
    center: tuple
    plump: float            # factor that stretches the outlines in height


def random_bird(rng, body, wings, **given):
    """Return a random `Bird` with these colors; `given` fixes other fields. `rng` is a `random.Random`."""
    others = [color for color in PALETTE if color not in (body, wings)]
    given = {'scene': rng.choice(list(SCENES)), **given}
    facing, raised, tilt = POSES[given['scene']]
    bird = {
        'crown': rng.choice(others) if rng.random() < .3 else body,
        'beak': rng.choice(list(BEAKS)), 'beak_length': rng.choice(['short', 'long']),
        'beak_shape': rng.choice(['pointed', 'curved']), 'raised': raised, 'facing': facing,
        'scale': rng.uniform(.27, .31), 'tilt': tilt + rng.uniform(-.04, .04), 'plump': rng.uniform(.96, 1.06),
        # The tail is longer than the beak, so the bird is shifted forward to leave space behind it.
        'center': (.5 + .015 * facing + rng.uniform(-.01, .01), (.58 if raised else .53) + rng.uniform(-.01, .01)),
    }
    return Bird(body, wings, **{**bird, **given})


def curve(points, steps=6):
    """Return the closed Catmull-Rom curve through `points` [n, 2] as points [steps * n, 2]."""
    a, b, c, d = (np.roll(np.asarray(points, float), shift, 0)[:, None] for shift in (1, 0, -1, -2))
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    return (b + .5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))).reshape(-1, 2)


def shapes(bird):
    """Return {part: its outline, float [n, 2] as fractions of the image's side}."""
    bend = .12 if bird.beak_shape == 'curved' else 0
    reach = 1.36 if bird.beak_length == 'long' else 1.2
    wing = np.array(RAISED if bird.raised else FOLDED)
    middle = (.95 + reach) / 2
    parts = {
        'tail': curve(TAIL), 'body': curve(BODY), 'crown': curve(CROWN), 'wing': curve(wing),
        'coverts': curve((wing - wing[0]) * .62 + wing[0] - (.03, -.02)),
        'beak': [(.9, -.7), (middle, -.63 - bend / 2), (reach, -.52 + bend), (middle, -.50), (.9, -.44)],
    }
    if bird.raised:
        parts['far wing'] = curve(wing * (.9, .96) + (.36, .02))
    return {part: place(bird, points) for part, points in parts.items()}


def place(bird, points):
    """Convert points [n, 2] from the bird's coordinates to those of the image."""
    x, y = np.asarray(points, float).T * [[1], [bird.plump]]
    cos, sin = math.cos(bird.tilt), math.sin(bird.tilt)
    return np.stack([bird.facing * (x * cos + y * sin), y * cos - x * sin], 1) * bird.scale + bird.center


def draw(bird, rng):
    """Return (a PIL image in RGB of 256 x 256 pixels, (x, y, width, height) of its bird in pixels)."""
    # The bird is drawn at twice the size and reduced, because Pillow does not smooth the edges of polygons.
    layer = Image.new('RGBA', (2 * SIZE, 2 * SIZE))
    feet = draw_bird(ImageDraw.Draw(layer), bird, rng)
    layer = layer.reduce(2)
    picture = draw_scene(bird.scene, feet, rng)
    picture.paste(layer, mask=layer)
    left, top, right, bottom = layer.getchannel('A').point(lambda alpha: 255 * (alpha > 100)).getbbox()
    return picture, (left, top, right - left, bottom - top)


def draw_bird(pen, bird, rng):
    """Draw a bird with an `ImageDraw` of 512 x 512 pixels; return where its feet are, as a fraction of the height."""
    parts = {part: 2 * SIZE * points for part, points in shapes(bird).items()}
    body, wings = jitter(PALETTE[bird.body], rng), jitter(PALETTE[bird.wings], rng)

    def fill(part, color, edge=True):
        points = [tuple(point) for point in parts[part]]
        pen.polygon(points, fill=color)
        if edge:
            pen.line(points + points[:2], fill=shade(color, .8), width=3, joint='curve')

    if bird.raised:
        fill('far wing', shade(wings, .9))
    feet = bird.center[1] + bird.scale * bird.plump
    if bird.scene != 'sky':
        draw_legs(pen, bird, feet)
    fill('tail', shade(wings, .92))
    fill('beak', BEAKS[bird.beak])
    fill('body', body)
    if bird.crown != bird.body:
        fill('crown', jitter(PALETTE[bird.crown], rng), edge=False)
    fill('wing', wings)
    root, edge = parts['wing'][0], parts['wing'][18:-9:4]
    for tip in edge:
        pen.line([*root + .5 * (tip - root), *root + .94 * (tip - root)], fill=shade(wings, .8), width=3)
    fill('coverts', shade(wings, 1.12))
    draw_eye(pen, *2 * SIZE * place(bird, [(.68, -.64)])[0], 2 * SIZE * bird.scale * .1)
    return feet


def draw_legs(pen, bird, feet):
    """Draw two thin legs with toes, upright even if the bird is tilted."""
    toe = .09 * bird.scale * bird.facing
    for x in (-.12, .2):
        x, y = bird.center[0] + bird.facing * x * bird.scale, bird.center[1] + .4 * bird.scale
        lines = [(x, y, x, feet)] + [(x, feet, x + toe * reach, feet + .03 * bird.scale) for reach in (-1, .6, 1.6)]
        for line in lines:
            pen.line([2 * SIZE * end for end in line], fill=(96, 84, 80), width=6)


def draw_eye(pen, x, y, radius):
    """Draw a ring, a pupil and its highlight."""
    for color, size, shift in (((236, 232, 224), 1, 0), ((26, 22, 24), .76, 0), ((255, 255, 255), .28, -.25)):
        box = [x + (shift - size) * radius, y + (shift - size) * radius]
        pen.ellipse(box + [x + (shift + size) * radius, y + (shift + size) * radius], fill=color)


def draw_scene(scene, feet, rng):
    """Return a background of 256 x 256 pixels; `feet` is the height of the ground or branch under the bird."""
    top, bottom = (jitter(tone, rng, 8) for tone in SCENES[scene])
    picture = Image.composite(Image.new('RGB', (SIZE, SIZE), bottom), Image.new('RGB', (SIZE, SIZE), top),
                              Image.linear_gradient('L'))
    pen = ImageDraw.Draw(picture)
    if scene in ('grass', 'water', 'sand'):
        draw_ground(pen, scene, SIZE * (feet - rng.uniform(.05, .25)), top, bottom, rng)
    else:
        for _ in range(7):
            draw_blob(pen, scene, shade(bottom, rng.uniform(1, 1.2)), rng)
    picture = picture.filter(ImageFilter.BoxBlur(3))
    if scene == 'branch':
        y, slope = SIZE * (feet + .012), rng.uniform(-12, 12)
        ImageDraw.Draw(picture).line([0, y - slope, SIZE, y + slope], fill=jitter(BARK, rng), width=rng.randint(7, 11))
    return picture


def draw_ground(pen, scene, horizon, top, bottom, rng):
    """Draw the sky down to a horizon, and below it grass, ripples or pebbles."""
    pen.rectangle([0, 0, SIZE, horizon], fill=top)
    pen.rectangle([0, horizon, SIZE, SIZE], fill=bottom)
    for _ in range(60):
        x, y, tone = rng.uniform(0, SIZE), rng.uniform(horizon, SIZE), shade(bottom, rng.uniform(.88, 1.12))
        if scene == 'grass':
            pen.line([x, y, x + rng.uniform(-6, 6), y - rng.uniform(8, 24)], fill=tone, width=4)
        elif scene == 'water':
            pen.line([x - rng.uniform(10, 40), y, x, y], fill=tone, width=4)
        else:
            pen.ellipse([x, y, x + 9, y + 5], fill=tone)


def draw_blob(pen, scene, color, rng):
    """Draw a cloud, or a leaf far out of focus."""
    x, y, width = (SIZE * rng.uniform(low, high) for low, high in ((0, 1), (0, 1), (.06, .17)))
    height = width * (.4 if scene == 'sky' else 1)
    pen.ellipse([x - width, y - height, x + width, y + height], fill=color)


def shade(color, factor):
    """Make a color darker (`factor` below 1) or lighter (above 1)."""
    return tuple(round(c * factor if factor < 1 else c + (255 - c) * (factor - 1)) for c in color)


def jitter(color, rng, by=10):
    return tuple(min(255, max(0, c + rng.randint(-by, by))) for c in color)
