"""Conditional statements and similarity metrics of two streams, x and z.

    conditional        y = A₁x if z₁ > 0 else A₀x
    choice             y = A_c x,  c = argmax_{j ≤ K} z_j
    cosine             y = √d xᵀz / (‖x‖ ‖z‖)
    squared_distance   y = (‖x − z‖² − 2d) / √(8d)

x and z have d independent standard Gaussian entries. Each seed draws its matrices A [d, d], whose
rows are uniform on the unit sphere. Every output then has mean 0 and variance 1.

Errors are mean squared errors divided by the variance of y, so that predicting the mean has an
error of 1. A second evaluation multiplies x by `problem.far_scale`, so that its norm differs from
training.

A run trains one network for each target in `problem.targets`. The networks only share the inputs of
a batch. The reported number of parameters is that of one network.

Shapes: x, z [..., d]; y [..., k] with k = d for a statement and k = 1 for a metric; T targets.

Source: Jayakumar et al. (ICLR 2020) hypothesize that multiplicative interactions suit conditional
statements and similarity metrics. These four functions are ours.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from chex import Array, PRNGKey
from flax import linen as nn

from mi.config import Rule, UserError, integer, number, suggest
from mi.fit import network
from mi.fit.problem import Costs, Metrics, Params, Problem, World


def compute_cosine(x: Array, z: Array) -> Array:
    """Compute √d xᵀz / (‖x‖ ‖z‖), [..., 1]."""
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(z, axis=-1)
    return (math.sqrt(x.shape[-1]) * jnp.sum(x * z, -1) / norms)[..., None]


def compute_squared_distance(x: Array, z: Array) -> Array:
    """Compute (‖x − z‖² − 2d) / √(8d), [..., 1]."""
    dimension = x.shape[-1]
    distance = jnp.sum(jnp.square(x - z), -1)
    return ((distance - 2 * dimension) / math.sqrt(8 * dimension))[..., None]


def branch_on_sign(z: Array, num_branches: int) -> Array:
    """Return branch 1 where z₁ > 0, and branch 0 elsewhere, [...]."""
    return (z[..., 0] > 0).astype(jnp.int32)


def branch_on_largest(z: Array, num_branches: int) -> Array:
    """Return the index of the largest of the first K entries of z, [...]."""
    return jnp.argmax(z[..., :num_branches], -1)


METRICS: dict[str, Callable[[Array, Array], Array]] = {
    'cosine': compute_cosine,
    'squared_distance': compute_squared_distance,
}
STATEMENTS: dict[str, Callable[[Array, int], Array]] = {
    'conditional': branch_on_sign,
    'choice': branch_on_largest,
}
"""Name → function (z, K) → index of the branch [...]; a conditional ignores K."""


def _check_targets(targets: object) -> str:
    """Return a description of valid targets, or '' if the targets are valid."""
    if not isinstance(targets, tuple) or not targets or len(set(targets)) < len(targets):
        return 'a non-empty tuple of distinct targets'
    known = [*STATEMENTS, *METRICS]
    if unknown := [target for target in targets if target not in known]:
        return f'known targets; {suggest(str(unknown[0]), known)}'
    if len({target in STATEMENTS for target in targets}) > 1:
        return f'either statements, {", ".join(STATEMENTS)}, or metrics, {", ".join(METRICS)}'
    return ''


SCHEMA: dict[str, Rule] = {
    'problem.targets': _check_targets,
    'problem.dimension': integer(1),
    'problem.branches': integer(2),
    'problem.examples': integer(2),
    'problem.far_scale': number(0, exclusive=True),
    'model.encodes_context': bool,
    **network.SCHEMA,
}


class Target(NamedTuple):
    """A target function of x and z.

    Attributes:
      name: a key of STATEMENTS or METRICS.
      dimension: size of x and z, d.
      branches: number of branches K of a statement, or 0 for a metric.
    """

    name: str
    dimension: int
    branches: int

    @property
    def outputs(self) -> int:
        """The size of y, k."""
        return self.dimension if self.branches else 1

    def draw_matrices(self, key: PRNGKey) -> Array:
        """Draw A [K, d, d] with rows of norm 1."""
        A = jax.random.normal(key, (self.branches, self.dimension, self.dimension))
        return A / jnp.linalg.norm(A, axis=-1, keepdims=True)

    def compute(self, A: Array, x: Array, z: Array) -> Array:
        """Compute y [..., k] from x and z [..., d], with matrices A [K, d, d]."""
        if not self.branches:
            return METRICS[self.name](x, z)
        branch = STATEMENTS[self.name](z, self.branches)
        return jnp.einsum('...ij,...j->...i', A[branch], x)


class ContextMLP(nn.Module):
    """An MLP of x and c = φ(Ez + e), in which a hidden layer encodes z before its fusion with x.

    Attributes:
      mlp: MLP that fuses x and c. c has the width of the MLP, and φ is its activation.
    """

    mlp: network.FusedMLP

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        hidden = nn.Dense(self.mlp.width, name='encoder')(z)
        y: Array = self.mlp(x, network.ACTIVATIONS[self.mlp.activation](hidden))
        return y


@dataclasses.dataclass(frozen=True)
class Functions(Problem):
    """The problem of fitting functions of x and z, with one network for each and fresh batches.

    Attributes:
      model: module (x, z) → y.
      targets: functions to fit.
      eval_examples: number of examples in an evaluation.
      far_scale: factor that multiplies x in the evaluation 'far'.
    """

    model: nn.Module
    targets: tuple[Target, ...]
    eval_examples: int
    far_scale: float

    @property
    def dimension(self) -> int:
        """The size of x and z, d."""
        return self.targets[0].dimension

    def draw_world(self, key: PRNGKey) -> World:
        """Draw the matrices [K, d, d] of each target, by name."""
        keys = jax.random.split(key, len(self.targets))
        pairs = zip(self.targets, keys, strict=True)
        return {target.name: target.draw_matrices(target_key) for target, target_key in pairs}

    def compute_targets(self, world: World, x: Array, z: Array) -> Array:
        """Compute y [T, ..., k] of all targets from x and z [..., d]."""
        return jnp.stack([target.compute(world[target.name], x, z) for target in self.targets])

    def init_params(self, key: PRNGKey, world: World) -> Params:
        zeros = jnp.zeros(self.dimension)
        keys = jax.random.split(key, len(self.targets))
        return jax.vmap(lambda key: self.model.init(key, zeros, zeros))(keys)

    def model_params(self, params: Params) -> Params:
        """Return the parameter shapes of one network. All networks share them."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)

    def predict(self, params: Params, x: Array, z: Array) -> Array:
        """Compute the predictions [T, ..., k] of all networks from x and z [..., d]."""
        predictions: Array = jax.vmap(self.model.apply, in_axes=(0, None, None))(params, x, z)
        return predictions

    def _compare(
        self, params: Params, world: World, key: PRNGKey, examples: int, scale: float = 1.0
    ) -> tuple[Array, Array]:
        """Compute the mean squared errors [T] and the variances of y [T] on new examples."""
        x, z = jax.random.normal(key, (2, examples, self.dimension))
        x = scale * x
        y = self.compute_targets(world, x, z)
        errors = jnp.square(self.predict(params, x, z) - y)
        return errors.mean((1, 2)), y.var(1).mean(-1)

    def loss(self, params: Params, world: World, key: PRNGKey) -> tuple[Array, Metrics]:
        mse, _ = self._compare(params, world, key, self.examples)
        return mse.sum(), {'mse': mse.mean()}

    def evaluate(self, params: Params, world: World, key: PRNGKey) -> dict[str, Metrics]:
        """Compute `nmse/TARGET`, the error divided by the variance, in the splits eval and far."""
        metrics = {}
        for split, scale in (('eval', 1.0), ('far', self.far_scale)):
            mse, variance = self._compare(params, world, key, self.eval_examples, scale)
            names = [f'nmse/{target.name}' for target in self.targets]
            by_name = dict(zip(names, mse / variance, strict=True))
            metrics[split] = {'nmse': jnp.mean(mse / variance)} | by_name
        return metrics

    def costs(self) -> Costs:
        vector = jax.ShapeDtypeStruct((self.dimension,), jnp.float32)
        return network.costs(self.model, vector, vector)


def make(config: ml_collections.ConfigDict) -> Functions:
    """Build the problem that a config describes.

    Raises:
      UserError: if z has fewer entries than the target 'choice' has branches.
    """
    problem = config.problem
    if 'choice' in problem.targets and problem.branches > problem.dimension:
        raise UserError(
            f'config.problem.branches = {problem.branches}: expected at most '
            f'config.problem.dimension = {problem.dimension}, because each branch '
            f'needs its own entry of z'
        )
    branches = {'conditional': 2, 'choice': problem.branches}
    targets = tuple(
        Target(name, problem.dimension, branches.get(name, 0)) for name in problem.targets
    )
    mlp = network.make(config.model, features=targets[0].outputs, context='dense')
    return Functions(
        examples=config.train.batch,
        model=ContextMLP(mlp) if config.model.encodes_context else mlp,
        targets=targets,
        eval_examples=problem.examples,
        far_scale=problem.far_scale,
    )
