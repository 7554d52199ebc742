"""Generate captions of drawn birds from a grammar with synonyms, each with the colors of body and wings."""
CAPTIONS = 10
CAPTION_LENGTH = 85     # characters; the encoder's time grows with them, and 201 is the most that it reads
PLACES = {
    'sky': ('in flight', 'in the sky', 'flying'), 'grass': ('in the grass', 'in a meadow'),
    'water': ('in the water', 'in a pond'), 'branch': ('on a branch', 'on a twig'),
    'sand': ('on the sand', 'on a beach'), 'plain': ('',),
}
SENTENCES = (
    'this {size}bird{place} has {all}.', 'a {size}bird{place} with {all}.', 'a {size}{body} bird{place} with {rest}.',
    'this {size}{body} bird{place} has {rest}.', 'this {size}bird{place} is {mostly}{body} with {rest}.',
    'the {size}bird{place} is {mostly}{body} and has {rest}.', 'with {rest}, this {size}bird{place} is {mostly}{body}.',
    'a bird{place} whose body is {body} and whose wings are {wings}{more}.',
    'a {wings} winged bird{place} whose body is {body}{more}.',
    'the body of this {size}bird{place} is {body}, its wings are {wings}{more}.',
)
BODIES = ('a {0} body', 'a {0} body', 'a {0} breast', '{0} plumage')
WINGS = ('{0} wings', '{0} wings', '{0} wings and tail', 'a pair of {0} wings')
TINTS = {'black': ('jet ', 'deep '), 'white': ('snow ', 'pure ')}    # other colors: bright, vivid, deep


def describe(bird, rng):
    """Return ten different sentences, each with the colors of body and wings and some of the other attributes."""
    sentences = {}
    while len(sentences) < CAPTIONS:
        sentence = make_sentence(bird, rng)
        if len(sentence) <= CAPTION_LENGTH:
            sentences[sentence] = None
    return list(sentences)


def make_sentence(bird, rng):
    """Return one random sentence about the bird."""
    body, wings = (tint(color, rng) for color in (bird.body, bird.wings))
    extras = details(bird, rng)
    wing_part = rng.choice(WINGS).format(wings)
    parts = [rng.choice(BODIES).format(body), wing_part, *extras]
    place = rng.choice(PLACES[bird.scene])
    sentence = rng.choice(SENTENCES).format(
        size=rng.choice(size_words(bird)), body=body, wings=wings, mostly=rng.choice(['', 'mostly ', 'mainly ']),
        all=enumerate_parts(rng.sample(parts, len(parts))), rest=enumerate_parts([wing_part, *extras]),
        more=f', and it has {enumerate_parts(extras)}' if extras else '', place=place and f' {place}')
    return sentence.replace('a orange', 'an orange')


def details(bird, rng):
    """Return noun phrases for crown and belly, if they have a color of their own, and at times for the beak."""
    found = []
    if rng.random() < .3:
        adjectives = [bird.beak_length, bird.beak_shape, bird.beak]
        said = [word for word in adjectives if rng.random() < .4] or adjectives[-1:]
        found.append(f'a {" ".join(said)} {rng.choice(["beak", "bill"])}')
    if bird.crown != bird.body:
        found.append(f'a {bird.crown} {rng.choice(["crown", "cap"])}')
    if bird.belly != bird.body:
        found.append(f'a {bird.belly} {rng.choice(["belly", "underside"])}')
    return found


def tint(color, rng):
    """Return a color's name, at times with an adjective: `red` or `bright red`."""
    return (rng.choice(TINTS.get(color, ('bright ', 'vivid ', 'deep '))) if rng.random() < .2 else '') + color


def size_words(bird):
    if bird.scale < .28:
        return '', 'small ', 'tiny ', 'little '
    return ('', 'large ', 'big ') if bird.scale > .30 else ('',)


def enumerate_parts(parts):
    """Join phrases: ['a', 'b', 'c'] becomes 'a, b and c'."""
    return ' and '.join([', '.join(parts[:-1]), parts[-1]] if parts[1:] else parts)
