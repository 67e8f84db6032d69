"""Workers that collect trajectories from environments stepped on the host.

A worker has several groups of environments. While one group simulates, the policy serves another:

    group 0   simulate ........ policy  simulate ........ policy
    group 1   policy  simulate ........ policy  simulate ........

Trajectories have the same layout as those of `mi.rl.fused.rollout`. They include the steps after
the end of an episode, and mark them as not valid because their actions are ignored.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mi.rl.agent import (
    Agent,
    Carry,
    Inputs,
    Params,
    encode_instruction,
    is_instructed,
)
from mi.rl.envs.check import check_step
from mi.rl.envs.finite import check_finite
from mi.rl.envs.spec import HostEnvironment, Step
from mi.rl.fused.rollout import act
from mi.rl.instructions import InstructionEncoder
from mi.rl.trajectory import Episodes, Trajectory


class PolicyState(NamedTuple):
    """The state of a policy between two steps.

    Attributes:
      key: random key of the actions.
      carry: carry of the agent.
      tokens, instruction: newest instruction of each row, [B, L], and its encoding, [B, …], or None
        if the agent does not read instructions.
    """

    key: Array
    carry: Carry
    tokens: Array | None = None
    instruction: Array | None = None


class Policy:
    """An agent that acts in B environments, one step at a time.

    Encodings of instructions are cached: only new instructions are encoded, and all of them when
    the parameters change.
    """

    def __init__(self, agent: Agent, greedy: bool = False):
        self._agent, self._greedy = agent, greedy
        self._step: jax.stages.Wrapped = jax.jit(self._act)

    def init(self, batch_size: int, rng_key: Array) -> PolicyState:
        """Return the initial policy state for B episodes."""
        carry = self._agent.initial_carry(batch_size)
        if not is_instructed(self._agent):
            return PolicyState(rng_key, carry)
        tokens = self._agent.spec.observation['instruction']
        return PolicyState(
            rng_key,
            carry,
            jnp.zeros((batch_size, *tokens.shape), tokens.dtype),
            jnp.zeros((batch_size, InstructionEncoder.hidden)),
        )

    def __call__(
        self,
        params: Params,
        policy_state: PolicyState,
        inputs: Inputs,
        has_new_params: bool = False,
    ) -> tuple[PolicyState, Array, Array]:
        """Return the next state, the actions [B] and their log-probabilities [B].

        Args:
          params: parameters of the agent.
          policy_state: state after the previous step.
          inputs: inputs of the agent, [B, …].
          has_new_params: whether the parameters have changed since the previous step.
        """
        return self._step(params, policy_state, inputs, has_new_params)

    def _act(
        self, params: Params, policy_state: PolicyState, inputs: Inputs, has_new_params: Array
    ) -> tuple[PolicyState, Array, Array]:
        next_key, action_key = jax.random.split(policy_state.key)

        # Encode the instructions that are new, and let the agent read the encodings.
        tokens, instruction = policy_state.tokens, policy_state.instruction
        if tokens is not None and instruction is not None:
            observation = dict(inputs.observation)
            encode = functools.partial(encode_instruction, self._agent, params)
            prev_tokens, tokens = tokens, observation['instruction']
            is_outdated = inputs.is_first | has_new_params | (tokens != prev_tokens).any(-1)
            instruction = _update_encodings(encode, tokens, instruction, is_outdated)
            observation['instruction'] = instruction
            inputs = inputs._replace(observation=observation)

        carry, action, log_prob = act(
            self._agent, params, policy_state.carry, inputs, action_key, self._greedy
        )
        return PolicyState(next_key, carry, tokens, instruction), action, log_prob


def _update_encodings(
    encode: Callable[[Array], Array], tokens: Array, encodings: Array, is_outdated: Array
) -> Array:
    """Return `encodings` with encode(tokens) in the outdated rows.

    If at most an eighth of the rows are outdated, only that many are encoded. Otherwise all are.
    """
    batch_size = len(tokens)
    max_rows = -(-batch_size // 8)

    def encode_outdated() -> Array:
        rows = jnp.nonzero(is_outdated, size=max_rows, fill_value=batch_size)[0]
        return encodings.at[rows].set(encode(tokens.at[rows].get(mode='clip')), mode='drop')

    def encode_all() -> Array:
        return encode(tokens).astype(encodings.dtype)

    return jax.lax.cond(is_outdated.sum() <= max_rows, encode_outdated, encode_all)


class Worker:
    """Groups of environments that share one policy.

    Args:
      groups: batches of environments, which the worker closes at its end. With two or more, the
        simulation of one overlaps with the policy of another.
      policy: the policy, shared by all workers of a process.
      num_steps: number of steps in a trajectory, T.
      rng_key: random key for the actions.
    """

    def __init__(
        self,
        groups: Sequence[HostEnvironment],
        policy: Policy,
        num_steps: int,
        rng_key: Array,
    ):
        self._environments, self._num_steps = groups, num_steps
        group_keys = jax.random.split(rng_key, len(groups))
        self._groups = [
            _Group(environment, policy, group_key)
            for environment, group_key in zip(groups, group_keys, strict=True)
        ]

    def collect(self, params: Params) -> list[tuple[Trajectory, Episodes]]:
        """Collect T transitions from each group, as NumPy arrays, and the episodes that ended."""
        for group in self._groups:
            group.begin_trajectory()

        # While one group simulates, the policy serves the next.
        for _ in range(self._num_steps):
            for group in self._groups:
                group.receive()
                group.send(params)

        # The last observation, which only bootstraps.
        for group in self._groups:
            group.receive()
        return [group.take_trajectory() for group in self._groups]

    def close(self) -> None:
        for environment in self._environments:
            environment.close()


class _TrajectoryBuilder:
    """A trajectory under construction, and the episodes that ended in it, by task.

    Attributes:
      carry: carry of the agent before the first step.
      inputs: inputs of each step, T + 1 entries when complete, whereas the other lists have T.
    """

    def __init__(self, carry: Carry, num_tasks: int):
        self.carry = carry
        self.inputs: list[Inputs] = []
        self.actions: list[np.ndarray] = []
        self.log_probs: list[Array] = []
        self.discounts: list[np.ndarray] = []
        self.valid: list[np.ndarray] = []
        self.episodes = np.zeros((4, num_tasks), np.float32)

    def build(self) -> tuple[Trajectory, Episodes]:
        """Stack the steps into a trajectory."""
        trajectory = Trajectory(
            inputs=jax.tree.map(lambda *rows: np.stack(rows), *self.inputs),
            action=_stack(self.actions),
            log_prob=_stack([np.asarray(log_prob) for log_prob in self.log_probs]),
            discount=_stack(self.discounts),
            valid=_stack(self.valid),
            carry=jax.tree.map(np.asarray, self.carry),
        )
        return trajectory, Episodes(*self.episodes)


def _stack(rows: Sequence[np.ndarray]) -> Any:
    return np.stack(rows)


class _Group:
    """A batch of environments, the state of its policy and its current trajectory."""

    def __init__(self, environment: HostEnvironment, policy: Policy, rng_key: Array):
        self._environment, self._policy = environment, policy
        batch_size = environment.batch
        self._policy_state = policy.init(batch_size, rng_key)
        self._step: Step = environment.reset()
        check_step(environment.spec, batch_size, self._step)
        check_finite(environment.spec, self._step)
        self._action: Any = np.zeros(batch_size, np.int32)
        self._is_sent = False
        self._returns = np.zeros(batch_size, np.float32)
        self._lengths = np.zeros(batch_size, np.float32)
        self._has_new_params = True
        self._builder = self._make_builder()

    def begin_trajectory(self) -> None:
        """Start a trajectory, possibly with new parameters."""
        self._builder = self._make_builder()
        self._has_new_params = True

    def receive(self) -> None:
        """Receive the result of the last action, and append the next inputs."""
        if self._is_sent:
            prev_step, step = self._step, self._environment.recv()
            self._is_sent = False
            check_finite(self._environment.spec, step)
            self._builder.discounts.append(np.asarray(step.discount, np.float32))
            self._builder.valid.append(~np.asarray(prev_step.is_last))
            self._count_episodes(prev_step, step)
            self._step = step
        step = self._step
        inputs = Inputs(step.observation, self._action, step.reward, step.is_first)
        self._builder.inputs.append(jax.tree.map(np.array, inputs))  # a copy

    def send(self, params: Params) -> None:
        """Choose actions for the newest inputs, and send them to the environments."""
        self._policy_state, action, log_prob = self._policy(
            params, self._policy_state, self._builder.inputs[-1], self._has_new_params
        )
        self._has_new_params = False
        self._action = np.asarray(action)
        self._builder.actions.append(self._action)
        self._builder.log_probs.append(log_prob)
        self._environment.send(self._action)
        self._is_sent = True

    def take_trajectory(self) -> tuple[Trajectory, Episodes]:
        """Return the trajectory and the episodes that ended in it."""
        return self._builder.build()

    def _make_builder(self) -> _TrajectoryBuilder:
        return _TrajectoryBuilder(self._policy_state.carry, len(self._environment.spec.tasks))

    def _count_episodes(self, prev_step: Step, step: Step) -> None:
        """Add the episodes that ended with this step to the sums for each task."""
        is_valid = ~np.asarray(prev_step.is_last)
        self._returns = np.where(is_valid, self._returns + step.reward, 0).astype(np.float32)
        self._lengths = np.where(is_valid, self._lengths + 1, 0).astype(np.float32)

        # Sums by task, in the order of the fields of `Episodes`.
        is_over = is_valid & (np.asarray(step.is_last) | (np.asarray(step.discount) == 0))
        tasks = np.asarray(prev_step.observation['task'])[is_over]
        success = np.asarray(step.success, np.float32)
        row_values = np.ones_like(success), self._returns, self._lengths, success
        for task_sums, values in zip(self._builder.episodes, row_values, strict=True):
            task_sums += np.bincount(tasks, values[is_over], len(task_sums))

        # The next episode of these rows starts from zero.
        self._returns[is_over] = 0
        self._lengths[is_over] = 0


def concatenate_trajectories(trajectories: Sequence[Trajectory]) -> Trajectory:
    """Concatenate the trajectories of several groups along B."""
    carries = [trajectory.carry for trajectory in trajectories]
    carry = jax.tree.map(lambda *arrays: np.concatenate(arrays), *carries)
    steps = [trajectory._replace(carry={}) for trajectory in trajectories]
    merged: Trajectory = jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=1), *steps)
    return merged._replace(carry=carry)
