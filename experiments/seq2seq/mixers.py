"""Mixers of the tokens in a sequence: attention, and alternatives to it.

All mixers map x [..., n, C], with n tokens, to y [..., n, C]. All except the summary have the form
of attention with H heads of C / H channels: values v_s = A_v x_s + c_v are weighted by w_ts for
each pair of tokens and each head, and y_t = A_o [Σ_s w_ts v_s of every head] + c_o. They differ in
the weights w_ts:

    attention      softmax_s(qᵀk / √d)    depends on both tokens, and by the softmax on all others
    pairs          f(x_t, x_s) / √n       depends on both tokens, by the fusion f
    dynamic_conv   softmax_j(Q x_t)       depends on the reading token and on the distance j
    fixed          M_ts                   depends only on the two positions
    summary        y_t = f(x_t, z), where z is a mean over tokens, without products of two tokens

Attention, pairs and summary commute with permutations of the tokens. The other two depend on the
order.

Products of pairs are computed elementwise and summed, instead of as batches of small matrix
products, which are several times slower on CPU for sequences of five tokens.
"""

from collections.abc import Callable

import jax
from flax import linen as nn
from jax import Array
from jax.nn import initializers

from mi.layers import Affine
from mi.motifs.dynamic_conv import DynamicConvolution

Fuse = Callable[..., nn.Module]


class SmallAttention(nn.Module):
    """Attention, w_ts = softmax_s(qᵀk / √d).

    The parameters are those of `mi.motifs.attention.Attention`.

    Attributes:
      heads: number of heads H.
    """

    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        query, key, value = (_project(x, self.heads, name) for name in ('query', 'key', 'value'))
        products = query[..., :, None, :, :] * key[..., None, :, :, :]
        scores = products.sum(-1) * query.shape[-1] ** -0.5
        return _merge_heads(_mix_values(jax.nn.softmax(scores, axis=-2), value))


class Pairs(nn.Module):
    """A mixer whose weights are a fusion of the two tokens, w_ts = f(x_t, x_s) / √n.

    With a multiplicative interaction, f contains x_tᵀ W_h x_s. Without an interaction, it is a sum
    of functions of the two tokens.

    Attributes:
      heads: number of heads H.
      fuse: constructor of the fusion, features → module (x, z) → y.
    """

    heads: int
    fuse: Fuse

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weights = self.fuse(self.heads, name='weights')(x[..., :, None, :], x[..., None, :, :])
        value = _project(x, self.heads, 'value')
        return _merge_heads(_mix_values(weights * x.shape[-2] ** -0.5, value))


class Fixed(nn.Module):
    """A mixer with the same weights for every sequence, w_ts = M_hts.

    M [H, n, n] is initialized with variance 1 / n.

    Attributes:
      heads: number of heads H.
    """

    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n = x.shape[-2]
        M = self.param('M', initializers.normal(n**-0.5), (self.heads, n, n))
        weights = M.transpose(1, 2, 0).reshape((1,) * (x.ndim - 2) + (n, n, self.heads))
        return _merge_heads(_mix_values(weights, _project(x, self.heads, 'value')))


class Dynamic(nn.Module):
    """A dynamic convolution of the values (Wu et al., 2019) that covers the whole sequence.

    Its kernel of size 2n − 1 is computed from x_t, and the sequence is padded with zeros.

    Attributes:
      heads: number of heads H.
    """

    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        num_tokens, num_channels = x.shape[-2:]
        value = Affine(num_channels, name='value')(x)
        mixed = DynamicConvolution(self.heads, 2 * num_tokens - 1, name='convolution')(value, x)
        return Affine(num_channels, name='out')(mixed)


class Summary(nn.Module):
    """A mixer that fuses each token with a mean over all tokens, as in a deep set.

        y_t = f(x_t, z),   z = √2 · mean_s relu(A x_s + a) [C]      (Zaheer et al., 2017)

    Attributes:
      fuse: constructor of the fusion f, features → module (x, z) → y.
    """

    fuse: Fuse

    @nn.compact
    def __call__(self, x: Array) -> Array:
        num_channels = x.shape[-1]
        hidden = nn.relu(Affine(num_channels, name='said')(x))
        z = 2**0.5 * hidden.mean(-2, keepdims=True)
        return self.fuse(num_channels, name='read')(x, z)


MIXERS: dict[str, Callable[[int, Fuse, str], nn.Module]] = {
    'attention': lambda heads, fuse, name: SmallAttention(heads, name=name),
    'pairs': lambda heads, fuse, name: Pairs(heads, fuse, name=name),
    'dynamic_conv': lambda heads, fuse, name: Dynamic(heads, name=name),
    'fixed': lambda heads, fuse, name: Fixed(heads, name=name),
    'summary': lambda heads, fuse, name: Summary(fuse, name=name),
}
"""Value of config.model.mixer → constructor (heads, fusion, name) → module."""


def _project(x: Array, heads: int, name: str) -> Array:
    """Map [..., n, C] to heads [..., n, H, C / H], with an affine map in the calling module."""
    num_channels = x.shape[-1]
    return Affine(num_channels, name=name)(x).reshape(*x.shape[:-1], heads, num_channels // heads)


def _mix_values(weights: Array, value: Array) -> Array:
    """Compute Σ_s w_ts v_s [..., t, H, d] from weights [..., t, s, H] and values [..., s, H, d]."""
    return (weights[..., None] * value[..., None, :, :, :]).sum(-3)


def _merge_heads(mixed: Array) -> Array:
    """Merge heads [..., n, H, d] into [..., n, H · d], with an affine map in the calling module."""
    mixed = mixed.reshape(*mixed.shape[:-2], -1)
    return Affine(mixed.shape[-1], name='out')(mixed)
