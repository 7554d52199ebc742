"""Embed sentences for the GANs with the encoder that each GAN was trained with.

The numbers of another encoder mean something else, so a GAN would generate wrong images from them. Therefore a
checkpoint describes the embeddings that it was trained on (`describe`): it holds the fingerprint of their encoder, if
known, and some captions with their embeddings, with which any encoder can be tested. A matching encoder is
used, a different one is refused, and if it is unknown whether an encoder matches, a message is printed. An encoder is a
`CharCnnRnn`, or a `SentenceEncoder` of another library, whose file names it.
"""
import contextlib
import os
import shlex
import shutil

import torch
from tqdm import tqdm

from char_cnn_rnn.build_encoder import embed_captions, fingerprint, load_encoder
from common import run
from common.checkpoint import description, newest
from common.errors import UserError
from common.files import atomic_write
from common.letters import LENGTH, is_readable, unread
from data import layout, sentence_encoders
from data.cache import load_split
from data.sentence_encoders import SentenceEncoder

FEW = 32          # embeddings that are compared before all are
SHOWN = 3         # captions whose embeddings a checkpoint holds
TOLERANCE = 0.01  # relative distance of two embeddings of a sentence that still counts as rounding


def describe(dataset):
    """Return a dict that describes the training data of a GAN, for its checkpoints; {} for images without captions.

    Its keys are `file`; the fingerprints of its `captions`, `pictures`, `embeddings` and `encoder` ('' if unknown);
    and `shown`, some captions, with their embeddings float32 [SHOWN, D] in `shown_embeddings`. For images without
    captions they are only `file` and `pictures`.
    """
    described = {'file': os.path.basename(os.path.abspath(dataset.file)),
                 **{name: value or '' for name, value in dataset.fingerprint.items()}}
    if dataset.embeddings is None:
        return described
    places = torch.linspace(0, len(dataset.captions) - 1, SHOWN).long()
    return described | {'encoder': dataset.encoder or '', 'shown': [dataset.captions[i] for i in places.tolist()],
                        'shown_embeddings': dataset.embeddings[places.to(dataset.embeddings.device)].cpu()}


def require_embeddings(dataset):
    """Return `dataset`. Raises UserError, which says what to run, if it has no valid sentence embeddings."""
    if len(dataset) == 0:
        raise UserError(f'{dataset.file}: /{dataset.split} holds no captions')
    if dataset.embeddings is None:
        wrong = dataset.bad_embeddings or f'/{dataset.split} holds no sentence embeddings yet'
        raise UserError(f'{dataset.file}: {wrong}; write them with: {how_to_embed(dataset.file)}')
    first, rows = dataset.embeddings[0], dataset.embeddings
    if len(rows) > 1 and (rows[:FEW] == first).all() and (rows == first).all():
        print(f'{dataset.file}: all embeddings of /{dataset.split} are the same, so images cannot depend on sentences')
    return dataset


def how_to_embed(path):
    """Return the commands that train a sentence encoder on the HDF5 file `path` and write its embeddings there."""
    name = os.path.splitext(os.path.basename(path))[0]
    where = f'--data_dir {shlex.quote(os.path.dirname(os.path.abspath(path)))} --dataset {shlex.quote(name)}'
    image_encoder = ' --image_encoder color_grid' if name == 'toy_birds' else ''
    main = os.path.join(os.path.dirname(os.path.realpath(__file__)), 'main.py')
    script = shlex.quote(min(os.path.relpath(main), main, key=len))
    return f'python {script} --train {where}{image_encoder} && python {script} --embed {where}'


def load(path, device='cpu'):
    """Load the sentence encoder in a file, or the one that the file names. Raises UserError as `load_encoder` does."""
    return sentence_encoders.named_in(path, device) or load_encoder(path, device)


def embed(encoder, sentences):
    """Return the embeddings [N, D] of N sentences by an encoder of any kind."""
    is_other = isinstance(encoder, SentenceEncoder)
    return torch.from_numpy(encoder.embed(sentences) if is_other else embed_captions(encoder, sentences, verbose=False))


def fingerprint_of(encoder):
    """Return the fingerprint of an encoder of any kind."""
    return encoder.fingerprint if isinstance(encoder, SentenceEncoder) else fingerprint(encoder)


def read(sentences, checkpoint, data, encoder_file, hdf5_file, device, width):
    """Embed N sentences for the model in the file `checkpoint`, trained on `data`.

    `find_encoder` chooses the encoder, and a message names it and the characters that it did not read. Returns
    (embeddings [N, width], fingerprint of the encoder). Raises UserError if no encoder is found, or only encoders that
    did not write the embeddings in `data` or that have another `width`.
    """
    file, encoder, is_known = find_encoder(checkpoint, data, encoder_file, hdf5_file, device)
    if not is_known:
        print(unknown_encoder(checkpoint, file))
    unused = [f'--{name}' for name in ('data_dir', 'dataset') if name in run.GIVEN_FLAGS]
    if {'best_of', 'data_dir'} <= set(run.GIVEN_FLAGS):
        unused = []  # photographs may be read there
    if unused and {'checkpoint', 'resume'} & set(run.GIVEN_FLAGS) and file != layout.encoder_beside(hdf5_file):
        print(f'{" and ".join(unused)}: not used, because the run is named and has its own encoder')
    if not isinstance(encoder, SentenceEncoder):  # others read other letters
        print_unread(sentences)
    # One at a time: in a batch, the rounding of each would depend on the others, and `--like` could not repeat it.
    row_of = {sentence: embed(encoder, [sentence])
              for sentence in tqdm(dict.fromkeys(sentences), 'sentences', leave=False, disable=None, delay=2)}
    name = checked_name(file, encoder, data, checkpoint, width)
    print(f'{checkpoint} generates images for sentences embedded by {name}:')
    return torch.cat([row_of[sentence] for sentence in sentences]), fingerprint_of(encoder)


def checked_name(file, encoder, data, checkpoint, width):
    """Return the name of the encoder in `file`, after a test of what it computes for the model in `checkpoint`.

    Raises UserError if it computes other embeddings for the captions in `data`, or the model reads another `width`.
    """
    is_other = isinstance(encoder, SentenceEncoder)
    name, shown = encoder.name if is_other else file, data.get('shown') if is_other else None
    found = embed(encoder, shown or ['a bird'])
    if shown and not are_same(found, data['shown_embeddings']):
        raise UserError(f'{name}: has the weights of the sentence encoder that {checkpoint} was trained with, but '
                        'computes different embeddings for its captions; use the files, and the version of the '
                        'library, that wrote the embeddings')
    if found.shape[1] != width:
        raise UserError(f'{name}: gives embeddings of {found.shape[1]} numbers, and {checkpoint} reads {width}, '
                        'those of another sentence encoder; give the right one with --encoder')
    return name


def find_encoder(checkpoint, data, encoder_file, hdf5_file, device='cpu'):
    """Return (file, encoder, whether it is known to be the right one) for the model in the file `checkpoint`.

    The encoder is the one in `encoder_file` if given, else the one saved with the run (in the folder of `checkpoint` or
    above, where several runs may share it), else the one beside `hdf5_file`. `data` describes the training data (see
    `describe`). Raises UserError as `read` does.
    """
    beside = os.path.dirname(os.path.abspath(checkpoint))
    kept = [os.path.join(folder, run.ENCODER) for folder in (beside, os.path.dirname(beside))
            if os.path.isfile(os.path.join(folder, run.OPTIONS))]
    given = encoder_file and sentence_encoders.given(encoder_file, device)
    places = [encoder_file] if encoder_file else [
        *kept, os.path.join(beside, run.ENCODER), os.path.join(os.path.dirname(beside), run.ENCODER),
        layout.encoder_beside(hdf5_file)]
    found = [place for place in dict.fromkeys(places) if given or os.path.isfile(place)]
    if encoder_file and not found:
        raise UserError(f'--encoder {encoder_file}: no sentence encoder there; give the encoder.pt of a run, the '
                        'char_cnn_rnn.pt of a run of char_cnn_rnn/main.py, or the published FILE.t7')
    if not found and sentence_encoders.kind_of(data.get('encoder')):
        raise UserError(f'{places[-1]}: no sentence encoder; {checkpoint} was trained with {data["encoder"]}: give it '
                        'with --encoder FOLDER, or for open_clip --encoder ARCHITECTURE:FILE')
    if not found:
        raise UserError(f'{places[-1]}: no sentence encoder; train one with: python char_cnn_rnn/main.py --train, then '
                        'python char_cnn_rnn/main.py --embed; or give the published one with --encoder FILE.t7')
    unknown, data = None, data or _kept_description(kept)
    for place in found:
        encoder = given or load(place, device)
        matches = is_encoder_of(data, encoder)
        if matches:
            return place, encoder, True
        if matches is None and unknown is None:
            unknown = place, encoder, False
    if unknown is None:
        raise UserError(f'{found[0]}: is not the sentence encoder that {checkpoint} was trained with'
                        f'{_named(data)}, and would misread every sentence; give the right one with --encoder')
    return unknown


def unknown_encoder(checkpoint, file):
    """Return the line that says that the encoder in `file` may not be the one `checkpoint` was trained with."""
    return (f'{checkpoint}: does not say which encoder it was trained with; if it was not {file}, '
            'the images will not match the sentences')


def is_encoder_of(data, encoder):
    """Return whether `encoder` wrote the embeddings that `data` describes, or None if that is unknown."""
    if data.get('encoder') and data['encoder'] == fingerprint_of(encoder):
        return True
    if data.get('encoder') and isinstance(encoder, SentenceEncoder):
        return False  # without reading its weights, which may not be on this machine
    if len(data.get('shown_embeddings', ())):
        return are_same(embed(encoder, data['shown']), data['shown_embeddings'])
    return False if data.get('encoder') else None


def are_same(embeddings, others):
    """Return whether two sets of embeddings [N, D] are equal up to rounding, that is, from the same encoder."""
    if embeddings.shape != others.shape:
        return False
    distance, length = (embeddings - others).norm(dim=1), others.norm(dim=1)
    return bool((distance <= TOLERANCE * length.clamp(min=1e-6)).all())


def check_embeddings(data, dataset, checkpoint, width):
    """Check that the embeddings of `dataset` come from the encoder that the model in `checkpoint` was trained with.

    `data` describes its training data, and `width` is that of its embeddings. Raises UserError if they come from
    another encoder; prints a message if that is unknown, and if the data was another when the model was trained.
    """
    has_width = dataset.embed_dim == width
    matches = has_width and _are_of_its_encoder(data, dataset)
    if matches is False:
        why = '' if has_width else f': they have {dataset.embed_dim} numbers, not {width}'
        raise UserError(f'{dataset.file}: its embeddings do not come from the sentence encoder that {checkpoint} was '
                        f'trained with{_named(data)}{why}; write them again with that one ({_how_to_write(data)}), or '
                        'use a model that was trained on these embeddings')
    if matches is None:
        print(f'{checkpoint}: does not say which encoder it was trained with; if the embeddings of {dataset.file} come '
              'from another one, the images will not match the captions')
    print_other_data(data, dataset.file, checkpoint)


def other_data(data, path, checkpoint):
    """Return a line that says that a model was trained on other data than the HDF5 file `path` holds now, or ''."""
    now = load_split(path, 'train').fingerprint if data else {}
    changed = run.changed_parts(data, now, ('captions', 'pictures'))
    return '' if not changed else (
        f'{checkpoint}: was trained on different {" and ".join(changed)} from those in {path} now, perhaps '
        'including some that are now held out')


def print_other_data(data, path, checkpoint):
    """Print the line of `other_data`, if there is one."""
    if changed := other_data(data, path, checkpoint):
        print(changed)


def print_other_encoder(data, dataset, checkpoint):
    """Print a message if a training starts from a model of another encoder's embeddings than those of `dataset`."""
    if _are_of_its_encoder(data, dataset) is False:
        print(f'{checkpoint}: was trained on embeddings of a different sentence encoder from that of {dataset.file}; '
              'what it has learned about sentences will not carry over')


def _are_of_its_encoder(data, dataset):
    """Return whether the embeddings of a data set are of the encoder in the description `data`; None if unknown."""
    if data.get('encoder') and data['encoder'] == dataset.encoder:
        return True
    matches = None
    if data.get('shown'):
        train = load_split(dataset.file, 'train')
        if train.fingerprint['embeddings'] == data.get('embeddings'):
            return True
        matches = _same_where_shown(data, train)
    if matches is None and data.get('encoder') and dataset.encoder:
        matches = False
    return matches


def _same_where_shown(data, split):
    """Return whether the captions in `data` have the same embeddings in a split, or None if the split lacks them."""
    place_of = {caption: place for place, caption in enumerate(split.index.captions)}
    both = [(place_of[caption], row) for row, caption in enumerate(data['shown']) if caption in place_of]
    if not both or split.embeddings is None:
        return None
    places, rows = map(list, zip(*both))
    return are_same(split.embeddings[places], data['shown_embeddings'][rows])


def _kept_description(kept):
    """Return the description for a snapshot, which has none of its own, from the run folder that it is in.

    It is that of the run's checkpoint, or if there is none, of its encoder.
    """
    in_run = next(filter(os.path.isfile, kept), None)
    if in_run is None:
        return {}
    folder, described = os.path.dirname(in_run), {}
    with contextlib.suppress(UserError):  # a damaged run: its snapshots are what is left
        file = newest(os.path.join(folder, f'{run.read_options(folder).get("model")}.pt'))
        described = description(file) if os.path.isfile(file) else {}
    return described or {'encoder': fingerprint_of(load(in_run))}


def _named(data):
    return f' ({data["encoder"]})' if data.get('encoder') else ''


def _how_to_write(data):
    """Return the command that writes the embeddings of the encoder in a description."""
    kind = sentence_encoders.kind_of(data.get('encoder'))
    return f'python data/embed.py NAME --{kind}' if kind else ('python char_cnn_rnn/main.py --embed --encoder '
                                                               'RUN/encoder.pt')


def print_unread_captions(path, captions):
    """Print in how many captions of the HDF5 file `path` the encoder does not read every letter.

    Raises UserError if it reads nothing in all of them, since all their embeddings would be the same.
    """
    if captions and not any(map(is_readable, captions)):
        raise UserError(f'{path}: the encoder cannot read any of the captions, such as {captions[0][:40]!r}; its '
                        'alphabet is English letters, digits and punctuation')
    found = [any(unread(caption)) for caption in captions]
    if any(found):
        print(f'{path}: the encoder cannot read {sum(found):,} of {len(found):,} captions in full, such as '
              f'{captions[found.index(True)][:40]!r}')


def print_unread(sentences):
    """Print which characters of the sentences the encoder cannot read, and which are beyond its length."""
    for line in unread_lines(sentences):
        print(line)


def unread_lines(sentences):
    """Yield the lines that `print_unread` prints."""
    for sentence in sentences:
        letters, surplus = unread(sentence)
        if letters:
            shown = (letter if letter.isprintable() and not letter.isspace() else f'U+{ord(letter):04X}'
                     for letter in sorted(letters))
            yield (f'"{sentence}": the encoder cannot read {" ".join(shown)}; it reads '
                   f'"{"".join(letter for letter in sentence.lower() if letter not in letters)[:LENGTH]}"')
        if surplus:
            yield f'"{sentence}": the encoder reads only the first {LENGTH} characters, not the {surplus} after them'


def bytes_to_keep(dataset, run_dir):
    """Return the size of the encoder that `keep_encoder` would copy into `run_dir`; 0 if there is none to copy."""
    beside, kept = layout.encoder_beside(dataset.file), os.path.join(run_dir, run.ENCODER)
    return os.path.getsize(beside) if os.path.isfile(beside) and not os.path.isfile(kept) else 0


def keep_encoder(dataset, run_dir):
    """Copy the sentence encoder beside the data into the run folder, so that the run can generate without the data.

    Print a message instead if that encoder did not write the embeddings (because they have been replaced by published
    ones, for example). An encoder that the run already has stays, unless it is known to be another one.
    """
    beside, kept = layout.encoder_beside(dataset.file), os.path.join(run_dir, run.ENCODER)
    data = describe(dataset)
    if os.path.isfile(kept) and is_encoder_of(data, load(kept)) is not False or not os.path.isfile(beside):
        return
    if is_encoder_of(data, load(beside)):
        with open(beside, 'rb') as encoder, atomic_write(kept, follow_links=False) as copy:
            shutil.copyfileobj(encoder, copy)
    else:
        print(f'{beside}: did not write the embeddings of {dataset.file}, so no encoder is saved with this run; '
              'to generate images for sentences, give the right one with --encoder')
