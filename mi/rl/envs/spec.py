"""What an environment is to the agent: its spec, and what comes back from a step.

There are two kinds of environment. A `JaxEnvironment` is pure functions of one environment, which
the caller vmaps and compiles; a `HostEnvironment` is a batch of environments on the host, in NumPy.

A `JaxEnvironment` plays one episode. It says how the episode ended and returns its last
observation; `mi.rl.envs.auto_reset` begins the next episode:

    def step(self, state, action):
        x = state.x + action
        state = State(x, state.time + 1)
        return state, Transition(
            observation={'features': x[None], 'task': jnp.int32(0)},
            reward=-jnp.abs(x),
            terminated=x > 1,               # by the rules: nothing follows, the value is 0
            truncated=state.time == LIMIT,  # cut: the value is that of the last observation
        )

A stream of episodes, which actors and learner see, consists of `Step`s. `Step.reward` and
`Step.discount` belong to the action that led there, `Step.observation` is what it led to. A new
episode begins in one of two ways, and a stream may use both:

- with the step that ends an episode: it has the episode's last reward, discount 0, and the first
  observation of the next episode, `is_first`. The last observation is never seen, so this is only
  for episodes that terminate. Every `JaxEnvironment` restarts this way after `terminated`;
- one step later: the step that ends the episode, `is_last`, has the last observation, and discount
  0 if the episode terminated, 1 if it was truncated. The action that follows is ignored. It leads
  to the first observation of the next episode, `is_first`, with reward 0, and is no transition: the
  learner leaves it out and bootstraps from the last observation. Every `JaxEnvironment` restarts
  this way after `truncated`, and so do most pools of the host.
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
      episode: most steps of an episode, after which it has terminated or been truncated. A
        `JaxEnvironment` has to give it, because its evaluation is one compiled program; elsewhere 0
        means unknown.
      has_success: whether the success of a step says anything; False where the environment has no
        goal, so that its success is unknown, not 0.
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


class Transition(NamedTuple):
    """What an action led to in a `JaxEnvironment`; arrays of one environment.

    Attributes:
      observation: name → array, of the state that the action led to; the last one of the episode
        where it ended.
      reward: float32.
      terminated: bool, whether the episode ended by its rules, so that no reward can follow.
      truncated: bool, whether it was cut although it could continue, as by a time limit. An episode
        that is both has terminated.
      success: bool, whether the episode reached its goal; read where it ended.
    """

    observation: Observation
    reward: Any
    terminated: Any
    truncated: Any = False
    success: Any = False


class Step(NamedTuple):
    """One step of a stream of episodes; arrays of one environment, or [B, …] of a batch.

    Attributes:
      observation: name → array.
      reward: float32, of the action that led here; 0 at the start.
      discount: float32, 0 where the episode terminated and 1 elsewhere; the learner multiplies it
        by γ.
      is_first: whether the observation is the first of an episode.
      is_last: whether the observation is the last of an episode and the next action is ignored.
      success: whether the episode that the action ended reached its goal; False elsewhere.
    """

    observation: Observation
    reward: Any
    discount: Any
    is_first: Any
    is_last: Any
    success: Any


class JaxEnvironment(Protocol):
    """One episode as pure functions; the state is a pytree of arrays, alike after reset and step.

    After the last step of an episode `step` may be called again; the result is dropped.
    """

    spec: Spec

    def reset(self, key: jax.Array, task: jax.Array) -> tuple[Any, Observation]:
        """The state and first observation of a new episode of a task, int32 [], an index."""
        ...

    def step(self, state: Any, action: jax.Array) -> tuple[Any, Transition]:
        """The state after an action, int32 [], and what it led to."""
        ...


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
