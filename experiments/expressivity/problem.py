"""Products of two streams, and targets that are none: what does a network need to fit them?

    product    y = xᵀz
    additive   y = Σᵢ (u(xᵢ) + u(zᵢ)) / √2,  u(a) = (|a| − √(2/π)) / √(1 − 2/π)
    x_only     y = Σᵢ u(xᵢ)

x and z are of dimension d with independent standard Gaussian entries, so that every target has mean
0 and variance d. In the last two there is no interaction, and all that one costs is in vain.

Source: the first is of Jayakumar et al. (ICLR 2020), recalled; the others are ours.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax import Array

from mi.config import Rule, choice, integer
from mi.fit import network
from mi.fit.problem import Metrics, Problem

SURFACE = 3.0  # half the side of the square on which the error of a pair of numbers is kept
POINTS = 121


def _folded(a: Array) -> Array:
    """u: of a standard Gaussian, mean 0 and variance 1."""
    return (jnp.abs(a) - math.sqrt(2 / math.pi)) / math.sqrt(1 - 2 / math.pi)


TARGETS = {
    'product': lambda x, z: jnp.sum(x * z, -1),
    'additive': lambda x, z: jnp.sum(_folded(x) + _folded(z), -1) / math.sqrt(2),
    'x_only': lambda x, z: jnp.sum(_folded(x), -1),
}

SCHEMA: dict[str, Rule] = {
    'problem.target': choice(TARGETS),
    'problem.dimension': integer(1),
    'problem.examples': integer(1),
    **network.SCHEMA,
}


def make(config: ml_collections.ConfigDict) -> Problem:
    """The problem of a config; batches are drawn anew, so that there is no training set."""
    d, target = config.problem.dimension, TARGETS[config.problem.target]
    model = network.make(config.model, features=1, context='dense')
    one = jax.ShapeDtypeStruct((d,), jnp.float32)

    def predict(params: Any, x: Array, z: Array) -> Array:
        y: Any = model.apply(params, x, z)
        return y[..., 0]

    def error(params: Any, key: Array, examples: int) -> Array:
        x, z = jax.random.normal(key, (2, examples, d))
        return jnp.mean(jnp.square(predict(params, x, z) - target(x, z)))

    def loss(params: Any, world: Any, key: Array) -> tuple[Array, Metrics]:
        mse = error(params, key, config.train.batch)
        return mse, {'mse': mse}

    def evaluation(params: Any, world: Any, key: Array) -> Metrics:
        return {'mse': error(params, key, config.problem.examples)}

    def surface(params: Any, world: Any, key: Array) -> Metrics:
        """The error at each point of a square, by x along the second axis; of one dimension."""
        side = jnp.linspace(-SURFACE, SURFACE, POINTS)
        z, x = (a[..., None] for a in jnp.meshgrid(side, side, indexing='ij'))
        return {'surface': predict(params, x, z) - target(x, z)}

    return Problem(
        world=lambda key: {},
        init=lambda key, world: model.init(key, jnp.zeros(d), jnp.zeros(d)),
        loss=loss,
        evaluations={'eval': evaluation},
        costs=lambda: network.costs(model, one, one),
        examples=config.train.batch,
        artefacts=surface if d == 1 else None,
    )
