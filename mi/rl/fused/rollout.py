"""Acting: T steps of B environments under one policy, as the learner takes them.

    row t of inputs     what the agent sees before action t; row T only bootstraps
    action[t]           taken there, with log_prob[t] under the policy that acted
    inputs.reward[t+1], discount[t]
                        what action t led to
    carry               the agent's state before row 0

The reward of action t stands in row t + 1 of the inputs, where the agent sees it too. Where an
episode was truncated, its last observation has a row too; the action there is ignored and not
valid, and the next row is the first of another episode (`mi.rl.envs.spec`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mi.rl.agent import (
    Agent,
    Carry,
    Inputs,
    forward,
)
from mi.rl.envs import auto_reset
from mi.rl.envs.spec import JaxEnvironment, Step
from mi.rl.trajectory import (
    Episodes,
    Trajectory,
    finished,
    log_probability,
)
from mi.rows import get_row_indices, make_row_keys


class State(NamedTuple):
    """What acting continues from.

    Attributes:
      environment: of B environments, [B, …].
      inputs: what the agent sees next, [B, …].
      carry: of the agent.
      key: random key of the actions.
      returned: of each episode up to now, [B] float32.
    """

    environment: auto_reset.StreamState
    inputs: Inputs
    carry: Carry
    key: Array
    returned: Array


class Counts(NamedTuple):
    """What an unroll counts beside its episodes.

    Attributes:
      transitions: int32, the valid ones.
      longest_unfinished: int32, most steps after which an episode had not ended.
      are_finite: whether all rewards, and all entries of observations, were; name → bool.
    """

    transitions: Array
    longest_unfinished: Array
    are_finite: dict[str, Array]


def start(environment: JaxEnvironment, agent: Agent, batch: int, key: Array) -> State:
    """B new episodes, their tasks dealt out evenly: row i of the whole batch has task i % tasks."""
    action_key, env_key = jax.random.split(key)
    tasks = get_row_indices(batch) % len(environment.spec.tasks)
    reset = functools.partial(auto_reset.reset, environment)
    environments, step = jax.vmap(reset)(make_row_keys(env_key, batch), tasks)
    inputs = _inputs(step, jnp.zeros(batch, jnp.int32))
    carry = agent.initial_carry(batch)
    return State(environments, inputs, carry, action_key, jnp.zeros(batch, jnp.float32))


def unroll(
    environment: JaxEnvironment, agent: Agent, length: int, params: Any, state: State
) -> tuple[State, Trajectory, Episodes, Counts]:
    """T = `length` steps of the environments that this device has; for the fused topology."""
    tasks = len(environment.spec.tasks)
    env_step = jax.vmap(functools.partial(auto_reset.step, environment))

    def step(state: State, _: None) -> tuple[State, tuple[Any, ...]]:
        key, action_key = jax.random.split(state.key)
        carry, action, log_prob = act(agent, params, state.carry, state.inputs, action_key)
        environments, after = env_step(state.environment, action)

        # Episodes that this step ended; a step that was ignored belongs to none.
        valid = ~state.environment.is_last
        ended = valid & (after.is_last | (after.discount == 0))
        returned = state.returned + after.reward
        length = state.environment.length + 1
        task = state.inputs.observation['task']
        episodes = finished(ended, task, returned, length, after, tasks)

        returned = jnp.where(ended, 0.0, returned)
        new = State(environments, _inputs(after, action), carry, key, returned)
        row = state.inputs, action, log_prob, after.discount, valid
        counts = Counts(valid.sum(), environments.length.max(), _are_finite(after))
        return new, (row, episodes, counts)

    end, (rows, episodes, counts) = jax.lax.scan(step, state, None, length)
    inputs, action, log_prob, discount, valid = rows
    inputs = jax.tree.map(lambda a, last: jnp.concatenate([a, last[None]]), inputs, end.inputs)
    trajectory = Trajectory(inputs, action, log_prob, discount, valid, state.carry)
    episodes = jax.tree.map(lambda a: a.sum(0), episodes)
    are_finite = jax.tree.map(lambda a: a.all(0), counts.are_finite)
    counts = Counts(counts.transitions.sum(0), counts.longest_unfinished.max(0), are_finite)
    return end, trajectory, episodes, counts


def act(
    agent: Agent, params: Any, carry: Carry, inputs: Inputs, key: Array, greedy: bool = False
) -> tuple[Carry, Array, Array]:
    """One step of the policy on inputs [B, …] → carry, actions int32 [B], their log-probability."""
    one = jax.tree.map(lambda a: a[None], inputs)
    carry, outputs = forward(agent, params, carry, one)
    logits = outputs.logits[0]
    if greedy:
        action = logits.argmax(-1)
    else:
        action = jax.vmap(jax.random.categorical)(make_row_keys(key, len(logits)), logits)
    action = action.astype(jnp.int32)
    return carry, action, log_probability(logits, action)


def _are_finite(step: Step) -> dict[str, Array]:
    observation = {f'observation {name!r}': a for name, a in step.observation.items()}
    values = {'reward': step.reward} | observation
    return {
        name: jnp.isfinite(value).all()
        for name, value in values.items()
        if jnp.issubdtype(value.dtype, jnp.floating)
    }


def _inputs(step: Step, action: Array) -> Inputs:
    return Inputs(step.observation, action, step.reward, step.is_first)
