"""Gates, which multiply one stream elementwise by an activation of the other.

Shapes: input x [..., n] and context z [..., m], which controls the gate. Leading axes of x and z
broadcast.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from mi.config import suggest
from mi.kernels.linear import accumulation_dtype, linear
from mi.layers import Affine, Context, add_bias, align_streams, context_init, input_init

Activation = Literal['sigmoid', 'gelu', 'silu', 'relu', 'tanh', 'identity']

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    'sigmoid': nn.sigmoid,
    'gelu': functools.partial(nn.gelu, approximate=False),
    'silu': nn.silu,
    'relu': nn.relu,
    'tanh': jnp.tanh,
    'identity': lambda a: a,
}


def get_activation(activation: str) -> Callable[[Array], Array]:
    """Return the activation function with this name, or raise ValueError if it is unknown."""
    if activation not in ACTIVATIONS:
        raise ValueError(f'unknown activation {activation!r}; {suggest(activation, ACTIVATIONS)}')
    return ACTIVATIONS[activation]


def expand_mask(x: Array, mask: Array | None) -> Array:
    """Return the mask of x [..., C] as bool [..., 1], which is all True for None.

    Raises:
      ValueError: if the mask does not broadcast to the leading axes of x.
    """
    if mask is None:
        return jnp.ones((*x.shape[:-1], 1), bool)
    try:
        valid = jnp.broadcast_to(jnp.asarray(mask, bool), x.shape[:-1])
    except ValueError as error:
        raise ValueError(
            f'mask {mask.shape}: expected one entry per position, {x.shape[:-1]}, to match '
            f'x {x.shape}'
        ) from error
    return valid[..., None]


class GatedLinearUnit(nn.Module):
    """The gated linear unit: y = act(Az + a) ⊙ (Bx + b), A [m, k], B [n, k], a and b [k].

    With z = x, the activation 'sigmoid' gives the GLU of Dauphin et al. (2017). The variants of
    Shazeer (2020) are GEGLU ('gelu', exact), SwiGLU ('silu'), ReGLU ('relu') and the bilinear layer
    ('identity'). For two streams, the bilinear layer is the multiplicative interaction with W of
    rank k.

    Attributes:
      features: k, the number of output features.
      activation: 'sigmoid', 'gelu', 'silu', 'relu', 'tanh' or 'identity'.
      use_bias: whether to include a and b.
      context, dtype, param_dtype: as in `MultiplicativeInteraction`.
      B_init: initializer of B, by default `lecun_normal`. A larger scale compensates for the
        variance that the activation removes.
    """

    features: int
    activation: Activation = 'sigmoid'
    use_bias: bool = True
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    B_init: Initializer = input_init()

    @nn.compact
    def __call__(self, x: Array, z: Array | None = None) -> Array:
        """Return y [..., k] for x [..., n] and z [..., m], which defaults to x.

        Raises:
          ValueError: if the activation is unknown or the leading axes do not broadcast.
        """
        activation = get_activation(self.activation)
        x, z = align_streams(x, x if z is None else z)
        features = self.features
        A = self.param('A', context_init(self.context), (z.shape[-1], features), self.param_dtype)
        B = self.param('B', self.B_init, (x.shape[-1], features), self.param_dtype)
        x, z, A, B = nn.dtypes.promote_dtype(x, z, A, B, dtype=self.dtype)
        gate, values = linear(z, A), linear(x, B)
        if self.use_bias:
            a = self.param('a', initializers.zeros, (features,), self.param_dtype)
            b = self.param('b', initializers.zeros, (features,), self.param_dtype)
            gate, values = add_bias(gate, a.astype(x.dtype)), add_bias(values, b.astype(x.dtype))
        return activation(gate) * values


class GatedFeedForward(nn.Module):
    """The gated feed-forward layer of Transformers (Shazeer, 2020): y = (act(xA) ⊙ xB) C.

    A and B are [n, h], and C is [h, k]. With `use_bias`, A and B have biases a and b [h], and C has
    a bias c [k]. With two thirds of the hidden width, the layer has as many parameters as a
    feed-forward layer without a gate.

    Attributes:
      hidden: h, the hidden width.
      features: k, the number of output features. Defaults to n.
      activation: as in `GatedLinearUnit`.
      use_bias: whether to include a, b and c. The paper has no biases.
      dropout: dropout rate of the hidden units.
      dtype, param_dtype: as in `MultiplicativeInteraction`.
    """

    hidden: int
    features: int | None = None
    activation: Activation = 'silu'
    use_bias: bool = False
    dropout: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, deterministic: bool = True) -> Array:
        """Return y [..., k] for x [..., n].

        Args:
          x: the input, [..., n].
          deterministic: whether to disable dropout, which requires the rng 'dropout'.

        Raises:
          ValueError: if the activation is unknown.
        """
        features = self.features or x.shape[-1]
        hidden = GatedLinearUnit(
            self.hidden,
            self.activation,
            self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name='glu',
        )(x)
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=deterministic)
        C = self.param('C', input_init(), (self.hidden, features), self.param_dtype)
        hidden, C = nn.dtypes.promote_dtype(hidden, C, dtype=self.dtype)
        output = linear(hidden, C)
        if self.use_bias:
            c = self.param('c', initializers.zeros, (features,), self.param_dtype)
            output = add_bias(output, c.astype(output.dtype))
        return output


class Highway(nn.Module):
    """The highway layer (Srivastava et al., 2015): y = T ⊙ H + (1 − T) ⊙ x.

    H = act(V_H x + b_H) is the transform, and T = σ(V_T z + b_T) is the gate. The paper has z = x.
    Where the gate is 0, x passes unchanged.

    Attributes:
      activation: activation of H, as in `GatedLinearUnit`.
      gate_bias: initial value of b_T. The paper uses negative values, such as −1 or −3.
      context, dtype, param_dtype: as in `MultiplicativeInteraction`.
    """

    activation: Activation = 'relu'
    gate_bias: float = -1.0
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array | None = None) -> Array:
        """Return y [..., n] for x [..., n] and z [..., m], which defaults to x.

        Raises:
          ValueError: if the activation is unknown or the leading axes do not broadcast.
        """
        activation = get_activation(self.activation)
        x, z = align_streams(x, x if z is None else z)
        x, z = nn.dtypes.promote_dtype(x, z, dtype=self.dtype)
        affine = functools.partial(Affine, x.shape[-1], self.dtype, self.param_dtype)
        H = activation(affine(name='H')(x))
        gate_map = affine(
            V_init=context_init(self.context),
            b_init=initializers.constant(self.gate_bias),
            name='T',
        )
        T = nn.sigmoid(gate_map(z))
        return T * H + (1 - T) * x


class SqueezeExcitation(nn.Module):
    """Squeeze-and-excitation (Hu et al., 2018): y = s ⊙ x, s = σ(relu(pool(x) W₁) W₂).

    The context is the mean of x over space, computed in f32. W₁ [C, C/r] and W₂ [C/r, C] have no
    biases, as in the paper's equation.

    Attributes:
      ratio: r, the factor by which the bottleneck reduces the number of channels.
      axes: the spatial axes: (-3, -2) for images [..., H, W, C], (-2,) for sequences [..., T, C].
      dtype, param_dtype: as in `MultiplicativeInteraction`.
    """

    ratio: int = 16
    axes: tuple[int, ...] = (-3, -2)
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Return y [..., H, W, C] for x [..., H, W, C].

        Args:
          x: the feature map.
          mask: [..., H, W], True at positions that count for the mean. None if all positions count.
            The mean over no positions is 0.

        Raises:
          ValueError: if r does not divide C, an axis is repeated or is not a spatial axis of x, or
            the mask does not match x.
        """
        num_channels = x.shape[-1]
        if self.ratio < 1 or num_channels % self.ratio:
            raise ValueError(
                f'ratio = {self.ratio}: expected a divisor of the {num_channels} channels of x '
                f'{x.shape}'
            )
        axes = {axis % x.ndim for axis in self.axes if -x.ndim <= axis < x.ndim}
        if not axes or len(axes) < len(self.axes) or x.ndim - 1 in axes:
            raise ValueError(
                f'axes = {self.axes}: expected distinct spatial axes of x {x.shape}, without '
                'the last axis, C'
            )
        W1_shape = num_channels, num_channels // self.ratio
        W1 = self.param('W1', input_init(), W1_shape, self.param_dtype)
        W2 = self.param('W2', initializers.he_normal(), W1_shape[::-1], self.param_dtype)
        pooled = _masked_mean(x, tuple(sorted(axes)), expand_mask(x, mask))
        x, W1, W2 = nn.dtypes.promote_dtype(x, W1, W2, dtype=self.dtype)
        s = nn.sigmoid(linear(nn.relu(linear(pooled.astype(x.dtype), W1)), W2))
        return s * x


def _masked_mean(x: Array, axes: tuple[int, ...], valid: Array) -> Array:
    """Return the mean over valid positions in at least f32, keeping the axes with length 1."""
    dtype = accumulation_dtype(x)
    total = jnp.sum(x, axes, dtype, keepdims=True, where=valid)
    return total / jnp.maximum(jnp.sum(valid, axes, dtype, keepdims=True), 1)
