"""Mixers of the tokens of a sequence: attention, and what can stand in its place.

Shapes: x [..., n, C], n tokens, to y [..., n, C]; H heads of C / H channels each. All but the
summary have the frame of attention: values v_s = A_v x_s + c_v, a weight for each pair of tokens
and each head, y_t = A_o [Σ_s w_ts v_s of every head] + c_o. They differ in what w_ts depends on.

    attention      softmax_s(qᵀk / √d)    on both tokens, and on all others by the softmax
    pairs          f(x_t, x_s) / √n       on both tokens, f the fusion
    dynamic_conv   softmax_j(Q x_t)       on the token that reads and on the distance j
    fixed          M_ts                   on the two places alone
    summary        y_t = f(x_t, z), z the mean over the tokens: no product of two tokens

Attention, pairs and summary commute with permutations of the tokens; the other two know the order.

Products of a pair are multiplied and summed, not batches of small matrices: of sequences of five
tokens XLA's CPU backend multiplies the latter several times slower.
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
    """w_ts = softmax_s(qᵀk / √d): `mi.motifs.attention.Attention`, with its parameters.

    Attributes:
      heads: H.
    """

    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        query, key, value = (_project(x, self.heads, name) for name in ('query', 'key', 'value'))
        products = query[..., :, None, :, :] * key[..., None, :, :, :]
        scores = products.sum(-1) * query.shape[-1] ** -0.5
        return _merge_heads(_mix_values(jax.nn.softmax(scores, axis=-2), value))


class Pairs(nn.Module):
    """w_ts = f(x_t, x_s) / √n, a weight per head, by the fusion of the two tokens.

    With an interaction, f has x_tᵀ W_h x_s; without one it is a sum of what each token says.

    Attributes:
      heads: H.
      fuse: features → module (x, z) → y.
    """

    heads: int
    fuse: Fuse

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weights = self.fuse(self.heads, name='weights')(x[..., :, None, :], x[..., None, :, :])
        value = _project(x, self.heads, 'value')
        return _merge_heads(_mix_values(weights * x.shape[-2] ** -0.5, value))


class Fixed(nn.Module):
    """w_ts = M_hts, the same for every sequence: M [H, n, n], of variance 1 / n at the start.

    Attributes:
      heads: H.
    """

    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n = x.shape[-2]
        M = self.param('M', initializers.normal(n**-0.5), (self.heads, n, n))
        weights = M.transpose(1, 2, 0).reshape((1,) * (x.ndim - 2) + (n, n, self.heads))
        return _merge_heads(_mix_values(weights, _project(x, self.heads, 'value')))


class Dynamic(nn.Module):
    """The values under a dynamic convolution (Wu et al., 2019) that reaches from end to end.

    Its kernel of 2n − 1 is made of x_t; places beyond the ends hold zeros.

    Attributes:
      heads: H.
    """

    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        num_tokens, num_channels = x.shape[-2:]
        value = Affine(num_channels, name='value')(x)
        mixed = DynamicConvolution(self.heads, 2 * num_tokens - 1, name='convolution')(value, x)
        return Affine(num_channels, name='out')(mixed)


class Summary(nn.Module):
    """y_t = f(x_t, z), z = √2 · mean_s relu(A x_s + a) [C], as in a deep set (Zaheer et al., 2017).

    Attributes:
      fuse: features → module (x, z) → y.
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
"""Word of config.model.mixer → (heads, fusion, name) → module [..., n, C] → [..., n, C]."""


def _project(x: Array, heads: int, name: str) -> Array:
    """[..., n, C] → [..., n, H, C / H], by an affine map of the module that calls it."""
    num_channels = x.shape[-1]
    return Affine(num_channels, name=name)(x).reshape(*x.shape[:-1], heads, num_channels // heads)


def _mix_values(weights: Array, value: Array) -> Array:
    """Weights [..., t, s, H], values [..., s, H, d] → Σ_s w_ts v_s [..., t, H, d]."""
    return (weights[..., None] * value[..., None, :, :, :]).sum(-3)


def _merge_heads(mixed: Array) -> Array:
    """[..., n, H, d] → [..., n, H · d], by an affine map of the module that calls it."""
    mixed = mixed.reshape(*mixed.shape[:-2], -1)
    return Affine(mixed.shape[-1], name='out')(mixed)
