"""Evaluation of a language model on a held-out text.

Each token is predicted once, by one of three protocols. Results record which protocol was used.

- Carried state: the text is divided into contiguous parts, and each part is read in consecutive
  segments. The recurrent state or the Transformer's memory is carried from segment to segment.
- Sliding window (`stride` > 0): a window of `length` tokens advances by `stride` tokens, which are
  the predicted ones. After the first window, every prediction sees at least length − stride
  earlier tokens. No state is carried.
- Dynamic evaluation: see `mi.lm.dynamic_evaluation`.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from chex import ArrayTree
from jax import Array
from jax.typing import DTypeLike

from mi.lm import loss
from mi.lm.data import streams
from mi.lm.data.corpus import Corpus
from mi.lm.model import Carry, LanguageModel, Params
from mi.rows import sum_over_rows
from mi.training import progress, sharding

Scores = dict[str, Any]
"""Metrics of one seed on a text, with the protocol: the fields of a JSON record."""


class Reading(NamedTuple):
    """The protocol for reading a text.

    Attributes:
      batch: number of parts or windows that are read in parallel.
      length: number of tokens in a segment or a window.
      stride: number of tokens by which a window advances, or 0 to carry state between segments.
    """

    batch: int
    length: int
    stride: int = 0


class Excerpt(NamedTuple):
    """The start of a held-out text.

    Attributes:
      corpus: the corpus.
      split: 'valid' or 'test'.
      num_tokens: number of tokens from the start of the text, or 0 for all.
    """

    corpus: Corpus
    split: str
    num_tokens: int = 0

    @property
    def tokens(self) -> np.ndarray:
        """The ids of the excerpt, [N]."""
        tokens = self.corpus.tokens[self.split]
        return tokens[: self.num_tokens or len(tokens)]


@functools.cache
def segment_program(model: LanguageModel, mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
    """Return a jitted program that evaluates a segment with every seed.

    The program maps (params, carry, inputs [T, B], targets, mask, domains) to the new carry and the
    total nats of each seed, [S]. Each device computes its own seeds and rows. Unless the parameters
    are sharded, the sums over rows are the only communication.
    """
    row_spec = sharding.batch_sharding(mesh, 1).spec
    seed_spec = sharding.seed_sharding(mesh).spec
    carry_sharding = sharding.batch_sharding(mesh, 1, has_seeds=True)

    # One seed on the rows of this device.
    def evaluate_seed(
        partition: ArrayTree | None, params: Params, carry: Carry, segment: Sequence[Any]
    ) -> tuple[Carry, Array]:
        inputs, targets, mask, domains = segment
        params = sharding.gather_params(params, partition)
        losses: loss.Losses
        next_carry, losses = model.apply(  # type: ignore[assignment]
            {'params': params}, carry, inputs, targets, domains
        )
        return next_carry, sum_over_rows((losses.nats * mask).sum())

    # All seeds: how their parameters are split is known when the program is traced.
    def evaluate_segment(
        params: Params, carry: Carry, *segment: Array | None
    ) -> tuple[Carry, Array]:
        partition = sharding.fsdp_specs(params, mesh)
        params_specs = sharding.partition_specs(sharding.fsdp_sharding(params, mesh))
        return jax.shard_map(
            jax.vmap(functools.partial(evaluate_seed, partition), in_axes=(0, 0, None)),
            mesh=mesh,
            in_specs=(params_specs, carry_sharding.spec, [row_spec] * 4),
            out_specs=(carry_sharding.spec, seed_spec),
            check_vma=False,
        )(params, carry, list(segment))

    out_shardings = carry_sharding, sharding.metrics_sharding(mesh)
    return jax.jit(evaluate_segment, out_shardings=out_shardings)


def evaluate(
    model: LanguageModel,
    params: Params,
    excerpt: Excerpt,
    reading: Reading,
    mesh: jax.sharding.Mesh,
    check: Callable[[], None] = lambda: None,
) -> list[Scores]:
    """Evaluate each seed on a held-out text.

    Args:
      model: the model.
      params: parameters of the model, [S, …].
      excerpt: the text.
      reading: protocol for reading the text.
      mesh: mesh of devices, which divide the seeds and the batch.
      check: function called before each segment. It may raise an exception to end the evaluation.

    Returns:
      The metrics of each seed: nats_per_token, perplexity, bits_per_byte (None if the tokens do not
      determine the text), and the protocol.
    """
    # Sizes: idle rows without a token give every device the same number of rows.
    corpus, split, _ = excerpt
    tokens = excerpt.tokens
    num_seeds = len(jax.tree.leaves(params)[0])
    num_predictions = len(tokens) - 1
    batch_size = min(reading.batch, num_predictions)
    idle_rows = -batch_size % (mesh.size // mesh.shape['seed'])
    row_sharding = sharding.batch_sharding(mesh, 1)

    def shard_rows(array: np.ndarray) -> Array:
        return sharding.shard_array(np.pad(array, ((0, 0), (0, idle_rows))), row_sharding)

    # The text, segment by segment.
    program = segment_program(model, mesh)
    initial_carry = _place_initial_carry(model, num_seeds, batch_size + idle_rows, mesh)
    carry, total_nats = initial_carry, np.zeros(num_seeds, np.float64)
    max_running = 0 if sharding.is_synchronous(mesh) else 1  # segments, while the host reads one
    unread: collections.deque[Array] = collections.deque()
    with progress.Work(f'evaluating {split}', num_predictions, 'tokens') as work:
        for inputs, targets, mask, positions in _read_pieces(tokens, batch_size, reading):
            check()
            domains = None
            if model.source == 'domain':
                domains = shard_rows(corpus.get_domains(split, positions))
            carry, nats = program(params, carry, *map(shard_rows, (inputs, targets, mask)), domains)
            carry = initial_carry if reading.stride else carry
            work.done += mask.sum()
            unread.append(nats)
            while len(unread) > max_running:
                total_nats += np.asarray(unread.popleft(), np.float64)
        total_nats += sum(np.asarray(nats, np.float64) for nats in unread)

    # The metrics, and how they were measured.
    protocol = {'predictions': num_predictions, 'batch': batch_size, 'length': reading.length}
    if reading.stride:
        protocol['stride'] = reading.stride
    if model.memory is not None:
        protocol['memory'] = model.memory
    mean_nats = (total_nats / num_predictions).tolist()
    return [compute_metrics(nats, corpus, split, protocol) for nats in mean_nats]


def compile_segment(
    model: LanguageModel,
    params: Params,
    reading: Reading,
    has_domains: bool,
    mesh: jax.sharding.Mesh,
) -> jax.stages.Compiled:
    """Compile the program that `evaluate` calls for each segment.

    The program is for texts that are long enough to fill a batch.

    Args:
      model: the model.
      params: shapes and shardings of the parameters for all seeds.
      reading: protocol for reading the text.
      has_domains: whether the model uses the domain of each token.
      mesh: mesh of devices.
    """
    # The shapes of the carry, and of a segment.
    batch_size = reading.batch + -reading.batch % (mesh.size // mesh.shape['seed'])
    num_seeds = jax.tree.leaves(params)[0].shape[0]
    carry_sharding = sharding.batch_sharding(mesh, 1, has_seeds=True)
    carry = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((num_seeds, *a.shape), a.dtype, sharding=carry_sharding),
        jax.eval_shape(lambda: model.initial_carry(batch_size)),
    )

    def describe_rows(dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        shape = reading.length, batch_size
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh, 1))

    tokens, mask = describe_rows(np.int32), describe_rows(np.float32)
    domains = tokens if has_domains else None
    program = segment_program(model, mesh)
    return program.lower(params, carry, tokens, tokens, mask, domains).compile()


def _place_initial_carry(
    model: LanguageModel, num_seeds: int, batch: int, mesh: jax.sharding.Mesh
) -> Carry:
    """Return the initial carry of all seeds, sharded over the devices."""
    carry_sharding = sharding.batch_sharding(mesh, 1, has_seeds=True)
    return jax.tree.map(
        lambda a: sharding.shard_array(np.broadcast_to(a, (num_seeds, *a.shape)), carry_sharding),
        model.initial_carry(batch),
    )


def _read_pieces(tokens: np.ndarray, batch: int, reading: Reading) -> Iterator[streams.Piece]:
    """Yield the segments or windows of a text."""
    if reading.stride:
        return streams.windows(tokens, batch, reading.length, reading.stride)
    return streams.segments(tokens, batch, reading.length)


def compute_metrics(
    nats_per_token: float, corpus: Corpus, split: str, protocol: Mapping[str, Any]
) -> Scores:
    """Compute metrics from the mean loss on the first tokens of a split.

    Bits per byte only count the bytes of the predicted tokens, because an excerpt and the whole
    text differ in bytes per token.

    Args:
      nats_per_token: mean loss.
      corpus: the corpus.
      split: 'valid' or 'test'.
      protocol: protocol of the evaluation, including 'predictions', the number of predicted tokens.
    """
    num_predictions = protocol['predictions']
    predicted_bytes = corpus.count_predicted_bytes(split, num_predictions) if corpus.lossless else 0
    bits_per_byte = None
    if predicted_bytes:
        bits_per_byte = loss.bits_per_byte(nats_per_token, num_predictions, predicted_bytes)
    return {
        'nats_per_token': nats_per_token,
        'perplexity': math.exp(min(nats_per_token, 700.0)),
        'bits_per_byte': bits_per_byte,
        'over': protocol,
    }
