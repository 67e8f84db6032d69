"""Hypernetworks: a context z makes the weights of the network that x passes.

Shapes: x [..., n] the input, z [..., m] the context, y [..., k] the output; W'(z) [..., n, k] and
b'(z) [..., k] the generated weights. Source: Ha et al., HyperNetworks, 2017.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from mi.kernels.bilinear import accumulation_dtype, linear
from mi.layers import (
    Affine,
    Context,
    MultiplicativeInteraction,
    align_streams,
    check_dense,
    context_init,
    input_init,
    interaction_init,
)

Activation = Callable[[Array], Array]
Hyperfan = Literal['in', 'out']


class LinearHypernetwork(nn.Module):
    """The full form, its weights made first: y = W'(z)x + b'(z), W'(z) = zᵀW + V, b'(z) = zᵀU + b.

    The same function of the same parameters as `MultiplicativeInteraction` (Jayakumar et al.,
    2020), in the order that is right where many inputs share a context: W'(z) is made once per row
    of z, and takes n · k numbers for each.

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`.
    """

    features: int
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """x [..., n], z [..., m] → [..., k]; ValueError if the leading axes do not broadcast."""
        x, z = align_streams(x, z)
        m, n, k = z.shape[-1], x.shape[-1], self.features
        W = self.param('W', interaction_init(self.context, 1 / 3), (m, n, k), self.param_dtype)
        U = self.param('U', context_init(self.context, 1 / 3), (m, k), self.param_dtype)
        V = self.param('V', input_init(1 / 3), (n, k), self.param_dtype)
        b = self.param('b', initializers.zeros, (k,), self.param_dtype)
        x, z, W, U, V, b = nn.dtypes.promote_dtype(x, z, W, U, V, b, dtype=self.dtype)
        of_z = linear(z, W.reshape(m, n * k)).reshape(*z.shape[:-1], n, k)
        return _affine(x, of_z + _row(V, z), linear(z, U) + _row(b, z))


class MLPHypernetwork(nn.Module):
    """A hypernetwork with hidden layers: y = W'(z)x + b'(z), made of h = MLP(z) [..., d].

        W'(z) = hᵀW + V,   b'(z) = hᵀU + b

    The head is the `MultiplicativeInteraction` of x and h, which makes W'(z) only where that is the
    cheapest order. V and b start at zero, W and U so that y starts with the variance of a layer
    that is not generated (Chang et al., Principled Weight Initialization for Hypernetworks, 2020):

        hyperfan-in:   Var W = 1 / (2 n · d · E[h²])    Var U = 1 / (2 d · E[h²])
        hyperfan-out:  Var W = 1 / (k · d · E[h²])      Var U = max(0, 1 − n/k) / (d · E[h²])

    This is their c / (c_b · fan_in · d · Var h), where c_b = 2 as y has a generated bias too, and
    c = 1 as no relu follows. In: y has unit variance for unit-variance x and z. Out: so has the
    gradient of x for that of y, and so has y for n ≤ k. E[h²] is that of a unit-variance Gaussian
    through the activation; the hidden layers keep their inputs at unit variance.

    With `chunk` the head is small: W is [d, chunk] and makes W'(z) a piece at a time, each from an
    h of its own, of z and of a learned embedding of the piece (von Oswald et al., Continual
    Learning with Hypernetworks, 2020). The embedding joins z as a second input of the first hidden
    layer, e [pieces + 1, hidden[0]] with that layer's weights multiplied in; the last is for b'(z).

    Attributes:
      features: k.
      hidden: widths of the hidden layers, one number for one layer; None for one as wide as k.
      activation: of the hidden layers.
      hyperfan: 'in' or 'out'.
      chunk: how many entries of W'(z) the head makes at a time; None for all.
      context: 'dense' or 'one_hot'; decides the scale at which the first layer is initialised.
      dtype, param_dtype: as in `MultiplicativeInteraction`.
    """

    features: int
    hidden: int | Sequence[int] | None = (64,)
    activation: Activation = nn.relu
    hyperfan: Hyperfan = 'in'
    chunk: int | None = None
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """x [..., n], z [..., m] → [..., k].

        Raises:
          ValueError: if the leading axes do not broadcast, or on a bad hidden, hyperfan or chunk.
        """
        x, z = align_streams(x, z)
        n, k = x.shape[-1], self.features
        hidden = k if self.hidden is None else self.hidden
        pieces = _pieces(n * k, self.chunk)
        h = _Hidden(
            hidden=hidden,
            activation=self.activation,
            embeddings=pieces + 1 if pieces else 0,
            context=self.context,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name='hidden',
        )(z)
        d = h.shape[-1]
        of_W, of_U = _hyperfan(self.hyperfan, n, k)
        W_init = _through(self.activation, initializers.normal(of_W * d**-0.5))
        U_init = _through(self.activation, initializers.normal(of_U * d**-0.5))
        zeros = initializers.zeros
        if not pieces:
            return MultiplicativeInteraction(
                k,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                W_init=W_init,
                U_init=U_init,
                V_init=zeros,
                name='head',
            )(x, h)
        W = self.param('W', W_init, (d, self.chunk), self.param_dtype)
        U = self.param('U', U_init, (d, k), self.param_dtype)
        V = self.param('V', zeros, (n, k), self.param_dtype)
        b = self.param('b', zeros, (k,), self.param_dtype)
        x, h, W, U, V, b = nn.dtypes.promote_dtype(x, h, W, U, V, b, dtype=self.dtype)
        of_z = _joined(linear(h[..., :-1, :], W), n * k).reshape(*z.shape[:-1], n, k)
        return _affine(x, of_z + _row(V, z), linear(h[..., -1, :], U) + _row(b, z))


class Hypernetwork(nn.Module):
    """Any module with its parameters made of z: y = target(x; θ(z)), θ(z) = hᵀW + V, h = MLP(z).

    θ are all P parameters of the target side by side. V starts as the target starts by itself and
    W [d, P] at zero, so that the target has its own initial state, the same for every z. Each
    context has a set of parameters of its own, applied by `jax.vmap`.

    With `chunk`, W is [d, chunk] and makes θ(z) a piece at a time, as in `MLPHypernetwork`.

    Attributes:
      target: the module, called with one array. It may have parameters, but no other variables and
        no need of random numbers.
      hidden: widths of the hidden layers; one number for one layer.
      activation: of the hidden layers.
      chunk: how many entries of θ(z) the head makes at a time; None for all.
      context: as in `MLPHypernetwork`.
      dtype: of the hidden layers; θ(z) has the dtype of V, and the target its own.
      param_dtype: of the parameters other than V.
    """

    target: nn.Module
    hidden: int | Sequence[int] = (64,)
    activation: Activation = nn.relu
    chunk: int | None = None
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Any:
        """x [*rows, ...], z [*rows, m] → [*rows, ...]: what the target returns for each row of x.

        Raises:
          ValueError: if the leading axes of x are not those of z, if the target has variables other
            than parameters, or on a bad hidden or chunk.
        """
        check_dense(z)
        rows = z.shape[:-1]
        if x.shape[: len(rows)] != rows:
            raise ValueError(
                f'x {x.shape} must begin with the axes {rows} of z {z.shape}, '
                f'one set of parameters each; broadcast z'
            )
        target = self.target.clone(parent=None)
        row = jax.ShapeDtypeStruct(x.shape[len(rows) :], x.dtype)
        V = self.param('V', lambda key: _initial(target, key, row))
        flat, unravel = ravel_pytree(V)
        pieces = _pieces(flat.size, self.chunk)
        h = _Hidden(
            hidden=self.hidden,
            activation=self.activation,
            embeddings=pieces,
            context=self.context,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name='hidden',
        )(z)
        W = self.param(
            'W',
            initializers.zeros,
            (h.shape[-1], self.chunk or flat.size),
            self.param_dtype,
        )
        h, W = nn.dtypes.promote_dtype(h, W, dtype=self.dtype)
        of_z = linear(h, W, out_dtype=flat.dtype)
        if pieces:
            of_z = _joined(of_z, flat.size)
        theta = of_z.reshape(-1, flat.size) + flat[None]
        y = jax.vmap(lambda theta, x: target.apply({'params': unravel(theta)}, x))(
            theta, x.reshape(-1, *row.shape)
        )
        return jax.tree.map(lambda a: a.reshape(*rows, *a.shape[1:]), y)


class _Hidden(nn.Module):
    """z [..., m] → h [..., d]; with embeddings, [..., embeddings, d]. Attributes as above."""

    hidden: int | Sequence[int]
    activation: Activation
    embeddings: int
    context: Context
    dtype: DTypeLike | None
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, z: Array) -> Array:
        first, *rest = _widths(self.hidden)
        share = 1 / 2 if self.embeddings else 1
        h = Affine(
            first, self.dtype, self.param_dtype, V_init=context_init(self.context, share), name='0'
        )(z)
        if self.embeddings:
            e_init = initializers.normal(share**0.5)
            e = self.param('e', e_init, (self.embeddings, first), self.param_dtype)
            h = h[..., None, :] + _row(e.astype(h.dtype), z)
        keep = _through(self.activation, input_init())
        for i, width in enumerate(rest, 1):
            h = Affine(width, self.dtype, self.param_dtype, V_init=keep, name=f'{i}')(
                self.activation(h)
            )
        return self.activation(h)


def _affine(x: Array, W: Array, b: Array) -> Array:
    """Wx + b with x [..., n], W [..., n, k], b [..., k]: summed in f32 at least."""
    y = jnp.einsum('...n,...nk->...k', x, W, preferred_element_type=accumulation_dtype(x, W))
    return y.astype(x.dtype) + b


def _row(V: Array, z: Array) -> Array:
    """V with an axis of length 1 for each leading axis of z."""
    return V.reshape((1,) * (z.ndim - 1) + V.shape)


def _joined(pieces: Array, size: int) -> Array:
    """[..., pieces, chunk] → [..., size], what the last piece has too much cut off."""
    return pieces.reshape(*pieces.shape[:-2], -1)[..., :size]


def _pieces(size: int, chunk: int | None) -> int:
    """How many chunks make this many entries; 0 for no chunk."""
    if chunk is not None and chunk < 1:
        raise ValueError(f'chunk = {chunk}: expected at least 1, or None for no chunks')
    return 0 if chunk is None else math.ceil(size / chunk)


def _widths(hidden: int | Sequence[int]) -> tuple[int, ...]:
    widths = (hidden,) if isinstance(hidden, int) else tuple(hidden)
    if not widths or min(widths) < 1:
        raise ValueError(
            f'hidden = {hidden!r}: expected one width of at least 1, or several; '
            f'without hidden layers it is a LinearHypernetwork'
        )
    return widths


def _hyperfan(which: Hyperfan, n: int, k: int) -> tuple[float, float]:
    """The standard deviations that the entries of W'(z) and b'(z) are to have."""
    match which:
        case 'in':
            return (1 / (2 * n)) ** 0.5, (1 / 2) ** 0.5
        case 'out':
            return (1 / k) ** 0.5, max(0, 1 - n / k) ** 0.5
    raise ValueError(f'unknown hyperfan {which!r}; known: {", ".join(get_args(Hyperfan))}')


def _through(activation: Activation, init: Initializer) -> Initializer:
    """init, divided by the root of E[activation(a)²], a ~ N(0, 1): by Gauss–Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)

    def scaled(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        wide = accumulation_dtype(dtype)
        squares = activation(jnp.asarray(nodes, wide)) ** 2
        second_moment = squares @ jnp.asarray(weights / weights.sum(), wide)
        return init(key, shape, dtype, out_sharding) * second_moment.astype(dtype) ** -0.5

    return scaled


def _initial(target: nn.Module, key: Array, row: jax.ShapeDtypeStruct) -> Any:
    """The parameters that the target starts with by itself."""
    variables = target.init(key, jnp.zeros(row.shape, row.dtype))
    if set(variables) != {'params'}:
        raise ValueError(
            f'{type(target).__name__} has the variables {sorted(variables)}; '
            f'a target of a hypernetwork has parameters and nothing else'
        )
    return variables['params']
