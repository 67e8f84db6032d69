"""Reading orders of a text: streams for training, and segments and windows for evaluation."""

from collections.abc import Iterator

import numpy as np

from mi.config import ArgumentError

Piece = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""(inputs, targets, mask, positions of the inputs), each [T, B]."""


class Stream:
    """A stream of training batches from a contiguous text.

    B readers start at evenly spaced positions in the text. Each reads T tokens per step and wraps
    around at the end of the text, so that a carried state always matches the tokens that follow.
    An epoch, in which every token is read once, has N / (B·T) steps. A batch depends only on the
    step, so that a stream has no state to save.

    Args:
      tokens: ids [N].
      batch: number of readers, B.
      length: number of tokens that each reader reads per step, T.
      seed: random seed for the position of the first reader.

    Raises:
      ArgumentError: if the text has too few tokens for the batch.
    """

    def __init__(self, tokens: np.ndarray, batch: int, length: int, seed: int):
        if len(tokens) < batch + 1:
            raise ArgumentError(
                f'`batch` = {batch}: expected less than {len(tokens)}, the number of tokens in the '
                f'training text'
            )
        self._tokens, self._length = tokens, length
        first_start = np.random.default_rng(seed).integers(len(tokens))
        self._starts = first_start + np.arange(batch) * (len(tokens) // batch)
        self._epoch = max(1, len(tokens) // (batch * length))

    def __len__(self) -> int:
        """Return the number of complete steps in an epoch. `__getitem__` accepts any step."""
        return self._epoch

    def __getitem__(self, step: int) -> np.ndarray:
        """Return ids, int32 [T + 1, B]: rows 0…T−1 are the inputs, and rows 1…T the targets."""
        return self._tokens[self.get_positions(step)].astype(np.int32)

    def get_positions(self, step: int, readers: slice = slice(None)) -> np.ndarray:
        """Return the text positions of the tokens in a step, [T + 1, b].

        Args:
          step: index of the step.
          readers: slice of the b readers whose rows of the batch a device holds. Defaults to all.
        """
        time_offsets = step * self._length + np.arange(self._length + 1)
        return (self._starts[None, readers] + time_offsets[:, None]) % len(self._tokens)


def segments(tokens: np.ndarray, batch: int, length: int) -> Iterator[Piece]:
    """Yield the text in consecutive segments of `length` tokens, for a model with carried state.

    The N − 1 predictions are split into B contiguous parts, which are read in parallel. Parts are
    padded to the same number of segments, and the mask is 0 for padding.
    """
    num_predictions = len(tokens) - 1
    part_length = -(-num_predictions // batch)
    part_starts = np.arange(batch)[None, :] * part_length
    for segment_start in range(0, part_length, length):
        time_offsets = segment_start + np.arange(length)[:, None]
        positions = part_starts + time_offsets
        is_scored = (positions < num_predictions) & (time_offsets < part_length)
        yield _gather_piece(tokens, positions, is_scored)


def windows(tokens: np.ndarray, batch: int, length: int, stride: int) -> Iterator[Piece]:
    """Yield the text in windows of T = min(length, N − 1) tokens, B windows at a time.

    Windows advance by `stride` tokens, and no state is carried. The mask is 1 for the whole first
    window and for the last `stride` tokens of every other window, so that each of the N − 1
    predictions is scored once. After the first T − stride predictions, each one sees at least
    T − stride + 1 tokens.

    Raises:
      ValueError: unless 1 ≤ stride ≤ length.
    """
    if not 1 <= stride <= length:
        raise ValueError(f'stride = {stride}: expected 1 to {length}, the length of a window')
    num_predictions = len(tokens) - 1
    length = min(length, num_predictions)
    num_windows = 1 + -(-(num_predictions - length) // stride)
    time_offsets = np.arange(length)[:, None]
    for first_window in range(0, num_windows, batch):
        window_numbers = first_window + np.arange(batch)[None, :]
        positions = window_numbers * stride + time_offsets
        is_scored = (time_offsets >= length - stride) | (window_numbers == 0)
        yield _gather_piece(tokens, positions, is_scored & (positions < num_predictions))


def _gather_piece(tokens: np.ndarray, positions: np.ndarray, mask: np.ndarray) -> Piece:
    """Return the piece with inputs at these positions, which are clipped to the text."""
    positions = np.minimum(positions, len(tokens) - 2)
    inputs, targets = tokens[positions], tokens[positions + 1]
    return inputs.astype(np.int32), targets.astype(np.int32), mask.astype(np.float32), positions
