"""How well a policy does each task: whole episodes, greedy or sampled."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array

from mi.rl import envs, factory
from mi.rl.actors.worker import Policy
from mi.rl.agent import Agent, Inputs
from mi.rl.envs import auto_reset
from mi.rl.envs.spec import JaxEnvironment, Spec
from mi.rl.episode_metrics import Record
from mi.rl.fused.rollout import act, init_actor_state
from mi.rl.play import Limits, StoppedError, Watched, never, play
from mi.rows import get_row_indices
from mi.training import sharding


class Played(NamedTuple):
    """Return, success and length of the episodes of one seed: an array for each task."""

    returned: list[np.ndarray]
    success: list[np.ndarray]
    length: list[np.ndarray]


def evaluation_keys(seeds: Sequence[int], step: int) -> np.ndarray:
    """Return what an evaluation's random keys are made of, [S, 2] int32: each seed and the step."""
    return np.array([[seed, step] for seed in seeds], np.int32)


def episodes(
    environment: JaxEnvironment,
    agent: Agent,
    params: Any,
    keys: np.ndarray,
    each: int,
    greedy: bool,
    mesh: jax.sharding.Mesh,
) -> list[Played]:
    """Return what each seed reaches in `each` episodes of every task; the devices share them.

    Args:
      environment: a JAX environment.
      agent: the agent.
      params: its parameters, [S, …].
      keys: of `evaluation_keys`.
      each: how many episodes.
      greedy: whether the likeliest actions are taken, not drawn ones.
      mesh: of devices.

    Raises:
      UserError: if an episode has more steps than the spec says.
    """
    program = episodes_program(environment, agent, each, greedy, mesh)  # type: ignore[arg-type]
    placed_keys = sharding.shard_array(keys, sharding.seed_sharding(mesh))
    returned, success, length = sharding.to_host(program(params, placed_keys))
    auto_reset.check_length(environment.spec, int(length.max()) - 1)

    # Row i of a seed has an episode of task i % tasks; rows that fill up the devices come last.
    tasks = len(environment.spec.tasks)
    by_task = [
        a[:, : tasks * each].reshape(-1, each, tasks).swapaxes(1, 2)
        for a in (returned, success, length)
    ]
    return [Played(*(list(a[i]) for a in by_task)) for i in range(len(keys))]


def compile_episodes(
    environment: JaxEnvironment, agent: Agent, params: Any, each: int, mesh: jax.sharding.Mesh
) -> jax.stages.Compiled:
    """Compile the program that `episodes` calls, with drawn actions.

    Args:
      environment, agent, each, mesh: as in `episodes`.
      params: shapes of the parameters of all seeds, placed on the mesh.
    """
    seeds = jax.tree.leaves(params)[0].shape[0]
    keys = jax.ShapeDtypeStruct((seeds, 2), jnp.int32, sharding=sharding.seed_sharding(mesh))
    program = episodes_program(environment, agent, each, False, mesh)  # type: ignore[arg-type]
    compiled: jax.stages.Compiled = program.lower(params, keys).compile()
    return compiled


@functools.cache
def episodes_program(
    environment: JaxEnvironment, agent: Agent, each: int, greedy: bool, mesh: jax.sharding.Mesh
) -> Any:
    """Return the program (params, keys) → return, success and length of each row, [S, rows].

    No device waits for another: each ends when the longest episode of its rows has.
    """
    rows = len(environment.spec.tasks) * each
    shards = mesh.size // mesh.shape['seed']
    device_rows = -(-rows // shards)

    def one_seed(params: Any, key: Array) -> tuple[Array, Array, Array]:
        random_key = jax.random.fold_in(jax.random.key(key[0]), key[1])
        plays = get_row_indices(device_rows) < rows
        return _play_rows(environment, agent, params, random_key, plays, greedy)

    by_seed, by_rows = (
        sharding.seed_sharding(mesh).spec,
        sharding.batch_sharding(mesh, 1, True).spec,
    )
    return jax.jit(
        jax.shard_map(
            sharding.map_seeds(one_seed, mesh),
            mesh=mesh,
            in_specs=(by_seed, by_seed),
            out_specs=by_rows,
            check_vma=False,
        )
    )


def _play_rows(
    environment: JaxEnvironment,
    agent: Agent,
    params: Any,
    key: Array,
    plays: Array,
    greedy: bool,
) -> tuple[Array, Array, Array]:
    """Return return, success and length of one episode in each row that plays, [rows].

    The program ends one step after the most steps of an episode, so that one that is longer shows.
    """
    rows = len(plays)
    state = init_actor_state(environment, agent, rows, key)
    env_step = jax.vmap(functools.partial(auto_reset.step, environment))

    def continues(carried: Any) -> Array:
        _, alive, _, _, length = carried
        return alive.any() & (length.max() <= environment.spec.episode)

    def step(carried: Any) -> Any:
        state, alive, returned, success, length = carried
        key, action_key = jax.random.split(state.key)
        carry, action, _log_prob = act(agent, params, state.carry, state.inputs, action_key, greedy)
        environments, after = env_step(state.environment, action)
        returned = returned + jnp.where(alive, after.reward, 0)
        success = success | (alive & after.success)
        length = length + alive
        alive = alive & ~(after.is_last | (after.discount == 0))
        inputs = Inputs(after.observation, action, after.reward, after.is_first)
        state = state._replace(environment=environments, inputs=inputs, carry=carry, key=key)
        return state, alive, returned, success, length

    fresh = plays, jnp.zeros(rows), jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32)
    _, _, returned, success, length = jax.lax.while_loop(continues, step, (state, *fresh))
    return returned, success, length


def summary(
    spec: Spec, returned: Sequence[np.ndarray], success: Sequence[np.ndarray], length: Any
) -> Record:
    """Means over tasks, and of scores where the spec says what random and best are.

    Success is None where the environment has no notion of it.

    The normalized score of a task is (s − random) / (reference − random), of which the capped one
    is at most 1. `stderr/…` is the standard error of a task's mean return, `episodes_per_task` how
    many were played of the task that has fewest.

    Args:
      spec: of the environment.
      returned, success, length: of the episodes of each task.
    """
    by_task = np.array([values.mean() for values in returned])
    won = np.array([values.mean() for values in success])
    result: Record = {
        'return': float(by_task.mean()),
        'success': float(won.mean()) if spec.has_success else None,
        'length': float(np.mean([values.mean() for values in length])),
        'episodes_per_task': min(len(values) for values in returned),
    }
    for i, name in enumerate(spec.tasks):
        result[f'return/{name}'] = float(by_task[i])
        result[f'success/{name}'] = float(won[i]) if spec.has_success else None
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
    """Episodes of one environment, with rows of its own.

    Args:
      config: of the run.
      key: of the config, that names the environment: 'env.name' or 'eval.held_out'.
    """

    def __init__(self, config: ml_collections.ConfigDict, key: str = 'env.name'):
        self._config = config
        name, options = factory.get_environment_args(config, key)
        self._compiled = None if envs.is_on_host(name) else envs.make(name, options, key)
        rows = config.actors.batch
        if self._compiled is None:
            each = config.eval.episodes
            rows = config.eval.batch or envs.count_evaluation_rows(name, rows, each, key)
        self._pool = Watched(
            envs.pool(name, rows, config.seeds[0], options, key),
            config.actors.timeout,
            'config.actors.timeout',
        )
        self._policy = functools.lru_cache(Policy)  # compiled once, not at every evaluation
        self.spec = self._pool.spec

    def __enter__(self) -> 'Evaluation':
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.close()

    def __call__(
        self,
        agent: Agent,
        params: Any,
        step: int,
        seed: int,
        stops: Callable[[], bool] = never,
    ) -> dict[str, Record]:
        """Return what is measured, for the policy '' and for '_greedy' if it is asked for.

        Args:
          agent, params: of one seed.
          step: how many updates they have had.
          seed: of the run's; it and the step decide what is drawn.
          stops: whether the run is to end.

        Raises:
          StoppedError: if the run is to end before the evaluation is over.
        """
        config, measured = self._config, {}
        key = jax.random.fold_in(jax.random.key(seed), step)
        for greedy in (False, True) if config.eval.greedy else (False,):
            if stops():
                raise StoppedError
            if self._compiled is None:
                record = self._play(self._policy(agent, greedy), params, key, stops)
            else:
                record = self._play_compiled(self._compiled, agent, params, step, seed, greedy)
            measured['_greedy' if greedy else ''] = record
        return measured

    def _play_compiled(
        self,
        environment: JaxEnvironment,
        agent: Agent,
        params: Any,
        step: int,
        seed: int,
        greedy: bool,
    ) -> Record:
        """Play on all devices of this process."""
        each = self._config.eval.episodes
        devices = jax.local_devices()
        mesh = sharding.make_mesh(1, len(devices), devices=devices)
        one_seed = jax.tree.map(lambda a: np.asarray(a)[None], params)
        one_seed = jax.device_put(one_seed, sharding.seed_sharding(mesh))
        keys = evaluation_keys([seed], step)
        (played,) = episodes(environment, agent, one_seed, keys, each, greedy, mesh)
        return summary(self.spec, *played)

    def _play(self, policy: Policy, params: Any, key: Array, stops: Callable[[], bool]) -> Record:
        limits = Limits(self._config.eval.steps, self._config.eval.seconds)
        self._pool.stops = stops
        played = play(self._pool, policy, params, key, self._config.eval.episodes, limits, stops)
        if played.cut:
            print(
                f'evaluation of {self.spec.name}: {played.cut} episodes were cut and count as they '
                f'are, after config.eval.steps = {limits.steps} steps or, all together, '
                f'config.eval.seconds = {limits.seconds:g}',
                file=sys.stderr,
            )
        return {
            **summary(self.spec, played.returned, played.success, played.length),
            'cut': played.cut,
            'steps_needed': played.steps_needed,
            'steps_taken': played.steps_taken,
        }
