"""Implementations of layers for `benchmarks.layers`: ours, naive ones, and PyTorch's."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import mi
from benchmarks.regimes import Regime
from mi.motifs.normalization import FeatureWiseModulation

Tensor = Any  # an array of JAX or of torch
Arrays = dict[str, Tensor]  # by name, as the letters of the equation
Side = Callable[[Arrays], Tensor]


def jax_sides(regime: Regime) -> dict[str, Side]:
    """Return name → JAX function of all arrays except dy, with ours first."""
    module: nn.Module
    # FiLM.
    if regime.form == 'film':
        module = FeatureWiseModulation()

        def film(a: Arrays) -> Tensor:
            zeros = jnp.zeros(regime.n)
            params = {name: {'V': a[name], 'b': zeros} for name in ('gamma', 'beta')}
            return module.apply({'params': params}, a['x'], a['z'])

        def one_product(a: Arrays) -> Tensor:
            both = a['z'] @ jnp.concatenate([a['gamma'], a['beta']], axis=1)
            gamma, beta = jnp.split(both, 2, axis=1)
            return (1 + gamma) * a['x'] + beta

        return {'mi': film, 'one product': one_product}
    # One matrix per id.
    if regime.form == 'ids':
        module = mi.MultiHead(regime.k, contexts=regime.m)

        def dense(a: Arrays) -> Tensor:
            z = jax.nn.one_hot(a['z'], regime.m)
            return jnp.einsum('bm,mnk,bn->bk', z, a['W'], a['x']) + z @ a['U']

        def gather(a: Arrays) -> Tensor:
            return jnp.einsum('bn,bnk->bk', a['x'], a['W'][a['z']]) + a['U'][a['z']]

        return {'mi': _apply(module, 'WU'), 'einsum': dense, 'gather': gather}
    # Full and low rank.
    if regime.form == 'low_rank':
        module = mi.LowRankMultiplicativeInteraction(regime.k, rank=regime.rank)
        param_names = 'PQOUVb'
        equation, operands = 'bm,mr,nr,rk,bn->bk', 'zPQOx'
    else:
        module, param_names = mi.MultiplicativeInteraction(regime.k), 'WUVb'
        equation = 'sm,mnk,stn->stk' if regime.shared else 'bm,mnk,bn->bk'
        operands = 'zWx'

    def einsum(a: Arrays) -> Tensor:
        squeezed = a | {'z': a['z'][:, 0]} if regime.shared else a
        y = jnp.einsum(equation, *(squeezed[name] for name in operands))
        return y + a['z'] @ a['U'] + a['x'] @ a['V'] + a['b']

    return {'mi': _apply(module, param_names), 'einsum': einsum}


def _apply(module: nn.Module, param_names: str) -> Side:
    """Return a function that applies the module to arrays. Each letter names a parameter."""

    def apply(a: Arrays) -> Tensor:
        return module.apply({'params': {name: a[name] for name in param_names}}, a['x'], a['z'])

    return apply


def torch_sides(regime: Regime) -> dict[str, Side]:
    """Return name → torch function of all arrays except dy: PyTorch's layer, and orders by hand."""
    import torch

    F = torch.nn.functional
    m, n, k = regime.m, regime.n, regime.k
    # FiLM.
    if regime.form == 'film':

        def film(a: Arrays) -> Tensor:
            return (1 + a['z'] @ a['gamma']) * a['x'] + a['z'] @ a['beta']

        return {'by hand': film, 'compiled': torch.compile(film)}
    # One matrix per id.
    if regime.form == 'ids':

        def loop(a: Arrays) -> Tensor:
            y = torch.zeros(*a['x'].shape[:-1], k)
            for id_ in range(m):
                rows = (a['z'] == id_).nonzero()[:, 0]
                y = y.index_add(0, rows, torch.addmm(a['U'][id_], a['x'][rows], a['W'][id_]))
            return y

        def sort_and_split(a: Arrays) -> Tensor:
            order = torch.argsort(a['z'])
            id_counts = torch.bincount(a['z'], minlength=m).tolist()
            id_rows = torch.split(a['x'][order], id_counts)
            y = torch.cat([x @ W for x, W in zip(id_rows, a['W'].unbind(0), strict=True)])
            return y[torch.argsort(order)] + a['U'][a['z']]

        return {'loop over ids': loop, 'sort and split': sort_and_split}

    # Full and low rank.
    def affine(a: Arrays) -> Tensor:
        return a['z'] @ a['U'] + F.linear(a['x'], a['V'].T, a['b'])

    if regime.form == 'low_rank':
        return {'by hand': lambda a: ((a['z'] @ a['P']) * (a['x'] @ a['Q'])) @ a['O'] + affine(a)}

    def bilinear(a: Arrays) -> Tensor:  # torch.nn.Bilinear's function
        z = a['z'].expand(*a['x'].shape[:-1], m).contiguous()
        return F.bilinear(z, a['x'], a['W'].permute(2, 0, 1)) + affine(a)

    def x_first(a: Arrays) -> Tensor:
        x = a['x'].reshape(-1, n)
        xW = (x @ a['W'].transpose(0, 1).reshape(n, m * k)).view(-1, m, k)
        z = a['z'].expand(*a['x'].shape[:-1], m).reshape(-1, 1, m)
        return torch.bmm(z, xW).view(*a['x'].shape[:-1], k) + affine(a)

    def z_first(a: Arrays) -> Tensor:
        zW = (a['z'].reshape(-1, m) @ a['W'].view(m, n * k)).view(-1, n, k)
        x = a['x'].reshape(zW.shape[0], -1, n)
        return torch.bmm(x, zW).view(*a['x'].shape[:-1], k) + affine(a)

    sides = {'Bilinear': bilinear, 'x first': x_first}
    if regime.shared or math.prod(regime.rows) * n * k < 2**28:
        sides['z first'] = z_first
    return sides
