"""Evaluation of sampled and greedy policies on whole episodes of each task.

In JAX environments, one compiled program plays the episodes of all seeds. Other environments are
played on the host.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

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
from mi.rl.fused.rollout import ActorState, act, init_actor_state
from mi.rl.play import Limits, StoppedError, Watched, never, play
from mi.rows import get_row_indices
from mi.training import logger, progress, run_dir, sharding


class Simulation(NamedTuple):
    """A hashable tuple of an agent, a JAX environment, and the mesh that divides the work."""

    environment: JaxEnvironment
    agent: Agent
    mesh: jax.sharding.Mesh


class EpisodeArrays(NamedTuple):
    """Returns, successes and lengths of one seed's episodes, with an array for each task."""

    returns: list[np.ndarray]
    success: list[np.ndarray]
    length: list[np.ndarray]


def make_evaluation_keys(seeds: Sequence[int], step: int) -> np.ndarray:
    """Return int32 [S, 2] with each seed and the step, from which random keys are derived."""
    return np.array([[seed, step] for seed in seeds], np.int32)


def play_episodes(
    simulation: Simulation,
    params: Params,
    evaluation_keys: np.ndarray,
    num_episodes: int,
    greedy: bool,
) -> list[EpisodeArrays]:
    """Play episodes of every task for each seed, divided over the devices.

    Args:
      simulation: environment, agent and mesh.
      params: parameters of the agent, [S, …].
      evaluation_keys: key data from `make_evaluation_keys`.
      num_episodes: number of episodes for each task.
      greedy: whether to take the most likely action instead of sampling.

    Raises:
      UserError: if an episode is longer than the spec allows.
    """
    spec, mesh = simulation.environment.spec, simulation.mesh
    program = make_program(simulation, num_episodes, greedy)
    placed_keys = sharding.shard_array(evaluation_keys, sharding.seed_sharding(mesh))
    returns, success, length = sharding.to_host(program(params, placed_keys))
    auto_reset.check_length(spec, int(length.max()) - 1)

    # Row i of a seed has an episode of task i % num_tasks; rows that pad the devices come last.
    num_tasks = len(spec.tasks)
    by_task = [
        array[:, : num_tasks * num_episodes].reshape(-1, num_episodes, num_tasks).swapaxes(1, 2)
        for array in (returns, success, length)
    ]
    return [EpisodeArrays(*map(list, seed_arrays)) for seed_arrays in zip(*by_task, strict=True)]


def compile_episodes(
    simulation: Simulation, params: Params, num_episodes: int
) -> jax.stages.Compiled:
    """Compile the program that `play_episodes` calls, with sampled actions.

    Args:
      simulation: environment, agent and mesh.
      params: shapes of the parameters for all seeds, placed on the mesh.
      num_episodes: number of episodes for each task.
    """
    num_seeds = jax.tree.leaves(params)[0].shape[0]
    by_seed = sharding.seed_sharding(simulation.mesh)
    evaluation_keys = jax.ShapeDtypeStruct((num_seeds, 2), jnp.int32, sharding=by_seed)
    program = make_program(simulation, num_episodes, greedy=False)
    compiled: jax.stages.Compiled = program.lower(params, evaluation_keys).compile()
    return compiled


@functools.cache
def make_program(simulation: Simulation, num_episodes: int, greedy: bool) -> jax.stages.Wrapped:
    """Return the program (params, evaluation keys) → (return, success, length), [S, rows] each.

    The devices do not communicate, so each one stops after the longest of its own episodes.
    """
    environment, agent, mesh = simulation
    num_rows = len(environment.spec.tasks) * num_episodes
    row_shards = mesh.size // mesh.shape['seed']
    device_rows = -(-num_rows // row_shards)

    # The rows of one seed on one device; the last ones may be padding, which is not played.
    def play_seed(params: Params, evaluation_key: Array) -> tuple[Array, Array, Array]:
        rng_key = jax.random.fold_in(jax.random.key(evaluation_key[0]), evaluation_key[1])
        is_played = get_row_indices(device_rows) < num_rows
        return _play_rows(environment, agent, params, rng_key, is_played, greedy)

    # All seeds on all devices.
    by_seed = sharding.seed_sharding(mesh).spec
    by_rows = sharding.batch_sharding(mesh, 1, has_seeds=True).spec
    return jax.jit(
        jax.shard_map(
            sharding.map_seeds(play_seed, mesh),
            mesh=mesh,
            in_specs=(by_seed, by_seed),
            out_specs=by_rows,
            check_vma=False,
        )
    )


class _EvaluationState(NamedTuple):
    """The state of an evaluation between two steps. All arrays except `actor` are [rows].

    Attributes:
      actor: state of the actor.
      is_alive: whether the episode of a row is still running.
      returns, success, length: results of a row's episode so far.
    """

    actor: ActorState
    is_alive: Array
    returns: Array
    success: Array
    length: Array


def _play_rows(
    environment: JaxEnvironment,
    agent: Agent,
    params: Params,
    rng_key: Array,
    is_played: Array,
    greedy: bool,
) -> tuple[Array, Array, Array]:
    """Play an episode in each row where `is_played` is True.

    The program runs for one step more than the maximum length, so that longer episodes are noticed.

    Returns:
      The return, success and length of each episode, [rows].
    """
    num_rows = len(is_played)
    env_step = jax.vmap(functools.partial(auto_reset.step, environment))

    def is_running(state: _EvaluationState) -> Array:
        return state.is_alive.any() & (state.length.max() <= environment.spec.episode)

    # All rows step; those whose episode is over no longer count.
    def step(state: _EvaluationState) -> _EvaluationState:
        actor, is_alive = state.actor, state.is_alive
        next_key, action_key = jax.random.split(actor.key)
        carry, action, _log_prob = act(agent, params, actor.carry, actor.inputs, action_key, greedy)
        env_states, result = env_step(actor.environment, action)
        inputs = Inputs(result.observation, action, result.reward, result.is_first)
        return _EvaluationState(
            actor._replace(environment=env_states, inputs=inputs, carry=carry, key=next_key),
            is_alive & ~(result.is_last | (result.discount == 0)),
            state.returns + jnp.where(is_alive, result.reward, 0),
            state.success | (is_alive & result.success),
            state.length + is_alive,
        )

    # Step until no row is alive, or one has outlived the spec.
    init_state = _EvaluationState(
        init_actor_state(environment, agent, num_rows, rng_key),
        is_played,
        jnp.zeros(num_rows),
        jnp.zeros(num_rows, bool),
        jnp.zeros(num_rows, jnp.int32),
    )
    end_state = jax.lax.while_loop(is_running, step, init_state)
    return end_state.returns, end_state.success, end_state.length


def summarize(
    spec: Spec,
    returns: Sequence[np.ndarray],
    success: Sequence[np.ndarray],
    length: Sequence[np.ndarray],
) -> Record:
    """Summarize episodes by mean results, for each task and over tasks, and by normalized scores.

    Success is None if the environment does not define it. The normalized score of a task is
    (s − random) / (reference − random) if the spec has both scores, and the capped score is at most
    1. `stderr/…` is the standard error of a task's mean return, and `episodes_per_task` is the
    smallest number of episodes in any task.

    Args:
      spec: spec of the environment.
      returns, success, length: arrays of each task's episodes.
    """
    # Means over tasks.
    mean_returns = np.array([task_returns.mean() for task_returns in returns])
    success_rates = np.array([task_success.mean() for task_success in success])
    record: Record = {
        'return': float(mean_returns.mean()),
        'success': float(success_rates.mean()) if spec.has_success else None,
        'length': float(np.mean([task_lengths.mean() for task_lengths in length])),
        'episodes_per_task': min(len(task_returns) for task_returns in returns),
    }

    # Scores of each task.
    for task, task_name in enumerate(spec.tasks):
        record[f'return/{task_name}'] = float(mean_returns[task])
        record[f'success/{task_name}'] = float(success_rates[task]) if spec.has_success else None
        num_episodes = len(returns[task])
        if num_episodes > 1:
            standard_error = np.std(returns[task], ddof=1) / np.sqrt(num_episodes)
            record[f'stderr/{task_name}'] = float(standard_error)

    # Normalized scores, as they are published.
    if spec.random is not None and spec.reference is not None:
        random_scores, reference_scores = np.asarray(spec.random), np.asarray(spec.reference)
        normalized = (mean_returns - random_scores) / (reference_scores - random_scores)
        capped = np.minimum(1, normalized)
        record['capped_mean'] = float(capped.mean())
        record['capped_median'] = float(np.median(capped))
    return record


def evaluate_seeds(
    simulation: Simulation,
    params: Params,
    evaluation_keys: np.ndarray,
    config: ml_collections.ConfigDict,
    stops: Callable[[], bool] = never,
) -> list[dict[str, Record]]:
    """Evaluate all seeds in a JAX environment.

    Args:
      simulation, params, evaluation_keys: as in `play_episodes`.
      config: the section config.eval.
      stops: function that returns whether to abort, called before each policy is evaluated.

    Returns:
      For each seed, suffix → record: '' for the sampled policy and, with `config.greedy`, '_greedy'
      for the greedy one.

    Raises:
      StoppedError: if `stops` returns True.
    """
    seed_records: list[dict[str, Record]] = [{} for _ in evaluation_keys]
    for greedy in (False, True) if config.greedy else (False,):
        if stops():
            raise StoppedError
        by_seed = play_episodes(simulation, params, evaluation_keys, config.episodes, greedy)
        for records, episodes in zip(seed_records, by_seed, strict=True):
            record = summarize(simulation.environment.spec, *episodes)
            records['_greedy' if greedy else ''] = record
    return seed_records


Evaluate = Callable[[Callable[[], bool]], list[dict[str, Record]]]


def write_evaluations(
    splits: Mapping[str, Evaluate],
    run: run_dir.Run,
    log: logger.RunLogger,
    env_steps: Sequence[int] | np.ndarray,
) -> None:
    """Evaluate each split, seed and policy, and write a record for each. End the run if asked to.

    Args:
      splits: split → function that takes `stops` and returns the records of each seed.
      run: the open run.
      log: logger of the run.
      env_steps: environment steps of each seed so far.
    """
    stops = functools.partial(run.should_stop, recorded=False)
    try:
        for split, evaluate in splits.items():
            with progress.Work(f'evaluating {split}'):
                by_seed = evaluate(stops)
            for seed, seed_env_steps, records in zip(
                run.config.seeds, env_steps, by_seed, strict=True
            ):
                for suffix, record in records.items():
                    full_record = {'env_steps': int(seed_env_steps), **record}
                    log.write(run.step, seed, split + suffix, full_record)
    except StoppedError:
        run.exit_preempted()


class Evaluation:
    """An evaluation of one seed at a time, in any environment, as a context manager.

    Args:
      config: config of the run.
      config_key: the config key that names the environment, 'env.name' or 'eval.held_out'.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, config_key: factory.EnvironmentKey = 'env.name'
    ):
        self._config = config
        self._compiled: JaxEnvironment | None = None
        self._pool: Watched | None = None
        self._policies: dict[tuple[Agent, bool], Policy] = {}  # each is compiled once
        if envs.is_on_host(factory.get_environment_name(config, config_key)):
            batch_size = config.eval.batch or factory.count_evaluation_rows(config, config_key)
            batch_key = 'config.eval.batch' if config.eval.batch else 'config.actors.batch'
            pool = factory.make_pool(config, batch_size, config.seeds[0], config_key, batch_key)
            self._pool = Watched(pool, config.actors.timeout)
            self.spec = self._pool.spec
        else:
            self._compiled = factory.make_environment(config, config_key)
            self.spec = self._compiled.spec

    def __enter__(self) -> 'Evaluation':
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.close()

    def __call__(
        self,
        agent: Agent,
        params: Params,
        step: int,
        seed: int,
        stops: Callable[[], bool] = never,
    ) -> dict[str, Record]:
        """Evaluate one seed.

        Args:
          agent, params: agent and parameters of the seed.
          step: number of updates so far.
          seed: a seed of the run. In a JAX environment, seed and step determine the episodes. On
            the host they determine the actions; environments continue their random numbers.
          stops: function that returns whether to abort.

        Returns:
          Suffix → record: '' for the sampled policy and, with config.eval.greedy, '_greedy' for the
          greedy one.

        Raises:
          StoppedError: if `stops` returns True before the evaluation is over.
        """
        if self._compiled is not None:
            return self._evaluate_compiled(agent, params, make_evaluation_keys([seed], step), stops)
        records: dict[str, Record] = {}
        rng_key = jax.random.fold_in(jax.random.key(seed), step)
        for greedy in (False, True) if self._config.eval.greedy else (False,):
            if stops():
                raise StoppedError
            policy = self._get_policy(agent, greedy)
            records['_greedy' if greedy else ''] = self._play(policy, params, rng_key, stops)
        return records

    def _get_policy(self, agent: Agent, greedy: bool) -> Policy:
        if (agent, greedy) not in self._policies:
            self._policies[agent, greedy] = Policy(agent, greedy)
        return self._policies[agent, greedy]

    def _evaluate_compiled(
        self, agent: Agent, params: Params, evaluation_keys: np.ndarray, stops: Callable[[], bool]
    ) -> dict[str, Record]:
        """Evaluate in a JAX environment, on all devices of this process."""
        assert self._compiled is not None
        devices = jax.local_devices()
        mesh = sharding.make_mesh(1, len(devices), devices=devices)
        simulation = Simulation(self._compiled, agent, mesh)
        params = jax.tree.map(lambda a: np.asarray(a)[None], params)
        params = jax.device_put(params, sharding.seed_sharding(mesh))
        (records,) = evaluate_seeds(simulation, params, evaluation_keys, self._config.eval, stops)
        return records

    def _play(
        self, policy: Policy, params: Params, rng_key: Array, stops: Callable[[], bool]
    ) -> Record:
        """Play episodes on the host, within the limits of the config."""
        assert self._pool is not None
        config = self._config.eval
        limits = Limits(config.episodes, config.steps, config.seconds)
        self._pool.stops = stops
        played = play(self._pool, policy, params, rng_key, limits, stops)
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
