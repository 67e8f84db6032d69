"""Functions that render bodies as soft discs on a small grid, and locate discs in a frame.

Shapes: positions [..., bodies, 2], with x to the right and y up; frames [..., SIDE, SIDE, bodies]
in [0, 1], with rows from the top and one channel for each body.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

SIDE = 32  # pixels
VIEW = 1.25  # half the side of what is seen
RADIUS = 0.3
SOFTNESS = 0.08  # of the edge: a pixel


def render(places: Array) -> Array:
    """Render frames of bodies at the given positions."""
    x, y = (places[..., None, None, :, axis] for axis in (0, 1))
    columns, rows = _grid(x.ndim)
    distance = jnp.sqrt(jnp.square(columns - x) + jnp.square(rows - y))
    return jax.nn.sigmoid((RADIUS - distance) / SOFTNESS)


def locate(frames: Array) -> Array:
    """Locate the bodies in frames, as the centers of mass of the squared brightness.

    Squaring prevents a faint haze over a decoded frame from pulling the positions to the center.
    """
    mass = jnp.square(frames)
    total = jnp.sum(mass, (-3, -2))
    return jnp.stack(
        [jnp.sum(mass * coordinates, (-3, -2)) / total for coordinates in _grid(frames.ndim)], -1
    )


def _grid(ndim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x of the columns and y of the rows, which broadcast to frames with `ndim` axes."""
    centers = ((np.arange(SIDE) + 0.5) * 2 * VIEW / SIDE - VIEW).astype(np.float32)
    batch_axes = (1,) * (ndim - 3)
    columns = centers.reshape(*batch_axes, 1, SIDE, 1)
    return columns, -centers.reshape(*batch_axes, SIDE, 1, 1)
