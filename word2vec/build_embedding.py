"""Train word vectors and query them (section "Word embedding"; Rong, arXiv 1411.2738)."""
import os

import torch
from torch.nn.functional import logsigmoid, normalize

from common import checkpoint
from common.errors import UserError
from common.progress import new_progress
from common.training_run import TrainingRun
from word2vec.corpus import Vocabulary, words_of
from word2vec.embedding import CBOW, NO_WORD, SkipGram

NETWORKS = {'cbow': CBOW, 'skipgram': SkipGram}
LOSSES = ('softmax', 'negative')
OPTIMIZERS = {'adam': torch.optim.Adam, 'sgd': torch.optim.SGD}
NOISE_POWER = 0.75  # negative samples are drawn in proportion to count^0.75 (Mikolov et al., 2013)


class Model:
    """Train one of the `NETWORKS`, and query its word vectors.

    `name` selects the network; `data_loader` yields batches as in `word2vec.corpus.Windows`. `loss` is 'softmax' over
    the whole vocabulary, or 'negative': negative sampling with `negative` random words for each predicted word.
    """

    def __init__(self, name, device, data_loader, vocabulary, vector_size=100, loss='softmax', negative=5):
        self.name, self.device, self.data_loader = name, torch.device(device), data_loader
        self.vocabulary, self.loss, self.negative = vocabulary, loss, negative
        self.net = NETWORKS[name](len(vocabulary), vector_size).to(self.device)
        self.noise = torch.tensor(vocabulary.counts, device=self.device) ** NOISE_POWER            # [V]
        self.optim = None
        self.progress = new_progress()
        self.options, self.data, self.keep = {}, {}, checkpoint.KEEP

    def create_optim(self, lr, optimizer='adam'):
        """Create the optimizer: 'adam', or the paper's plain gradient descent, 'sgd'.

        `decay_lr` lowers its learning rate to zero over the epochs.
        """
        self.lr = lr
        self.optim = OPTIMIZERS[optimizer](self.net.parameters(), lr=lr)

    def train_step(self, batch):
        """Train for one step on a batch of windows. Returns {`loss`: mean of E over the windows, a scalar tensor}.

        Numbers in parentheses are the paper's equations.
        """
        target, context = batch['target'].to(self.device), batch['context'].to(self.device)        # [B], [B, C]

        if self.name == 'cbow':
            h, predicted = self.net(context), target[:, None]  # h = 1/C (v_w1 + ... + v_wC)            (18)
        else:
            h, predicted = self.net(target), context           # h = v_wI                               (24)
        is_word = predicted != NO_WORD                                                             # [B, P], P = 1 or C
        predicted = predicted.clamp(min=0)

        if self.loss == 'softmax':
            u = self.net.scores(h)                             # u_j = v'_j . h                         (2)
            log_y = u - u.logsumexp(1, keepdim=True)           # log y_j, y_j = exp(u_j) / sum exp(u)    (3)
            E = -(log_y.gather(1, predicted) * is_word)        # E = -log p(w_O | context), or         (19)
                                                               # E = -log p(w_O,1 ... w_O,C | w_I)      (27)
        else:
            drawn, is_negative = self._draw_negatives(predicted)
            u = self.net.scores_of(h, predicted)
            u_drawn = self.net.scores_of(h, drawn.flatten(1)).view_as(drawn)
            # E = -log s(v'_wO . h) - sum_j log s(-v'_wj . h), where w_j are the drawn words, s is the sigmoid  (55)
            E = -(logsigmoid(u) + (logsigmoid(-u_drawn) * is_negative).sum(2)) * is_word

        # backward() computes the paper's gradients, which tests/test_word2vec.py checks:
        #   CBOW: dE/dv'_j = e_j h, dE/dv_wI,c = EH / C (22, 23)    skip-gram: dE/dv'_j = EI_j h, dE/dv_wI = EH (34, 35)
        #   negative sampling, for predicted and drawn words: dE/dv'_j = (s(v'_j . h) - t_j) h (59), EH (61)
        self.optim.zero_grad()
        E.sum().backward()
        self.optim.step()                                      # SGD: w(new) = w(old) - lr dE/dw
        return {'loss': E.detach().sum(1).mean()}

    def _draw_negatives(self, predicted):
        """Draw random words for every predicted word [B, P].

        Returns (words, whether each differs from the predicted word), both [B, P, negative].
        """
        drawn = torch.multinomial(self.noise, predicted.numel() * self.negative, replacement=True)
        drawn = drawn.view(*predicted.shape, self.negative)
        return drawn, drawn != predicted[:, :, None]

    def train(self, epochs, log_interval=100, out_dir='', verbose=True):
        """Train until `epochs` epochs are done, including those of a loaded checkpoint.

        `common.training_run.TrainingRun` writes logs and checkpoints, and handles interruptions.
        """
        if self.optim is None:
            raise UserError('call create_optim(lr) before train()')
        with TrainingRun(self, epochs, log_interval, out_dir, verbose, unit='words', smallest=1) as run:
            for epoch in run.epochs():
                self.decay_lr(epoch, epochs)
                for batch in run.batches():
                    losses = self.train_step(batch)
                    run.log(losses)

    def decay_lr(self, epoch, epochs):
        """Set the learning rate of an epoch: lr * (1 - epoch / epochs)."""
        self.optim.param_groups[0]['lr'] = self.lr * max(0, 1 - epoch / epochs)

    @torch.no_grad()
    def nearest(self, vector, count=5, without=()):
        """Return [(word, cosine)] for the words whose vectors have the largest cosine with `vector` [N], nearest first.

        The words in `without`, such as those of the question itself, are left out.
        """
        cosines = normalize(self.net.W, dim=1) @ normalize(vector, dim=0)                          # [V]
        cosines[[self.vocabulary.number(word) for word in without]] = -2
        best = cosines.topk(min(count, len(cosines) - len(set(without))))
        return [(self.vocabulary.words[number], cosine)
                for cosine, number in zip(best.values.tolist(), best.indices.tolist())]

    @torch.no_grad()
    def vectors(self, words):
        """Return the input vectors of words, with unit norm: [words, N]. Raises UserError if a word is unknown."""
        return normalize(self.net.W[[self.vocabulary.number(word) for word in words]], dim=1)

    def analogy(self, a, b, c, count=5):
        """Return what is to `c` as `b` is to `a`: the words nearest to v_b - v_a + v_c, as `nearest` does."""
        v_a, v_b, v_c = self.vectors([a, b, c])
        return self.nearest(v_b - v_a + v_c, count, without=[a, b, c])

    def eval(self, words, count=5):
        """Return the `count` nearest words for each of the `words` in the vocabulary: {word: [word, ...]}."""
        known = [word for word in self.vocabulary.words if word in words]
        return {word: [near for near, _ in self.nearest(self.vectors([word])[0], count, without=[word])]
                for word in known}

    def save_to(self, path='', name=None, verbose=True):
        """Save vectors, vocabulary, optimizer and progress to `path/NAME.pt` in one atomic write; returns the file."""
        return checkpoint.save_model(self, {'net': self.net, 'optim': self.optim}, path, name, verbose,
                                     model=self.name, words=self.vocabulary.words, counts=self.vocabulary.counts)

    def load_from(self, path='', name=None, verbose=True):
        """Load a checkpoint that `save_to` wrote; `path` is the file or its folder.

        If `create_optim` has been called, the state of the optimizer and the progress are loaded, too. If NAME.pt in a
        folder is damaged, the checkpoint before it is loaded. Raises UserError if the file is missing, damaged, unsafe
        to load, or of another network or vocabulary.
        """
        file = path if os.path.isfile(path) else checkpoint.newest(os.path.join(path, f'{name or self.name}.pt'))
        contents = load(file)
        if (contents['model'], contents['words']) != (self.name, self.vocabulary.words):
            raise UserError(f'{file}: holds {contents["model"]} with {len(contents["words"])} words, not {self.name} '
                            f'with these {len(self.vocabulary)}; continue with the same model and captions')
        checkpoint.load_model(self, {'net': self.net, 'optim': self.optim}, contents, file)
        if verbose:
            print(f'loaded {file}')


def load_model(file, device='cpu'):
    """Return the `Model` of a checkpoint with its vocabulary, for queries. Raises UserError as `load_from` does."""
    contents = load(file)
    vocabulary = Vocabulary(contents['words'], contents['counts'])
    model = Model(contents['model'], device, None, vocabulary, contents['net']['W'].shape[1])
    model.load_from(file, verbose=False)
    return model


def load(file):
    """Return the dict that `save_to` wrote. Raises UserError if the file is missing, damaged or of another kind."""
    contents = checkpoint.load(file)
    words, counts, net = (contents.get(name) for name in ('words', 'counts', 'net'))
    W = net.get('W') if isinstance(net, dict) else None
    is_ours = (contents.get('model') in list(NETWORKS) and torch.is_tensor(W) and W.dim() == 2
               and isinstance(words, list) and all(isinstance(word, str) and words_of(word) == [word] for word in words)
               and isinstance(counts, list) and all(type(count) is int and count > 0 for count in counts)
               and 2 <= len(words) == len(set(words)) == len(counts) == len(W))
    if not is_ours:
        raise UserError(f'{file}: not a checkpoint of word vectors; give one that word2vec/main.py --train wrote')
    return contents
