"""Write what a run of text2image needs to generate images, in 16 bits: a fifth of a checkpoint's size or less.

    python evaluation/export.py RUN --out pretrained/text2image

The folder is a run folder without the means to continue training: the generator (with --average, its running average),
the sentence encoder, the run's options, and for --best_of the features of its photographs. If the run folder does not
have these yet, they are computed from the data, and kept there, too.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path.insert(0, ROOT)

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # the imports below take seconds

import argparse
import functools

import torch

from char_cnn_rnn import reading
from common import checkpoint, flags, realism, run
from common.errors import UserError, run_command
from common.files import convert_os_errors
from common.progress import new_progress
from data.sentence_encoders import SentenceEncoder
from data.txt2image_dataset import Text2ImageDataset
from text2image import checkpoints
from text2image.build_gan import load_generator

NOT_KEPT = ('data_dir', 'out_dir', 'checkpoint', 'encoder', 'resume', 'seen_from_run')  # paths of this machine


def main():
    """Read the run and write the folder."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=flags.path, metavar='RUN', help='run folder of text2image')
    parser.add_argument('--out', type=flags.path, required=True, metavar='DIR', help='new folder to write')
    options = parser.parse_args()
    if os.path.lexists(options.out) and not (os.path.isdir(options.out) and not os.listdir(options.out)):
        raise UserError(f'--out {options.out}: exists already; give a new folder, so that nothing is overwritten')
    file = run.existing(options.run, 'text2image', checkpoints.find)
    model, _ = load_generator(file)
    if not model.data.get('shown'):
        raise UserError(f'{file}: does not record what it was trained on, so sentences cannot be embedded for it; '
                        'resume the run briefly to add this record')
    folder = os.path.dirname(os.path.abspath(file))
    data_file = run.dataset_of(run.read_options(folder) if run.has_options(folder) else model.options, file)
    place, encoder, _ = reading.find_encoder(file, model.data, None, data_file)
    averages = model.average_G.state_dict() if model.average_G else {}
    step, epoch = (checkpoint.count_in(checkpoint.load(file, mapped=True), file, what) for what in ('step', 'epoch'))
    kept = {name: value for name, value in model.options.items() if name not in NOT_KEPT} | {'model': 'text2image'}
    with convert_os_errors(options.out):
        os.makedirs(options.out, exist_ok=True)
    checkpoint.save(os.path.join(options.out, 'text2image.pt'), {
        'netG': halved(model.netG.state_dict() | averages), 'options': kept, 'data': model.data,
        'progress': new_progress() | {'step': step, 'epoch': epoch}})
    is_other = isinstance(encoder, SentenceEncoder)
    checkpoint.save(os.path.join(options.out, run.ENCODER), encoder.contents() if is_other else
                    {'variant': encoder.variant, 'encoder': halved(encoder.state_dict())})
    load_generator(options.out)  # this, and the next, check that 16 bits could hold the numbers
    reading.load(os.path.join(options.out, run.ENCODER))
    run.write_options(options.out, kept)
    written = ['text2image.pt', run.ENCODER]
    try:
        photographs, are_of_run = realism.features_of_run(
            file, model, 'whole_64', functools.partial(Text2ImageDataset, drawn=False), torch.device('cpu'), data_file)
        if not are_of_run:
            raise UserError(f'{options.out}: gets no features of other photographs')
        realism.write(os.path.join(options.out, realism.FILE), photographs)
        written.append(realism.FILE)
    except UserError as error:
        print(f'{error}; without features of photographs, --best_of will not work there')
    size = sum(os.path.getsize(os.path.join(options.out, name)) for name in written)
    print(f'{file} (epoch {epoch}, step {step}) and {place}: {size / 1e6:.1f} MB in {options.out}')


def halved(state_dict):
    """Return a state dict with its floating-point numbers in 16 bits."""
    return {name: value.half() if value.is_floating_point() else value for name, value in state_dict.items()}


if __name__ == '__main__':
    run_command(main)
