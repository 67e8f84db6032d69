"""What an environment is to the agent: its spec, and what comes back from a step.

Two kinds of environment, one convention. A `JaxEnvironment` is pure functions of one environment,
vmapped and jitted by the caller; a `HostEnvironment` is a batch of them on the host, in NumPy.

Time: `Step.reward` and `Step.discount` belong to the action that led here, `Step.observation` is
what it led to. A new episode starts by itself, in one of two ways:

- at once (every `JaxEnvironment`): the step that ends an episode has its reward, discount 0, and
  the first observation of the next episode, `is_first`. The last observation is never seen, so that
  an episode cut by its time limit counts as ended;
- one step later (pools of the host): the step that ends an episode has its last observation, and
  discount 0 only if it was not cut by the time limit; the action that follows is ignored, leads to
  the first observation of the next one, `is_first`, with reward 0, and is no transition: the
  learner leaves it out. `is_last` of the step before says so.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

Observation = Mapping[str, Any]  # name → array, as in Spec.observation


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, and so it has a hash
class Spec:
    """What does not change between steps.

    Attributes:
      name: of the environment, as 'xland'.
      observation: name → shape and dtype of one observation's entries. 'grid' [h, w, layers] are
        small integers, each layer a category below `categories`; 'pixels' [h, w, c] uint8;
        'features' [n] float32; 'task' [] int32, the index into `tasks`; 'instruction' [L] int32,
        tokens below `vocabulary`, 0 for padding.
      actions: number of actions.
      tasks: name of each task, by index.
      random, reference: score of each task of the uniform random policy, and of what is reached at
        best (a human, a solved task); None where unknown. Scores are episode returns.
      sources: where those come from, in words.
      categories: of each layer of 'grid'.
      vocabulary: number of tokens of 'instruction', padding included; 0 if there is none.
      words: of the tokens 1, 2, …; empty where they are not known.
      episode: most steps of an episode.
      has_success: whether `Step.success` says anything; False where the environment has no goal, so
        that its success is unknown, not 0.
    """

    name: str
    observation: Mapping[str, jax.ShapeDtypeStruct]
    actions: int
    tasks: tuple[str, ...]
    random: tuple[float, ...] | None = None
    reference: tuple[float, ...] | None = None
    sources: str = ''
    categories: tuple[int, ...] = ()
    vocabulary: int = 0
    words: tuple[str, ...] = ()
    episode: int = 0
    has_success: bool = True


class Step(NamedTuple):
    """What an action led to; arrays of one environment, or [B, …] of a batch.

    Attributes:
      observation: name → array.
      reward: float32, of the action that led here; 0 at the start.
      discount: float32, 0 where the episode ended and 1 elsewhere; the learner multiplies by γ.
      is_first: whether the observation is the first of an episode.
      is_last: whether the next action is ignored; never true where episodes start at once.
      success: whether the episode that the action ended reached its goal; False elsewhere.
    """

    observation: Observation
    reward: Any
    discount: Any
    is_first: Any
    is_last: Any
    success: Any


class JaxEnvironment(Protocol):
    """One environment as pure functions; the state is a pytree of arrays, its random key inside."""

    spec: Spec

    def reset(self, key: jax.Array, task: jax.Array) -> tuple[Any, Step]:
        """A new episode of a task (an index); episodes that follow draw their tasks themselves."""
        ...

    def step(self, state: Any, action: jax.Array) -> tuple[Any, Step]: ...


class HostEnvironment(Protocol):
    """B environments on the host, stepped together; each row keeps its task for ever."""

    spec: Spec
    batch: int

    def reset(self) -> Step:
        """The first observation of every row; [B, …]."""
        ...

    def send(self, actions: np.ndarray) -> None:
        """Starts a step of all rows, int32 [B]; returns at once where the simulator allows it."""
        ...

    def recv(self) -> Step:
        """Waits for the step that was sent."""
        ...

    def close(self) -> None: ...


class SkipsRows(HostEnvironment, Protocol):
    """A `HostEnvironment` that can leave rows alone: evaluation steps those that still play."""

    def skip(self, rows: np.ndarray) -> None:
        """Leave the rows, bool [B], alone until `reset`, from the next `send` on.

        What `recv` says of them is their last observation, reward 0 and discount 1.
        """
        ...
