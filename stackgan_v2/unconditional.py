"""StackGAN++ without text, on folders of images and on LSUN: its authors train it so, too; the chapter does not."""
from common import flags, run
from common.errors import UserError
from common.sampling import write_samples

COUNT = 64  # images of an evaluation


def add_flags(parser):
    """Add what a training without text reads, and how many images it generates."""
    parser.add_argument('--image_folder', type=flags.absolute_path, metavar='DIR', modes=flags.TRAINING,
                        help='train without text on the images in DIR/CLASS/')
    parser.add_argument('--lsun', type=flags.absolute_path, metavar='DIR', modes=flags.TRAINING,
                        help='train without text on DIR/CLASS_lmdb')
    parser.add_argument('--classes', nargs='+', action='extend', metavar='CLASS', modes=flags.TRAINING,
                        help='classes of --image_folder (default: all) or of --lsun, as in church_outdoor_train')
    flags.add_boolean(parser, '--conditional', None, 'read sentences', modes=flags.TRAINING)
    parser.add_argument('--count', type=flags.positive(int), modes=(flags.EVALUATE,),
                        help=f'number of images that a generator without text generates (default: {COUNT})')


def complete(options):
    """Fill in what follows from these options. Raises UserError where they contradict each other."""
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
    if options.train and not options.conditional:
        run.refuse_given(['kl_coef', 'embedding_dim'], 'without text')
    if options.train and without_text:
        run.refuse_given(['data_dir', 'cache'], f'with images of {without_text}')


def load_dataset(options):
    """Return the images of `--image_folder` or `--lsun`, a data set as in `data/image_folder.py`."""
    from data.image_folder import image_folder, lsun  # takes seconds to import: only where it is used
    if options.image_folder:
        return image_folder(options.image_folder, options.classes, options.branches)
    return lsun(options.lsun, options.classes, options.branches)


def evaluate(model, options):
    """Generate `--count` images."""
    write_samples(run.new_run(options.out_dir, 'sample', vars(options)),
                  lambda size, seed: model.generate(seed=seed, count=size)[-1],
                  options.count or COUNT, options.batch_size, options.seed)
