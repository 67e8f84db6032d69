"""A product of two streams, and targets without a product.

    product    y = xᵀz
    bilinear   y = xᵀWz,  W = √d G / ‖G‖, where each seed draws G [d, d]
    additive   y = Σᵢ (u(xᵢ) + u(zᵢ)) / √2,  u(a) = (|a| − √(2/π)) / √(1 − 2/π)
    x_only     y = Σᵢ u(xᵢ)

The entries of x, z [d] and G are independent standard Gaussian variables, so that every target has
mean 0 and variance d. The last two targets have no interaction, so that parameters of an
interaction are wasted on them.

Source: xᵀz and xᵀWz with a fixed W are targets of Jayakumar et al. (ICLR 2020), section on
expressivity. The distribution of W and the other targets are ours.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
from chex import Array, PRNGKey

from mi.config import Rule, choice, integer
from mi.fit import network
from mi.fit.problem import Costs, Metrics, Params, Problem, World

SURFACE = 3.0  # half the side of the square of the error surface
POINTS = 121  # of the error surface, a side


def centered_abs(a: Array) -> Array:
    """Compute u(a), which has mean 0 and variance 1 for a standard Gaussian a."""
    return (jnp.abs(a) - math.sqrt(2 / math.pi)) / math.sqrt(1 - 2 / math.pi)


def compute_product(x: Array, z: Array) -> Array:
    """Compute xᵀz."""
    return jnp.sum(x * z, -1)


TARGETS = {
    'product': compute_product,
    'bilinear': compute_product,  # of Wᵀx and z
    'additive': lambda x, z: jnp.sum(centered_abs(x) + centered_abs(z), -1) / math.sqrt(2),
    'x_only': lambda x, z: jnp.sum(centered_abs(x), -1),
}


def draw_matrix(key: PRNGKey, dimension: int) -> Array:
    """Draw W [d, d] with ‖W‖² = d, so that xᵀWz has variance d."""
    G = jax.random.normal(key, (dimension, dimension))
    return math.sqrt(dimension) * G / jnp.linalg.norm(G)


SCHEMA: dict[str, Rule] = {
    'problem.target': choice(TARGETS),
    'problem.dimension': integer(1),
    'problem.examples': integer(1),
    **network.SCHEMA,
}


@dataclasses.dataclass(frozen=True)
class Products(Problem):
    """The problem of fitting a target of x and z, with fresh batches instead of a training set.

    Attributes:
      model: module that maps x and z [..., d] to [..., 1].
      target: function that maps x and z [..., d] to [...].
      is_bilinear: whether the target is computed from Wᵀx and z, with a matrix W of the seed.
      dimension: size of x and z, d.
      eval_examples: number of examples in an evaluation.
    """

    model: network.FusedMLP
    target: Callable[[Array, Array], Array]
    is_bilinear: bool
    dimension: int
    eval_examples: int

    def draw_world(self, key: PRNGKey) -> World:
        """Draw {'W': [d, d]}, or {} for a target without a matrix."""
        return {'W': draw_matrix(key, self.dimension)} if self.is_bilinear else {}

    def compute_target(self, world: World, x: Array, z: Array) -> Array:
        """Compute the target [...] from x and z [..., d]."""
        return self.target(x @ world['W'] if self.is_bilinear else x, z)

    def init_params(self, key: PRNGKey, world: World) -> Params:
        zeros = jnp.zeros(self.dimension)
        return self.model.init(key, zeros, zeros)

    def predict(self, params: Params, x: Array, z: Array) -> Array:
        """Compute the prediction [...] from x and z [..., d]."""
        prediction: Array = self.model.apply(params, x, z)
        return prediction[..., 0]

    def _mean_squared_error(
        self, params: Params, world: World, key: PRNGKey, examples: int
    ) -> Array:
        x, z = jax.random.normal(key, (2, examples, self.dimension))
        error = self.predict(params, x, z) - self.compute_target(world, x, z)
        return jnp.mean(jnp.square(error))

    def loss(self, params: Params, world: World, key: PRNGKey) -> tuple[Array, Metrics]:
        mse = self._mean_squared_error(params, world, key, self.examples)
        return mse, {'mse': mse}

    def evaluate(self, params: Params, world: World, key: PRNGKey) -> dict[str, Metrics]:
        mse = self._mean_squared_error(params, world, key, self.eval_examples)
        return {'eval': {'mse': mse}}

    def costs(self) -> Costs:
        vector = jax.ShapeDtypeStruct((self.dimension,), jnp.float32)
        return network.costs(self.model, vector, vector)

    def artifacts(self, params: Params, world: World, key: PRNGKey) -> Metrics:
        """Return the error on a square grid if d = 1, with z along axis 0 and x along axis 1."""
        if self.dimension != 1:
            return {}
        coordinates = jnp.linspace(-SURFACE, SURFACE, POINTS)
        mesh = jnp.meshgrid(coordinates, coordinates, indexing='ij')
        z, x = (coordinate[..., None] for coordinate in mesh)
        return {'surface': self.predict(params, x, z) - self.compute_target(world, x, z)}


def make(config: ml_collections.ConfigDict) -> Products:
    """Build the problem that a config describes."""
    return Products(
        examples=config.train.batch,
        model=network.make(config.model, features=1, context='dense'),
        target=TARGETS[config.problem.target],
        is_bilinear=config.problem.target == 'bilinear',
        dimension=config.problem.dimension,
        eval_examples=config.problem.examples,
    )
