"""Train the sentence encoder, evaluate it on unseen classes, search images, or write embeddings.

    python main.py --train                                      train on data/birds/birds.hdf5
    python main.py --train --resume                             continue the newest run
    python main.py --train False                                classify and retrieve photographs of held-out classes
    python main.py --train False --query "a small red bird"     find the held-out photographs that match best
    python main.py --embed                                      write the embeddings of all captions into the HDF5 file
"""
import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from common import signals

if __name__ == '__main__':
    signals.end_at_once()  # the imports below take seconds

import argparse

import torch

from char_cnn_rnn import image_encoder, reading
from char_cnn_rnn.build_encoder import ClassBatches, Model, embed_captions, fingerprint, load_encoder, save_encoder
from char_cnn_rnn.encoder import VARIANTS
from common import checkpoint, dry_run, flags, ranks, run, speed
from common.errors import UserError, run_command
from common.pictures import caption_sheet
from data import checked_files, layout
from data.cache import load_split
from data.embedding import embed_file
from data.pictures import read_picture

EMBED, QUERY = 'embed', 'query'  # modes that only this section has
MODES = (*flags.TRAINING, flags.EVALUATE, QUERY, EMBED)
FOUND = 8  # photographs shown per query


def parse_flags():
    """Return (options, folder of the run to resume or None)."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_run_flags(parser, model='char_cnn_rnn', epochs=100, batch_size=40, lr=0.0007, section_dir=HERE,
                        all_modes=MODES, seed_modes=(flags.TRAIN,), resume_modes=(flags.RESUME,),
                        train_modes=MODES[:-1])
    parser.add_argument('--variant', choices=VARIANTS, default='birds_icml', modes=flags.TRAINING,
                        help='network variant (default: birds_icml, which the chapter and StackGAN use)')
    parser.add_argument('--image_encoder', choices=image_encoder.CHOICES, default='efficientnet_lite0',
                        modes=(*flags.TRAINING, flags.EVALUATE, QUERY),
                        help='what computes the features of photographs: a pretrained network; color_grid, which '
                             'records the colors at each place of an image; or scratch, a small network trained '
                             'jointly with the encoder (default: efficientnet_lite0)')
    parser.add_argument('--image_weights', type=flags.path, metavar='FILE',
                        modes=(*flags.TRAINING, flags.EVALUATE, QUERY),
                        help='file of ImageNet weights for googlenet (default: download them)')
    flags.add_precision_flag(parser)
    flags.add_boolean(parser, '--embed', False, 'write the embeddings of all captions into the HDF5 file',
                      modes=MODES)
    parser.add_argument('--encoder', type=flags.path, metavar='FILE', modes=(flags.EVALUATE, QUERY, EMBED),
                        help='encoder to evaluate or embed with, a .pt or .t7 file (default: that of the newest run '
                             'on DATASET)')
    parser.add_argument('--query', action='append', metavar='SENTENCE', modes=(QUERY,),
                        help='with --train False: show the photographs that match this sentence best; can be '
                             'repeated')
    return run.parse_options(parser, mode_of)


def mode_of(options):
    """Return the mode that the options select, one of `MODES`."""
    return EMBED if options.embed else flags.mode_of(options, QUERY)


def main():
    """Parse the flags, then train, evaluate, or write embeddings."""
    options, resumed = parse_flags()
    if ranks.world_size() > 1:
        raise UserError('the encoder runs in a single process; start it with python, not with torchrun')
    flags.print_options(options)
    device = flags.choose_device(options.cuda)
    flags.seed_everything(options.seed)
    if options.embed:
        embed(options, device)
    elif options.train:
        with checked_files.only_read(options.dry_run):
            train(options, device, resumed)
    else:
        evaluate(options, device)


def train(options, device, resumed):
    """Train in a new run folder, or resume the run in the folder `resumed`."""
    refuse_weights(options, options.image_encoder)
    path = flags.dataset_file(options)
    split = load_split(path, 'train')
    index = split.index
    if not index.names:
        raise UserError(f'{path}: /train is empty; prepare the data with photographs to train on')
    if len(set(index.classes)) < 2:
        raise UserError(f'{path}: all {len(index.names)} photographs of /train are of one class, and an encoder learns '
                        'by telling classes apart; prepare the data with at least two classes')
    reading.print_unread_captions(path, index.captions)
    run.check_batches(options.batch_size, len(index.names))
    photographs = load_photographs(options, path, 'train', device)
    model = Model(options.model, device, ClassBatches(index, photographs, options.batch_size),
                  options.variant, options.image_encoder)
    speed.prepare_network(model.encoder, device=device, precision=options.precision)
    model.create_optim(options.lr)
    data = {'file': os.path.basename(path), **split.fingerprint, 'embeddings': None}  # not used here
    run_dir = run.begin(model, [], resumed, options.out_dir, options.dataset, vars(options), data,
                        dry_run=options.dry_run)
    model.keep = options.keep
    if options.dry_run:
        return dry_run.report(model, {'encoder': model.encoder, 'image_side': model.image_side}, options.epochs,
                              options.log_interval, run_dir, caches=checked_files.planned())
    print(f'Training on {len(index.captions)} captions of {len(index.names)} photographs of '
          f'{len(set(index.classes))} classes; everything goes to {run_dir}', flush=True)
    model.train(options.epochs, options.log_interval, run_dir)
    print(f'done: {run_dir} holds log.txt, TensorBoard curves and {options.model}.pt')


def refuse_weights(options, name):
    """Raise UserError if --image_weights was typed, unless the image encoder `name` reads them."""
    if name != 'googlenet':
        run.refuse_given(['image_weights'], f'with --image_encoder {name}, only with googlenet')


def load_photographs(options, path, split, device):
    """Return the input of the image side `--image_encoder`: one row per photograph of the split."""
    return image_encoder.load_photographs(options.image_encoder, path, split, options.image_weights, device)


def evaluate(options, device):
    """Print zero-shot accuracy and retrieval on held-out classes, and show what the `--query` sentences find."""
    path = flags.dataset_file(options)
    model, source = load_model(options, device)
    reading.print_other_data(model.data, path, source)
    split = next((split for split in ('test', 'valid') if load_split(path, split).index.names), None)
    if not split:
        raise UserError(f'{path}: no photographs in /test or /valid to evaluate with; prepare the data with a split')
    index = load_split(path, split).index
    photographs = image_encoder.load_photographs(model.image_encoder, path, split, options.image_weights, device)
    print(f'{source} on {len(index.names)} photographs of {len(set(index.classes))} classes of /{split}:', flush=True)
    found = model.eval(index, photographs)
    print(f'  top-1 accuracy {found["top1"]:.1%}   (chance {found["chance_top1"]:.1%})\n'
          f'  mAP@50         {found["ap50"]:.1%}   (chance {found["chance_ap50"]:.1%})')
    if options.query:
        queries = flags.read_sentences(options.query, None, '--query')
        reading.print_unread(queries)
        folder = run.new_run(options.out_dir, 'query', vars(options))
        sheet = os.path.join(folder, 'sheet.png')
        best_pictures(model, path, split, index, photographs, queries).save(sheet)
        print(f'the {min(FOUND, len(index.names))} photographs that match each sentence best: {sheet}')


def encoder_file(options):
    """Return the file of `--encoder`, which may name its run, or that of the newest run on the data set.

    Raises UserError if there is none.
    """
    if options.encoder:
        file = checkpoint.find(options.encoder, options.model)
        if not os.path.isfile(file):
            raise UserError(f'--encoder {options.encoder}: no sentence encoder there; give a run of this program, its '
                            f'{options.model}.pt, the encoder.pt of a GAN\'s run, or the published FILE.t7')
        return file
    return run.checkpoint_file(options.model, options.out_dir, None, None, dataset=options.dataset,
                               data_dir=options.data_dir)


def load_model(options, device):
    """Return (Model of `--encoder` or of the newest run on the data set, file it was read from)."""
    source = encoder_file(options)
    contents = {} if source.endswith('.t7') else checkpoint.load(source)
    name = contents.get('image_encoder', options.image_encoder)
    if 'image_encoder' in run.GIVEN_FLAGS and name != options.image_encoder:
        raise UserError(f'--image_encoder {options.image_encoder}: {source} was trained with another; leave it out')
    encoder = load_encoder(source, device)
    model = Model(options.model, device, None, encoder.variant, name)
    refuse_weights(options, name)
    if 'image_side' in contents:
        model.load_from(source, verbose=False)
    elif name == 'googlenet':
        model.encoder = encoder
    else:
        raise UserError(f'{source}: has no image side, so it can be evaluated only with the features that it was '
                        'trained with; give the char_cnn_rnn.pt of its training, or add --image_encoder googlenet if '
                        'these were GoogLeNet\'s')
    return model, source


def best_pictures(model, path, split, index, photographs, queries):
    """Return one PIL image: per query, a row of the photographs that score highest, best first, with their classes."""
    embeddings = torch.from_numpy(embed_captions(model.encoder, queries, verbose=False))
    best = (embeddings @ model.embed_photographs(photographs).T).topk(min(FOUND, len(index.names))).indices.tolist()
    images, captions = [], []
    jpegs = load_split(path, split).jpegs
    for query, photos in zip(queries, best):
        print(f'  {query}: {", ".join(index.names[photo] for photo in photos)}')
        images += map(read_picture, jpegs.read(photos))
        captions += [index.classes[photo].replace('_', ' ') for photo in photos]
        captions[-len(photos)] = f'"{query}": {captions[-len(photos)]}'
    return caption_sheet(images, captions, columns=len(best[0]))


def embed(options, device):
    """Write the embeddings of all captions into the HDF5 file, and save the encoder beside it."""
    path = flags.dataset_file(options)
    source = encoder_file(options)
    encoder = load_encoder(source, device)
    print(f'{source} embeds the captions of {path}', flush=True)
    if not source.endswith('.t7'):
        _, data = checkpoint.checked_metadata(checkpoint.load(source, mapped=True), source)
        reading.print_other_data(data, path, source)

    def embed_all(indexes):
        reading.print_unread_captions(path, sum((index.captions for index in indexes.values()), []))
        rows = {split: embed_captions(encoder, index.captions) for split, index in indexes.items()}
        return rows, f'{encoder.variant}, {os.path.basename(source)}', fingerprint(encoder)

    count = embed_file(path, layout.EMBED_DIM, os.path.getsize(source), embed_all)
    beside = save_encoder(encoder, path)
    print(f'done: {count} embeddings in {path}, their encoder in {beside}')


if __name__ == '__main__':
    run_command(main)
