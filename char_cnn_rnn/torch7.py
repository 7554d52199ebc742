"""Convert the authors' sentence encoder, a Torch7 file, to a state dict of `CharCnnRnn`.

Its layout is that of github.com/reedscot/cvpr2016, modules/HybridCNN.lua and FixedGRU.lua: `protos.enc_doc` contains
convolutions, an nngraph module that unrolls the recurrent network over its steps, and a Linear to 1,024. Convolutions
and that Linear have distinct shapes. The Linears of the recurrent network all have the same shape, and nngraph stores
them in an arbitrary order, so each is recognized by its connections:

    state[1] = Tanh(i2h(input))                                                          ReLU in the plain RNN
    gate[t]  = Sigmoid(CAddTable(i2h_*(input), h2h_*(state[t-1])))                       update and reset
    cand[t]  = Tanh(CAddTable(i2h(input), h2h(CMulTable(reset, state[t-1]))))            plain RNN: ReLU, h2h(state)
    state[t] = CAddTable(CMulTable(update, cand), CMulTable(1 - update, state[t-1]))

In the authors' code, the input comes first in the CAddTables. All steps share their weights, which is checked.

Some files hold only lists of modules, without connections. Their Linears are assumed to be in the order in which the
authors construct them, `GRU_ROLES` or `RNN_ROLES`; this cannot be checked.
"""
import os

import numpy as np
import torch

from char_cnn_rnn.encoder import EMBED_DIM
from common import torch7_file
from common.errors import UserError
from common.torch7_file import Object, Table

CONVOLUTIONS = {70: 1, 384: 2, 512: 3}  # number of input channels: which convolution
RNN_ROLES = ('i2h', 'h2h')
GRU_ROLES = ('i2h_update', 'h2h_update', 'i2h_reset', 'h2h_reset', *RNN_ROLES)
MOST = 2000  # layers or connections allowed in a file; an encoder of 18 steps has a few hundred


def read_encoder(path):
    """Return the state dict of the `CharCnnRnn` in a .t7 file.

    Raises UserError if the file is missing, damaged or holds another network.
    """
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such file')
    try:
        stored = torch7_file.read(path)
    except ValueError as error:
        raise UserError(f'{path}: not a Torch7 file, or damaged ({error}); download it again') from error
    try:
        return _state_dict(_table(_table(stored)['protos'])['enc_doc'])
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        raise UserError(f'{path}: holds no character CNN-RNN under protos.enc_doc '
                        f'({type(error).__name__}: {" ".join(str(error).split())[:200]}); give the published sentence '
                        'encoder, or that of a run of char_cnn_rnn/main.py') from error


def _state_dict(document_encoder):
    modules, nodes = _find(document_encoder)
    weights = {}
    for module in modules:
        kind, weight = _kind(module), _array(module, 'weight')
        if kind == 'TemporalConvolution':
            # [out, kernel * in], all channels of a position side by side -> [out, in, kernel]
            kernel = int(_table(module)['kW'])
            weight = weight.reshape(len(weight), kernel, -1).transpose(0, 2, 1)
            _set(weights, f'conv{CONVOLUTIONS[weight.shape[1]]}', weight, module)
        elif kind == 'Linear' and len(weight) == EMBED_DIM:
            _set(weights, 'emb_proj', weight, module)
    for role, module in dict.fromkeys(_roles_by_connection(nodes)) or _roles_by_order(document_encoder):
        _set(weights, f'rnn.{role}', _array(module, 'weight'), module)
    return weights


def _find(root):
    """Return all modules with a weight and all graph nodes (tables with `module` and `mapindex`) under `root`."""
    modules, nodes, seen, todo = [], [], set(), [root]
    while todo:
        item = todo.pop()
        table = _table(item)
        if id(table) in seen:
            continue
        seen.add(id(table))
        if 'weight' in table:
            modules.append(item)
        if 'mapindex' in table and 'module' in table:
            nodes.append(table)
        if len(modules) + len(nodes) > MOST:
            raise ValueError('it has more layers than any encoder')
        todo += [*table.keys(), *table.values()]
    return modules, nodes


def _roles_by_connection(nodes):
    """Yield (name, Linear) for every Linear of the unrolled recurrent network, named by its connections."""
    parents = {id(node): _numbered(node['mapindex']) for node in nodes}
    children = {}
    for node in nodes:
        for parent in parents[id(node)]:
            children.setdefault(id(parent), []).append(node)
    if sum(map(len, children.values())) > MOST:
        raise ValueError('it has more connections than any encoder')

    def feeds(node, *kinds):
        return [child for child in children.get(id(node), []) if _kind(child['module']) in kinds]

    for node in nodes:
        if _kind(node['module']) != 'Linear':
            continue
        for joined in feeds(node, 'CAddTable'):
            side = 'i2h' if parents[id(joined)][0] is node else 'h2h'
            for gate in feeds(joined, 'Sigmoid'):
                # Only the update gate is also used as 1 - update.
                yield f'{side}_update' if feeds(gate, 'MulConstant') else f'{side}_reset', node['module']
            if feeds(joined, 'Tanh', 'ReLU', 'Threshold'):
                yield side, node['module']
        if feeds(node, 'Tanh', 'ReLU', 'Threshold'):
            yield 'i2h', node['module']


def _roles_by_order(document_encoder):
    """Return pairs (name, Linear) for the distinct Linears of the recurrent network, named in their stored order."""
    distinct, seen, todo = {}, set(), [document_encoder]
    while todo:
        module = todo.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if _kind(module) == 'Linear' and _table(module)['weight'].size[:1] != (EMBED_DIM,):
            distinct.setdefault(_array(module, 'weight').tobytes(), module)
        if len(distinct) > len(GRU_ROLES):
            break
        todo += reversed(_numbered(_table(module).get('modules', {})))
    for roles in (RNN_ROLES, GRU_ROLES):
        if len(roles) == len(distinct):
            return zip(roles, distinct.values())
    raise ValueError(f'its recurrent network does not have {len(RNN_ROLES)} or {len(GRU_ROLES)} linear layers')


def _table(item):
    """Return the fields of a table or an object, or an empty table for anything else."""
    table = item.fields if isinstance(item, Object) else item
    return table if isinstance(table, Table) else Table()


def _numbered(table):
    """Return the values at 1, 2, 3, ... of a Lua table, which may have other keys as well."""
    return [table[i] for i in range(1, len(table) + 1) if i in table]


def _kind(module):
    return module.kind.rpartition('.')[2] if isinstance(module, Object) else ''


def _array(module, name):
    """Return a copy of a weight as float32. Raises ValueError if it points outside its stored data."""
    with np.errstate(over='ignore'):  # infinite weights are refused when they are loaded
        return np.array(_table(module)[name].array(), np.float32)


def _set(weights, name, weight, module):
    """Store weight and bias of a layer. Raises ValueError if they differ from those of another step."""
    pair = {f'{name}.weight': torch.from_numpy(np.ascontiguousarray(weight)),
            f'{name}.bias': torch.from_numpy(_array(module, 'bias'))}
    for key, value in pair.items():
        if not torch.equal(weights.setdefault(key, value), value):
            raise ValueError(f'{key} is not the same in all steps')
