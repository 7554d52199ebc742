"""Write what a run of a GAN needs to generate images, in 16 bits: a fifth of a checkpoint's size or less.

    python evaluation/export.py RUN --out pretrained/text2image

The folder is a run folder without the means to continue training: the generator (its running average, if it has one),
the sentence encoder, unless it is already in the folder above, the run's options, and for --best_of the features of its
photographs. If the run folder does not have these yet, they are computed from the data, and kept there, too.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path.insert(0, ROOT)

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # the imports below take seconds

import argparse

import torch

from char_cnn_rnn import reading
from common import checkpoint, flags, realism, run
from common.errors import UserError, run_command
from common.files import convert_os_errors
from common.progress import new_progress
from data.sentence_encoders import SentenceEncoder
from evaluation.trained_runs import TrainedRun

# Paths of this machine.
NOT_KEPT = 'data_dir', 'out_dir', 'checkpoint', 'encoder', 'resume', 'seen_from_run', 'cfg', 'stage1'


def main():
    """Read the run and write the folder."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=flags.path, metavar='RUN', help='run folder of a GAN')
    parser.add_argument('--out', type=flags.path, required=True, metavar='DIR', help='new folder to write')
    options = parser.parse_args()
    if os.path.lexists(options.out) and not (os.path.isdir(options.out) and not os.listdir(options.out)):
        raise UserError(f'--out {options.out}: exists already; give a new folder, so that nothing is overwritten')
    trained = TrainedRun(options.run, torch.device('cpu'))
    model, file = trained.model, trained.file
    if not model.data.get('shown'):
        raise UserError(f'{file}: does not record what it was trained on, so sentences cannot be embedded for it; '
                        'resume the run briefly to add this record')
    place, encoder, _ = reading.find_encoder(file, model.data, None, trained.hdf5_file)
    shared = os.path.join(os.path.dirname(os.path.abspath(options.out)), run.ENCODER)
    is_shared = os.path.isfile(shared) and reading.is_encoder_of(model.data, reading.load(shared))
    kept = {name: value for name, value in model.options.items() if name not in NOT_KEPT} | {'model': trained.section}
    with convert_os_errors(options.out):
        os.makedirs(options.out, exist_ok=True)
    weights = f'{trained.section}.pt'
    checkpoint.save(os.path.join(options.out, weights), {
        'netG': halved(model.netG.state_dict() | averages_of(model)), 'options': kept, 'data': model.data,
        'progress': new_progress() | {'step': trained.step, 'epoch': trained.epoch}})
    run.write_options(options.out, kept)
    written = [weights]
    if is_shared:
        print(f'{shared} is its sentence encoder already')
    else:
        is_other = isinstance(encoder, SentenceEncoder)
        checkpoint.save(os.path.join(options.out, run.ENCODER), encoder.contents() if is_other else
                        {'variant': encoder.variant, 'encoder': halved(encoder.state_dict())})
        reading.load(os.path.join(options.out, run.ENCODER))  # this, and the next, check that 16 bits hold the numbers
        written.append(run.ENCODER)
    TrainedRun(options.out, torch.device('cpu'))
    try:
        photographs, are_of_run = trained.photographs()
        if not are_of_run:
            raise UserError(f'{options.out}: gets no features of other photographs')
        realism.write(os.path.join(options.out, realism.FILE), photographs)
        written.append(realism.FILE)
    except UserError as error:
        print(f'{error}; without features of photographs, --best_of will not work there')
    size = sum(os.path.getsize(os.path.join(options.out, name)) for name in written)
    print(f'{file} (epoch {trained.epoch}, step {trained.step}) and {place}: {size / 1e6:.1f} MB in {options.out}')


def averages_of(model):
    """Return the running averages of a model's generator, by their names in its state dict; {} if it has none."""
    average = getattr(model, 'average_G', None)
    return average if isinstance(average, dict) else average.state_dict() if average else {}


def halved(state_dict):
    """Return a state dict with its floating-point numbers in 16 bits."""
    return {name: value.half() if value.is_floating_point() else value for name, value in state_dict.items()}


if __name__ == '__main__':
    run_command(main)
