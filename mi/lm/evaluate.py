"""Evaluation of a language model on a whole text, once, with carried state."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mi.lm import data, loss
from mi.lm.model import Carry, LanguageModel


@functools.partial(jax.jit, static_argnums=0)
def _segment(
    model: LanguageModel, params: Any, carry: Carry, inputs: Array, targets: Array, mask: Array
) -> tuple[Carry, Array]:
    """Carry and Σ nats over a segment, for every seed."""

    def one_seed(params: Any, carry: Carry) -> tuple[Carry, Array]:
        logits: Array
        carry, logits = model.apply({'params': params}, carry, inputs)  # type: ignore[assignment]
        return carry, (loss.nats(logits, targets) * mask).sum()

    return jax.vmap(one_seed)(params, carry)


def evaluate(
    model: LanguageModel,
    params: Any,
    corpus: data.Corpus,
    split: str,
    batch: int,
    length: int,
    most: int = 0,
) -> list[dict[str, Any]]:
    """The metrics of each seed on a split.

    The text is cut into `batch` contiguous parts, each read from a zero state to its end in
    segments of `length` tokens with the state carried; every token but the first of the text is
    predicted exactly once.

    Args:
      model: the model.
      params: its parameters, with a leading axis of seeds.
      corpus: the corpus.
      split: 'valid' or 'test'.
      batch: number of parts, B.
      length: tokens a segment, T; no effect on the result but rounding.
      most: how many tokens from the start of the text; 0 for all of them.

    Returns:
      For each seed: nats_per_token, perplexity, bits_per_byte (None where the tokens do not
      determine the text), and what they were measured over.
    """
    whole = corpus.tokens[split]
    tokens = whole[: most or len(whole)]
    seeds = len(jax.tree.leaves(params)[0])
    batch = min(batch, len(tokens) - 1)
    carry = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (seeds, *leaf.shape)), model.initial_carry(batch)
    )
    total = np.zeros(seeds, np.float64)
    for inputs, targets, mask in data.segments(tokens, batch, length):
        carry, summed = _segment(model, params, carry, inputs, targets, mask)
        total += np.asarray(summed, np.float64)
    predictions = len(tokens) - 1
    results: list[dict[str, Any]] = []
    for mean in (total / predictions).tolist():
        per_byte = loss.bits_per_byte(mean, len(whole), corpus.bytes[split])
        results.append(
            {
                'nats_per_token': mean,
                'perplexity': math.exp(min(mean, 700.0)),
                'bits_per_byte': per_byte if corpus.lossless else None,
                'over': {'predictions': predictions, 'batch': batch, 'length': length},
            }
        )
    return results
