"""Read embeddings that another program computed from an NPZ file, without trusting it.

The file holds two arrays, as `numpy.savez(FILE, names=..., embeddings=...)` writes them:

    names        str [N]: SPLIT/GROUP of each caption in the HDF5 file, such as train/Black_Footed_Albatross_0046_18_0
    embeddings   float [N, D], a row for each name, in any order

and may hold a third, `encoder`: str, what computed them. Array sizes are checked before memory is allocated.
"""
import contextlib
import math
import zipfile

import numpy as np

from common.checkpoint_file import printable
from common.errors import UserError
from common.files import check_is_file
from data import layout

LONGEST_NAME = 1000  # characters of a name
SHOWN = 60           # characters of what computed the embeddings
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class EmbeddingFile:
    """The NPZ file `path`, open for reading. Raises UserError if it is not one, is damaged, or lacks an array."""

    def __init__(self, path, count):
        self.path, self.count = path, count
        with self._converted_errors():
            check_is_file(path)
            with zipfile.ZipFile(path) as archive:
                shapes = {name: self._checked_shape(archive, name) for name in ('names', 'embeddings')}
                has_encoder = 'encoder.npy' in archive.namelist()
                if has_encoder:
                    self._checked_shape(archive, 'encoder')
            if len(shapes['embeddings']) != 2 or shapes['names'] != shapes['embeddings'][:1]:
                raise ValueError(f'names is {shapes["names"]}, embeddings {shapes["embeddings"]}, not [N] and [N, D]')
            self.width = shapes['embeddings'][1]
            with np.load(path, allow_pickle=False) as arrays:
                self.encoder = printable(str(arrays['encoder'].flat[0])[:SHOWN])[1:-1] if has_encoder else ''

    def read(self, keys):
        """Return {split: float32 [captions, D]} for {split: names of the captions' groups}.

        Raises UserError unless the file has one finite row, not all zeros, for each caption, and no others.
        """
        with self._converted_errors(), np.load(self.path, allow_pickle=False) as arrays:
            row_of = {name: row for row, name in enumerate(arrays['names'].tolist())}
            with np.errstate(over='ignore'):  # infinity is found below
                rows = arrays['embeddings'].astype(np.float32)
        wanted = {split: [f'{split}/{key}' for key in of_split] for split, of_split in keys.items()}
        known = {name for of_split in wanted.values() for name in of_split}
        for what, names in (('has no embedding of', known - row_of.keys()),
                            ('names no caption:', row_of.keys() - known)):
            if names:
                raise UserError(f'{self.path}: {what} {printable(min(names))} ({len(names):,} such names); it needs a '
                                'row for each caption of the HDF5 file, named SPLIT/GROUP')
        if len(row_of) < len(rows):
            raise UserError(f'{self.path}: names a caption twice; it needs one row for each')
        bad = ~np.isfinite(rows).all(1) | ~rows.any(1)
        if bad.any():
            name = printable(next(name for name, row in row_of.items() if bad[row]))
            raise UserError(f'{self.path}: the embedding of {name} has numbers that are not finite, or only zeros')
        return {split: rows[[row_of[name] for name in names]] if names else np.empty((0, self.width), np.float32)
                for split, names in wanted.items()}

    def _checked_shape(self, archive, name):
        """Return the shape of an array. Raises ValueError if its type, or its size in memory, cannot be that."""
        with archive.open(f'{name}.npy') as file:
            shape, _, dtype = HEADERS[np.lib.format.read_magic(file)](file)
        if name == 'embeddings' and len(shape) == 2 and shape[1] > layout.WIDEST:
            raise ValueError(f'embeddings is {list(shape)}, with more than {layout.WIDEST:,} numbers each')
        if name == 'encoder' and dtype.itemsize > 4 * LONGEST_NAME:
            raise ValueError(f'encoder has more than {LONGEST_NAME:,} characters')
        length = 1 if name == 'encoder' else self.count
        most = length * (dtype.itemsize * layout.WIDEST if name == 'embeddings' else 4 * LONGEST_NAME)
        if dtype.kind != ('f' if name == 'embeddings' else 'U'):
            raise ValueError(f'{name} is of type {dtype}, not {"float" if name == "embeddings" else "str"}')
        if name != 'encoder' and shape[:1] != (self.count,) or math.prod(shape) * dtype.itemsize > most or 0 in shape:
            raise ValueError(f'{name} is {list(shape)}, and there are {self.count:,} captions')
        return shape

    @contextlib.contextmanager
    def _converted_errors(self):
        try:
            yield
        except KeyError as error:
            raise UserError(f'{self.path}: lacks an array; write it with numpy.savez(FILE, names=..., embeddings=...)'
                            ) from error
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            reason = printable(getattr(error, 'strerror', None) or ' '.join(str(error).split()))
            raise UserError(f'{self.path}: cannot be read as an NPZ file of embeddings ({reason}); write it with '
                            'numpy.savez(FILE, names=..., embeddings=...)') from error
