"""The characters reported as unread are those that the sentence encoder ignores."""
import pytest
import torch

from char_cnn_rnn.encoder import one_hot
from common.letters import ALPHABET, LENGTH, unread


@pytest.mark.parametrize('text, letters, beyond', [
    ('A small RED bird, 2 wings.', '', 0), ('', '', 0), ('краснaя', 'красня', 0), ('红色的小鸟', '红色的小鸟', 0),
    ('très\tpetit', 'è\t', 0), ('a' * (LENGTH + 7), '', 7), ('a' * LENGTH + 'é', '', 1), ('İ', '\u0307', 0)])
def test_unread_characters_are_found(text, letters, beyond):
    assert unread(text) == (set(letters), beyond)
    read = [letter for letter in text.lower()[:LENGTH] if letter in ALPHABET]
    assert one_hot([text]).sum() == len(read)
    if not letters and not beyond:
        assert not torch.equal(one_hot([text]), one_hot([text + 'x']))
