"""Learned laws of motion: an energy in one of several forms, or a field without an energy.

    joint       H = h(q, p)               dq/dt = ∂H/∂p, dp/dt = −∂H/∂q
    square      H = h(s, s), s = [q; p]   the same
    separable   H = h₁(q, q) + h₂(p, p)   the same
    field       (dq/dt, dp/dt) = h(q, p)

Each h is a network (mi.fit.network) that fuses its two inputs. With the fusion 'concat', the joint
form is the MLP of Greydanus et al. (2019) and Toth et al. (2020). With an MI, the form 'square'
contains all quadratic forms of the state. The field is a baseline without an energy.

Shapes: q, p [..., d].
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_collections
from chex import Array, PRNGKey
from flax import linen as nn

from experiments.hamiltonian import integrators
from experiments.hamiltonian.integrators import State
from mi import counting
from mi.config import Rule, choice, integer
from mi.fit import network
from mi.fit.problem import Costs, Params

FORMS = ('joint', 'square', 'separable', 'field')

SCHEMA: dict[str, Rule] = {
    'problem.iterations': integer(1),
    'model.form': choice(FORMS),
    **network.SCHEMA,
}


class Law(nn.Module):
    """A law of motion: (q, p) → H [...], or (q, p) → (dq/dt, dp/dt) for the form 'field'.

    Attributes:
      form: one of FORMS.
      network: function of a number of features that returns a module of two streams.
    """

    form: str
    network: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, q: Array, p: Array) -> Array | State:
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
    """Build the law that the section `model` of a config describes."""
    return Law(model.form, lambda features: network.make(model, features, context='dense'))


def make_field(law: Law, params: Params) -> integrators.Field:
    """Return the velocity field of a law of any form."""

    def evaluate_law(q: Array, p: Array) -> Any:
        return law.apply(params, q, p)

    return evaluate_law if law.form == 'field' else integrators.hamiltonian(evaluate_law)


def make_step(
    law: Law, params: Params, time: float, iterations: int, order: Literal[2, 4]
) -> integrators.Step:
    """Return an integrator step for a law.

    An energy uses the generalized leapfrog if `order` is 2, and its fourth-order composition if
    `order` is 4. A separable energy only needs one iteration. A field always uses the fourth-order
    Runge–Kutta method.
    """
    if law.form == 'field':
        return integrators.rk4(make_field(law, params), time)
    make_integrator = integrators.leapfrog if order == 2 else integrators.yoshida
    num_iterations = 1 if law.form == 'separable' else iterations
    energy = functools.partial(compute_energy, law, params)
    return make_integrator(energy, time, num_iterations)


def compute_energy(law: Law, params: Params, q: Array, p: Array) -> Array:
    """Compute H [...] of a law, which must not have the form 'field'."""
    H: Array = law.apply(params, q, p)
    return H


def init_params(law: Law, key: PRNGKey, degrees: int) -> Params:
    """Initialize the parameters of a law."""
    return law.init(key, jnp.zeros(degrees), jnp.zeros(degrees))


def costs(law: Law, degrees: int) -> Costs:
    """Count costs like `network.costs`, with the FLOPs to evaluate the velocity field once."""
    vector = jax.ShapeDtypeStruct((degrees,), jnp.float32)
    law_costs = network.costs(law, vector, vector)
    params = jax.eval_shape(law.init, jax.random.key(0), vector, vector)

    def compute_velocities(params: Params, q: Array, p: Array) -> State:
        return make_field(law, params)(q, p)

    flops = counting.flops(compute_velocities, params, vector, vector)
    law_costs['flops_per_example']['model'] = flops
    return law_costs
