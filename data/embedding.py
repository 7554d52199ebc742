"""Write the embeddings of all captions into an HDF5 file, and their encoder beside it, whichever encoder that is."""
import os

import numpy as np
import torch
from tqdm import tqdm

from common import checkpoint
from common.errors import UserError
from common.files import check_can_write
from data import layout
from data.cache import load_split
from data.checked_files import stamp_of

KEEP = 2  # encoder files beside the data: the one before may be the only copy of a trained encoder


def embed_file(path, width, encoder_bytes, embed):
    """Write an embedding for every caption of the HDF5 file `path`, atomically; return their number.

    `embed(indexes)`, called after all checks, takes {split: `layout.Index`} and returns ({split: float32 [captions,
    width]}, text that says what made them, the encoder's fingerprint). `encoder_bytes` is the size of the encoder's
    file, which `save_encoder` writes afterwards. Raises CannotWrite, and UserError if the file is missing or changes in
    the meantime, and what `embed` raises.
    """
    stamp = stamp_of(path) if os.path.exists(path) else None  # a missing file is reported below
    indexes = {split: load_split(path, split).index for split in layout.SPLITS}
    beside, count = layout.encoder_beside(path), sum(len(index.captions) for index in indexes.values())
    check_can_write(beside)  # before the embeddings are replaced by those of this encoder
    layout.check_room(path, count, encoder_bytes, width)
    embeddings, source, fingerprint = embed(indexes)
    layout.write_embeddings(path, embeddings, source, fingerprint, stamp)
    return count


def save_encoder(path, contents):
    """Save `contents`, an encoder or what names it, beside the HDF5 file `path`, where `--text` looks for it.

    Returns its file. An earlier one is kept as FILE.1, unless it is the same.
    """
    beside = layout.encoder_beside(path)
    if not is_saved(beside, contents):
        checkpoint.save(beside, contents, keep=KEEP)
    return beside


def is_saved(path, contents):
    """Return whether the file `path` holds the same: a dict of strings, or of dicts of tensors."""
    try:
        saved = checkpoint.load(path) if os.path.isfile(path) else {}
    except UserError:  # it is damaged
        return False
    return are_equal(saved, contents)


def are_equal(one, other):
    """Return whether two values are equal: dicts, tensors or others."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(are_equal(one[name], other[name]) for name in one)
    if torch.is_tensor(one) and torch.is_tensor(other):
        return torch.equal(one, other.cpu())
    return type(one) is type(other) and one == other


def embed_unique(encode, captions, width, batch_size=256, verbose=True):
    """Return float32 [N, width] for a list of N sentences; repeated ones are computed once.

    `encode` computes a NumPy array [B, width] for a list of B sentences.
    """
    todo, rows = sorted(dict.fromkeys(captions), key=len), []  # sentences of similar length share a batch
    for start in tqdm(range(0, len(todo), batch_size), desc='captions', unit=' batches', leave=False,
                      disable=None if verbose else True, delay=2):
        rows.append(encode(todo[start:start + batch_size]))
    if not rows:
        return np.empty((0, width), np.float32)
    row_of = {caption: row for row, caption in enumerate(todo)}
    return np.concatenate(rows)[[row_of[caption] for caption in captions]]
