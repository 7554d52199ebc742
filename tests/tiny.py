"""Write tiny HDF5 files of captioned images: colored noise with a square on it."""
import io

import numpy as np
import torch
from PIL import Image

from char_cnn_rnn.build_encoder import embed_captions, save_encoder
from char_cnn_rnn.encoder import CharCnnRnn
from data import layout
from data.cache import load_split

SPLITS = {'train': {'001.Auk': 3, '002.Jay': 2, '003.Owl': 2}, 'valid': {}, 'test': {'004.Wren': 2, '005.Lark': 2}}
CAPTIONS = ('a small red bird', 'un oiseau coloré – très petit “ébène”')


def jpeg(seed=0, size=(50, 40), mode='RGB'):
    """Return the bytes of a JPEG of noise around a color, with a square of another color on it."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 180, 3) + random.integers(0, 60, (size[1], size[0], 3))
    pixels[8:24, 10:30] = random.integers(0, 255, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(buffer, 'JPEG')
    return buffer.getvalue()


def photographs(split, classes, captions=CAPTIONS, embeddings=True):
    """Yield `classes[name]` different `layout.Photograph`s of each class; the second of a class is gray."""
    for class_name, count in classes.items():
        for k in range(count):
            name = f'{class_name[4:]}_{k}'
            seed = sum(f'{split}/{name}'.encode())
            vectors = np.random.default_rng(seed).standard_normal((len(captions), layout.EMBED_DIM)).astype(np.float32)
            yield layout.Photograph(name, class_name, jpeg(seed, (50 + k, 40), 'L' if k == 1 else 'RGB'),
                                    [f'{caption}, {name}' for caption in captions],
                                    vectors if embeddings else None, (1, 2, 30.5, 20))


def make(path, splits=SPLITS, captions=CAPTIONS, embeddings=True):
    """Write a file in this project's layout with `splits[split][class]` photographs of each class; return its path."""
    with layout.replace_file(str(path)) as file:
        for split, classes in splits.items():
            for photograph in photographs(split, classes, captions, embeddings):
                layout.write_photograph(file, split, photograph)
    return str(path)


def with_encoder(folder, splits):
    """Write folder/data/tiny.hdf5 and, beside it, the encoder that wrote its embeddings. Returns the folder."""
    path = make(folder / 'data' / 'tiny.hdf5', splits)
    torch.manual_seed(0)
    encoder = CharCnnRnn('birds_cvpr')
    save_encoder(encoder, path)
    layout.write_embeddings(path, {split: embed_captions(encoder, load_split(path, split).index.captions, verbose=False)
                                   for split in splits}, 'random weights')
    return folder
