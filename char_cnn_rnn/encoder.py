"""The char-CNN-RNN: a network that turns the characters of a sentence into an embedding of 1,024 numbers.

The chapter uses it in the section on zero-shot learning. It comes from Reed, Akata, Lee, Schiele: Learning Deep
Representations of Fine-Grained Visual Descriptions (CVPR 2016), section 4. Convolutions find words and phrases in the
characters, a recurrent network reads these in order, and its states are averaged over time.
"""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.letters import ALPHABET, LENGTH

EMBED_DIM = 1024
INIT_RANGE = 0.08
STEPS = 18               # time steps of the recurrent network: columns of the last convolution
STRIDE, SEEN = 9, 48     # characters between two of these columns, and characters that each of them sees

UNKNOWN = len(ALPHABET)
PLACE_OF = np.full(129, UNKNOWN)  # row of each character code; all codes above 127 share the last entry
PLACE_OF[[ord(letter) for letter in ALPHABET]] = range(len(ALPHABET))


def one_hot(captions):
    """One-hot encode a list of B sentences as float32 [B, 70, 201]: a row per letter, a column per character.

    Characters are lowercased; those after the 201st are dropped, and those outside the alphabet become zero columns.
    """
    text = ''.join(caption.lower()[:LENGTH].ljust(LENGTH, '\0') for caption in captions)
    codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), '<u4').reshape(len(captions), LENGTH)
    places = torch.from_numpy(PLACE_OF[np.minimum(codes, 128)])
    sentence, column = (places != UNKNOWN).nonzero(as_tuple=True)
    letters = torch.zeros(len(captions), len(ALPHABET), LENGTH)
    letters[sentence, places[sentence, column], column] = 1
    return letters


class AverageGRU(nn.Module):
    """Compute the mean over time of the states of a GRU whose first state is tanh(W x + b): [B, T, D] -> [B, D]."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.i2h_update, self.h2h_update = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.i2h_reset, self.h2h_reset = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.i2h, self.h2h = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, inputs):
        # One matrix product for the inputs of all steps, and one for both gates of a step: same numbers, less time.
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
    """Compute the mean over time of the states of a plain RNN with ReLU: [B, T, D] -> [B, D]."""

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
    """Return weight and bias of one linear layer that computes the outputs of all `linears`, concatenated."""
    return torch.cat([linear.weight for linear in linears]), torch.cat([linear.bias for linear in linears])


# Per variant: width of the last convolution and the recurrent network, third pooling or not, recurrent network.
VARIANTS = {
    'birds_icml': (512, False, AverageGRU),
    'flowers_icml': (512, True, AverageRNN),
    'birds_cvpr': (256, True, AverageRNN),
}


class CharCnnRnn(nn.Module):
    """Compute sentence embeddings [B, 1024] (unbounded) from the characters `one_hot(captions)` [B, 70, 201].

    `variant` is named after the weights that the authors published; the chapter and StackGAN use 'birds_icml'.
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
        x = _without_blank_end(letters)                         # shapes for 201 columns:
        x = F.max_pool1d(_threshold(self.conv1(x)), 3)          # [B, 384, 66]
        x = F.max_pool1d(_threshold(self.conv2(x)), 3)          # [B, 512, 21]
        x = _threshold(self.conv3(x))                           # [B, dim, 18]
        x = F.pad(x, (0, STEPS - x.shape[2]), mode='replicate')
        if self.third_pooling:
            x = F.max_pool1d(x, 3, 2)                           # [B, dim, 8]
        return self.emb_proj(self.rnn(x.transpose(1, 2)))


def _without_blank_end(letters):
    """Return letters [B, 70, 201] without most of the blank columns after the longest sentence, to save time.

    One column of the last convolution still sees only blanks; all later ones would be copies of it. Captions of birds
    fill about a third of the 201 columns.
    """
    used = letters.any(dim=1).any(dim=0).nonzero()
    longest = int(used.max()) + 1 if len(used) else 0
    return letters[:, :, :-(-longest // STRIDE) * STRIDE + SEEN]


def _threshold(x):
    """Set values that are not above 1e-6 to 0, as Torch7's nn.Threshold does by default."""
    return F.threshold(x, 1e-6, 0.0)


def init_weights(module):
    """Initialize every weight and bias uniformly in [-0.08, 0.08] (paper, section 5.1)."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -INIT_RANGE, INIT_RANGE)


def sje_loss(text_features, image_features, classes=None):
    """Return the structured joint embedding loss of images against sentences, a scalar >= 0 (CVPR 2016, section 3).

    sum_(i, j) max(0, 1 + image_i . text_j - image_i . text_i) / B^2, for features [B, 1024] whose rows i belong
    together: an image should score its own sentence higher than any other, by a margin of 1. The sum is that of the
    authors' code; the paper has the maximum over classes, of scores averaged over sentences. With the arguments
    exchanged, it is the loss of sentences against images; the symmetric loss is the sum of both. Pairs of the same
    class do not count: their sentences are true of both images. Without `classes` [B], every row is its own class.
    """
    scores = image_features @ text_features.T
    hinge = (1 + scores - scores.diagonal()[:, None]).clamp(min=0)
    classes = torch.arange(len(scores), device=scores.device) if classes is None else classes
    return hinge[classes[:, None] != classes].sum() / len(scores) ** 2
