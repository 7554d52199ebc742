"""Training and evaluation of the sentence encoder: deep structured joint embedding (chapter: zero-shot learning)."""
import hashlib
import os

import numpy as np
import torch
from tqdm import tqdm

from char_cnn_rnn import torch7
from char_cnn_rnn.encoder import EMBED_DIM, VARIANTS, CharCnnRnn, init_weights, one_hot, sje_loss
from char_cnn_rnn.image_encoder import image_side
from common import checkpoint
from common.checkpoint_file import printable
from common.errors import UserError
from common.progress import new_progress
from common.training_run import TrainingRun
from data import layout

DECAY = 0.98  # of the learning rate, every epoch
TOP = 50      # pictures that a class's description retrieves


class ClassBatches:
    """Batches in which every class is as frequent as any other; iterating draws an epoch from PyTorch's generator.

    Of every item, first the class is drawn, then one of its photographs, then one of that photograph's captions.
    Classes come in shuffled rounds, so no class is twice in a batch where there are enough of them, as in the authors'
    code.
    """

    def __init__(self, index, photographs, batch_size):
        self.index, self.photographs, self.batch_size = index, photographs, batch_size
        classes = sorted(set(index.classes))
        self.photos_of = [[i for i, name in enumerate(index.classes) if name == one] for one in classes]
        self.captions_of = [[] for _ in index.names]
        for caption, photo in enumerate(index.photo_of):
            self.captions_of[photo].append(caption)

    def __len__(self):
        return max(1, len(self.index.names) // self.batch_size) if self.index.names else 0

    def __iter__(self):
        for _ in range(len(self)):
            rounds = -(-self.batch_size // len(self.photos_of))
            classes = torch.cat([torch.randperm(len(self.photos_of)) for _ in range(rounds)])[:self.batch_size]
            photos = [_any(self.photos_of[one]) for one in classes.tolist()]
            captions = [_any(self.captions_of[photo]) for photo in photos]
            yield {'right_images': self.photographs[photos], 'class': classes,
                   'txt': [self.index.captions[caption] for caption in captions]}


def _any(items):
    return items[int(torch.randint(len(items), ()))]


class Model:
    """The two sides of the joint embedding and their optimizer.

    `data_loader` yields dicts with `right_images` (what the image side of `image_encoder` reads: features or pictures),
    `txt` (as many sentences) and, where a class can be in a batch twice, `class` (integers).
    """

    def __init__(self, name, device, data_loader, variant='birds_icml', image_encoder='efficientnet_lite0'):
        self.name, self.device, self.data_loader = name, torch.device(device), data_loader
        self.image_encoder = image_encoder
        self.encoder = CharCnnRnn(variant).to(self.device)
        self.image_side = image_side(image_encoder).to(self.device)
        init_weights(self.encoder)
        if image_encoder != 'scratch':
            init_weights(self.image_side)
        self.optim = None
        self.progress = new_progress()
        self.options, self.data, self.keep = {}, {}, checkpoint.KEEP

    def create_optim(self, lr):
        """RMSprop for both sides; the learning rate falls to 0.98 of itself every epoch."""
        self.lr = lr
        self.optim = torch.optim.RMSprop([*self.encoder.parameters(), *self.image_side.parameters()], lr=lr)

    def train_step(self, batch):
        """One step of both sides. Returns `loss` and `accuracy`, the share of pictures that find their sentence."""
        images, letters = batch['right_images'].to(self.device), one_hot(batch['txt']).to(self.device)
        classes = batch['class'].to(self.device) if 'class' in batch else None
        text_features, image_features = self.encoder(letters), self.image_side(images)

        # Symmetric: a picture should score highest with its own sentence, and a sentence with its own picture.
        loss = (sje_loss(text_features, image_features, classes)
                + sje_loss(image_features, text_features, classes))
        self.optim.zero_grad()
        loss.backward()
        self.optim.step()

        best = (image_features.detach() @ text_features.detach().T).argmax(dim=1)
        accuracy = (best == torch.arange(len(best), device=self.device)).float().mean()
        return {'loss': loss.detach(), 'accuracy': accuracy}

    def train(self, epochs, log_interval=100, out_dir='', verbose=True):
        """Train until `epochs` epochs are done, including those of a loaded checkpoint.

        Logs, checkpoints and interruptions are the business of `common.training_run.TrainingRun`.
        """
        if self.optim is None:
            raise UserError('call create_optim(lr) before train()')
        self.encoder.train()
        self.image_side.train()
        with TrainingRun(self, epochs, log_interval, out_dir, verbose) as run:
            for epoch in run.epochs():
                self.decay_lr(epoch)
                for batch in run.batches():
                    losses = self.train_step(batch)
                    run.log(losses)

    def decay_lr(self, epoch):
        """Set the learning rate of an epoch: 0.98 of itself for every epoch before it."""
        self.optim.param_groups[0]['lr'] = self.lr * DECAY ** epoch

    @torch.no_grad()
    def embed_photographs(self, photographs, batch_size=256):
        """What `image_encoder.load_photographs` gives, N rows -> float32 tensor [N, 1024] on the CPU."""
        self.image_side.eval()
        rows = [self.image_side(rows.to(self.device)).float().cpu() for rows in photographs.split(batch_size)]
        return torch.cat(rows)

    def eval(self, index, photographs, verbose=True):
        """Zero-shot classification and retrieval on the classes of a split (paper, section 5.2 and 5.3).

        A class is described by the mean embedding of its captions. `top1`: the share of photographs that score highest
        with their own class, averaged over classes; `ap50`: the share of its own class among the 50 best photographs
        of a class, averaged over classes. `chance_*` is what guessing would reach. Returns a dict of floats.
        """
        names = sorted(set(index.classes))
        label = torch.tensor([names.index(name) for name in index.classes])
        embeddings = torch.from_numpy(embed_captions(self.encoder, index.captions, verbose=verbose))
        class_of_caption = label[torch.tensor(index.photo_of)]
        described = torch.stack([embeddings[class_of_caption == i].mean(0) for i in range(len(names))])
        scores = described @ self.embed_photographs(photographs).T            # [classes, photographs]
        right = scores.argmax(0) == label
        nearest = scores.argsort(dim=1, descending=True)[:, :TOP]
        own = torch.arange(len(names))[:, None] == label
        return {
            'top1': torch.stack([right[row].float().mean() for row in own]).mean().item(),
            'chance_top1': 1 / len(names),
            'ap50': own.gather(1, nearest).float().mean().item(),
            'chance_ap50': 1 / len(names),
        }

    def save_to(self, path='', name=None, verbose=True):
        """Write both sides, optimizer and progress to `path/NAME.pt`, whole or not at all. Returns the file."""
        return checkpoint.save_model(self, self._parts(), path, name, verbose, variant=self.encoder.variant,
                                     image_encoder=self.image_encoder)

    def _parts(self):
        return {'encoder': self.encoder, 'image_side': self.image_side, 'optim': self.optim}

    def load_from(self, path='', name=None, verbose=True):
        """Read what `save_to` wrote; `path` is the file or its folder.

        With an optimizer already made (`create_optim`), its state and the progress are read too. In place of a damaged
        NAME.pt in a folder, what was kept from before it is read. Raises UserError where the file is missing, damaged,
        refused, or of another variant or image encoder.
        """
        file = path if os.path.isfile(path) else checkpoint.newest(os.path.join(path, f'{name or self.name}.pt'))
        contents = checkpoint.load(file)
        if not contents.keys() >= {'encoder', 'image_side'}:
            raise UserError(f'{file}: has no image side, so it is no checkpoint of this training')
        for what, ours in (('variant', self.encoder.variant), ('image_encoder', self.image_encoder)):
            theirs = printable(contents.get(what)).strip('\'"')
            if theirs != ours:
                raise UserError(f'{file}: was trained with --{what} {theirs}, not {ours}')
        checkpoint.load_model(self, self._parts(), contents, file)
        if verbose:
            print(f'loaded {file}')


def load_encoder(path, device='cpu'):
    """A `CharCnnRnn` in evaluation mode from a checkpoint of ours, a plain state dict, or the authors' Torch7 file.

    Raises UserError where the file is missing, damaged, refused or holds no sentence encoder.
    """
    contents = torch7.read_encoder(path) if path.endswith('.t7') else checkpoint.load(path)
    state_dict = checkpoint.without_module(contents.get('encoder', contents), path)
    variant = contents['variant'] if 'variant' in contents else _variant_of(state_dict, path)
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise UserError(f'{path}: its encoder is of an unknown variant, {printable(variant)}')
    with torch.random.fork_rng(devices=[]):  # first weights are drawn, only to be replaced: no run should notice
        encoder = CharCnnRnn(variant)
    checkpoint.load_weights(encoder, state_dict, path)
    return encoder.to(device).eval()


def fingerprint(encoder):
    """16 hexadecimal digits that say which encoder this is: of the SHA-256 of its weights."""
    digest = hashlib.sha256(encoder.variant.encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + value.cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_encoder(encoder, hdf5_file):
    """Put the encoder beside the HDF5 file that holds its embeddings, where `--text` looks for it. Returns its file."""
    beside = layout.encoder_beside(hdf5_file)
    checkpoint.save(beside, {'variant': encoder.variant, 'encoder': encoder.state_dict()})
    return beside


def _variant_of(state_dict, path):
    """The variant that has weights of these names and shapes."""
    shapes = {key: tuple(value.shape) for key, value in state_dict.items() if torch.is_tensor(value)}
    if 'conv3.weight' not in shapes:
        raise UserError(f'{path}: holds no sentence encoder (no weights named conv3.weight); give '
                        'a checkpoint of char_cnn_rnn/main.py, the encoder.pt of a run, or the published FILE.t7')
    if 'rnn.i2h_update.weight' in shapes:
        return 'birds_icml'
    return 'birds_cvpr' if shapes['conv3.weight'][:1] == (256,) else 'flowers_icml'


@torch.no_grad()
def embed_captions(encoder, captions, batch_size=256, verbose=True):
    """Sentences (a list of N strings) to float32 numpy [N, 1024]; a sentence that comes often is read once."""
    device = next(encoder.parameters()).device
    todo, rows = sorted(dict.fromkeys(captions), key=len), []  # a batch is as long as its longest
    encoder.eval()
    for start in tqdm(range(0, len(todo), batch_size), desc='captions', unit=' batches', leave=False,
                      disable=None if verbose else True):
        rows.append(encoder(one_hot(todo[start:start + batch_size]).to(device)).float().cpu().numpy())
    if not rows:
        return np.empty((0, EMBED_DIM), np.float32)
    row_of = {caption: row for row, caption in enumerate(todo)}
    return np.concatenate(rows)[[row_of[caption] for caption in captions]]
