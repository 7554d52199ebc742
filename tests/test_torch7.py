"""Reading the authors' Torch7 file, written as their Lua code builds it, returns the original weights."""
import functools
import time

import numpy as np
import pytest
import torch

from char_cnn_rnn import encoder
from char_cnn_rnn.build_encoder import load_encoder
from char_cnn_rnn.torch7 import read_encoder
from common import torch7_file
from common.errors import UserError
from tests import fuzz_torch7
from tests.golden_numbers import fill
from tests.torch7_writer import Table, Tensor, Torch, dumps

DIM, STEPS = 6, 5  # narrow and short: neither is written down in the reader


@pytest.fixture(params=['birds_icml', 'birds_cvpr'])
def weights(request, monkeypatch):
    """Return the name of a variant and a narrow state dict of it."""
    _, pooling, recurrent = encoder.VARIANTS[request.param]
    monkeypatch.setitem(encoder.VARIANTS, request.param, (DIM, pooling, recurrent))
    return request.param, fill(encoder.CharCnnRnn(request.param)).state_dict()


class Lua:
    """Build what nn and nngraph build: modules, clones that share storages, and the nodes of graphs."""

    def __init__(self, state):
        self.arrays = {key: value.numpy().copy() for key, value in state.items()}

    def linear(self, name):
        """Return a new module with new tensors over the storages that all modules of this name share."""
        return Torch('nn.Linear', train=False, _type='torch.FloatTensor', weight=Tensor(self.arrays[f'{name}.weight']),
                     bias=Tensor(self.arrays[f'{name}.bias']), output=Tensor(np.empty(0, np.float32)))

    def convolution(self, name):
        weight = self.arrays[f'{name}.weight']
        size, channels, kernel = weight.shape
        flat = np.ascontiguousarray(weight.transpose(0, 2, 1)).reshape(size, kernel * channels)
        # As in flattened parameters: the weight is a view into a storage that begins with something else.
        storage = np.concatenate([np.full(7, np.nan, np.float32), flat.ravel()])
        return Torch('nn.TemporalConvolution', inputFrameSize=channels, outputFrameSize=size, kW=kernel, dW=1,
                     weight=Tensor(storage, flat.shape, (kernel * channels, 1), 8),
                     bias=Tensor(self.arrays[f'{name}.bias']))

    def convolutions(self):
        modules = []
        for name in ('conv1', 'conv2', 'conv3'):
            modules += [self.convolution(name), Torch('nn.Threshold', threshold=1e-6, val=0),
                        Torch('nn.TemporalMaxPooling', kW=3, dW=3)]
        return modules[:-1] + [Torch('nn.SplitTable', dimension=1)]


def node(module, *parents):
    """Return the data of an nngraph node; its `mapindex` maps positions to parents and parents to positions."""
    mapindex = Table()
    for place, parent in enumerate(parents, 1):
        mapindex[place], mapindex[parent] = parent, place
    data = Table(annotations=Table(), mapindex=mapindex)
    if module is not None:
        data['module'] = module
    return data


def nodes_before(output):
    """Return `output` and all nodes that it needs, outputs first."""
    found = [output]
    for data in found:
        found += [parent for parent in data['mapindex'].values()
                  if isinstance(parent, Table) and all(parent is not other for other in found)]
    return found


def graph(output, order=reversed):
    """Return an nn.gModule; the order of its nodes is not that of their construction."""
    nodes = [Torch('nngraph.Node', data=data, id=i, children=[]) for i, data in enumerate(order(nodes_before(output)))]
    modules = [one.fields['data']['module'] for one in nodes if 'module' in one.fields['data']]
    return Torch('nn.gModule', modules=modules, forwardnodes=nodes, nInputs=STEPS, verbose=False,
                 fg=Torch('graph.Graph', nodes=nodes), bg=Torch('graph.Graph', nodes=nodes[::-1]))


def unrolled_gru(lua):
    """Return the GRU of FixedGRU.lua, in which every step clones its Linears."""
    inputs = [node(Torch('nn.Identity')) for _ in range(STEPS)]
    state = node(Torch('nn.Tanh'), node(lua.linear('rnn.i2h'), inputs[0]))
    states = [state]
    for x in inputs[1:]:
        def joined(name, hidden, x=x):
            return node(Torch('nn.CAddTable'), node(lua.linear(f'rnn.i2h{name}'), x),
                        node(lua.linear(f'rnn.h2h{name}'), hidden))
        update = node(Torch('nn.Sigmoid'), joined('_update', state))
        reset = node(Torch('nn.Sigmoid'), joined('_reset', state))
        candidate = node(Torch('nn.Tanh'), joined('', node(Torch('nn.CMulTable'), reset, state)))
        minus = node(Torch('nn.MulConstant', constant_scalar=-1), update)
        rest = node(Torch('nn.AddConstant', constant_scalar=1), minus)
        state = node(Torch('nn.CAddTable'), node(Torch('nn.CMulTable'), update, candidate),
                     node(Torch('nn.CMulTable'), rest, state))
        states.append(state)
    return node(Torch('nn.MulConstant', constant_scalar=1 / STEPS), node(Torch('nn.CAddTable'), *states))


def unrolled_rnn(lua):
    """Return the RNN of FixedRNN.lua; its inputs are parts of one node, which has no module in nngraph."""
    whole = node(Torch('nn.Identity'))
    inputs = [node(None, whole) for _ in range(STEPS)]
    state = node(Torch('nn.ReLU'), node(lua.linear('rnn.i2h'), inputs[0]))
    states = [state]
    for x in inputs[1:]:
        state = node(Torch('nn.ReLU'), node(Torch('nn.CAddTable'), node(lua.linear('rnn.i2h'), x),
                                            node(lua.linear('rnn.h2h'), state)))
        states.append(state)
    return node(Torch('nn.MulConstant', constant_scalar=1 / STEPS), node(Torch('nn.CAddTable'), *states))


def document_encoder(variant, lua):
    if variant == 'birds_icml':  # all in one graph, with the convolutions and the recurrent net as nodes of it
        convolutions = node(Torch('nn.Sequential', modules=lua.convolutions()), node(Torch('nn.Identity')))
        recurrent = node(graph(unrolled_gru(lua)), convolutions)
        return graph(node(lua.linear('emb_proj'), recurrent))
    return Torch('nn.Sequential', modules=[*lua.convolutions(), graph(unrolled_rnn(lua), list), lua.linear('emb_proj')])


def save(path, document):
    protos = {'enc_doc': document, 'enc_image': Torch('nn.Linear', weight=Tensor(np.ones((1024, 1024), np.float32)))}
    path.write_bytes(dumps({'opt': {'avg': 1, 'savefile': 'sje', 'symmetric': True}, 'protos': protos, 'vocab': None}))
    return str(path)


def assert_one_line(path, match=None):
    with pytest.raises(UserError, match=match) as caught:
        read_encoder(str(path))
    assert str(path) in str(caught.value) and '\n' not in str(caught.value)


def test_the_weights_are_read_back(tmp_path, weights):
    variant, state = weights
    path = save(tmp_path / 'lm_sje.t7', document_encoder(variant, Lua(state)))
    read = read_encoder(path)
    assert set(read) == set(state)
    assert all(torch.equal(read[key], value) for key, value in state.items())


def test_load_encoder_reads_torch7_files(tmp_path, monkeypatch):
    monkeypatch.setitem(encoder.VARIANTS, 'birds_icml', (DIM, False, encoder.AverageGRU))
    net = fill(encoder.CharCnnRnn('birds_icml')).eval()
    path = save(tmp_path / 'lm_sje.t7', document_encoder('birds_icml', Lua(net.state_dict())))
    letters = encoder.one_hot(['a red bird'])
    with torch.no_grad():
        assert torch.equal(load_encoder(path)(letters), net(letters))


def test_without_a_graph_roles_follow_the_order(tmp_path, weights):
    variant, state = weights
    lua = Lua(state)
    recurrent = dict.fromkeys(key.rpartition('.')[0] for key in state if key.startswith('rnn.'))
    listed = Torch('nn.Sequential', modules=[lua.linear(name) for _ in range(STEPS) for name in recurrent])
    modules = [*lua.convolutions(), listed, lua.linear('emb_proj')]
    read = read_encoder(save(tmp_path / 'a.t7', Torch('nn.Sequential', modules=modules)))
    assert set(read) == set(state) and all(torch.equal(read[key], value) for key, value in state.items())
    listed.fields['modules'].append(lua.linear('emb_proj'))
    listed.fields['modules'][0] = Torch('nn.Linear', weight=Tensor(np.ones((DIM, DIM), np.float32)))
    assert_one_line(save(tmp_path / 'b.t7', Torch('nn.Sequential', modules=modules)), 'not have 2 or 6 linear layers')


def test_steps_with_different_weights_are_refused(tmp_path, weights):
    variant, state = weights
    recurrent = (unrolled_gru if variant == 'birds_icml' else unrolled_rnn)(Lua(state))
    linear = next(data['module'] for data in nodes_before(recurrent)
                  if 'module' in data and data['module'].kind == 'nn.Linear')
    linear.fields['bias'] = Tensor(np.ones(DIM, np.float32))
    assert_one_line(save(tmp_path / 'a.t7', graph(recurrent)), 'not the same in all steps')


@pytest.mark.parametrize('size, stride, offset', [
    ((10 ** 6, DIM), (DIM, 1), 1), ((DIM, DIM), (DIM, 1), 2), ((DIM, DIM), (-1, 1), 1), ((10 ** 7, 10 ** 7), (0, 0), 1),
    ((DIM, DIM), (DIM, 1), -5), ((DIM, -DIM), (DIM, 1), 1)])
def test_wrong_sizes_are_refused(tmp_path, size, stride, offset):
    linear = Torch('nn.Linear', bias=Tensor(np.ones(DIM, np.float32)),
                   weight=Tensor(np.ones((DIM, DIM), np.float32), size, stride, offset))
    assert_one_line(save(tmp_path / 'a.t7', graph(node(Torch('nn.Tanh'), node(linear, node(Torch('nn.Identity')))))))


def test_other_contents_are_refused(tmp_path):
    assert_one_line(tmp_path / 'absent.t7', 'no such file')
    inner = Torch('nn.Linear')
    inner.fields = Torch('nn.Linear')
    for number, value in enumerate((None, 3, 'text', {}, Tensor(np.ones(3)), {'protos': 3}, {'protos': {}},
                                    {'protos': {'enc_doc': None}}, {'protos': {'enc_doc': inner}}, inner)):
        path = tmp_path / f'{number}.t7'
        path.write_bytes(dumps(value))
        assert_one_line(path, 'holds no character CNN-RNN')


def test_damaged_files_are_one_line_errors(tmp_path):
    numbers = np.random.RandomState(0)
    lua = Lua({f'rnn.{side}2h{gate}.{part}': torch.ones((DIM, DIM) if part == 'weight' else DIM)
               for side in 'ih' for gate in ('', '_update', '_reset') for part in ('weight', 'bias')})
    path = tmp_path / 'a.t7'
    whole = open(save(path, graph(unrolled_gru(lua))), 'rb').read()
    read_encoder(str(path))
    for length in (0, 3, 10, *numbers.randint(11, len(whole), 15).tolist()):
        path.write_bytes(whole[:length])
        assert_one_line(path)
    for _ in range(30):
        place = numbers.randint(len(whole) - 4)
        path.write_bytes(whole[:place] + numbers.bytes(4) + whole[place + 4:])
        try:
            read_encoder(str(path))
        except UserError as error:
            assert '\n' not in str(error)
    path.write_bytes(b'<html>404</html>\n')
    assert_one_line(path, 'not a Torch7 file, or damaged')


@pytest.mark.parametrize('name', [name for name in fuzz_torch7.ATTACKS if 'more' not in name])
def test_malicious_files_are_refused(tmp_path, name):
    """Wrong sizes and deep nesting are refused quickly, with no more memory than the file."""
    start = time.process_time()
    fuzz_torch7._read(fuzz_torch7._attack(name), str(tmp_path))
    assert time.process_time() - start < 30


def test_recursive_tables_are_refused(tmp_path):
    inner = Torch('nn.Linear')
    inner.fields['base'] = inner.fields
    path = tmp_path / 'a.t7'
    path.write_bytes(dumps({'protos': {'enc_doc': inner}}))
    found = torch7_file.read(str(path))['protos']['enc_doc']
    assert found.kind == 'nn.Linear' and found.fields['base'] is found.fields
    assert_one_line(path, 'holds no character CNN-RNN')


def test_a_stride_of_0_is_refused(tmp_path):
    path = tmp_path / 'a.t7'
    path.write_bytes(dumps({'txt': Tensor(np.ones(1, np.float32), (40_000, 40_000), (0, 0)),
                            'deep': functools.reduce(lambda inner, _: [inner], range(5000), 1.0)}))
    stored = torch7_file.read(str(path))
    with pytest.raises(ValueError, match='larger than its storage'):
        stored['txt'].array()
    assert list(stored['deep']) == [1.0]


def test_the_reader_reads_every_type(tmp_path):
    """Values of every kind, and arrays of every type at any place in a shared storage."""
    storage = np.arange(12, dtype=np.float32)
    value = {'n': None, 'yes': True, 'no': False, 'half': 0.5, 'text': b'\xe9t\xe9', 'list': [1, 2],
             'double': Tensor(np.ones(2)),
             'a': Tensor(storage, (2, 3), (6, 2), 2), 'b': Tensor(storage), 'empty': Tensor(np.empty(0, np.float32)),
             'long': Tensor(np.array([2 ** 60])), 'byte': Tensor(np.array([255], np.uint8))}
    path = tmp_path / 'a.t7'
    path.write_bytes(dumps(value))
    read = torch7_file.read(str(path))
    assert read['n'] is None and read['yes'] is True and read['no'] is False and read['half'] == 0.5
    assert read['text'] == 'été' and dict(read['list']) == {1: 1, 2: 2} and read['empty'].array().size == 0
    assert read['a'].array().tolist() == [[1, 3, 5], [7, 9, 11]] and not read['a'].array().flags.writeable
    assert np.array_equal(read['b'].array(), storage) and np.shares_memory(read['a'].array(), read['b'].array())
    assert read['long'].array().tolist() == [2 ** 60] and read['byte'].array().tolist() == [255]
    assert read['double'].array().dtype == np.float64
