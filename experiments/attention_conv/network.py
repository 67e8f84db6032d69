"""A network of images whose layers are convolutions, or self-attention on the grid of pixels.

Shapes: x [..., rows, columns, n] the image, y [..., k] the output.
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
DRAWN = initializers.normal(2**0.5)


class EdgeConvolution(nn.Module):
    """A K × K convolution that pads with the edge: y_q = Σ_δ V_δ x_{q+δ} + b.

    What `ConvolutionalSelfAttention` of K² heads is in the limit of large α (Cordonnier et al.,
    2020). A product of windows and one matrix: of a convolution XLA's CPU backend takes ten times
    longer for the gradient where it is in a loop.

    Attributes:
      kernel: K.
      features: k.
      dtype: of the computation; None for that of inputs and parameters.
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
        y = linear(windows(x, K), V.reshape(-1, self.features))
        return y + b.reshape((1,) * (y.ndim - 1) + b.shape)


def windows(x: Array, K: int) -> Array:
    """[..., rows, columns, n] → [..., rows, columns, K² n], the K × K neighbours of every pixel."""
    rows, columns, _ = x.shape[-3:]
    low, high = (K - 1) // 2, K // 2
    sides = [(0, 0)] * (x.ndim - 3) + [(low, high), (low, high), (0, 0)]
    x = jnp.pad(x, sides, mode='edge')
    return jnp.concatenate(
        [x[..., i : i + rows, j : j + columns, :] for i in range(K) for j in range(K)], axis=-1
    )


def grid(heads: int) -> Array:
    """Return the offsets of a K × K kernel [K², 2], in the order of its entries; heads = K²."""
    K = round(heads**0.5)
    i, j = jnp.divmod(jnp.arange(heads), K)
    return jnp.stack([i - (K - 1) // 2, j - (K - 1) // 2], axis=-1).astype(jnp.float32)


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
    """L layers with ReLU after each, the mean over all pixels, an affine map.

    Attributes:
      outputs: k.
      layer: name → module [..., rows, columns, n] → [..., rows, columns, width].
      depth: L.
      dtype: of the last map; its result is f32.
    """

    outputs: int
    layer: Callable[[str | None], nn.Module]
    depth: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.depth):
            x = nn.relu(self.layer(f'layer_{i}')(x))
        return Affine(self.outputs, self.dtype, name='out')(x.mean((-3, -2))).astype(jnp.float32)


def make(model: ml_collections.ConfigDict, outputs: int) -> ImageNetwork:
    """Build the network of a config's section `model`."""
    if model.layer == 'convolution':
        return ImageNetwork(
            outputs,
            lambda name: EdgeConvolution(model.kernel, model.width, name=name),
            model.depth,
        )
    centers = DRAWN
    if model.centres == 'grid':
        centers = initializers.constant(grid(model.heads))
    heads = Heads(model.heads, centers, model.alpha)
    return attention(outputs, heads, model.width, model.depth)


class Heads(NamedTuple):
    """The heads of a layer: how many, and their initial centers and α."""

    number: int
    center_init: Initializer = DRAWN
    alpha: float = 1.0


def attention(
    outputs: int, heads: Heads, width: int, depth: int, dtype: DTypeLike | None = None
) -> ImageNetwork:
    """Build a network of self-attention."""

    def layer(name: str | None) -> nn.Module:
        return ConvolutionalSelfAttention(
            heads.number,
            width,
            dtype,
            Delta_init=heads.center_init,
            alpha_init=initializers.constant(heads.alpha),
            name=name,
        )

    return ImageNetwork(outputs, layer, depth, dtype)
