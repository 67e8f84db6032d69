"""The actor of the topology 'fused', which unrolls T steps of B environments in JAX."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mi.rl.agent import Agent, Carry, Inputs, Params, forward
from mi.rl.envs import auto_reset
from mi.rl.envs.spec import JaxEnvironment, Step
from mi.rl.trajectory import Episodes, Trajectory, compute_log_prob, sum_episodes
from mi.rows import get_row_indices, make_row_keys


class ActorState(NamedTuple):
    """The state of an actor between two steps.

    Attributes:
      environment: states of B environments, [B, …].
      inputs: next inputs of the agent, [B, …].
      carry: carry of the agent.
      key: random key for the actions.
      episode_return: return so far of each running episode, float32 [B].
    """

    environment: auto_reset.StreamState
    inputs: Inputs
    carry: Carry
    key: Array
    episode_return: Array


_Row = tuple[tuple[Inputs, Array, Array, Array, Array], Episodes, 'UnrollCounts']


class UnrollCounts(NamedTuple):
    """Counts and checks of an unroll.

    Attributes:
      transitions: int32, number of valid transitions.
      longest_unfinished: int32, length of the longest episode that has not ended.
      are_finite: name → bool, whether all rewards, or all entries of an observation, were finite.
    """

    transitions: Array
    longest_unfinished: Array
    are_finite: dict[str, Array]


def init_actor_state(
    environment: JaxEnvironment, agent: Agent, batch_size: int, rng_key: Array
) -> ActorState:
    """Start B episodes with evenly assigned tasks. Row i of the batch has task i % num_tasks."""
    action_key, env_key = jax.random.split(rng_key)
    tasks = get_row_indices(batch_size) % len(environment.spec.tasks)
    reset = functools.partial(auto_reset.reset, environment)
    env_states, first_step = jax.vmap(reset)(make_row_keys(env_key, batch_size), tasks)
    inputs = _make_inputs(first_step, jnp.zeros(batch_size, jnp.int32))
    carry = agent.initial_carry(batch_size)
    return ActorState(env_states, inputs, carry, action_key, jnp.zeros(batch_size, jnp.float32))


def unroll(
    environment: JaxEnvironment, agent: Agent, num_steps: int, params: Params, state: ActorState
) -> tuple[ActorState, Trajectory, Episodes, UnrollCounts]:
    """Unroll this device's environments for T = `num_steps` steps."""
    num_tasks = len(environment.spec.tasks)
    env_step = jax.vmap(functools.partial(auto_reset.step, environment))

    def step(state: ActorState, _: None) -> tuple[ActorState, _Row]:
        next_key, action_key = jax.random.split(state.key)
        carry, action, log_prob = act(agent, params, state.carry, state.inputs, action_key)
        env_states, result = env_step(state.environment, action)

        # Episodes that this step ended; an ignored step belongs to none.
        valid = ~state.environment.is_last
        is_over = valid & (result.is_last | (result.discount == 0))
        episode_return = state.episode_return + result.reward
        episode_length = state.environment.length + 1
        task = state.inputs.observation['task']
        episodes = sum_episodes(
            is_over, task, episode_return, episode_length, result.success, num_tasks
        )

        next_state = ActorState(
            environment=env_states,
            inputs=_make_inputs(result, action),
            carry=carry,
            key=next_key,
            episode_return=jnp.where(is_over, 0.0, episode_return),
        )
        row = state.inputs, action, log_prob, result.discount, valid
        counts = UnrollCounts(valid.sum(), env_states.length.max(), _are_finite(result))
        return next_state, (row, episodes, counts)

    end_state, (rows, episodes, counts) = jax.lax.scan(step, state, None, num_steps)

    # The trajectory has T + 1 rows of inputs; the last one is that of the next unroll's first step.
    inputs, action, log_prob, discount, valid = rows
    inputs = jax.tree.map(
        lambda rows, last_row: jnp.concatenate([rows, last_row[None]]), inputs, end_state.inputs
    )
    trajectory = Trajectory(inputs, action, log_prob, discount, valid, state.carry)

    # Reduce episodes and counts over time.
    episodes = jax.tree.map(lambda a: a.sum(0), episodes)
    are_finite = jax.tree.map(lambda a: a.all(0), counts.are_finite)
    counts = UnrollCounts(counts.transitions.sum(0), counts.longest_unfinished.max(0), are_finite)
    return end_state, trajectory, episodes, counts


def act(
    agent: Agent, params: Params, carry: Carry, inputs: Inputs, rng_key: Array, greedy: bool = False
) -> tuple[Carry, Array, Array]:
    """Return the next carry, actions int32 [B] and their log-probabilities for inputs [B, …]."""
    carry, outputs = forward(agent, params, carry, jax.tree.map(lambda a: a[None], inputs))
    logits = outputs.logits[0]
    if greedy:
        action = logits.argmax(-1)
    else:
        # A key for each row, so that no action depends on the division over devices.
        action = jax.vmap(jax.random.categorical)(make_row_keys(rng_key, len(logits)), logits)
    action = action.astype(jnp.int32)
    return carry, action, compute_log_prob(logits, action)


def _are_finite(step: Step) -> dict[str, Array]:
    """Return, by name, whether the reward and each float entry of the observation are finite."""
    entries = {f'observation {name!r}': array for name, array in step.observation.items()}
    arrays = {'reward': step.reward} | entries
    return {
        name: jnp.isfinite(array).all()
        for name, array in arrays.items()
        if jnp.issubdtype(array.dtype, jnp.floating)
    }


def _make_inputs(step: Step, action: Array) -> Inputs:
    return Inputs(step.observation, action, step.reward, step.is_first)
