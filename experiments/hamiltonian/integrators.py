"""Integrators: symplectic methods for an energy, and a Runge–Kutta method for any field.

Shapes: positions q [..., d], momenta p [..., d]. An energy maps (q, p) to H [...]. A field maps
(q, p) to dq/dt and dp/dt, [..., d] each. A step maps (q, p) to (q, p) at a later time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

State = tuple[Array, Array]  # q, p
Energy = Callable[[Array, Array], Array]
Field = Callable[[Array, Array], State]
Step = Callable[[Array, Array], State]


def make_gradients(energy: Energy) -> tuple[Callable[[Array, Array], Array], ...]:
    """Return the functions ∂H/∂q and ∂H/∂p of an energy whose rows are independent."""

    def total_energy(q: Array, p: Array) -> Array:
        return jnp.sum(energy(q, p))

    return jax.grad(total_energy, 0), jax.grad(total_energy, 1)


def hamiltonian(energy: Energy) -> Field:
    """Return the field of Hamilton's equations: dq/dt = ∂H/∂p, dp/dt = −∂H/∂q."""

    def field(q: Array, p: Array) -> State:
        grad_q, grad_p = jax.grad(lambda q, p: jnp.sum(energy(q, p)), (0, 1))(q, p)
        return grad_p, -grad_q

    return field


def leapfrog(energy: Energy, time: float, iterations: int = 1) -> Step:
    """Return a step of the generalized leapfrog method of second order, for any energy.

        p½ = p  − τ/2 ∂H/∂q(q, p½)
        q' = q  + τ/2 (∂H/∂p(q, p½) + ∂H/∂p(q', p½))
        p' = p½ − τ/2 ∂H/∂q(q', p½)

    The first two equations are implicit, and are solved by `iterations` iterations from p½ = p and
    q' = q. For a separable H = T(p) + V(q), one iteration is exact, and the method is the usual
    leapfrog, which is symplectic and reversible. For other energies, one iteration is the scheme
    that Toth et al. (2020) use as if H were separable, which has neither property. Each further
    iteration reduces the errors in both properties by a factor of order τ (Hairer, Lubich and
    Wanner, Geometric Numerical Integration, VI.3). A step costs 2·iterations + 1 gradients of H.

    Args:
      energy: function (q, p) → H.
      time: step size τ.
      iterations: number of iterations for the implicit equations.
    """
    grad_q, grad_p = make_gradients(energy)

    def step(q: Array, p: Array) -> State:
        p_half = p
        for _ in range(iterations):
            p_half = p - time / 2 * grad_q(q, p_half)
        velocity = grad_p(q, p_half)
        q_next = q + time * velocity
        for _ in range(iterations - 1):
            q_next = q + time / 2 * (velocity + grad_p(q_next, p_half))
        return q_next, p_half - time / 2 * grad_q(q_next, p_half)

    return step


def yoshida(energy: Energy, time: float, iterations: int = 1) -> Step:
    """Return a symplectic step of fourth order, composed of three leapfrogs (Yoshida, 1990).

    One of the leapfrogs is backward in time. The order is lower if too few iterations make the
    leapfrogs irreversible.

    Args:
      energy: function (q, p) → H.
      time: size of the whole step.
      iterations: number of iterations of each leapfrog.
    """
    outer_share = 1 / (2 - 2 ** (1 / 3))
    shares = outer_share, 1 - 2 * outer_share, outer_share
    leapfrogs = [leapfrog(energy, share * time, iterations) for share in shares]

    def step(q: Array, p: Array) -> State:
        for leapfrog_step in leapfrogs:
            q, p = leapfrog_step(q, p)
        return q, p

    return step


def rk4(field: Field, time: float) -> Step:
    """Return a step of the classical fourth-order Runge–Kutta method, with four field calls."""

    def step(q: Array, p: Array) -> State:
        def field_at(slope: State, share: float) -> State:
            return field(q + share * time * slope[0], p + share * time * slope[1])

        first = field(q, p)
        second = field_at(first, 0.5)
        third = field_at(second, 0.5)
        fourth = field_at(third, 1.0)
        slopes = zip(first, second, third, fourth, strict=True)
        dq, dp = ((k1 + 2 * k2 + 2 * k3 + k4) / 6 for k1, k2, k3, k4 in slopes)
        return q + time * dq, p + time * dp

    return step


def roll_out(step: Step, q: Array, p: Array, steps: int, substeps: int = 1) -> State:
    """Compute the states after 0, 1, …, `steps` times `substeps` steps, [steps + 1, ..., d]."""

    def advance(state: State, _: None) -> tuple[State, State]:
        state = jax.lax.fori_loop(0, substeps, lambda _, state: step(*state), state)
        return state, state

    _, (qs, ps) = jax.lax.scan(advance, (q, p), None, steps)
    return jnp.concatenate([q[None], qs]), jnp.concatenate([p[None], ps])
