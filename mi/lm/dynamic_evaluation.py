"""Dynamic evaluation, in which the model keeps learning from the text that it has predicted.

This is the RMS variant of Krause et al. (2018). After the loss of a segment has been recorded, the
parameters θ are updated by

    θ ← θ − η g / (√MS + ε) + λ ⊙ (θ₀ − θ),   λ = min(1, decay · √MS / mean(√MS))

where g is the gradient of the segment's mean loss, MS is the mean of g² over segments of the
training text, and θ₀ are the trained parameters. The text is read once, as a single stream.

The default hyperparameters follow the authors' code, as recalled from memory, in which MS is also a
mean. Small LSTMs diverged on the Austen corpus with η = 2e-3, which suits a different scale of MS.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mi.lm.data import streams
from mi.lm.data.corpus import Corpus
from mi.lm.evaluate import Scores, compute_metrics
from mi.lm.loss import Losses
from mi.lm.model import Carry, LanguageModel, Params
from mi.training import placement, progress, sharding


class Adaptation(NamedTuple):
    """Options of dynamic evaluation.

    Attributes:
      tokens: number of tokens to evaluate, from the start of the text.
      length: number of tokens in a segment.
      learning_rate: η.
      decay, epsilon: `decay` and ε of the update.
      statistics: number of segments of the training text over which MS is the mean.
    """

    tokens: int
    length: int = 5
    learning_rate: float = 5e-5
    decay: float = 2e-3
    epsilon: float = 2e-5
    statistics: int = 200


class Segments(NamedTuple):
    """One segment of T tokens, with arrays [T, 1], or several, with arrays [segments, T, 1].

    Attributes:
      inputs: ids of the inputs.
      targets: ids of the next tokens.
      mask: 1 for targets that are scored, 0 for padding.
      domains: domain of each input, or None for a model that does not use domains.
    """

    inputs: chex.Array
    targets: chex.Array
    mask: chex.Array
    domains: chex.Array | None


class Rates(NamedTuple):
    """Hyperparameters of the update: η, `decay` and ε."""

    learning_rate: Array | np.float32
    decay: Array | np.float32
    epsilon: Array | np.float32


ROUND = 50  # segments in one call of a program


def evaluate(
    model: LanguageModel,
    params: Params,
    corpus: Corpus,
    splits: Sequence[str],
    adaptation: Adaptation,
) -> dict[str, list[Scores]]:
    """Evaluate each seed dynamically on the first `adaptation.tokens` tokens of each split.

    Every split starts from the trained parameters. Devices divide the seeds but not the text,
    because the text is a single stream.

    Args:
      model: the model.
      params: parameters of the model, [S, …].
      corpus: the corpus.
      splits: 'valid', 'test' or both.
      adaptation: options of dynamic evaluation.

    Returns:
      The metrics of each seed, by split.

    Raises:
      FloatingPointError: if the loss becomes non-finite.
    """
    # The seeds, divided over the devices of this process.
    params = sharding.to_host(params)
    num_seeds = len(jax.tree.leaves(params)[0])
    mesh = placement.seed_mesh(num_seeds, jax.local_devices())
    trained_params = placement.shard_seeds(params, mesh)
    init_state, add_squares, _ = _compile_programs(model, mesh)

    # Σ g² over segments of the training text.
    num_tokens = adaptation.statistics * adaptation.length + 1
    train_tokens = np.asarray(corpus.tokens['train'][:num_tokens])
    carry, square_sums = init_state((trained_params,), None)
    num_segments = 0
    for segments in _read_rounds(corpus, 'train', train_tokens, model, adaptation.length):
        carry, square_sums = add_squares((trained_params, carry, square_sums), segments)
        num_segments += len(segments.inputs)

    start = _Start(trained_params, square_sums, num_segments)
    return {
        split: _evaluate_split(model, start, corpus, split, adaptation, mesh) for split in splits
    }


class _Start(NamedTuple):
    """What the evaluations of all splits start from, with seeds divided over the devices.

    Attributes:
      params: trained parameters, [S, …].
      square_sums: Σ g² over segments of the training text, [S, …].
      num_segments: number of these segments.
    """

    params: Params
    square_sums: Params
    num_segments: int


def _evaluate_split(
    model: LanguageModel,
    start: _Start,
    corpus: Corpus,
    split: str,
    adaptation: Adaptation,
    mesh: jax.sharding.Mesh,
) -> list[Scores]:
    """Evaluate each seed on the start of one split, and return its metrics."""
    init_state, _, adapt = _compile_programs(model, mesh)
    tokens = np.asarray(corpus.tokens[split][: adaptation.tokens])
    num_predictions, num_seeds = len(tokens) - 1, len(jax.tree.leaves(start.params)[0])
    total_nats, params = np.zeros(num_seeds), start.params
    carry, _ = init_state((start.params,), None)
    rates = Rates(
        np.float32(adaptation.learning_rate),
        np.float32(adaptation.decay),
        np.float32(adaptation.epsilon),
    )
    with progress.Work(f'dynamic evaluation of {split}', num_predictions, 'tokens') as work:
        for segments in _read_rounds(corpus, split, tokens, model, adaptation.length):
            shared = np.float32(start.num_segments), rates, segments
            params, carry, nats = adapt((start.params, start.square_sums, params, carry), shared)
            total_nats += placement.gather_seeds(nats, num_seeds).astype(np.float64)
            if not np.isfinite(total_nats).all():
                raise FloatingPointError(f'dynamic evaluation of {split}: the loss is not finite')
            work.done += segments.mask.sum()
    protocol = {'predictions': num_predictions, 'batch': 1} | adaptation._asdict()
    if model.memory is not None:
        protocol['memory'] = model.memory
    mean_nats = (total_nats / num_predictions).tolist()
    return [compute_metrics(nats, corpus, split, protocol) for nats in mean_nats]


def _read_rounds(
    corpus: Corpus, split: str, tokens: np.ndarray, model: LanguageModel, length: int
) -> Iterator[Segments]:
    """Yield the segments of a text in groups of at most ROUND consecutive segments."""
    segments: list[Segments] = []
    for inputs, targets, mask, positions in streams.segments(tokens, 1, length):
        domains = corpus.get_domains(split, positions) if model.source == 'domain' else None
        segments.append(Segments(inputs, targets, mask, domains))
        if len(segments) == ROUND:
            yield jax.tree.map(lambda *a: np.stack(a), *segments)
            segments = []
    if segments:
        yield jax.tree.map(lambda *a: np.stack(a), *segments)


def _compute_gradient(
    model: LanguageModel, params: Params, carry: Carry, segment: Segments
) -> tuple[Params, Carry, Array]:
    """Compute the gradient of a segment's mean loss, the carry after it, and its total nats."""

    def compute_loss(params: Params) -> tuple[Array, tuple[Carry, Array]]:
        losses: Losses
        next_carry, losses = model.apply(  # type: ignore[assignment]
            {'params': params}, carry, segment.inputs, segment.targets, segment.domains
        )
        total_nats = (losses.nats * segment.mask).sum()
        return total_nats / jnp.maximum(segment.mask.sum(), 1), (next_carry, total_nats)

    grads, (next_carry, total_nats) = jax.grad(compute_loss, has_aux=True)(params)
    return grads, next_carry, total_nats


@functools.cache
def _compile_programs(
    model: LanguageModel, mesh: jax.sharding.Mesh
) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped, jax.stages.Wrapped]:
    """Compile `_init_state`, `_add_squares` and `_adapt` for all seeds, divided over devices."""
    seed_spec, replicated_spec = sharding.seed_sharding(mesh).spec, sharding.replicated(mesh).spec

    def compile_seeds(function: Callable[..., chex.ArrayTree]) -> jax.stages.Wrapped:
        def map_seeds(seeded: tuple[chex.ArrayTree, ...], shared: chex.ArrayTree) -> chex.ArrayTree:
            return sharding.map_seeds(lambda *row: function(model, row, shared), mesh)(*seeded)

        return jax.jit(
            jax.shard_map(
                map_seeds,
                mesh=mesh,
                in_specs=(seed_spec, replicated_spec),
                out_specs=seed_spec,
                check_vma=False,
            )
        )

    return compile_seeds(_init_state), compile_seeds(_add_squares), compile_seeds(_adapt)


def _init_state(model: LanguageModel, seeded: tuple[Params], shared: None) -> tuple[Carry, Params]:
    """Return the carry before the first token, and zeros for Σ g²."""
    (params,) = seeded
    return model.initial_carry(1), jax.tree.map(jnp.zeros_like, params)


def _add_squares(
    model: LanguageModel, seeded: tuple[Params, Carry, Params], segments: Segments
) -> tuple[Carry, Params]:
    """Return the carry after the segments, and Σ g² including their gradients."""
    params, carry, square_sums = seeded

    def step(
        loop_state: tuple[Carry, chex.ArrayTree], segment: Segments
    ) -> tuple[tuple[Carry, chex.ArrayTree], None]:
        carry, square_sums = loop_state
        grads, carry, _ = _compute_gradient(model, params, carry, segment)
        return (carry, jax.tree.map(lambda s, g: s + g * g, square_sums, grads)), None

    loop_state, _ = jax.lax.scan(step, (carry, square_sums), segments)
    return loop_state


def _adapt(
    model: LanguageModel,
    seeded: tuple[Params, Params, Params, Carry],
    shared: tuple[Array, Rates, Segments],
) -> tuple[Params, Carry, Array]:
    """Adapt the parameters to each segment in turn.

    Args:
      model: the model.
      seeded: arrays of one seed: the trained parameters, Σ g², and the parameters and the carry
        before the segments.
      shared: arrays that all seeds share: the number of segments in Σ g², the hyperparameters of
        the update, and the segments.

    Returns:
      The parameters and the carry after the segments, and the total nats of the segments.
    """
    trained_params, square_sums, params, carry = seeded
    num_segments, rates, segments = shared
    grad_rms = jax.tree.map(lambda total: jnp.sqrt(total / num_segments), square_sums)
    rms_leaves = jax.tree.leaves(grad_rms)
    mean_rms = sum(rms.sum() for rms in rms_leaves) / sum(rms.size for rms in rms_leaves)

    def update_param(param: Array, trained: Array, grad: Array, rms: Array) -> Array:
        decay = jnp.minimum(1, rates.decay * rms / mean_rms)
        learned = param - rates.learning_rate * grad / (rms + rates.epsilon)
        return learned + decay * (trained - param)

    def step(
        loop_state: tuple[Params, Carry], segment: Segments
    ) -> tuple[tuple[Params, Carry], Array]:
        params, carry = loop_state
        grads, carry, nats = _compute_gradient(model, params, carry, segment)
        return (jax.tree.map(update_param, params, trained_params, grads, grad_rms), carry), nats

    (params, carry), nats = jax.lax.scan(step, (params, carry), segments)
    return params, carry, nats.sum()
