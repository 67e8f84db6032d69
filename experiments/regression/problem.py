"""Many regressions at once: which fusion of input and task needs the fewest examples of each?

    affine      y = a x + b
    sinusoid    y = a sin(10 x) + b

A seed draws T tasks, by turns of the one family and of the other, with a, b uniform in [−1, 1], and
N examples of each, with x uniform in [−1, 1] and Gaussian noise on y. Errors are those of the
function without noise, at evenly spaced x. What a network knows of the task, `problem.context`:

    one_hot      z = e_i, its number
    descriptor   z = P(s + noise), s = (1 − f, f, a, b) with f = 0 for affine and 1 for sinusoid, P
                 a matrix that the seed draws; the noise is drawn once for each task
    inferred     z = ψ(mean_j φ(x_j, y_j)) of a few examples of it, φ and ψ learnt with the rest

New tasks come with K examples each, and how they are met is said at `_new`.

Shapes: T tasks, E examples of each; x, y [T, E], z [T, m].

Source: the two families are of Jayakumar et al. (ICLR 2020), recalled; every constant is ours.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn
from jax import Array

from mi import fusion
from mi.config import Rule, UserError, choice, integer, number, tuple_of
from mi.fit import network, transfer
from mi.fit.problem import Metrics, Problem
from mi.layers import Context

CONTEXTS = ('one_hot', 'descriptor', 'inferred')
FAMILIES = ('affine', 'sinusoid')
POINTS = 64  # at which errors are measured
SHOWN = 8  # tasks whose predictions are kept for a figure

SCHEMA: dict[str, Rule] = {
    'problem.context': choice(CONTEXTS),
    'problem.tasks': integer(2),
    'problem.examples': integer(1),
    'problem.noise': number(0),
    'problem.descriptor': integer(1),
    'problem.descriptor_noise': number(0),
    'problem.inferred': integer(1),
    'problem.encoder': integer(1),
    'transfer.tasks': integer(1),
    'transfer.shots': tuple_of(integer(1), 'positive integers'),
    **transfer.SCHEMA,
    **network.SCHEMA,
}


class Tasks(NamedTuple):
    """Tasks and what is known of them.

    Attributes:
      family: [T], 0 for affine and 1 for sinusoid.
      a, b: [T].
      z: [T, m], their contexts where these are not inferred.
      x, y: [T, E], examples.
    """

    family: Array
    a: Array
    b: Array
    z: Array
    x: Array
    y: Array


class World(NamedTuple):
    """What a seed draws: the tasks that are learnt, and others that come later."""

    known: Tasks
    new: Tasks


class Encoder(nn.Module):
    """A context of a set of examples: z = ψ(mean_j φ(x_j, y_j)), φ with two hidden layers.

    Attributes:
      features: m.
      width: of the hidden layers.
    """

    features: int
    width: int

    @nn.compact
    def __call__(self, x: Array, y: Array, weights: Array) -> Array:
        """x, y [..., E], and weights [..., E] that sum to 1 → [..., m]."""
        h = jnp.stack([x, y], -1)
        for _ in range(2):
            h = nn.relu(nn.Dense(self.width)(h))
        return nn.Dense(self.features)(jnp.sum(weights[..., None] * h, -2))


def values(tasks: Tasks, x: Array) -> Array:
    """The functions themselves, at x [T, E]."""
    shape = jnp.where(tasks.family[:, None] == 0, x, jnp.sin(10 * x))
    return tasks.a[:, None] * shape + tasks.b[:, None]


def make(config: ml_collections.ConfigDict) -> Problem:
    """The problem of a config; of every task, `train.batch` of its examples are in a step."""
    of, shots = config.problem, tuple(config.transfer.shots)
    one_hot = config.model.fusion.name in fusion.ONE_HOT
    if one_hot and of.context != 'one_hot':
        raise UserError(
            f'config.model.fusion.name = {config.model.fusion.name!r} is for contexts that are '
            f"one-hot: expected config.problem.context = 'one_hot', not {of.context!r}"
        )
    infers = of.context == 'inferred'
    kind: Context = 'one_hot' if of.context == 'one_hot' else 'dense'
    model = network.make(config.model, features=1, context=kind)
    m = {'one_hot': of.tasks, 'descriptor': of.descriptor, 'inferred': of.inferred}[of.context]
    encoder = Encoder(m, of.encoder)
    most = max(shots)

    def draw(key: Array, P: Array, count: int, examples: int) -> Tasks:
        of_task, of_z, of_x, of_noise = jax.random.split(key, 4)
        family = jnp.arange(count) % 2
        a, b = jax.random.uniform(of_task, (2, count), minval=-1, maxval=1)
        z = jnp.eye(count)
        if of.context == 'descriptor':
            said = jnp.stack([1.0 - family, 1.0 * family, a, b], -1)
            z = (said + of.descriptor_noise * jax.random.normal(of_z, said.shape)) @ P
        x = jax.random.uniform(of_x, (count, examples), minval=-1, maxval=1)
        tasks = Tasks(family, a, b, z, x, x)
        noise = of.noise * jax.random.normal(of_noise, x.shape)
        return tasks._replace(y=values(tasks, x) + noise)

    def world(key: Array) -> World:
        of_P, known, new = jax.random.split(key, 3)
        P = jax.random.normal(of_P, (len(FAMILIES) + 2, m))
        return World(
            draw(known, P, of.tasks, of.examples), draw(new, P, config.transfer.tasks, most)
        )

    def predict(params: Any, z: Array, x: Array) -> Array:
        """z [T, m], x [T, E] → [T, E]."""
        y: Any = model.apply({'params': params['network']}, x[..., None], z[:, None])
        return y[..., 0]

    def context(params: Any, tasks: Tasks, x: Array, y: Array, weights: Array) -> Array:
        """[T, m], of examples [T, E] of which some may have no weight, where it is inferred."""
        if not infers:
            return tasks.z
        z: Any = encoder.apply({'params': params['encoder']}, x, y, weights)
        return z

    def init(key: Array, world: Any) -> Any:
        of_network, of_encoder = jax.random.split(key)
        some = jnp.zeros(1)
        params = {'network': model.init(of_network, some, jnp.zeros(m))['params']}
        if infers:
            params['encoder'] = encoder.init(of_encoder, some, some, some)['params']
        return params

    def loss(params: Any, world: World, key: Array) -> tuple[Array, Metrics]:
        tasks = world.known
        of_batch, of_set, of_size = jax.random.split(key, 3)
        x, y = _some(of_batch, tasks, config.train.batch)
        # contexts of as few and as many examples as a new task may come with
        size = jax.random.choice(of_size, jnp.array(shots), (len(tasks.x), 1))
        z = context(params, tasks, *_some(of_set, tasks, most), _first(size, most))
        mse = jnp.mean(jnp.square(predict(params, z, x) - y))
        return mse, {'mse': mse}

    def of_known(params: Any, world: World) -> tuple[Array, Array, Array]:
        """Grid, predictions and values, [T, POINTS] each."""
        tasks = world.known
        there = min(most, of.examples)
        x, y = tasks.x[:, :there], tasks.y[:, :there]
        z = context(params, tasks, x, y, jnp.full_like(x, 1 / there))
        grid = _grid(len(x))
        return grid, predict(params, z, grid), values(tasks, grid)

    def evaluation(params: Any, world: World, key: Array) -> Metrics:
        _, found, wanted = of_known(params, world)
        error = jnp.mean(jnp.square(found - wanted), -1)
        each = {f'mse_{name}': error[i::2].mean() for i, name in enumerate(FAMILIES)}
        return {'mse': error.mean(), **each}

    def new(params: Any, world: World, key: Array) -> Metrics:
        return _new(config, world, params, init(key, world), predict, context)

    def artefacts(params: Any, world: World, key: Array) -> Metrics:
        grid, found, wanted = of_known(params, world)
        arrays = {'grid': grid, 'found': found, 'wanted': wanted, **world.known._asdict()}
        return {name: a[:SHOWN] for name, a in arrays.items() if name != 'z'}

    return Problem(
        world=world,
        init=init,
        loss=loss,
        evaluations={'eval': evaluation} | ({} if one_hot else {'new': new}),
        costs=lambda: _costs(model, m, encoder if infers else None),
        examples=of.tasks * config.train.batch,
        artefacts=artefacts,
    )


def _new(
    config: ml_collections.ConfigDict, world: World, params: Any, fresh: Any, predict: Any,
    context: Any,
) -> Metrics:  # fmt: skip
    """Errors on new tasks, `mse/K` after K examples of each and `mse/0` before.

    An inferred context is that of the K examples, and nothing is learnt. Others are learnt from
    them by gradient, each task its own, everything else as it was. One-hot contexts have no place
    for a new task: its z, with an entry for each task that is known, starts at their mean, so that
    what is learnt is of which rows of the parameters, in what shares, its own row is made. A
    descriptor starts as it came.

    The fusion 'none' has no context to learn. There, all parameters of a network that is `fresh`
    are learnt from the K examples alone: what one has without other tasks.
    """
    tasks, of = world.new, config.transfer
    infers = config.problem.context == 'inferred'
    alone = config.model.fusion.name == 'none'
    grid = _grid(len(tasks.x))
    wanted = values(tasks, grid)
    before = tasks.z
    if config.problem.context == 'one_hot':
        before = jnp.full((len(tasks.x), config.problem.tasks), 1 / config.problem.tasks)

    def error(params: Any, z: Array, x: Array, y: Array) -> Array:
        """Of one task, with z [m] and x, y [E]."""
        return jnp.mean(jnp.square(predict(params, z[None], x[None])[0] - y))

    def after(K: int, z: Array, x: Array, y: Array, at: Array, wanted: Array) -> Array:
        """The error of one task after the first K of its examples."""
        x, y = x[:K], y[:K]
        if alone:
            rate = config.optim.learning_rate
            learnt = transfer.fitted(lambda p: error(p, z, x, y), fresh, of.steps, rate)
            return error(learnt, z, at, wanted)
        if infers:
            z = context(params, None, x[None], y[None], jnp.full((1, K), 1 / K))[0]
        else:
            z = transfer.fitted(lambda z: error(params, z, x, y), z, of.steps, of.learning_rate)
        return error(params, z, at, wanted)

    found = {
        f'mse/{K}': jax.vmap(functools.partial(after, K))(before, tasks.x, tasks.y, grid, wanted)
        for K in of.shots
    }
    if not infers and not alone:
        found |= {'mse/0': jax.vmap(error, (None, 0, 0, 0))(params, before, grid, wanted)}
    return {name: of_tasks.mean() for name, of_tasks in found.items()}


def _some(key: Array, tasks: Tasks, count: int) -> tuple[Array, Array]:
    """Examples of every task, drawn with replacement, [T, count] each."""
    at = jax.random.randint(key, (len(tasks.x), count), 0, tasks.x.shape[-1])
    return jnp.take_along_axis(tasks.x, at, -1), jnp.take_along_axis(tasks.y, at, -1)


def _first(size: Array, of: int) -> Array:
    """Weights of the first `size` [T, 1] of so many examples, [T, of]."""
    return jnp.where(jnp.arange(of)[None] < size, 1 / size, 0.0)


def _grid(tasks: int) -> Array:
    return jnp.broadcast_to(jnp.linspace(-1, 1, POINTS), (tasks, POINTS))


def _costs(model: nn.Module, m: int, encoder: Encoder | None) -> dict[str, dict[str, int]]:
    """Of the network and, where there is one, of the encoder, for a context of one example."""
    one, z = (jax.ShapeDtypeStruct((size,), jnp.float32) for size in (1, m))
    counted = network.costs(model, one, z)
    if encoder is not None:
        of_encoder = network.costs(encoder, one, one, one)
        for what, parts in counted.items():
            parts['model'] += of_encoder[what]['model']
    return counted
