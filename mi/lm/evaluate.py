"""Evaluation of a language model on a whole text, once.

Three ways, and the results say which:

- Carried state: the text in contiguous parts, in segments one after another, with the recurrent
  state or the Transformer's memory carried on.
- Sliding window (`stride`): a window of `length` tokens that moves on by `stride` and predicts so
  many; every token but the first ones sees at least length − stride tokens, nothing is carried.
- Dynamic: see `mi.lm.dynamic_evaluation`.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from mi.lm import loss
from mi.lm.data import streams, token_store
from mi.lm.model import Carry, LanguageModel
from mi.rows import sum_over_rows
from mi.training import progress
from mi.training import sharding as training_sharding


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


@functools.cache
def segment_program(model: LanguageModel, mesh: jax.sharding.Mesh) -> Any:
    """Return the program of a segment: carry and Σ nats of it, [S], of every seed.

    (params, carry, inputs [T, B], targets, mask, domains) → (carry, Σ nats). Each device has its
    seeds and rows; the sums are the only communication, where parameters are not split.
    """
    rows = training_sharding.batch_sharding(mesh, 1).spec
    by_seed, carry_spec = (
        training_sharding.seed_sharding(mesh).spec,
        training_sharding.batch_sharding(mesh, 1, True).spec,
    )

    def one_seed(
        partition: Any, params: Any, carry: Carry, batch: Sequence[Any]
    ) -> tuple[Carry, Array]:
        inputs, targets, mask, domains = batch
        losses: loss.Losses
        carry, losses = model.apply(  # type: ignore[assignment]
            {'params': training_sharding.gather_params(params, partition)},
            carry,
            inputs,
            targets,
            domains,
        )
        return carry, sum_over_rows((losses.nats * mask).sum())

    def segment(params: Any, carry: Carry, *batch: Array | None) -> tuple[Carry, Array]:
        partition = training_sharding.fsdp_specs(params, mesh)
        return jax.shard_map(
            jax.vmap(functools.partial(one_seed, partition), in_axes=(0, 0, None)),
            mesh=mesh,
            in_specs=(
                training_sharding.partition_specs(training_sharding.fsdp_sharding(params, mesh)),
                carry_spec,
                [rows] * 4,
            ),
            out_specs=(carry_spec, by_seed),
            check_vma=False,
        )(params, carry, list(batch))

    carry_sharding = training_sharding.batch_sharding(mesh, 1, has_seeds=True)
    return jax.jit(
        segment, out_shardings=(carry_sharding, training_sharding.metrics_sharding(mesh))
    )


def evaluate(
    model: LanguageModel,
    params: Any,
    corpus: token_store.Corpus,
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
      mesh: of devices, which share the seeds and the batch.
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
    program = segment_program(model, mesh)
    shards = mesh.size // mesh.shape['seed']
    idle = -batch % shards  # rows without a token, so that the devices have as many each
    start = _initial_carry(model, seeds, batch + idle, mesh)
    carry = start
    sharding = training_sharding.batch_sharding(mesh, 1)

    def put(array: np.ndarray) -> Array:
        return training_sharding.shard_array(np.pad(array, ((0, 0), (0, idle))), sharding)

    with progress.Work(f'evaluating {split}', predictions, 'tokens') as work:
        for inputs, targets, mask, positions in _pieces(tokens, batch, reading):
            check()
            domains = None
            if model.source == 'domain':
                domains = put(corpus.domain(split, positions))
            carry, summed = program(params, carry, *map(put, (inputs, targets, mask)), domains)
            total += np.asarray(summed, np.float64)
            carry = start if reading.stride else carry
            work.done += mask.sum()
    over = {'predictions': predictions, 'batch': batch, 'length': reading.length}
    if reading.stride:
        over['stride'] = reading.stride
    if model.memory is not None:
        over['memory'] = model.memory
    return [result(mean, corpus, split, over) for mean in (total / predictions).tolist()]


def compile_segment(
    model: LanguageModel, params: Any, reading: Reading, has_domains: bool, mesh: jax.sharding.Mesh
) -> jax.stages.Compiled:
    """Compile the program that `evaluate` calls for each segment of a text that is long enough.

    Args:
      model: the model.
      params: shapes of the parameters of all seeds, placed on the mesh.
      reading: how the text is read.
      has_domains: whether the model is told the domain of each token.
      mesh: of devices.
    """
    batch = reading.batch + -reading.batch % (mesh.size // mesh.shape['seed'])
    seeds = jax.tree.leaves(params)[0].shape[0]
    carry_sharding = training_sharding.batch_sharding(mesh, 1, has_seeds=True)
    carry = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((seeds, *a.shape), a.dtype, sharding=carry_sharding),
        jax.eval_shape(lambda: model.initial_carry(batch)),
    )

    def rows(dtype: Any) -> jax.ShapeDtypeStruct:
        shape = reading.length, batch
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=training_sharding.batch_sharding(mesh, 1)
        )

    tokens, mask = rows(np.int32), rows(np.float32)
    domains = tokens if has_domains else None
    compiled: jax.stages.Compiled = (
        segment_program(model, mesh).lower(params, carry, tokens, tokens, mask, domains).compile()
    )
    return compiled


def _initial_carry(model: LanguageModel, seeds: int, batch: int, mesh: jax.sharding.Mesh) -> Carry:
    """Return the carry of all seeds before the first token, each device with its own."""

    sharding = training_sharding.batch_sharding(mesh, 1, has_seeds=True)
    return jax.tree.map(
        lambda a: training_sharding.shard_array(np.broadcast_to(a, (seeds, *a.shape)), sharding),
        model.initial_carry(batch),
    )


def _pieces(tokens: np.ndarray, batch: int, reading: Reading) -> Iterator[streams.Piece]:
    if reading.stride:
        return streams.windows(tokens, batch, reading.length, reading.stride)
    return streams.segments(tokens, batch, reading.length)


def result(
    nats_per_token: float, corpus: token_store.Corpus, split: str, over: dict[str, Any]
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
