"""Three systems of classical mechanics: their energies, motions and positions of bodies.

    mass_spring   H = p²/2m + k q²/2          m = ½, k = 2; amplitudes of 0.2 to 1
    pendulum      H = p²/2m + m g (1 − cos q)  m = ½, g = 3, length 1; amplitudes of 0.5 to 2.5 rad
    two_body      H = (|p₁|² + |p₂|²)/2m − G m²/|q₁ − q₂|   m = G = 1; the center of mass at rest

All energies have the form H = T(p) + V(q). Shapes: q, p [..., d], where d is 4 for two_body and 1
for the others.

Source: Toth et al. (ICLR 2020), recalled from memory, for the systems and m, k, g and G. The
initial states and the times between observations are ours.
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
    """A system of particles with equal masses in a potential.

    Attributes:
      degrees: number of degrees of freedom, d.
      mass: mass of each particle, m.
      potential: function q → V [...].
      draw: function (key, number of states) → initial q and p.
      time: time between two observations.
      places: function from q to the positions of the bodies on the plane, [..., BODIES, 2], with
        moving bodies first.
      coordinates: inverse of `places`. Kinetic energy is m v²/2 of these positions in all systems.
      moving: number of moving bodies.
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
        """Compute H [...]."""
        return jnp.sum(jnp.square(p), -1) / (2 * self.mass) + self.potential(q)

    def motion(self, q: Array, p: Array, steps: int) -> State:
        """Compute the states at the observations 0, 1, …, `steps`, [steps + 1, ..., d] each."""
        step = integrators.yoshida(self.energy, self.time / SUBSTEPS)
        return integrators.roll_out(step, q, p, steps, SUBSTEPS)


def _make_draw_oscillations(
    potential: Callable[[Array], Array], mass: float, smallest: float, largest: float
) -> Callable[[Array, int], State]:
    """Return a function that draws oscillations: q = a sin φ, with p from the energy V(a)."""

    def draw_oscillations(key: Array, num_states: int) -> State:
        amplitude_key, phase_key = jax.random.split(key)
        shape = num_states, 1
        amplitude = jax.random.uniform(amplitude_key, shape, minval=smallest, maxval=largest)
        phase = jax.random.uniform(phase_key, shape, maxval=2 * jnp.pi)
        q = amplitude * jnp.sin(phase)
        kinetic = jnp.maximum(potential(amplitude) - potential(q), 0)[..., None]
        return q, jnp.sign(jnp.cos(phase)) * jnp.sqrt(2 * mass * kinetic)

    return draw_oscillations


def _spring_potential(q: Array) -> Array:
    return _STIFFNESS / 2 * jnp.square(q[..., 0])


def _pendulum_potential(q: Array) -> Array:
    return 0.5 * _GRAVITY * (1 - jnp.cos(q[..., 0]))


def _gravity_potential(q: Array) -> Array:
    separation = q[..., :2] - q[..., 2:]
    return -1 / jnp.sqrt(jnp.sum(jnp.square(separation), -1))


def _draw_orbits(key: Array, num_states: int) -> State:
    """Draw orbits of two bodies, starting at their largest distance.

    Each body is 0.5 to 1 from the center of mass, opposite the other, and has 0.9 to 1 times the
    speed of a circular orbit, in either direction.
    """
    radius_key, angle_key, speed_key, direction_key = jax.random.split(key, 4)
    radius = jax.random.uniform(radius_key, (num_states, 1), minval=0.5, maxval=1.0)
    angle = jax.random.uniform(angle_key, (num_states, 1), maxval=2 * jnp.pi)
    speed_share = jax.random.uniform(speed_key, (num_states, 1), minval=0.9, maxval=1.0)
    direction = jax.random.rademacher(direction_key, (num_states, 1)).astype(jnp.float32)
    outward = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
    across = jnp.concatenate([-jnp.sin(angle), jnp.cos(angle)], -1)
    q = radius * outward
    p = direction * speed_share / jnp.sqrt(4 * radius) * across  # v²/r = G m/(2r)²
    return jnp.concatenate([q, -q], -1), jnp.concatenate([p, -p], -1)


def _add_anchor(body: Array, anchor: tuple[float, float]) -> Array:
    """Append a fixed position to the position of a body [..., 2]: → [..., BODIES, 2]."""
    return jnp.stack([body, jnp.broadcast_to(jnp.array(anchor), body.shape)], -2)


SYSTEMS: dict[str, System] = {
    'mass_spring': System(
        degrees=1,
        mass=0.5,
        potential=_spring_potential,
        draw=_make_draw_oscillations(_spring_potential, 0.5, 0.2, 1.0),
        time=0.2,
        places=lambda q: _add_anchor(jnp.concatenate([q, jnp.zeros_like(q)], -1), (0.0, -0.7)),
        coordinates=lambda places: places[..., 0, :1],
        moving=1,
    ),
    'pendulum': System(
        degrees=1,
        mass=0.5,
        potential=_pendulum_potential,
        draw=_make_draw_oscillations(_pendulum_potential, 0.5, 0.5, 2.5),
        time=0.2,
        places=lambda q: _add_anchor(jnp.concatenate([jnp.sin(q), -jnp.cos(q)], -1), (0.0, 0.0)),
        coordinates=lambda places: jnp.arctan2(places[..., 0, :1], -places[..., 0, 1:]),
        moving=1,
    ),
    'two_body': System(
        degrees=4,
        mass=1.0,
        potential=_gravity_potential,
        draw=_draw_orbits,
        time=0.3,
        places=lambda q: q.reshape(*q.shape[:-1], BODIES, 2),
        coordinates=lambda places: places.reshape(*places.shape[:-2], 2 * BODIES),
        moving=2,
    ),
}
