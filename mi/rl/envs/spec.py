"""The interface of environments: their spec, and the results of a step.

There are two kinds of environment. A `JaxEnvironment` consists of pure functions of one
environment, which the caller vmaps and compiles. A `HostEnvironment` is a batch of environments on
the host, in NumPy.

A config can name an environment 'package.module:maker'. Python must be able to import this module,
either from the current directory or through PYTHONPATH.

A `JaxEnvironment` plays one episode. It reports how the episode ended and returns its last
observation, and `mi.rl.envs.auto_reset` begins the next episode:

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

- With the step that ends an episode. This step has the episode's last reward, discount 0, and the
  first observation of the next episode, with `is_first`. The last observation is never seen, so
  this is only for episodes that terminate. Every `JaxEnvironment` restarts this way after
  `terminated`.
- One step later. The step that ends the episode, with `is_last`, has the last observation, and
  discount 0 if the episode terminated or 1 if it was truncated. The next action is ignored, and
  leads to the first observation of the next episode, with `is_first` and reward 0. The learner
  skips this step and bootstraps from the last observation. Every `JaxEnvironment` restarts this way
  after `truncated`, and so do most host environments.
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
      name: name of the environment, such as 'xland'.
      observation: name → shape and dtype of the entries of an observation. 'grid' [h, w, layers]
        has integers, in each layer below its entry in `categories`; 'pixels' [h, w, c] is uint8;
        'features' [n] is float32; 'task' [] is an int32 index into `tasks`; 'instruction' [L] has
        int32 tokens below `vocabulary`, with 0 for padding. 'task' and at least one of 'grid',
        'pixels' and 'features' are required.
      actions: number of actions.
      tasks: name of each task, by index.
      random, reference: mean episode return in each task of the uniform random policy, and of a
        reference such as a human or an optimal policy, or None if unknown.
      sources: sources of these scores, as text.
      categories: number of categories of each layer of 'grid'.
      vocabulary: number of tokens of 'instruction', padding included, or 0 if there is none.
      words: words of the tokens 1, 2, …, empty if unknown.
      episode: maximum length of an episode, which must have terminated or been truncated by then.
        Required for a `JaxEnvironment`, because its evaluation is one compiled program. Otherwise
        0 means unknown.
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
    """The result of an action in one `JaxEnvironment`.

    Attributes:
      observation: name → array, the observation of the next state, or the last one if the episode
        ended.
      reward: float32, reward of the action.
      terminated: bool, whether the episode ended by its rules, so that no reward can follow.
      truncated: bool, whether the episode was cut although it could have continued, for example by
        a time limit. If both flags are set, the episode counts as terminated.
      success: bool, whether the episode reached its goal, only read when the episode ends.
    """

    observation: Observation
    reward: chex.Array
    terminated: chex.Array
    truncated: chex.Array | bool = False
    success: chex.Array | bool = False


class Step(NamedTuple):
    """One step of a stream of episodes, for one environment or a batch [B, …].

    Attributes:
      observation: name → array.
      reward: float32, reward of the previous action, or 0 at the start.
      discount: float32, 0 if the episode terminated and 1 otherwise. The learner multiplies it by
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
    """An environment that plays one episode, as pure functions.

    `reset` and `step` must return states of the same structure and types. `step` may be called
    again after the last step of an episode. The result is not used.
    """

    spec: Spec

    def reset(self, key: jax.Array, task: jax.Array) -> tuple[chex.ArrayTree, Observation]:
        """Begin an episode of a task, int32 [], and return its state and first observation."""
        ...

    def step(self, state: chex.ArrayTree, action: jax.Array) -> tuple[chex.ArrayTree, Transition]:
        """Return the state after an action, int32 [], and the result of the action."""
        ...


class HostEnvironment(Protocol):
    """A batch of B environments on the host, stepped together."""

    spec: Spec
    batch: int

    def reset(self) -> Step:
        """Return the first step of every row, [B, …]."""
        ...

    def send(self, actions: np.ndarray) -> None:
        """Start a step with actions int32 [B], and return immediately if the simulator can."""
        ...

    def recv(self) -> Step:
        """Wait for the step that was sent, and return it."""
        ...

    def close(self) -> None: ...


class SkipsRows(HostEnvironment, Protocol):
    """A `HostEnvironment` that can skip rows, for evaluation."""

    def skip(self, rows: np.ndarray) -> None:
        """Skip the rows marked in bool [B], from the next `send` until `reset`.

        For these rows `recv` returns their last observation, reward 0 and discount 1.
        """
        ...
