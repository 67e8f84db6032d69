"""Small problems, parameters and points for the tests of neural processes."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.neural_process import config as configs
from experiments.neural_process import problem as neural_process
from experiments.neural_process import tasks
from experiments.neural_process.network import Points
from tests import prng
from tests.fit.runs import edited

SMALL = {
    'problem.max_context': 6, 'problem.targets': 5, 'problem.functions': 12,
    'problem.contexts': (0, 2, 6), 'problem.samples': 4, 'model.parameters': 0, 'model.width': 6,
    'model.features': 4, 'model.encoder_width': 8, 'model.encoder_depth': 1,
}  # fmt: skip
ATTENTIVE = {'model.paths': 'both', 'model.self_attention': 2, 'model.cross_attention': 4}
NOISE = 0.1


def config(**changes):
    return edited(configs.get_config(), **changes)


def make_problem(**changes):
    return neural_process.make(config(**(SMALL | changes)))


def init_random(problem, seed=0):
    """Return parameters without a zero, so that every part shows in the output."""
    shapes = jax.eval_shape(problem.init_params, jax.random.key(0), {})
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), 'f'), shapes)


def make_kernel(family, scale=1.3, length=0.6, period=1.7):
    values = tasks.FAMILIES.index(family), scale, length, period
    return tasks.Kernel(*map(jnp.asarray, values))


def draw_points(num_points, seed=0, num_visible=None):
    x, y = np.random.default_rng(seed).uniform(-2, 2, (2, num_points)).astype('f')
    mask = np.arange(num_points) < (num_points if num_visible is None else num_visible)
    return Points(*map(jnp.asarray, (x, y, mask)))


def make_functions(num_functions, **changes):
    distribution = neural_process.make(config(**(SMALL | changes))).distribution
    draw = jax.jit(tasks.draw_functions, static_argnums=(1, 2, 3))
    return draw(prng.key(1), distribution, num_functions, 11)
