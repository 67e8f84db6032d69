"""Many regression tasks, which compare fusions of input and task by the examples they need.

    affine      y = a x + b
    sinusoid    y = a sin(10 x) + b

A seed draws T tasks from the two families in turn, with a and b uniform in [−1, 1]. Each task has N
examples, with x uniform in [−1, 1] and Gaussian noise on y. Errors are relative to the noiseless
function, at evenly spaced x. The network receives one of three contexts (`problem.context`):

    one_hot      z = e_i, the index of the task
    descriptor   z = P(s + noise), where s = (1 − f, f, a, b), with f = 0 for affine and 1 for
                 sinusoid. The seed draws the matrix P, and the noise is drawn once for each task.
    inferred     z = ψ(mean_j φ(x_j, y_j)) of a few examples, where φ and ψ are learned with the
                 network

New tasks have K examples each. `Regression._evaluate_new` describes how they are learned.

Shapes: T tasks, E examples of each; x, y [T, E], z [T, m].

Source: the experiment and all constants are ours. See docs/paper.md.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from chex import Array, PRNGKey
from flax import linen as nn

from mi import fusion
from mi.config import Rule, UserError, choice, integer, number, tuple_of
from mi.fit import network, transfer
from mi.fit.problem import Costs, Metrics, Params, Problem, World
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
    """Tasks with their contexts and examples.

    Attributes:
      family: family of each task [T], 0 for affine and 1 for sinusoid.
      a, b: parameters of each task [T].
      z: context of each task [T, m], unless contexts are inferred.
      x, y: examples [T, E].
    """

    family: Array
    a: Array
    b: Array
    z: Array
    x: Array
    y: Array


class RegressionWorld(NamedTuple):
    """The tasks that a seed draws: known tasks for training, and new tasks."""

    known: Tasks
    new: Tasks


class Settings(NamedTuple):
    """Options of the tasks and their contexts, from `config.problem`."""

    context: str
    tasks: int
    examples: int
    noise: float
    descriptor_noise: float


class TransferSettings(NamedTuple):
    """Options for learning new tasks, from `config.transfer`."""

    tasks: int
    shots: tuple[int, ...]
    steps: int
    learning_rate: float


class Encoder(nn.Module):
    """An encoder that infers a context from examples: z = ψ(mean_j φ(x_j, y_j)).

    Attributes:
      features: number of context features m.
      width: width of the two hidden layers of φ.
    """

    features: int
    width: int

    @nn.compact
    def __call__(self, x: Array, y: Array, weights: Array) -> Array:
        """Map examples x and y [..., E], with weights [..., E] that sum to 1, to z [..., m]."""
        hidden = jnp.stack([x, y], -1)
        for _ in range(2):
            hidden = nn.relu(nn.Dense(self.width)(hidden))
        return nn.Dense(self.features)(jnp.sum(weights[..., None] * hidden, -2))


def compute_values(tasks: Tasks, x: Array) -> Array:
    """Compute the noiseless functions of the tasks at x [T, E]."""
    shape = jnp.where(tasks.family[:, None] == 0, x, jnp.sin(10 * x))
    return tasks.a[:, None] * shape + tasks.b[:, None]


@dataclasses.dataclass(frozen=True)
class Regression(Problem):
    """The problem of learning known tasks, and then new tasks from few examples.

    Attributes:
      model: module (x, z) → y.
      encoder: encoder of inferred contexts, or None if contexts are not inferred.
      settings: section `problem` of the config.
      transfer: section `transfer` of the config.
      features: number of context features m.
      batch: number of examples of each task in a step.
      is_one_hot: whether the fusion only accepts one-hot contexts, which new tasks do not have.
      learns_alone: whether the network has no context, so that a new task trains a new network.
      learning_rate: learning rate of a network that learns a new task alone.
    """

    model: network.FusedMLP
    encoder: Encoder | None
    settings: Settings
    transfer: TransferSettings
    features: int
    batch: int
    is_one_hot: bool
    learns_alone: bool
    learning_rate: float

    def _draw_tasks(self, key: PRNGKey, P: Array, num_tasks: int, num_examples: int) -> Tasks:
        settings = self.settings
        task_key, z_key, x_key, noise_key = jax.random.split(key, 4)
        family = jnp.arange(num_tasks) % 2
        a, b = jax.random.uniform(task_key, (2, num_tasks), minval=-1, maxval=1)
        z = jnp.eye(num_tasks)
        if settings.context == 'descriptor':
            descriptor = jnp.stack([1.0 - family, 1.0 * family, a, b], -1)
            noise = jax.random.normal(z_key, descriptor.shape)
            z = (descriptor + settings.descriptor_noise * noise) @ P
        x = jax.random.uniform(x_key, (num_tasks, num_examples), minval=-1, maxval=1)
        tasks = Tasks(family, a, b, z, x, x)
        noise = settings.noise * jax.random.normal(noise_key, x.shape)
        return tasks._replace(y=compute_values(tasks, x) + noise)

    def draw_world(self, key: PRNGKey) -> RegressionWorld:
        P_key, known_key, new_key = jax.random.split(key, 3)
        P = jax.random.normal(P_key, (len(FAMILIES) + 2, self.features))
        known = self._draw_tasks(known_key, P, self.settings.tasks, self.settings.examples)
        max_shots = max(self.transfer.shots)
        return RegressionWorld(known, self._draw_tasks(new_key, P, self.transfer.tasks, max_shots))

    def init_params(self, key: PRNGKey, world: World) -> Params:
        network_key, encoder_key = jax.random.split(key)
        x, z = jnp.zeros(1), jnp.zeros(self.features)
        params = {'network': self.model.init(network_key, x, z)['params']}
        if self.encoder is not None:
            params['encoder'] = self.encoder.init(encoder_key, x, x, x)['params']
        return params

    def _predict(self, params: Params, z: Array, x: Array) -> Array:
        """Predict y [T, E] at x [T, E] for contexts z [T, m]."""
        variables = {'params': params['network']}
        prediction: Array = self.model.apply(variables, x[..., None], z[:, None])
        return prediction[..., 0]

    def _infer(self, params: Params, x: Array, y: Array, weights: Array) -> Array:
        """Infer contexts [T, m] from weighted examples [T, E]."""
        assert self.encoder is not None
        context: Array = self.encoder.apply({'params': params['encoder']}, x, y, weights)
        return context

    def loss(self, params: Params, world: RegressionWorld, key: PRNGKey) -> tuple[Array, Metrics]:
        tasks, max_shots = world.known, max(self.transfer.shots)
        batch_key, context_key, shots_key = jax.random.split(key, 3)
        x, y = _draw_examples(batch_key, tasks, self.batch)
        z = tasks.z
        if self.encoder is not None:
            # Contexts of as few and as many examples as a new task may come with.
            shot_counts = jnp.array(self.transfer.shots)
            num_shots = jax.random.choice(shots_key, shot_counts, (len(tasks.x), 1))
            examples = _draw_examples(context_key, tasks, max_shots)
            z = self._infer(params, *examples, _weigh_first(num_shots, max_shots))
        mse = jnp.mean(jnp.square(self._predict(params, z, x) - y))
        return mse, {'mse': mse}

    def _predict_known(self, params: Params, world: RegressionWorld) -> tuple[Array, Array, Array]:
        """Compute the grid, the predictions and the values of known tasks, [T, POINTS] each."""
        tasks = world.known
        z = tasks.z
        if self.encoder is not None:
            num_shots = min(max(self.transfer.shots), self.settings.examples)
            x, y = tasks.x[:, :num_shots], tasks.y[:, :num_shots]
            z = self._infer(params, x, y, jnp.full_like(x, 1 / num_shots))
        grid = _make_grid(len(tasks.x))
        return grid, self._predict(params, z, grid), compute_values(tasks, grid)

    def evaluate(self, params: Params, world: RegressionWorld, key: PRNGKey) -> dict[str, Metrics]:
        _, predictions, targets = self._predict_known(params, world)
        task_errors = jnp.mean(jnp.square(predictions - targets), -1)
        metrics = {'eval': {'mse': task_errors.mean()}}
        for family_index, family in enumerate(FAMILIES):  # the tasks are of each by turns
            metrics['eval'][f'mse_{family}'] = task_errors[family_index::2].mean()
        if not self.is_one_hot:
            metrics['new'] = self._evaluate_new(params, world, self.init_params(key, world))
        return metrics

    def _evaluate_new(
        self, params: Params, world: RegressionWorld, fresh_params: Params
    ) -> Metrics:
        """Compute errors on new tasks: `mse/K` after K examples of each, and `mse/0` before them.

        Inferred contexts are computed from the K examples, without any learning. Other contexts are
        learned from the K examples by gradient descent, separately for each task, with all other
        parameters fixed. One-hot contexts have no entry for a new task. Its z therefore starts at
        the mean of the known tasks and learns a mixture of their parameters. Descriptors start at
        their given values.

        The fusion 'none' has no context to learn. Instead, all of `fresh_params` are learned from
        the K examples, as in a network that is trained without other tasks.
        """
        # Where the contexts of new tasks start.
        tasks = world.new
        grid = _make_grid(len(tasks.x))
        targets = compute_values(tasks, grid)
        initial_z = tasks.z
        if self.settings.context == 'one_hot':
            num_known = self.settings.tasks
            initial_z = jnp.full((len(tasks.x), num_known), 1 / num_known)

        def compute_error(params: Params, z: Array, x: Array, y: Array) -> Array:
            """Compute the error on one task, with z [m] and x, y [E]."""
            return jnp.mean(jnp.square(self._predict(params, z[None], x[None])[0] - y))

        def learn_and_test(
            K: int, z: Array, x: Array, y: Array, grid: Array, targets: Array
        ) -> Array:
            """Compute the error on one task after learning from its first K examples."""
            x, y = x[:K], y[:K]
            steps = self.transfer.steps
            if self.learns_alone:
                params_alone = transfer.fit(
                    lambda params: compute_error(params, z, x, y),
                    fresh_params,
                    steps,
                    self.learning_rate,
                )
                return compute_error(params_alone, z, grid, targets)
            if self.encoder is not None:
                z = self._infer(params, x[None], y[None], jnp.full((1, K), 1 / K))[0]
            else:
                learning_rate = self.transfer.learning_rate
                z = transfer.fit(lambda z: compute_error(params, z, x, y), z, steps, learning_rate)
            return compute_error(params, z, grid, targets)

        # All new tasks, for each number of examples.
        errors = {
            f'mse/{K}': jax.vmap(functools.partial(learn_and_test, K))(
                initial_z, tasks.x, tasks.y, grid, targets
            )
            for K in self.transfer.shots
        }
        if self.encoder is None and not self.learns_alone:
            initial_error = jax.vmap(compute_error, (None, 0, 0, 0))
            errors['mse/0'] = initial_error(params, initial_z, grid, targets)
        return {metric_name: task_errors.mean() for metric_name, task_errors in errors.items()}

    def costs(self) -> Costs:
        """Count the costs of the network, and of the encoder, if there is one, for one example."""
        x, z = (jax.ShapeDtypeStruct((size,), jnp.float32) for size in (1, self.features))
        model_costs = network.costs(self.model, x, z)
        if self.encoder is not None:
            encoder_costs = network.costs(self.encoder, x, x, x)
            for cost_name, part_costs in model_costs.items():
                part_costs['model'] += encoder_costs[cost_name]['model']
        return model_costs

    def artifacts(self, params: Params, world: RegressionWorld, key: PRNGKey) -> Metrics:
        grid, predictions, targets = self._predict_known(params, world)
        arrays = {'grid': grid, 'predictions': predictions, 'targets': targets}
        arrays |= world.known._asdict()
        return {name: array[:SHOWN] for name, array in arrays.items() if name != 'z'}


def make(config: ml_collections.ConfigDict) -> Regression:
    """Build the problem that a config describes, with `train.batch` examples per task and step.

    Raises:
      UserError: if the fusion needs one-hot contexts, but the contexts are not one-hot.
    """
    settings = Settings(**{field: config.problem[field] for field in Settings._fields})
    context, fusion_name = settings.context, config.model.fusion.name
    is_one_hot = fusion_name in fusion.ONE_HOT
    if is_one_hot and context != 'one_hot':
        raise UserError(
            f"config.problem.context = {context!r}: expected 'one_hot', because "
            f'config.model.fusion.name = {fusion_name!r} needs one-hot contexts'
        )

    # The size of z, which depends on what says which task it is.
    context_sizes = {
        'one_hot': settings.tasks,
        'descriptor': config.problem.descriptor,
        'inferred': config.problem.inferred,
    }
    features = context_sizes[context]
    context_kind: Context = 'one_hot' if context == 'one_hot' else 'dense'
    return Regression(
        examples=settings.tasks * config.train.batch,
        model=network.make(config.model, features=1, context=context_kind),
        encoder=Encoder(features, config.problem.encoder) if context == 'inferred' else None,
        settings=settings,
        transfer=TransferSettings(**config.transfer),
        features=features,
        batch=config.train.batch,
        is_one_hot=is_one_hot,
        learns_alone=fusion_name == 'none',
        learning_rate=config.optim.learning_rate,
    )


def _draw_examples(key: PRNGKey, tasks: Tasks, num_examples: int) -> tuple[Array, Array]:
    """Draw examples x and y [T, count] of every task, with replacement."""
    example_ids = jax.random.randint(key, (len(tasks.x), num_examples), 0, tasks.x.shape[-1])
    return jnp.take_along_axis(tasks.x, example_ids, -1), jnp.take_along_axis(
        tasks.y, example_ids, -1
    )


def _weigh_first(num_weighted: Array, num_examples: int) -> Array:
    """Return equal weights [T, count] for the first `size` [T, 1] examples, and 0 for the rest."""
    return jnp.where(jnp.arange(num_examples)[None] < num_weighted, 1 / num_weighted, 0.0)


def _make_grid(num_tasks: int) -> Array:
    return jnp.broadcast_to(jnp.linspace(-1, 1, POINTS), (num_tasks, POINTS))
