"""Prepare captions for word2vec: split them into words, number the words, and sample windows."""
import difflib
import re
import unicodedata
from collections import Counter

import torch

from common.errors import UserError
from word2vec.embedding import NO_WORD

# Letters of any script with their marks (such as vowel signs), also after an apostrophe as in it's.
MARKS = ''.join(letter for letter in map(chr, range(0x300, 0x20000)) if unicodedata.category(letter)[0] == 'M')
LETTERS = rf'(?:[^\W\d_][{MARKS}\u200c\u200d]*)+'
WORD = re.compile(rf"{LETTERS}(?:'{LETTERS})?")


def words_of(sentence):
    """Return the lowercased words of a sentence: 'A bird, all red.' -> ['a', 'bird', 'all', 'red']."""
    return WORD.findall(normalized(sentence))


def normalized(text):
    """Return text in lower case, with composed letters: é, not e and an accent."""
    return unicodedata.normalize('NFC', text.lower())


class Vocabulary:
    """Map words to numbers, the most frequent word first: a word's number is its index in `words`.

    `counts` holds how often each word occurs.
    """

    def __init__(self, words, counts):
        self.words, self.counts = words, counts
        self.numbers = {word: number for number, word in enumerate(words)}

    @classmethod
    def of(cls, captions, min_count):
        """Build the vocabulary of words that occur at least `min_count` times in the captions.

        Raises UserError if there are fewer than two.
        """
        counts = Counter(word for caption in captions for word in words_of(caption))
        found = [(word, count) for word, count in counts.most_common() if count >= min_count]
        if len(found) < 2:
            raise UserError(f'{len(captions)} captions have {len(found)} words that occur at least {min_count} times, '
                            'too few to predict one from another; try a smaller --min_count')
        return cls(*map(list, zip(*found)))

    def __len__(self):
        return len(self.words)

    def number(self, word):
        """Return the number of a word. Raises UserError, which suggests words of similar spelling, if it has none."""
        word = normalized(word.strip())
        if word not in self.numbers:
            near = difflib.get_close_matches(word, self.words, n=5, cutoff=0.5)
            raise UserError(f'{ascii(word)[:60]}: not in the vocabulary of {len(self)} words; '
                            + (f'similar ones are {", ".join(near)}' if near else 'give another word'))
        return self.numbers[word]


class Windows:
    """Yield batches of windows in random order, one epoch per iteration, with PyTorch's random generator.

    A batch is a dict of word numbers: `target` [B] and `context` [B, 2 * window], padded with `NO_WORD`. As in
    Mikolov's program, the size of each window is random: 1 to `window` words on both sides. With `sample` > 0, frequent
    words are dropped at random before windows are built (Mikolov et al., 2013).
    """

    def __init__(self, captions, vocabulary, batch_size, window=5, sample=0.0):
        numbers = [[vocabulary.numbers[word] for word in words_of(caption) if word in vocabulary.numbers]
                   for caption in captions]
        self.words = torch.tensor([number for caption in numbers for number in caption])               # [T]
        self.captions = torch.tensor([i for i, caption in enumerate(numbers) for _ in caption])        # [T]
        self.batch_size, self.window = batch_size, window
        frequency = torch.tensor(vocabulary.counts) / sum(vocabulary.counts)                           # [V]
        # Probability of keeping an occurrence of a word: 1 or more if the word is rarer than the threshold `sample`.
        self.kept = (sample / frequency).sqrt() + sample / frequency if sample else torch.ones(len(vocabulary))

    def __len__(self):
        return -(-len(self.words) // self.batch_size)

    def __iter__(self):
        is_kept = torch.rand(len(self.words)) < self.kept[self.words]
        words, captions = self.words[is_kept], self.captions[is_kept]
        reach = torch.randint(1, self.window + 1, (len(words),))
        has_context = torch.bincount(captions, minlength=1)[captions] > 1
        places = has_context.nonzero().squeeze(1)
        if not len(places):
            raise UserError('no caption has two words of the vocabulary; try a smaller --min_count, or leave out '
                            '--sample')
        for part in places[torch.randperm(len(places))].split(self.batch_size):
            yield {'target': words[part], 'context': self._context(words, captions, reach, part)}

    def _context(self, words, captions, reach, places):
        """Return the words [B, 2 * window] around the positions `places` [B], up to `reach` and within the caption."""
        offsets = torch.tensor([offset for offset in range(-self.window, self.window + 1) if offset])
        around = places[:, None] + offsets
        inside = around.clamp(0, len(words) - 1)
        is_context = ((around == inside) & (offsets.abs() <= reach[places][:, None])
                      & (captions[inside] == captions[places][:, None]))
        return torch.where(is_context, words[inside], NO_WORD)
