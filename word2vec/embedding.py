"""The two networks of word2vec (chapter: word embedding), as Xin Rong derives them in arXiv 1411.2738.

The vocabulary has V words, and a word's vector has N numbers. A batch has B windows of up to C words around the one in
the middle.
"""
import torch
from torch import nn

NO_WORD = -1  # in place of a word's number, where a window reaches beyond the caption


class Embedding(nn.Module):
    """The weights of both networks, two vectors for each word w.

    The rows of W are the input vectors v_w, which are what training is for; the columns of W' are the output vectors
    v'_w. As in Mikolov's program, W starts with small random numbers and W' with zeros.
    """

    def __init__(self, vocabulary_size, vector_size=100):
        super().__init__()
        self.W = nn.Parameter((torch.rand(vocabulary_size, vector_size) - 0.5) / vector_size)     # W  [V, N]
        self.W_prime = nn.Parameter(torch.zeros(vector_size, vocabulary_size))                    # W' [N, V]

    def scores(self, h):
        """u_j = v'_j . h of every word j (equation 2): [B, N] -> [B, V]."""
        return h @ self.W_prime

    def scores_of(self, h, words):
        """u_j of some words only, K for each of the B windows: [B, N], [B, K] -> [B, K]."""
        output_vectors = self.W_prime.T[words]                                                    # [B, K, N]
        return (output_vectors @ h[:, :, None]).squeeze(2)


class CBOW(Embedding):
    """Continuous bag of words: the context predicts the word in the middle (section 1.2)."""

    def forward(self, context):
        """The mean of the context's input vectors, h (equation 18): numbers of words [B, C] -> [B, N]."""
        is_word = (context != NO_WORD)[:, :, None]                                                # [B, C, 1]
        vectors = self.W[context.clamp(min=0)] * is_word                                          # [B, C, N]
        return vectors.sum(1) / is_word.sum(1)


class SkipGram(Embedding):
    """The word in the middle predicts each word of the context (section 2)."""

    def forward(self, target):
        """The word's input vector, h (equation 24): numbers of words [B] -> [B, N]."""
        return self.W[target]
