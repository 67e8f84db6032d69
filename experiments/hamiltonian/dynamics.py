"""Learned laws of motion: an energy in one of several forms, or a field without one.

    joint       H = h(q, p)               dq/dt = ∂H/∂p, dp/dt = −∂H/∂q
    square      H = h(s, s), s = [q; p]   the same
    separable   H = h₁(q, q) + h₂(p, p)   the same
    field       (dq/dt, dp/dt) = h(q, p)

Each h is a network (mi.fit.network) in which its two streams meet by a fusion: with 'concat', the
joint form is the MLP of the concatenation of Greydanus et al. (2019) and Toth et al. (2020). An MI
of s with itself, 'square', has all quadratic forms of the state. The field is the baseline that
knows nothing of energies.

Shapes: q, p [..., d].
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn
from jax import Array

from experiments.hamiltonian import integrators
from experiments.hamiltonian.integrators import State
from mi import counting
from mi.config import Rule, choice, integer
from mi.fit import network

FORMS = ('joint', 'square', 'separable', 'field')

SCHEMA: dict[str, Rule] = {
    'problem.iterations': integer(1),
    'model.form': choice(FORMS),
    **network.SCHEMA,
}


class Law(nn.Module):
    """(q, p) → H [...], or in the form 'field' → (dq/dt, dp/dt).

    Attributes:
      form: of FORMS.
      network: features → module of two streams.
    """

    form: str
    network: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, q: Array, p: Array) -> Any:
        if self.form == 'field':
            dq, dp = jnp.split(self.network(2 * q.shape[-1])(q, p), 2, -1)
            return dq, dp
        if self.form == 'separable':
            return (self.network(1)(q, q) + self.network(1)(p, p))[..., 0]
        x, z = q, p
        if self.form == 'square':
            x = z = jnp.concatenate([q, p], -1)
        return self.network(1)(x, z)[..., 0]


def make(model: ml_collections.ConfigDict) -> Law:
    """Build the law of a config's section `model`."""
    return Law(model.form, lambda features: network.make(model, features, context='dense'))


def field(law: Law, params: Any) -> integrators.Field:
    """Return the velocity field of a law of any form."""

    def of_law(q: Array, p: Array) -> Any:
        return law.apply(params, q, p)

    return of_law if law.form == 'field' else integrators.hamiltonian(of_law)


def step(
    law: Law, params: Any, time: float, iterations: int, order: Literal[2, 4]
) -> integrators.Step:
    """Return the generalized leapfrog of an energy, or its composition of fourth order.

    One iteration is enough for an energy that separates. A field uses
    Runge and Kutta's step, of fourth order for any `order`.
    """
    if law.form == 'field':
        return integrators.rk4(field(law, params), time)
    make = integrators.leapfrog if order == 2 else integrators.yoshida
    enough = 1 if law.form == 'separable' else iterations
    return make(lambda q, p: energy(law, params, q, p), time, enough)


def energy(law: Law, params: Any, q: Array, p: Array) -> Array:
    """Return H [...]; the form 'field' has none."""
    H: Any = law.apply(params, q, p)
    return H


def init(law: Law, key: Array, degrees: int) -> Any:
    """Draw the initial parameters."""
    return law.init(key, jnp.zeros(degrees), jnp.zeros(degrees))


def costs(law: Law, degrees: int) -> dict[str, dict[str, int]]:
    """Count as `network.costs`; the model's FLOPs are those of one evaluation of its field."""
    vector = jax.ShapeDtypeStruct((degrees,), jnp.float32)
    counted = network.costs(law, vector, vector)
    params = jax.eval_shape(law.init, jax.random.key(0), vector, vector)

    def velocities(params: Any, q: Array, p: Array) -> State:
        return field(law, params)(q, p)

    counted['flops_per_example']['model'] = counting.flops(velocities, params, vector, vector)
    return counted
