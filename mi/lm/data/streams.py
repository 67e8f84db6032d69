"""Batches of a text: streams for training, segments and windows for evaluation."""

from collections.abc import Iterator

import numpy as np

from mi.config import UserError

Piece = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Stream:
    """Batches of a contiguous text, a pure function of the step: nothing to save, exact resume.

    B readers start evenly spaced in the text and each reads on, T tokens a step, around the whole
    text: a carried recurrent state always continues the text that it has read. N / (B·T) steps
    are an epoch, in which every token is read once.

    Args:
      tokens: [N].
      batch: B.
      length: T.
      seed: where in the text the first reader starts, so that seeds read in different order.
    """

    def __init__(self, tokens: np.ndarray, batch: int, length: int, seed: int):
        if len(tokens) < batch + 1:
            raise UserError(
                f'the training text has {len(tokens)} tokens, fewer than the batch of {batch}'
            )
        self._tokens, self._length = tokens, length
        first = np.random.default_rng(seed).integers(len(tokens))
        self._starts = first + np.arange(batch) * (len(tokens) // batch)
        self._epoch = max(1, len(tokens) // (batch * length))

    def __len__(self) -> int:
        """Whole steps of an epoch; any step may be asked for."""
        return self._epoch

    def __getitem__(self, step: int) -> np.ndarray:
        """int32 [T + 1, B]: rows 0…T−1 are the inputs, rows 1…T the targets."""
        return self._tokens[self.positions(step)].astype(np.int32)

    def positions(self, step: int, readers: slice = slice(None)) -> np.ndarray:
        """Return where in the text the tokens of a step stand, [T + 1, b]; see `Corpus.domain`.

        Args:
          step: number of the step.
          readers: b of them, for a device that has these rows of the batch; all by default.
        """
        rows = step * self._length + np.arange(self._length + 1)
        return (self._starts[None, readers] + rows[:, None]) % len(self._tokens)


def segments(tokens: np.ndarray, batch: int, length: int) -> Iterator[Piece]:
    """The whole text once: inputs, targets, mask and positions of the inputs, each [T, B].

    The N − 1 predictions are split into B contiguous parts; parts are padded, masked with 0, to
    the same number of segments. State is to be carried from segment to segment.
    """
    predictions = len(tokens) - 1
    part = -(-predictions // batch)
    starts = np.arange(batch)[None, :] * part
    for at in range(0, part, length):
        rows = at + np.arange(length)[:, None]
        yield gather_piece(tokens, starts + rows, (starts + rows < predictions) & (rows < part))


def windows(tokens: np.ndarray, batch: int, length: int, stride: int) -> Iterator[Piece]:
    """The whole text once, in windows of T tokens that move on by `stride`, B side by side.

    Inputs, targets, mask and positions of the inputs, each [T, B], T = min(length, N − 1). The mask
    is 1 for all of the first window and for the last `stride` of the others: each of the N − 1
    predictions is scored once, from at least T − stride + 1 tokens but for the first T − stride of
    the text. No state is to be carried.

    Raises:
      ValueError: unless 1 ≤ stride ≤ length.
    """
    if not 1 <= stride <= length:
        raise ValueError(f'stride = {stride}: expected 1 to {length}, the length of a window')
    predictions = len(tokens) - 1
    length = min(length, predictions)
    count = 1 + -(-(predictions - length) // stride)
    rows = np.arange(length)[:, None]
    for at in range(0, count, batch):
        window = at + np.arange(batch)[None, :]
        index = window * stride + rows
        scored = (rows >= length - stride) | (window == 0)
        yield gather_piece(tokens, index, scored & (index < predictions))


def gather_piece(tokens: np.ndarray, index: np.ndarray, mask: np.ndarray) -> Piece:
    index = np.minimum(index, len(tokens) - 2)
    inputs, targets = tokens[index], tokens[index + 1]
    return inputs.astype(np.int32), targets.astype(np.int32), mask.astype(np.float32), index
