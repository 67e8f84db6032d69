"""Bodies as soft discs on a small grid, one channel each, and where the discs of a frame are.

Shapes: places [..., bodies, 2], x to the right and y up; frames [..., SIDE, SIDE, bodies] in
[0, 1], rows from the top.
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
    """Render the frames."""
    x, y = (places[..., None, None, :, axis] for axis in (0, 1))
    columns, rows = _grid(x.ndim)
    distance = jnp.sqrt(jnp.square(columns - x) + jnp.square(rows - y))
    return jax.nn.sigmoid((RADIUS - distance) / SOFTNESS)


def locate(frames: Array) -> Array:
    """Return the centers of mass of squared brightness, the places of the bodies.

    Squared, so that a faint haze over all of a decoded frame does not draw them to its middle.
    """
    mass = jnp.square(frames)
    total = jnp.sum(mass, (-3, -2))
    return jnp.stack(
        [jnp.sum(mass * coordinates, (-3, -2)) / total for coordinates in _grid(frames.ndim)], -1
    )


def _grid(ndim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x of the columns and y of the rows, broadcastable to frames of `ndim` axes."""
    centers = ((np.arange(SIDE) + 0.5) * 2 * VIEW / SIDE - VIEW).astype(np.float32)
    batch_axes = (1,) * (ndim - 3)
    columns = centers.reshape(*batch_axes, 1, SIDE, 1)
    return columns, -centers.reshape(*batch_axes, SIDE, 1, 1)
