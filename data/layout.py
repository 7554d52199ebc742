"""The HDF5 layout of captioned pictures: the only place that knows the paths inside the file.

    /train /valid /test          a group each
        NAME_0 .. NAME_9         a group per caption of the photograph NAME (CLASS.NAME where two classes have a NAME)
            name                 str, the photograph's name, without directory and ending
            img                  void, the bytes of the JPEG
            embeddings           float32 [1024], the sentence embedding (absent until an encoder has been run)
            class                str
            txt                  str, UTF-8
            bbox                 float32 [4]: x, y, width, height in pixels (absent in the public file)

It is the layout of the file that the chapter downloads, which holds five captions a photograph and the bytes of each
photograph five times. Here `img`, `name`, `class` and `bbox` exist once per photograph and are hard-linked from the
groups of all its captions: readers of either file notice no difference. `bbox` is in pixels of the picture as it is
stored, before its EXIF entry turns it upright, as the boxes of CUB-200-2011 are.

Files of others may be damaged, or made to read other files of the machine: `data.plain_hdf5` says what is not followed,
and `data.read_split` reads them in a process of its own.
"""
import contextlib
import errno
import os
import shlex
import shutil
from dataclasses import dataclass, field

import h5py
import numpy as np
from tqdm import tqdm

from common import signals
from common.errors import UserError
from common.files import check_space, explained, partial_file
from data import plain_hdf5
from data.checked_files import stamp_of

ENDINGS = ('.hdf5', '.h5')  # of a file's name
SPLITS = ('train', 'valid', 'test')
EMBED_DIM = 1024
ENCODER_LENGTH = 200  # characters that the attribute `encoder` may have
TEXT = h5py.string_dtype('utf-8')
# Groups as compact link messages instead of B-trees and heaps: at ten groups a photograph that halves the overhead.
LIBRARY_VERSIONS = ('v108', 'v110')
CAPTION_BYTES, EMBEDDING_BYTES = 800, 4400  # what a caption's group takes in the file, and its embedding (measured)
MARGIN = 2 ** 20  # bytes; HDF5 keeps less of what it has yet to write
NO_RESERVATION = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)  # of disks that cannot keep room


class BadEmbeddings(ValueError):
    """Embeddings that cannot be trained on, while all else in the file may be right; its text says which and why."""


@dataclass
class Photograph:
    """A picture with everything the file holds about it.

    `embeddings` is [number of captions, 1024] float32 or None, `bbox` (x, y, width, height) in pixels or None.
    """
    name: str
    class_name: str
    jpeg: bytes
    captions: list
    embeddings: np.ndarray = None
    bbox: tuple = None


@dataclass
class Index:
    """A split without pictures and embeddings: captions in the order of the file, photographs as they appear."""
    keys: list = field(default_factory=list)          # of every caption, its group's name
    captions: list = field(default_factory=list)      # of every caption, its text
    photo_of: list = field(default_factory=list)      # of every caption, the number of its photograph
    names: list = field(default_factory=list)         # of every photograph
    classes: list = field(default_factory=list)       # of every photograph
    boxes: list = field(default_factory=list)         # of every photograph: [x, y, width, height] or None
    img_keys: list = field(default_factory=list)      # of every photograph, the first group that links to its JPEG
    places: list = field(default_factory=list)        # of every photograph: where its JPEG lies in the file, its bytes

    def sentence(self, caption):
        """(class, name, K): the caption with this number is sentence K, as the file counts them, of a photograph."""
        photo = self.photo_of[caption]
        return self.classes[photo], self.names[photo], self.keys[caption].rpartition('_')[2]


def check_name(path):
    """Raise UserError where a new HDF5 file cannot bear the name `path`, by which --data_dir and --dataset find it."""
    stem, ending = os.path.splitext(path)
    if os.path.isdir(path):
        raise UserError(f'--out {path}: is a folder; name a file in it, such as {os.path.join(path, "birds.hdf5")}')
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise UserError(f'--out {path}: {folder} is a file, not a folder to write into; give another')
    if ending not in ENDINGS:
        raise UserError(f'--out {path}: must end in {" or ".join(ENDINGS)}, or --dataset would not find it')
    for other in ENDINGS:
        if other != ending and os.path.exists(stem + other):
            raise UserError(f'--out {path}: beside it lies {os.path.basename(stem + other)}, which --dataset '
                            f'{shlex.quote(_stem(path))} would also mean; give it another name')


def how_to_prepare(path):
    """The command that makes the HDF5 file `path`."""
    out = f'--out {shlex.quote(path)}'
    if _stem(path) == 'toy_birds':
        return f'python {_script("data", "toy_birds", "prepare.py")} {out}'
    folders = '--cub CUB_200_2011 --text text_c10' if _stem(path) == 'birds' else '--cub PHOTOGRAPHS --text SENTENCES'
    return f'python {_script("data", "birds", "prepare.py")} {folders} {out}'


def _stem(path):
    return os.path.splitext(os.path.basename(path))[0]


def _script(*parts):
    """The path of a script of this repository, as it can be typed in the current folder."""
    path = os.path.abspath(os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', *parts))
    return shlex.quote(min(os.path.relpath(path), path, key=len))


def encoder_beside(path):
    """Where the sentence encoder that wrote the embeddings of the HDF5 file `path` is kept."""
    return f'{os.path.splitext(path)[0]}.encoder.pt'


def open_file(path):
    """Open `path` for reading. Raises UserError where it is missing, in use, or not in this layout."""
    if not os.path.isfile(path):
        raise no_such_file(path)
    try:
        file = h5py.File(path, 'r')
    except PermissionError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}); change its permissions') from error
    except Exception as error:  # whatever h5py makes of what libhdf5 stumbled over in a damaged file
        if 'unable to lock file' in str(error):
            raise UserError(f'{path}: in use by another program; wait until that is done with it') from error
        raise UserError(f'{path}: not a readable HDF5 file ({_short(error)}); '
                        f'make it again with: {how_to_prepare(path)}') from error
    try:
        for split in SPLITS:
            if not _group(file, split):
                raise UserError(f'{path}: has no group /{split}, so it is not a file of captioned pictures; '
                                f'make one with: {how_to_prepare(path)}')
    except BaseException:
        with contextlib.suppress(RuntimeError):  # of libhdf5's, over what is damaged
            file.close()
        raise
    return file


@contextlib.contextmanager
def replace_file(path, copy=False):
    """Yield an HDF5 file open for writing that takes the name `path` only when the block ends without an error.

    With `copy` it starts as a copy of what `path` holds. A reader, or a run killed halfway, finds the old file or the
    new one, never half of one. SIGINT and SIGTERM act between two photographs or embeddings. Raises CannotWrite where
    it cannot be written, the disk being full or otherwise, and UserError where what it is a copy of has changed
    meanwhile.
    """
    with signals.hold(), partial_file(path) as partial, explained(path):
        copied = stamp_of(path) if copy else None
        if copy:
            shutil.copyfile(path, partial)
        # Without HDF5's own lock, as `partial_file` has the file locked.
        with h5py.File(partial, 'r+' if copy else 'w', libver=LIBRARY_VERSIONS, locking=False) as file:
            for split in SPLITS:
                file.require_group(split)
            yield file
            _give_back(file)
        with open(partial, 'rb') as written:
            os.fsync(written.fileno())
        if copied and stamp_of(path) != copied:
            raise _has_changed(path)
        if not copy:
            check_name(path)  # again: another process may have written one of this name with the other ending


def _reserve(file, needed):
    """Have the disk keep room for `needed` more bytes of an open file; let a signal act first.

    HDF5 crashes where it finds a disk full, then or when it closes the file. So nothing is handed to it before there is
    room for it, with a margin for what it writes at the end. Raises OSError or CannotWrite where there is not.
    """
    signals.let_act()
    if hasattr(os, 'posix_fallocate'):  # not on macOS and Windows
        end, handle = file.id.get_filesize(), file.id.get_vfd_handle()
        if os.fstat(handle).st_size >= end + needed + MARGIN:
            return
        try:
            return os.posix_fallocate(handle, end, needed + 2 * MARGIN)
        except OSError as error:
            if error.errno not in NO_RESERVATION:
                raise
    check_space(file.filename, needed + MARGIN)


def _give_back(file):
    """Have the disk keep no more room than an open file takes, all of which is written."""
    file.flush()
    if hasattr(os, 'posix_fallocate'):
        os.ftruncate(file.id.get_vfd_handle(), file.id.get_filesize())


def write_photograph(file, split, photograph):
    """Add a photograph and its captions to `split`, in groups of its name, or where that is taken, of CLASS.NAME.

    Raises UserError where the split has one of this class and name, and what `replace_file` raises.
    """
    captions, embeddings = photograph.captions, photograph.embeddings
    group_name = _group_name(file[split], photograph)
    _reserve(file, len(photograph.jpeg) + sum(len(caption.encode()) for caption in captions)
             + len(captions) * (CAPTION_BYTES + len(group_name) + (0 if embeddings is None else EMBEDDING_BYTES)))
    once = {}
    for k, caption in enumerate(captions):
        group = file[split].create_group(f'{group_name}_{k}')
        if not once:
            group.create_dataset('name', data=photograph.name, dtype=TEXT)
            group.create_dataset('img', data=np.void(photograph.jpeg))
            group.create_dataset('class', data=photograph.class_name, dtype=TEXT)
            if photograph.bbox is not None:
                group.create_dataset('bbox', data=np.asarray(photograph.bbox, np.float32))
            once = dict(group.items())
        else:
            for field_name, dataset in once.items():
                group[field_name] = dataset
        group.create_dataset('txt', data=caption, dtype=TEXT)
        if embeddings is not None:
            _write_embedding(group, embeddings[k])


def _group_name(split, photograph):
    group_name = photograph.name
    while f'{group_name}_0' in split:
        namesake = split[f'{group_name}_0']
        if (namesake['class'].asstr()[()], namesake['name'].asstr()[()]) == (photograph.class_name, photograph.name):
            raise UserError(f'{photograph.class_name}/{photograph.name}: two photographs of this class and name in '
                            f'{split.name}')
        group_name = f'{photograph.class_name}.{group_name}'
    return group_name


def write_embeddings(path, embeddings, source, encoder=None, stamp=None):
    """Set every caption's embedding, atomically.

    `embeddings` maps a split to float32 [captions, 1024] in the order of `read_index`. Attributes of the file keep
    `source`, which says what made them, and `encoder`, the fingerprint of the sentence encoder's weights where given.
    Raises UserError where the file is no longer the version `stamp` (`checked_files.stamp_of`), where given.
    """
    with explained(path):
        if stamp and stamp_of(path) != stamp:
            raise _has_changed(path)
    with open_file(path) as file:
        for split, rows in embeddings.items():
            if len(rows) != len(file[split]):
                raise UserError(f'{path}: /{split} has {len(file[split])} captions, '
                                f'but there are {len(rows)} embeddings')
            if not np.isfinite(rows).all():
                raise UserError(f'{path}: its captions have embeddings with numbers that are infinite or not numbers '
                                f'(NaN), by {source}, so none are written; take another encoder')
    check_room(path, sum(map(len, embeddings.values())))
    with replace_file(path, copy=True) as file:
        if stamp and stamp_of(path) != stamp:  # and that is seen again before the copy takes its place
            raise _has_changed(path)
        for split, rows in embeddings.items():
            for key, row in zip(file[split], rows):
                _reserve(file, EMBEDDING_BYTES)
                _write_embedding(_own_group(_own_group(file, split), key), row)
        file.attrs['embeddings'] = source.encode('utf-8', 'replace').decode()  # the name of a file may be no text
        file.attrs.pop('encoder', None)  # that of the embeddings before
        if encoder:
            file.attrs['encoder'] = encoder


def _has_changed(path):
    return UserError(f'{path}: has changed while its captions were read; start again')


def _own_group(parent, key):
    """The group of this name in a group. Raises UserError for anything else: a link may lead into another file."""
    if not (isinstance(parent.get(key, getlink=True), h5py.HardLink) and isinstance(parent[key], h5py.Group)):
        raise UserError(f'{parent.file.filename}: {parent.name.rstrip("/")}/{key} is no group of this file, so nothing '
                        'is written there; make the file again')
    return parent[key]


def check_room(path, count, encoder_bytes=0):
    """Raise CannotWrite where the disk has no room for a copy of the HDF5 file `path` with `count` new embeddings, or
    that of the encoder beside it none for `encoder_bytes`. The two can differ, as either file may be a link.
    """
    check_space(path, os.path.getsize(path) + count * EMBEDDING_BYTES + encoder_bytes)
    check_space(encoder_beside(path), encoder_bytes)


def _write_embedding(group, embedding):
    embedding = np.asarray(embedding, np.float32)
    if embedding.shape != (EMBED_DIM,):
        raise UserError(f'{group.name}: an embedding has {EMBED_DIM} numbers, this one has shape {embedding.shape}')
    if 'embeddings' in group:
        del group['embeddings']
    group.create_dataset('embeddings', data=embedding)


def read_index(file, split):
    """Read the `Index` of a split of an open file, with a progress bar. Raises UserError where it is damaged."""
    index, photo_by_name, links, group = Index(), {}, [], _group(file, split)
    with _damage_named(file, split):
        keys = plain_hdf5.names(group)
    room = os.path.getsize(file.filename)  # for what is read: many groups can link to one thing
    for key in plain_hdf5.watched(tqdm(keys, desc=f'{split}: captions', unit='', leave=False, disable=None)):
        with _damage_named(file, split, key):
            caption, (name, _, number) = plain_hdf5.open_group(group, key), key.rpartition('_')
            if not name or not number:
                raise ValueError('it is not named PHOTOGRAPH_K')
            index.captions.append(plain_hdf5.read_text(file, caption, 'txt').strip())
            room -= len(index.captions[-1])
            if name not in photo_by_name:
                photo_by_name[name] = len(index.names)
                index.names.append(plain_hdf5.read_text(file, caption, 'name'))
                index.classes.append(plain_hdf5.read_text(file, caption, 'class'))
                index.boxes.append(_read_box(file, caption) if plain_hdf5.has(caption, 'bbox') else None)
                index.img_keys.append(key)
                index.places.append(plain_hdf5.place_of_bytes(file, caption, 'img'))
                links.append(plain_hdf5.link(caption, 'img'))
                room -= len(index.names[-1]) + len(index.classes[-1]) + index.places[-1][1]
            elif plain_hdf5.link(caption, 'img') != links[photo_by_name[name]]:
                _check_same_photograph(file, caption, index, photo_by_name[name])
            if room < 0:
                raise ValueError('with it, captions and pictures are longer than the file')
        index.keys.append(key)
        index.photo_of.append(photo_by_name[name])
    return index


def _check_same_photograph(file, caption, index, photo):
    """Raise ValueError where the group `caption` does not hold the photograph of this number in the index.

    A copy of the picture, as each caption of the chapter's file has, is not read: name, class and number of bytes tell
    photographs apart.
    """
    size = plain_hdf5.place_of_bytes(file, caption, 'img')[1]
    if (size, plain_hdf5.read_text(file, caption, 'name'), plain_hdf5.read_text(file, caption, 'class')) != (
            index.places[photo][1], index.names[photo], index.classes[photo]):
        raise ValueError(f'it is of another photograph than {index.img_keys[photo]}; name groups PHOTOGRAPH_K, with K '
                         'the number of the caption')


def _read_box(file, caption):
    box = [float(number) for number in plain_hdf5.read_numbers(file, caption, 'bbox')]
    if len(box) != 4 or not np.isfinite(box).all():
        raise ValueError(f'bbox is {box[:5]}, not four numbers')
    if 0 < max(box) <= 1:
        raise ValueError('bbox is in fractions of the image; give pixels')
    return box


def read_jpeg(file, split, key):
    """The bytes of the picture that the caption group `key` shows. Raises UserError where they are damaged."""
    group = _group(file, split)
    with _damage_named(file, split, key), open(file.filename, 'rb') as plain:
        offset, size = plain_hdf5.place_of_bytes(file, plain_hdf5.open_group(group, key), 'img')
        plain.seek(offset)
        return plain.read(size)


def no_such_file(path):
    """The UserError about an HDF5 file that is missing."""
    return UserError(f'{path}: no such file; make it with: {how_to_prepare(path)}')


def cannot_be_read(path, where, reason):
    """The UserError about what is damaged in an HDF5 file: a split, or SPLIT/GROUP."""
    return UserError(f'{path}: /{where} is incomplete or damaged ({reason}); '
                     f'make the file again with: {how_to_prepare(path)}')


def cannot_be_decoded(path, split, name, error):
    """The UserError about a photograph of the file `path` that Pillow refuses with `error`."""
    return UserError(f'{path}: the photograph {name} of /{split} cannot be decoded ({error}); make the file again '
                     f'without it: {how_to_prepare(path)}')


def has_embeddings(file, split):
    """True where one of the split's captions has an embedding, so that all should have one."""
    group = _group(file, split)
    with _damage_named(file, split):
        keys = plain_hdf5.names(group)
    for key in plain_hdf5.watched(keys):
        with _damage_named(file, split, key):
            if plain_hdf5.has(plain_hdf5.open_group(group, key), 'embeddings'):
                return True
    return False


def read_embeddings(file, split, keys):
    """float32 [len(keys), 1024]. Raises BadEmbeddings where one is missing, of another width, or not finite."""
    embeddings, group = np.empty((len(keys), EMBED_DIM), np.float32), _group(file, split)
    for row, key in zip(embeddings, plain_hdf5.watched(keys)):
        with _damage_named(file, split, key):
            wrong = _read_embedding(file, plain_hdf5.open_group(group, key), row)
        if wrong:
            raise BadEmbeddings(f'/{split}/{key} has {wrong}')
    return embeddings


def _read_embedding(file, caption, row):
    """Fill `row`; return what is wrong with the embedding, or None."""
    if not plain_hdf5.has(caption, 'embeddings'):
        return f'no embedding of {EMBED_DIM} numbers'
    numbers = plain_hdf5.read_numbers(file, caption, 'embeddings')
    if len(numbers) != EMBED_DIM:
        return f'no embedding of {EMBED_DIM} numbers, but one of {len(numbers)}'
    with np.errstate(over='ignore'):  # what is larger than a float32 can be is infinite then
        row[:] = numbers
    return None if np.isfinite(row).all() else 'an embedding with numbers that are infinite or not numbers (NaN)'


def read_encoder(file):
    """What the attribute `encoder` of the file says of the encoder that wrote its embeddings, or None."""
    try:
        value = plain_hdf5.read_attribute(file, 'encoder')
    except Exception:  # whatever h5py makes of a damaged one: then it is not known, as where there is none
        return None
    return value if value and len(value) <= ENCODER_LENGTH and value.isprintable() else None


def _group(file, split):
    """The low-level group of a split, or None where there is none. Raises UserError where it is something else."""
    with _damage_named(file, split):
        return plain_hdf5.open_group(file.id, split) if plain_hdf5.has(file.id, split) else None


@contextlib.contextmanager
def _damage_named(file, *place):
    """Raise UserError in place of any error of the block, which reads what is at `place`: split, or split and group."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever h5py makes of what libhdf5 stumbled over, or plain_hdf5 of what it found
        raise cannot_be_read(file.filename, '/'.join(place), _short(error)) from error


def _short(error):
    """What an error says, in one line."""
    return (' '.join(str(error).split()) or type(error).__name__)[:200]
