"""Functions of sequences, [n, d] → [n, d], that mix tokens: y_t = Σ_s A_ts x_s.

The targets differ in whether A depends on X, and on the order of the tokens:

              A does not depend on X          A depends on X
    no order  difference  y_t = x̄ − x_t       farthest  y_t = Σ_s softmax_s(‖x_t − x_s‖² / τ) x_s
    order     reverse     y_t = x_{n+1−t}     sort      y_tj = t-th smallest of x_1j … x_nj

The entries of X are independent and uniform in [−1, 1]. All targets are continuous on this compact
set, as the theorems of Yun et al. require (Are Transformers universal approximators of
sequence-to-sequence functions?, ICLR 2020). Each target is divided by its root mean square, so that
the prediction 0 has an error of 1. Targets in the first row commute with permutations of the tokens
(they are equivariant), and those in the second row do not. The targets are ours.

Two lower bounds on the error hold for any number of parameters, and are computed here:

  equivariant_floor   for functions that commute with permutations, such as a Transformer without
                      positions. The best such function is g(X) = E_π[π⁻¹ f(πX)], the mean of f over
                      all orders of the tokens, because all orders of X are equally likely.
  additive_floor      for sums Σ_s φ_ts(x_s) with one token in each term, such as one fixed mixer
                      between layers that process single tokens. The residual is the variance of f
                      that no single token explains, Var f − Σ_s Var E[f | x_s].

A run trains one network for each target. The networks only share the inputs of a batch. The number
of parameters in a config, `model.parameters`, is the total of all networks, whereas the parameters
and FLOPs in cost.json are those of one network. At the end, a run saves both bounds, and its errors
on the sequences of the equivariant floor, averaged over all orders.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
from chex import Array, PRNGKey
from flax import linen as nn

from experiments.seq2seq import transformer
from mi import fusion
from mi.config import Rule, UserError, integer, number, suggest
from mi.fit import network
from mi.fit.problem import Costs, Metrics, Params, Problem, World

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


def _check_targets(targets: object) -> str:
    """Return a description of valid targets, or '' if the targets are valid."""
    if not isinstance(targets, tuple | list) or not targets or len(set(targets)) < len(targets):
        return 'a non-empty tuple of distinct targets'
    unknown = [target for target in targets if target not in TARGETS]
    return f'known targets; {suggest(str(unknown[0]), TARGETS)}' if unknown else ''


SCHEMA: dict[str, Rule] = {
    'problem.targets': _check_targets,
    'problem.length': integer(2, LONGEST),
    'problem.features': integer(1),
    'problem.temperature': number(0, exclusive=True),
    'problem.examples': integer(1),
    'problem.orbits': integer(1),
    'problem.floor_examples': integer(2),
    **transformer.SCHEMA,
}


@dataclasses.dataclass(frozen=True)
class Sequences(Problem):
    """The problem of learning functions of sequences, with one network for each and fresh batches.

    Attributes:
      model: module that maps [n, d] to [n, d].
      targets: names in TARGETS.
      length, features: number of tokens n, and of features d.
      temperature: τ of the target 'farthest'.
      scales: root mean square of each target.
      eval_examples: number of sequences in an evaluation.
      orbits: number of sequences for the equivariant floor, each in all n! orders.
      floor_examples: number of sequences for the additive floor.
    """

    model: nn.Module
    targets: tuple[str, ...]
    length: int
    features: int
    temperature: float
    scales: tuple[float, ...]
    eval_examples: int
    orbits: int
    floor_examples: int

    def _draw(self, key: PRNGKey, examples: int) -> Array:
        return draw_sequences(key, examples, self.length, self.features)

    def compute_targets(self, X: Array) -> Array:
        """Compute the targets [targets, ..., n, d] of X [..., n, d], each with mean square 1."""
        pairs = zip(self.targets, self.scales, strict=True)
        return jnp.stack([TARGETS[target](X, self.temperature) / scale for target, scale in pairs])

    def init_params(self, key: PRNGKey, world: World) -> Params:
        keys = jax.random.split(key, len(self.targets))
        tokens = jnp.zeros((self.length, self.features))
        return jax.vmap(lambda key: self.model.init(key, tokens))(keys)

    def _mean_squared_errors(self, params: Params, X: Array) -> Array:
        """Compute the error of each network on its own target, [targets]."""
        Y: Array = jax.vmap(self.model.apply, in_axes=(0, None))(params, X)
        return jnp.square(Y - self.compute_targets(X)).mean((1, 2, 3))

    def loss(self, params: Params, world: World, key: PRNGKey) -> tuple[Array, Metrics]:
        errors = self._mean_squared_errors(params, self._draw(key, self.examples))
        return errors.sum(), {'mse': errors.mean()}

    def evaluate(self, params: Params, world: World, key: PRNGKey) -> dict[str, Metrics]:
        errors = self._mean_squared_errors(params, self._draw(key, self.eval_examples))
        names = [f'mse/{target}' for target in self.targets]
        return {'eval': {'mse': errors.mean()} | dict(zip(names, errors, strict=True))}

    def costs(self) -> Costs:
        tokens = jax.ShapeDtypeStruct((self.length, self.features), jnp.float32)
        return network.costs(self.model, tokens, fusion_pattern=r'mixer_\d+')

    def artifacts(self, params: Params, world: World, key: PRNGKey) -> Metrics:
        """Return both floors, and the errors on the sequences of the equivariant floor."""
        X_key, other_key = jax.random.split(key)
        X, X_other = (self._draw(key, self.floor_examples) for key in (X_key, other_key))
        orbit = X[: self.orbits]
        errors = jax.lax.map(
            lambda order: self._mean_squared_errors(params, orbit[:, order]),
            make_permutations(self.length),
        )
        return {
            'equivariant_floor': compute_equivariant_floor(self.compute_targets, orbit),
            'error_in_all_orders': errors.mean(0),
            'additive_floor': compute_additive_floor(self.compute_targets, X, X_other),
        }


def make(config: ml_collections.ConfigDict) -> Sequences:
    """Build the problem that a config describes.

    Raises:
      UserError: if the heads do not divide the features, if the fusion needs a one-hot context, or
        if gradients are clipped, because the norm would couple the networks of all targets.
    """
    # Refuse what would couple the networks, or needs another kind of context.
    problem = config.problem
    if config.optim.clip_norm > 0:
        raise UserError(
            f'config.optim.clip_norm = {config.optim.clip_norm}: expected 0, because the gradient '
            f'norm would couple the networks of all targets, which are independent'
        )
    if config.model.fusion.name in fusion.ONE_HOT:
        raise UserError(
            f'config.model.fusion.name = {config.model.fusion.name!r}: expected a fusion for dense '
            f"contexts, because the context is a token, which is not one-hot. Try 'mi'"
        )

    # Targets are divided by their root mean square on a fixed sample.
    n, d, tau = problem.length, problem.features, problem.temperature
    return Sequences(
        examples=config.train.batch,
        model=transformer.make(config.model, d),
        targets=tuple(problem.targets),
        length=n,
        features=d,
        temperature=tau,
        scales=tuple(compute_scale(target, n, d, tau) for target in problem.targets),
        eval_examples=problem.examples,
        orbits=problem.orbits,
        floor_examples=problem.floor_examples,
    )


def draw_sequences(key: PRNGKey, examples: int, n: int, d: int) -> Array:
    """Draw sequences [examples, n, d] with independent entries, uniform in [−1, 1]."""
    return jax.random.uniform(key, (examples, n, d), minval=-1, maxval=1)


@functools.cache
def compute_scale(target: str, n: int, d: int, tau: float) -> float:
    """Compute the root mean square of a target on a fixed sample."""
    X = draw_sequences(jax.random.key(0), 2**15, n, d)
    return float(jnp.sqrt(jnp.square(TARGETS[target](X, tau)).mean()))


def make_permutations(n: int) -> Array:
    """Return all permutations of n positions [n!, n]."""
    return jnp.array(list(itertools.permutations(range(n))))


def compute_equivariant_floor(f: Callable[[Array], Array], X: Array) -> Array:
    """Compute the smallest error of any equivariant function on the given sequences in all orders.

        mean_π ‖π⁻¹f(πX) − g(X)‖² / nd,   g(X) = mean_π π⁻¹f(πX)

    The bound is exact for these sequences, and holds on average for others from the same
    distribution.

    Args:
      f: function [N, n, d] → [targets, N, n, d].
      X: sequences [N, n, d] from a distribution that is invariant to the order of the tokens.
    """
    permutations = make_permutations(X.shape[-2])

    def conjugate(order: Array) -> Array:
        """Compute π⁻¹f(πX)."""
        return f(X[:, order])[:, :, jnp.argsort(order)]

    def add_conjugate(total: Array, order: Array) -> tuple[Array, None]:
        return total + conjugate(order), None

    # g(X), one order at a time, as all of them do not fit into memory.
    total, _ = jax.lax.scan(add_conjugate, jnp.zeros_like(f(X)), permutations)
    best_output = total / len(permutations)
    errors = jax.lax.map(
        lambda order: jnp.square(conjugate(order) - best_output).mean((1, 2, 3)), permutations
    )
    return errors.mean(0)


def compute_additive_floor(f: Callable[[Array], Array], X: Array, X_other: Array) -> Array:
    """Compute the minimum of E‖f(X) − Σ_s φ_s(x_s)‖² / nd over functions φ_s of single tokens.

    Var E[f | x_s] is the covariance of f at two sequences that only share the token s (Sobol').

    Args:
      f: function [N, n, d] → [targets, N, n, d].
      X, X_other: two independent samples of sequences [N, n, d] with independent tokens.
    """
    N, n, _ = X.shape
    Y = f(X)
    Y = Y - Y.mean(1, keepdims=True)
    residual = jnp.square(Y).mean((1, 2, 3))
    for token in range(n):
        Y_shared = f(X_other.at[:, token].set(X[:, token]))
        Y_shared = Y_shared - Y_shared.mean(1, keepdims=True)
        residual = residual - (Y * Y_shared).mean((1, 2, 3))
    return residual * N / (N - 1)
