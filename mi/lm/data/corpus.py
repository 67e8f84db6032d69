"""The corpus: token ids of three splits, their domains, and the original text."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers

from mi.lm.data.texts import Texts
from mi.lm.data.tokenizers import (
    UNMARKED,
    Level,
    count_bytes,
    count_id_bytes,
    mark_line_ends,
    remove_line_ends,
    split_pieces,
)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenized corpus.

    Attributes:
      name: name of the corpus, for messages.
      vocabulary: number of token ids. Word ids are sorted by descending frequency, and an <unk>
        that does not occur in the text comes last.
      tokens: split → ids [N].
      num_bytes: split → length of its text in UTF-8. 'train' is missing if `train_tokens` shortens
        the split, except at the level 'byte'.
      lossless: whether the tokens determine the text, so that bits per byte are defined.
      sha256: hash of the tokens in all splits, one split after another.
      domains: sorted names of the domains, or () if there are none.
      starts: split → the position at which each domain starts, [domains], or [0] if there are none.
      tokenizer: the tokenizer, or None for bytes.
      level: level of the tokens, as in `mi.lm.data.token_store`.
      tokenizer_sha256: hash of the tokenizer file at the level 'file', or '' at other levels.
      texts: split → its texts in reading order.
    """

    name: str
    vocabulary: int
    tokens: dict[str, np.ndarray]
    num_bytes: dict[str, int]
    lossless: bool
    sha256: str
    domains: tuple[str, ...]
    starts: dict[str, np.ndarray]
    tokenizer: tokenizers.Tokenizer | None
    texts: Texts
    level: Level
    tokenizer_sha256: str = ''

    @property
    def sizes(self) -> tuple[int, int]:
        """The number of token ids and the number of domains."""
        return self.vocabulary, len(self.domains)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Values in the metadata of a checkpoint that identify the tokens of each split."""
        sizes = {split: len(ids) for split, ids in self.tokens.items()}
        return {'data': self.sha256, 'num_tokens': sizes}

    def is_described_by(self, meta: Mapping[str, Any]) -> bool:
        """Return whether the metadata of a checkpoint has the fingerprint of these tokens.

        A run can only be resumed and evaluated on the same tokens. Older checkpoints do not have
        the numbers of tokens, so that only the hash is compared.
        """
        return all(meta.get(name, value) == value for name, value in self.fingerprint.items())

    def get_domains(self, split: str, positions: np.ndarray) -> np.ndarray:
        """Return the domain index of the tokens at these positions, int32 of the same shape."""
        return (np.searchsorted(self.starts[split], positions, 'right') - 1).astype(np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Encode a text to ids [N], without an <eos> after an unfinished last line."""
        if self.tokenizer is None:
            return np.frombuffer(text.encode(), np.uint8)
        if self.level not in UNMARKED:
            text = mark_line_ends(text)
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """Decode ids [N] to text. At the levels 'word' and 'token', spaces join the tokens."""
        if self.tokenizer is None:
            return np.asarray(tokens, np.uint8).tobytes().decode(errors='replace')
        text = self.tokenizer.decode(np.asarray(tokens).tolist())
        return text if self.level in UNMARKED else re.sub(' ?<eos> ?', '\n', text)

    def join(self, prompt: str, continuation: str) -> str:
        """Append a decoded continuation to a text, with a space where tokens are words."""
        is_separate = prompt[-1:].isspace() or continuation[:1].isspace()
        separator = '' if self.level in UNMARKED or is_separate else ' '
        return f'{prompt}{separator}{continuation}'

    def count_predicted_bytes(self, split: str, num_predictions: int) -> int:
        """Count the bytes of text in the predicted tokens, which exclude a split's first token.

        White space before a word counts as part of the word. At the levels 'bpe' and 'file', each
        id has a fixed number of bytes.

        Args:
          split: 'train', 'valid' or 'test'.
          num_predictions: number of tokens, counted from the second one.

        Raises:
          ValueError: if the tokens do not determine the text.
        """
        if not self.lossless:
            raise ValueError(
                f'{self.name}: expected lossless tokens to count bytes, but the tokens do not '
                f'determine the text'
            )
        if self.tokenizer is None:
            return num_predictions
        if self.level in UNMARKED:
            predicted_ids = self.tokens[split][1 : num_predictions + 1]
            id_counts = np.bincount(predicted_ids, minlength=len(self._bytes_per_id))
            return int(id_counts @ self._bytes_per_id)
        for num_tokens in (1, num_predictions + 1):
            if (split, num_tokens) not in self._word_ends:
                self._word_ends[split, num_tokens] = self._find_word_end(split, num_tokens)
        return self._word_ends[split, num_predictions + 1] - self._word_ends[split, 1]

    @functools.cached_property
    def _bytes_per_id(self) -> np.ndarray:
        """The number of bytes of each id, [V]."""
        assert self.tokenizer is not None
        id_bytes = count_id_bytes(self.tokenizer)
        assert id_bytes is not None  # otherwise the corpus is not lossless
        return id_bytes

    @functools.cached_property
    def _word_ends(self) -> dict[tuple[str, int], int]:
        """A cache of `_find_word_end`: (split, token count) → byte offset."""
        return {}

    def _find_word_end(self, split: str, num_tokens: int) -> int:
        """Return the offset in bytes at which the first `num_tokens` tokens end."""
        assert self.tokenizer is not None
        if num_tokens == len(self.tokens[split]):
            return self.num_bytes[split]
        byte_offset = 0
        for text in self.texts[split]:
            for piece in split_pieces(text, 'token'):
                word_spans = self.tokenizer.encode(piece, add_special_tokens=False).offsets
                if num_tokens <= len(word_spans):
                    return byte_offset + count_bytes(piece, word_spans[num_tokens - 1][1])
                num_tokens -= len(word_spans)
                byte_offset += len(remove_line_ends(piece).encode())
        raise ValueError(f'{self.name}: expected {num_tokens} more tokens in the split {split!r}')
