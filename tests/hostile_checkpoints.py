"""Damaged, malicious and edited checkpoints, for the tests and the fuzzer of checkpoints."""
import io
import pickle
import struct
import zipfile

import torch
from torch import nn

from char_cnn_rnn import build_encoder
from common.average import RunningAverage
from stackgan_v1 import build_gan as stackgan_v1
from stackgan_v2 import build_gan as stackgan_v2
from text2image import build_gan as text2image

# --- small models -----------------------------------------------------------------------------------------------------

def small_net(*_):
    """Return a convolution with a batch norm, in place of networks of a fixed width."""
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))


def small_model(name):
    """Return a Model of the section `name` (for 'stackgan_v1', of Stage-II) after one optimizer step."""
    torch.manual_seed(0)
    if name == 'text2image':
        model = text2image.Model.__new__(text2image.Model)
        model.name, model.device, model.netG, model.netD = name, torch.device('cpu'), small_net(), small_net()
        model.average_G = RunningAverage(model.netG)
    elif name == 'char_cnn_rnn':
        model = build_encoder.Model.__new__(build_encoder.Model)
        model.name, model.device, model.encoder, model.image_side = name, torch.device('cpu'), small_net(), small_net()
        model.encoder.variant, model.image_encoder = 'birds_cvpr', 'scratch'
    elif name == 'stackgan_v1':
        widths = {'gf_dim': 4, 'df_dim': 1, 'z_dim': 2, 'text_dim': 3, 'condition_dim': 2, 'residuals': 1}
        stage1 = stackgan_v1.make_networks(**widths)[0]
        model = stackgan_v1.Model(name, 'cpu', None, *stackgan_v1.make_networks(stage1, **widths))
    else:
        netG, netsD = stackgan_v2.make_networks(1, 4, 1, 2, 3, 2, 1)
        model = stackgan_v2.Model(name, 'cpu', None, netG, netsD)
    model.options, model.data, model.keep, model.progress = {'lr': 2e-4, 'text': None}, {}, 1, text2image.new_progress()
    model.create_optim(2e-4)
    rng = {'cpu': torch.get_rng_state(), 'cuda': []}
    model.progress |= {'epoch': 1, 'batch': 1, 'step': 3, 'rng': rng, 'epoch_rng': rng}
    model.data = {'file': 'a.hdf5', 'encoder': None, 'shown': ['a bird'], 'shown_embeddings': torch.ones(1, 4)}
    take_a_step(model)
    return model


def optimizers_of(model):
    if hasattr(model, 'optim'):
        return [model.optim]
    return [model.optim_G, *(model.optims_D if hasattr(model, 'optims_D') else [model.optim_D])]


def take_a_step(model):
    for optimizer in optimizers_of(model):
        for group in optimizer.param_groups:
            for parameter in group['params']:
                parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer.step()


def state_of(model):
    """Return copies of all tensors that loading a checkpoint may change."""
    nets = [value for value in vars(model).values() if isinstance(value, nn.Module)] + getattr(model, 'netsD', [])
    moments = [value for optimizer in optimizers_of(model) for state in optimizer.state.values()
               for value in state.values()]
    average = getattr(model, 'average_G', None)
    averaged = average.parameters if isinstance(average, RunningAverage) else getattr(model, 'averaged', [])
    return [value.clone() for value in (*(value for net in nets for value in net.state_dict().values()), *moments,
                                        *averaged)]


def contents_of(name, folder):
    return torch.load(small_model(name).save_to(str(folder), verbose=False), weights_only=True)


STRANGE = (lambda value: value.to(torch.complex64), lambda value: value if value.is_meta else value.to_sparse(),
           lambda value: value.to('meta'), lambda value: torch.zeros(3, 1).expand(3, 10 ** 7))  # that no file brings in


# --- edits of what is in a checkpoint ---------------------------------------------------------------------------------

def places_in(value, path=()):
    """Return the paths of all entries of nested dicts and lists, and of tuples as a whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        yield from places_in(part, (*path, key))


PLAIN = (lambda value: value.bool(), lambda value: value.double(), lambda value: value.half(),
         lambda value: value.long(), lambda value: value.flatten()[:-1], lambda value: value[None],
         lambda value: torch.full_like(value, -1), lambda value: value * torch.nan, lambda value: value + torch.inf,
         lambda value: nn.Parameter(value.float()), lambda value: torch.empty(0),
        lambda value: value.flatten()[:999].tolist())
OTHERS = (None, True, 0, -1, 2 ** 62, 10 ** 30, 1e308, float('nan'), float('inf'), -0.5, '', 'x', 'x' * 500,
          'two\nlines', [], [1], {}, {'a': 1}, {1: 2}, (), (1, 2), (0.5, 1.0), torch.ones(()), torch.ones(3),
          torch.zeros(5056, dtype=torch.uint8), [[]], [None], [{}], {'state': {}, 'param_groups': []},
          {'cpu': torch.ones(3), 'cuda': []})


def junk(rng, value, strange=True):
    """Return something that does not belong in the place of `value`."""
    if torch.is_tensor(value) and rng.random() < 0.7:
        return rng.choice((*PLAIN, *STRANGE) if strange else PLAIN)(value)
    return copied(rng.choice(OTHERS))  # a later edit may put something into it, even itself


def copied(value):
    """Return a copy of nested containers that shares their tensors."""
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    return [copied(part) for part in value] if isinstance(value, list) else value


def edited(contents, rng, edits, strange=True):
    """Return a copy of a checkpoint's contents with random entries removed, replaced, exchanged, renamed or added.

    With `strange`, entries are also replaced by kinds of tensors that no checkpoint should hold.
    """
    contents = copied(contents)
    for _ in range(edits):
        depth, places = rng.choice([1, 2, 3, 9]), list(places_in(contents))
        *path, key = rng.choice([path for path in places if len(path) <= depth])
        holder = contents
        for part in path:
            holder = holder[part]
        way = rng.choice(['remove', 'replace', 'replace', 'exchange', 'rename', 'add'])
        if way == 'remove':
            del holder[key]
        elif way == 'replace':
            holder[key] = junk(rng, holder[key], strange)
        elif way == 'exchange':
            other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            holder[key], holder[other] = holder[other], holder[key]
        elif isinstance(holder, dict):
            name = rng.choice(['', 'x', 'module.x', 7, 2 ** 30, f'module.{key}', 'netG', 'two\nlines', 'é' * 99])
            holder[name] = holder.pop(key) if way == 'rename' else junk(rng, holder[key], strange)
        else:
            holder.append(junk(rng, holder[key], strange))
        if not contents:
            break
    return contents


# --- files ------------------------------------------------------------------------------------------------------------

def dumps(contents, zipped=True):
    file = io.BytesIO()
    torch.save(contents, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def packed(data, method=zipfile.ZIP_STORED, replaced=None):
    """Return the zip archive `data` repacked with `method`, with the bytes of records in `replaced` exchanged."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(file, 'w', method) as written:
        for name in archive.namelist():
            short = name.partition('/')[2]
            written.writestr(name, (replaced or {}).get(short, archive.read(name)))
    return file.getvalue()


def with_pickle(program, numbers=4):
    """Return a checkpoint file with this data.pkl and one storage of `numbers` float32."""
    return packed(dumps({'a': torch.arange(float(numbers))}), replaced={'data.pkl': program})


def pickled(*parts):
    return b'\x80\x02' + b''.join(parts) + b'.'


def integer(value):
    return b'J' + struct.pack('<i', value)


def text(value):
    return b'X' + struct.pack('<I', len(value.encode())) + value.encode()


def tensor(numel=4, offset=0, size=(4,), stride=(1,), key='0', storage='FloatStorage', end=b'\x89ccollections\n'
           b'OrderedDict\n)R'):
    """Return the opcodes with which torch.save builds a tensor."""
    numbers = [b'(' + b''.join(map(integer, values)) + b't' for values in (size, stride)]
    return (b'ctorch._utils\n_rebuild_tensor_v2\n((' + text('storage') + f'ctorch\n{storage}\n'.encode() + text(key)
            + text('cpu') + integer(numel) + b'tQ' + integer(offset) + numbers[0] + numbers[1] + end + b'tR')


STATE_DICT = b'ccollections\nOrderedDict\n)R'


def entry(*value):
    """Return the opcodes of {'a': value}."""
    return pickled(b'}', text('a'), *value, b's')


NEST = 100_000
DOUBLING = b'K\x01K\x02\x86' + b''.join(b'q%c0h%ch%c\x86' % (i, i, i) for i in range(100))  # a tuple of 2^100 items
ATTACKS = {
    'tuples nested deep': pickled(b'}N', NEST * b'\x85', b'K\x01s'),
    'pairs whose keys are deep tuples': pickled(b'ccollections\nOrderedDict\n(]](N', NEST * b'\x85', b'K\x01eatR'),
    'a tuple of 2^100 items as a key': pickled(b'}', DOUBLING, b'K\x01s'),
    'a tuple of 2^100 items': entry(DOUBLING),
    'lists nested deep': entry(NEST * b']', (NEST - 1) * b'a'),
    'dicts nested deep': entry(NEST * (b'}' + text('a')), b'N', NEST * b's'),
    'a list in itself': entry(b']q\x00h\x00a'),
    'a storage that is longer than its record': entry(tensor(numel=10 ** 9, size=(10 ** 9,))),
    'a storage that reaches into the next record': entry(tensor(numel=100, size=(100,))),
    'a tensor that is longer than its storage': entry(tensor(size=(10 ** 9,))),
    'a tensor of one number many times': entry(tensor(size=(10 ** 9,), stride=(0,))),
    'a tensor that begins before its storage': entry(tensor(offset=-1, size=(1,))),
    'a tensor that ends behind its storage': entry(tensor(offset=1)),
    'a negative stride': entry(tensor(stride=(-1,))),
    'a negative size': entry(tensor(size=(-4,))),
    'sizes without strides': entry(tensor(stride=())),
    'a storage that is in no record': entry(tensor(key='7')),
    'a storage of another folder': entry(tensor(key='../0')),
    'a complex tensor': entry(tensor(storage='ComplexFloatStorage', numel=2, size=(2,))),
    'metadata': entry(tensor(end=b'\x89ccollections\nOrderedDict\n)R}' + text('neg') + b'\x88s')),
    'a tensor that a class makes': entry(b'ctorch\nFloatTensor\n', integer(2 ** 31 - 1), b'\x85R'),
    'bytes without end': entry(b'c__builtin__\nbytearray\n', integer(2 ** 31 - 1), b'\x85R'),
    'a tensor on no device': entry(b'ctorch._utils\n_rebuild_meta_tensor_no_storage\n', b'(NNNNtR'),
    'a state dict whose methods are text': entry(b'ccollections\nOrderedDict\n)R}', text('items'), text('x'), b'sb'),
    'the attributes of a tensor': entry(tensor(), b'}', text('data'), b'Nsb'),
    'keys that are floats': pickled(b'}G\x7f\xf0\x00\x00\x00\x00\x00\x00K\x01s'),
    'keys that collide': pickled(b'}(', b''.join(b'\x8a\x09' + (i * (2 ** 61 - 1)).to_bytes(9, 'little') + b'N'
                                                  for i in range(1000)), b'u'),
    'text of 4 GB': pickled(b'}X\xff\xff\xff\xff'),
    'a function that is called': entry(b'cos\nsystem\n', text('touch sprung'), b'\x85R'),
    'an object of a class': entry(b'ctorch.nn.parameter\nParameter\n)\x81'),
    'another protocol': b'\x80\x04' + pickle.dumps({'a': 1}, 4)[2:],
    'nothing': b'', 'no end': b'\x80\x02}', 'only an end': b'.', 'an empty stack': b'\x80\x020.',
    'a list': pickled(b']'), 'a number': pickled(b'K\x01'), 'a memo that is not there': pickled(b'h\x07'),
}
