"""Read sentences for a run, and find the real captions and photographs that are nearest to them."""
import functools
import os

from char_cnn_rnn import reading
from common.errors import UserError
from common.flags import ROOT
from data import layout
from data.cropped_dataset import CroppedDataset
from data.pictures import BadPicture, read_picture
from evaluation.trained_runs import TrainedRun


class BrowsedRun(TrainedRun):
    """A `TrainedRun` with the encoder that reads sentences for it, and the captions that it was trained on.

    `name` is how the run is called on a page. `remark` says that the encoder may be another one, '' if it is known to
    be right. `captions` is the data set /train, or None; `no_captions` then says why. `encoder_file` is as
    `--encoder`. Raises UserError as `TrainedRun` does, and if no encoder is found, or only another one.
    """

    def __init__(self, path, device, encoder_file=None):
        super().__init__(path, device)
        self.name = min(os.path.relpath(self.folder, ROOT), os.path.abspath(self.folder), key=len)
        encoder, self.encoder, is_known = reading.find_encoder(self.file, self.model.data, encoder_file,
                                                               self.hdf5_file, device)
        reading.checked_name(encoder, self.encoder, self.model.data, self.file, self.embed_dim)
        self.remark = '' if is_known else reading.unknown_encoder(self.file, encoder)
        self.captions, self.no_captions = None, ''
        try:
            captions = _training_captions(self.hdf5_file)
            self.check(captions)
            self.captions = captions
            changed = reading.other_data(self.model.data, captions.file, self.file)
            self.remark = '; '.join(filter(None, (self.remark, changed)))
        except UserError as error:
            self.no_captions = str(error)

    def embed(self, sentence):
        """Return the embedding float32 [1, embed_dim] of a sentence."""
        return reading.embed(self.encoder, [sentence])

    def nearest(self, embedding, count):
        """Return the `count` photographs of /train with the captions nearest to an embedding [1, embed_dim].

        They are pairs (caption, PIL image), the nearest caption first, by the cosine of the angle between embeddings.
        Raises UserError if a photograph cannot be read.
        """
        nearness = (self.captions.embeddings @ embedding[0]) / self._lengths
        caption_of = {}  # of each photograph, its nearest caption
        for caption in nearness.argsort(descending=True).tolist():
            caption_of.setdefault(int(self.captions.photo_of[caption]), caption)
            if len(caption_of) == count:
                break
        return [(self.captions.captions[caption], self._photograph(photo)) for photo, caption in caption_of.items()]

    @functools.cached_property
    def _lengths(self):
        return self.captions.embeddings.norm(dim=1).clamp(min=1e-12)

    def _photograph(self, photo):
        jpeg, = self.captions.jpegs.read([photo])
        try:
            return read_picture(jpeg)
        except BadPicture as error:
            captions = self.captions
            raise layout.cannot_be_decoded(captions.file, captions.split, captions.index.names[photo],
                                           error) from error


@functools.cache
def _training_captions(hdf5_file):
    """Return the data set /train of an HDF5 file, once for all runs. Raises UserError if it is missing or unusable."""
    if os.path.isfile(hdf5_file):
        print(f'reading {hdf5_file}; where it has no cache yet, one is made first ...', flush=True)
    return reading.require_embeddings(CroppedDataset(hdf5_file))
