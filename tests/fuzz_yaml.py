"""Configuration files for tests/fuzz.py: ours and the StackGANs' authors', with changes and malicious lines."""
import functools
import glob
import os
import sys
from unittest import mock

from common.errors import UserError
from stackgan_v1 import main as stackgan_v1
from stackgan_v2 import main as stackgan_v2

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
THEIRS = '''CONFIG_NAME: '3stages'
DATASET_NAME: 'birds'
DATA_DIR: '../data/birds'
GPU_ID: '0,1'
STAGE: 2
WORKERS: 4
TREE: {BRANCH_NUM: 3, BASE_SIZE: 64}
TRAIN:
    FLAG: True
    NET_G: ''
    BATCH_SIZE: 24
    MAX_EPOCH: 600
    GENERATOR_LR: 0.0002
    DISCRIMINATOR_LR: 0.0002
    COEFF:
      KL: 2.0
GAN: {DF_DIM: 64, B_CONDITION: False}
TEXT: {DIMENSION: 1024}
'''
LINES = ['lr: 2001-99-99', 'lr: !!int x', 'lr: !!bool x', 'lr: !!python/object/apply:os.system [x]', 'lr: 1.0e+400',
         'lr: .inf', 'lr: .nan', 'lr: 2e-4', f'lr: {5000 * "9"}', 'epochs: 0x1F', 'epochs: 1_0', 'epochs: 1:30',
         'epochs: [1, 2]', 'epochs: {a: 1}', 'classes: [a, b]', 'classes: []', 'classes: [[a]]', 'dataset: ~',
         '? [a]\n: 1', 'dataset: "\\0"', 'dataset: "\\ud800"', 'dataset: "\\UFFFFFFFF"', 'dataset: |\n  a\n  b',
         '<<: {lr: 1}', '<<: *a', 'a: &a [1]', 'b: *a', '&a {b: *a}', '---', '...', '%YAML 1.1', '%YAML 99999.1',
         '- a', '1: 2', 'true: 1', '"": 1', 'DATASET_NAME: [a]', 'DATASET_NAME: {a: 1}', 'DATASET_NAME: ~',
         'DATA_DIR: [lsun]', 'DATA_DIR: ../lsun/x_lmdb', 'GPU_ID: [0, 1]', 'GPU_ID: ~', 'GPU_ID: x', 'TRAIN: 3',
         'TRAIN: {COEFF: {KL: {a: 1}}}', 'STAGE: [1]', '\t', '#', 'TEXT: {DIMENSION: ~}', 'checkpoint: 1',
         'cfg: a.yml', 'resume: newest', 3000 * '[', 3000 * '{a: ', 3000 * '- ', 'a: ' + 3000 * '[', 'x' * 3000,
         '"' * 99, "'", 'a: "b', ': ', '? ', '!', '&', '*', '@a', '`', '%', '!<', '!<tag:x> 1']


@functools.cache
def _texts():
    ours = [open(path, encoding='utf-8').read() for path in sorted(glob.glob(f'{ROOT}/stackgan_v*/cfg/*.yml'))]
    return [*ours, THEIRS]


def configurations(rng, folder):
    """Read them as main.py does, up to the point where it would look for the data."""
    text = rng.choice(_texts())
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        text = _changed(rng, text)
    data = text.encode(rng.choice(['utf-8'] * 8 + ['utf-16', 'utf-8-sig', 'utf-16-be', 'utf-32']), 'surrogatepass')
    path = os.path.join(folder, 'a.yml')
    with open(path, 'wb') as file:
        file.write(data)
    main = rng.choice([stackgan_v1, stackgan_v2])
    with mock.patch.object(sys, 'argv', ['main.py', '--cfg', path]), mock.patch('builtins.print'):
        try:
            main.parse_flags()
            return 'accepted'
        except UserError as error:
            assert '\n' not in str(error) and len(str(error)) < 1500, str(error)
            return 'refused'


def _changed(rng, text):
    lines = text.split('\n')
    place = rng.randrange(len(lines))
    way = rng.choice(['insert', 'insert', 'insert', 'remove', 'copy', 'letter', 'cut', 'indent'])
    if way == 'insert':
        lines.insert(place, rng.choice(['', '', '  ', 'TRAIN: ']) + rng.choice(LINES))
    elif way == 'remove':
        del lines[place]
    elif way == 'copy':
        lines.insert(place, rng.choice(lines))
    elif way == 'indent':
        lines[place] = ' ' * rng.randrange(9) + lines[place].lstrip()
    else:
        text = '\n'.join(lines)
        place = rng.randrange(len(text) + 1)
        if way == 'cut':
            return text[:place]
        letter = rng.choice('\0\t\n\r :,[]{}&*!|>%@`"\'#?-~.0e\u2028\ufeff\x85é\ud800\U0001f426')
        return text[:place] + letter + text[place + rng.randrange(2):]
    return '\n'.join(lines)


TARGETS = {'yaml': configurations}
