"""Read the run of any of the three GANs: its generator, and its data prepared as that section prepares it."""
import functools
import os

import torch

import stackgan_v1.build_gan
import stackgan_v1.checkpoints
import stackgan_v2.build_gan
import stackgan_v2.checkpoints
import text2image.build_gan
import text2image.checkpoints
from char_cnn_rnn import reading
from common import checkpoint, realism, run, speed
from common.errors import UserError
from common.sampling import in_batches
from data import layout
from data.cropped_dataset import CroppedDataset
from data.multiscale_dataset import MultiscaleDataset
from data.txt2image_dataset import Text2ImageDataset


class TrainedRun:
    """A run of text2image, StackGAN or StackGAN++ that was trained with sentences.

    `path` is the run folder or a checkpoint in it, `file` the checkpoint, `saved_ns` when it was saved, `folder` its
    run folder, `section` the name of its GAN, `step` its number of training steps, `epoch` that of its epochs,
    `learned_from` the beginnings of its data's fingerprints,
    `embed_dim` the width of its embeddings, `size` that of its largest images in pixels, and `prepared` how its
    photographs are prepared. With `best_of`, `generate` returns the most realistic of so many images (see
    `common.realism`). Raises UserError if it is no such run, or its checkpoint cannot be read.
    """

    def __init__(self, path, device, best_of=1):
        self.folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
        if not run.has_options(self.folder):
            raise UserError(f'{path}: is not a run folder (it has no {run.OPTIONS}); give the run folder of '
                            'a trained GAN')
        self.options = run.read_options(self.folder)
        flag = next((flag for flag in SECTIONS if flag in self.options), None)
        if flag is None or not isinstance(self.options.get('model'), str):
            raise UserError(f'{path}: is not a run of text2image, stackgan_v1 or stackgan_v2; give one')
        self.section, load, find, self._dataset, preparation, self.at_once = SECTIONS[flag]
        self.hdf5_file = run.dataset_of(self.options, self.folder)
        name = self.options['model']
        self.file = run.existing(path, name, find)
        self.saved_ns = os.stat(self.file).st_mtime_ns
        self.model, *_ = load(self.file, name, device)
        contents = checkpoint.load(self.file, mapped=True)
        self.step, self.epoch = (checkpoint.count_in(contents, self.file, what) for what in ('step', 'epoch'))
        if not getattr(self.model.netG, 'conditional', True):
            raise UserError(f'{self.file}: was trained without sentences; give a run whose generator reads them')
        prints = {part: str(self.model.data.get(part) or '') for part in ('captions', 'pictures', 'embeddings')}
        self.learned_from = {part: fingerprint[:8] or 'not recorded' for part, fingerprint in prints.items()}
        speed.prepare_evaluation(self.model.netG, device)
        self.embed_dim = getattr(self.model.netG, 'embed_dim', None) or self.model.netG.text_dim
        self.size = self.all_sizes(torch.zeros(1, self.embed_dim))[-1].shape[-1]
        self.prepared = f'{preparation}_{self.size}'
        self.best_of, self._device = best_of, device
        if best_of > 1:
            self.generate(torch.zeros(1, self.embed_dim))  # fails now if what the choice needs is missing

    def generate(self, embeddings, seed=0, truncation=None):
        """Generate the largest images, [B, 3, size, size] in [-1, 1] on the CPU, for embeddings [B, embed_dim]."""
        return self.all_sizes(embeddings, seed, truncation, self.best_of)[-1]

    def all_sizes(self, embeddings, seed=0, truncation=None, best_of=1):
        """Generate the images of all branches or stages, a list of what `generate` returns, small to large.

        They are those of the section's command, which generates `self.at_once` images in a batch.
        """
        def generate(*batch):
            images = self.model.generate(*batch)
            return [of_size.float().cpu() for of_size in ([images] if torch.is_tensor(images) else images)]

        batches = in_batches(generate, embeddings.repeat_interleave(best_of, 0), self.at_once, seed, truncation)
        if best_of > 1:
            pairs = ((images, [None] * len(images[0])) for images in batches)
            batches = (images for images, _ in realism.keep_best(pairs, best_of, self.realism.distances))
        return [torch.cat(of_size) for of_size in zip(*batches)]

    @functools.cached_property
    def realism(self):
        """The `common.realism.Realism` of the run's photographs. Raises UserError if it has none."""
        return realism.Realism(self.photographs()[0], self._device)

    def photographs(self):
        """Return (features of the run's photographs, whether they are) as `common.realism.features_of_run` does."""
        return realism.features_of_run(self.file, self.model, self.prepared, lambda path: self._dataset(
            path, layout.SPLITS.index('train'), self.size), self._device, self.hdf5_file)

    def dataset(self, split):
        """Return the data set of a split. Raises UserError if the run's data is missing or has no embeddings."""
        return reading.require_embeddings(self._dataset(self.hdf5_file, layout.SPLITS.index(split), self.size))

    def check(self, dataset):
        """Raise UserError if the embeddings of a data set are not of the encoder that the run was trained with."""
        reading.check_embeddings(self.model.data, dataset, self.file, self.embed_dim)


# An option that only this section has: (its name, how to load a checkpoint, how to find it, how to load its data, how
# that prepares photographs, how many images its command generates at once).
SECTIONS = {
    'l1_coef': ('text2image', text2image.build_gan.load_generator, text2image.checkpoints.find,
                lambda file, split, size: Text2ImageDataset(file, split=split, drawn=False), 'whole', 256),
    'stage': ('stackgan_v1', stackgan_v1.build_gan.load_generator, stackgan_v1.checkpoints.find,
              CroppedDataset, 'crop', 64),
    'branches': ('stackgan_v2', stackgan_v2.build_gan.load_generator, stackgan_v2.checkpoints.find,
                 lambda file, split, size: MultiscaleDataset(file, split, branches=size.bit_length() - 6), 'crop', 24),
}
