"""The two networks of word2vec (section "Word embedding"), as derived by Rong in arXiv 1411.2738.

V is the number of words in the vocabulary, N the length of a word vector, B the batch size, and C the number of context
words around the word in the middle of a window.
"""
import torch
from torch import nn

NO_WORD = -1  # stands for a missing context word, where a window extends beyond the caption


class Embedding(nn.Module):
    """Hold the weights of both networks: two vectors for each word w.

    The rows of W are the input vectors v_w, the result of training; the columns of W' are the output vectors v'_w. W is
    initialized with small random numbers and W' with zeros, as in Mikolov's program.
    """

    def __init__(self, vocabulary_size, vector_size=100):
        super().__init__()
        self.W = nn.Parameter((torch.rand(vocabulary_size, vector_size) - 0.5) / vector_size)     # W  [V, N]
        self.W_prime = nn.Parameter(torch.zeros(vector_size, vocabulary_size))                    # W' [N, V]

    def scores(self, h):
        """Return u_j = v'_j . h for every word j (equation 2): [B, N] -> [B, V]."""
        return h @ self.W_prime

    def scores_of(self, h, words):
        """Return u_j = v'_j . h only for K words per window: h [B, N] and words [B, K] -> [B, K]."""
        output_vectors = self.W_prime.T[words]                                                    # [B, K, N]
        return (output_vectors @ h[:, :, None]).squeeze(2)


class CBOW(Embedding):
    """Compute the hidden layer of the continuous bag-of-words model: the context predicts the word in the middle."""

    def forward(self, context):
        """Return h, the mean of the context's input vectors (equation 18): word numbers [B, C] -> [B, N]."""
        is_word = (context != NO_WORD)[:, :, None]                                                # [B, C, 1]
        vectors = self.W[context.clamp(min=0)] * is_word                                          # [B, C, N]
        return vectors.sum(1) / is_word.sum(1)


class SkipGram(Embedding):
    """Compute the hidden layer of the skip-gram model: the word in the middle predicts each word of the context."""

    def forward(self, target):
        """Return h, the word's input vector (equation 24): word numbers [B] -> [B, N]."""
        return self.W[target]
