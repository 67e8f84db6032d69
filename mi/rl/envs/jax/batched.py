"""A `HostEnvironment` made of B rows of a `JaxEnvironment`, for actors with a queue."""

import functools

import jax
import numpy as np

from mi.rl.envs import auto_reset
from mi.rl.envs.spec import JaxEnvironment, Step


class Batched:
    """B rows of a `JaxEnvironment`, with evenly assigned first tasks.

    Args:
      environment: pure functions of one row.
      batch: B.
      seed: seed of everything random.
    """

    def __init__(self, environment: JaxEnvironment, batch: int, seed: int):
        self.spec, self.batch, self._seed = environment.spec, batch, seed
        reset = functools.partial(auto_reset.reset, environment)
        step = functools.partial(auto_reset.step, environment)
        self._reset = jax.jit(jax.vmap(reset))
        self._step = jax.jit(jax.vmap(step), donate_argnums=0)
        self._state: auto_reset.StreamState | None = None
        self._result: Step | None = None

    def reset(self) -> Step:
        keys = jax.random.split(jax.random.key(self._seed), self.batch)
        tasks = np.arange(self.batch, dtype=np.int32) % len(self.spec.tasks)
        self._state, self._result = self._reset(keys, tasks)
        return self.recv()

    def send(self, actions: np.ndarray) -> None:
        self._state, self._result = self._step(self._state, actions)

    def recv(self) -> Step:
        assert self._state is not None, 'call reset first'
        auto_reset.check_length(self.spec, int(np.max(self._state.length)))
        return jax.tree.map(np.asarray, self._result)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""
