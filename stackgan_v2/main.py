"""Train StackGAN++, evaluate it, or generate images for your own sentences.

    python main.py --cfg cfg/birds_3stages.yml --gpu 0                      train as the chapter does
    python main.py --train --resume                                         continue the newest run
    python main.py --cfg cfg/eval_birds.yml --gpu 0                         generate an image for every held-out caption
    python main.py --train False --text "a small red bird with black wings"
    python main.py --train False --interpolate "a red bird" "a blue bird"   interpolate between two sentences
    python main.py --train --image_folder FOLDER                            train without text on FOLDER/CLASS/*.jpg
    python main.py --train False --count 64                                 generate without text
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

import torch

from char_cnn_rnn import reading
from common import config, dry_run, flags, provenance, ranks, realism, run, speed
from common.errors import UserError, run_command
from common.sampling import in_batches, write_evaluation, write_images, write_strip
from data import checked_files
from data.multiscale_dataset import MultiscaleDataset, shuffled_batches
from stackgan_v2 import checkpoints, unconditional
from stackgan_v2.authors_cfg import KEYS, translate
from stackgan_v2.build_gan import SNAPSHOT_INTERVAL, Model, load_generator, make_networks
from stackgan_v2.gan import BASE_SIZE

INTERPOLATE = 'interpolate'  # a mode that only this section has
GENERATING = (*flags.GENERATING, INTERPOLATE)
MODES = (*flags.TRAINING, *GENERATING)
MOST_RESIDUALS = 100
STRIP = 9  # images in a strip of --interpolate
PRETRAINED = os.path.join(os.path.dirname(HERE), 'pretrained', 'stackgan_v2')  # a run on birds


def parse_flags():
    """Return (options, folder of the run to resume or None)."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_run_flags(parser, model='stackgan_v2', epochs=600, batch_size=24, lr=0.0002, section_dir=HERE,
                        all_modes=MODES, seed_modes=(flags.TRAIN, flags.EVALUATE, flags.TEXT, INTERPOLATE),
                        batch_modes=(*flags.TRAINING, flags.EVALUATE, flags.TEXT),
                        resume_modes=(flags.RESUME, *GENERATING))
    parser.add_argument('--branches', type=int, choices=range(1, 6), default=3, modes=flags.TRAINING,
                        help='number of branches: image sizes 64, 128, 256, 512 and 1024 pixels (default: 3)')
    flags.add_widths(parser, [('gf_dim', 64, 'generator width'), ('df_dim', 64, 'discriminator width'),
                              ('z_dim', 100, 'length of the noise vector'),
                              ('embedding_dim', 128, 'length of the condition vector'),
                              ('residuals', 2, 'number of residual blocks per stage', MOST_RESIDUALS)])
    flags.add_weights(parser, [('kl_coef', 2.0, 'the KL divergence of conditioning augmentation'),
                               ('uncond_coef', 1.0, 'the unconditional losses'),
                               ('color_coef', 0.0, 'the color consistency of neighboring branches')])
    flags.add_large_image_flags(parser, MODES)
    flags.add_precision_flag(parser)
    flags.add_compile_flag(parser)
    config.add_cfg_flag(parser, MODES)
    parser.add_argument('--config_name', type=flags.plain_name, metavar='NAME', modes=(flags.TRAIN,),
                        help='middle part of the run folder\'s name DATASET_NAME_DATE (default: the number of '
                             'branches, as in 3stages)')
    parser.add_argument('--snapshot_interval', type=flags.positive(int), default=SNAPSHOT_INTERVAL, metavar='STEPS',
                        modes=flags.TRAINING,
                        help='number of steps between two snapshots Model/netG_COUNT.pth '
                             f'(default: {SNAPSHOT_INTERVAL})')
    flags.add_sentence_flags(parser, GENERATING, (flags.TEXT, flags.LIKE, INTERPOLATE),
                             'a run folder, its .pt file, or a netG_COUNT.pth')
    parser.add_argument('--interpolate', nargs=2, metavar='SENTENCE', modes=(INTERPOLATE,),
                        help='generate a strip of images from one sentence to the other')
    flags.add_boolean(parser, '--example', False, 'evaluate with one grid per photograph in place of one image per '
                                                  'caption', modes=(flags.EVALUATE,))
    unconditional.add_flags(parser)
    flags.add_best_of_flag(parser)
    parser.set_defaults(dataset=None)
    options, resumed = config.parse_options(parser, lambda options: flags.mode_of(options, INTERPOLATE),
                                            KEYS, translate, HERE)
    return complete(options), resumed


def complete(options):
    """Set the defaults that depend on other options. Raises UserError if options contradict each other."""
    unconditional.complete(options)
    if options.train and options.branches == 1:
        run.refuse_given(['residuals', 'color_coef'], 'with --branches 1, since only later branches use it')
    if options.gf_dim >> (options.branches - 1) == 0:
        raise UserError(f'--gf_dim {options.gf_dim}: too narrow for {options.branches} branches, each of which halves '
                        f'it; give {2 ** (options.branches - 1)} or more')
    run.complete(options, config_name=f'{options.branches}stages', dataset=(
        options.classes[0] if options.lsun else os.path.basename(options.image_folder) if options.image_folder else
        'birds'))
    try:
        flags.plain_name(options.dataset)  # it becomes part of the run folder's name
    except argparse.ArgumentTypeError as error:
        raise UserError(f'{error}; name the run with --dataset NAME') from error
    return options


def main():
    """Parse the flags, then train, evaluate, or generate images for sentences."""
    options, resumed = parse_flags()
    device = flags.set_up(options)
    mode = flags.mode_of(options, INTERPOLATE)
    task = train if options.train else evaluate if mode == flags.EVALUATE else generate
    with checked_files.only_read(options.dry_run):
        task(options, device, resumed)
    ranks.leave()


def train(options, device, resumed):
    """Train in a new run folder, or resume the run in the folder `resumed`."""
    print('Loading data...', flush=True)
    dataset = load_dataset(options)
    batches = shuffled_batches(dataset, options.batch_size, options.workers, device)
    run.check_batches(options.batch_size, len(batches.sampler))
    model = make_model(options, device, batches, dataset.embed_dim if options.conditional else None)
    speed.prepare(model.netG, model.netsD, device=device, precision=options.precision, compile=options.compile,
                  accumulate=options.accumulate, batch_size=options.batch_size)
    if options.checkpoint and not resumed:
        model.load_from(run.existing(options.checkpoint, options.model, checkpoints.find))
        if options.conditional:
            reading.print_other_encoder(model.data, dataset, options.checkpoint)
    model.create_optim(options.lr)
    is_cached = options.cache and not (options.image_folder or options.lsun)
    run_dir = run.begin(model, [model.netG, *model.netsD], resumed, options.out_dir,
                        f'{options.dataset}_{options.config_name}', vars(options), reading.describe(dataset),
                        dataset.cached if is_cached else None, options.dry_run)
    model.set_lr(options.lr)
    model.snapshot_interval, model.keep = options.snapshot_interval, options.keep
    if options.dry_run:
        networks = {'netG': model.netG, **{f'netD{i}': netD for i, netD in enumerate(model.netsD)}}
        return dry_run.report(model, networks, options.epochs, options.log_interval, run_dir,
                              caches=checked_files.planned(), sample=model.sample_grid, snapshot=model.save_snapshot,
                              snapshot_steps=options.snapshot_interval, copied={
                                  run.ENCODER: options.conditional and reading.bytes_to_keep(dataset, run_dir)})
    if options.conditional and run_dir:
        reading.keep_encoder(dataset, run_dir)
    print(f'Training on {len(dataset)} images; everything goes to {run_dir}', flush=True)
    model.train(options.epochs, options.log_interval, run_dir)
    print(f'done: {run_dir} holds samples/, log.txt, TensorBoard curves, {options.model}.pt and Model/')


def load_dataset(options):
    """Return the data set to train on: images, with their captions unless training is without text."""
    if options.image_folder or options.lsun:
        return unconditional.load_dataset(options)
    dataset = MultiscaleDataset(flags.dataset_file(options), split=0, branches=options.branches)
    return reading.require_embeddings(dataset) if options.conditional else dataset


def make_model(options, device, data_loader, text_dim):
    """Create a Model from the options, for embeddings of `text_dim` numbers, or None without text."""
    netG, netsD = make_networks(options.branches, options.gf_dim, options.df_dim, options.z_dim, text_dim,
                                options.embedding_dim, options.residuals, options.conditional, device)
    return Model(options.model, device, data_loader, netG, netsD, options.kl_coef, options.uncond_coef,
                 options.color_coef)


def evaluate(options, device, resumed):
    """Generate an image for every caption of classes that are not in the training data; without text, `--count` images.
    """
    # With --count, the default data set birds must not select a run: runs without text are on other data sets.
    of_dataset = options.count is None or options.dataset != 'birds'
    file = run.checkpoint_file(options.model, options.out_dir, options.checkpoint, resumed, checkpoints.find,
                               dataset=options.dataset if of_dataset else run.if_given('dataset', options.dataset),
                               data_dir=options.data_dir)
    model, file, steps = load_generator(file, options.model, device)
    speed.prepare_evaluation(model.netG, device)
    if not model.netG.conditional and options.example:
        raise UserError(f'--example: {file} was trained without text, so there are no captions to show in a grid; '
                        'leave out --example')
    if not model.netG.conditional:
        if options.checkpoint or resumed:
            run.refuse_given(['dataset', 'data_dir'], 'with a given run that was trained without text')
        print(f'{file} generates images:')
        unconditional.evaluate(model, options)
        return
    if options.count:
        raise UserError(f'--count {options.count}: {file} reads sentences; leave out --count to generate an image '
                        'for each held-out caption')
    dataset = reading.require_embeddings(MultiscaleDataset.held_out(flags.dataset_file(options)))
    if options.checkpoint or resumed:
        run.refuse_given(['out_dir'], 'in an evaluation of a given run, which writes beside its checkpoint')
    reading.check_embeddings(model.data, dataset, file, model.netG.text_dim)
    print(f'{file} generates images for {len(dataset.captions)} captions of /{dataset.split}', flush=True)
    write_evaluation(os.path.join(os.path.dirname(file), f'iteration{steps}'), dataset,
                     lambda embed, seed: model.generate(embed, seed)[-1], options.batch_size, options.seed,
                     options.example)


def generate(options, device, resumed):
    """Generate images for sentences, and a sheet of all branches: those of `--text` and `--text_file`, or `--like`.

    For `--interpolate`, generate a strip.
    """
    like = provenance.read(options.like)
    if options.interpolate:
        sentences = flags.read_sentences(options.interpolate, None, '--interpolate')
    else:
        sentences = provenance.sentences(like, options.text, options.text_file)
    given = options.checkpoint or provenance.checkpoint(like, resumed, options.out_dir, os.path.dirname(PRETRAINED))
    file = run.checkpoint_file(options.model, options.out_dir, given, resumed, checkpoints.find, PRETRAINED,
                               dataset=run.if_given('dataset', options.dataset), data_dir=options.data_dir)
    model, file, _ = load_generator(file, options.model, device)
    if not model.netG.conditional:
        raise UserError(f'{file}: was trained without text, so it reads no sentences; '
                        'leave them out, and use --count N to generate images')
    data_file = flags.dataset_file(options)
    embeddings, encoder = reading.read(sentences, file, model.data, options.encoder, data_file,
                                       device, model.netG.text_dim)
    if options.interpolate:
        # One at a time, so that all have the same noise and the same epsilon.
        between = [torch.lerp(*embeddings, weight)[None] for weight in torch.linspace(0, 1, STRIP)]
        images = [model.generate(embedding, options.seed, options.truncation)[-1] for embedding in between]
        write_strip(run.new_run(options.out_dir, 'interpolate', vars(options)), torch.cat(images), sentences)
    else:
        made_with = provenance.made_with(file, model.netG.state_dict() | model.average_G, encoder)
        provenance.check(like, made_with, options.checkpoint or resumed)
        sentences, embeddings = flags.repeated(sentences, embeddings, options.count, options.best_of)
        how = options.batch_size, options.seed, options.truncation, like
        batches = zip(in_batches(model.generate, embeddings, *how), provenance.records(sentences, *how, made_with))
        if options.best_of > 1:
            branches = model.netG.branches
            real = realism.of_run(file, model, f'crop_{BASE_SIZE << (branches - 1)}', functools.partial(
                MultiscaleDataset, branches=branches), device, data_file)
            batches = realism.keep_best(batches, options.best_of, real.distances)
        write_images(run.new_run(options.out_dir, 'text', vars(options)), batches, sentences[::options.best_of],
                     'branches.png')


if __name__ == '__main__':
    run_command(main)
