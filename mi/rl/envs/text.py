"""Tokenizers that map instructions to int32 tokens [L], padded with 0 at the end.

Words are lower-case runs of letters and digits. Punctuation is ignored. There are two ways to
number words: the closed vocabulary of BabyAI's grammar (Chevalier-Boisvert et al., 2019), and
hashing for unknown vocabularies, as in IMPALA (Espeholt et al., 2018).
"""

import re
import zlib
from collections.abc import Callable

import numpy as np

from mi.config import ArgumentError, UserError

# In the order of the grammar: actions, articles, colors, objects, places, connectives.
_GRAMMAR = (
    'go to pick up open put next the a red green blue purple yellow grey object door key ball box '
    'in front of you behind on your left right and then after'
)
BABYAI_WORDS = tuple(_GRAMMAR.split())
BABYAI_VOCABULARY = len(BABYAI_WORDS) + 1
# Four times 'put a grey ball in front of you next to …', joined by two 'and' and one 'after you'.
BABYAI_LENGTH = 72
# One clause: 'put a grey ball in front of you next to a grey ball in front of you'.
BABYAI_CLAUSE = 17
_BABYAI_TOKENS = {word: token for token, word in enumerate(BABYAI_WORDS, start=1)}


class Tokenizer:
    """A function from text to int32 tokens [length], with a cache of all distinct texts.

    Attributes:
      number: function from a word to its token, at least 1.
      length: number of tokens, L.
    """

    def __init__(self, number: Callable[[str], int], length: int):
        self.number = number
        self.length = length
        self._known: dict[str, np.ndarray] = {}

    def __call__(self, text: str) -> np.ndarray:
        """Return the tokens of a text as a read-only array.

        Raises:
          ArgumentError: if there are more than `length` words.
          UserError: if `number` raises it for a word.
        """
        if text not in self._known:
            words = re.findall('[a-z0-9]+', text.lower())
            if len(words) > self.length:
                raise ArgumentError(
                    f'the instruction {text!r} has {len(words)} words: expected at most '
                    f'{self.length}. Raise `options.length`'
                )
            tokens = np.zeros(self.length, np.int32)
            tokens[: len(words)] = [self.number(word) for word in words]
            tokens.flags.writeable = False
            self._known[text] = tokens
        return self._known[text]


def babyai(length: int = BABYAI_LENGTH) -> Tokenizer:
    """Return BabyAI's tokenizer, which raises UserError for words outside the grammar."""

    def number(word: str) -> int:
        if word not in _BABYAI_TOKENS:
            raise UserError(f'instruction word {word!r}: expected one of {", ".join(BABYAI_WORDS)}')
        return _BABYAI_TOKENS[word]

    return Tokenizer(number, length)


def hashed(buckets: int, length: int) -> Tokenizer:
    """Return a tokenizer that maps a word to 1 + its CRC-32 modulo `buckets`.

    The published agent uses a different hash function, so its buckets differ.
    """
    return Tokenizer(lambda word: 1 + zlib.crc32(word.encode()) % buckets, length)
