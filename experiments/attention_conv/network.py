"""An image network whose layers are convolutions, or self-attention on the grid of pixels.

Shapes: image x [..., rows, columns, n], output y [..., k].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import ml_collections
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from mi.config import Rule, choice, integer, number
from mi.kernels.linear import linear
from mi.layers import Affine
from mi.motifs.convolutional_attention import ConvolutionalSelfAttention

CENTRES = ('learnt', 'fixed', 'grid')
CENTER_INIT = initializers.normal(2**0.5)


class EdgeConvolution(nn.Module):
    """A K × K convolution with edge padding: y_q = Σ_δ V_δ x_{q+δ} + b.

    `ConvolutionalSelfAttention` with K² heads converges to this layer for large α (Cordonnier et
    al., 2020). It is computed as a product of windows and one matrix. On CPU, XLA's gradient of a
    convolution inside a loop takes ten times longer.

    Attributes:
      kernel: kernel size K.
      features: number of output features.
      dtype: dtype of the computation, or None for the dtype of inputs and parameters.
    """

    kernel: int
    features: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        K, n = self.kernel, x.shape[-1]
        V = self.param('V', initializers.lecun_normal(), (K, K, n, self.features))
        b = self.param('b', initializers.zeros, (self.features,))
        x, V, b = nn.dtypes.promote_dtype(x, V, b, dtype=self.dtype)
        y = linear(extract_windows(x, K), V.reshape(-1, self.features))
        return y + b.reshape((1,) * (y.ndim - 1) + b.shape)


def extract_windows(image: Array, K: int) -> Array:
    """Extract the K × K window of every pixel: [..., rows, columns, n] → [..., K² n]."""
    num_rows, num_columns, _ = image.shape[-3:]
    sides = (K - 1) // 2, K // 2
    padding = [(0, 0)] * (image.ndim - 3) + [sides, sides, (0, 0)]
    padded = jnp.pad(image, padding, mode='edge')
    windows = [
        padded[..., row : row + num_rows, column : column + num_columns, :]
        for row in range(K)
        for column in range(K)
    ]
    return jnp.concatenate(windows, axis=-1)


def make_kernel_offsets(heads: int) -> Array:
    """Return the offsets of the entries in a K × K kernel, [K², 2], where heads = K²."""
    K = round(heads**0.5)
    row, column = jnp.divmod(jnp.arange(heads), K)
    center = (K - 1) // 2
    return jnp.stack([row - center, column - center], axis=-1).astype(jnp.float32)


LAYERS = ('attention', 'convolution')

SCHEMA: dict[str, Rule] = {
    'model.depth': integer(1),
    'model.layer': choice(LAYERS),
    'model.heads': integer(1),
    'model.centres': choice(CENTRES),
    'model.alpha': number(0, exclusive=True),
    'model.kernel': integer(1),
}


class ImageNetwork(nn.Module):
    """A network of L layers with ReLU, a mean over all pixels, and an affine read-out.

    Attributes:
      outputs: number of outputs k.
      layer: function of a name that returns a module, which maps [..., rows, columns, n] to
        [..., rows, columns, width].
      depth: number of layers L.
      dtype: dtype of the read-out, whose result is converted to f32.
    """

    outputs: int
    layer: Callable[[str | None], nn.Module]
    depth: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for layer_index in range(self.depth):
            x = nn.relu(self.layer(f'layer_{layer_index}')(x))
        readout = Affine(self.outputs, self.dtype, name='out')
        return readout(x.mean((-3, -2))).astype(jnp.float32)


def make(model: ml_collections.ConfigDict, outputs: int) -> ImageNetwork:
    """Build the network that the section `model` of a config describes."""
    if model.layer == 'convolution':
        return ImageNetwork(
            outputs,
            lambda name: EdgeConvolution(model.kernel, model.width, name=name),
            model.depth,
        )
    center_init = CENTER_INIT
    if model.centres == 'grid':
        center_init = initializers.constant(make_kernel_offsets(model.heads))
    heads = Heads(model.heads, center_init, model.alpha)
    return make_attention(outputs, heads, model.width, model.depth)


class Heads(NamedTuple):
    """The heads of a layer: their number, initial centers and initial α."""

    number: int
    center_init: Initializer = CENTER_INIT
    alpha: float = 1.0


def make_attention(
    outputs: int, heads: Heads, width: int, depth: int, dtype: DTypeLike | None = None
) -> ImageNetwork:
    """Build a network with layers of self-attention."""

    def make_layer(name: str | None) -> nn.Module:
        return ConvolutionalSelfAttention(
            heads.number,
            width,
            dtype,
            Delta_init=heads.center_init,
            alpha_init=initializers.constant(heads.alpha),
            name=name,
        )

    return ImageNetwork(outputs, make_layer, depth, dtype)
