"""The hybrid character CNN-RNN: a sentence, letter by letter, becomes 1,024 numbers.

Reed, Akata, Lee, Schiele: Learning Deep Representations of Fine-Grained Visual Descriptions (CVPR 2016), section 4; in
the chapter, the section on zero-shot learning. Convolutions find words and phrases in the letters, a recurrent network
reads what they found in order, and its states are averaged over time.
"""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.letters import ALPHABET, LENGTH

EMBED_DIM = 1024
INIT_RANGE = 0.08
STEPS = 18               # columns of the last convolution
STRIDE, SEEN = 9, 48     # letters from one of them to the next, and letters that one of them sees

UNKNOWN = len(ALPHABET)
PLACE_OF = np.full(129, UNKNOWN)  # of every character code; all that are not ASCII share the last entry
PLACE_OF[[ord(letter) for letter in ALPHABET]] = range(len(ALPHABET))


def one_hot(captions):
    """Sentences (a list of B strings) to float32 [B, 70, 201]: a column per character, a row per letter.

    Characters are lower-cased; those after the 201st are cut, and those outside of the alphabet are empty columns.
    """
    text = ''.join(caption.lower()[:LENGTH].ljust(LENGTH, '\0') for caption in captions)
    codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), '<u4').reshape(len(captions), LENGTH)
    places = torch.from_numpy(PLACE_OF[np.minimum(codes, 128)])
    sentence, column = (places != UNKNOWN).nonzero(as_tuple=True)
    letters = torch.zeros(len(captions), len(ALPHABET), LENGTH)
    letters[sentence, places[sentence, column], column] = 1
    return letters


class AverageGRU(nn.Module):
    """A gated recurrent unit whose first state is tanh(W x + b); [B, T, D] -> the mean of its states, [B, D]."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.i2h_update, self.h2h_update = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.i2h_reset, self.h2h_reset = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.i2h, self.h2h = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, inputs):
        # All steps' inputs go through one matrix product, and so do the two gates of a step: same sums, less time.
        from_inputs = F.linear(inputs, *_stacked(self.i2h_update, self.i2h_reset, self.i2h))
        to_gates, to_candidate = from_inputs.split([2 * self.dim, self.dim], dim=-1)
        gate_weight, gate_bias = _stacked(self.h2h_update, self.h2h_reset)
        state = torch.tanh(to_candidate[:, 0])
        total = state
        for t in range(1, inputs.shape[1]):
            gates = torch.sigmoid(to_gates[:, t] + F.linear(state, gate_weight, gate_bias))
            update, reset = gates.chunk(2, dim=-1)
            candidate = torch.tanh(to_candidate[:, t] + self.h2h(reset * state))
            state = update * candidate + (1 - update) * state
            total = total + state
        return total / inputs.shape[1]


class AverageRNN(nn.Module):
    """A plain recurrent network with ReLU whose first state takes the input alone; [B, T, D] -> mean state [B, D]."""

    def __init__(self, dim):
        super().__init__()
        self.i2h, self.h2h = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, inputs):
        inputs = self.i2h(inputs)
        state = torch.relu(inputs[:, 0])
        total = state
        for t in range(1, inputs.shape[1]):
            state = torch.relu(inputs[:, t] + self.h2h(state))
            total = total + state
        return total / inputs.shape[1]


def _stacked(*linears):
    """Weight and bias of the linear map that computes several of the same input, side by side."""
    return torch.cat([linear.weight for linear in linears]), torch.cat([linear.bias for linear in linears])


# Of every variant: width of the last convolution and the recurrent net, a third pooling before it or none, the net.
VARIANTS = {
    'birds_icml': (512, False, AverageGRU),
    'flowers_icml': (512, True, AverageRNN),
    'birds_cvpr': (256, True, AverageRNN),
}


class CharCnnRnn(nn.Module):
    """Sentence encoder: `one_hot(captions)` [B, 70, 201] -> [B, 1024], unbounded.

    `variant` names the weights that the authors published: 'birds_icml' is what the chapter and StackGAN use.
    """

    def __init__(self, variant='birds_icml'):
        super().__init__()
        self.variant = variant
        dim, self.third_pooling, recurrent = VARIANTS[variant]
        self.conv1 = nn.Conv1d(len(ALPHABET), 384, 4)
        self.conv2 = nn.Conv1d(384, 512, 4)
        self.conv3 = nn.Conv1d(512, dim, 4)
        self.rnn = recurrent(dim)
        self.emb_proj = nn.Linear(dim, EMBED_DIM)

    def forward(self, letters):
        x = _without_blank_end(letters)                         # of 201 columns:
        x = F.max_pool1d(_threshold(self.conv1(x)), 3)          # [B, 384, 66]
        x = F.max_pool1d(_threshold(self.conv2(x)), 3)          # [B, 512, 21]
        x = _threshold(self.conv3(x))                           # [B, dim, 18]
        x = F.pad(x, (0, STEPS - x.shape[2]), mode='replicate')
        if self.third_pooling:
            x = F.max_pool1d(x, 3, 2)                           # [B, dim, 8]
        return self.emb_proj(self.rnn(x.transpose(1, 2)))


def _without_blank_end(letters):
    """[B, 70, 201] without columns behind the longest sentence, but for those that one step of the last convolution
    sees: all later steps see as little, so they are copies of it. Sentences of birds are a third as long as the input.
    """
    used = letters.any(dim=1).any(dim=0).nonzero()
    longest = int(used.max()) + 1 if len(used) else 0
    return letters[:, :, :-(-longest // STRIDE) * STRIDE + SEEN]


def _threshold(x):
    """Torch7's nn.Threshold with its default: what is not above 1e-6 becomes 0."""
    return F.threshold(x, 1e-6, 0.0)


def init_weights(module):
    """Every weight and bias uniform in [-0.08, 0.08], as the paper starts (section 5.1)."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -INIT_RANGE, INIT_RANGE)


def sje_loss(text_features, image_features, classes=None):
    """Structured joint embedding (CVPR 2016, equations 2 to 4): sentences are to find their pictures.

    Both [B, 1024], row i of one belonging to row i of the other -> a scalar, at least 0: by how much, summed over all
    pairs and divided by B^2, a sentence scores (by the inner product) another row's picture higher than its own less a
    margin of 1. The symmetric loss adds the same with the arguments exchanged, so that pictures find their sentences.
    With `classes` [B], rows of the same class are no rivals: the sentence is true of both pictures.
    """
    scores = image_features @ text_features.T
    hinge = (1 + scores - scores.diagonal()[:, None]).clamp(min=0)
    classes = torch.arange(len(scores), device=scores.device) if classes is None else classes
    return hinge[classes[:, None] != classes].sum() / len(scores) ** 2
