"""Acting on the host: trajectories from environments that are stepped outside of the program.

A worker has several groups of rows. While one group simulates, the policy looks at another:

    group 0   simulate ........ policy  simulate ........ policy
    group 1   policy  simulate ........ policy  simulate ........

Its trajectories are those of `mi.rl.fused.rollout`, with the host's convention for the end of an
episode: the step whose action was ignored stays in, not valid.
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
    encode_instruction,
    is_instructed,
)
from mi.rl.envs.check import check_step
from mi.rl.envs.finite import check_finite
from mi.rl.envs.spec import HostEnvironment, Step
from mi.rl.fused.rollout import act
from mi.rl.instructions import InstructionEncoder
from mi.rl.trajectory import Episodes, Trajectory


class Acting(NamedTuple):
    """What a policy continues from.

    Attributes:
      key: random key of the actions.
      carry: of the agent.
      tokens, instruction: the newest of each row, [B, L], and encoded, [B, …]; None if the agent
        reads none.
    """

    key: Array
    carry: Carry
    tokens: Array | None = None
    instruction: Array | None = None


class Policy:
    """An agent's actions on B environments, one step at a time.

    An instruction is encoded where it is new and remembered; where the parameters are new, all are.
    """

    def __init__(self, agent: Agent, greedy: bool = False):
        self._agent, self._greedy = agent, greedy
        self._step: Any = jax.jit(self._act)

    def start(self, batch: int, key: Array) -> Acting:
        """Before the first step of B episodes."""
        carry = self._agent.initial_carry(batch)
        if not is_instructed(self._agent):
            return Acting(key, carry)
        tokens = self._agent.spec.observation['instruction']
        return Acting(
            key,
            carry,
            jnp.zeros((batch, *tokens.shape), tokens.dtype),
            jnp.zeros((batch, InstructionEncoder.hidden)),
        )

    def __call__(
        self, params: Any, acting: Acting, inputs: Inputs, new: bool = False
    ) -> tuple[Acting, Array, Array]:
        """The next actions on inputs [B, …], and their log-probabilities, [B].

        Args:
          params: of the agent.
          acting: after the step before.
          inputs: what the agent sees.
          new: whether these are not the parameters of the step before.
        """
        return self._step(params, acting, inputs, new)

    def _act(
        self, params: Any, acting: Acting, inputs: Inputs, new: Array
    ) -> tuple[Acting, Array, Array]:
        key, of_actions = jax.random.split(acting.key)
        tokens, instruction = acting.tokens, acting.instruction
        if tokens is not None and instruction is not None:
            observation = dict(inputs.observation)
            encode = functools.partial(encode_instruction, self._agent, params)
            before, tokens = tokens, observation['instruction']
            outdated = inputs.is_first | new | (tokens != before).any(-1)
            instruction = _refreshed(encode, tokens, instruction, outdated)
            observation['instruction'] = instruction
            inputs = inputs._replace(observation=observation)
        carry, action, log_prob = act(
            self._agent, params, acting.carry, inputs, of_actions, self._greedy
        )
        return Acting(key, carry, tokens, instruction), action, log_prob


def _refreshed(
    encode: Callable[[Array], Array], tokens: Array, encoded: Array, outdated: Array
) -> Array:
    """encode(tokens) in the outdated rows, the encoding that is there in the others.

    Up to an eighth of the rows are taken out and encoded alone, all of them where it is more.
    """
    B = len(tokens)
    few = -(-B // 8)

    def some() -> Array:
        rows = jnp.nonzero(outdated, size=few, fill_value=B)[0]
        return encoded.at[rows].set(encode(tokens.at[rows].get(mode='clip')), mode='drop')

    return jax.lax.cond(outdated.sum() <= few, some, lambda: encode(tokens).astype(encoded.dtype))


class Worker:
    """Groups of environments under one policy.

    Args:
      groups: batches of environments, which it closes; two let simulation and policy overlap.
      policy: of that agent; the workers of one process share it.
      length: T.
      key: random key of the actions.
    """

    def __init__(
        self,
        groups: Sequence[HostEnvironment],
        policy: Policy,
        length: int,
        key: Array,
    ):
        self._environments, self._length = groups, length
        keys = jax.random.split(key, len(groups))
        self._groups = [_Group(g, policy, k) for g, k in zip(groups, keys, strict=True)]

    def collect(self, params: Any) -> list[tuple[Trajectory, Episodes]]:
        """The next T transitions of each group, NumPy, and the episodes that ended in them."""
        for group in self._groups:
            group.begin()
        for _ in range(self._length):
            for group in self._groups:
                group.receive()
                group.send(params)
        for group in self._groups:
            group.receive()
        return [group.take() for group in self._groups]

    def close(self) -> None:
        for environment in self._environments:
            environment.close()


class _Group:
    """A batch of environments, and what a trajectory of it has so far."""

    def __init__(self, environment: HostEnvironment, policy: Policy, key: Array):
        self._environment, self._policy = environment, policy
        B = environment.batch
        self._acting = policy.start(B, key)
        self._step: Step = environment.reset()
        check_step(environment.spec, B, self._step)
        check_finite(environment.spec, self._step)
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
        self._first_carry, self._new = self._acting.carry, True

    def receive(self) -> None:
        """The next row of the inputs: what the action sent before led to."""
        if self._sent:
            before, after = self._step, self._environment.recv()
            self._sent = False
            check_finite(self._environment.spec, after)
            self._discounts.append(np.asarray(after.discount, np.float32))
            self._valid.append(~np.asarray(before.is_last))
            self._count(before, after)
            self._step = after
        step = self._step
        row: Any = step.observation, self._action, step.reward, step.is_first
        self._rows.append(jax.tree.map(np.array, Inputs(*row)))  # a copy

    def send(self, params: Any) -> None:
        """The action on the newest row."""
        self._acting, action, log_prob = self._policy(
            params, self._acting, self._rows[-1], self._new
        )
        self._new = False
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
