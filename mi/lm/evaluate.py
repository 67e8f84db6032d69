"""Evaluation of a language model on a whole text, once.

Three ways, and the results say which:

- Carried state: the text in contiguous parts, in segments one after another, with the recurrent
  state or the Transformer's memory carried on.
- Sliding window (`stride`): a window of `length` tokens that moves on by `stride` and predicts so
  many; every token but the first ones sees at least length − stride tokens, nothing is carried.
- Dynamic: see `mi.lm.dynamic`.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mi import parallel, progress
from mi.lm import data, loss
from mi.lm.model import Carry, LanguageModel


class Reading(NamedTuple):
    """How a text is read.

    Attributes:
      batch: parts of it, or windows, that are read side by side.
      length: tokens of a segment or a window.
      stride: of the windows; 0 to carry state from segment to segment instead.
    """

    batch: int
    length: int
    stride: int = 0


@functools.partial(jax.jit, static_argnums=(0, 1))
def _segment(
    model: LanguageModel,
    split: bool,
    params: Any,
    carry: Carry,
    inputs: Array,
    targets: Array,
    mask: Array,
    domains: Array | None,
) -> tuple[Carry, Array]:
    """Carry and Σ nats over a segment, for every seed; rows over the devices if `split`."""
    if split:
        inputs, targets, mask = (parallel.keep_rows(a, 1) for a in (inputs, targets, mask))

    def one_seed(params: Any, carry: Carry) -> tuple[Carry, Array]:
        losses: loss.Losses
        carry, losses = model.apply(  # type: ignore[assignment]
            {'params': params}, carry, inputs, targets, domains
        )
        return carry, (losses.nats * mask).sum()

    return jax.vmap(one_seed)(params, carry)


def evaluate(
    model: LanguageModel,
    params: Any,
    corpus: data.Corpus,
    split: str,
    reading: Reading,
    most: int,
    mesh: jax.sharding.Mesh,
    check: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """The metrics of each seed on a split.

    Args:
      model: the model.
      params: its parameters, with a leading axis of seeds.
      corpus: the corpus.
      split: 'valid' or 'test'.
      reading: how.
      most: how many tokens from the start of the text; 0 for all of them.
      mesh: of devices; they share the batch if they divide it.
      check: called before each segment; what it raises ends the evaluation.

    Returns:
      For each seed: nats_per_token, perplexity, bits_per_byte (None where the tokens do not
      determine the text), and how they were measured.
    """
    tokens = corpus.tokens[split]
    tokens = tokens[: most or len(tokens)]
    seeds = len(jax.tree.leaves(params)[0])
    predictions = len(tokens) - 1
    batch = min(reading.batch, predictions)
    total = np.zeros(seeds, np.float64)
    shared = batch % mesh.size == 0
    start = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (seeds, *leaf.shape)), model.initial_carry(batch)
    )
    carry = start
    work = progress.Work(f'evaluating {split}', predictions, 'tokens')
    with jax.set_mesh(mesh), work:
        for inputs, targets, mask, positions in _pieces(tokens, batch, reading):
            check()
            domains = None
            if model.source == 'domain':
                domains = corpus.domain(split, positions)
            carry, summed = _segment(model, shared, params, carry, inputs, targets, mask, domains)
            total += np.asarray(summed, np.float64)
            carry = start if reading.stride else carry
            work.done += mask.sum()
    over = {'predictions': predictions, 'batch': batch, 'length': reading.length}
    if reading.stride:
        over['stride'] = reading.stride
    if model.memory is not None:
        over['memory'] = model.memory
    return [result(mean, corpus, split, over) for mean in (total / predictions).tolist()]


def _pieces(tokens: np.ndarray, batch: int, reading: Reading) -> Iterator[data.Piece]:
    if reading.stride:
        return data.windows(tokens, batch, reading.length, reading.stride)
    return data.segments(tokens, batch, reading.length)


def result(
    nats_per_token: float, corpus: data.Corpus, split: str, over: dict[str, Any]
) -> dict[str, Any]:
    """Return the metrics that follow from the mean loss of the first `over['predictions']`.

    Bits per byte are those of the bytes that were predicted, which a text may have more or fewer of
    to a token in its first part than elsewhere.
    """
    predictions = over['predictions']
    predicted_bytes = corpus.predicted_bytes(split, predictions) if corpus.lossless else 0
    return {
        'nats_per_token': nats_per_token,
        'perplexity': math.exp(min(nats_per_token, 700.0)),
        'bits_per_byte': loss.bits_per_byte(nats_per_token, predictions, predicted_bytes)
        if predicted_bytes
        else None,
        'over': over,
    }
