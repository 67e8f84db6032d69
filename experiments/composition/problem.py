"""Modular teachers, which test generalization from seen to unseen combinations of modules.

    teacher     y = A relu(W(c) x),   W(c) = Σ_i c_i Θ_i

A seed draws M modules Θ_i [n, h] and a readout A [h, k], which all tasks share. They are scaled so
that the entries of y have variance 1 for x uniform in [−√3, √3]. A task is a set of one or two
modules, with c_i = 0 for all other modules. The training tasks are all single modules, and the
pairs that `problem.support` selects:

    connected       (i, i + 1), in a ring through all modules
    disconnected    (i, i + 1), in two rings through half of the modules each
    alone           no pairs

The test tasks are all pairs that are in none of the rings, so that they are the same for all three
supports. The coefficients of a pair (`problem.coefficients`) are 'equal', with c of norm 1, or
'drawn' in every step, uniform in [1/2, 1]. The network receives one of two contexts
(`problem.context`):

    given     z = √M c, which scales typical entries to 1
    learned   z is a vector of parameters for each training task, so that only the identity of the
              task is given. The z of a test task starts at the mean of these vectors and is learned
              by gradient descent from examples, with all other parameters fixed.

Errors are the fraction of unexplained variance, Σ(y − ŷ)² / Σ(y − ȳ)², where the sums are over
examples and outputs, and ȳ is the mean of a task.

Shapes: T tasks, E examples of each; x [T, E, n], c [T, M], z [T, m], y [T, E, k].

Source: Schug et al., Discovering Modular Solutions That Generalize Compositionally, ICLR 2024, for
the linear hypernetwork as a teacher, for students with twice its hidden units and context features,
for rings of pairs as connected or disconnected supports, and for contexts inferred by gradient
descent. They infer contexts in an inner loop of training. Vectors of parameters, the sets of test
modules and the constants are ours.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from chex import Array, PRNGKey

from mi import fusion
from mi.config import Rule, UserError, choice, integer
from mi.fit import network, transfer
from mi.fit.problem import Costs, Metrics, Params, Problem, World

SUPPORTS = ('connected', 'disconnected', 'alone')

SCHEMA: dict[str, Rule] = {
    'problem.modules': integer(6),
    'problem.inputs': integer(1),
    'problem.hidden': integer(1),
    'problem.outputs': integer(1),
    'problem.support': choice(SUPPORTS),
    'problem.coefficients': choice(['equal', 'drawn']),
    'problem.context': choice(['given', 'learned']),
    'problem.contexts': integer(1),
    'problem.examples': integer(2),
    'transfer.examples': integer(1),
    **transfer.SCHEMA,
    **network.SCHEMA,
}


class Teacher(NamedTuple):
    """A teacher with modules Θ [M, n, h] and a readout A [h, k]."""

    modules: Array
    readout: Array


def make_ring(modules: range) -> set[frozenset[int]]:
    """Pair each module with the next one, and the last with the first."""
    return {frozenset(pair) for pair in itertools.pairwise([*modules, modules[0]])}


def make_module_sets(modules: int, support: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the module sets of training tasks [T, M] and test tasks [T', M], as 0 and 1."""
    all_modules, half = range(modules), modules // 2
    trained_pairs: dict[str, set[frozenset[int]]] = {
        'connected': make_ring(all_modules),
        'disconnected': make_ring(all_modules[:half]) | make_ring(all_modules[half:]),
        'alone': set(),
    }
    singletons = {frozenset([module]) for module in all_modules}
    unseen_pairs = set(map(frozenset, itertools.combinations(all_modules, 2)))
    unseen_pairs -= trained_pairs['connected'] | trained_pairs['disconnected']

    def encode(module_sets: set[frozenset[int]]) -> np.ndarray:
        ordered_sets = sorted(module_sets, key=sorted)
        members = [[module in subset for module in all_modules] for subset in ordered_sets]
        return np.array(members, float)

    return encode(singletons | trained_pairs[support]), encode(unseen_pairs)


def compute_outputs(teacher: Teacher, c: Array, x: Array) -> Array:
    """Compute y [T, E, k] for coefficients c [T, M] and inputs x [T, E, n]."""
    W = jnp.einsum('tm,mnh->tnh', c, teacher.modules)
    y: Array = jax.nn.relu(jnp.einsum('ten,tnh->teh', x, W)) @ teacher.readout
    return y


def compute_unexplained(y: Array, prediction: Array) -> Array:
    """Compute the fraction of the variance of y [T, E, k] within tasks that is not explained."""
    within = y - y.mean(1, keepdims=True)
    return jnp.sum(jnp.square(y - prediction)) / jnp.sum(jnp.square(within))


@dataclasses.dataclass(frozen=True)
class Composition(Problem):
    """The problem of learning the tasks of a teacher, which each seed draws.

    Attributes:
      model: module (x, z) → y.
      teacher_shape: (M, n, h, k).
      trained, tested: module sets of training tasks [T, M] and test tasks [T', M], as 0 and 1.
      is_learned: whether the contexts are parameters, one vector for each training task.
      contexts: number of context features m.
      draws_coefficients: whether the coefficients are drawn instead of equal.
      batch: number of examples of each task in a step.
      eval_examples: number of examples of each task in an evaluation.
      transfer_examples: number of examples from which the context of a test task is learned.
      transfer_steps, transfer_rate: number of Adam steps for such a context, and their learning
        rate.
    """

    model: network.FusedMLP
    teacher_shape: tuple[int, int, int, int]
    trained: Array
    tested: Array
    is_learned: bool
    contexts: int
    draws_coefficients: bool
    batch: int
    eval_examples: int
    transfer_examples: int
    transfer_steps: int
    transfer_rate: float

    def draw_world(self, key: PRNGKey) -> Teacher:
        M, n, h, k = self.teacher_shape
        modules_key, readout_key = jax.random.split(key)
        modules = jax.random.normal(modules_key, (M, n, h)) / math.sqrt(n)
        return Teacher(modules, jax.random.normal(readout_key, (h, k)) * math.sqrt(2 / h))

    def draw_examples(
        self, teacher: Teacher, key: PRNGKey, sets: Array, num_examples: int
    ) -> tuple[Array, Array, Array]:
        """Draw c, and `num_examples` inputs x and outputs y, for each set of modules."""
        c_key, x_key = jax.random.split(key)
        if self.draws_coefficients:
            c = sets * jax.random.uniform(c_key, sets.shape, minval=0.5)
        else:
            c = sets / jnp.linalg.norm(sets, axis=-1, keepdims=True)
        shape = len(sets), num_examples, self.teacher_shape[1]
        x = jax.random.uniform(x_key, shape, minval=-1) * math.sqrt(3)
        return c, x, compute_outputs(teacher, c, x)

    def init_params(self, key: PRNGKey, world: World) -> Params:
        network_key, contexts_key = jax.random.split(key)
        x, z = jnp.zeros(self.teacher_shape[1]), jnp.zeros(self.contexts)
        params = {'network': self.model.init(network_key, x, z)['params']}
        if self.is_learned:
            shape = len(self.trained), self.contexts
            params['contexts'] = jax.random.normal(contexts_key, shape)
        return params

    def _given_context(self, c: Array) -> Array:
        """Compute the given context, z = √M c."""
        return math.sqrt(self.teacher_shape[0]) * c

    def _predict(self, params: Params, z: Array, x: Array) -> Array:
        prediction: Array = self.model.apply({'params': params['network']}, x, z[:, None])
        return prediction

    def loss(self, params: Params, world: Teacher, key: PRNGKey) -> tuple[Array, Metrics]:
        c, x, y = self.draw_examples(world, key, self.trained, self.batch)
        z = params['contexts'] if self.is_learned else self._given_context(c)
        prediction = self._predict(params, z, x)
        mse = jnp.mean(jnp.square(prediction - y))
        return mse, {'mse': mse, 'error': compute_unexplained(y, prediction)}

    def evaluate(self, params: Params, world: Teacher, key: PRNGKey) -> dict[str, Metrics]:
        # Tasks that were trained.
        c, x, y = self.draw_examples(world, key, self.trained, self.eval_examples)
        z = params['contexts'] if self.is_learned else self._given_context(c)
        seen_error = compute_unexplained(y, self._predict(params, z, x))

        # Combinations that were not.
        test_key, transfer_key = jax.random.split(key)
        c, x, y = self.draw_examples(world, test_key, self.tested, self.eval_examples)
        z = self._given_context(c)
        if self.is_learned:
            z = self._learn_contexts(params, world, transfer_key)
        unseen_error = compute_unexplained(y, self._predict(params, z, x))
        return {'seen': {'error': seen_error}, 'unseen': {'error': unseen_error}}

    def _learn_contexts(self, params: Params, world: Teacher, key: PRNGKey) -> Array:
        """Learn the contexts of the test tasks from examples, by gradient descent."""
        _, x, y = self.draw_examples(world, key, self.tested, self.transfer_examples)

        def total_loss(z: Array) -> Array:  # a sum, so that every task is learned by itself
            return jnp.sum(jnp.mean(jnp.square(self._predict(params, z, x) - y), (1, 2)))

        mean_context = params['contexts'].mean(0)
        contexts = jnp.broadcast_to(mean_context, (len(self.tested), self.contexts))
        return transfer.fit(total_loss, contexts, self.transfer_steps, self.transfer_rate)

    def costs(self) -> Costs:
        sizes = self.teacher_shape[1], self.contexts
        vectors = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in sizes]
        return network.costs(self.model, *vectors)

    def model_params(self, params: Params) -> Params:
        return params['network']


def make(config: ml_collections.ConfigDict) -> Composition:
    """Build the problem that a config describes, with `train.batch` examples per task and step.

    Raises:
      UserError: if the number of modules is odd, if contexts are learned for drawn coefficients, or
        if the fusion needs a one-hot context.
    """
    _check_config(config)
    problem = config.problem
    module_sets = make_module_sets(problem.modules, problem.support)
    trained, tested = map(jnp.asarray, module_sets)
    is_learned = problem.context == 'learned'
    return Composition(
        examples=len(trained) * config.train.batch,
        model=network.make(config.model, features=problem.outputs, context='dense'),
        teacher_shape=(problem.modules, problem.inputs, problem.hidden, problem.outputs),
        trained=trained,
        tested=tested,
        is_learned=is_learned,
        contexts=problem.contexts if is_learned else problem.modules,
        draws_coefficients=problem.coefficients == 'drawn',
        batch=config.train.batch,
        eval_examples=problem.examples,
        transfer_examples=config.transfer.examples,
        transfer_steps=config.transfer.steps,
        transfer_rate=config.transfer.learning_rate,
    )


def _check_config(config: ml_collections.ConfigDict) -> None:
    problem, fusion_name = config.problem, config.model.fusion.name
    if problem.modules % 2:
        raise UserError(
            f'config.problem.modules = {problem.modules}: expected an even number of modules, '
            f'because two rings divide them'
        )
    if problem.context == 'learned' and problem.coefficients != 'equal':
        raise UserError(
            f"config.problem.coefficients = {problem.coefficients!r}: expected 'equal', because "
            f"config.problem.context = 'learned' has one context for each task. Try 'equal', or "
            f"config.problem.context = 'given'"
        )
    if fusion_name in fusion.ONE_HOT:
        raise UserError(
            f'config.model.fusion.name = {fusion_name!r}: expected a fusion for dense contexts, '
            f"but this fusion needs one-hot contexts. Try 'mi'"
        )
