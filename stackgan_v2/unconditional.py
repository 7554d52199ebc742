"""StackGAN++ without text, trained on folders of images or on LSUN as in the paper; the chapter does not cover it."""
from common import flags, run
from common.errors import UserError
from common.sampling import write_samples

COUNT = 64  # images of an evaluation


def add_flags(parser):
    """Add the flags that training and generating without text need."""
    parser.add_argument('--image_folder', type=flags.absolute_path, metavar='DIR', modes=flags.TRAINING,
                        help='train without text on the images in DIR/CLASS/')
    parser.add_argument('--lsun', type=flags.absolute_path, metavar='DIR', modes=flags.TRAINING,
                        help='train without text on the LSUN images in DIR/CLASS_lmdb')
    parser.add_argument('--classes', nargs='+', action='extend', metavar='CLASS', modes=flags.TRAINING,
                        help='classes of --image_folder (default: all) or of --lsun, for example church_outdoor_train')
    flags.add_boolean(parser, '--conditional', None, 'train with sentences; None means True, or False with '
                                                     '--image_folder or --lsun', modes=flags.TRAINING)
    parser.add_argument('--count', type=flags.positive(int), metavar='N', modes=(flags.EVALUATE, flags.TEXT),
                        help=f'number of images for each sentence (default: 1), or without text (default: {COUNT})')


def complete(options):
    """Set the defaults of the flags above. Raises UserError if options contradict each other."""
    without_text = options.image_folder or options.lsun
    if options.image_folder and options.lsun:
        raise UserError('--image_folder and --lsun: give only one of them')
    if options.lsun and not options.classes:
        raise UserError(f'--lsun {options.lsun}: add the classes to train on, as in --classes church_outdoor_train')
    if options.classes and not without_text:
        raise UserError('--classes: used only with --image_folder or --lsun; add one of them, or leave it out')
    run.complete(options, conditional=not without_text)
    if options.conditional and without_text:
        raise UserError(f'{without_text}: has no sentences; leave out --conditional True')
    if options.train and not options.conditional:
        run.refuse_given(['kl_coef', 'embedding_dim'], 'without text')
    if options.train and without_text:
        run.refuse_given(['data_dir', 'cache'], f'with images of {without_text}')


def load_dataset(options):
    """Return the data set of `--image_folder` or `--lsun`, as in `data/image_folder.py`."""
    from data.image_folder import image_folder, lsun  # imported here because it takes seconds
    if options.image_folder:
        return image_folder(options.image_folder, options.classes, options.branches)
    return lsun(options.lsun, options.classes, options.branches)


def evaluate(model, options):
    """Generate `--count` images and write them into a new run folder."""
    write_samples(run.new_run(options.out_dir, 'sample', vars(options)),
                  lambda size, seed: model.generate(seed=seed, count=size)[-1],
                  options.count or COUNT, options.batch_size, options.seed)
