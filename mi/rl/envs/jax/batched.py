"""A batch of JAX environments as a `HostEnvironment`, for the topologies with actors."""

import functools

import jax
import numpy as np

from mi.rl.envs import auto_reset
from mi.rl.envs.spec import JaxEnvironment, Step


class Batched:
    """A `HostEnvironment` made of B copies of a `JaxEnvironment`.

    The first tasks are assigned evenly to the rows.

    Args:
      environment: the environment to copy.
      batch: number of copies, B.
      seed: seed for all random numbers.
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
        """Do nothing, because there is nothing to release."""
