"""Texts as spans of plain files, and their division into splits."""

import dataclasses
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from mi.config import ArgumentError

SPLITS = ('train', 'valid', 'test')


class DataError(ArgumentError):
    """An error in the files of a corpus, or in the arguments that name them.

    The message has one line. It puts the arguments of `mi.lm.data.token_store.load` in backticks,
    so that a caller can replace them with the names of its own options.
    """


@dataclasses.dataclass(frozen=True)
class Text:
    """A text: bytes `start` to `stop` of an uncompressed file.

    Attributes:
      file: the uncompressed file.
      start, stop: span of the text, in bytes.
      origin: the file that the user named, plain or compressed, for messages.
      domain: name of the domain, or '' if the corpus has no domains.
    """

    file: pathlib.Path
    start: int
    stop: int
    origin: pathlib.Path
    domain: str = ''

    @property
    def size(self) -> int:
        """The length in bytes."""
        return self.stop - self.start

    def array(self) -> np.ndarray:
        """Return the bytes, uint8 [size], memory-mapped."""
        if self.size == 0:
            return np.zeros(0, np.uint8)
        return np.memmap(self.file, np.uint8, 'r', self.start, (self.size,))

    def pieces(self, size: int = 2**16) -> Iterator[str]:
        """Yield the text in pieces of up to `size` bytes, each as long as possible.

        A piece ends at the end of a line. If the line is longer than `size`, the piece ends before
        a space. A word longer than `size` is not divided.

        Raises:
          DataError: if the text is not UTF-8.
        """
        text_bytes, position, block_size = self.array(), 0, size
        while position < len(text_bytes):
            block = text_bytes[position : position + block_size].tobytes()
            piece_end = len(block)
            if position + piece_end < len(text_bytes):
                piece_end = block.rfind(b'\n') + 1 or block.rfind(b' ', 1)
            if piece_end < 0:
                block_size *= 2
                continue
            try:
                piece = block[:piece_end].decode()
            except UnicodeDecodeError as error:
                bad_byte = self.start + position + error.start
                raise DataError(
                    f'{self.origin}: expected UTF-8 text, but byte {bad_byte} is invalid. Try '
                    f'converting the file to UTF-8'
                ) from error
            yield piece
            position, block_size = position + piece_end, size


Texts = dict[str, list[Text]]  # split → its texts, in order; with domains, one for each, by name


def check_texts(source: str, texts: object, splits: Collection[str]) -> None:
    """Check what the function of a user's corpus returned.

    Raises:
      DataError: if it is not a mapping that has a list of `Text` for each of the splits.
    """
    by_split = texts if isinstance(texts, Mapping) else {}
    if all(_is_list_of_texts(by_split.get(split)) for split in splits):
        return
    actual = sorted(map(str, texts)) if isinstance(texts, Mapping) else type(texts).__name__
    raise DataError(
        f'`source` = {source!r}: expected the lists of mi.lm.data.texts.Text of '
        f'{", ".join(splits)}, by split, got {actual}. Try split_by_lines(open_text(path, cache)) '
        f'of mi.lm.data.sources'
    )


def _is_list_of_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, Text) for text in value)


def split_by_lines(text: Text) -> Texts:
    """Split a text by lines: 90 % for train, 5 % for valid and 5 % for test.

    A text with too few lines is split by bytes in the same proportions, at the end of a word.
    """
    text_bytes, block_size = text.array(), 2**24
    line_ends = [
        np.flatnonzero(text_bytes[start : start + block_size] == ord('\n')) + start
        for start in range(0, len(text_bytes), block_size)
    ]
    line_starts = np.concatenate([np.array([-1]), *line_ends]) + 1
    num_lines = len(line_starts) - (line_starts[-1] == len(text_bytes))
    cuts = [int(line_starts[int(num_lines * share)]) for share in (0.9, 0.95)]
    if not 1 < cuts[0] < cuts[1] - 1 < len(text_bytes) - 2:
        cuts = [_find_word_end(text_bytes, len(text_bytes) * share // 100) for share in (90, 95)]
    return split_at(text, cuts)


def _find_word_end(text_bytes: np.ndarray, position: int) -> int:
    """Return the offset of the byte that follows the next white space.

    If the next fortieth of the text has no white space, return the start of the next character.
    """
    window = text_bytes[position : position + len(text_bytes) // 40]
    spaces = np.flatnonzero(np.isin(window, np.frombuffer(b'\t\n\r ', np.uint8)))
    if len(spaces):
        return position + int(spaces[0]) + 1
    while position < len(text_bytes) and text_bytes[position] & 0b1100_0000 == 0b1000_0000:
        position += 1  # within a letter of UTF-8
    return position


def split_at(text: Text, cuts: Sequence[int]) -> Texts:
    """Split a text at the two offsets in bytes at which valid and test start."""
    split_edges = [text.start, *(text.start + cut for cut in cuts), text.stop]
    return {
        split: [dataclasses.replace(text, start=start, stop=stop)]
        for split, start, stop in zip(SPLITS, split_edges, split_edges[1:], strict=False)
    }


def join_texts(corpora: Sequence[Texts]) -> Texts:
    """Concatenate the texts of several corpora in each split."""
    return {split: [text for corpus in corpora for text in corpus[split]] for split in corpora[0]}
