"""Record in every PNG how its image was generated, and read it again for `--like`.

The record consists of text chunks, which image viewers and `exiftool` show: the `sentence`; the `seed` of its batch's
noise, and which `row` of how large a `batch` it is; the `truncation` of the noise; the `checkpoint`, as RUN/FILE; and
the fingerprints of the generator's `weights` and of the sentence `encoder`.
"""
import hashlib
import math
import os
import re

from PIL import Image

from common import flags, run
from common.errors import UserError
from common.files import check_is_file
from common.sampling import seed_of_batch

MOST_ROWS = 8192  # of a batch: more would be a record that no command here wrote
FINGERPRINT = re.compile(r'[\w ]{0,80}', re.ASCII)  # '' if unknown


def fingerprint(state_dict):
    """Return 16 hexadecimal digits that identify weights: the start of a SHA-256 of their names and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(state_dict.items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def made_with(file, weights, encoder):
    """Return the part of a record that all images of a command share.

    `file` is the checkpoint, `weights` the generator's state dict, and `encoder` the fingerprint of the encoder.
    """
    return {'checkpoint': _name_of(file), 'weights': fingerprint(weights), 'encoder': encoder}


def _name_of(file):
    """Return the path of a checkpoint from the folder of runs on, with slashes; if it is in no run, its name."""
    folder, name = os.path.split(os.path.abspath(file))
    for _ in range(2):  # a snapshot is in RUN/Model
        folder, part = os.path.split(folder)
        name = f'{part}/{name}'
        if run.has_options(os.path.join(folder, part)):
            return name
    return os.path.basename(file)


def records(sentences, batch_size, seed, truncation, like, shared):
    """Yield the list of records of each batch that `common.sampling.in_batches` generates for the sentences.

    `like` is the record of the image that they are like, or None, and `shared` is what `made_with` returned.
    """
    if like:
        noise = {name: like[name] for name in ('seed', 'row', 'batch', 'truncation')}
        yield from ([{'sentence': sentence, **noise, **shared}] for sentence in sentences)
        return
    for number, start in enumerate(range(0, len(sentences), batch_size)):
        batch = sentences[start:start + batch_size]
        yield [{'sentence': sentence, 'seed': seed_of_batch(seed, number), 'row': row, 'batch': len(batch),
                'truncation': truncation, **shared} for row, sentence in enumerate(batch)]


def read(path):
    """Return the record of a PNG as a dict, with its path as `file`; None if `path` is None.

    Raises UserError if it has no valid record.
    """
    if path is None:
        return None
    try:
        check_is_file(path)
        with Image.open(path, formats=['PNG']) as image:
            text = dict(image.text)
    except Exception as error:  # a damaged image makes Pillow raise errors of any kind
        reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
        raise UserError(f'--like {path}: cannot be read as a PNG ({reason}); give an image that --text generated'
                        ) from error
    if 'sentence' not in text:
        raise UserError(f'--like {path}: does not record how it was generated; give a numbered image that --text '
                        'generated, not a sheet, and not one that another program has saved')
    try:
        return _checked(text) | {'file': path}
    except (KeyError, ValueError) as error:
        raise UserError(f'--like {path}: its record of how it was generated is damaged ({ascii(error)[:100]}); give '
                        'another image that --text generated') from error


def _checked(text):
    """Return the values of a PNG's text chunks. Raises KeyError or ValueError if one is missing or invalid."""
    record = {name: int(text[name]) for name in ('seed', 'row', 'batch')}
    record['truncation'] = float(text['truncation']) if text['truncation'] else None
    record |= {name: text[name] for name in ('sentence', 'checkpoint', 'weights', 'encoder')}
    parts = re.split(r'[/\\]', record['checkpoint'])
    truncation = record['truncation']
    for name, is_fine in {
            'row': 0 <= record['row'] < record['batch'] <= MOST_ROWS, 'seed': abs(record['seed']) < 2 ** 63,
            'truncation': truncation is None or 0 < truncation < math.inf,
            'sentence': flags.is_valid_text(record['sentence']) and record['sentence'].strip(),
            'checkpoint': all(parts) and not {'.', '..'} & set(parts) and flags.is_valid_text(record['checkpoint'])
                          and ':' not in parts[0],
            'weights': FINGERPRINT.fullmatch(record['weights']), 'encoder': FINGERPRINT.fullmatch(record['encoder']),
            }.items():
        if not is_fine:
            raise ValueError(name)
    return record


def sentences(like, texts, text_file):
    """Return the sentences of `--text` and `--text_file`, or if there are none, that of the record `like`."""
    return flags.read_sentences(texts if texts or text_file or not like else [like['sentence']], text_file)


def checkpoint(like, resumed, *folders):
    """Return the checkpoint that the image with the record `like` was generated with.

    It is looked up in the folder that holds the image's folder, and then in `folders`. Returns None if there is no such
    image or a run to generate with was named (`resumed`). Raises UserError if the checkpoint is in none of the folders.
    """
    if like is None or resumed:
        return None
    folders = [os.path.dirname(os.path.dirname(os.path.abspath(like['file']))), *folders]
    for folder in folders:
        if os.path.isfile(file := os.path.join(folder, *like['checkpoint'].split('/'))):
            return file
    raise UserError(f'--like {like["file"]}: was generated with {like["checkpoint"]}, which is not in {folders[0]}; '
                    'name that run with --checkpoint')


def check(like, shared, is_chosen):
    """Compare what the image with the record `like` was generated with and what is about to generate one (`shared`).

    If the weights or the encoder differ, print that if the checkpoint `is_chosen` on the command line, else raise
    UserError. If `like` is None, do nothing.
    """
    differing = [name for name in ('weights', 'encoder') if like and like[name] != shared[name]]
    if not differing:
        return
    reason = ', '.join(f'{name} {like[name] or "unknown"}, not {shared[name]}' for name in differing)
    if not is_chosen:
        raise UserError(f'--like {like["file"]}: was generated by {shared["checkpoint"]} with {reason}: the run has '
                        'changed since; add --checkpoint to generate a similar image all the same')
    print(f'--like {like["file"]}: was generated with {reason}, so the image will be different')
