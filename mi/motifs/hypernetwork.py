"""Hypernetworks, in which a context z generates the weights of a network that is applied to x.

Shapes: input x [..., n], context z [..., m], output y [..., k]; generated weights W'(z) [..., n, k]
and b'(z) [..., k]. Source: Ha et al., HyperNetworks, 2017.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from mi.kernels.linear import accumulation_dtype, linear
from mi.layers import (
    Affine,
    Context,
    MultiplicativeInteraction,
    add_bias,
    align_streams,
    check_dense,
    context_init,
    input_init,
    interaction_init,
)

if TYPE_CHECKING:
    import chex

Activation = Callable[[Array], Array]
Hyperfan = Literal['in', 'out']
OutSharding = NamedSharding | PartitionSpec | None
Shape = Sequence[int]


class LinearHypernetwork(nn.Module):
    """A linear hypernetwork: y = W'(z)x + b'(z), W'(z) = zᵀW + V, b'(z) = zᵀU + b.

    This is the same function of the same parameters as `MultiplicativeInteraction` (Jayakumar et
    al., 2020), but it always generates W'(z) first. This order is suited to many inputs that share
    a context, because W'(z), with n · k entries, is generated once per row of z.

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`.
    """

    features: int
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """Return y [..., k] for x [..., n] and z [..., m], whose leading axes broadcast."""
        x, z = align_streams(x, z)
        m, n, k = z.shape[-1], x.shape[-1], self.features
        W = self.param('W', interaction_init(self.context, 1 / 3), (m, n, k), self.param_dtype)
        U = self.param('U', context_init(self.context, 1 / 3), (m, k), self.param_dtype)
        V = self.param('V', input_init(1 / 3), (n, k), self.param_dtype)
        b = self.param('b', initializers.zeros, (k,), self.param_dtype)
        x, z, W, U, V, b = nn.dtypes.promote_dtype(x, z, W, U, V, b, dtype=self.dtype)
        weights = linear(z, W.reshape(m, n * k)).reshape(*z.shape[:-1], n, k)
        return _map_affine(x, add_bias(weights, V), add_bias(linear(z, U), b))


class MLPHypernetwork(nn.Module):
    """A hypernetwork with hidden layers: y = W'(z)x + b'(z) with h = MLP(z) [..., d].

        W'(z) = hᵀW + V,   b'(z) = hᵀU + b

    The head is a `MultiplicativeInteraction` of x and h, which only computes W'(z) if that is the
    cheapest order. V and b start at zero. The initial scale of W and U gives y the same variance as
    a layer whose weights are not generated (Chang et al., Principled Weight Initialization for
    Hypernetworks, 2020):

        hyperfan-in:   Var W = 1 / (2 n · d · E[h²])    Var U = 1 / (2 d · E[h²])
        hyperfan-out:  Var W = 1 / (k · d · E[h²])      Var U = max(0, 1 − n/k) / (d · E[h²])

    This is c / (c_b · fan_in · d · Var h) in the paper, with c_b = 2 because y also has a generated
    bias, and c = 1 because no relu follows. With hyperfan-in, y has unit variance for unit-variance
    x and z. With hyperfan-out, the gradients of x and y have the same variance, and y has unit
    variance for n ≤ k. E[h²] is the activation's second moment for a unit-variance Gaussian. The
    initialization of the hidden layers gives each activation unit-variance inputs.

    With `chunk`, the head is small: W is [d, chunk] and generates W'(z) chunk by chunk. Each chunk
    has its own h, a function of z and of a learned embedding of the chunk (von Oswald et al.,
    Continual Learning with Hypernetworks, 2020). The embedding is a second input of the first
    hidden layer. Its parameter e [chunks + 1, hidden[0]] already includes the layer's weights, and
    its last row is for b'(z).

    Attributes:
      features: k, the number of output features.
      hidden: widths of the hidden layers, or a number for a single layer. Defaults to one layer of
        width k.
      activation: activation of the hidden layers.
      hyperfan: 'in' or 'out', the initialization above.
      chunk: number of entries of W'(z) in a chunk, or None for no chunks.
      context: 'dense' or 'one_hot', which determines the initial scale of the first layer.
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
        """Return y [..., k] for x [..., n] and z [..., m].

        Raises:
          ValueError: if the leading axes do not broadcast, or hidden, hyperfan or chunk is invalid.
        """
        x, z = align_streams(x, z)
        input_size, features = x.shape[-1], self.features
        num_weights = input_size * features
        num_chunks = _count_chunks(num_weights, self.chunk)

        # The hidden layers.
        widths = features if self.hidden is None else self.hidden
        hidden = _compute_hidden(self, z, widths, embeddings=num_chunks + 1 if num_chunks else 0)

        # A head that generates all weights together.
        hidden_size = hidden.shape[-1]
        W_std, U_std = _compute_hyperfan(self.hyperfan, input_size, features)
        W_init = _compensate(self.activation, initializers.normal(W_std * hidden_size**-0.5))
        U_init = _compensate(self.activation, initializers.normal(U_std * hidden_size**-0.5))
        zeros = initializers.zeros
        if not num_chunks:
            return MultiplicativeInteraction(
                features,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                W_init=W_init,
                U_init=U_init,
                V_init=zeros,
                name='head',
            )(x, hidden)

        # A head that generates the weights chunk by chunk.
        W = self.param('W', W_init, (hidden_size, self.chunk), self.param_dtype)
        U = self.param('U', U_init, (hidden_size, features), self.param_dtype)
        V = self.param('V', zeros, (input_size, features), self.param_dtype)
        b = self.param('b', zeros, (features,), self.param_dtype)
        x, hidden, W, U, V, b = nn.dtypes.promote_dtype(x, hidden, W, U, V, b, dtype=self.dtype)
        weights = _join_chunks(linear(hidden[..., :-1, :], W), num_weights)
        weights = add_bias(weights.reshape(*z.shape[:-1], input_size, features), V)
        bias = add_bias(linear(hidden[..., -1, :], U), b)
        return _map_affine(x, weights, bias)


class Hypernetwork(nn.Module):
    """A hypernetwork for any module: y = target(x; θ(z)), θ(z) = hᵀW + V, h = MLP(z).

    θ is the concatenation of all P parameters of the target. V starts as the target's own
    initialization and W [d, P] at zero, so the target initially has the same parameters for every
    z. `jax.vmap` applies the target with different parameters for each context.

    With `chunk`, W is [d, chunk] and generates θ(z) chunk by chunk, as in `MLPHypernetwork`.

    Attributes:
      target: the module, called with one array. It can have parameters, but no other variables, and
        it must not draw random numbers.
      hidden: widths of the hidden layers, or a number for a single layer.
      activation: activation of the hidden layers.
      chunk: number of entries of θ(z) in a chunk, or None for no chunks.
      context: as in `MLPHypernetwork`.
      dtype: dtype of the hidden layers. θ(z) has the dtype of V, and the target computes in its own
        dtype.
      param_dtype: dtype of the parameters other than V.
    """

    target: nn.Module
    hidden: int | Sequence[int] = (64,)
    activation: Activation = nn.relu
    chunk: int | None = None
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> 'chex.ArrayTree':
        """Apply the target to each row of x [*rows, ...], with the parameters for its z [*rows, m].

        Raises:
          ValueError: if x does not start with the leading axes of z, the target has variables other
            than parameters, or hidden or chunk is invalid.
        """
        check_dense(z)
        rows = z.shape[:-1]
        if x.shape[: len(rows)] != rows:
            raise ValueError(
                f'x {x.shape} must begin with the leading axes {rows} of z {z.shape}, because '
                'every context has its own parameters. Try broadcasting z'
            )

        # The target's parameters V, and the hidden layers.
        target = self.target.clone(parent=None)
        input_spec = jax.ShapeDtypeStruct(x.shape[len(rows) :], x.dtype)
        V = self.param('V', lambda rng_key: _init_target(target, rng_key, input_spec))
        V_flat, unravel = ravel_pytree(V)
        num_chunks = _count_chunks(V_flat.size, self.chunk)
        hidden = _compute_hidden(self, z, self.hidden, embeddings=num_chunks)

        # The parameters of each row, which the hidden layers generate.
        W_shape = hidden.shape[-1], self.chunk or V_flat.size
        W = self.param('W', initializers.zeros, W_shape, self.param_dtype)
        hidden, W = nn.dtypes.promote_dtype(hidden, W, dtype=self.dtype)
        theta = linear(hidden, W, out_dtype=V_flat.dtype)
        if num_chunks:
            theta = _join_chunks(theta, V_flat.size)
        theta = theta.reshape(-1, V_flat.size) + V_flat[None]

        # Apply the target to each row with its parameters.
        outputs = jax.vmap(lambda theta, x: target.apply({'params': unravel(theta)}, x))(
            theta, x.reshape(-1, *input_spec.shape)
        )
        return jax.tree.map(lambda leaf: leaf.reshape(*rows, *leaf.shape[1:]), outputs)


class _Hidden(nn.Module):
    """The hidden layers, z [..., m] → [..., d], or [..., embeddings, d] with embeddings."""

    hidden: int | Sequence[int]
    activation: Activation
    embeddings: int
    context: Context
    dtype: DTypeLike | None
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, z: Array) -> Array:
        first_width, *widths = _check_widths(self.hidden)
        variance = 1 / 2 if self.embeddings else 1  # of each input of the first layer
        first_init = context_init(self.context, variance)
        affine = functools.partial(Affine, dtype=self.dtype, param_dtype=self.param_dtype)
        hidden = affine(first_width, V_init=first_init, name='0')(z)
        if self.embeddings:
            e_init, e_shape = initializers.normal(variance**0.5), (self.embeddings, first_width)
            e = self.param('e', e_init, e_shape, self.param_dtype)
            hidden = add_bias(hidden[..., None, :], e.astype(hidden.dtype))
        hidden_init = _compensate(self.activation, input_init())
        for layer_index, width in enumerate(widths, 1):
            layer = affine(width, V_init=hidden_init, name=f'{layer_index}')
            hidden = layer(self.activation(hidden))
        return self.activation(hidden)


def _compute_hidden(
    module: MLPHypernetwork | Hypernetwork,
    z: Array,
    widths: int | Sequence[int],
    embeddings: int,
) -> Array:
    """Apply a submodule 'hidden' with these widths and with the other fields of the module."""
    layers = _Hidden(
        hidden=widths,
        activation=module.activation,
        embeddings=embeddings,
        context=module.context,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        name='hidden',
    )
    return layers(z)


def _map_affine(x: Array, W: Array, b: Array) -> Array:
    """Return Wx + b for x [..., n], W [..., n, k], b [..., k], accumulated in at least f32."""
    product = jnp.einsum('...n,...nk->...k', x, W, preferred_element_type=accumulation_dtype(x, W))
    return product.astype(x.dtype) + b


def _join_chunks(chunks: Array, num_weights: int) -> Array:
    """Concatenate [..., chunks, chunk] to [..., num_weights], truncating the last chunk."""
    *leading, num_chunks, chunk_size = chunks.shape
    return chunks.reshape(*leading, num_chunks * chunk_size)[..., :num_weights]


def _count_chunks(num_weights: int, chunk: int | None) -> int:
    """Return the number of chunks for this many weights, or 0 if `chunk` is None."""
    if chunk is not None and chunk < 1:
        raise ValueError(f'chunk = {chunk}: expected at least 1, or None for no chunks')
    return 0 if chunk is None else math.ceil(num_weights / chunk)


def _check_widths(hidden: int | Sequence[int]) -> tuple[int, ...]:
    widths = (hidden,) if isinstance(hidden, int) else tuple(hidden)
    if not widths or min(widths) < 1:
        raise ValueError(
            f'hidden = {hidden!r}: expected one or more widths of at least 1. Try '
            'LinearHypernetwork, which has no hidden layers'
        )
    return widths


def _compute_hyperfan(hyperfan: Hyperfan, input_size: int, features: int) -> tuple[float, float]:
    """Return the initial standard deviations of the entries of W'(z) and b'(z)."""
    match hyperfan:
        case 'in':
            return (1 / (2 * input_size)) ** 0.5, (1 / 2) ** 0.5
        case 'out':
            return (1 / features) ** 0.5, max(0, 1 - input_size / features) ** 0.5
    raise ValueError(f'unknown hyperfan {hyperfan!r}; known: {", ".join(get_args(Hyperfan))}')


def _compensate(activation: Activation, init: Initializer) -> Initializer:
    """Return `init` divided by the root of E[activation(a)²] for a ~ N(0, 1), by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)

    def scaled_init(
        key: Array,
        shape: Shape,
        dtype: Any = jnp.float32,  # as in `Initializer`
        out_sharding: OutSharding = None,
    ) -> Array:
        sum_dtype = accumulation_dtype(dtype)
        squares = activation(jnp.asarray(nodes, sum_dtype)) ** 2
        second_moment = squares @ jnp.asarray(weights / weights.sum(), sum_dtype)
        return init(key, shape, dtype, out_sharding) * second_moment.astype(dtype) ** -0.5

    return scaled_init


def _init_target(
    target: nn.Module, rng_key: Array, input_spec: jax.ShapeDtypeStruct
) -> 'chex.ArrayTree':
    """Return the target's own initial parameters."""
    variables = target.init(rng_key, jnp.zeros(input_spec.shape, input_spec.dtype))
    if set(variables) != {'params'}:
        raise ValueError(
            f'target = {type(target).__name__}: expected a module with only parameters, got '
            f'the collections {sorted(variables)}'
        )
    return variables['params']
