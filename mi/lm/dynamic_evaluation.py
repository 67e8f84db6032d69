"""Dynamic evaluation: the parameters go on learning from the text that they have predicted.

The RMS variant of Krause et al. (2018). After each segment, whose loss has been counted,

    θ ← θ − η g / (√MS + ε) + λ ⊙ (θ₀ − θ),   λ = min(1, decay · √MS / mean(√MS))

with g the gradient of the segment's mean loss, MS the mean of g² over segments of the training
text, and θ₀ the trained parameters. The text is one stream, and every segment is seen once.

The defaults are those of the authors' code, as recalled, where MS is a mean as here. With η = 2e-3,
which goes with another scale of MS, small LSTMs on Austen diverged.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mi.config import UserError
from mi.lm.data import streams, token_store
from mi.lm.evaluate import result
from mi.lm.loss import Losses
from mi.lm.model import Carry, LanguageModel
from mi.training import placement, progress, sharding


class Adaptation(NamedTuple):
    """How the parameters go on learning.

    Attributes:
      tokens: of the text, from its start.
      length: tokens of a segment.
      learning_rate: η.
      decay, epsilon: see above.
      statistics: segments of the training text that MS is the mean over.
    """

    tokens: int
    length: int = 5
    learning_rate: float = 5e-5
    decay: float = 2e-3
    epsilon: float = 2e-5
    statistics: int = 200


ROUND = 50  # segments in one call of a program


def evaluate(
    model: LanguageModel,
    params: Any,
    corpus: token_store.Corpus,
    split: str,
    adaptation: Adaptation,
) -> list[dict[str, Any]]:
    """Return the metrics of each seed on the first `adaptation.tokens` tokens of a split.

    The text is one stream, so that devices can share the seeds and nothing else.

    Args:
      model: the model.
      params: its parameters, [S, …].
      corpus: the corpus.
      split: 'valid' or 'test'.
      adaptation: how.

    Raises:
      UserError: if the loss is not finite any more.
    """
    params = sharding.to_host(params)
    seeds = len(jax.tree.leaves(params)[0])
    mesh = placement.seed_mesh(seeds, jax.local_devices())
    params = placement.shard_seeds(params, mesh)
    start, add_squares, adapt = _programs(model, mesh)
    statistics = np.asarray(corpus.tokens['train'][: adaptation.statistics * adaptation.length + 1])
    carry, squares = start((params,), None)
    count = 0
    for rows in _rounds(corpus, 'train', statistics, model, adaptation.length):
        carry, squares = add_squares((params, carry, squares), rows)
        count += len(rows[0])

    tokens = corpus.tokens[split]
    tokens = np.asarray(tokens[: adaptation.tokens])
    total, now, (carry, _) = np.zeros(seeds), params, start((params,), None)
    settings = adaptation.learning_rate, adaptation.decay, adaptation.epsilon
    rates: Any = tuple(map(np.float32, settings))
    work = progress.Work(f'dynamic evaluation of {split}', len(tokens) - 1, 'tokens')
    with work:
        for rows in _rounds(corpus, split, tokens, model, adaptation.length):
            now, carry, nats = adapt(
                (params, squares, now, carry), (np.float32(count), rates, rows)
            )
            total += placement.gather_seeds(nats, seeds).astype(np.float64)
            if not np.isfinite(total).all():
                raise UserError(
                    f'dynamic evaluation of {split}: the loss is not finite any more; lower '
                    f'config.dynamic.learning_rate = {adaptation.learning_rate}, or raise '
                    f'config.dynamic.epsilon = {adaptation.epsilon} or config.dynamic.statistics'
                )
            work.done += rows[2].sum()
    over = {'predictions': len(tokens) - 1, 'batch': 1} | adaptation._asdict()
    return [result(mean, corpus, split, over) for mean in (total / over['predictions']).tolist()]


def _rounds(
    corpus: token_store.Corpus, split: str, tokens: np.ndarray, model: LanguageModel, length: int
) -> Any:
    """Inputs, targets, mask and domains of consecutive segments, [≤ ROUND, T, 1] each."""
    rows: list[Any] = []
    for *row, positions in streams.segments(tokens, 1, length):
        domains = corpus.domain(split, positions) if model.source == 'domain' else None
        rows.append((*row, domains))
        if len(rows) == ROUND:
            yield jax.tree.map(lambda *a: np.stack(a), *rows)
            rows = []
    if rows:
        yield jax.tree.map(lambda *a: np.stack(a), *rows)


def _gradient(model: LanguageModel, params: Any, carry: Carry, row: Any) -> Any:
    """Gradient of a segment's mean loss, carry after it, Σ nats."""
    inputs, targets, mask, domains = row

    def objective(params: Any) -> tuple[Array, tuple[Carry, Array]]:
        losses: Losses
        after, losses = model.apply(  # type: ignore[assignment]
            {'params': params}, carry, inputs, targets, domains
        )
        total = (losses.nats * mask).sum()
        return total / jnp.maximum(mask.sum(), 1), (after, total)

    gradient, (after, total) = jax.grad(objective, has_aux=True)(params)
    return gradient, after, total


@functools.cache
def _programs(model: LanguageModel, mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any]:
    """Return `_start`, `_add_squares` and `_adapt` for all seeds, which the devices share."""
    by_seed, everywhere = sharding.seed_sharding(mesh).spec, sharding.replicated(mesh).spec

    def compiled(function: Callable[..., Any]) -> Any:
        def device_seeds(seeded: Any, shared: Any) -> Any:
            return sharding.map_seeds(lambda *row: function(model, row, shared), mesh)(*seeded)

        return jax.jit(
            jax.shard_map(
                device_seeds,
                mesh=mesh,
                in_specs=(by_seed, everywhere),
                out_specs=by_seed,
                check_vma=False,
            )
        )

    return compiled(_start), compiled(_add_squares), compiled(_adapt)


def _start(model: LanguageModel, seeded: tuple[Any], shared: None) -> tuple[Carry, Any]:
    """Return the carry before the first token, and sums of squares of nothing yet."""
    (params,) = seeded
    return model.initial_carry(1), jax.tree.map(jnp.zeros_like, params)


def _add_squares(
    model: LanguageModel, seeded: tuple[Any, Carry, Any], rows: Any
) -> tuple[Carry, Any]:
    """Return the carry after the segments, and Σ g² with theirs added."""
    params, carry, squares = seeded

    def step(carried: Any, row: Any) -> tuple[Any, None]:
        carry, squares = carried
        gradient, carry, _ = _gradient(model, params, carry, row)
        return (carry, jax.tree.map(lambda s, g: s + g * g, squares, gradient)), None

    return jax.lax.scan(step, (carry, squares), rows)[0]


def _adapt(
    model: LanguageModel,
    seeded: tuple[Any, Any, Any, Carry],
    shared: tuple[Array, tuple[Array, Array, Array], Any],
) -> tuple[Any, Carry, Array]:
    """Return parameters and carry after the segments, and Σ nats of them.

    Args:
      model: the model.
      seeded: trained parameters, Σ g², parameters and carry up to here.
      shared: number of segments in Σ g², η with decay and ε, and the segments.
    """
    trained, squares, params, carry = seeded
    count, (learning_rate, decay, epsilon), rows = shared
    roots = jax.tree.map(lambda total: jnp.sqrt(total / count), squares)
    leaves = jax.tree.leaves(roots)
    mean = sum(root.sum() for root in leaves) / sum(root.size for root in leaves)

    def move(now: Array, before: Array, g: Array, root: Array) -> Array:
        back = jnp.minimum(1, decay * root / mean)
        return now - learning_rate * g / (root + epsilon) + back * (before - now)

    def step(carried: Any, row: Any) -> tuple[Any, Array]:
        params, carry = carried
        gradient, carry, nats = _gradient(model, params, carry, row)
        return (jax.tree.map(move, params, trained, gradient, roots), carry), nats

    (params, carry), nats = jax.lax.scan(step, (params, carry), rows)
    return params, carry, nats.sum()
