"""Converters of attention: scores multiply tokens, and the mix multiplies weights and values."""

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
SOFTMAX = 'the softmax of the scores, and the affine maps of values and output'


def convert_attention(  # noqa: PLR0913 - those of the module's call
    module: Attention,
    variables: Variables,
    x: Array,
    z: Array | None = None,
    mask: Array | None = None,
    *,
    decode: bool = False,
    deterministic: bool = True,
) -> Composition:
    """Convert attention to the products of its scores and of its mix.

    Scores: x is the key token, z the query token, with one output per head and W_h = A_q A_kᵀ / √d.
    The biases of queries and keys give U, V and b; u is part of the query bias. 'relative' has a
    second product of the query token and the sinusoids of the distance, W_h = A_q Rᵀ / √d, with v.
    With 'rotary', W would depend on the distance. Its streams are therefore the rotated key and
    query of each head, and W is their inner product divided by √d.

    Mix: x [d, S] are the values of a head, z [S] its weights, and W is their inner product.

    The parameters are those of the module's call.

    Raises:
      ValueError: with `decode` or with dropout.
    """
    if decode or (module.dropout and not deterministic):
        raise ValueError(
            f'as_mi needs a full pass without dropout (got decode={decode}, '
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
    """Convert to the products of the attention, and tanh(a) times its output (W the identity)."""
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
    """Convert to the products of the attention, with the latents as query tokens."""
    params = variables['params']
    x, z = align_tokens(params['latents'], z)
    inner = _convert_inner(module, params, x, z, mask, deterministic)
    return Composition(inner.products, x + inner.output, f'{SOFTMAX}, and the sum with the latents')


def convert_convolutional_self_attention(
    module: ConvolutionalSelfAttention, variables: Variables, x: Array
) -> Composition:
    """Convert to scores with x = r_δ and z = v of a head, and a mix over all positions."""
    params = variables['params']
    Delta, alpha = params['Delta'], params['alpha']
    *leading, rows, columns, n = x.shape
    grid = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing='ij'), axis=-1)
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
    values = jnp.einsum('...sn,hnk->...hks', x.reshape(*leading, rows * columns, n), params['V'])
    mix = _make_mix_product(weights, values)
    y = mix().sum(-4)[..., 0].reshape(*leading, rows, columns, module.features)
    output = add_bias(y, params['b'])
    return Composition(
        (scores, mix), output, 'the softmax of the scores, the map V, the sum over heads'
    )


def _compute_products(
    module: Attention, params: Params, x: Array, z: Array, mask: Array | None
) -> tuple[tuple[Product, ...], Array]:
    """Return the products and the output; d is the width of the query parameters."""
    x, z = align_tokens(x, z)
    heads, T, S = module.heads, x.shape[-2], z.shape[-2]
    kv_heads = module.kv_heads or heads
    d = params['query']['b'].shape[0] // heads

    def split_heads(matrix: Array, group: int) -> Array:
        """Return [..., H, d] for [..., (H / group) · d]; a group of heads shares its entries."""
        head_matrix = matrix.reshape(*matrix.shape[:-1], heads // group, d)
        return jnp.repeat(head_matrix, group, axis=-2)

    # Parameters per head, and positions.
    group = heads // kv_heads
    A_q, c_q = (split_heads(params['query'][name], 1) for name in 'Vb')
    A_k, c_k = (split_heads(params['key'][name], group) for name in 'Vb')
    A_v, c_v = (split_heads(params['value'][name], group) for name in 'Vb')
    query_positions, key_positions = jnp.arange(T) + S - T, jnp.arange(S)
    distance = query_positions[:, None] - key_positions[None]

    # The products that add up to the scores.
    query_tokens, key_tokens = x[..., :, None, :], z[..., None, :, :]
    if module.positions == 'rotary':
        query = rotate(_map_affine('...tn,nhd->...thd', x, A_q, c_q), query_positions)
        key = rotate(_map_affine('...sm,mhd->...shd', z, A_k, c_k), key_positions)
        score_products = [
            Product(
                name='scores',
                x_is='the key of a head, rotated by its position',
                z_is='the query of that head, rotated by its position',
                x=jnp.moveaxis(key, -2, -3)[..., None, :, :],
                z=jnp.moveaxis(query, -2, -3)[..., :, None, :],
                W=make_inner(d) / d**0.5,
            )
        ]
        scores = score_products[0]()[..., 0]
    else:
        u, v = (params.get(name, jnp.zeros((heads, d))) for name in 'uv')
        score_products = [
            _make_score_product(
                'scores', KEY_IS, QUERY_IS, key_tokens, query_tokens, A_k, c_k, A_q, c_q + u
            )
        ]
        if module.positions == 'relative':
            r_is, r = 'the sinusoids of the distance', compute_sinusoids(distance, x.shape[-1])
            R, no_bias = split_heads(params['R'], group), jnp.zeros((heads, d))
            score_products.append(
                _make_score_product(
                    'position scores', r_is, QUERY_IS, r, query_tokens, R, no_bias, A_q, c_q + v
                )
            )
        scores = jnp.moveaxis(sum(product() for product in score_products), -1, -3)

    # The softmax, and the mix of the values.
    visible = expand_rank(is_visible(distance, module.causal, module.window), scores.ndim)
    if mask is not None:
        visible = visible & mask[..., None, :, :]
    weights = masked_softmax(scores, visible)  # [..., H, T, S]
    values = jnp.moveaxis(_map_affine('...sm,mhd->...shd', z, A_v, c_v), -3, -1)  # [..., H, d, S]
    mix = _make_mix_product(weights, values)
    mixed = jnp.moveaxis(mix()[..., 0], -3, -2)  # [..., T, H, d]
    A_o = params['out']['V'].reshape(heads, d, -1)
    return (*score_products, mix), _map_affine('...thd,hdk->...tk', mixed, A_o, params['out']['b'])


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


def _make_score_product(  # noqa: PLR0913 - the parts of a Product
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
    """Return the product (A_x x + c_x)ᵀ(A_z z + c_z) / √d per head.

    It has nine parameters because a product has two streams, each with a description, an input and
    an affine map: A_x [n, H, d], A_z [m, H, d], c [H, d].
    """
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
    """Return Σ_s p_s v_s [..., H, T, d, 1] for weights [..., H, T, S], values [..., H, d, S]."""
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
