"""The gated Transformer-XL, a core that attends to previous steps."""

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

    A step attends to itself and to the M previous steps of its episode, with relative positions.
    Computing several steps together gives the same result as one at a time. Initially the gate is
    almost closed (b = 2), so that a new layer is close to the identity.

    The module has the interface of a cell in `mi.cells`. Its gate multiplies functions of x and y,
    and is therefore itself a multiplicative interaction.

    Attributes:
      features: number of features, H.
      layers: number of layers, L.
      heads: number of attention heads, a divisor of H.
      memory: number of previous steps in memory, M.
      dtype: dtype of the products. The memory is f32.
    """

    features: int
    layers: int = 2
    heads: int = 4
    memory: int = 32
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, carry: Carry, x: Array, reset: Array) -> tuple[Carry, Array]:
        """Return the next memory [B, M, …] and h [T, B, H] for x [T, B, n] and reset [T, B]."""
        T, M = reset.shape[0], self.memory
        hidden = Affine(self.features, self.dtype, name='input')(x).swapaxes(0, 1)  # [B, T, H]
        resets = reset.swapaxes(0, 1).astype(jnp.int32)

        # Mask: the M previous steps, of the same episode. Episodes are numbered from 0, the one in
        # memory; −1 marks an empty place.
        episode = jnp.concatenate([carry['there'] - 1, jnp.cumsum(resets, axis=1)], axis=1)
        distance = M + jnp.arange(T).reshape(-1, 1) - jnp.arange(M + T).reshape(1, -1)
        is_near = (distance >= 0) & (distance <= M)
        mask = is_near.reshape(1, T, M + T) & (episode[:, M:, None] == episode[:, None, :])

        # Layers; the memory holds the inputs of each.
        layer_inputs = []
        for layer_index in range(self.layers):
            memory = carry['inputs'][:, :, layer_index].astype(hidden.dtype)
            layer_inputs.append(jnp.concatenate([memory, hidden], axis=1)[:, -M:])
            layer = _Layer(self.heads, self.dtype, name=f'layer_{layer_index}')
            hidden = layer(hidden, memory, mask)
        is_current = (episode[:, -M:] == episode[:, -1:]).astype(jnp.int32)
        next_memory = jnp.stack(layer_inputs, axis=2).astype(jnp.float32)
        return {'inputs': next_memory, 'there': is_current}, hidden.swapaxes(0, 1)

    def initial(self, batch_size: int) -> Carry:
        """Return an empty memory."""
        return {
            'inputs': jnp.zeros((batch_size, self.memory, self.layers, self.features)),
            'there': jnp.zeros((batch_size, self.memory), jnp.int32),
        }


class _Layer(nn.Module):
    """Attention and two dense layers, each behind a gate."""

    heads: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Array, memory: Array, mask: Array) -> Array:
        """Return [B, T, H] for x [B, T, H], memory [B, M, H] and mask [B, T, M + T]."""
        # Attention to the memory and to the steps before.
        norm = nn.LayerNorm(dtype=self.dtype, name='norm')
        attention = Attention(self.heads, positions='relative', dtype=self.dtype, name='attention')
        context = norm(jnp.concatenate([memory, x], axis=1))
        attended = nn.relu(attention(context[:, -x.shape[1] :], context, mask))
        gated = _Gate(self.dtype, name='gate')(x, attended)

        # The dense layers.
        hidden = nn.LayerNorm(dtype=self.dtype, name='norm_out')(gated)
        for dense_name in ('hidden', 'out'):
            hidden = nn.relu(Affine(x.shape[-1], self.dtype, name=dense_name)(hidden))
        return _Gate(self.dtype, name='gate_out')(gated, hidden)


class _Gate(nn.Module):
    """The gate g(x, y) of `GatedTransformer`."""

    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Array, y: Array) -> Array:
        H = x.shape[-1]
        from_y = Affine(3 * H, self.dtype, name='of_y')(y)
        from_x = nn.Dense(2 * H, False, self.dtype, name='of_x')(x)
        r = nn.sigmoid(from_y[..., :H] + from_x[..., :H])
        s = nn.sigmoid(from_y[..., H : 2 * H] + from_x[..., H:] - 2)
        candidate = nn.Dense(H, False, self.dtype, name='candidate')(r * x)
        h = jnp.tanh(from_y[..., 2 * H :] + candidate)
        return (1 - s) * x + s * h
