"""Read sentences with encoders of other libraries: sentence-transformers and open_clip, which are optional.

Their weights are too large for every run folder. So the file beside the data, and `encoder.pt` in a run folder, only
say which encoder wrote the embeddings: its kind, its name, and a fingerprint of its weights, by which another one is
refused. Nothing is downloaded unless the user asks for it, and files that could execute code are not loaded.
"""
import contextlib
import functools
import hashlib
import json
import logging
import os

import numpy as np
import torch

from common import checkpoint
from common.checkpoint_file import printable
from common.errors import UserError
from data.embedding import embed_unique

TRANSFORMER, CLIP, ARRAY = 'sentence_transformer', 'open_clip', 'npy'
LONGEST_NAME = 1000      # characters
MOST_MODULES = 1 << 20   # bytes of modules.json
ROUTERS = ('.Router', '.Asym')
DIGITS = 16              # hexadecimal, of a fingerprint
UNUSED = ('*.bin', '*.ckpt', '*.h5', '*.msgpack', '*.onnx', '*.ot', '*.pt', '*.pkl', 'onnx/*', 'openvino/*')  # weights


class SentenceEncoder:
    """A sentence encoder of another library, or (kind ARRAY) one that is not available here, only its embeddings.

    `name` is for sentence-transformers a folder or a name on the Hugging Face hub, for open_clip ARCHITECTURE:FILE, and
    for ARRAY what is known about the encoder. `fingerprint` is 'KIND' and 16 hexadecimal digits; if it is None, it is
    that of the weights found. The weights are read when they are needed. Raises UserError then if the library is not
    installed, or the weights are missing, unsafe to load, or do not match the fingerprint.
    """

    def __init__(self, kind, name, fingerprint=None, device='cpu', download=False):
        self.kind, self.name, self.device, self.download = kind, name, device, download
        self.expected = fingerprint

    @property
    def fingerprint(self):
        return self.expected or self._loaded[1]

    def embed(self, sentences, verbose=False):
        """Return float32 [N, D] for a list of N sentences, a NumPy array."""
        return embed_unique(self._loaded[0], sentences, self.width, verbose=verbose)

    @functools.cached_property
    def width(self):
        """Return D, the width of an embedding."""
        return self._loaded[0](['a bird']).shape[1]

    def contents(self):
        """Return what the file of the encoder holds; `named_in` reads it."""
        return {'kind': self.kind, 'name': self.name, 'fingerprint': self.fingerprint}

    @functools.cached_property
    def _loaded(self):
        """Return (function from a list of B sentences to float32 [B, D], fingerprint)."""
        if self.kind == ARRAY:
            raise UserError(f'{self.name}: the embeddings came from this file, and only the encoder that computed them '
                            'could read another sentence; for sentences of your own, train on embeddings of an encoder '
                            'that runs here (data/embed.py --sentence_transformer)')
        network, encode, self.name = LOADERS[self.kind](self.name, self.download)
        network = network.requires_grad_(False).eval().to(self.device)
        found = fingerprint_of(self.kind, network.parameters())
        if self.expected not in (None, found):
            raise UserError(f'{self.name}: is not the sentence encoder that wrote the embeddings, {self.expected}: its '
                            f'weights are those of {found}; give the right one with --encoder')
        return functools.partial(encode, network, self.device), found


def fingerprint_of(kind, arrays):
    """Return what identifies an encoder: its kind, and the start of a SHA-256 of its tensors or arrays in order."""
    digest = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array.detach().cpu().float() if torch.is_tensor(array) else array, np.float32)
        digest.update(repr(array.shape).encode() + array.tobytes())
    return f'{kind} {digest.hexdigest()[:DIGITS]}'


def kind_of(fingerprint):
    """Return the kind of encoder that a fingerprint (or None) is of, or None for an encoder of this repository."""
    kind = (fingerprint or '').partition(' ')[0]
    return kind if kind in (*LOADERS, ARRAY) else None


def named_in(path, device='cpu'):
    """Return the `SentenceEncoder` that a file names, or None if it holds an encoder of this repository.

    Raises UserError if the file is missing or damaged.
    """
    contents = {} if path.endswith('.t7') else checkpoint.load(path, mapped=True)
    if 'kind' not in contents:
        return None
    kind, name, fingerprint = (contents.get(part) for part in ('kind', 'name', 'fingerprint'))
    if kind not in (*LOADERS, ARRAY) or not all(map(_is_name, (name, fingerprint))):
        raise UserError(f'{path}: names no sentence encoder that is known here, but {printable(kind)}; give another')
    return SentenceEncoder(kind, name, fingerprint, device)


def _is_name(text):
    return isinstance(text, str) and text.isprintable() and 0 < len(text) <= LONGEST_NAME


def given(place, device='cpu'):
    """Return the `SentenceEncoder` for a folder of sentence-transformers or ARCHITECTURE:FILE of open_clip, or None."""
    if os.path.isfile(os.path.join(place, 'modules.json')):
        return SentenceEncoder(TRANSFORMER, place, device=device)
    if not os.path.exists(place) and os.path.isfile(place.partition(':')[2]):
        return SentenceEncoder(CLIP, place, device=device)
    return None


def _load_transformer(name, download):
    """Return (SentenceTransformer, how it encodes, its name in full) for a folder or a name on the hub."""
    with _converted_errors(name, 'sentence-transformers', download):
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        folder = os.path.abspath(name) if os.path.isdir(name) else _from_hub(name, download)
        _check_modules(name, folder)
        network = SentenceTransformer(folder, device='cpu', local_files_only=True,
                                      model_kwargs={'use_safetensors': True})
    return network, _encode_transformer, folder if os.path.isdir(name) else name


def _encode_transformer(network, device, sentences):
    rows = network.encode(sentences, device=str(device), convert_to_numpy=True, show_progress_bar=False)
    return rows.astype(np.float32)


def _from_hub(name, download):
    """Return the folder of a model in the cache of Hugging Face, downloaded if it may be. Raises UserError."""
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(name if '/' in name else f'sentence-transformers/{name}',
                                 local_files_only=not download, ignore_patterns=UNUSED)
    except Exception as error:  # it has many kinds
        advice = 'check its name' if download else 'give its folder, or let data/embed.py download it with --download'
        raise UserError(f'{name}: is neither a folder nor in the cache of Hugging Face; {advice}') from error


def _check_modules(name, folder):
    """Raise UserError if modules.json may name a class outside sentence-transformers, whose code would be executed."""
    with open(os.path.join(folder, 'modules.json'), encoding='utf-8') as file:
        modules = json.loads(file.read(MOST_MODULES))
    for module in modules:
        # A router names more classes, in a file of its own.
        if not str(module['type']).startswith('sentence_transformers.') or str(module['type']).endswith(ROUTERS):
            raise UserError(f'{name}: needs the code of {printable(module["type"])}, which is not executed here; give '
                            'a model that sentence-transformers reads by itself')


def _load_clip(name, download):
    """Return (open_clip's network, how it encodes, its name in full) for ARCHITECTURE:FILE, or ARCHITECTURE:TAG."""
    architecture, _, weights = name.partition(':')
    with _converted_errors(name, 'open_clip_torch', download):
        import open_clip
        if not os.path.isfile(weights) and not (weights and download):
            raise UserError(f'{name}: give ARCHITECTURE:FILE, a file of weights, or ARCHITECTURE:TAG with --download')
        if not os.path.isfile(weights):
            weights = open_clip.download_pretrained(open_clip.get_pretrained_cfg(architecture, weights))
        logging.disable(logging.WARNING)  # that the weights are random: they are loaded below
        try:
            network, tokenize = open_clip.create_model(architecture), open_clip.get_tokenizer(architecture)
        finally:
            logging.disable(logging.NOTSET)
        if weights.endswith('.safetensors'):
            from safetensors.torch import load_file
            contents = load_file(weights)
        else:
            contents = checkpoint.load(weights)
        checkpoint.load_weights(network, contents.get('state_dict', contents), weights)
    network.tokenize = tokenize
    return network, _encode_clip, f'{architecture}:{os.path.abspath(weights)}'


@torch.no_grad()
def _encode_clip(network, device, sentences):
    return network.encode_text(network.tokenize(sentences).to(device), normalize=True).float().cpu().numpy()


LOADERS = {TRANSFORMER: _load_transformer, CLIP: _load_clip}


@contextlib.contextmanager
def _converted_errors(name, package, download):
    """Raise UserError in place of any error of the block, which reads the model `name` with the library `package`."""
    if not download:  # read when the libraries are imported
        os.environ.update(HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1')
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f'{error.name or package} is not installed; the encoder {name} needs: pip install {package}'
                        ) from error
    except Exception as error:  # these libraries raise errors of any kind
        reason = ' '.join(str(error).split())[:200] or type(error).__name__
        raise UserError(f'{name}: cannot be read as a model of {package} ({printable(reason)})') from error
