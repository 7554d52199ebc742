"""Train the text-to-image GAN, evaluate it, or generate images for your own sentences.

    python main.py --train                                                  train on data/birds/birds.hdf5
    python main.py --train --resume                                         continue the newest run
    python main.py --train False                                            generate 64 images for held-out captions
    python main.py --train False --text "a small red bird with black wings"
"""
import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # the imports below take seconds

import argparse
import functools

from torch.utils.data import DataLoader

from char_cnn_rnn import reading
from common import argument_types, dry_run, flags, provenance, ranks, realism, run, speed
from common.errors import run_command
from common.sampling import in_batches, write_images
from data import checked_files
from data.txt2image_dataset import Text2ImageDataset
from text2image import checkpoints, improved
from text2image.build_gan import Model, load_generator

EVAL_SIZE = 64
PRETRAINED = os.path.join(os.path.dirname(HERE), 'pretrained', 'text2image')  # a run on birds


def parse_flags():
    """Return (options, folder of the run to resume or None)."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_run_flags(parser, model='text2image', epochs=200, batch_size=256, lr=0.0002, section_dir=HERE,
                        batch_modes=(*flags.TRAINING, flags.TEXT))
    parser.add_argument('--channels', type=int, choices=[3], default=3, modes=flags.ALL,
                        help='channels of the images (default: 3)')
    flags.add_weights(parser, [('l1_coef', 50, 'feature matching'), ('l2_coef', 100, 'the pixel loss'),
                               ('cls_coef', 0, 'real images with mismatched sentences (GAN-CLS)'),
                               ('int_coef', 0, 'interpolated sentences (GAN-INT)')])
    parser.add_argument('--average', type=argument_types.fraction, default=0.0, metavar='DECAY', modes=flags.TRAINING,
                        help='keep a running average of the generator\'s weights with this decay per step, such as '
                             '0.999, and generate with it (default: 0, none)')
    parser.add_argument('--recipe', choices=improved.RECIPES, default='chapter', modes=(flags.TRAIN,),
                        help='improved: different defaults for flags above and below, which give better images after '
                             'fewer training images (default: chapter)')
    parser.add_argument('--discriminator', choices=improved.DISCRIMINATORS, default='chapter', modes=(flags.TRAIN,),
                        help='pretrained: a discriminator that sees images through a network trained on ImageNet '
                             '(default: chapter)')
    parser.add_argument('--lr_ratio', type=flags.positive(float), default=1.0, metavar='R', modes=flags.TRAINING,
                        help='learning rate of the discriminator, divided by that of the generator (default: 1)')
    flags.add_boolean(parser, '--augment', False, 'let the discriminator see all images with random changes of color '
                      'and place, and with a part erased', modes=flags.TRAINING)
    flags.add_boolean(parser, '--flip', False, 'mirror half of the photographs', modes=flags.TRAINING)
    flags.add_boolean(parser, '--pairs', False, 'repeat the sentences of half a batch in the other half, with other '
                      'photographs of their classes', modes=flags.TRAINING)
    flags.add_precision_flag(parser)
    flags.add_compile_flag(parser)
    flags.add_sentence_flags(parser)
    flags.add_count_flag(parser)
    flags.add_best_of_flag(parser)
    recipe = parser.parse_args().recipe  # the second time, with the recipe's values as defaults
    return run.parse_options(parser, flags.mode_of, improved.RECIPES[recipe])


def main():
    """Parse the flags, then train, evaluate, or generate images for sentences."""
    options, resumed = parse_flags()
    device = flags.set_up(options)
    task = train if options.train else evaluate if flags.mode_of(options) == flags.EVALUATE else generate
    with checked_files.only_read(options.dry_run):
        task(options, device, resumed)
    ranks.leave()


def train(options, device, resumed):
    """Train in a new run folder, or resume the run in the folder `resumed`."""
    print('Loading data...', flush=True)
    drawn = options.cls_coef > 0 or options.int_coef > 0
    dataset = Text2ImageDataset(flags.dataset_file(options), drawn=drawn, flip=options.flip, pairs=options.pairs)
    dataset = reading.require_embeddings(dataset).to(device)
    # The sampler shuffles, as the chapter's shuffle=True does, and deals the captions out to several GPUs.
    loader = DataLoader(dataset, options.batch_size, sampler=ranks.sampler(dataset), collate_fn=dataset.collate)
    run.check_batches(options.batch_size, len(loader.sampler))
    model = make_model(options, device, loader, dataset.embed_dim)
    speed.prepare(model.netG, [model.netD], device=device, precision=options.precision, compile=options.compile,
                  batch_size=options.batch_size)
    if options.checkpoint and not resumed:
        model.load_from(run.existing(options.checkpoint, options.model, checkpoints.find))
        reading.print_other_encoder(model.data, dataset, options.checkpoint)
    model.create_optim(options.lr)
    run_dir = run.begin(model, [model.netG, model.netD], resumed, options.out_dir, options.dataset, vars(options),
                        reading.describe(dataset), dry_run=options.dry_run)
    model.set_lr(options.lr)
    model.keep_average(options.average)
    model.keep = options.keep
    if options.dry_run:
        return dry_run.report(model, {'netG': model.netG, 'netD': model.netD}, options.epochs, options.log_interval,
                              run_dir, caches=checked_files.planned(), sample=model.sample_grid,
                              copied={run.ENCODER: reading.bytes_to_keep(dataset, run_dir)})
    if run_dir:
        reading.keep_encoder(dataset, run_dir)
    print(f'Training on {len(dataset)} captions of {len(dataset.pictures)} photographs; everything goes to {run_dir}',
          flush=True)
    model.train(options.epochs, options.log_interval, run_dir)  # it also saves, so no save_to('') follows
    print(f'done: {run_dir} holds samples/, log.txt, TensorBoard curves and {options.model}.pt')


def evaluate(options, device, resumed):
    """Generate images for captions of classes that are not in the training data."""
    dataset = reading.require_embeddings(Text2ImageDataset.held_out(flags.dataset_file(options)))
    loader = DataLoader(dataset, EVAL_SIZE, shuffle=True, collate_fn=dataset.collate)
    file = run.checkpoint_file(options.model, options.out_dir, options.checkpoint, resumed, checkpoints.find,
                               dataset=options.dataset, data_dir=options.data_dir)
    model, file = load_generator(file, options.model, device, loader, options.channels)
    reading.check_embeddings(model.data, dataset, file, model.netG.embed_dim)
    images, captions = model.eval()
    print(f'{file} generates images for captions of /{dataset.split}:')
    write_images(run.new_run(options.out_dir, 'eval', vars(options)), [([images], None)], captions)


def generate(options, device, resumed):
    """Generate images for each sentence of `--text` and `--text_file`, or an image like that of `--like`."""
    like = provenance.read(options.like)
    sentences = provenance.sentences(like, options.text, options.text_file)
    given = options.checkpoint or provenance.checkpoint(like, resumed, options.out_dir, os.path.dirname(PRETRAINED))
    file = run.checkpoint_file(options.model, options.out_dir, given, resumed, checkpoints.find,
                               PRETRAINED, dataset=run.if_given('dataset', options.dataset), data_dir=options.data_dir)
    model, file = load_generator(file, options.model, device, channels=options.channels)
    data_file = flags.dataset_file(options)
    embeddings, encoder = reading.read(sentences, file, model.data, options.encoder, data_file,
                                       device, model.netG.embed_dim)
    made_with = provenance.made_with(file, (model.average_G or model.netG).state_dict(), encoder)
    provenance.check(like, made_with, options.checkpoint or resumed)
    sentences, embeddings = flags.repeated(sentences, embeddings, options.count, options.best_of)
    how = options.batch_size, options.seed, options.truncation, like
    batches = zip(in_batches(lambda *batch: [model.generate(*batch)], embeddings, *how),
                  provenance.records(sentences, *how, made_with))
    if options.best_of > 1:
        real = realism.of_run(file, model, 'whole_64', functools.partial(Text2ImageDataset, drawn=False), device,
                              data_file)
        batches = realism.keep_best(batches, options.best_of, real.distances)
    write_images(run.new_run(options.out_dir, 'text', vars(options)), batches, sentences[::options.best_of])


def make_model(options, device, data_loader, embed_dim):
    """Create a Model to train from the options, for embeddings of `embed_dim` numbers."""
    model = Model(options.model, device, data_loader, options.channels, options.l1_coef, options.l2_coef,
                  options.cls_coef, options.int_coef, embed_dim)
    improved.improve(model, options.discriminator, options.augment, options.pairs, options.lr_ratio)
    return model


if __name__ == '__main__':
    run_command(main)
