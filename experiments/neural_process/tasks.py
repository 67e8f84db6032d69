"""Random functions, drawn from Gaussian processes whose kernels have random parameters.

    rbf        k(x, x′) = s² exp(−(x − x′)² / 2ℓ²)
    periodic   k(x, x′) = s² exp(−2 sin²(π(x − x′)/p) / ℓ²)
    sinusoid   k(x, x′) = s² cos(2π(x − x′)/p),  so that f(x) = u cos(2πx/p) + v sin(2πx/p) with
               u, v ~ N(0, s²), which has a random amplitude and a random phase
    mixture    all three in turn

Values are y = f(x) + noise, at x uniform in [−RANGE, RANGE]. Every function draws s, ℓ and p
uniformly from intervals. Because the sinusoid is also a Gaussian process, regression with the true
kernel is exact for all families (see `gp`).

Shapes: F functions with N points each; x, y [F, N].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from chex import Array, PRNGKey

from mi.config import Rule, choice, number

RANGE = 2.0  # of x, on both sides of 0
FAMILIES = ('rbf', 'periodic', 'sinusoid')
MIXTURE = 'mixture'

Interval = tuple[float, float]


def interval(value: object) -> str:
    """Return a description of valid intervals of positive numbers, or '' if the value is valid."""
    find_violation = number(0, exclusive=True)
    if isinstance(value, tuple | list) and len(value) == 2 and not any(map(find_violation, value)):
        low, high = value
        if low <= high:
            return ''
    return 'a tuple (low, high) of positive numbers, such as (0.5, 1.5)'


SCHEMA: dict[str, Rule] = {
    'problem.family': choice([*FAMILIES, MIXTURE]),
    'problem.noise': number(0, exclusive=True),
    'problem.scale': interval,
    'problem.length': interval,
    'problem.periodic_length': interval,
    'problem.period': interval,
}


class Distribution(NamedTuple):
    """A distribution of functions, from `config.problem`.

    Attributes:
      family: one of FAMILIES, or MIXTURE.
      noise: standard deviation of y around f(x).
      scale: interval of s.
      length: interval of ℓ for rbf, in units of x.
      periodic_length: interval of ℓ for periodic.
      period: interval of p.
    """

    family: str
    noise: float
    scale: Interval
    length: Interval
    periodic_length: Interval
    period: Interval

    @property
    def families(self) -> tuple[str, ...]:
        """The families to draw from, in turn."""
        return FAMILIES if self.family == MIXTURE else (self.family,)


class Kernel(NamedTuple):
    """Parameters of the kernel of a function.

    Attributes:
      family: index of the family in FAMILIES.
      scale: s.
      length: ℓ.
      period: p.
    """

    family: Array
    scale: Array
    length: Array
    period: Array


class Functions(NamedTuple):
    """Functions, given by their kernels [F] and by their values y at x [F, N]."""

    kernel: Kernel
    x: Array
    y: Array


def compute_covariance(kernel: Kernel, x1: Array, x2: Array) -> Array:
    """Compute k(x1, x2) [N, M] of one function, without noise, for x1 [N] and x2 [M]."""
    difference = x1[:, None] - x2[None]
    # cos(2π(x − x′)/p) from N + M angles, as 2 sin² α = 1 − cos 2α: a cosine is slow on CPUs.
    angles1, angles2 = (2 * jnp.pi * x / kernel.period for x in (x1, x2))
    cosine = jnp.outer(jnp.cos(angles1), jnp.cos(angles2))
    cosine += jnp.outer(jnp.sin(angles1), jnp.sin(angles2))
    is_rbf, is_sinusoid = (kernel.family == FAMILIES.index(name) for name in ('rbf', 'sinusoid'))
    exponent = jnp.where(is_rbf, -jnp.square(difference) / 2, cosine - 1)
    exponential = jnp.exp(exponent / jnp.square(kernel.length))
    return jnp.square(kernel.scale) * jnp.where(is_sinusoid, cosine, exponential)


def draw_kernels(key: PRNGKey, distribution: Distribution, num_functions: int) -> Kernel:
    """Draw kernels [F] with alternating families."""
    family_ids = jnp.array([FAMILIES.index(family) for family in distribution.families])
    family = family_ids[jnp.arange(num_functions) % len(family_ids)]

    def draw(uniform: Array, bounds: Interval) -> Array:
        low, high = bounds
        return low + (high - low) * uniform

    scale, length, period = jax.random.uniform(key, (3, num_functions))
    is_periodic = family == FAMILIES.index('periodic')
    lengths = draw(length, distribution.length), draw(length, distribution.periodic_length)
    return Kernel(
        family=family,
        scale=draw(scale, distribution.scale),
        length=jnp.where(is_periodic, lengths[1], lengths[0]),
        period=draw(period, distribution.period),
    )


def draw_values(key: PRNGKey, kernel: Kernel, x: Array, noise: Array) -> Array:
    """Draw y [N] of one function at x [N], given the standard deviation of the noise [N]."""
    covariance = compute_covariance(kernel, x, x) + jnp.diag(jnp.square(noise))
    return jnp.linalg.cholesky(covariance) @ jax.random.normal(key, x.shape)


def draw_functions(
    key: PRNGKey, distribution: Distribution, num_functions: int, num_points: int
) -> Functions:
    """Draw functions and their noisy values, with different points for each function."""
    kernel_key, x_key, y_key = jax.random.split(key, 3)
    kernels = draw_kernels(kernel_key, distribution, num_functions)
    shape = num_functions, num_points
    x = jax.random.uniform(x_key, shape, minval=-RANGE, maxval=RANGE)
    value_keys = jax.random.split(y_key, num_functions)
    noise = jnp.full(shape, distribution.noise)
    return Functions(kernels, x, jax.vmap(draw_values)(value_keys, kernels, x, noise))
