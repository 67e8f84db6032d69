"""Evaluation: the scores of a policy on whole episodes of each task, greedy or sampled.

Environments in JAX are played by one compiled program for all seeds, others on the host.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array

from mi.rl import envs, factory
from mi.rl.actors.worker import Policy
from mi.rl.agent import Agent, Inputs, Params
from mi.rl.envs import auto_reset
from mi.rl.envs.spec import JaxEnvironment, Spec
from mi.rl.episode_metrics import Record
from mi.rl.fused.rollout import act, init_actor_state
from mi.rl.play import Limits, StoppedError, Watched, never, play
from mi.rows import get_row_indices
from mi.training import logger, progress, run_dir, sharding


class EpisodeArrays(NamedTuple):
    """Returns, successes and lengths of one seed's episodes, one array per task."""

    returns: list[np.ndarray]
    success: list[np.ndarray]
    length: list[np.ndarray]


def make_evaluation_keys(seeds: Sequence[int], step: int) -> np.ndarray:
    """Return the seed and the step for each seed, [S, 2] int32: data of the random keys."""
    return np.array([[seed, step] for seed in seeds], np.int32)


# Seven parameters: the five static ones key the cache of `make_program`, and the caller varies
# `params` and `keys` alone.
def play_episodes(  # noqa: PLR0913
    environment: JaxEnvironment,
    agent: Agent,
    params: Params,
    keys: np.ndarray,
    num_episodes: int,
    greedy: bool,
    mesh: jax.sharding.Mesh,
) -> list[EpisodeArrays]:
    """Play episodes of every task for each seed, divided over the devices.

    Args:
      environment: a JAX environment.
      agent: the agent.
      params: its parameters, [S, …].
      keys: random keys from `make_evaluation_keys`.
      num_episodes: number for each task.
      greedy: whether to take the most likely action instead of sampling.
      mesh: mesh of devices.

    Raises:
      UserError: if an episode is longer than the spec allows.
    """
    program = make_program(environment, agent, num_episodes, greedy, mesh)  # type: ignore[arg-type]
    placed_keys = sharding.shard_array(keys, sharding.seed_sharding(mesh))
    returns, success, length = sharding.to_host(program(params, placed_keys))
    auto_reset.check_length(environment.spec, int(length.max()) - 1)

    # Row i of a seed has an episode of task i % num_tasks; rows that pad the devices come last.
    num_tasks = len(environment.spec.tasks)
    by_task = [
        a[:, : num_tasks * num_episodes].reshape(-1, num_episodes, num_tasks).swapaxes(1, 2)
        for a in (returns, success, length)
    ]
    return [EpisodeArrays(*(list(a[i]) for a in by_task)) for i in range(len(keys))]


def compile_episodes(
    environment: JaxEnvironment,
    agent: Agent,
    params: Params,
    num_episodes: int,
    mesh: jax.sharding.Mesh,
) -> jax.stages.Compiled:
    """Compile the program that `play_episodes` calls, with sampled actions.

    Args:
      environment, agent, num_episodes, mesh: as in `play_episodes`.
      params: shapes of the parameters of all seeds, placed on the mesh.
    """
    seeds = jax.tree.leaves(params)[0].shape[0]
    keys = jax.ShapeDtypeStruct((seeds, 2), jnp.int32, sharding=sharding.seed_sharding(mesh))
    program = make_program(environment, agent, num_episodes, False, mesh)  # type: ignore[arg-type]
    compiled: jax.stages.Compiled = program.lower(params, keys).compile()
    return compiled


@functools.cache
def make_program(
    environment: JaxEnvironment,
    agent: Agent,
    num_episodes: int,
    greedy: bool,
    mesh: jax.sharding.Mesh,
) -> Any:
    """Return the program (params, keys) → return, success and length of each row, [S, rows].

    The devices do not communicate: each ends with the longest episode of its rows.
    """
    rows = len(environment.spec.tasks) * num_episodes
    shards = mesh.size // mesh.shape['seed']
    device_rows = -(-rows // shards)

    def play_seed(params: Params, key: Array) -> tuple[Array, Array, Array]:
        random_key = jax.random.fold_in(jax.random.key(key[0]), key[1])
        is_played = get_row_indices(device_rows) < rows
        return _play_rows(environment, agent, params, random_key, is_played, greedy)

    by_seed, by_rows = (
        sharding.seed_sharding(mesh).spec,
        sharding.batch_sharding(mesh, 1, True).spec,
    )
    return jax.jit(
        jax.shard_map(
            sharding.map_seeds(play_seed, mesh),
            mesh=mesh,
            in_specs=(by_seed, by_seed),
            out_specs=by_rows,
            check_vma=False,
        )
    )


def _play_rows(
    environment: JaxEnvironment,
    agent: Agent,
    params: Params,
    key: Array,
    is_played: Array,
    greedy: bool,
) -> tuple[Array, Array, Array]:
    """Play one episode in each row that is played; return its return, success and length, [rows].

    The program runs one step longer than an episode may be, which reveals a longer one.
    """
    rows = len(is_played)
    state = init_actor_state(environment, agent, rows, key)
    env_step = jax.vmap(functools.partial(auto_reset.step, environment))

    def is_running(loop_state: Any) -> Array:
        _, is_alive, _, _, length = loop_state
        return is_alive.any() & (length.max() <= environment.spec.episode)

    def step(loop_state: Any) -> Any:
        state, is_alive, returns, success, length = loop_state
        key, action_key = jax.random.split(state.key)
        carry, action, _log_prob = act(agent, params, state.carry, state.inputs, action_key, greedy)
        env_states, result = env_step(state.environment, action)
        returns = returns + jnp.where(is_alive, result.reward, 0)
        success = success | (is_alive & result.success)
        length = length + is_alive
        is_alive = is_alive & ~(result.is_last | (result.discount == 0))
        inputs = Inputs(result.observation, action, result.reward, result.is_first)
        state = state._replace(environment=env_states, inputs=inputs, carry=carry, key=key)
        return state, is_alive, returns, success, length

    start = state, is_played, jnp.zeros(rows), jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32)
    _, _, returns, success, length = jax.lax.while_loop(is_running, step, start)
    return returns, success, length


def summarize(
    spec: Spec,
    returns: Sequence[np.ndarray],
    success: Sequence[np.ndarray],
    length: Sequence[np.ndarray],
) -> Record:
    """Summarize episodes as means over tasks, by task, and as normalized scores.

    Success is None if the environment does not define it. The normalized score of a task is
    (s − random) / (reference − random), if the spec has both; the capped one is at most 1.
    `stderr/…` is the standard error of a task's mean return, and `episodes_per_task` the smallest
    number of episodes of a task.

    Args:
      spec: spec of the environment.
      returns, success, length: arrays of the episodes of each task.
    """
    mean_return = np.array([values.mean() for values in returns])
    success_rate = np.array([values.mean() for values in success])
    record: Record = {
        'return': float(mean_return.mean()),
        'success': float(success_rate.mean()) if spec.has_success else None,
        'length': float(np.mean([values.mean() for values in length])),
        'episodes_per_task': min(len(values) for values in returns),
    }
    for i, name in enumerate(spec.tasks):
        record[f'return/{name}'] = float(mean_return[i])
        record[f'success/{name}'] = float(success_rate[i]) if spec.has_success else None
        if len(returns[i]) > 1:
            error = np.std(returns[i], ddof=1) / np.sqrt(len(returns[i]))
            record[f'stderr/{name}'] = float(error)
    if spec.random is not None and spec.reference is not None:
        low, high = np.asarray(spec.random), np.asarray(spec.reference)
        capped = np.minimum(1, (mean_return - low) / (high - low))
        record['capped_mean'] = float(capped.mean())
        record['capped_median'] = float(np.median(capped))
    return record


def evaluate_seeds(  # noqa: PLR0913 - as `play_episodes`
    environment: JaxEnvironment,
    agent: Agent,
    params: Params,
    keys: np.ndarray,
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    stops: Callable[[], bool] = never,
) -> list[dict[str, Record]]:
    """Evaluate all seeds in an environment in JAX.

    Args:
      environment, agent, params, keys, mesh: as in `play_episodes`.
      config: config of the evaluation, config.eval.
      stops: called before each policy is evaluated; returns whether to abort.

    Returns:
      For each seed, the records of the sampled policy '' and, with `config.greedy`, of '_greedy'.

    Raises:
      StoppedError: if the run is to end.
    """
    records: list[dict[str, Record]] = [{} for _ in keys]
    for greedy in (False, True) if config.greedy else (False,):
        if stops():
            raise StoppedError
        by_seed = play_episodes(environment, agent, params, keys, config.episodes, greedy, mesh)
        for record, episodes in zip(records, by_seed, strict=True):
            record['_greedy' if greedy else ''] = summarize(environment.spec, *episodes)
    return records


Evaluate = Callable[[Callable[[], bool]], list[dict[str, Record]]]


def write_evaluations(
    splits: Mapping[str, Evaluate],
    run: run_dir.Run,
    log: logger.RunLogger,
    env_steps: Sequence[int] | np.ndarray,
) -> None:
    """Write a record for each split, seed and policy; end the run if it is asked to stop.

    Args:
      splits: split → function that takes `stops` and returns the records of each seed.
      run: the open run.
      log: its logger.
      env_steps: environment steps of each seed so far.
    """
    stops = functools.partial(run.should_stop, recorded=False)
    try:
        for split, evaluate in splits.items():
            with progress.Work(f'evaluating {split}'):
                by_seed = evaluate(stops)
            for seed, steps, records in zip(run.config.seeds, env_steps, by_seed, strict=True):
                for policy, record in records.items():
                    values = {'env_steps': int(steps), **record}
                    log.write(run.step, seed, split + policy, values)
    except StoppedError:
        run.exit_preempted()


class Evaluation:
    """Evaluation of one seed in any environment, with rows of its own; a context manager.

    Args:
      config: config of the run.
      key: the config key that names the environment, 'env.name' or 'eval.held_out'.
    """

    def __init__(self, config: ml_collections.ConfigDict, key: str = 'env.name'):
        self._config = config
        name, options = factory.get_environment_args(config, key)
        self._compiled = None if envs.is_on_host(name) else envs.make(name, options, key)
        rows = config.actors.batch
        if self._compiled is None:
            episodes = config.eval.episodes
            rows = config.eval.batch or envs.count_evaluation_rows(name, rows, episodes, key)
        self._pool = Watched(
            envs.pool(name, rows, config.seeds[0], options, key),
            config.actors.timeout,
            'config.actors.timeout',
        )
        self._policies: dict[tuple[Agent, bool], Policy] = {}  # each is compiled once
        self.spec = self._pool.spec

    def __enter__(self) -> 'Evaluation':
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.close()

    def __call__(
        self,
        agent: Agent,
        params: Params,
        step: int,
        seed: int,
        stops: Callable[[], bool] = never,
    ) -> dict[str, Record]:
        """Return the records of the sampled policy '' and, with config.eval.greedy, of '_greedy'.

        Args:
          agent, params: agent and parameters of one seed.
          step: number of updates so far.
          seed: a seed of the run. Seed and step determine the episodes.
          stops: returns whether to abort.

        Raises:
          StoppedError: if the run is to end before the evaluation is over.
        """
        if self._compiled is not None:
            return self._evaluate_compiled(agent, params, make_evaluation_keys([seed], step), stops)
        records: dict[str, Record] = {}
        key = jax.random.fold_in(jax.random.key(seed), step)
        for greedy in (False, True) if self._config.eval.greedy else (False,):
            if stops():
                raise StoppedError
            policy = self._get_policy(agent, greedy)
            records['_greedy' if greedy else ''] = self._play(policy, params, key, stops)
        return records

    def _get_policy(self, agent: Agent, greedy: bool) -> Policy:
        if (agent, greedy) not in self._policies:
            self._policies[agent, greedy] = Policy(agent, greedy)
        return self._policies[agent, greedy]

    def _evaluate_compiled(
        self, agent: Agent, params: Params, keys: np.ndarray, stops: Callable[[], bool]
    ) -> dict[str, Record]:
        """Evaluate on all devices of this process."""
        assert self._compiled is not None
        devices = jax.local_devices()
        mesh = sharding.make_mesh(1, len(devices), devices=devices)
        params = jax.tree.map(lambda a: np.asarray(a)[None], params)
        params = jax.device_put(params, sharding.seed_sharding(mesh))
        config = self._config.eval
        (records,) = evaluate_seeds(self._compiled, agent, params, keys, config, mesh, stops)
        return records

    def _play(
        self, policy: Policy, params: Params, key: Array, stops: Callable[[], bool]
    ) -> Record:
        """Play on the host, within the limits of the config."""
        limits = Limits(self._config.eval.steps, self._config.eval.seconds)
        self._pool.stops = stops
        played = play(self._pool, policy, params, key, self._config.eval.episodes, limits, stops)
        if played.cut:
            print(
                f'evaluation of {self.spec.name}: {played.cut} episodes were cut and count as they '
                f'are, at config.eval.steps = {limits.steps} steps of an episode or at '
                f'config.eval.seconds = {limits.seconds:g} of the evaluation',
                file=sys.stderr,
            )
        return {
            **summarize(self.spec, played.returns, played.success, played.length),
            'cut': played.cut,
            'steps_needed': played.steps_needed,
            'steps_taken': played.steps_taken,
        }
