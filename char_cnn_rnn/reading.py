"""Sentences for the GANs: which encoder reads them, and what it makes of them."""
import os
import shutil

import torch

from char_cnn_rnn.build_encoder import embed_captions, load_encoder
from common import flags, run
from common.errors import UserError
from data import layout


def embed(encoder_file, sentences, device='cpu'):
    """The embeddings [N, 1024] of a list of N sentences. Raises UserError where the file holds no encoder."""
    return torch.from_numpy(embed_captions(load_encoder(encoder_file, device), sentences, verbose=False))


def read(options, sentences, checkpoint, device):
    """The embeddings [N, 1024] of N sentences that the model in `checkpoint` draws, from the encoder of its run.

    Says so. Raises UserError as `find_encoder` and `embed` do.
    """
    encoder = find_encoder(options, checkpoint)
    embeddings = embed(encoder, sentences, device)
    print(f'{checkpoint} draws, with the sentences read by {encoder}:')
    return embeddings


def keep_encoder(dataset, run_dir):
    """Copy the sentence encoder beside the data into the run, so that the run can draw sentences without the data.

    One that did not write the embeddings (they have been replaced by published ones, say) would misread every sentence.
    """
    beside = layout.encoder_beside(dataset.file)
    if not os.path.isfile(beside):
        return
    if torch.allclose(embed(beside, dataset.captions[:1]), dataset.embeddings[:1].cpu(), atol=1e-3):
        shutil.copyfile(beside, os.path.join(run_dir, run.ENCODER))
    else:
        print(f'{beside}: is not what wrote the embeddings of {dataset.file}, so this run keeps no encoder; '
              'to draw sentences give the right one with --encoder')


def find_encoder(options, checkpoint):
    """`--encoder`, or the encoder kept with the run (`checkpoint` is in it, or in its Model/), or that of the data."""
    beside = os.path.dirname(os.path.abspath(checkpoint))
    places = [options.encoder] if options.encoder else [
        os.path.join(beside, run.ENCODER), os.path.join(os.path.dirname(beside), run.ENCODER),
        layout.encoder_beside(flags.dataset_file(options))]
    for place in places:
        if os.path.isfile(place):
            return place
    raise UserError(f'{places[-1]}: no sentence encoder; train one with: python char_cnn_rnn/main.py --train, then '
                    'python char_cnn_rnn/main.py --embed; or give the published one with --encoder FILE.t7')
