"""Generate captions of drawn birds from a small grammar, each with the colors of body and wings."""
CAPTIONS = 10
PLACES = {
    'sky': ('in flight', 'in the sky'), 'grass': ('in the grass', 'in a meadow'),
    'water': ('in the water', 'in a pond'), 'branch': ('on a branch', 'on a twig'),
    'sand': ('on the sand', 'on a beach'), 'plain': ('',),
}
SENTENCES = (
    'a {size}bird{place} with a {body} body and {wings} wings{more}.',
    'this {size}bird{place} has a {body} body and {wings} wings{more}.',
    'a {size}{body} bird{place} with {wings} wings{more}.', 'this {size}{body} bird{place} has {wings} wings{more}.',
    'this {size}bird{place} is {body} and has {wings} wings{more}.',
    'a {size}bird{place} with {wings} wings and a {body} body{more}.',
    'this {size}bird{place} has {wings} wings and a {body} body{more}.',
)


def describe(bird, rng):
    """Return ten different sentences, each with the colors of body and wings and some of the other attributes."""
    sentences = {}
    while len(sentences) < CAPTIONS:
        sentences[make_sentence(bird, rng)] = None
    return list(sentences)


def make_sentence(bird, rng):
    """Return one random sentence about the bird."""
    place = rng.choice(PLACES[bird.scene])
    sentence = rng.choice(SENTENCES).format(
        size=rng.choice(size_words(bird)), body=bird.body, wings=bird.wings, place=place and f' {place}',
        more=''.join(f', {part}' for part in details(bird, rng)))
    return sentence.replace('a orange', 'an orange')


def details(bird, rng):
    """Return noun phrases for the crown, if it has a color of its own, and at times for the beak."""
    found = []
    if bird.crown != bird.body:
        found.append(f'a {bird.crown} crown')
    if rng.random() < .3:
        found.append(f'a {rng.choice([bird.beak_length, bird.beak_shape, bird.beak])} beak')
    return found


def size_words(bird):
    if bird.scale < .28:
        return '', 'small ', 'tiny ', 'little '
    return ('', 'large ', 'big ') if bird.scale > .30 else ('',)
