"""Converters for attention, which first multiplies tokens, and then weights and values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mi.layers import add_bias, expand_rank
from mi.motifs.attention import (
    Attention,
    GatedCrossAttention,
    LatentCrossAttention,
    align_tokens,
    masked_softmax,
)
from mi.motifs.convolutional_attention import ConvolutionalSelfAttention
from mi.motifs.positions import compute_sinusoids, is_visible, rotate
from mi.unify.composition import Composition, Params, Product, Variables, make_inner

KEY_IS = 'the key token'
QUERY_IS = 'the query token'
DISTANCE_IS = 'the sinusoids of the distance'
SOFTMAX = 'the softmax of the scores, and the affine maps of values and output'


class _TokenMap(NamedTuple):
    """Tokens [..., n], and an affine map for each head with A [n, H, d] and c [H, d]."""

    description: str
    tokens: Array
    A: Array
    c: Array


def convert_attention(  # noqa: PLR0913 - `as_mi` passes the arguments of the module's call
    module: Attention,
    variables: Variables,
    x: Array,
    z: Array | None = None,
    mask: Array | None = None,
    *,
    decode: bool = False,
    deterministic: bool = True,
) -> Composition:
    """Convert attention to the products that compute its scores and its mix.

    In the scores, x is the key token and z the query token. There is one output per head, with W_h
    = A_q A_kᵀ / √d. The biases of queries and keys give U, V and b. With 'relative' positions, u is
    part of the query bias, and there is a second product of the query token and the sinusoids of
    the distance, with W_h = A_q Rᵀ / √d and the bias v. With 'rotary' positions, W would depend on
    the distance, so the streams are the rotated key and query of each head instead, and W is their
    inner product divided by √d.

    In the mix, x [d, S] holds the values of a head, z [S] its weights, and W is their inner
    product.

    The arguments are those of the module's call.

    Raises:
      ValueError: if `decode` is True, or dropout is active.
    """
    if decode or (module.dropout and not deterministic):
        raise ValueError(
            f'as_mi requires a full pass without dropout (got decode={decode}, '
            f'deterministic={deterministic}). Try the defaults'
        )
    products, output = _compute_products(
        module, variables['params'], x, x if z is None else z, mask
    )
    around = 'the rotation of queries and keys, ' if module.positions == 'rotary' else ''
    return Composition(products, output, around + SOFTMAX)


def convert_gated_cross_attention(
    module: GatedCrossAttention,
    variables: Variables,
    x: Array,
    z: Array,
    mask: Array | None = None,
    *,
    deterministic: bool = True,
) -> Composition:
    """Convert gated cross-attention to its attention's products, and tanh(a) times the output."""
    params = variables['params']
    inner = _convert_inner(module, params, x, z, mask, deterministic)
    gate = Product(
        name='gate',
        x_is='the output of the attention',
        z_is='tanh(a), one learned number',
        x=inner.output,
        z=jnp.tanh(params['a'])[None],
        W=jnp.eye(x.shape[-1])[None],
    )
    x, _ = align_tokens(x, z)
    return Composition(
        (*inner.products, gate), x + gate(), f'{SOFTMAX}, and the sum with the input'
    )


def convert_latent_cross_attention(
    module: LatentCrossAttention,
    variables: Variables,
    z: Array,
    mask: Array | None = None,
    *,
    deterministic: bool = True,
) -> Composition:
    """Convert latent cross-attention like `Attention`, with the latents as query tokens."""
    params = variables['params']
    x, z = align_tokens(params['latents'], z)
    inner = _convert_inner(module, params, x, z, mask, deterministic)
    return Composition(inner.products, x + inner.output, f'{SOFTMAX}, and the sum with the latents')


def convert_convolutional_self_attention(
    module: ConvolutionalSelfAttention, variables: Variables, x: Array
) -> Composition:
    """Convert convolutional self-attention to its scores, with x = r_δ and z = v_h, and its mix."""
    params = variables['params']
    Delta, alpha = params['Delta'], params['alpha']
    *leading, num_rows, num_columns, input_size = x.shape

    # The offsets between all positions of the grid, scored by each head.
    axes = jnp.arange(num_rows), jnp.arange(num_columns)
    grid = jnp.stack(jnp.meshgrid(*axes, indexing='ij'), axis=-1)
    grid = grid.reshape(-1, 2).astype(jnp.float32)
    delta = grid[None] - grid[:, None]  # [query, key, 2]
    v = -alpha[:, None] * jnp.concatenate([jnp.ones((module.heads, 1)), -2 * Delta], axis=-1)
    scores = Product(
        name='scores',
        x_is='r, the square and the entries of the offset from query to key',
        z_is='v of each head, its sharpness and center',
        x=jnp.concatenate([(delta**2).sum(-1, keepdims=True), delta], axis=-1),
        z=v[:, None, None],
        W=make_inner(3),
    )
    weights = jax.nn.softmax(scores()[..., 0])  # [H, query, key]

    # The mix of the values, summed over the heads.
    tokens = x.reshape(*leading, num_rows * num_columns, input_size)
    values = jnp.einsum('...sn,hnk->...hks', tokens, params['V'])
    mix = _make_mix_product(weights, values)
    mixture = mix().sum(-4)[..., 0].reshape(*leading, num_rows, num_columns, module.features)
    output = add_bias(mixture, params['b'])
    return Composition(
        (scores, mix), output, 'the softmax of the scores, the map V, the sum over heads'
    )


def _compute_products(
    module: Attention, params: Params, x: Array, z: Array, mask: Array | None
) -> tuple[tuple[Product, ...], Array]:
    """Return the products of the attention, and its output."""
    x, z = align_tokens(x, z)
    score_products, scores = _compute_scores(module, params, x, z)

    # The weights of the visible keys.
    query_positions, key_positions = _get_positions(x, z)
    distances = query_positions[:, None] - key_positions[None]
    visible = expand_rank(is_visible(distances, module.causal, module.window), scores.ndim)
    if mask is not None:
        visible = visible & mask[..., None, :, :]
    weights = masked_softmax(scores, visible)  # [..., H, T, S]

    # The mix of the values, and the output.
    kv_heads = module.kv_heads or module.heads
    A_v, c_v = _get_head_map(params['value'], kv_heads, module.heads)
    values = jnp.moveaxis(_map_affine('...sm,mhd->...shd', z, A_v, c_v), -3, -1)  # [..., H, d, S]
    mix = _make_mix_product(weights, values)
    mixture = jnp.moveaxis(mix()[..., 0], -3, -2)  # [..., T, H, d]
    A_o, c_o = params['out']['V'].reshape(*c_v.shape, -1), params['out']['b']
    return (*score_products, mix), _map_affine('...thd,hdk->...tk', mixture, A_o, c_o)


def _compute_scores(
    module: Attention, params: Params, x: Array, z: Array
) -> tuple[list[Product], Array]:
    """Return the products that add up to the scores, and the scores [..., H, T, S]."""
    heads = module.heads
    kv_heads = module.kv_heads or heads
    A_q, c_q = _get_head_map(params['query'], heads, heads)
    A_k, c_k = _get_head_map(params['key'], kv_heads, heads)

    # With rotary positions, the streams are the rotated queries and keys.
    if module.positions == 'rotary':
        first_position = z.shape[-2] - x.shape[-2]
        queries = rotate(_map_affine('...tn,nhd->...htd', x, A_q, c_q[:, None]), first_position)
        keys = rotate(_map_affine('...sm,mhd->...hsd', z, A_k, c_k[:, None]), 0)
        head_features = c_q.shape[-1]
        product = Product(
            name='scores',
            x_is='the key of a head, rotated by its position',
            z_is='the query of that head, rotated by its position',
            x=keys[..., None, :, :],
            z=queries[..., :, None, :],
            W=make_inner(head_features) / head_features**0.5,
        )
        return [product], product()[..., 0]

    # Otherwise the streams are the tokens, and the distances of relative positions.
    no_bias = jnp.zeros(c_q.shape)
    u, v = (params.get(bias_name, no_bias) for bias_name in 'uv')
    key_map = _TokenMap(KEY_IS, z[..., None, :, :], A_k, c_k)
    query_map = _TokenMap(QUERY_IS, x[..., :, None, :], A_q, c_q + u)
    products = [_make_score_product('scores', key_map, query_map)]
    if module.positions == 'relative':
        query_positions, key_positions = _get_positions(x, z)
        r = compute_sinusoids(query_positions[:, None] - key_positions[None], x.shape[-1])
        R = _split_heads(params['R'], kv_heads, heads)
        distance_map = _TokenMap(DISTANCE_IS, r, R, no_bias)
        query_map = query_map._replace(c=c_q + v)
        products.append(_make_score_product('position scores', distance_map, query_map))
    return products, jnp.moveaxis(sum(product() for product in products), -1, -3)


def _get_positions(x: Array, z: Array) -> tuple[Array, Array]:
    """Return the positions of queries and keys, where the last query and last key coincide."""
    num_queries, num_keys = x.shape[-2], z.shape[-2]
    return jnp.arange(num_queries) + num_keys - num_queries, jnp.arange(num_keys)


def _get_head_map(params: Params, num_maps: int, heads: int) -> tuple[Array, Array]:
    """Return A [n, H, d] and c [H, d] of the affine map to queries, keys or values."""
    A, c = (_split_heads(params[field], num_maps, heads) for field in 'Vb')
    return A, c


def _split_heads(matrix: Array, num_maps: int, heads: int) -> Array:
    """Split [..., num_maps · d] into [..., H, d], where H / num_maps heads share each map."""
    maps = matrix.reshape(*matrix.shape[:-1], num_maps, -1)
    return jnp.repeat(maps, heads // num_maps, axis=-2)


def _convert_inner(
    module: GatedCrossAttention | LatentCrossAttention,
    params: Params,
    x: Array,
    z: Array,
    mask: Array | None,
    deterministic: bool,
) -> Composition:
    """Convert the attention inside another motif."""
    fields = Attention(module.heads, kv_heads=module.kv_heads, dropout=module.dropout)
    variables = {'params': params['attention']}
    return convert_attention(fields, variables, x, z, mask, deterministic=deterministic)


def _make_score_product(name: str, x_map: _TokenMap, z_map: _TokenMap) -> Product:
    """Return the product (A_x x + c_x)ᵀ(A_z z + c_z) / √d per head."""
    x_is, x, A_x, c_x = x_map
    z_is, z, A_z, c_z = z_map
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


def _make_mix_product(weights: Array, values: Array) -> Product:
    """Return the product Σ_s p_s v_s of weights [..., H, T, S] and values [..., H, d, S]."""
    return Product(
        name='mix',
        x_is='one feature of the values, at all positions',
        z_is='the weights of all positions, the softmax of the scores',
        x=values[..., None, :, :],
        z=weights[..., None, :],
        W=make_inner(weights.shape[-1]),
    )


def _map_affine(equation: str, x: Array, A: Array, c: Array) -> Array:
    return add_bias(jnp.einsum(equation, x, A), c)
