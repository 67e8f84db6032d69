"""Bilinear pooling, written with the one equation: what each factorisation makes of W."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mi.layers import align_streams
from mi.motifs.pooling import BLOCK, MFB, MLB, MUTAN, CompactBilinear
from mi.unify.composition import Composition, Product, as_mi


@as_mi.register
def mlb(module: MLB, variables: Any, x: Array, z: Array) -> Composition:
    """W[i, i, k] = O[i, k] between the two tanh."""
    p = variables['params']
    x, z = align_streams(x, z)
    product = Product(
        name='low-rank pooling',
        x_is='tanh of a linear map of the input',
        z_is='tanh of a linear map of the context',
        x=jnp.tanh(x @ p['Q']),
        z=jnp.tanh(z @ p['P']),
        W=jnp.eye(module.rank)[:, :, None] * p['O'][:, None, :],
        b=p['b'],
    )
    return Composition((product,), product(), 'tanh of both streams')


@as_mi.register
def mfb(module: MFB, variables: Any, x: Array, z: Array, deterministic: bool = True) -> Composition:
    """W[i, j, k] = Σ_f P[i, (k, f)] Q[j, (k, f)]."""
    if not deterministic:
        raise ValueError('as_mi of MFB is that without dropout; give deterministic=True')
    k, f = module.features, module.factors
    P, Q = (variables['params'][name].reshape(-1, k, f) for name in 'PQ')
    product = _product('factorised pooling', x, z, jnp.einsum('ikf,jkf->ijk', P, Q))
    y = product()
    if not module.normalize:
        return Composition((product,), y)
    y = jnp.sign(y) * jnp.sqrt(jnp.abs(y))
    y = y / jnp.linalg.norm(y, axis=-1, keepdims=True)
    return Composition((product,), y, 'signed root and division by the length')


@as_mi.register
def mutan(module: MUTAN, variables: Any, x: Array, z: Array) -> Composition:
    """W = a core with slices of rank R, times P, Q and O along its axes."""
    p = variables['params']
    core = jnp.einsum('rac,rbc->abc', p['M'], p['N'])
    W = jnp.einsum('ia,jb,abc,ck->ijk', p['P'], p['Q'], core, p['O'])
    product = _product('Tucker fusion', x, z, W, p['b'])
    return Composition((product,), product())


@as_mi.register
def block(module: BLOCK, variables: Any, x: Array, z: Array) -> Composition:
    """W = a core that is zero off the blocks of its diagonal, times P, Q and O along its axes."""
    p = variables['params']
    blocks = jnp.einsum('drac,drbc->dabc', p['M'], p['N'])
    core = jnp.zeros((p['O'].shape[0],) * 3)
    L = blocks.shape[-1]
    for d, cube in enumerate(blocks):
        at = slice(d * L, (d + 1) * L)
        core = core.at[at, at, at].set(cube)
    W = jnp.einsum('ia,jb,abc,ck->ijk', p['P'], p['Q'], core, p['O'])
    product = _product('block-superdiagonal fusion', x, z, W, p['b'])
    return Composition((product,), product())


@as_mi.register
def compact_bilinear(module: CompactBilinear, variables: Any, x: Array, z: Array) -> Composition:
    """W[i, j, k] = scale · sign_i sign_j where hash_i + hash_j ≡ k, and 0 elsewhere."""
    d = module.features
    hash_z, sign_z, hash_x, sign_x = module.hashes(z.shape[-1], x.shape[-1])
    at = jax.nn.one_hot((hash_z[:, None] + hash_x[None, :]) % d, d)
    signs = sign_z[:, None] * sign_x[None, :]
    m, n = signs.shape
    scale = jnp.sqrt(d / n if module.context == 'one_hot' else d / (m * n))
    product = _product('compact bilinear pooling', x, z, scale * signs[:, :, None] * at)
    return Composition((product,), product())


def _product(name: str, x: Array, z: Array, W: Array, b: Array | None = None) -> Product:
    return Product(name=name, x_is='the input', z_is='the context', x=x, z=z, W=W, b=b)
