"""Functions of sequences, [n, d] → [n, d], each of them a mixing y_t = Σ_s A_ts x_s of the tokens.

What A depends on tells them apart:

              A the same for all X            A made of X
    no order  difference  y_t = x̄ − x_t       farthest  y_t = Σ_s softmax_s(‖x_t − x_s‖² / τ) x_s
    order     reverse     y_t = x_{n+1−t}     sort      y_tj the t-th smallest of x_1j … x_nj

All are continuous on a compact set, as the theorems of Yun et al. (Are Transformers universal
approximators of sequence-to-sequence functions?, ICLR 2020) ask: the entries of X are uniform in
[−1, 1] and independent. Each target is divided by its root mean square, so that an error of 1 is
that of the answer 0. The first row commutes with permutations of the tokens (it is equivariant),
the second does not. The targets are ours.

Two bounds hold for any number of parameters, and are computed here:

  equivariant_floor   of functions that commute with permutations: as a Transformer without
                      positions does. The best of them is g(X) = E_π[π⁻¹ f(πX)], the mean of f over
                      all orders of the tokens, for X is as likely in each.
  additive_floor      of sums Σ_s φ_ts(x_s), one token in each term: as one fixed mixing between
                      layers that see one token. What is left of f is what it owes to no token
                      alone, Var f − Σ_s Var E[f | x_s].

A run trains a network for each target: they share the inputs of a batch and nothing else. The
parameters that a config asks for, `model.parameters`, are those of all these networks together; the
parameters and FLOPs that a run writes down (cost.json) are those of one. At the end it keeps both
bounds, and its errors on the sequences of the first, each in all its orders.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax import Array

from experiments.seq2seq import transformer
from mi import fusion
from mi.config import Rule, UserError, integer, number, suggest
from mi.fit import network
from mi.fit.problem import Metrics, Problem

LONGEST = 7  # tokens: a floor takes all n! orders

Target = Callable[[Array, float], Array]  # X [..., n, d] and τ → Y [..., n, d]


def _farthest(X: Array, tau: float) -> Array:
    distance = jnp.sum(jnp.square(X[..., :, None, :] - X[..., None, :, :]), -1)
    return jax.nn.softmax(distance / tau) @ X


TARGETS: dict[str, Target] = {
    'difference': lambda X, tau: X.mean(-2, keepdims=True) - X,
    'farthest': _farthest,
    'reverse': lambda X, tau: X[..., ::-1, :],
    'sort': lambda X, tau: jnp.sort(X, axis=-2),
}


def _targets(value: Any) -> str:
    if not isinstance(value, tuple | list) or not value or len(set(value)) < len(value):
        return 'a non-empty tuple of distinct targets'
    unknown = [word for word in value if word not in TARGETS]
    return f'known targets; {suggest(str(unknown[0]), TARGETS)}' if unknown else ''


SCHEMA: dict[str, Rule] = {
    'problem.targets': _targets,
    'problem.length': integer(2, LONGEST),
    'problem.features': integer(1),
    'problem.temperature': number(0, exclusive=True),
    'problem.examples': integer(1),
    'problem.orbits': integer(1),
    'problem.floor_examples': integer(2),
    **transformer.SCHEMA,
}


def make(config: ml_collections.ConfigDict) -> Problem:
    """The problem of a config; batches are drawn anew, so that there is no training set.

    Raises:
      UserError: if the heads do not fit, the fusion needs a one-hot context, or the gradients of
        the targets would be clipped together.
    """
    of = config.problem
    if config.optim.clip_norm > 0:
        raise UserError(
            f'config.optim.clip_norm = {config.optim.clip_norm}: expected 0, for the norm would be '
            f'that of the networks of all targets, which have nothing to do with each other'
        )
    if config.model.fusion.name in fusion.ONE_HOT:
        raise UserError(
            f'config.model.fusion.name = {config.model.fusion.name!r}: its context has to be '
            f'one-hot, and here it is a token; use another fusion'
        )
    model = transformer.make(config.model, of.features)
    one = jax.ShapeDtypeStruct((of.length, of.features), jnp.float32)
    words = tuple(of.targets)

    draw = functools.partial(_draw, n=of.length, d=of.features)
    scales = {w: scale(w, of.length, of.features, of.temperature) for w in words}

    def targets(X: Array) -> Array:
        """[..., n, d] → [targets, ..., n, d]."""
        return jnp.stack([TARGETS[w](X, of.temperature) / scales[w] for w in words])

    def init(key: Array, world: Any) -> Any:
        each = jax.random.split(key, len(words))
        return jax.vmap(lambda key: model.init(key, jnp.zeros(one.shape)))(each)

    def errors(params: Any, X: Array) -> Array:
        """The mean squared error of each network on the target that is its own."""
        Y: Any = jax.vmap(model.apply, in_axes=(0, None))(params, X)
        return jnp.square(Y - targets(X)).mean((1, 2, 3))

    def loss(params: Any, world: Any, key: Array) -> tuple[Array, Metrics]:
        mse = errors(params, draw(key, config.train.batch))
        return mse.sum(), {'mse': mse.mean()}

    def evaluation(params: Any, world: Any, key: Array) -> Metrics:
        mse = errors(params, draw(key, of.examples))
        return {'mse': mse.mean()} | {f'mse/{w}': e for w, e in zip(words, mse, strict=True)}

    def floors(params: Any, world: Any, key: Array) -> Metrics:
        X, again = (draw(k, of.floor_examples) for k in jax.random.split(key))
        some = X[: of.orbits]
        each = jax.lax.map(lambda order: errors(params, some[:, order]), orders(of.length))
        return {
            'equivariant_floor': equivariant_floor(targets, some),
            'error_in_all_orders': each.mean(0),
            'additive_floor': additive_floor(targets, X, again),
        }

    return Problem(
        world=lambda key: {},
        init=init,
        loss=loss,
        evaluations={'eval': evaluation},
        costs=lambda: network.costs(model, one, part=r'mixer_\d+'),
        examples=config.train.batch,
        artefacts=floors,
    )


def _draw(key: Array, examples: int, n: int, d: int) -> Array:
    return jax.random.uniform(key, (examples, n, d), minval=-1, maxval=1)


@functools.cache
def scale(word: str, n: int, d: int, tau: float) -> float:
    """The root mean square of a target, from a sample that is always the same."""
    X = _draw(jax.random.key(0), 2**15, n, d)
    return float(jnp.sqrt(jnp.square(TARGETS[word](X, tau)).mean()))


def orders(n: int) -> Array:
    """All permutations of n places [n!, n]."""
    return jnp.array(list(itertools.permutations(range(n))))


def equivariant_floor(f: Callable[[Array], Array], X: Array) -> Array:
    """The least error of an equivariant function on the same sequences in all their orders.

        mean_π ‖π⁻¹f(πX) − g(X)‖² / nd,   g(X) = mean_π π⁻¹f(πX)

    Of these sequences that is so exactly, of others of the distribution on average.

    Args:
      f: [N, n, d] → [targets, N, n, d].
      X: [N, n, d], a sample of a distribution that is the same in each order of the tokens.
    """
    every = orders(X.shape[-2])

    def back(order: Array) -> Array:
        """π⁻¹f(πX)."""
        return f(X[:, order])[:, :, jnp.argsort(order)]

    def add(total: Array, order: Array) -> tuple[Array, None]:
        return total + back(order), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(f(X)), every)
    best = total / len(every)
    each = jax.lax.map(lambda order: jnp.square(back(order) - best).mean((1, 2, 3)), every)
    return each.mean(0)


def additive_floor(f: Callable[[Array], Array], X: Array, again: Array) -> Array:
    """The least E‖f(X) − Σ_s φ_s(x_s)‖² / nd, φ any functions, for independent tokens.

    Var E[f | x_s] is the covariance of f at two sequences that share the token s alone (Sobol').

    Args:
      f: [N, n, d] → [targets, N, n, d].
      X, again: [N, n, d], two independent samples of sequences of independent tokens.
    """
    N, n, _ = X.shape
    here = f(X)
    here = here - here.mean(1, keepdims=True)
    left = jnp.square(here).mean((1, 2, 3))
    for s in range(n):
        there = f(again.at[:, s].set(X[:, s]))
        there = there - there.mean(1, keepdims=True)
        left = left - (here * there).mean((1, 2, 3))
    return left * N / (N - 1)
