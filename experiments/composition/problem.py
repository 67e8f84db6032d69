"""Modular teachers: does a network that has seen some combinations of modules know the others?

    teacher     y = A relu(W(c) x),   W(c) = Σ_i c_i Θ_i

A seed draws M modules Θ_i [n, h] and a readout A [h, k], the same for all tasks, so that the
entries of y have variance 1 for x uniform in [−√3, √3]. A task is a set of modules, one or two of
them, with c_i = 0 for the others. Training has every module alone, and of pairs, by
`problem.support`,

    connected       (i, i + 1), in a ring through all modules
    disconnected    the same in two rings, each through half of the modules
    alone           none

and what is tested are the pairs that are in neither of the rings, the same for all three. The
coefficients of a pair are, by `problem.coefficients`, 'equal', with c of norm 1, or 'drawn' anew in
every step, uniform in [1/2, 1]. What the network knows of the task, `problem.context`:

    given     z = √M c, so that entries of size 1 are usual
    learned   nothing but its number: z is a row of parameters for each task that is trained. The z
              of another is learnt by gradient from examples of it, everything else as it was, from
              the mean of the rows.

Errors are Σ(y − ŷ)² / Σ(y − ȳ)² over examples and outputs, ȳ the mean of a task: the part of the
variance that is not explained.

Shapes: T tasks, E examples of each; x [T, E, n], c [T, M], z [T, m], y [T, E, k].

Source: Schug et al., Discovering Modular Solutions That Generalize Compositionally, ICLR 2024: a
linear hypernetwork as the teacher, students of twice its size in hidden units and contexts, rings
of pairs as the supports that are connected or not, and contexts that are inferred by gradient. They
do so in an inner loop of training; rows of parameters, the sets of modules that are tested and the
constants are ours.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array

from mi import fusion
from mi.config import Rule, UserError, choice, integer
from mi.fit import network, transfer
from mi.fit.problem import Metrics, Problem

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
    """Modules [M, n, h] and readout [h, k]."""

    modules: Array
    readout: Array


def ring(modules: range) -> set[frozenset[int]]:
    """Each with the next one, the last with the first."""
    return {frozenset((a, b)) for a, b in itertools.pairwise([*modules, modules[0]])}


def tasks(modules: int, support: str) -> tuple[np.ndarray, np.ndarray]:
    """Which modules there are in the tasks that are trained, and in those that are tested.

    Returns:
      [T, M] and [T', M] of zeros and ones.
    """
    everything, half = range(modules), modules // 2
    pairs: dict[str, set[frozenset[int]]] = {
        'connected': ring(everything),
        'disconnected': ring(everything[:half]) | ring(everything[half:]),
        'alone': set(),
    }
    singles = {frozenset([i]) for i in everything}
    unseen = set(map(frozenset, itertools.combinations(everything, 2)))
    unseen -= pairs['connected'] | pairs['disconnected']

    def rows(sets: set[frozenset[int]]) -> np.ndarray:
        return np.array([[float(i in of) for i in everything] for of in sorted(sets, key=sorted)])

    return rows(singles | pairs[support]), rows(unseen)


def outputs(teacher: Teacher, c: Array, x: Array) -> Array:
    """y of every task."""
    W = jnp.einsum('tm,mnh->tnh', c, teacher.modules)
    y: Array = jax.nn.relu(jnp.einsum('ten,tnh->teh', x, W)) @ teacher.readout
    return y


def unexplained(y: Array, found: Array) -> Array:
    """Of y [T, E, k], the part of the variance within tasks that is not in what was found."""
    within = y - y.mean(1, keepdims=True)
    return jnp.sum(jnp.square(y - found)) / jnp.sum(jnp.square(within))


def make(config: ml_collections.ConfigDict) -> Problem:
    """The problem of a config; `train.batch` examples of every task are in a step.

    Raises:
      UserError: if the modules are odd in number, or what is to be learnt has no fixed task.
    """
    of = config.problem
    M, n, h, k = of.modules, of.inputs, of.hidden, of.outputs
    _refuse(config)
    trained, tested = map(jnp.asarray, tasks(M, of.support))
    learns = of.context == 'learned'
    m = of.contexts if learns else M
    model = network.make(config.model, features=k, context='dense')

    def world(key: Array) -> Teacher:
        of_modules, of_readout = jax.random.split(key)
        modules = jax.random.normal(of_modules, (M, n, h)) / math.sqrt(n)
        return Teacher(modules, jax.random.normal(of_readout, (h, k)) * math.sqrt(2 / h))

    def coefficients(key: Array, sets: Array) -> Array:
        if of.coefficients == 'drawn':
            return sets * jax.random.uniform(key, sets.shape, minval=0.5)
        return sets / jnp.linalg.norm(sets, axis=-1, keepdims=True)

    def examples(teacher: Teacher, key: Array, sets: Array, count: int) -> tuple[Array, ...]:
        of_c, of_x = jax.random.split(key)
        c = coefficients(of_c, sets)
        x = jax.random.uniform(of_x, (len(sets), count, n), minval=-1) * math.sqrt(3)
        return c, x, outputs(teacher, c, x)

    def predict(params: Any, z: Array, x: Array) -> Any:
        return model.apply({'params': params['network']}, x, z[:, None])

    def init(key: Array, world: Any) -> Any:
        of_network, of_contexts = jax.random.split(key)
        params = {'network': model.init(of_network, jnp.zeros(n), jnp.zeros(m))['params']}
        if learns:
            params['contexts'] = jax.random.normal(of_contexts, (len(trained), m))
        return params

    def loss(params: Any, world: Teacher, key: Array) -> tuple[Array, Metrics]:
        c, x, y = examples(world, key, trained, config.train.batch)
        found = predict(params, params['contexts'] if learns else math.sqrt(M) * c, x)
        mse = jnp.mean(jnp.square(found - y))
        return mse, {'mse': mse, 'error': unexplained(y, found)}

    def seen(params: Any, world: Teacher, key: Array) -> Metrics:
        c, x, y = examples(world, key, trained, of.examples)
        z = params['contexts'] if learns else math.sqrt(M) * c
        return {'error': unexplained(y, predict(params, z, x))}

    def inferred(params: Any, world: Teacher, key: Array) -> Array:
        """Contexts of the tasks that are tested."""
        _, x, y = examples(world, key, tested, config.transfer.examples)

        def of_all(z: Array) -> Array:  # a sum, so that every task is learnt by itself
            return jnp.sum(jnp.mean(jnp.square(predict(params, z, x) - y), (1, 2)))

        z = jnp.broadcast_to(params['contexts'].mean(0), (len(tested), m))
        return transfer.fitted(of_all, z, config.transfer.steps, config.transfer.learning_rate)

    def unseen(params: Any, world: Teacher, key: Array) -> Metrics:
        of_test, of_inferred = jax.random.split(key)
        c, x, y = examples(world, of_test, tested, of.examples)
        z = inferred(params, world, of_inferred) if learns else math.sqrt(M) * c
        return {'error': unexplained(y, predict(params, z, x))}

    one, context = (jax.ShapeDtypeStruct((size,), jnp.float32) for size in (n, m))
    return Problem(
        world=world,
        init=init,
        loss=loss,
        evaluations={'seen': seen, 'unseen': unseen},
        costs=lambda: network.costs(model, one, context),
        examples=len(trained) * config.train.batch,
        model=lambda params: params['network'],
    )


def _refuse(config: ml_collections.ConfigDict) -> None:
    of, name = config.problem, config.model.fusion.name
    if of.modules % 2:
        raise UserError(
            f'config.problem.modules = {of.modules}: expected an even number, for two rings'
        )
    if of.context == 'learned' and of.coefficients != 'equal':
        raise UserError(
            f"config.problem.coefficients = {of.coefficients!r}: expected 'equal' where "
            f"config.problem.context = 'learned', a row for each task"
        )
    if name in fusion.ONE_HOT:
        raise UserError(
            f'config.model.fusion.name = {name!r} is for contexts that are one-hot, and a '
            f'combination is none; give another fusion'
        )
