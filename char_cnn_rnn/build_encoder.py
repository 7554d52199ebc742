"""Train and evaluate the sentence encoder with a structured joint embedding (section "Zero-shot learning")."""
import hashlib
import os

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
from data import embedding

DECAY = 0.98  # of the learning rate, per epoch
TOP = 50      # photographs that the description of a class retrieves


class ClassBatches:
    """Yield batches in which all classes are equally frequent, sampled with PyTorch's random generator.

    For each item, a class is sampled, then one of its photographs, then one of that photograph's captions. Classes come
    in shuffled rounds: as in the authors' code, no class occurs twice in a batch unless there are too few of them.
    """

    def __init__(self, index, photographs, batch_size):
        self.index, self.photographs, self.batch_size = index, photographs, batch_size
        classes = sorted(set(index.classes))
        place = {name: i for i, name in enumerate(classes)}
        self.photos_of = [[] for _ in classes]
        for photo, name in enumerate(index.classes):
            self.photos_of[place[name]].append(photo)
        self.captions_of = [[] for _ in index.names]
        for caption, photo in enumerate(index.photo_of):
            self.captions_of[photo].append(caption)

    def __len__(self):
        return max(1, len(self.index.names) // self.batch_size) if self.index.names else 0

    def __iter__(self):
        for _ in range(len(self)):
            rounds = -(-self.batch_size // len(self.photos_of))
            classes = torch.cat([torch.randperm(len(self.photos_of)) for _ in range(rounds)])[:self.batch_size]
            photos = [_sample_one(self.photos_of[one]) for one in classes.tolist()]
            captions = [_sample_one(self.captions_of[photo]) for photo in photos]
            yield {'right_images': self.photographs[photos], 'class': classes,
                   'txt': [self.index.captions[caption] for caption in captions]}


def _sample_one(items):
    """Return a random item, sampled with PyTorch's generator."""
    return items[int(torch.randint(len(items), ()))]


class Model:
    """Train the sentence encoder together with the image side of the joint embedding, and evaluate them.

    `data_loader` yields dicts with `right_images` (what `image_side(image_encoder)` reads: features or images), `txt`
    (one sentence for each) and, if a class can occur twice in a batch, `class` (integers [B]).
    """

    def __init__(self, name, device, data_loader, variant='birds_icml', image_encoder='efficientnet_lite0'):
        self.name, self.device, self.data_loader = name, torch.device(device), data_loader
        self.image_encoder = image_encoder
        self.encoder = CharCnnRnn(variant).to(self.device)
        self.image_side = image_side(image_encoder).to(self.device)
        init_weights(self.encoder)
        if image_encoder != 'scratch':
            init_weights(self.image_side)
        if image_encoder == 'color_grid' and data_loader is not None:
            self.image_side.fit(data_loader.photographs)
        self.optim = None
        self.progress = new_progress()
        self.options, self.data, self.keep = {}, {}, checkpoint.KEEP

    def create_optim(self, lr):
        """Create an RMSprop optimizer for both sides; `decay_lr` lowers its learning rate every epoch."""
        self.lr = lr
        self.optim = torch.optim.RMSprop([*self.encoder.parameters(), *self.image_side.parameters()], lr=lr)

    def train_step(self, batch):
        """Train both sides for one step.

        Returns a dict of scalar tensors: `loss` and `accuracy`, the share of images that score their own sentence best.
        """
        images, letters = batch['right_images'].to(self.device), one_hot(batch['txt']).to(self.device)
        classes = batch['class'].to(self.device) if 'class' in batch else None
        text_features, image_features = self.encoder(letters), self.image_side(images)

        # An image should score its own sentence highest, and a sentence its own image.
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

        `common.training_run.TrainingRun` writes logs and checkpoints, and handles interruptions.
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
        """Set the learning rate of an epoch: lr * 0.98^epoch."""
        self.optim.param_groups[0]['lr'] = self.lr * DECAY ** epoch

    @torch.no_grad()
    def embed_photographs(self, photographs, batch_size=256):
        """Embed the N rows of `image_encoder.load_photographs`; returns float32 [N, 1024] on the CPU."""
        self.image_side.eval()
        parts = tqdm(photographs.split(batch_size), 'photographs', unit=' batches', leave=False, disable=None, delay=2)
        return torch.cat([self.image_side(rows.to(self.device)).float().cpu() for rows in parts])

    def eval(self, index, photographs, verbose=True):
        """Measure zero-shot classification and retrieval on the classes of a split (paper, sections 5.2 and 5.3).

        The description of a class is the mean embedding of its captions. Returns a dict of floats, averaged over
        classes: `top1`, the share of photographs that score their own class highest; `ap50`, the share of the right
        class among the 50 photographs that score highest with a description; `chance_*`, what guessing would reach.
        """
        names = sorted(set(index.classes))
        place = {name: i for i, name in enumerate(names)}
        label = torch.tensor([place[name] for name in index.classes])
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
        """Save both sides, optimizer and progress to `path/NAME.pt` in one atomic write, and return the file."""
        return checkpoint.save_model(self, self._parts(), path, name, verbose, variant=self.encoder.variant,
                                     image_encoder=self.image_encoder)

    def _parts(self):
        return {'encoder': self.encoder, 'image_side': self.image_side, 'optim': self.optim}

    def load_from(self, path='', name=None, verbose=True):
        """Load a checkpoint that `save_to` wrote; `path` is the file or its folder.

        If `create_optim` has been called, the state of the optimizer and the progress are loaded, too. If NAME.pt in a
        folder is damaged, the checkpoint before it is loaded. Raises UserError if the file is missing, damaged, unsafe
        to load, or of another variant or image encoder.
        """
        file = path if os.path.isfile(path) else checkpoint.newest(os.path.join(path, f'{name or self.name}.pt'))
        contents = checkpoint.load(file)
        if not contents.keys() >= {'encoder', 'image_side'}:
            raise UserError(f'{file}: has no image side, so it is not a checkpoint of this training; give one that '
                            'char_cnn_rnn/main.py --train wrote')
        for what, ours in (('variant', self.encoder.variant), ('image_encoder', self.image_encoder)):
            theirs = printable(contents.get(what)).strip('\'"')
            if theirs != ours:
                raise UserError(f'{file}: was trained with --{what} {theirs}, not {ours}; use the same --{what}')
        checkpoint.load_model(self, self._parts(), contents, file)
        if verbose:
            print(f'loaded {file}')


def load_encoder(path, device='cpu'):
    """Load a `CharCnnRnn`, in evaluation mode, from our checkpoint, a plain state dict, or the authors' Torch7 file.

    Raises UserError if the file is missing, damaged, unsafe to load, or holds no sentence encoder.
    """
    contents = torch7.read_encoder(path) if path.endswith('.t7') else checkpoint.load(path)
    state_dict = checkpoint.without_module(contents.get('encoder', contents), path)
    variant = contents['variant'] if 'variant' in contents else _variant_of(state_dict, path)
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise UserError(f'{path}: unknown variant of the encoder, {printable(variant)}; give one of '
                        f'{", ".join(VARIANTS)}')
    with torch.random.fork_rng(devices=[]):  # initial weights must not change a run's random numbers
        encoder = CharCnnRnn(variant)
    checkpoint.load_weights(encoder, state_dict, path)
    return encoder.to(device).eval()


def fingerprint(encoder):
    """Return 16 hexadecimal digits that identify an encoder: the start of a SHA-256 of its variant and weights."""
    digest = hashlib.sha256(encoder.variant.encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + value.cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_encoder(encoder, hdf5_file):
    """Save the encoder beside the HDF5 file with its embeddings, where `--text` looks for it. Returns its file."""
    return embedding.save_encoder(hdf5_file, {'variant': encoder.variant, 'encoder': encoder.state_dict()})


def _variant_of(state_dict, path):
    """Return the variant whose weights have these names and shapes. Raises UserError if there is none."""
    shapes = {key: tuple(value.shape) for key, value in state_dict.items() if torch.is_tensor(value)}
    if 'conv3.weight' not in shapes:
        raise UserError(f'{path}: holds no sentence encoder (no weights named conv3.weight); give '
                        'a checkpoint of char_cnn_rnn/main.py, the encoder.pt of a run, or the published FILE.t7')
    if 'rnn.i2h_update.weight' in shapes:
        return 'birds_icml'
    return 'birds_cvpr' if shapes['conv3.weight'][:1] == (256,) else 'flowers_icml'


@torch.no_grad()
def embed_captions(encoder, captions, batch_size=256, verbose=True):
    """Embed a list of N sentences as a float32 NumPy array [N, 1024]; repeated sentences are computed once."""
    device = next(encoder.parameters()).device
    encoder.eval()
    return embedding.embed_unique(lambda some: encoder(one_hot(some).to(device)).float().cpu().numpy(), captions,
                                  EMBED_DIM, batch_size, verbose)
