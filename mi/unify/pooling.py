"""Converters for bilinear pooling, which compute W from the factors of each module."""

import jax
import jax.numpy as jnp
from jax import Array

from mi.layers import align_streams
from mi.motifs.pooling import BLOCK, MFB, MLB, MUTAN, CompactBilinear
from mi.unify.composition import Composition, Product, Variables


def convert_mlb(module: MLB, variables: Variables, x: Array, z: Array) -> Composition:
    """Convert MLB to a product of its two tanh with W[i, i, k] = O[i, k]."""
    params = variables['params']
    x, z = align_streams(x, z)
    product = Product(
        name='low-rank pooling',
        x_is='tanh of a linear map of the input',
        z_is='tanh of a linear map of the context',
        x=jnp.tanh(x @ params['Q']),
        z=jnp.tanh(z @ params['P']),
        W=jnp.eye(module.rank)[:, :, None] * params['O'][:, None, :],
        b=params['b'],
    )
    return Composition((product,), product(), 'tanh of both streams')


def convert_mfb(
    module: MFB, variables: Variables, x: Array, z: Array, deterministic: bool = True
) -> Composition:
    """Convert MFB to a product with W[i, j, k] = Σ_f P[i, (k, f)] Q[j, (k, f)]."""
    if not deterministic:
        raise ValueError('as_mi requires a call of MFB without dropout. Try deterministic=True')
    window_shape = module.features, module.factors
    P, Q = (variables['params'][factor].reshape(-1, *window_shape) for factor in 'PQ')
    product = _make_product('factorized pooling', x, z, jnp.einsum('ikf,jkf->ijk', P, Q))
    output = product()
    if not module.normalize:
        return Composition((product,), output)
    output = jnp.sign(output) * jnp.sqrt(jnp.abs(output))
    output = output / jnp.linalg.norm(output, axis=-1, keepdims=True)
    return Composition((product,), output, 'signed root and division by the length')


def convert_mutan(module: MUTAN, variables: Variables, x: Array, z: Array) -> Composition:
    """Convert MUTAN to a product, where W is a core with slices of rank R times P, Q and O."""
    params = variables['params']
    core = jnp.einsum('rac,rbc->abc', params['M'], params['N'])
    W = jnp.einsum('ia,jb,abc,ck->ijk', params['P'], params['Q'], core, params['O'])
    product = _make_product('Tucker fusion', x, z, W, params['b'])
    return Composition((product,), product())


def convert_block(module: BLOCK, variables: Variables, x: Array, z: Array) -> Composition:
    """Convert BLOCK to a product, where W is a block-superdiagonal core times P, Q and O."""
    params = variables['params']
    cubes = jnp.einsum('drac,drbc->dabc', params['M'], params['N'])
    core = jnp.zeros((params['O'].shape[0],) * 3)
    block_size = cubes.shape[-1]
    for block_index, cube in enumerate(cubes):
        block = slice(block_index * block_size, (block_index + 1) * block_size)
        core = core.at[block, block, block].set(cube)
    W = jnp.einsum('ia,jb,abc,ck->ijk', params['P'], params['Q'], core, params['O'])
    product = _make_product('block-superdiagonal fusion', x, z, W, params['b'])
    return Composition((product,), product())


def convert_compact_bilinear(
    module: CompactBilinear, variables: Variables, x: Array, z: Array
) -> Composition:
    """Convert compact pooling: W[i, j, k] = scale · sign_i sign_j if hash_i + hash_j ≡ k, or 0."""
    features = module.features
    hash_z, sign_z, hash_x, sign_x = module.draw_hashes(z.shape[-1], x.shape[-1])
    is_target = jax.nn.one_hot((hash_z[:, None] + hash_x[None, :]) % features, features)
    signs = sign_z[:, None] * sign_x[None, :]
    num_terms = len(sign_x) if module.context == 'one_hot' else signs.size
    scale = jnp.sqrt(features / num_terms)
    product = _make_product('compact bilinear pooling', x, z, scale * signs[:, :, None] * is_target)
    return Composition((product,), product())


def _make_product(name: str, x: Array, z: Array, W: Array, b: Array | None = None) -> Product:
    return Product(name=name, x_is='the input', z_is='the context', x=x, z=z, W=W, b=b)
