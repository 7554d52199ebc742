"""Damaged and malicious class lists, images.txt, bounding_boxes.txt and captions."""
import functools
import os

from common.errors import UserError
from common.letters import unread
from data import layout
from data.birds import cub
from data.bounded_files import CONTROL
from data.converting import check_names, read_photograph
from tests.test_birds_prepare import jpeg

KEYS = ['red/0000', 'blue/0000', 'blue/0001']
PIECES = [
    '0000', 'red', 'blue', '/', '\\', '..', '.', '.jpg', '.txt', ' ', '\t', '\n', '\r', '\r\n', '\0', '\x1b[2J', '\x85',
    '\u2028', '\ufeff', '鳥', 'é', '1', '-1', 'nan', 'inf', '1e400', '0.5', '9' * 5000, 'x' * 300, '1_0', '٣', '%s',
    '{0}', "'", '"', '\U0001f426', 'İ']


@functools.lru_cache(maxsize=1)
def valid():
    """Return {file: its text}, without photographs."""
    return {
        'train.txt': 'red\nblue\n', 'test.txt': 'green\n',
        'cub/images.txt': ''.join(f'{k} {key}.jpg\n' for k, key in enumerate(KEYS, 1)),
        'cub/bounding_boxes.txt': ''.join(f'{k} 1.0 2.0 30.5 20.0\n' for k in range(1, 4)),
        **{f'text/{key}.txt': 'a small red bird.\nun oiseau coloré – très petit\n' for key in KEYS}}


PICTURE = jpeg()


def fuzz(rng, folder):
    """Read a tiny CUB_200_2011 with some changed files; sometimes, write the usable entries to a file."""
    files = {name: text.encode() for name, text in valid().items()}
    for name in rng.sample(list(files), rng.choice((1, 1, 2, 7))):
        files[name] = mutate(rng, files[name])
    for name, data in {**files, **{f'cub/images/{key}.jpg': PICTURE for key in KEYS}}.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            file.write(data)
    cub_folder, text = os.path.join(folder, 'cub'), os.path.join(folder, 'text')
    try:
        split_of = cub.read_split({split: [os.path.join(folder, f'{split}.txt')] for split in ('train', 'test')})
        entries, strange = cub.list_photographs(cub_folder, text, split_of)
        chosen = [entry for entry in entries if entry.split]
        check_names(chosen)
    except UserError as error:
        assert '\n' not in str(error)
        return
    usable = [(entry.split, photograph) for entry in chosen for photograph in attempt(entry)]
    assert not any(CONTROL.search(line) for line in [*strange, *(entry.key for entry in entries)])
    for _, photograph in usable:
        list(map(unread, photograph.captions))
    if usable and rng.random() < .1:
        path = os.path.join(folder, 'a.hdf5')
        with layout.replace_file(path) as file:
            for split, photograph in usable:
                layout.write_photograph(file, split, photograph)
        with layout.open_file(path) as file:
            found = [(index.classes[k], index.names[k]) for index in (layout.read_index(file, split) for split in
                                                                      layout.SPLITS) for k in range(len(index.names))]
        assert sorted(found) == sorted((photograph.class_name, photograph.name) for _, photograph in usable)


def attempt(entry):
    """Return the photograph of an entry in a list, or an empty list if it cannot be used."""
    try:
        return [read_photograph(entry)[0]]
    except ValueError:
        return []


def mutate(rng, data):
    """Change, remove or insert bytes or meaningful pieces of text."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            data[place:place] = rng.choice(PIECES).encode()
        elif kind == 1:
            data[place:place + rng.choice((1, 4, 30))] = b''
        elif kind == 2:
            data[place:place] = rng.randbytes(rng.choice((1, 3)))
        else:
            data[place:place] = data[rng.randrange(len(data) + 1):][:rng.choice((5, 30))]
    return bytes(data)


TARGETS = {'lists': fuzz}
