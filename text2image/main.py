"""Text-to-image GAN: train, evaluate, or draw your own sentence.

    python main.py --train                                                  train on data/birds/birds.hdf5
    python main.py --train --resume                                         go on with the newest run
    python main.py --train False                                            64 pictures for held-out captions
    python main.py --train False --text "a small red bird with black wings"
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # while the imports take seconds

import argparse

from torch.utils.data import DataLoader

from char_cnn_rnn import reading
from common import flags, ranks, run, speed
from common.errors import run_command
from common.sampling import in_batches, write_pictures
from data.txt2image_dataset import Text2ImageDataset
from text2image.build_gan import Model

EVAL_SIZE = 64


def parse_flags():
    """(options, the folder of the run to go on with or None)."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_run_flags(parser, model='text2image', epochs=200, batch_size=256, lr=0.0002, chapter_dir=HERE,
                        batch_modes=(*flags.TRAINING, flags.TEXT))
    parser.add_argument('--channels', type=int, choices=[3], default=3, modes=flags.ALL,
                        help='of the pictures (default: 3)')
    for name, default, what in [('l1_coef', 50, 'feature matching'), ('l2_coef', 100, 'the pixel loss'),
                                ('cls_coef', 0, 'real pictures with wrong sentences (GAN-CLS)'),
                                ('int_coef', 0, 'interpolated sentences (GAN-INT)')]:
        parser.add_argument(f'--{name}', type=flags.non_negative(float), default=default, metavar='W',
                            modes=flags.TRAINING, help=f'weight of {what} (default: {default})')
    parser.add_argument('--checkpoint', type=flags.path, metavar='FILE', modes=(flags.TRAIN, *flags.GENERATING),
                        help='draw with this checkpoint (default: of the newest run), or start a training from it')
    flags.add_precision_flag(parser)
    flags.add_compile_flag(parser)
    flags.add_drawing_flags(parser)
    return run.parse_options(parser, flags.mode_of)


def main():
    """Flags, then what they ask for: train, draw sentences, or evaluate."""
    flags.follow(*parse_flags(), train, draw, evaluate)


def train(options, device, resumed):
    """Train in a new run folder, or go on with the run in the folder `resumed`."""
    print('Loading data...', flush=True)
    dataset = Text2ImageDataset(flags.dataset_file(options), split=0,
                                drawn=options.cls_coef > 0 or options.int_coef > 0).require_embeddings().to(device)
    loader = DataLoader(dataset, options.batch_size, sampler=ranks.sampler(dataset), collate_fn=dataset.collate)
    model = make_model(options, device, loader)
    speed.prepare(model.netG, [model.netD], device=device, precision=options.precision, compile=options.compile,
                  batch_size=options.batch_size)
    if options.checkpoint and not resumed:
        model.load_from(options.checkpoint)
    model.create_optim(options.lr)
    run_dir = run.begin(model, options, resumed, options.dataset, reading.describe(dataset))
    if run_dir:
        reading.keep_encoder(dataset, run_dir)
    print(f'Training on {len(dataset)} captions of {len(dataset.pictures)} pictures; everything goes to {run_dir}',
          flush=True)
    model.train(options.epochs, options.log_interval, run_dir)
    print(f'done: {run_dir} holds samples/, log.txt, TensorBoard curves and {options.model}.pt')


def evaluate(options, device, resumed):
    """A sheet of pictures for captions of classes that were not trained on."""
    dataset = Text2ImageDataset.held_out(flags.dataset_file(options))
    loader = DataLoader(dataset, EVAL_SIZE, shuffle=True, collate_fn=dataset.collate)
    file = run.checkpoint_file(options, resumed, of_dataset=True)
    model = load_model(file, options, device, loader)
    reading.check_embeddings(model.data, dataset, file)
    images, captions = model.eval()
    print(f'{file} generates images for captions of /{dataset.split}:')
    write_pictures(run.new_run(options.out_dir, 'eval', vars(options)), [[images]], captions)


def draw(options, device, resumed):
    """A picture for each sentence that the user typed."""
    sentences = flags.read_sentences(options.text, options.text_file)
    file = run.checkpoint_file(options, resumed, of_dataset=False)
    model = load_model(file, options, device)
    embeddings = reading.read(sentences, file, model.data, options.encoder, flags.dataset_file(options), device)
    batches = in_batches(lambda part, seed: [model.generate(part, seed)], embeddings, options.batch_size, options.seed)
    write_pictures(run.new_run(options.out_dir, 'text', vars(options)), batches, sentences)


def make_model(options, device, data_loader=None):
    """The Model of the options."""
    return Model(options.model, device, data_loader, options.channels, options.l1_coef, options.l2_coef,
                 options.cls_coef, options.int_coef)


def load_model(file, options, device, data_loader=None):
    """The model of a checkpoint."""
    model = make_model(options, device, data_loader)
    model.load_from(file, verbose=False)
    return model


if __name__ == '__main__':
    run_command(main)
