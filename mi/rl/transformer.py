"""A core with attention over the steps before: the gated Transformer-XL."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from mi.layers import Affine
from mi.motifs.attention import Attention

Carry = dict[str, Array]


class GatedTransformer(nn.Module):
    """Gated Transformer-XL (Parisotto et al., Stabilizing Transformers for RL, 2020), L layers.

        e = g(x, relu(attention(norm([memory, x]))))
        y = g(e, relu(A₂ relu(A₁ norm(e) + c₁) + c₂))

        g(x, y):   r = σ(W_r y + U_r x),   s = σ(W_s y + U_s x − b),   h = tanh(W_h y + U_h (r ⊙ x))
                   (1 − s) ⊙ x + s ⊙ h

    A step attends to itself and to the M steps before it, by relative positions, as far as they are
    of its episode: whether they are computed together or one at a time is the same. The gate starts
    almost closed, with b = 2, so that a fresh layer is close to x.

    Called like a cell of `mi.cells`; in the products of the gate x meets y, so it is a
    multiplicative interaction itself.

    Attributes:
      features: H.
      layers: L.
      heads: of the attention; they divide H.
      memory: M, steps.
      dtype: of the products; the memory is f32.
    """

    features: int
    layers: int = 2
    heads: int = 4
    memory: int = 32
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, carry: Carry, x: Array, reset: Array) -> tuple[Carry, Array]:
        """Memory [B, M, …], x [T, B, n], reset [T, B] → the memory after, h [T, B, H]."""
        T, M = reset.shape[0], self.memory
        x = Affine(self.features, self.dtype, name='input')(x).swapaxes(0, 1)  # [B, T, H]
        resets = reset.swapaxes(0, 1).astype(jnp.int32)
        # Episodes are numbered from 0 for what the memory holds of the current one; −1 is none.
        episode = jnp.concatenate([carry['there'] - 1, jnp.cumsum(resets, axis=1)], axis=1)
        distance = M + jnp.arange(T).reshape(-1, 1) - jnp.arange(M + T).reshape(1, -1)
        near = (distance >= 0) & (distance <= M)
        mask = near.reshape(1, T, M + T) & (episode[:, M:, None] == episode[:, None, :])
        inputs = []
        for i in range(self.layers):
            memory = carry['inputs'][:, :, i].astype(x.dtype)
            inputs.append(jnp.concatenate([memory, x], axis=1)[:, -M:])
            x = _Layer(self.heads, self.dtype, name=f'layer_{i}')(x, memory, mask)
        there = (episode[:, -M:] == episode[:, -1:]).astype(jnp.int32)
        after = {'inputs': jnp.stack(inputs, axis=2).astype(jnp.float32), 'there': there}
        return after, x.swapaxes(0, 1)

    def initial(self, batch: int) -> Carry:
        """An empty memory."""
        return {
            'inputs': jnp.zeros((batch, self.memory, self.layers, self.features)),
            'there': jnp.zeros((batch, self.memory), jnp.int32),
        }


class _Layer(nn.Module):
    heads: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Array, memory: Array, mask: Array) -> Array:
        """x [B, T, H], memory [B, M, H], mask [B, T, M + T] → [B, T, H]."""
        H = x.shape[-1]
        seen = jnp.concatenate([memory, x], axis=1)
        norm = nn.LayerNorm(dtype=self.dtype, name='norm')
        attention = Attention(self.heads, positions='relative', dtype=self.dtype, name='attention')
        seen = norm(seen)
        y = nn.relu(attention(seen[:, -x.shape[1] :], seen, mask))
        x = _Gate(self.dtype, name='gate')(x, y)
        y = nn.LayerNorm(dtype=self.dtype, name='norm_out')(x)
        for name in ('hidden', 'out'):
            y = nn.relu(Affine(H, self.dtype, name=name)(y))
        return _Gate(self.dtype, name='gate_out')(x, y)


class _Gate(nn.Module):
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Array, y: Array) -> Array:
        H = x.shape[-1]
        of_y = Affine(3 * H, self.dtype, name='of_y')(y)
        of_x = nn.Dense(2 * H, False, self.dtype, name='of_x')(x)
        r = nn.sigmoid(of_y[..., :H] + of_x[..., :H])
        s = nn.sigmoid(of_y[..., H : 2 * H] + of_x[..., H:] - 2)
        candidate = nn.Dense(H, False, self.dtype, name='candidate')(r * x)
        h = jnp.tanh(of_y[..., 2 * H :] + candidate)
        return (1 - s) * x + s * h
