"""Acting on the host: trajectories from environments that are stepped outside of the program.

A worker has several groups of rows. While one group simulates, the policy looks at another:

    group 0   simulate ........ policy  simulate ........ policy
    group 1   policy  simulate ........ policy  simulate ........

Its trajectories are those of `mi.rl.actor`, with the host's convention for the end of an episode:
the step whose action was ignored stays in, not valid.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from mi.rl.actor import Episodes, Trajectory, act
from mi.rl.envs.spec import HostEnvironment, Step
from mi.rl.networks import Agent, Carry, Inputs

Policy = Callable[[Any, Array, Carry, Inputs], tuple[Array, Carry, Array, Array]]


def compile_policy(agent: Agent, greedy: bool = False) -> Policy:
    """(params, key, carry, inputs [B, …]) → (key, carry, action [B], log-probability [B])."""

    @jax.jit
    def policy(params: Any, key: Array, carry: Carry, inputs: Inputs) -> Any:
        key, of_actions = jax.random.split(key)
        carry, action, log_prob = act(agent, params, carry, inputs, of_actions, greedy)
        return key, carry, action, log_prob

    return policy


class Worker:
    """Groups of environments under one policy.

    Args:
      groups: batches of environments, which it closes; two let simulation and policy overlap.
      agent: acts on all of them.
      policy: of `compile_policy`, which workers of one process share.
      length: T.
      key: random key of the actions.
    """

    def __init__(
        self,
        groups: Sequence[HostEnvironment],
        agent: Agent,
        policy: Policy,
        length: int,
        key: Array,
    ):
        self._environments, self._policy, self._length = groups, policy, length
        keys = jax.random.split(key, len(groups))
        self._groups = [_Group(g, agent, k) for g, k in zip(groups, keys, strict=True)]

    def collect(self, params: Any) -> list[tuple[Trajectory, Episodes]]:
        """The next T transitions of each group, NumPy, and the episodes that ended in them."""
        for group in self._groups:
            group.begin()
        for _ in range(self._length):
            for group in self._groups:
                group.receive()
                group.send(self._policy, params)
        for group in self._groups:
            group.receive()
        return [group.take() for group in self._groups]

    def close(self) -> None:
        for environment in self._environments:
            environment.close()


class _Group:
    """A batch of environments, and what a trajectory of it has so far."""

    def __init__(self, environment: HostEnvironment, agent: Agent, key: Array):
        self._environment, self._key = environment, key
        B = environment.batch
        self._carry: Carry = agent.initial_carry(B)
        self._step: Step = environment.reset()
        self._action = np.zeros(B, np.int32)
        self._sent = False
        self._returned, self._length = np.zeros(B, np.float32), np.zeros(B, np.float32)

    def begin(self) -> None:
        self._rows: list[Inputs] = []
        self._actions: list[np.ndarray] = []
        self._log_probs: list[Array] = []
        self._discounts: list[np.ndarray] = []
        self._valid: list[np.ndarray] = []
        self._episodes = np.zeros((4, len(self._environment.spec.tasks)), np.float32)
        self._first_carry = self._carry

    def receive(self) -> None:
        """The next row of the inputs: what the action sent before led to."""
        if self._sent:
            before, after = self._step, self._environment.recv()
            self._sent = False
            self._discounts.append(np.asarray(after.discount, np.float32))
            self._valid.append(~np.asarray(before.is_last))
            self._count(before, after)
            self._step = after
        step = self._step
        row: Any = step.observation, self._action, step.reward, step.is_first
        self._rows.append(jax.tree.map(np.array, Inputs(*row)))  # a copy

    def send(self, policy: Policy, params: Any) -> None:
        """The action on the newest row."""
        self._key, self._carry, action, log_prob = policy(
            params, self._key, self._carry, self._rows[-1]
        )
        self._action = np.asarray(action)
        self._actions.append(self._action)
        self._log_probs.append(log_prob)
        self._environment.send(self._action)
        self._sent = True

    def take(self) -> tuple[Trajectory, Episodes]:
        inputs = jax.tree.map(lambda *rows: np.stack(rows), *self._rows)
        log_probs = [np.asarray(a) for a in self._log_probs]
        of_actions = self._actions, log_probs, self._discounts, self._valid
        carry = jax.tree.map(np.asarray, self._first_carry)
        rows: Any = inputs, *map(np.stack, of_actions), carry
        return Trajectory(*rows), Episodes(*self._episodes)

    def _count(self, before: Step, after: Step) -> None:
        """Episodes that ended with this step, by task."""
        played = ~np.asarray(before.is_last)
        self._returned = np.where(played, self._returned + after.reward, 0).astype(np.float32)
        self._length = np.where(played, self._length + 1, 0).astype(np.float32)
        ended = played & (np.asarray(after.is_last) | (np.asarray(after.discount) == 0))
        task = np.asarray(before.observation['task'])[ended]
        success = np.asarray(after.success, np.float32)
        of_rows = np.ones_like(success), self._returned, self._length, success
        for sums, values in zip(self._episodes, of_rows, strict=True):
            sums += np.bincount(task, values[ended], len(sums))
        self._returned[ended] = 0
        self._length[ended] = 0


def joined(trajectories: Sequence[Trajectory]) -> Trajectory:
    """Trajectories of several groups side by side, along B."""
    carry = jax.tree.map(lambda *a: np.concatenate(a), *[t.carry for t in trajectories])
    rest = [trajectory._replace(carry={}) for trajectory in trajectories]
    both: Any = jax.tree.map(lambda *a: np.concatenate(a, axis=1), *rest)
    return both._replace(carry=carry)
