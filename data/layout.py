"""Read and write captioned images in HDF5: the only place that knows the paths inside the file.

    /train /valid /test          one group for each split
        NAME_0 .. NAME_9         one group for each caption of the photograph NAME (CLASS.NAME if two classes have it)
            name                 str, the photograph's name, without folder and extension
            img                  void, the bytes of the JPEG
            embeddings           float32 [D], the sentence embedding (absent until an encoder has been run)
            class                str
            txt                  str, UTF-8
            bbox                 float32 [4]: x, y, width, height in pixels (absent in the public file)

This is the layout of the file that the chapter downloads, which has five captions for each photograph and five copies
of its bytes. Here `img`, `name`, `class` and `bbox` exist once for each photograph and are hard-linked from the groups
of all its captions, so that code for either file reads the other. As in CUB-200-2011, `bbox` refers to the image as it
is stored, before its EXIF orientation is applied. D is 1,024 for the chapter's encoder, and the same in a whole split.

Files from others may be damaged, or crafted to read other files of the machine: `data.plain_hdf5` refuses what is
unsafe, and `data.read_split` reads them in a separate process.
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
from common.files import check_space, convert_os_errors, partial_file
from data import plain_hdf5
from data.checked_files import stamp_of

ENDINGS = ('.hdf5', '.h5')
SPLITS = ('train', 'valid', 'test')
EMBED_DIM = 1024  # of the chapter's encoder; others have other widths
WIDEST = 16_384   # numbers of an embedding
ENCODER_LENGTH = 200  # characters of the attribute `encoder`, at most
TEXT = h5py.string_dtype('utf-8')
# These store groups as compact link messages, not as B-trees and heaps: half the overhead at ten groups per photograph.
LIBRARY_VERSIONS = ('v108', 'v110')
CAPTION_BYTES, EMBEDDING_BYTES = 800, 4400  # in the file, of a caption's group and of its embedding (measured)
MARGIN = 2 ** 20  # bytes, more than HDF5 still has to write at any time
NO_RESERVATION = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)  # errors of disks that cannot reserve space


class BadEmbeddings(ValueError):
    """Embeddings that cannot be trained on, in a file that may otherwise be fine. The text says which and why."""


@dataclass
class Photograph:
    """A photograph with everything that the file holds about it.

    `embeddings` is float32 [number of captions, D] or None; `bbox` is (x, y, width, height) in pixels or None.
    """
    name: str
    class_name: str
    jpeg: bytes
    captions: list
    embeddings: np.ndarray = None
    bbox: tuple = None


@dataclass
class Index:
    """A split without images and embeddings: captions in the order of the file, photographs in order of appearance."""
    keys: list = field(default_factory=list)          # per caption: name of its group
    captions: list = field(default_factory=list)      # per caption: text
    photo_of: list = field(default_factory=list)      # per caption: number of its photograph
    names: list = field(default_factory=list)         # per photograph
    classes: list = field(default_factory=list)       # per photograph
    boxes: list = field(default_factory=list)         # per photograph: [x, y, width, height] or None
    img_keys: list = field(default_factory=list)      # per photograph: first group that links to its JPEG
    places: list = field(default_factory=list)        # per photograph: (offset in the file, bytes) of its JPEG

    def sentence(self, caption):
        """Return (class, name, K) of a caption: it is sentence K of its photograph, as the file counts them."""
        photo = self.photo_of[caption]
        return self.classes[photo], self.names[photo], self.keys[caption].rpartition('_')[2]


def check_name(path):
    """Raise UserError if a new HDF5 file cannot be named `path`, or --data_dir and --dataset could not find it."""
    stem, ending = os.path.splitext(path)
    if os.path.isdir(path):
        raise UserError(f'--out {path}: is a folder; name a file in it, such as {os.path.join(path, "birds.hdf5")}')
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise UserError(f'--out {path}: {folder} is a file, not a folder; give another path')
    if ending not in ENDINGS:
        raise UserError(f'--out {path}: --dataset would not find it; give a name that ends in {" or ".join(ENDINGS)}')
    if _is_of_another_program(path):
        raise UserError(f'--out {path}: exists and holds no data set, so it is not replaced; delete it, or give '
                        'another name')
    for other in ENDINGS:
        if other != ending and os.path.exists(stem + other):
            raise UserError(f'--out {path}: --dataset {shlex.quote(_stem(path))} would also refer to '
                            f'{os.path.basename(stem + other)} in the same folder; give it another name')


def _is_of_another_program(path):
    """Return whether a file is neither one of these HDF5 files nor empty; one that is too damaged to tell is not."""
    if not os.path.isfile(path) or not os.path.getsize(path):
        return False
    try:
        if not h5py.is_hdf5(path):
            return True
        with h5py.File(path, 'r', locking=False) as file:
            return not any(file.id.links.exists(split.encode()) for split in SPLITS)
    except (OSError, RuntimeError):
        return False


def prepare_command(path):
    """Return the command that makes the HDF5 file `path`."""
    out = f'--out {shlex.quote(path)}'
    given = {'toy_birds': '', 'birds': '--cub CUB_200_2011 --text text_c10 ',
             'flowers': '--images jpg --text text_c10 '}
    if _stem(path) in given:
        return f'python {_script("data", _stem(path), "prepare.py")} {given[_stem(path)]}{out}'
    name = f'--images PICTURES --captions CAPTIONS --name {shlex.quote(_stem(path))}'
    return f'python {_script("data", "folder", "prepare.py")} {name} {out}'


def _stem(path):
    return os.path.splitext(os.path.basename(path))[0]


def _script(*parts):
    """Return the path of a script of this repository as it can be typed in the current folder."""
    path = os.path.abspath(os.path.join(os.path.dirname(os.path.realpath(__file__)), '..', *parts))
    return shlex.quote(min(os.path.relpath(path), path, key=len))


def encoder_beside(path):
    """Return where the sentence encoder that wrote the embeddings of the HDF5 file `path` is kept."""
    return f'{os.path.splitext(path)[0]}.encoder.pt'


def open_file(path):
    """Open `path` for reading. Raises UserError if it is missing, in use, or not in this layout."""
    if not os.path.isfile(path):
        raise no_such_file(path)
    try:
        file = h5py.File(path, 'r')
    except PermissionError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}); change its permissions') from error
    except Exception as error:  # a damaged file makes h5py raise errors of any kind
        if 'unable to lock file' in str(error):
            raise UserError(f'{path}: in use by another program; wait until it has finished') from error
        raise UserError(f'{path}: not a readable HDF5 file ({_one_line(error)}); '
                        f'make it again with: {prepare_command(path)}') from error
    try:
        for split in SPLITS:
            if not _group(file, split):
                raise UserError(f'{path}: has no group /{split}, so it is not a file of captioned images; '
                                f'make one with: {prepare_command(path)}')
    except BaseException:
        with contextlib.suppress(RuntimeError):  # raised by libhdf5 for damaged files
            file.close()
        raise
    return file


@contextlib.contextmanager
def replace_file(path, copy=False):
    """Yield an HDF5 file open for writing that replaces `path` only when the block ends without an error.

    With `copy`, it starts as a copy of `path`. Whatever happens, `path` is the old file or the complete new one. SIGINT
    and SIGTERM take effect between two photographs or embeddings. Raises CannotWrite if the disk is full or the file
    cannot be written, and UserError if the copied file has changed in the meantime.
    """
    with signals.hold(), partial_file(path) as partial, convert_os_errors(path):
        copied = stamp_of(path) if copy else None
        if copy:
            shutil.copyfile(path, partial)
        # HDF5's own lock is off because `partial_file` has locked the file.
        with h5py.File(partial, 'r+' if copy else 'w', libver=LIBRARY_VERSIONS, locking=False) as file:
            for split in SPLITS:
                file.require_group(split)
            yield file
            _release_reserved(file)
        with open(partial, 'rb') as written:
            os.fsync(written.fileno())
        if copied and stamp_of(path) != copied:
            raise _has_changed(path)
        if not copy:
            check_name(path)  # again: another process may have written a file with the other extension


def _reserve(file, needed):
    """Reserve disk space for `needed` more bytes of an open file, after delivering a signal that is being held.

    HDF5 crashes on a full disk, at once or when it closes the file. So it is given nothing to write before there is
    space for it and for what it writes at the end. Raises OSError or CannotWrite if there is none.
    """
    signals.deliver_held()
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


def _release_reserved(file):
    """Release disk space that was reserved beyond the end of an open file, all of which is written."""
    file.flush()
    if hasattr(os, 'posix_fallocate'):
        os.ftruncate(file.id.get_vfd_handle(), file.id.get_filesize())


def write_photograph(file, split, photograph):
    """Add a photograph and its captions to `split`, in groups named NAME_K, or CLASS.NAME_K if that name is taken.

    Raises UserError if the split already has this class and name, and what `replace_file` raises.
    """
    captions, embeddings = photograph.captions, photograph.embeddings
    group_name = _group_name(file[split], photograph)
    _reserve(file, len(photograph.jpeg) + sum(len(caption.encode()) for caption in captions)
             + len(captions) * (CAPTION_BYTES + len(group_name)
                                + (0 if embeddings is None else embedding_bytes(np.shape(embeddings)[-1]))))
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
            raise UserError(f'{photograph.class_name}/{photograph.name}: two photographs in {split.name} have this '
                            'class and name; rename one')
        group_name = f'{photograph.class_name}.{group_name}'
    return group_name


def write_embeddings(path, embeddings, source, encoder=None, stamp=None):
    """Write every caption's embedding, atomically.

    `embeddings` maps a split to float32 [captions, D] in the order of `read_index`. The file's attributes store
    `source`, which describes what made them, and `encoder`, the fingerprint of the sentence encoder's weights, if
    given. Raises UserError if the file is no longer the version `stamp` (`checked_files.stamp_of`), if given.
    """
    with convert_os_errors(path):
        if stamp and stamp_of(path) != stamp:
            raise _has_changed(path)
    with open_file(path) as file:
        for split, rows in embeddings.items():
            if len(rows) != len(file[split]):
                raise UserError(f'{path}: /{split} has {len(file[split])} captions, '
                                f'but there are {len(rows)} embeddings')
            if not np.isfinite(rows).all():
                raise UserError(f'{path}: {source} gives embeddings with numbers that are infinite or NaN, so none '
                                'are written; use another encoder')
    width = width_of(embeddings, source)
    check_room(path, sum(map(len, embeddings.values())), width=width)
    with replace_file(path, copy=True) as file:
        if stamp and stamp_of(path) != stamp:  # `replace_file` checks once more before the copy replaces the file
            raise _has_changed(path)
        for split, rows in embeddings.items():
            bar = tqdm(file[split], f'{split}: writing embeddings', unit='', leave=False, disable=None, delay=2)
            for key, row in zip(bar, rows):
                _reserve(file, embedding_bytes(width))
                _write_embedding(_own_group(_own_group(file, split), key), row)
        file.attrs['embeddings'] = source.encode('utf-8', 'replace').decode()  # file names need not be UTF-8
        file.attrs.pop('encoder', None)  # of the previous embeddings
        if encoder:
            file.attrs['encoder'] = encoder


def _has_changed(path):
    return UserError(f'{path}: changed while its captions were being read; start again')


def _own_group(parent, key):
    """Return a group's subgroup `key`. Raises UserError for anything else: a link may lead into another file."""
    if not (isinstance(parent.get(key, getlink=True), h5py.HardLink) and isinstance(parent[key], h5py.Group)):
        raise UserError(f'{parent.file.filename}: {parent.name.rstrip("/")}/{key} is not a group of this file, so '
                        'nothing is written there; make the file again')
    return parent[key]


def width_of(embeddings, source):
    """Return the width D of {split: rows [captions, D]}. Raises UserError if they differ, or D is no possible width."""
    widths = {np.shape(rows)[1] for rows in embeddings.values() if len(rows)} or {EMBED_DIM}
    if len(widths) > 1 or not 0 < min(widths) <= WIDEST:
        raise UserError(f'{source}: gives embeddings of {" and ".join(map(str, sorted(widths)))} numbers; all need the '
                        f'same width, up to {WIDEST:,}')
    return min(widths)


def embedding_bytes(width):
    """Return how many bytes an embedding of this width takes in the file."""
    return EMBEDDING_BYTES + 4 * (width - EMBED_DIM)


def check_room(path, count, encoder_bytes=0, width=EMBED_DIM):
    """Raise CannotWrite if the disk has no space for a copy of the HDF5 file `path` with `count` new embeddings.

    The same holds for `encoder_bytes` of the encoder beside it. Either file may be a link to another disk.
    """
    check_space(path, os.path.getsize(path) + count * embedding_bytes(width) + encoder_bytes)
    check_space(encoder_beside(path), encoder_bytes)


def _write_embedding(group, embedding):
    embedding = np.asarray(embedding, np.float32)
    if embedding.ndim != 1 or not 0 < len(embedding) <= WIDEST:
        raise UserError(f'{group.name}: an embedding of shape {embedding.shape} in place of 1 to {WIDEST:,} numbers; '
                        'use another encoder')
    if 'embeddings' in group:
        del group['embeddings']
    group.create_dataset('embeddings', data=embedding)


def read_index(file, split):
    """Read the `Index` of a split of an open file, with a progress bar. Raises UserError if the file is damaged."""
    index, photo_by_name, links, group = Index(), {}, [], _group(file, split)
    with _convert_errors(file, split):
        keys = plain_hdf5.names(group)
    room = os.path.getsize(file.filename)  # limits what is read: many groups can link to the same data
    for key in plain_hdf5.with_time_limit(tqdm(keys, desc=f'{split}: captions', unit='', leave=False, disable=None)):
        with _convert_errors(file, split, key):
            caption, (name, _, number) = plain_hdf5.open_group(group, key), key.rpartition('_')
            if not name or not number:
                raise ValueError('it is not named PHOTOGRAPH_K')
            # A letter of another encoding is one that the sentence encoder does not read, whatever replaces it.
            index.captions.append(plain_hdf5.read_text(file, caption, 'txt', 'replace').strip())
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
                raise ValueError('its captions and images add up to more bytes than the file has')
        index.keys.append(key)
        index.photo_of.append(photo_by_name[name])
    return index


def _check_same_photograph(file, caption, index, photo):
    """Raise ValueError unless the group `caption` holds the photograph of this number in the index.

    Each caption of the chapter's file has a copy of the photograph, which is not read: its name, class and number of
    bytes identify it.
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
    """Return the bytes of the JPEG of the caption group `key`. Raises UserError if they are damaged."""
    group = _group(file, split)
    with _convert_errors(file, split, key), open(file.filename, 'rb') as plain:
        offset, size = plain_hdf5.place_of_bytes(file, plain_hdf5.open_group(group, key), 'img')
        plain.seek(offset)
        return plain.read(size)


def no_such_file(path):
    """Return the UserError for a missing HDF5 file."""
    return UserError(f'{path}: no such file; make it with: {prepare_command(path)}')


def cannot_be_read(path, where, reason):
    """Return the UserError for damage to an HDF5 file at `where`: a split, or SPLIT/GROUP."""
    return UserError(f'{path}: /{where} is incomplete or damaged ({reason}); '
                     f'make the file again with: {prepare_command(path)}')


def cannot_be_decoded(path, split, name, error):
    """Return the UserError for a photograph that Pillow refuses with `error`."""
    return UserError(f'{path}: the photograph {name} of /{split} cannot be decoded ({error}); make the file again '
                     f'without it: {prepare_command(path)}')


def has_embeddings(file, split):
    """Return whether any caption of a split has an embedding, so that all of them should have one."""
    group = _group(file, split)
    with _convert_errors(file, split):
        keys = plain_hdf5.names(group)
    bar = tqdm(keys, f'{split}: captions without embeddings', unit='', leave=False, disable=None, delay=2)
    for key in plain_hdf5.with_time_limit(bar):
        with _convert_errors(file, split, key):
            if plain_hdf5.has(plain_hdf5.open_group(group, key), 'embeddings'):
                return True
    return False


def read_embeddings(file, split, keys):
    """Return float32 [len(keys), D], with the width D of the first embedding in the split.

    Raises BadEmbeddings if one is missing, not finite or of another width.
    """
    group = _group(file, split)
    embeddings = np.empty((len(keys), _first_width(file, split, group, keys)), np.float32)
    bar = tqdm(keys, f'{split}: embeddings', unit='', leave=False, disable=None, delay=2)
    for row, key in zip(embeddings, plain_hdf5.with_time_limit(bar)):
        with _convert_errors(file, split, key):
            wrong = _read_embedding(file, plain_hdf5.open_group(group, key), row)
        if wrong:
            raise BadEmbeddings(f'/{split}/{key} has {wrong}')
    return embeddings


def _first_width(file, split, group, keys):
    """Return the width of the first embedding in a split. Raises BadEmbeddings if it is not a possible one."""
    for key in plain_hdf5.with_time_limit(keys):
        with _convert_errors(file, split, key):
            caption = plain_hdf5.open_group(group, key)
            if plain_hdf5.has(caption, 'embeddings'):
                width = len(plain_hdf5.read_numbers(file, caption, 'embeddings'))
                break
    else:
        return EMBED_DIM
    if width > WIDEST:
        raise BadEmbeddings(f'/{split}/{key} has an embedding of {width:,} numbers, more than {WIDEST:,}')
    return width


def _read_embedding(file, caption, row):
    """Read an embedding into `row`; return what is wrong with it, or None."""
    if not plain_hdf5.has(caption, 'embeddings'):
        return f'no embedding of {len(row)} numbers'
    numbers = plain_hdf5.read_numbers(file, caption, 'embeddings')
    if len(numbers) != len(row):
        return f'no embedding of {len(row)} numbers, but one of {len(numbers)}'
    with np.errstate(over='ignore'):  # numbers beyond the range of float32 become infinite
        row[:] = numbers
    if not np.isfinite(row).all():
        return 'an embedding with numbers that are infinite or NaN'
    return None if row.any() else 'an embedding of zeros'


def read_encoder(file):
    """Return the file's attribute `encoder`, the fingerprint of the encoder that wrote its embeddings, or None."""
    try:
        value = plain_hdf5.read_attribute(file, 'encoder')
    except Exception:  # h5py may raise anything for a damaged attribute, which counts as a missing one
        return None
    return value if value and len(value) <= ENCODER_LENGTH and value.isprintable() else None


def _group(file, split):
    """Return the low-level group of a split, or None if there is none. Raises UserError if it is not a group."""
    with _convert_errors(file, split):
        return plain_hdf5.open_group(file.id, split) if plain_hdf5.has(file.id, split) else None


@contextlib.contextmanager
def _convert_errors(file, *place):
    """Raise UserError in place of any error of the block, which reads from `place`: a split, or a split and a group."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # damage makes h5py raise errors of any kind
        raise cannot_be_read(file.filename, '/'.join(place), _one_line(error)) from error


def _one_line(error):
    """Return an error's message as one line."""
    return (' '.join(str(error).split()) or type(error).__name__)[:200]
