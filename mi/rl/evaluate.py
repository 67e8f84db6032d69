"""How well a policy does each task: whole episodes, greedy or sampled."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array

from mi.rl import envs
from mi.rl.actor import act, start
from mi.rl.envs.spec import HostEnvironment, JaxEnvironment, Spec
from mi.rl.networks import Agent, Inputs
from mi.rl.worker import Policy


@functools.partial(jax.jit, static_argnums=(0, 1, 4, 5))
def episodes(
    environment: JaxEnvironment,
    agent: Agent,
    params: Any,
    key: Array,
    each: int,
    greedy: bool,
) -> tuple[Array, Array, Array]:
    """Return, success and length of `each` episodes of every task, [tasks, each].

    All start together and each row plays one; the program runs for the longest there can be.
    """
    tasks = len(environment.spec.tasks)
    state = start(environment, agent, tasks * each, key)  # row i has task i % tasks

    def step(carried: Any, _: None) -> tuple[Any, None]:
        state, alive, returned, success, length = carried
        own, of_actions = jax.random.split(state.key)
        carry, action, _log_prob = act(agent, params, state.carry, state.inputs, of_actions, greedy)
        environments, after = jax.vmap(environment.step)(state.environment, action)
        returned = returned + jnp.where(alive, after.reward, 0)
        success = success | (alive & after.success)
        length = length + alive
        alive = alive & (after.discount != 0)
        inputs = Inputs(after.observation, action, after.reward, after.is_first)
        state = state._replace(environment=environments, inputs=inputs, carry=carry, key=own)
        return (state, alive, returned, success, length), None

    rows = tasks * each
    fresh = jnp.ones(rows, bool), jnp.zeros(rows), jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32)
    (_, _, returned, success, length), _ = jax.lax.scan(
        step, (state, *fresh), None, environment.spec.episode
    )
    by_task = [a.reshape(each, tasks).T for a in (returned, success, length)]
    return by_task[0], by_task[1], by_task[2]


def play(
    pool: HostEnvironment, policy: Policy, params: Any, key: Array, each: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Return, success and length of at least `each` episodes of every task, by task.

    Every row of a task plays the same number of episodes, however long they are, so that short ones
    are not preferred.
    """
    tasks, B = len(pool.spec.tasks), pool.batch
    step, acting, action = pool.reset(), policy.start(B, key), jnp.zeros(B, jnp.int32)
    returned, length, played = np.zeros(B), np.zeros(B, np.int64), np.zeros(B, np.int64)
    ended: list[list[tuple[float, bool, int]]] = [[] for _ in range(tasks)]
    of_row = np.asarray(step.observation['task'])
    quota = -(-each // np.bincount(of_row, minlength=tasks)[of_row])  # rows of a task share it
    while (played < quota).any():
        row: Any = step.observation, action, step.reward, step.is_first
        acting, action, _ = policy(params, acting, Inputs(*row))
        task, ignored = step.observation['task'], step.is_last
        pool.send(np.asarray(action))
        step = pool.recv()
        returned, length = returned + step.reward, length + 1
        over = ~ignored & (step.is_last | (step.discount == 0))
        for i in np.flatnonzero(over & (played < quota)):
            ended[task[i]].append((returned[i], bool(step.success[i]), length[i]))
        played += over
        returned[over | ignored], length[over | ignored] = 0, 0
    returns, successes, lengths = (
        [np.array([row[i] for row in rows]) for rows in ended] for i in range(3)
    )
    return returns, successes, lengths


def summary(
    spec: Spec, returned: Sequence[np.ndarray], success: Sequence[np.ndarray], length: Any
) -> dict[str, float]:
    """Means over tasks, and of scores where the spec says what random and best are.

    The normalised score of a task is (s − random) / (reference − random), of which the capped one
    is at most 1. `stderr/…` is the standard error of a task's mean return, `episodes_per_task` how
    many were played of the task that has fewest.

    Args:
      spec: of the environment.
      returned, success, length: of the episodes of each task.
    """
    by_task = np.array([values.mean() for values in returned])
    won = np.array([values.mean() for values in success])
    result = {
        'return': float(by_task.mean()),
        'success': float(won.mean()),
        'length': float(np.mean([values.mean() for values in length])),
        'episodes_per_task': min(len(values) for values in returned),
    }
    for i, name in enumerate(spec.tasks):
        result[f'return/{name}'], result[f'success/{name}'] = float(by_task[i]), float(won[i])
        if len(returned[i]) > 1:
            error = np.std(returned[i], ddof=1) / np.sqrt(len(returned[i]))
            result[f'stderr/{name}'] = float(error)
    if spec.random is not None and spec.reference is not None:
        low, high = np.asarray(spec.random), np.asarray(spec.reference)
        capped = np.minimum(1, (by_task - low) / (high - low))
        result['capped_mean'] = float(capped.mean())
        result['capped_median'] = float(np.median(capped))
    return result


class Evaluation:
    """Episodes of one environment, with rows of its own."""

    def __init__(self, name: str, config: ml_collections.ConfigDict):
        self._config = config
        self._compiled = None if envs.on_host(name) else envs.make(name)
        self._pool = envs.pool(name, config.actors.batch, config.seeds[0])
        self._policy = functools.lru_cache(Policy)  # compiled once, not at every evaluation
        self.spec = self._pool.spec

    def __enter__(self) -> 'Evaluation':
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.close()

    def __call__(
        self, agent: Agent, params: Any, step: int, seed: int
    ) -> dict[str, dict[str, float]]:
        """What is measured, for the policy '' and for '_greedy' if it is asked for.

        Args:
          agent, params: of one seed.
          step: how many updates they have had.
          seed: of the run's; it and the step decide what is drawn.
        """
        config, measured = self._config, {}
        key = jax.random.fold_in(jax.random.key(seed), step)
        for greedy in (False, True) if config.eval.greedy else (False,):
            each = config.eval.episodes
            if self._compiled is None:
                policy = self._policy(agent, greedy)
                played: Any = play(self._pool, policy, params, key, each)
            else:
                played = jax.device_get(episodes(self._compiled, agent, params, key, each, greedy))
            measured['_greedy' if greedy else ''] = {
                'env_steps': step * config.train.batch * config.train.length,
                **summary(self.spec, *played),
            }
        return measured
