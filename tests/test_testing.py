"""The checks of `mi.testing` accept our modules and refuse modules with one fault each."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi import FUSIONS, cells, fusion, testing
from mi.cells import CELLS
from mi.rl.envs import HOST, JAX
from mi.rl.envs.jax.batched import Batched
from mi.rl.envs.jax.catch import Catch

OPTIONS = {'rank': 4, 'hidden': 12}


# The properties that it checks are those of test_fusion, which checks them of every name.
@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=() if name in ('none', 'multi_head') else pytest.mark.slow)
        for name in FUSIONS
    ],
)
def test_every_fusion_passes(name):
    testing.check_fusion(
        fusion.get(name, **OPTIONS),
        is_one_hot=name in fusion.ONE_HOT,
        uses_context=name != 'none',
    )


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=() if name in ('lstm', 'mi_lstm') else pytest.mark.slow)
        for name in CELLS
    ],
)
def test_every_cell_passes(name):
    testing.check_cell(cells.get(name))


@pytest.mark.parametrize('name', JAX)
def test_every_environment_in_jax_passes(name):
    testing.check_environment(JAX[name](''))


def test_environments_of_the_host_pass():
    testing.check_host_environment(HOST['gymnasium'], 'CartPole-v1', num_rows=3)


class FaultyFusion(nn.Module):
    """A gate with one fault."""

    features: int
    fault: str = ''
    dtype: Any = None

    @nn.compact
    def __call__(self, x, z):
        dtype = None if self.fault == 'dtype' else self.dtype
        gate = nn.Dense(self.features, dtype=dtype)(z)
        if self.fault == 'shape' and x.ndim > z.ndim:
            return gate
        if self.fault == 'shared x':
            gate = jnp.broadcast_to(gate, (*x.shape[:-1], self.features))
        y = nn.sigmoid(gate) * nn.Dense(self.features, dtype=dtype)(x)
        if self.fault == 'rows':
            y = y - y.mean(axis=0)
        if self.fault == 'gradient':
            y = nn.Dense(self.features, dtype=dtype)(x) + 0 * gate
        if self.fault == 'unused':
            self.param('unused', nn.initializers.ones, (1,))
        if self.fault == 'nan':
            y = y + jnp.where(z[..., :1] > 9, 1, jnp.sqrt(jnp.abs(0 * x[..., :1])))
        return y


def test_modules_with_no_fault_pass():
    testing.check_fusion(FaultyFusion)
    testing.check_cell(FaultyCell)
    testing.check_host_environment(make_faulty_pool, num_steps=30)


@pytest.mark.parametrize(
    ('fault', 'message'),
    [
        ('shape', r'expected y \(2, 5, 18\)'),
        ('rows', 'vmap'),
        ('gradient', 'gradient of'),
        ('unused', 'gradient of parameter .*unused.* is zero'),
        ('nan', 'not finite'),
        ('dtype', 'y is float32'),
    ],
)
def test_a_faulty_fusion_is_refused(fault, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_fusion(functools.partial(FaultyFusion, fault=fault))


def test_a_fusion_that_cannot_share_x_is_refused():
    with pytest.raises(ValueError, match=r'Incompatible .* for broadcasting'):
        testing.check_fusion(functools.partial(FaultyFusion, fault='shared x'))


class FaultyCell(nn.Module):
    """A plain recurrent cell with one fault."""

    features: int
    fault: str = ''

    @nn.compact
    def __call__(self, carry, x, reset=None, keep=None):
        W, U = nn.Dense(self.features), nn.Dense(self.features, use_bias=False)
        reset = jnp.zeros(x.shape[:2], bool) if reset is None else reset
        if self.fault == 'future':
            x = x + x[-1:]
        if self.fault == 'rows':
            x = x - x.mean(axis=1, keepdims=True)
        (unused, hidden), outputs = carry, []
        if self.fault == 'reset of all':
            reset = jnp.broadcast_to(reset.any(axis=1, keepdims=True), reset.shape)
        for step, (x_t, reset_t) in enumerate(zip(x, reset, strict=True)):
            if self.fault != 'reset':
                hidden = jnp.where(reset_t[:, None], 0.0, hidden)
            if keep is not None and not (
                self.fault == 'keep' or (self.fault == 'keep at first' and step > 0)
            ):
                hidden = hidden * keep
            hidden = jnp.tanh(W(x_t) + U(hidden))
            outputs.append(hidden)
        if self.fault == 'carry':
            hidden = outputs[0]
        if self.fault == 'types':
            hidden = hidden.astype(jnp.bfloat16)
        return (unused, hidden), jnp.stack(outputs)

    def initial(self, batch):
        return cells.initial_carry(batch, self.features)


@pytest.mark.parametrize(
    ('fault', 'message'),
    [
        ('future', 'two halves'),
        ('rows', 'a row by itself'),
        ('reset', 'after a reset'),
        ('reset of all', 'without a reset of another row'),
        ('keep', 'h with keep'),
        ('keep at first', 'h with keep'),
        ('carry', 'two halves'),
        ('types', 'carry with the types'),
    ],
)
def test_a_faulty_cell_is_refused(fault, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_cell(functools.partial(FaultyCell, fault=fault))


class FaultyCatch(Catch):
    """Catch with one fault."""

    fault = ''

    def step(self, state, action):
        state, transition = super().step(state, action)
        if self.fault == 'endless':
            no = jnp.zeros((), bool)
            transition = transition._replace(terminated=no, truncated=no)
        if self.fault == 'reward':
            transition = transition._replace(reward=transition.reward / 0.0)
        if self.fault == 'task':
            task = transition.observation['task']
            other = {'task': (task + 1) % max(2, len(self.spec.tasks))}
            transition = transition._replace(observation=dict(transition.observation) | other)
        return state, transition


@pytest.mark.parametrize(
    ('fault', 'message'),
    [
        ('endless', 'to end within'),
        ('reward', 'finite rewards'),
        ('task', "observation\\['task'\\]"),
    ],
)
def test_a_faulty_environment_is_refused(fault, message):
    environment = JAX['catch']('')
    environment.__class__ = type('Faulty', (FaultyCatch,), {'fault': fault})
    with pytest.raises(AssertionError, match=message):
        testing.check_environment(environment)


class FaultyPool(Batched):
    """Rows of Catch on the host with one fault."""

    fault = ''

    def recv(self):
        step = super().recv()
        if self.fault == 'overwrites':
            step = step._replace(reward=self._reward(step))
        if self.fault == 'random':
            step = step._replace(reward=np.random.default_rng().random(self.batch, np.float32))
        if self.fault == 'first':
            step = step._replace(is_first=np.ones(self.batch, bool), is_last=step.is_first)
        if self.fault == 'discount':
            step = step._replace(discount=np.full(self.batch, 0.5, np.float32))
        return step

    @functools.cached_property
    def _buffer(self):
        return np.zeros(self.batch, np.float32)

    def _reward(self, step):
        self._buffer += 1
        return self._buffer


def make_faulty_pool(suite, *, batch, seed, fault=''):
    pool = FaultyPool(JAX['catch'](suite), batch, seed)
    pool.fault = fault
    return pool


@pytest.mark.parametrize(
    ('fault', 'message'),
    [
        ('overwrites', 'overwrote'),
        ('random', 'two pools with the same seed|expected reward 0'),
        ('discount', 'discounts 0 or 1'),
    ],
)
def test_a_faulty_pool_is_refused(fault, message):
    make = functools.partial(make_faulty_pool, fault=fault)
    with pytest.raises(AssertionError, match=message):
        testing.check_host_environment(make, num_steps=30)


def test_parameters_that_start_at_zero_are_drawn():
    variables = testing.randomize(nn.Dense(3), jnp.zeros((1, 2)))
    assert all(bool((leaf != 0).all()) for leaf in jax.tree.leaves(variables))
