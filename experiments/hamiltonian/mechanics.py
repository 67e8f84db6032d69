"""Three systems of classical mechanics: their energies, their motions, where their bodies are.

    mass_spring   H = p²/2m + k q²/2          m = ½, k = 2; amplitudes of 0.2 to 1
    pendulum      H = p²/2m + m g (1 − cos q)  m = ½, g = 3, length 1; amplitudes of 0.5 to 2.5 rad
    two_body      H = (|p₁|² + |p₂|²)/2m − G m²/|q₁ − q₂|   m = G = 1; the center of mass at rest

All are H = T(p) + V(q). Shapes: q, p [..., d]; d is 1, and 4 for the two bodies on their plane.

Source: the systems and m, k, g, G are of Toth et al. (ICLR 2020), recalled; the initial states and
the times between observations are ours.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from experiments.hamiltonian import integrators
from experiments.hamiltonian.integrators import State

SUBSTEPS = 12  # of the fourth-order steps between two observations that stand for the exact motion
BODIES = 2  # that are seen: one that does not move is a wall or a hinge

_STIFFNESS = 2.0
_GRAVITY = 3.0


class System(NamedTuple):
    """A system of particles of one mass in a potential.

    Attributes:
      degrees: d.
      mass: m.
      potential: q → V [...].
      draw: (key, how many) → initial q, p.
      time: between two observations.
      places: q → where its bodies are on the plane, [..., BODIES, 2]; those that move come first.
      coordinates: the q of such places. Kinetic energy is that of their motion in all systems.
      moving: how many of them move.
    """

    degrees: int
    mass: float
    potential: Callable[[Array], Array]
    draw: Callable[[Array, int], State]
    time: float
    places: Callable[[Array], Array]
    coordinates: Callable[[Array], Array]
    moving: int

    def energy(self, q: Array, p: Array) -> Array:
        """Return H [...]."""
        return jnp.sum(jnp.square(p), -1) / (2 * self.mass) + self.potential(q)

    def motion(self, q: Array, p: Array, steps: int) -> State:
        """Return the states at 0, 1, …, `steps` observations, [steps + 1, ..., d] each."""
        step = integrators.yoshida(self.energy, self.time / SUBSTEPS)
        return integrators.roll_out(step, q, p, steps, SUBSTEPS)


def _oscillation(
    potential: Callable[[Array], Array], mass: float, low: float, high: float
) -> Callable[[Array, int], State]:
    """Draws states of amplitudes in [low, high]: q = a sin φ, and the p of V(a)."""

    def draw(key: Array, count: int) -> State:
        amplitude_key, phase_key = jax.random.split(key)
        a = jax.random.uniform(amplitude_key, (count, 1), minval=low, maxval=high)
        phase = jax.random.uniform(phase_key, (count, 1), maxval=2 * jnp.pi)
        q = a * jnp.sin(phase)
        kinetic = jnp.maximum(potential(a) - potential(q), 0)[..., None]
        return q, jnp.sign(jnp.cos(phase)) * jnp.sqrt(2 * mass * kinetic)

    return draw


def _spring(q: Array) -> Array:
    return _STIFFNESS / 2 * jnp.square(q[..., 0])


def _hinge(q: Array) -> Array:
    return 0.5 * _GRAVITY * (1 - jnp.cos(q[..., 0]))


def _attraction(q: Array) -> Array:
    apart = q[..., :2] - q[..., 2:]
    return -1 / jnp.sqrt(jnp.sum(jnp.square(apart), -1))


def _orbits(key: Array, count: int) -> State:
    """Two bodies opposite each other at their farthest, at 0.5 to 1 from the center of mass.

    Of the speed of a circular orbit they have 0.9 to 1, either way round.
    """
    radius_key, angle_key, speed_key, sign_key = jax.random.split(key, 4)
    r = jax.random.uniform(radius_key, (count, 1), minval=0.5, maxval=1.0)
    angle = jax.random.uniform(angle_key, (count, 1), maxval=2 * jnp.pi)
    share = jax.random.uniform(speed_key, (count, 1), minval=0.9, maxval=1.0)
    sign = jax.random.rademacher(sign_key, (count, 1)).astype(jnp.float32)
    out = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
    across = jnp.concatenate([-jnp.sin(angle), jnp.cos(angle)], -1)
    q, p = r * out, sign * share / jnp.sqrt(4 * r) * across  # v²/r = G m/(2r)²
    return jnp.concatenate([q, -q], -1), jnp.concatenate([p, -p], -1)


def _beside(body: Array, fixed: tuple[float, float]) -> Array:
    """[..., 2] and a place that does not change → [..., BODIES, 2]."""
    return jnp.stack([body, jnp.broadcast_to(jnp.array(fixed), body.shape)], -2)


SYSTEMS: dict[str, System] = {
    'mass_spring': System(
        degrees=1,
        mass=0.5,
        potential=_spring,
        draw=_oscillation(_spring, 0.5, 0.2, 1.0),
        time=0.2,
        places=lambda q: _beside(jnp.concatenate([q, jnp.zeros_like(q)], -1), (0.0, -0.7)),
        coordinates=lambda places: places[..., 0, :1],
        moving=1,
    ),
    'pendulum': System(
        degrees=1,
        mass=0.5,
        potential=_hinge,
        draw=_oscillation(_hinge, 0.5, 0.5, 2.5),
        time=0.2,
        places=lambda q: _beside(jnp.concatenate([jnp.sin(q), -jnp.cos(q)], -1), (0.0, 0.0)),
        coordinates=lambda places: jnp.arctan2(places[..., 0, :1], -places[..., 0, 1:]),
        moving=1,
    ),
    'two_body': System(
        degrees=4,
        mass=1.0,
        potential=_attraction,
        draw=_orbits,
        time=0.3,
        places=lambda q: q.reshape(*q.shape[:-1], BODIES, 2),
        coordinates=lambda places: places.reshape(*places.shape[:-2], 2 * BODIES),
        moving=2,
    ),
}
