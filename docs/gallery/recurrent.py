"""Recurrent models: Flax's LSTM cells, Haiku's IMPALA agent, RG-LRU in Flax, Mamba in Equinox."""

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import linen as nn

from docs.gallery.attention import Built, build_haiku, describe_array

# ------------------------------------------------------------------------------ Flax


def build_flax_lstm() -> Built:
    """Build Flax's LSTM with 256 units, on sequences of 100 steps."""
    return _build_rnn(nn.OptimizedLSTMCell(256), describe_array(32, 100, 128))


def build_flax_conv_lstm() -> Built:
    """Build Flax's convolutional LSTM, on 10 frames of 16 × 16."""
    return _build_rnn(nn.ConvLSTMCell(64, (3, 3)), describe_array(8, 10, 16, 16, 32))


def _build_rnn(cell: Any, x: jax.ShapeDtypeStruct) -> Built:
    layer = nn.RNN(cell)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    return (lambda variables, x: layer.apply(variables, x)), variables, {'x': x}


# ------------------------------------------------------------------------------ IMPALA


class ResidualBlock(hk.Module):
    """A residual block, x + Conv(relu(Conv(relu(x))))."""

    def __call__(self, x: jax.Array) -> jax.Array:
        y = hk.Conv2D(x.shape[-1], 3)(jax.nn.relu(x))
        return x + hk.Conv2D(x.shape[-1], 3)(jax.nn.relu(y))


class Torso(hk.Module):
    """The deep network of IMPALA, for frames with values from 0 to 255."""

    def __call__(self, frames: jax.Array) -> jax.Array:
        x = frames / 255.0
        for channels in (16, 32, 32):
            x = hk.Conv2D(channels, 3)(x)
            x = hk.max_pool(x, (1, 3, 3, 1), (1, 2, 2, 1), 'SAME')
            x = ResidualBlock()(ResidualBlock()(x))
        return jax.nn.relu(hk.Linear(256)(hk.Flatten()(jax.nn.relu(x))))


def build_impala() -> Built:
    """Build IMPALA's unroll of 20 steps in 32 Atari environments with 18 actions."""

    def unroll(frames: jax.Array, is_first: jax.Array, carry: Any) -> tuple[jax.Array, jax.Array]:
        x = hk.BatchApply(Torso())(frames)
        outputs, _ = hk.dynamic_unroll(hk.ResetCore(hk.LSTM(256)), (x, is_first), carry)
        return hk.Linear(18)(outputs), hk.Linear(1)(outputs)

    hidden = describe_array(32, 256)
    return build_haiku(
        unroll,
        frames=describe_array(20, 32, 84, 84, 4),
        is_first=describe_array(20, 32, dtype=jnp.bool_),
        carry=hk.LSTMState(hidden=hidden, cell=hidden),
    )


# ------------------------------------------------------------------------------ RG-LRU


class BlockDiagonal(nn.Module):
    """An affine map with a separate matrix for each block of features."""

    blocks: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = x.shape[-1] // self.blocks
        kernel = self.param('kernel', nn.initializers.normal(), (self.blocks, size, size))
        bias = self.param('bias', nn.initializers.zeros, (self.blocks, size))
        blocks = x.reshape(*x.shape[:2], self.blocks, size)
        return (jnp.einsum('bthi,hij->bthj', blocks, kernel) + bias[None, None]).reshape(x.shape)


class RGLRU(nn.Module):
    """The real-gated linear recurrent unit, with the constant c = 8."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        decay = self.param('decay', nn.initializers.normal(), x.shape[-1:])
        i = nn.sigmoid(BlockDiagonal(self.heads, name='input_gate')(x))
        r = nn.sigmoid(BlockDiagonal(self.heads, name='recurrence_gate')(x))
        log_a = -8.0 * r * nn.softplus(decay)[None, None]
        a, inputs = jnp.exp(log_a), jnp.sqrt(1 - jnp.exp(2 * log_a)) * (i * x)

        def step(h: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            a_t, x_t = pair
            h = a_t * h + x_t
            return h, h

        pairs = jax.tree.map(lambda array: array.swapaxes(0, 1), (a, inputs))
        return jax.lax.scan(step, jnp.zeros_like(x[:, 0]), pairs)[1].swapaxes(0, 1)


class RecurrentBlock(nn.Module):
    """The recurrent block of Griffin."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.gelu(nn.Dense(self.width, name='gate')(x))
        x = nn.Dense(self.width, name='input')(x)
        x = nn.Conv(self.width, (4,), feature_group_count=self.width, padding='CAUSAL')(x)
        return nn.Dense(x.shape[-1], name='output')(RGLRU(self.heads, name='rg_lru')(x) * y)


def build_rg_lru() -> Built:
    """Build a recurrent block of width 2560, on 1024 tokens."""
    block, x = RecurrentBlock(2560, heads=10), describe_array(1, 1024, 2560)
    variables = jax.eval_shape(block.init, jax.random.key(0), x)
    return (lambda variables, x: block.apply(variables, x)), variables, {'x': x}


# ------------------------------------------------------------------------------ Mamba


class Mamba(eqx.Module):
    """Mamba's block of convolution, selective scan and gate, for a sequence x [T, 768]."""

    expand: eqx.nn.Linear
    convolve: eqx.nn.Conv1d
    select: eqx.nn.Linear
    expand_delta: eqx.nn.Linear
    log_A: jax.Array
    D: jax.Array
    contract: eqx.nn.Linear
    state: int = eqx.field(static=True, default=16)
    rank: int = eqx.field(static=True, default=48)

    def __init__(self, features: int = 768, width: int = 4):
        keys, inner = jax.random.split(jax.random.key(0), 5), 2 * features
        self.expand = eqx.nn.Linear(features, 2 * inner, use_bias=False, key=keys[0])
        self.convolve = eqx.nn.Conv1d(
            inner, inner, width, padding=width - 1, groups=inner, key=keys[1]
        )
        self.select = eqx.nn.Linear(inner, self.rank + 2 * self.state, False, key=keys[2])
        self.expand_delta = eqx.nn.Linear(self.rank, inner, key=keys[3])
        self.log_A, self.D = jnp.zeros((inner, self.state)), jnp.ones(inner)
        self.contract = eqx.nn.Linear(inner, features, use_bias=False, key=keys[4])

    def __call__(self, x: jax.Array) -> jax.Array:
        u, gate = jnp.split(jax.vmap(self.expand)(x), 2, axis=-1)
        u = jax.nn.silu(self.convolve(u.T)[:, : len(x)].T)
        selected = jax.vmap(self.select)(u)
        delta, B, C = jnp.split(selected, [self.rank, self.rank + self.state], axis=-1)
        delta = jax.nn.softplus(jax.vmap(self.expand_delta)(delta))
        decay = jnp.exp(delta[..., None] * -jnp.exp(self.log_A)[None])
        inputs = (delta * u)[..., None] * B[:, None, :]

        def step(h: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            decay_t, input_t, C_t = now
            h = decay_t * h + input_t
            return h, h @ C_t

        _, y = jax.lax.scan(step, jnp.zeros_like(self.log_A), (decay, inputs, C))
        return jax.vmap(self.contract)((y + self.D[None] * u) * jax.nn.silu(gate))


def build_mamba() -> Built:
    """Build a block of Mamba-130M, on 1024 tokens."""
    model = eqx.filter_eval_shape(Mamba)
    return (lambda model, x: model(x)), model, {'x': describe_array(1024, 768)}
