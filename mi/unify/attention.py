"""Attention as the one equation: twice, where tokens meet tokens and where weights meet values."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mi.motifs.attention import (
    Attention,
    ConvolutionalSelfAttention,
    GatedCrossAttention,
    LatentCrossAttention,
    align_tokens,
    masked_softmax,
)
from mi.motifs.positions import compute_sinusoids, is_visible, rotate
from mi.unify.composition import Composition, Product, as_mi, make_inner

KEY_IS = 'the token that is asked, as the key'
QUERY_IS = 'the token that asks, as the query'
SOFTMAX = 'the softmax of the scores, and the affine maps of values and output'


@as_mi.register
def attention(
    module: Attention,
    variables: Any,
    x: Array,
    z: Array | None = None,
    mask: Array | None = None,
    *,
    decode: bool = False,
    deterministic: bool = True,
) -> Composition:
    """Scores: x the key token, z the query token, one output per head, W_h = A_q A_kᵀ / √d.

    The biases of queries and keys make its U, V and b, and u is part of the former. 'relative' has
    a second product, of the query token and the sinusoids of the distance, W_h = A_q Rᵀ / √d, with
    v. With 'rotary', where W would differ with the distance, the streams are each head's turned key
    and query, and W their inner product / √d.

    Mix: x the values of a head, [d, S], z its weights, [S], W their inner product.

    Raises:
      ValueError: with a cache or with dropout, as this is the whole pass and has nothing random.
    """
    if decode or (module.dropout and not deterministic):
        raise ValueError(
            f'as_mi computes the whole pass, without dropout; got decode={decode}, '
            f'deterministic={deterministic}: leave them out'
        )
    products, output = _attention(module, variables['params'], x, x if z is None else z, mask)
    around = 'the rotation of queries and keys, ' if module.positions == 'rotary' else ''
    return Composition(products, output, around + SOFTMAX)


@as_mi.register
def gated_cross_attention(
    module: GatedCrossAttention,
    variables: Any,
    x: Array,
    z: Array,
    mask: Array | None = None,
    *,
    deterministic: bool = True,
) -> Composition:
    """The attention's products, and tanh(a) times its output: W [1, n, n] the identity."""
    p = variables['params']
    inside = _inside(module, p, x, z, mask, deterministic)
    gate = Product(
        name='gate',
        x_is='the output of the attention',
        z_is='tanh(a), one learnt number',
        x=inside.output,
        z=jnp.tanh(p['a'])[None],
        W=jnp.eye(x.shape[-1])[None],
    )
    x, _ = align_tokens(x, z)
    return Composition(
        (*inside.products, gate), x + gate(), f'{SOFTMAX}, and the sum with the input'
    )


@as_mi.register
def latent_cross_attention(
    module: LatentCrossAttention,
    variables: Any,
    z: Array,
    mask: Array | None = None,
    *,
    deterministic: bool = True,
) -> Composition:
    """The attention's products, with the latents for query tokens."""
    p = variables['params']
    x, z = align_tokens(p['latents'], z)
    inside = _inside(module, p, x, z, mask, deterministic)
    return Composition(
        inside.products, x + inside.output, f'{SOFTMAX}, and the sum with the latents'
    )


@as_mi.register
def convolutional_self_attention(
    module: ConvolutionalSelfAttention, variables: Any, x: Array
) -> Composition:
    """Scores: x is r_δ, z is v of a head; mix: as for attention, over all positions of the grid."""
    p = variables['params']
    Delta, alpha = p['Delta'], p['alpha']
    *leading, rows, columns, n = x.shape
    grid = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing='ij'), axis=-1)
    grid = grid.reshape(-1, 2).astype(jnp.float32)
    delta = grid[None] - grid[:, None]  # [query, key, 2]
    v = -alpha[:, None] * jnp.concatenate([jnp.ones((module.heads, 1)), -2 * Delta], axis=-1)
    scores = Product(
        name='scores',
        x_is='r, the square and the entries of the offset from query to key',
        z_is='v of each head, its sharpness and centre',
        x=jnp.concatenate([(delta**2).sum(-1, keepdims=True), delta], axis=-1),
        z=v[:, None, None],
        W=make_inner(3),
    )
    weights = jax.nn.softmax(scores()[..., 0])  # [H, query, key]
    values = jnp.einsum('...sn,hnk->...hks', x.reshape(*leading, rows * columns, n), p['V'])
    mix = _mix(weights, values)
    y = mix().sum(-4)[..., 0].reshape(*leading, rows, columns, module.features)
    output = y + p['b'].reshape((1,) * (y.ndim - 1) + p['b'].shape)
    return Composition(
        (scores, mix), output, 'the softmax of the scores, the map V, the sum over heads'
    )


def _attention(
    module: Attention, p: Any, x: Array, z: Array, mask: Array | None
) -> tuple[tuple[Product, ...], Array]:
    """Products and output of attention with these parameters; d is read from them."""
    x, z = align_tokens(x, z)
    heads, T, S = module.heads, x.shape[-2], z.shape[-2]
    kv_heads = module.kv_heads or heads
    d = p['query']['b'].shape[0] // heads

    def of_head(matrix: Array, shared_by: int) -> Array:
        """[..., heads' · d] → [..., H, d]"""
        split = matrix.reshape(*matrix.shape[:-1], heads // shared_by, d)
        return jnp.repeat(split, shared_by, axis=-2)

    group = heads // kv_heads
    A_q, c_q = (of_head(p['query'][name], 1) for name in 'Vb')
    A_k, c_k = (of_head(p['key'][name], group) for name in 'Vb')
    A_v, c_v = (of_head(p['value'][name], group) for name in 'Vb')
    at_query, at_key = jnp.arange(T) + S - T, jnp.arange(S)
    distance = at_query[:, None] - at_key[None]

    query_tokens, key_tokens = x[..., :, None, :], z[..., None, :, :]
    if module.positions == 'rotary':
        query = rotate(_affine('...tn,nhd->...thd', x, A_q, c_q), at_query)
        key = rotate(_affine('...sm,mhd->...shd', z, A_k, c_k), at_key)
        met = [
            Product(
                name='scores',
                x_is='the key of a head, turned by its position',
                z_is='the query of that head, turned by its position',
                x=jnp.moveaxis(key, -2, -3)[..., None, :, :],
                z=jnp.moveaxis(query, -2, -3)[..., :, None, :],
                W=make_inner(d) / d**0.5,
            )
        ]
        scores = met[0]()[..., 0]
    else:
        u, v = (p.get(name, jnp.zeros((heads, d))) for name in 'uv')
        met = [
            _meeting('scores', KEY_IS, QUERY_IS, key_tokens, query_tokens, A_k, c_k, A_q, c_q + u)
        ]
        if module.positions == 'relative':
            r_is, r = 'the sinusoids of the distance', compute_sinusoids(distance, x.shape[-1])
            R, none = of_head(p['R'], group), jnp.zeros((heads, d))
            met.append(
                _meeting('position scores', r_is, QUERY_IS, r, query_tokens, R, none, A_q, c_q + v)
            )
        scores = jnp.moveaxis(sum(product() for product in met), -1, -3)

    seen = is_visible(distance, module.causal, module.window)
    seen = seen.reshape((1,) * (scores.ndim - 2) + seen.shape)
    if mask is not None:
        seen = seen & mask[..., None, :, :]
    weights = masked_softmax(scores, seen)  # [..., H, T, S]
    values = jnp.moveaxis(_affine('...sm,mhd->...shd', z, A_v, c_v), -3, -1)  # [..., H, d, S]
    mix = _mix(weights, values)
    mixed = jnp.moveaxis(mix()[..., 0], -3, -2)  # [..., T, H, d]
    A_o = p['out']['V'].reshape(heads, d, -1)
    return (*met, mix), _affine('...thd,hdk->...tk', mixed, A_o, p['out']['b'])


def _inside(
    module: GatedCrossAttention | LatentCrossAttention,
    p: Any,
    x: Array,
    z: Array,
    mask: Array | None,
    deterministic: bool,
) -> Composition:
    """The composition of the attention inside another motif."""
    fields = Attention(module.heads, kv_heads=module.kv_heads, dropout=module.dropout)
    variables = {'params': p['attention']}
    return attention(fields, variables, x, z, mask, deterministic=deterministic)


def _meeting(
    name: str,
    x_is: str,
    z_is: str,
    x: Array,
    z: Array,
    A_x: Array,
    c_x: Array,
    A_z: Array,
    c_z: Array,
) -> Product:
    """(A_x x + c_x)ᵀ(A_z z + c_z) / √d of every head: A_x [n, H, d], A_z [m, H, d], c [H, d]."""
    A_z, c_z = A_z / A_z.shape[-1] ** 0.5, c_z / c_z.shape[-1] ** 0.5
    return Product(
        name,
        x_is,
        z_is,
        x,
        z,
        W=jnp.einsum('mhd,nhd->mnh', A_z, A_x),
        U=jnp.einsum('mhd,hd->mh', A_z, c_x),
        V=jnp.einsum('nhd,hd->nh', A_x, c_z),
        b=jnp.einsum('hd,hd->h', c_x, c_z),
    )


def _mix(weights: Array, values: Array) -> Product:
    """weights [..., H, T, S] and values [..., H, d, S] → Σ_s p_s v_s [..., H, T, d, 1]."""
    return Product(
        name='mix',
        x_is='one feature of the values, at all positions',
        z_is='the weights of all positions, the softmax of the scores',
        x=values[..., None, :, :],
        z=weights[..., None, :],
        W=make_inner(weights.shape[-1]),
    )


def _affine(equation: str, x: Array, A: Array, c: Array) -> Array:
    """The sum, plus c on its last axes."""
    y = jnp.einsum(equation, x, A)
    return y + c.reshape((1,) * (y.ndim - c.ndim) + c.shape)
