"""Sentence encoder: train, measure how well it knows birds it has never seen, search, and write embeddings.

    python main.py --train                                      train on data/birds/birds.hdf5
    python main.py --train --resume                             go on with the newest run
    python main.py --train False                                classify and retrieve birds of held-out classes
    python main.py --train False --query "a small red bird"     the held-out pictures that match a sentence best
    python main.py --embed                                      write every caption's embedding into the HDF5 file
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

from char_cnn_rnn import image_encoder, reading
from char_cnn_rnn.build_encoder import ClassBatches, Model, embed_captions, fingerprint, load_encoder, save_encoder
from char_cnn_rnn.encoder import VARIANTS
from common import checkpoint, flags, ranks, run
from common.errors import UserError, run_command
from common.files import check_can_write
from common.pictures import caption_sheet
from data import layout
from data.cache import load_split
from data.checked_files import stamp_of
from data.pictures import read_picture

EMBED, QUERY = 'embed', 'query'  # modes of its own
MODES = (*flags.TRAINING, flags.EVALUATE, QUERY, EMBED)
FOUND = 8  # pictures shown for a query


def parse_flags():
    """(options, the folder of the run to go on with or None)."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_run_flags(parser, model='char_cnn_rnn', epochs=100, batch_size=40, lr=0.0007, chapter_dir=HERE,
                        all_modes=MODES, seed_modes=(flags.TRAIN,), resume_modes=(flags.RESUME,),
                        train_modes=MODES[:-1])
    parser.add_argument('--variant', choices=VARIANTS, default='birds_icml', modes=flags.TRAINING,
                        help='of the network (default: birds_icml, what StackGAN and the chapter use)')
    parser.add_argument('--image_encoder', choices=image_encoder.CHOICES, default='efficientnet_lite0',
                        modes=(*flags.TRAINING, flags.EVALUATE, QUERY),
                        help='features of photographs; scratch: a small network trained along '
                             '(default: efficientnet_lite0)')
    parser.add_argument('--image_weights', type=flags.path, metavar='FILE',
                        modes=(*flags.TRAINING, flags.EVALUATE, QUERY),
                        help='ImageNet weights of googlenet (default: download them)')
    flags.add_boolean(parser, '--embed', False, 'write the embeddings of all captions into the HDF5 file',
                      modes=MODES)
    parser.add_argument('--encoder', type=flags.path, metavar='FILE', modes=(flags.EVALUATE, QUERY, EMBED),
                        help='evaluate or embed with this .pt or .t7 file (default: with the newest run on DATASET)')
    parser.add_argument('--query', action='append', metavar='SENTENCE', modes=(QUERY,),
                        help='with --train False: show the pictures that match this sentence best; can be repeated')
    return run.parse_options(parser, mode_of)


def mode_of(options):
    """What the options ask for, one of `MODES`."""
    return EMBED if options.embed else flags.mode_of(options, QUERY)


def main():
    """Flags, then what they ask for: write embeddings, train, or evaluate."""
    options, resumed = parse_flags()
    if ranks.world_size() > 1:
        raise UserError('the encoder trains and reads in one process; start it with python, not with torchrun')
    flags.print_options(options)
    device = flags.choose_device(options.cuda)
    flags.seed_everything(options.seed)
    if options.embed:
        embed(options, device)
    elif options.train:
        train(options, device, resumed)
    else:
        evaluate(options, device)


def train(options, device, resumed):
    """Train in a new run folder, or continue the run in the folder `resumed`."""
    refuse_weights(options, options.image_encoder)
    path = flags.dataset_file(options)
    split = load_split(path, 'train')
    index = split.index
    if len(set(index.classes)) < 2:
        raise UserError(f'{path}: all {len(index.names)} photographs of /train are of one class, and an encoder learns '
                        'by telling classes apart; prepare the data with a class for each kind of thing in it')
    run.check_batches(options.batch_size, len(index.names))
    photographs = load_photographs(options, path, 'train', device)
    model = Model(options.model, device, ClassBatches(index, photographs, options.batch_size),
                  options.variant, options.image_encoder)
    model.create_optim(options.lr)
    data = {'file': os.path.basename(path), **split.fingerprint, 'embeddings': None}  # which it does not read
    run_dir = run.begin(model, [], resumed, options.out_dir, options.dataset, vars(options), data)
    model.keep = options.keep
    print(f'Training on {len(index.captions)} captions of {len(index.names)} pictures of {len(set(index.classes))} '
          f'classes; everything goes to {run_dir}', flush=True)
    model.train(options.epochs, options.log_interval, run_dir)
    print(f'done: {run_dir} holds log.txt, TensorBoard curves and {options.model}.pt')


def refuse_weights(options, name):
    """Raise UserError where --image_weights was typed for the image encoder `name`, which reads none."""
    if name != 'googlenet':
        run.refuse_typed(['image_weights'], f'with --image_encoder {name}, but with googlenet alone')


def load_photographs(options, path, split, device):
    """What the image side that `--image_encoder` names reads, a row per photograph of the split."""
    return image_encoder.load_photographs(options.image_encoder, path, split, options.image_weights, device)


def evaluate(options, device):
    """How well descriptions find birds of classes that were not trained on, and what the `--query` sentences find."""
    path = flags.dataset_file(options)
    model, source = load_model(options, device)
    split = next((split for split in ('test', 'valid') if load_split(path, split).index.names), None)
    if not split:
        raise UserError(f'{path}: has no photograph in /test or /valid to evaluate with')
    index = load_split(path, split).index
    photographs = image_encoder.load_photographs(model.image_encoder, path, split, options.image_weights, device)
    print(f'{source} on {len(index.names)} pictures of {len(set(index.classes))} classes of /{split}:', flush=True)
    found = model.eval(index, photographs)
    print(f'  top-1 accuracy {found["top1"]:.1%}   (chance {found["chance_top1"]:.1%})\n'
          f'  mAP@50         {found["ap50"]:.1%}   (chance {found["chance_ap50"]:.1%})')
    if options.query:
        queries = flags.read_sentences(options.query, None, '--query')
        reading.say_unread(queries)
        folder = run.new_run(options.out_dir, 'query', vars(options))
        sheet = os.path.join(folder, 'sheet.png')
        best_pictures(model, path, split, index, photographs, queries).save(sheet)
        print(f'the {FOUND} pictures that match each sentence best: {sheet}')


def encoder_file(options):
    """The file that `--encoder` names, itself or the run it is in, or that of the newest run on the data set."""
    if options.encoder:
        file = checkpoint.find(options.encoder, options.model)
        if not os.path.isfile(file):
            raise UserError(f'--encoder {options.encoder}: no sentence encoder there; give a run of this program, its '
                            f'{options.model}.pt, the encoder.pt of a GAN\'s run, or the published FILE.t7')
        return file
    return run.checkpoint_file(options.model, options.out_dir, None, None, dataset=options.dataset)


def load_model(options, device):
    """The model of `--encoder` or of the newest run on the data set, and the file it came from."""
    source = encoder_file(options)
    contents = {} if source.endswith('.t7') else checkpoint.load(source)
    name = contents.get('image_encoder', options.image_encoder)
    if 'image_encoder' in run.TYPED and name != options.image_encoder:
        raise UserError(f'--image_encoder {options.image_encoder}: {source} was trained with another; leave it out')
    encoder = load_encoder(source, device)
    model = Model(options.model, device, None, encoder.variant, name)
    refuse_weights(options, name)
    if 'image_side' in contents:
        model.load_from(source, verbose=False)
    elif name == 'googlenet':
        model.encoder = encoder
    else:
        raise UserError(f'{source}: an encoder without its image side can be evaluated only against the features it '
                        'was trained with: add --image_encoder googlenet where those were GoogLeNet\'s')
    return model, source


def best_pictures(model, path, split, index, photographs, queries):
    """One PIL image: a row per query, the pictures that score highest with it, best first, each with its class."""
    embeddings = torch.from_numpy(embed_captions(model.encoder, queries, verbose=False))
    best = (embeddings @ model.embed_photographs(photographs).T).topk(min(FOUND, len(index.names))).indices.tolist()
    pictures, captions = [], []
    jpegs = load_split(path, split).jpegs
    for query, photos in zip(queries, best):
        print(f'  {query}: {", ".join(index.names[photo] for photo in photos)}')
        pictures += map(read_picture, jpegs.read(photos))
        captions += [index.classes[photo].replace('_', ' ') for photo in photos]
        captions[-len(photos)] = f'"{query}": {captions[-len(photos)]}'
    return caption_sheet(pictures, captions, columns=len(best[0]))


def embed(options, device):
    """Give every caption of the file its embedding, and put the encoder beside the file."""
    path = flags.dataset_file(options)
    source = encoder_file(options)
    encoder = load_encoder(source, device)
    print(f'{source} reads the captions of {path}', flush=True)
    stamp = stamp_of(path) if os.path.exists(path) else None  # reading it says what is wrong
    captions = {split: load_split(path, split).index.captions for split in layout.SPLITS}
    check_can_write(layout.encoder_beside(path))  # before the embeddings are replaced by those of this encoder
    layout.check_room(path, sum(map(len, captions.values())), os.path.getsize(source))
    embeddings = {split: embed_captions(encoder, captions[split]) for split in layout.SPLITS}
    layout.write_embeddings(path, embeddings, f'{encoder.variant}, {os.path.basename(source)}',
                            fingerprint(encoder), stamp)
    beside = save_encoder(encoder, path)
    print(f'done: {sum(map(len, embeddings.values()))} embeddings in {path}, their encoder in {beside}')


if __name__ == '__main__':
    run_command(main)
