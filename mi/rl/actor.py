"""Acting: T steps of B environments under one policy, as the learner takes them.

    row t of inputs     what the agent sees before action t; row T only bootstraps
    action[t]           taken there, with log_prob[t] under the policy that acted
    inputs.reward[t+1], discount[t]
                        what action t led to
    carry               the agent's state before row 0

The reward of action t stands in row t + 1 of the inputs, where the agent sees it too.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mi.rl.envs.spec import JaxEnvironment, Step
from mi.rl.networks import Agent, Carry, Inputs, forward


class Trajectory(NamedTuple):
    """T transitions of B environments.

    Attributes:
      inputs: [T + 1, B, …].
      action: int32 [T, B].
      log_prob: float32 [T, B].
      discount: float32 [T, B], 0 where the action ended the episode, 1 elsewhere.
      valid: bool [T, B], false where the action was ignored, as the episode had ended before.
      carry: of the agent, before row 0.
    """

    inputs: Inputs
    action: Array
    log_prob: Array
    discount: Array
    valid: Array
    carry: Carry


class Episodes(NamedTuple):
    """How many episodes ended, and sums over them, by task, [tasks] float32."""

    number: Array
    returns: Array
    lengths: Array
    successes: Array


class State(NamedTuple):
    """What acting continues from.

    Attributes:
      environment: states of B environments.
      inputs: what the agent sees next, [B, …].
      carry: of the agent.
      key: random key of the actions.
      returned, length: of each episode up to now, [B] float32.
    """

    environment: Any
    inputs: Inputs
    carry: Carry
    key: Array
    returned: Array
    length: Array


def start(environment: JaxEnvironment, agent: Agent, batch: int, key: Array) -> State:
    """B new episodes, their tasks dealt out evenly."""
    own, of_environments = jax.random.split(key)
    tasks = jnp.arange(batch) % len(environment.spec.tasks)
    keys = jax.random.split(of_environments, batch)
    environments, step = jax.vmap(environment.reset)(keys, tasks.astype(jnp.int32))
    zeros = jnp.zeros(batch, jnp.float32)
    inputs = _inputs(step, jnp.zeros(batch, jnp.int32))
    return State(environments, inputs, agent.initial_carry(batch), own, zeros, zeros)


def unroll(
    environment: JaxEnvironment, agent: Agent, length: int, params: Any, state: State
) -> tuple[State, Trajectory, Episodes]:
    """T = `length` steps of all environments; one program, for the fused topology."""
    tasks = len(environment.spec.tasks)

    def step(
        state: State, _: None
    ) -> tuple[State, tuple[Inputs, Array, Array, Array, Array, Episodes]]:
        key, of_actions = jax.random.split(state.key)
        carry, action, log_prob = act(agent, params, state.carry, state.inputs, of_actions)
        environments, after = jax.vmap(environment.step)(state.environment, action)
        returned, lengths = state.returned + after.reward, state.length + 1
        ended = after.discount == 0
        episodes = finished(
            ended, state.inputs.observation['task'], returned, lengths, after, tasks
        )
        running = jnp.where(ended, 0.0, 1.0)
        new = State(
            environments, _inputs(after, action), carry, key, returned * running, lengths * running
        )
        valid = jnp.ones(action.shape, bool)
        return new, (state.inputs, action, log_prob, after.discount, valid, episodes)

    end, (rows, action, log_prob, discount, valid, episodes) = jax.lax.scan(
        step, state, None, length
    )
    inputs = jax.tree.map(lambda a, last: jnp.concatenate([a, last[None]]), rows, end.inputs)
    trajectory = Trajectory(inputs, action, log_prob, discount, valid, state.carry)
    return end, trajectory, jax.tree.map(lambda a: a.sum(0), episodes)


def act(
    agent: Agent, params: Any, carry: Carry, inputs: Inputs, key: Array, greedy: bool = False
) -> tuple[Carry, Array, Array]:
    """One step of the policy on inputs [B, …] → carry, actions int32 [B], their log-probability."""
    one = jax.tree.map(lambda a: a[None], inputs)
    carry, outputs = forward(agent, params, carry, one)
    logits = outputs.logits[0]
    action = logits.argmax(-1) if greedy else jax.random.categorical(key, logits)
    action = action.astype(jnp.int32)
    return carry, action, log_probability(logits, action)


def log_probability(logits: Array, action: Array) -> Array:
    """log π(a): logits [..., A], actions [...] → [...]."""
    log_pi = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(log_pi, action[..., None], axis=-1)[..., 0]


def finished(
    ended: Array, task: Array, returned: Array, length: Array, step: Step, tasks: int
) -> Episodes:
    """What ended in this step, summed by task: all arguments but the last are [B]."""
    of_task = functools.partial(jax.ops.segment_sum, segment_ids=task, num_segments=tasks)
    weight = ended.astype(jnp.float32)
    return Episodes(
        of_task(weight),
        of_task(weight * returned),
        of_task(weight * length),
        of_task(weight * step.success),
    )


def _inputs(step: Step, action: Array) -> Inputs:
    return Inputs(step.observation, action, step.reward, step.is_first)
