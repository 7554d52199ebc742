"""Train StackGAN (Stage-I, then Stage-II on top of it), evaluate it, or generate images for your own sentences.

    python main.py --train --stage 1                                        train Stage-I: 64 x 64 images
    python main.py --train --stage 2 --stage1 output/birds_stageI_DATE      refine them to 256 x 256
    python main.py --train --resume                                         continue the newest run
    python main.py --train False                                            generate an image for every held-out caption
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

from char_cnn_rnn import reading
from common import config, dry_run, flags, provenance, ranks, realism, run, speed
from common.errors import UserError, run_command
from common.sampling import in_batches, write_evaluation, write_images
from data import checked_files
from data.cropped_dataset import CroppedDataset
from data.multiscale_dataset import shuffled_batches
from stackgan_v1 import checkpoints
from stackgan_v1.authors_cfg import KEYS, translate
from stackgan_v1.build_gan import SNAPSHOT_INTERVAL, Model, load_generator, make_networks
from stackgan_v1.gan import SIZES, Stage2Generator

Z_DIM = 100
NAMES = {1: 'stageI', 2: 'stageII'}      # part of the names of run folders
LR_DECAY_EPOCHS = {1: 50, 2: 100}        # of 600
MOST_RESIDUALS = 100
NARROWEST = {1: 2, 2: 4}                 # smallest --gf_dim: the last layer has half or a quarter of its channels


def parse_flags():
    """Return (options, folder of the run to resume or None)."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_run_flags(parser, model='stackgan_v1', epochs=600, batch_size=64, lr=0.0002, section_dir=HERE,
                        batch_modes=(*flags.TRAINING, flags.EVALUATE, flags.TEXT))
    parser.add_argument('--stage', type=int, choices=[1, 2], modes=flags.ALL, selects_run=True,
                        help='stage to train: 1 generates images of 64 x 64, 2 refines them to 256 x 256 '
                             '(default: 1; when generating, the stage of the checkpoint)')
    parser.add_argument('--stage1', type=flags.path, metavar='FILE', modes=(flags.TRAIN,),
                        help='trained Stage-I whose images --stage 2 refines: a run folder, its .pt file, or a '
                             'netG_epoch_N.pth')
    parser.add_argument('--lr_decay_epoch', type=flags.positive(int), metavar='EPOCHS', modes=flags.TRAINING,
                        help='halve the learning rate every EPOCHS epochs '
                             '(default: 50; in Stage-II, 100)')
    parser.add_argument('--z_dim', type=flags.positive(int), metavar='N', modes=flags.TRAINING,
                        help=f'length of the noise vector (default: {Z_DIM}; in Stage-II, that of its Stage-I)')
    flags.add_widths(parser, [('gf_dim', 128, 'generator width'), ('df_dim', 64, 'discriminator width'),
                              ('condition_dim', 128, 'length of the condition vector'),
                              ('residuals', 4, 'number of residual blocks in Stage-II', MOST_RESIDUALS)])
    flags.add_weights(parser, [('kl_coef', 2.0, 'the KL divergence of conditioning augmentation')])
    flags.add_large_image_flags(parser, flags.ALL)
    flags.add_precision_flag(parser)
    flags.add_compile_flag(parser)
    flags.add_sentence_flags(parser, forms='a run folder, its .pt file, or a netG_epoch_N.pth')
    flags.add_count_flag(parser)
    flags.add_best_of_flag(parser)
    config.add_cfg_flag(parser, flags.ALL)
    parser.add_argument('--config_name', type=flags.plain_name, metavar='NAME', modes=(flags.TRAIN,),
                        help='middle part of the run folder\'s name DATASET_NAME_DATE (default: stageI or stageII)')
    parser.add_argument('--snapshot_interval', type=flags.positive(int), default=SNAPSHOT_INTERVAL, metavar='EPOCHS',
                        modes=flags.TRAINING,
                        help='number of epochs between two snapshots Model/netG_epoch_N.pth '
                             f'(default: {SNAPSHOT_INTERVAL})')
    options, resumed = config.parse_options(parser, flags.mode_of, KEYS, translate, HERE)
    return (complete(options, resumed) if options.train else options), resumed


def complete(options, resumed):
    """Set the defaults that depend on the stage to train. Raises UserError if options contradict the stage."""
    run.complete(options, stage=1)
    run_stage = run.read_options(resumed).get('stage') if resumed else options.stage
    if run_stage not in list(NAMES):  # in a damaged run it may be a list, which a dict cannot look up
        raise UserError(f'{resumed}: not a run of StackGAN; give one, or --resume alone for the newest')
    if options.stage != run_stage:
        raise UserError(f'{resumed}: a run of Stage-{"I" * run_stage}; leave out --stage {options.stage}')
    if options.stage1 and options.stage == 1:
        raise UserError(f'--stage1 {options.stage1}: only Stage-II reads a trained Stage-I; add --stage 2')
    if options.stage == 2 and not (options.stage1 or options.checkpoint or resumed):
        raise UserError('--stage 2: needs a trained Stage-I whose images it refines; name its run with --stage1')
    if options.stage == 1:
        run.refuse_given(['residuals'], 'in Stage-I, which has no residual blocks')
    if options.gf_dim < NARROWEST[options.stage]:
        raise UserError(f'--gf_dim {options.gf_dim}: too narrow; give {NARROWEST[options.stage]} or more')
    run.complete(options, config_name=NAMES[options.stage], lr_decay_epoch=LR_DECAY_EPOCHS[options.stage])
    return options


def main():
    """Parse the flags, then train, evaluate, or generate images for sentences."""
    options, resumed = parse_flags()
    device = flags.set_up(options)
    task = train if options.train else evaluate if flags.mode_of(options) == flags.EVALUATE else generate
    with checked_files.only_read(options.dry_run):
        task(options, device, resumed)
    ranks.leave()


def train(options, device, resumed):
    """Train a stage in a new run folder, or resume the run in the folder `resumed`."""
    print('Loading data...', flush=True)
    dataset = CroppedDataset(flags.dataset_file(options), split=0, size=SIZES[options.stage])
    reading.require_embeddings(dataset)
    stage1 = load_stage1(options, resumed, dataset) if options.stage == 2 else None
    run.complete(options, z_dim=stage1.z_dim if stage1 else Z_DIM)
    networks = make_networks(stage1, options.gf_dim, options.df_dim, options.z_dim, dataset.embed_dim,
                             options.condition_dim, options.residuals, device)
    batches = shuffled_batches(dataset, options.batch_size, options.workers, device)
    run.check_batches(options.batch_size, len(batches.sampler))
    model = Model(options.model, device, batches, *networks, options.kl_coef)
    heads = [head for head in (model.netD.get_cond_logits, model.netD.get_uncond_logits) if head is not None]
    speed.prepare(model.netG, [model.netD], heads, device=device, precision=options.precision, compile=options.compile,
                  accumulate=options.accumulate, batch_size=options.batch_size)
    if options.checkpoint and not resumed:
        model.load_from(run.existing(options.checkpoint, options.model, checkpoints.find))
        reading.print_other_encoder(model.data, dataset, options.checkpoint)
    model.create_optim(options.lr)
    run_dir = run.begin(model, [model.netG, model.netD], resumed, options.out_dir,
                        f'{options.dataset}_{options.config_name}', vars(options), reading.describe(dataset),
                        dataset.cached if options.cache else None, options.dry_run)
    model.lr_decay_epoch, model.snapshot_interval = options.lr_decay_epoch, options.snapshot_interval
    model.keep = options.keep
    if options.dry_run:
        return dry_run.report(model, {'netG': model.netG, 'netD': model.netD}, options.epochs, options.log_interval,
                              run_dir, caches=checked_files.planned(), sample=model.sample_grid,
                              copied={run.ENCODER: reading.bytes_to_keep(dataset, run_dir)},
                              snapshot=lambda place: model.save_snapshot(place, options.epochs),
                              snapshot_steps=options.snapshot_interval * len(batches))
    if run_dir:
        reading.keep_encoder(dataset, run_dir)
    print(f'Training Stage-{"I" * options.stage} on {len(dataset)} photographs; everything goes to {run_dir}',
          flush=True)
    model.train(options.epochs, options.log_interval, run_dir)
    print(f'done: {run_dir} holds samples/, log.txt, TensorBoard curves, {options.model}.pt and Model/')


def load_stage1(options, resumed, dataset):
    """Return the trained Stage-I generator of `--stage1`, or the one in the Stage-II checkpoint to continue from.

    Raises UserError if there is none, if its noise has another length than `--z_dim`, or if it was trained on other
    embeddings than those of `dataset`.
    """
    if inside := resumed or options.checkpoint:
        model, file, _ = load_generator(run.existing(inside, options.model, checkpoints.find), options.model, stage=2)
        stage1 = model.netG.STAGE1_G
        if options.stage1 and not resumed:
            print(f'--stage1 {options.stage1}: not read, because the Stage-II in {file} has its own Stage-I')
    else:
        model, file, _ = load_generator(run.existing(options.stage1, options.model, checkpoints.find), options.model,
                                        stage=1)
        stage1 = model.netG
    if options.z_dim not in (None, stage1.z_dim):
        raise UserError(f'--z_dim {options.z_dim}: the Stage-I in {file} was trained with {stage1.z_dim}; '
                        'leave out --z_dim')
    if not resumed:  # in a resumed run, `run.begin` compares the data
        reading.check_embeddings(model.data, dataset, file, stage1.text_dim)
    return stage1


def evaluate(options, device, resumed):
    """Generate an image for every caption of classes that are not in the training data."""
    file = run.checkpoint_file(options.model, options.out_dir, options.checkpoint, resumed, checkpoints.find,
                               dataset=options.dataset, stage=options.stage, data_dir=options.data_dir)
    model, file, epochs = load_generator(file, options.model, device, options.stage)
    dataset = reading.require_embeddings(CroppedDataset.held_out(flags.dataset_file(options)))
    if options.checkpoint or resumed:
        run.refuse_given(['out_dir'], 'in an evaluation of a given run, which writes beside its checkpoint')
    reading.check_embeddings(model.data, dataset, file, model.netG.text_dim)
    speed.prepare_evaluation(model.netG, device)
    print(f'{file} generates images for {len(dataset.captions)} captions of /{dataset.split}', flush=True)
    write_evaluation(os.path.join(os.path.dirname(file), f'epoch{epochs}'), dataset,
                     lambda embed, seed: model.generate(embed, seed)[-1], options.batch_size, options.seed)


def generate(options, device, resumed):
    """Generate images for each sentence of `--text` and `--text_file`, or an image like that of `--like`.

    Stage-II adds a sheet with both stages.
    """
    like = provenance.read(options.like)
    sentences = provenance.sentences(like, options.text, options.text_file)
    given = options.checkpoint or provenance.checkpoint(like, resumed, options.out_dir)
    file = run.checkpoint_file(options.model, options.out_dir, given, resumed, checkpoints.find,
                               dataset=run.if_given('dataset', options.dataset), stage=options.stage,
                               data_dir=options.data_dir)
    model, file, _ = load_generator(file, options.model, device, options.stage)
    data_file = flags.dataset_file(options)
    embeddings, encoder = reading.read(sentences, file, model.data, options.encoder, data_file,
                                       device, model.netG.text_dim)
    made_with = provenance.made_with(file, model.netG.state_dict(), encoder)
    provenance.check(like, made_with, options.checkpoint or resumed)
    sentences, embeddings = flags.repeated(sentences, embeddings, options.count, options.best_of)
    how = options.batch_size, options.seed, options.truncation, like
    batches = zip(in_batches(model.generate, embeddings, *how), provenance.records(sentences, *how, made_with))
    if options.best_of > 1:
        size = SIZES[2 if isinstance(model.netG, Stage2Generator) else 1]
        real = realism.of_run(file, model, f'crop_{size}', functools.partial(CroppedDataset, size=size), device,
                              data_file)
        batches = realism.keep_best(batches, options.best_of, real.distances)
    write_images(run.new_run(options.out_dir, 'text', vars(options)), batches, sentences[::options.best_of],
                 'stages.png')


if __name__ == '__main__':
    run_command(main)
