"""Compare word2vec's networks and losses with the equations of Rong, arXiv 1411.2738, in NumPy."""
import unicodedata

import numpy as np
import pytest
import torch

from tests.errors import one_line
from tests.states import interrupt
from word2vec.build_embedding import LOSSES, NETWORKS, Model, load_model
from word2vec.corpus import Vocabulary, Windows, words_of
from word2vec.embedding import NO_WORD
from word2vec.plot import draw_words, pca, shown_words

pytestmark = pytest.mark.usefixtures('one_thread')

CAPTIONS = ['a red bird with black wings', 'a black bird with red wings', 'this bird is blue', 'its wings are white',
            'the bird has a white belly and blue wings'] * 3
V, N = 9, 4
TARGET = torch.tensor([3, 0, 5])                                               # [B]
CONTEXT = torch.tensor([[1, 3, 7, 1], [2, NO_WORD, 8, NO_WORD], [NO_WORD, 4, NO_WORD, NO_WORD]])  # [B, C]


def small_model(name, loss, seed=0):
    """Return a float64 model of V words and N numbers, with no zero weights."""
    torch.manual_seed(seed)
    model = Model(name, 'cpu', None, Vocabulary([f'word{i}' for i in range(V)], list(range(2, V + 2))), N, loss,
                  negative=3)
    model.net.double()
    for parameter in model.net.parameters():
        torch.nn.init.normal_(parameter)
    model.create_optim(0.1, 'sgd')
    return model


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax_gradients(W, W_prime, windows):
    """Return E, dE/dW and dE/dW', summed over `windows` (input words, output words), by equations 1 to 36."""
    E, dW, dW_prime = 0, np.zeros_like(W), np.zeros_like(W_prime)
    for inputs, outputs in windows:
        h = sum(W[k] for k in inputs) / len(inputs)                             # (18), (24)
        u = W_prime.T @ h                                                       # (2)
        y = np.exp(u) / np.exp(u).sum()                                         # (3)
        E += -sum(u[j] for j in outputs) + len(outputs) * np.log(np.exp(u).sum())    # (20), (29)
        EI = sum(y - np.eye(V)[j] for j in outputs)                             # (8), (30), (31)
        dW_prime += np.outer(h, EI)                                             # (9), (32)
        EH = W_prime @ EI                                                       # (12), (36)
        for k in inputs:
            dW[k] += EH / len(inputs)                                           # (23), (35)
    return E, dW, dW_prime


def negative_gradients(W, W_prime, windows, drawn):
    """Return the same by equations 55 to 61; `drawn` holds the negative samples of each output word, in order."""
    E, dW, dW_prime, drawn = 0, np.zeros_like(W), np.zeros_like(W_prime), iter(drawn)
    for inputs, outputs in windows:
        h = sum(W[k] for k in inputs) / len(inputs)
        for w_O in outputs:
            for j, t in [(w_O, 1), *((j, 0) for j in next(drawn) if j != w_O)]:
                u = W_prime[:, j] @ h
                E -= np.log(sigmoid(u if t else -u))                            # (55)
                dW_prime[:, j] += (sigmoid(u) - t) * h                          # (57), (58)
                for k in inputs:
                    dW[k] += (sigmoid(u) - t) * W_prime[:, j] / len(inputs)     # (61)
    return E, dW, dW_prime


def windows_of(name):
    """Return (input words, output words) of every window of the batch."""
    contexts = [[word for word in row if word != NO_WORD] for row in CONTEXT.tolist()]
    pairs = list(zip(contexts, [[word] for word in TARGET.tolist()]))
    return pairs if name == 'cbow' else [(target, context) for context, target in pairs]


@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('name', NETWORKS)
def test_gradients_equal_the_papers_equations(name, loss, monkeypatch):
    model, windows = small_model(name, loss), windows_of(name)
    W, W_prime = (parameter.detach().numpy().copy() for parameter in (model.net.W, model.net.W_prime))
    if loss == 'softmax':
        E, dW, dW_prime = softmax_gradients(W, W_prime, windows)
    else:
        places = 1 if name == 'cbow' else CONTEXT.shape[1]
        drawn = torch.randint(V, (len(TARGET), places, 3))
        drawn[0, 0, 0] = windows[0][1][0]  # a word that is to be predicted does not count as a negative sample
        monkeypatch.setattr(torch, 'multinomial', lambda *_, **__: drawn.flatten())
        is_word = torch.ones(len(TARGET), 1).bool() if name == 'cbow' else CONTEXT != NO_WORD
        E, dW, dW_prime = negative_gradients(W, W_prime, windows, drawn[is_word].tolist())

    found = model.train_step({'target': TARGET, 'context': CONTEXT})['loss']

    assert found.item() == pytest.approx(E / len(TARGET), abs=1e-6)
    np.testing.assert_allclose(model.net.W.grad.numpy(), dW, rtol=0, atol=1e-6)
    np.testing.assert_allclose(model.net.W_prime.grad.numpy(), dW_prime, rtol=0, atol=1e-6)
    np.testing.assert_allclose(model.net.W.detach().numpy(), W - 0.1 * dW, rtol=0, atol=1e-6)  # (16), (23), (35)
    np.testing.assert_allclose(model.net.W_prime.detach().numpy(), W_prime - 0.1 * dW_prime, rtol=0, atol=1e-6)


def test_negative_samples_follow_the_counts():
    model = small_model('cbow', 'negative')
    torch.manual_seed(0)
    drawn, is_negative = model._draw_negatives(torch.zeros(20000, 1, dtype=torch.long))
    expected = torch.arange(2., V + 2) ** 0.75
    assert drawn.shape == (20000, 1, 3) and torch.equal(is_negative, drawn != 0)
    assert torch.allclose(torch.bincount(drawn.flatten()) / drawn.numel(), expected / expected.sum(), atol=0.01)


# --- captions ---------------------------------------------------------------------------------------------------------

def test_sentences_are_split_into_words():
    assert words_of("It's RED, très-rouge (2 wings)\t红色!") == ["it's", 'red', 'très', 'rouge', 'wings', '红色']
    assert words_of('एक छोटी लाल चिड़िया, ปีกสีแดง') == [
        unicodedata.normalize('NFC', word) for word in ('एक', 'छोटी', 'लाल', 'चिड़िया', 'ปีกสีแดง')]
    assert words_of(unicodedata.normalize('NFD', 'Très')) == ['très']


def test_word_numbers_follow_frequency():
    vocabulary = Vocabulary.of(['a b b', 'b a, c', 'c b d'], min_count=2)
    assert (vocabulary.words, vocabulary.counts) == (['b', 'a', 'c'], [4, 2, 2])
    assert vocabulary.number(' B ') == 0
    assert 'too few' in one_line(Vocabulary.of, ['a b'], 2)


def windows_by_hand(captions, reach):
    """Return {(target, context)} of every position, as numbers, one caption after the other."""
    return sorted((caption[i], *caption[max(0, i - reach):i], *caption[i + 1:i + 1 + reach])
                  for caption in captions for i in range(len(caption)))


def test_an_epoch_has_one_window_per_word(monkeypatch):
    captions = ['a b c d e', 'e d', 'c', 'b a c']
    vocabulary = Vocabulary.of(captions, 1)
    numbered = [[vocabulary.number(word) for word in words_of(caption)] for caption in captions]
    windows = Windows(captions, vocabulary, 4, window=2)
    monkeypatch.setattr(torch, 'randint', lambda low, high, size: torch.full(size, high - 1))
    batches = list(windows)
    assert [len(batch['target']) for batch in batches] == [4, 4, 2]  # the caption of one word has no context
    found = [(target, *(word for word in context if word != NO_WORD)) for batch in batches
             for target, context in zip(batch['target'].tolist(), batch['context'].tolist())]
    assert sorted(found) == windows_by_hand([caption for caption in numbered if len(caption) > 1], 2)


def test_windows_have_random_order_and_size():
    windows = Windows(CAPTIONS, Vocabulary.of(CAPTIONS, 1), 1000, window=3)
    torch.manual_seed(0)
    first, second = (next(iter(windows)) for _ in range(2))
    assert not torch.equal(first['target'], second['target'])
    sizes = (first['context'] != NO_WORD).sum(1)
    assert 1 in sizes and 6 in sizes


def test_sample_drops_frequent_words():
    captions = ['the the the the bird'] * 200
    windows = Windows(captions, Vocabulary.of(captions, 1), 10 ** 6, sample=0.05)
    torch.manual_seed(0)
    targets = next(iter(windows))['target']
    share = (0.05 / 0.8) ** 0.5 + 0.05 / 0.8
    assert (targets == 0).sum().item() == pytest.approx(800 * share, rel=0.2)
    one_line(next, iter(Windows(captions, Vocabulary.of(captions, 1), 10, sample=1e-12)), match='no caption has two')


# --- training ---------------------------------------------------------------------------------------------------------

def new_model(seed=1, name='cbow', loss='negative'):
    torch.manual_seed(seed)
    vocabulary = Vocabulary.of(CAPTIONS, 1)
    model = Model(name, 'cpu', Windows(CAPTIONS, vocabulary, 16, window=2, sample=0.1), vocabulary, 8, loss)
    model.create_optim(0.05)
    return model


def state_of(model):
    return {**model.net.state_dict(), 'rng': model.progress['rng']['cpu'],
            **{f'{i}.{key}': value for i, state in model.optim.state_dict()['state'].items()
               for key, value in state.items()}}


@pytest.mark.parametrize('stop', [2, 4])
def test_an_interrupted_run_resumes_to_the_same_results(tmp_path, stop, capsys):
    straight, folder = new_model(), str(tmp_path)
    straight.train(3, 1, verbose=False)
    interrupt(new_model(), stop, 3, 1, folder)
    resumed = new_model(seed=7)
    resumed.load_from(folder, verbose=False)
    assert resumed.progress['step'] == stop
    resumed.train(3, 1, folder, verbose=False)
    expected, found = state_of(straight), state_of(resumed)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('loss', LOSSES)
def test_words_in_equal_contexts_become_similar(name, loss):
    captions = [f'the {color} {part} of it' for color in ('red', 'blue', 'green') for part in ('wing', 'tail', 'eye')]
    torch.manual_seed(0)
    vocabulary = Vocabulary.of(captions, 1)
    model = Model(name, 'cpu', Windows(captions, vocabulary, 16, window=1), vocabulary, 16, loss)
    model.create_optim(0.01)
    model.train(60, verbose=False)
    near = model.eval(['red', 'tail', 'unknown'], count=2)
    assert {word: set(found) for word, found in near.items()} == {'red': {'blue', 'green'}, 'tail': {'wing', 'eye'}}


def test_nearest_and_analogies_rank_by_cosine():
    model = small_model('cbow', 'softmax')
    vectors = model.net.W.detach().numpy()
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors[2]
    order = [i for i in np.argsort(-cosines) if i != 2]
    found = model.nearest(model.vectors(['word2'])[0], 3, without=['word2'])
    assert [word for word, _ in found] == [f'word{i}' for i in order[:3]]
    assert [cosine for _, cosine in found] == pytest.approx([cosines[i] for i in order[:3]])
    model.net.W.data[3] = model.net.W.data[1] - model.net.W.data[0] + model.net.W.data[2]
    model.net.W.data[:3] /= model.net.W.data[:3].norm(dim=1, keepdim=True)
    model.net.W.data[3] = model.net.W.data[1] - model.net.W.data[0] + model.net.W.data[2]
    assert model.analogy('word0', 'word1', 'word2', 1) == [('word3', pytest.approx(1))]
    assert len(model.nearest(model.vectors(['word2'])[0], 50, without=['word2'])) == V - 1


def test_a_checkpoint_answers_all_queries(tmp_path):
    model = new_model(name='skipgram')
    file = model.save_to(str(tmp_path), verbose=False)
    read = load_model(file)
    assert (read.name, read.vocabulary.words, read.vocabulary.counts) == ('skipgram', model.vocabulary.words,
                                                                          model.vocabulary.counts)
    assert torch.equal(read.net.W, model.net.W)
    other = Model('cbow', 'cpu', None, model.vocabulary, 8)
    assert 'holds skipgram with' in one_line(other.load_from, file)
    wrong = Model('skipgram', 'cpu', None, Vocabulary.of(CAPTIONS[:2], 1), 8)
    assert 'continue with the same model and captions' in one_line(wrong.load_from, file)


@pytest.mark.parametrize('damage', [{'words': None}, {'words': ['a']}, {'model': ['cbow']}, {'counts': [0] * 16},
                                    {'words': [*'abcdefghijklmno', '\x1b[2J']}, {'net': 3},
                                    {'net': {'W': torch.zeros(3)}}])
def test_other_checkpoints_are_refused(tmp_path, damage):
    file = new_model().save_to(str(tmp_path), verbose=False)
    torch.save(torch.load(file, weights_only=True) | damage, file)
    assert one_line(load_model, file).startswith(f'{file}: not a checkpoint of word vectors')


# --- the map ----------------------------------------------------------------------------------------------------------

def test_the_map_projects_onto_two_principal_directions():
    torch.manual_seed(0)
    spread = torch.randn(20, 3) * torch.tensor([5., 2., 0.01])
    rotated = spread @ torch.linalg.qr(torch.randn(3, 3)).Q
    assert torch.allclose(torch.cdist(pca(rotated), pca(rotated)), torch.cdist(spread, spread), atol=0.1)


@pytest.mark.parametrize('words, numbers', [(2, 1), (2, 8), (5, 1)])
def test_a_map_works_with_few_words_or_dimensions(words, numbers):
    vocabulary = Vocabulary([f'word{i}' for i in range(words)], [1] * words)
    assert shown_words(vocabulary) == vocabulary.words
    draw_words(vocabulary.words, range(words), torch.randn(words, numbers))


def test_the_map_shows_colors_and_parts():
    vocabulary = Vocabulary.of(CAPTIONS, 1)
    words = shown_words(vocabulary)
    assert words == ['wings', 'red', 'black', 'blue', 'white', 'belly']  # by number: the most frequent first
    image = draw_words(words, map(vocabulary.number, words), torch.randn(len(words), 8))
    marks = {color for _, color in image.getcolors(1 << 20)}
    assert {(224, 16, 28), (0, 0, 0), (31, 79, 220), (221, 221, 221)} <= marks
