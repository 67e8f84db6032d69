"""Catch on the host in NumPy, whose episodes start one step later, and an agent that knows it."""

import jax.numpy as jnp
import numpy as np

from mi.rl.agent import Outputs
from mi.rl.envs.jax.catch import COLUMNS, ROWS, Catch
from mi.rl.envs.spec import Step

GAMMA = 0.9


class Knows:
    """Stays where it is, and knows the exact value of doing so; 0 once the ball has landed."""

    spec = Catch.spec

    def initial_carry(self, batch):
        return {'count': jnp.zeros((batch, 2))}

    def apply(self, variables, carry, inputs):
        grid = inputs.observation['grid'][..., 0]
        ball = grid.at[..., ROWS - 1, :].set(0)
        row = ball.any(-1).argmax(-1)
        caught = ball.any(-2).argmax(-1) == 2  # where the paddle starts and stays
        value = GAMMA ** (ROWS - 2 - row) * jnp.where(caught, 1.0, -1.0)
        value = jnp.where(ball.any((-1, -2)), value, 0.0)
        logits = jnp.broadcast_to(jnp.array([-1e9, 0, -1e9]).reshape(1, 1, 3), (*row.shape, 3))
        return {'count': carry['count'] + 1}, Outputs(logits, value)


class CatchLate:
    """A `HostEnvironment`: the ball is shown where it lands, and the action there is ignored."""

    def __init__(self, batch=4, seed=0, fails_at=None, hangs_at=None):
        self.spec, self.batch = Catch.spec, batch
        self._rng = np.random.default_rng(seed)
        self._fails_at, self._hangs_at, self._steps = fails_at, hangs_at, 0
        self.closed = False

    def reset(self):
        self._row = np.zeros(self.batch, int)
        self._column = self._rng.integers(0, COLUMNS, self.batch)
        self._paddle = np.full(self.batch, COLUMNS // 2)
        zero, no = np.zeros(self.batch, np.float32), np.zeros(self.batch, bool)
        return Step(self._seen(), zero, zero + 1, ~no, no, no)

    def send(self, actions):
        self._actions = actions

    def recv(self):
        self._steps += 1
        if self._steps == self._fails_at:
            raise RuntimeError('the ball is lost')
        if self._steps == self._hangs_at:
            import time

            time.sleep(3600)
        over = self._row == ROWS - 1
        self._row = np.where(over, 0, self._row + 1)
        self._paddle = np.clip(self._paddle + np.where(over, 0, self._actions - 1), 0, COLUMNS - 1)
        self._paddle[over] = COLUMNS // 2
        self._column[over] = self._rng.integers(0, COLUMNS, over.sum())
        ends = self._row == ROWS - 1
        caught = ends & (self._paddle == self._column)
        reward = np.where(ends, np.where(caught, 1.0, -1.0), 0.0).astype(np.float32)
        return Step(self._seen(), reward, 1 - ends.astype(np.float32), over, ends, caught)

    def close(self):
        self.closed = True

    def _seen(self):
        grid = np.zeros((self.batch, ROWS, COLUMNS, 1), np.int32)
        rows = np.arange(self.batch)
        grid[rows, self._row, self._column] = 1
        grid[rows, ROWS - 1, self._paddle] = 1
        return {'grid': grid, 'task': np.zeros(self.batch, np.int32)}
