"""StackGAN++: train, draw every held-out caption, or draw your own sentence.

    python main.py --cfg cfg/birds_3stages.yml --gpu 0                      train as the chapter does
    python main.py --train --resume                                         go on with the newest run
    python main.py --cfg cfg/eval_birds.yml --gpu 0                         a picture for every held-out caption
    python main.py --train False --text "a small red bird with black wings"
    python main.py --train False --interpolate "a red bird" "a blue bird"   from one sentence to the other
    python main.py --train --image_folder FOLDER                            train without text on FOLDER/CLASS/*.jpg
    python main.py --train False --count 64                                 draw without text
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # while the imports take seconds

import argparse

import torch

from char_cnn_rnn import reading
from common import compiled, computing, config, flags, run
from common.errors import UserError, run_command
from common.sampling import in_batches, write_evaluation, write_pictures, write_samples, write_strip
from data.multiscale_dataset import MultiscaleDataset, shuffled_batches
from stackgan_v2.authors_cfg import KEYS, translate
from stackgan_v2.build_gan import SNAPSHOT_INTERVAL, Model, load_generator, make_networks

INTERPOLATE = 'interpolate'  # a mode of its own
DRAWING = (*flags.GENERATING, INTERPOLATE)
MODES = (*flags.TRAINING, *DRAWING)
STRIP = 9   # pictures from one sentence to the other
COUNT = 64  # pictures without sentences


def parse_flags():
    """(options, the folder of the run to go on with or None)."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_run_flags(parser, model='stackgan_v2', epochs=600, batch_size=24, lr=0.0002, chapter_dir=HERE,
                        all_modes=MODES, seed_modes=(flags.TRAIN, *DRAWING),
                        batch_modes=(*flags.TRAINING, *flags.GENERATING), resume_modes=(flags.RESUME, *DRAWING))
    add_model_flags(parser)
    compiled.add_compile_flag(parser)
    config.add_cfg_flag(parser, MODES)
    parser.add_argument('--config_name', type=flags.plain_name, metavar='NAME', modes=(flags.TRAIN,),
                        help='run folders are DATASET_NAME_DATE (default: the branches, as in 3stages)')
    parser.add_argument('--snapshot_interval', type=flags.positive(int), default=SNAPSHOT_INTERVAL, metavar='STEPS',
                        modes=flags.TRAINING,
                        help=f'steps between two Model/netG_COUNT.pth (default: {SNAPSHOT_INTERVAL})')
    parser.add_argument('--image_folder', type=flags.absolute_path, metavar='DIR', modes=flags.TRAINING,
                        help='train without text on the pictures in DIR/CLASS/')
    parser.add_argument('--lsun', type=flags.absolute_path, metavar='DIR', modes=flags.TRAINING,
                        help='train without text on DIR/CLASS_lmdb')
    parser.add_argument('--classes', nargs='+', action='extend', metavar='CLASS', modes=flags.TRAINING,
                        help='of --image_folder (default: all) or --lsun, as in church_outdoor_train')
    parser.add_argument('--interpolate', nargs=2, metavar='SENTENCE', modes=(INTERPOLATE,),
                        help='a strip from one sentence to the other')
    flags.add_boolean(parser, '--example', False, 'evaluate with one grid per photograph, not a picture per caption',
                      modes=(flags.EVALUATE,))
    parser.add_argument('--count', type=flags.positive(int), modes=(flags.EVALUATE,),
                        help=f'pictures to draw with a generator without text (default: {COUNT})')
    parser.set_defaults(dataset=None)
    options, resumed = config.parse_options(parser, lambda options: flags.mode_of(options, INTERPOLATE),
                                            KEYS, translate, HERE)
    return complete(options), resumed


def add_model_flags(parser):
    """The widths of the networks and the weights of the losses."""
    parser.add_argument('--branches', type=int, choices=range(1, 6), default=3, modes=flags.TRAINING,
                        help='sizes of pictures: 64, 128, 256, 512, 1024 pixels (default: 3)')
    flags.add_stackgan_flags(
        parser, [('gf_dim', 64, 'width of the generators'), ('df_dim', 64, 'of the discriminators'),
                 ('z_dim', 100, 'numbers of noise'), ('embedding_dim', 128, 'of the condition'),
                 ('residuals', 2, 'residual blocks of a stage')],
        [('kl_coef', 2.0, 'the KL divergence of conditions'), ('uncond_coef', 1.0, 'the unconditional losses'),
         ('color_coef', 0.0, 'colour consistency between neighbouring branches')],
        drawing_modes=DRAWING, encoder_modes=(flags.TEXT, INTERPOLATE))
    flags.add_boolean(parser, '--conditional', None, 'read sentences', modes=flags.TRAINING)


def complete(options):
    """Fill in what follows from other options. Raises UserError where they contradict each other."""
    without_text = options.image_folder or options.lsun
    if options.image_folder and options.lsun:
        raise UserError('--image_folder and --lsun: give one of them')
    if options.lsun and not options.classes:
        raise UserError(f'--lsun {options.lsun}: say which, as in --classes church_outdoor_train')
    if options.classes and not without_text:
        raise UserError('--classes: belongs to --image_folder or --lsun')
    if options.conditional is None:
        options.conditional = not without_text
    if options.conditional and without_text:
        raise UserError(f'{without_text}: has no sentences; leave out --conditional True')
    if options.train and options.branches == 1:
        run.refuse_typed(['residuals', 'color_coef'], 'with one branch, which refines no other')
    if options.train and not options.conditional:
        run.refuse_typed(['kl_coef', 'embedding_dim'], 'without text')
    if options.train and without_text:
        run.refuse_typed(['data_dir', 'cache'], f'with pictures of {without_text}')
    if options.gf_dim >> (options.branches - 1) == 0:
        raise UserError(f'--gf_dim {options.gf_dim}: too narrow for {options.branches} branches, each of which halves '
                        f'it; give {2 ** (options.branches - 1)} or more')
    if options.dataset is None:
        options.dataset = (options.classes[0] if options.lsun else
                           os.path.basename(options.image_folder) if options.image_folder else 'birds')
        try:
            flags.plain_name(options.dataset)  # the run bears it
        except argparse.ArgumentTypeError as error:
            raise UserError(f'{error}; name the run with --dataset NAME') from error
    options.config_name = options.config_name or f'{options.branches}stages'
    return options


def main():
    """Flags, then what they ask for: train, draw sentences, or evaluate."""
    flags.follow(*parse_flags(), train, draw, evaluate)


def train(options, device, resumed):
    """Train in a new run folder, or go on with the run in the folder `resumed`."""
    print('Loading data...', flush=True)
    dataset = load_dataset(options)
    model = make_model(options, device, shuffled_batches(dataset, options.batch_size, options.workers, device))
    computing.prepare(options, device, model.netG, model.netsD)
    if options.checkpoint and not resumed:
        model.load_from(run.existing(options.checkpoint, options))
    model.create_optim(options.lr)
    is_cached = options.cache and not (options.image_folder or options.lsun)
    run_dir = run.begin(model, options, resumed, f'{options.dataset}_{options.config_name}',
                        reading.describe(dataset), dataset.cached if is_cached else None)
    if options.conditional and run_dir:
        reading.keep_encoder(dataset, run_dir)
    model.snapshot_interval = options.snapshot_interval
    print(f'Training on {len(dataset)} pictures; everything goes to {run_dir}', flush=True)
    model.train(options.epochs, options.log_interval, run_dir)
    print(f'done: {run_dir} holds samples/, log.txt, TensorBoard curves, {options.model}.pt and Model/')


def load_dataset(options):
    """The pictures to train on, with their sentences unless there is none to read."""
    if options.image_folder or options.lsun:
        from data.image_folder import image_folder, lsun  # takes seconds to import: only where it is used
    if options.image_folder:
        return image_folder(options.image_folder, options.classes, options.branches)
    if options.lsun:
        return lsun(options.lsun, options.classes, options.branches)
    dataset = MultiscaleDataset(flags.dataset_file(options), split=0, branches=options.branches)
    return dataset.require_embeddings() if options.conditional else dataset


def make_model(options, device, data_loader):
    netG, netsD = make_networks(options.branches, options.gf_dim, options.df_dim, options.z_dim,
                                embedding_dim=options.embedding_dim, residuals=options.residuals,
                                conditional=options.conditional, device=device)
    return Model(options.model, device, data_loader, netG, netsD, options.kl_coef, options.uncond_coef,
                 options.color_coef)


def evaluate(options, device, resumed):
    """A picture for every caption of classes that were not trained on; without text, `--count` pictures."""
    of_dataset = options.count is None or options.dataset != 'birds'  # the default, which no run without text is on
    model, file, steps = load_generator(run.checkpoint_file(options, resumed, of_dataset), options.model, device)
    if not model.netG.conditional and options.example:
        raise UserError(f'--example: {file} was trained without text, so it has no captions to show beside each other')
    if not model.netG.conditional:
        print(f'{file} draws:')
        write_samples(options, options.count or COUNT, lambda size, seed: model.generate(seed=seed, count=size)[-1])
        return
    if options.count:
        raise UserError(f'--count {options.count}: {file} reads sentences; without --count it draws all held-out ones')
    dataset = MultiscaleDataset.held_out(flags.dataset_file(options))
    reading.check_embeddings(model.data, dataset, file)
    write_evaluation(options, dataset, lambda embed, seed: model.generate(embed, seed)[-1], file, f'iteration{steps}',
                     options.example)


def draw(options, device, resumed):
    """A picture for each sentence that the user typed, and a sheet of all branches', or a strip between two."""
    flag = '--interpolate' if options.interpolate else '--text'
    sentences = flags.read_sentences(options.interpolate or options.text, options.text_file, flag)
    model, file, _ = load_generator(run.checkpoint_file(options, resumed, of_dataset=False), options.model, device)
    if not model.netG.conditional:
        raise UserError(f'{file}: was trained without text, so it reads no sentences; '
                        'leave them out to draw --count pictures')
    embeddings = reading.read(options, sentences, file, model.data, device)
    if options.interpolate:
        # One by one, so that all have the same noise and the same draw of the condition.
        between = [torch.lerp(*embeddings, weight)[None] for weight in torch.linspace(0, 1, STRIP)]
        images = [model.generate(embedding, options.seed)[-1] for embedding in between]
        write_strip(options, torch.cat(images), sentences)
    else:
        write_pictures(options, 'text', in_batches(model.generate, embeddings, options), sentences,
                       sizes='branches.png')


if __name__ == '__main__':
    run_command(main)
