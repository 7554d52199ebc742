"""char_cnn_rnn: the networks against recorded numbers, and training, checkpoints and features on tiny data."""
import os
import signal
from collections import Counter

import numpy as np
import pytest
import torch

from char_cnn_rnn import build_encoder, encoder
from char_cnn_rnn.build_encoder import ClassBatches, Model, embed_captions, load_encoder
from char_cnn_rnn.encoder import ALPHABET, VARIANTS, CharCnnRnn, one_hot, sje_loss
from data import layout
from data.cache import load_split
from data.txt2image_dataset import preprocess
from tests.errors import one_line
from tests.golden_numbers import fill, golden, tensor_for
from tests.squares import write_squares

NUMBERS, FACTS = golden('char_cnn_rnn')


# --- the network ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('variant', VARIANTS)
def test_state_dict_has_the_published_keys(variant):
    state = CharCnnRnn(variant).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == FACTS['state_dict'][variant]


def test_one_hot_equals_the_recorded_tensor():
    letters = one_hot(FACTS['captions'])
    assert letters.shape == (4, 70, 201) and letters.dtype == torch.float32
    np.testing.assert_array_equal(letters.sum(1), NUMBERS['onehot_sum_per_char'])


@pytest.mark.parametrize('variant', ['flowers_icml', 'birds_cvpr'])
def test_embeddings_equal_the_recorded_ones(variant):
    with torch.no_grad():
        embeddings = fill(CharCnnRnn(variant)).eval()(one_hot(FACTS['captions']))
    torch.testing.assert_close(embeddings, torch.from_numpy(NUMBERS[variant]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('captions', [[''], ['a'], ['b' * 57, 'c'], ['d' * 145], ['e' * 201]])
@torch.no_grad()
def test_blank_steps_are_copied_not_computed(variant, captions, monkeypatch):
    net, letters = CharCnnRnn(variant), one_hot(captions)
    embeddings = net(letters)
    monkeypatch.setattr(encoder, '_without_blank_end', lambda letters: letters)
    torch.testing.assert_close(embeddings, net(letters), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def recorded_port(net, letters):
    """Compute what the recorded port computes: its first state [B, 1, D] is added to inputs [B, D].

From the second step on, this broadcasts to [B, B, D]: every sentence's state reads every sentence's letters, and the
    average goes over 1 + 17 B columns. Right for a batch of one, so the weights' names, shapes and formulas are right.
    """
    seen, rnn = [], net.rnn
    hook = rnn.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    net(letters)
    hook.remove()
    inputs = seen[0]                                                            # [B, 18, D]
    state = torch.tanh(rnn.i2h(inputs[:, 0])).unsqueeze(1)                      # [B, 1, D]
    states = [state]
    for t in range(1, inputs.shape[1]):
        x = inputs[:, t]
        update = torch.sigmoid(rnn.i2h_update(x) + rnn.h2h_update(state))       # [B, B, D]
        reset = torch.sigmoid(rnn.i2h_reset(x) + rnn.h2h_reset(state))
        state = update * torch.tanh(rnn.i2h(x) + rnn.h2h(reset * state)) + (1 - update) * state
        states.append(state)
    return net.emb_proj(torch.cat(states, dim=1).mean(1))


def test_embeddings_of_birds_icml_equal_the_recorded_port():
    # Ours embeds a sentence by itself, so it cannot meet numbers in which the sentences of a batch are mixed; with the
    # port's mistake replayed, the same weights do, and without other sentences in the batch there is no mistake.
    net, letters = fill(CharCnnRnn('birds_icml')).eval(), one_hot(FACTS['captions'])
    expected = torch.from_numpy(NUMBERS['birds_icml'])
    torch.testing.assert_close(recorded_port(net, letters), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        together = net(letters)
        for one, embedding in zip(letters, together):
            torch.testing.assert_close(net(one[None]), recorded_port(net, one[None]), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(net(one[None])[0], embedding, rtol=1e-6, atol=1e-6)


def test_one_hot_lowercases_cuts_and_skips_unknown_characters():
    letters = one_hot(['-', 'aB\u00e9\t?', '', 'z' * 300, 'A' * 200 + 'bc'])
    assert letters[0].sum() == 1 and letters[0, ALPHABET.rindex('-'), 0] == 1 and ALPHABET.count('-') == 2
    assert letters[1, :, :6].sum(0).tolist() == [1, 1, 0, 0, 1, 0]
    assert letters[1, ALPHABET.index('b'), 1] == 1
    assert letters[2].sum() == 0
    assert letters[3, ALPHABET.index('z')].sum() == letters[3].sum() == 201
    assert letters[4, ALPHABET.index('b'), 200] == 1 and letters[4].sum() == 201
    assert one_hot([]).shape == (0, 70, 201)


# --- the loss ---------------------------------------------------------------------------------------------------------

def test_joint_embedding_loss_equals_its_formula():
    text, image = (tensor_for(f'out/char_cnn_rnn/{side}', (6, 1024)) for side in ('txt', 'img'))
    for ours, name in [(sje_loss(text, image), 'loss_txt_img'), (sje_loss(image, text), 'loss_img_txt'),
                       (sje_loss(0.05 * text, 0.05 * image), 'loss_scaled_0.05')]:
        assert ours.item() == pytest.approx(FACTS['sje'][name], rel=1e-5)


def test_loss_ignores_pairs_of_the_same_class():
    text, image = torch.randn(5, 8), torch.randn(5, 8)
    classes = [0, 1, 0, 2, 1]
    total = sum(max(0, 1 + float(image[i] @ text[j] - image[i] @ text[i]))
                for i in range(5) for j in range(5) if classes[i] != classes[j])
    assert sje_loss(text, image, torch.tensor(classes)).item() == pytest.approx(total / 25, rel=1e-5)
    assert sje_loss(text, image, torch.arange(5)).item() == sje_loss(text, image).item()
    assert sje_loss(text, image, torch.zeros(5)).item() == 0


# --- batches ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp('squares') / 'squares.hdf5')


@pytest.mark.parametrize('classes, batch_size', [(5, 2), (5, 5), (3, 8)])
def test_batches_have_every_class_equally_often(classes, batch_size):
    sizes = [1, 30, 3, 7, 60][:classes]  # photographs of a class; each has two captions
    of_photo = [number for number, size in enumerate(sizes) for _ in range(size)]
    index = layout.Index(names=[f'photo {i}' for i in range(len(of_photo))], classes=[f'{c}' for c in of_photo],
                         photo_of=[i // 2 for i in range(2 * len(of_photo))],
                         captions=[f'{i // 2} {i}' for i in range(2 * len(of_photo))])
    batches = ClassBatches(index, torch.arange(len(of_photo)), batch_size)
    assert len(batches) == len(of_photo) // batch_size
    torch.manual_seed(0)
    seen, captions = Counter(), set()
    for batch in [batch for _ in range(40) for batch in batches]:
        found = Counter(batch['class'].tolist())
        assert max(found.values()) <= -(-batch_size // classes) and sum(found.values()) == batch_size
        assert [int(caption.split()[0]) for caption in batch['txt']] == batch['right_images'].tolist()
        assert [of_photo[photo] for photo in batch['right_images']] == batch['class'].tolist()
        seen += found
        captions.update(batch['txt'])
    share = np.array([seen[number] for number in range(classes)]) / sum(seen.values())
    assert abs(share - 1 / classes).max() < 0.03
    assert len(captions) == len(index.captions)


def test_a_small_split_gives_one_batch_and_an_empty_split_none(squares):
    split = load_split(squares, 'train', 64, preprocess)
    assert len(list(ClassBatches(split.index, split.pictures, 100))) == 1
    assert list(ClassBatches(layout.Index(), torch.empty(0), 4)) == []


# --- embedding and loading --------------------------------------------------------------------------------------------

@pytest.fixture
def narrow(monkeypatch):
    """Make the recurrent networks of the published variants narrow, to save time."""
    for name, (_, pooling, recurrent) in VARIANTS.items():
        monkeypatch.setitem(encoder.VARIANTS, name, (8, pooling, recurrent))


def test_embeddings_depend_neither_on_the_batch_nor_on_repetitions(narrow):
    net, rows = fill(CharCnnRnn()), []
    net.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    captions = ['a red bird', 'a blue bird', 'a red bird', 'a bird', 'a blue bird']
    embeddings = embed_captions(net, captions, verbose=False)
    assert embeddings.shape == (5, 1024) and embeddings.dtype == np.float32 and rows == [3]
    np.testing.assert_array_equal(embeddings[[0, 1]], embeddings[[2, 4]])
    alone = np.concatenate([embed_captions(net, [caption], verbose=False) for caption in captions])
    np.testing.assert_allclose(alone, embeddings, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(embed_captions(net, captions, 2, verbose=False), embeddings, rtol=1e-6, atol=1e-6)
    assert embed_captions(net, []).shape == (0, 1024)


@pytest.mark.parametrize('variant', VARIANTS)
def test_load_encoder_recognizes_the_variant_of_a_state_dict(tmp_path, variant):
    net, path = CharCnnRnn(variant), str(tmp_path / 'plain.pt')
    torch.save({f'module.{key}': value for key, value in net.state_dict().items()}, path)
    loaded = load_encoder(path)
    assert loaded.variant == variant and not loaded.training
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_load_encoder_reads_our_checkpoints(tmp_path, narrow):
    model = Model('model', 'cpu', None, 'flowers_icml', 'scratch')
    whole = model.save_to(str(tmp_path), verbose=False)
    torch.save({'variant': 'flowers_icml', 'encoder': model.encoder.state_dict()}, tmp_path / 'beside.pt')
    for path in (whole, str(tmp_path / 'beside.pt')):
        loaded = load_encoder(path)
        assert loaded.variant == 'flowers_icml'
        assert all(torch.equal(value, model.encoder.state_dict()[key]) for key, value in loaded.state_dict().items())


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_load_encoder_refuses_anything_else(tmp_path, narrow):
    path, marker = str(tmp_path / 'encoder.pt'), tmp_path / 'executed'
    assert path in one_line(load_encoder, path, match='no such')
    for contents in (CharCnnRnn(), {'encoder': Touch(str(marker))}):
        torch.save(contents, path)
        assert path in one_line(load_encoder, path, match='refused')
    assert not marker.exists()
    torch.save(fill(CharCnnRnn()).state_dict(), path)
    with open(path, 'rb+') as file:
        file.truncate(os.path.getsize(path) // 2)
    assert path in one_line(load_encoder, path, match='damaged')
    other = CharCnnRnn('birds_cvpr').state_dict()
    for contents, reason in [([1], 'holds a list'), ({'netG': {}}, 'no sentence encoder'), ({'encoder': {}}, 'no sent'),
                             ({'encoder': other, 'variant': 'birds_icml'}, 'does not fit'),
                             ({'encoder': other, 'variant': 'fish'}, 'unknown variant')]:
        torch.save(contents, path)
        assert path in one_line(load_encoder, path, match=reason)


def test_loading_an_encoder_keeps_the_random_state(tmp_path, narrow):
    path = str(tmp_path / 'encoder.pt')
    torch.save({'variant': 'birds_cvpr', 'encoder': CharCnnRnn('birds_cvpr').state_dict()}, path)
    before = torch.get_rng_state()
    build_encoder.load_encoder(path)
    assert torch.equal(torch.get_rng_state(), before)


# --- training ---------------------------------------------------------------------------------------------------------

def new_model(squares, seed):
    torch.manual_seed(seed)
    split = load_split(squares, 'train', 64, preprocess)
    model = Model('model', 'cpu', ClassBatches(split.index, split.pictures, 4), 'birds_icml', 'scratch')
    model.create_optim(0.001)
    return model


def everything(model):
    optim = model.optim.state_dict()
    numbers = {f'optim {i} {name}': value for i, state in optim['state'].items() for name, value in state.items()}
    numbers |= model.encoder.state_dict() | model.image_side.state_dict() | {'generator': torch.get_rng_state()}
    return numbers, optim['param_groups'][0]['lr'], model.progress['epoch'], model.progress['step']


@pytest.mark.parametrize('stop_at', [3, 2, 4])  # batches; an epoch has three
def test_resumed_training_is_bitwise_identical(tmp_path, squares, narrow, monkeypatch, stop_at):
    whole = new_model(squares, seed=0)
    whole.train(2, verbose=False)
    expected, *expected_progress = everything(whole)

    first = new_model(squares, seed=0)
    if stop_at == 3:
        first.train(1, verbose=False)
    else:
        step = Model.train_step
        monkeypatch.setattr(Model, 'train_step', lambda self, batch: (
            signal.raise_signal(signal.SIGINT) if self.progress['step'] == stop_at - 1 else None, step(self, batch))[1])
        with pytest.raises(KeyboardInterrupt):
            first.train(2, verbose=False)
        monkeypatch.setattr(Model, 'train_step', step)
    assert first.progress['step'] == stop_at
    first.save_to(str(tmp_path), verbose=False)

    second = new_model(squares, seed=1)
    second.load_from(str(tmp_path), verbose=False)
    second.train(2, verbose=False)
    found, *progress = everything(second)
    assert progress == expected_progress and progress[1:] == [2, 6]
    assert set(found) == set(expected) and all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_batch_is_overfitted_and_the_learning_rate_decays(squares):
    model = new_model(squares, seed=0)  # not narrow: the start of RMSprop shakes a narrow one for long
    model.create_optim(1e-5)
    model.data_loader = [next(iter(model.data_loader))]
    before = float(model.train_step(model.data_loader[0])['loss'])
    model.train(12, verbose=False)
    after = model.train_step(model.data_loader[0])
    assert float(after['loss']) < before and float(after['accuracy']) == 1
    assert model.optim.param_groups[0]['lr'] == pytest.approx(1e-5 * 0.98 ** 11)  # of the twelfth epoch


def test_checkpoints_that_do_not_fit_are_refused(tmp_path, squares, narrow):
    path = str(tmp_path)
    new_model(squares, 0).save_to(path, verbose=False)
    one_line(Model('model', 'cpu', None, 'birds_cvpr', 'scratch').load_from, path, match='--variant birds_icml')
    one_line(Model('model', 'cpu', None, 'birds_icml', 'googlenet').load_from, path, match='--image_encoder scratch')
    torch.save({'netG': {}}, tmp_path / 'model.pt')
    one_line(new_model(squares, 0).load_from, path, match='no image side')


# --- evaluation -------------------------------------------------------------------------------------------------------

def test_eval_measures_perfect_and_shuffled_features(monkeypatch, narrow):
    torch.manual_seed(0)
    classes, photos = 5, 60  # more photographs of a class than the 50 that are retrieved
    labels = torch.arange(classes).repeat_interleave(photos)
    index = layout.Index(names=[str(i) for i in range(len(labels))], classes=[f'{i}' for i in labels.tolist()],
                         photo_of=list(range(len(labels))), captions=[str(i) for i in labels.tolist()])
    directions = torch.eye(classes, 1024)
    monkeypatch.setattr(build_encoder, 'embed_captions', lambda net, captions, verbose: directions[
        [int(caption) for caption in captions]].numpy())
    model = Model('model', 'cpu', None, 'birds_icml', 'googlenet')
    aligned = model.eval(index, directions[labels], verbose=False)
    assert aligned == pytest.approx({'top1': 1, 'chance_top1': 0.2, 'ap50': 1, 'chance_ap50': 0.2})
    shuffled = model.eval(index, directions[labels][torch.randperm(len(labels))], verbose=False)
    assert abs(shuffled['top1'] - 0.2) < 0.1 and abs(shuffled['ap50'] - 0.2) < 0.1
    few = layout.Index(names=index.names[::6], classes=index.classes[::6], photo_of=list(range(50)),
                       captions=index.captions[::6])
    # Of the 50 photographs of all classes 10 are a class's own, so no ranking can do better.
    assert model.eval(few, directions[labels[::6]], verbose=False)['ap50'] == pytest.approx(0.2)
