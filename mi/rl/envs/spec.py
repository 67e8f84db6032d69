"""The interface of environments: their spec, and the results of a step.

There are two kinds of environment. A `JaxEnvironment` consists of pure functions of one
environment, which the caller vmaps and compiles. A `HostEnvironment` is a batch of environments on
the host, in NumPy.

A config names an environment 'package.module:maker', so Python must be able to import the module:
from the directory of the command, or by PYTHONPATH.

A `JaxEnvironment` plays one episode. It reports how the episode ended and returns its last
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

Actors and learner see a stream of episodes, which consists of `Step`s. `Step.reward` and
`Step.discount` belong to the previous action, and `Step.observation` is its result. A new episode
begins in one of two ways, and a stream may use both:

- with the step that ends an episode: it has the episode's last reward, discount 0, and the first
  observation of the next episode, `is_first`. The last observation is never seen, so this is only
  for episodes that terminate. Every `JaxEnvironment` restarts this way after `terminated`;
- one step later: the step that ends the episode, `is_last`, has the last observation, and discount
  0 if the episode terminated, 1 if it was truncated. The action that follows is ignored. It leads
  to the first observation of the next episode, `is_first`, with reward 0, and is not a transition:
  the learner leaves it out and bootstraps from the last observation. Every `JaxEnvironment`
  restarts this way after `truncated`, and so do most pools of the host.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import chex
import jax
import numpy as np

Observation = Mapping[str, chex.Array]  # name → array, as in Spec.observation


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, and so it has a hash
class Spec:
    """The constants of an environment.

    Attributes:
      name: name of the environment, as 'xland'.
      observation: name → shape and dtype of one observation's entries. 'grid' [h, w, layers] are
        small integers, each layer a category below `categories`; 'pixels' [h, w, c] uint8;
        'features' [n] float32; 'task' [] int32, the index into `tasks`; 'instruction' [L] int32,
        tokens below `vocabulary`, 0 for padding. 'task' is required, and at least one of 'grid',
        'pixels' and 'features'.
      actions: number of actions.
      tasks: name of each task, by index.
      random, reference: mean episode return for each task of the uniform random policy, and of a
        reference (a human, a solved task); None if unknown.
      sources: sources of these scores, as text.
      categories: number of categories of each layer of 'grid'.
      vocabulary: number of tokens of 'instruction', padding included; 0 if there is none.
      words: words of the tokens 1, 2, …; empty if unknown.
      episode: most steps of an episode, after which it has terminated or been truncated. Required
        of a `JaxEnvironment`, because its evaluation is one compiled program; otherwise 0 means
        unknown.
      has_success: whether the environment defines success. If not, success is unknown, not 0.
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
    """The result of an action in a `JaxEnvironment`; arrays of one environment.

    Attributes:
      observation: name → array, of the next state; the episode's last observation if it ended.
      reward: float32.
      terminated: bool, whether the episode ended by its rules, so that no reward can follow.
      truncated: bool, whether the episode was cut although it could continue, as by a time limit.
        An episode that is both has terminated.
      success: bool, whether the episode reached its goal; only read at its end.
    """

    observation: Observation
    reward: chex.Array
    terminated: chex.Array
    truncated: chex.Array | bool = False
    success: chex.Array | bool = False


class Step(NamedTuple):
    """One step of a stream of episodes; arrays of one environment, or [B, …] of a batch.

    Attributes:
      observation: name → array.
      reward: float32, of the previous action; 0 at the start.
      discount: float32, 0 if the episode terminated and 1 otherwise; the learner multiplies it by
        γ.
      is_first: whether the observation is the first of an episode.
      is_last: whether the observation is the last of an episode and the next action is ignored.
      success: whether the previous action ended an episode that reached its goal.
    """

    observation: Observation
    reward: chex.Array
    discount: chex.Array
    is_first: chex.Array
    is_last: chex.Array
    success: chex.Array


class JaxEnvironment(Protocol):
    """One episode as pure functions; reset and step return states of the same structure and types.

    After the last step of an episode `step` may be called again; the result is dropped.
    """

    spec: Spec

    def reset(self, key: jax.Array, task: jax.Array) -> tuple[chex.ArrayTree, Observation]:
        """Return state and first observation of a new episode of a task, its index int32 []."""
        ...

    def step(self, state: chex.ArrayTree, action: jax.Array) -> tuple[chex.ArrayTree, Transition]:
        """Return the state after an action, int32 [], and its result."""
        ...


class HostEnvironment(Protocol):
    """B environments on the host, stepped together; each row keeps its task."""

    spec: Spec
    batch: int

    def reset(self) -> Step:
        """Return the first step of every row, [B, …]."""
        ...

    def send(self, actions: np.ndarray) -> None:
        """Start a step of all rows, int32 [B]; return immediately if the simulator can."""
        ...

    def recv(self) -> Step:
        """Wait for the step that was sent, and return it."""
        ...

    def close(self) -> None: ...


class SkipsRows(HostEnvironment, Protocol):
    """A `HostEnvironment` that can skip rows, for evaluation."""

    def skip(self, rows: np.ndarray) -> None:
        """Leave the rows, bool [B], alone until `reset`, from the next `send` on.

        For these rows `recv` returns their last observation, reward 0 and discount 1.
        """
        ...
