"""The multiplicative interaction layer and its cheaper forms.

    f(x, z) = zᵀWx + zᵀU + Vx + b

Shapes: input x [..., n], context z [..., m], output y [..., k]; W [m, n, k], U [m, k], V [n, k],
b [k]. The leading axes of x and z broadcast. The equation and its diagonal and scalar forms are
from Jayakumar et al., Multiplicative Interactions and Where to Find Them, ICLR 2020. Their
low-rank, block, Tucker and multi-head forms are recalled (docs/paper.md).

The initialization is not from the paper. For unit-variance x, the *sum* of the terms has unit
variance, as in a Dense layer with `lecun_normal` weights, and each term contributes an equal share.
This assumes a context with unit-variance entries ('dense') or a one-hot context ('one_hot').
"""

import functools
import math
from typing import Literal, Protocol, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from mi.config import suggest
from mi.kernels.bilinear import bilinear
from mi.kernels.linear import clip_ids, linear, target_platform

Context = Literal['dense', 'one_hot']


def check_context(context: str) -> None:
    """Raise ValueError unless `context` is 'dense' or 'one_hot'."""
    if context not in get_args(Context):
        raise ValueError(f'unknown context {context!r}; {suggest(context, get_args(Context))}')


def context_init(context: Context, variance: float = 1.0) -> Initializer:
    """Return an initializer for U [m, k] such that each entry of zᵀU has the given variance."""
    check_context(context)
    if context == 'one_hot':  # zᵀU is a row of U: the fan-in is 1
        return initializers.variance_scaling(
            variance, 'fan_in', 'truncated_normal', in_axis=(), batch_axis=0
        )
    return initializers.variance_scaling(variance, 'fan_in', 'truncated_normal')


def input_init(variance: float = 1.0) -> Initializer:
    """Return an initializer for V [n, k] such that each entry of Vx has the given variance."""
    return initializers.variance_scaling(variance, 'fan_in', 'truncated_normal')


def stacked_init(variance: float = 1.0, num_axes: int = 1) -> Initializer:
    """Return an initializer like `input_init` for maps [..., n, k] stacked over `num_axes` axes."""
    return initializers.variance_scaling(
        variance, 'fan_in', 'truncated_normal', batch_axis=tuple(range(num_axes))
    )


def interaction_init(context: Context, variance: float = 1.0) -> Initializer:
    """Return an initializer for W [m, n, k] such that each entry of zᵀWx has the given variance."""
    check_context(context)
    if context == 'one_hot':
        return initializers.variance_scaling(
            variance, 'fan_in', 'truncated_normal', in_axis=1, out_axis=2, batch_axis=0
        )
    return initializers.variance_scaling(
        variance, 'fan_in', 'truncated_normal', in_axis=(0, 1), out_axis=2
    )


def check_dense(z: Array) -> None:
    """Raise ValueError if z holds integer ids, which some modules do not accept."""
    if jnp.issubdtype(z.dtype, jnp.integer):
        raise ValueError(
            f'z is {z.dtype} {z.shape}: expected a float context [..., m], because this '
            'module does not accept context ids. Try jax.nn.one_hot(z, m)'
        )


def one_hot(ids: Array, contexts: int, dtype: DTypeLike) -> Array:
    """Return one-hot contexts [..., m] for ids [...], clipping out-of-range ids."""
    return jax.nn.one_hot(clip_ids(ids, contexts), contexts, dtype=dtype)


def expand_rank(array: Array, ndim: int) -> Array:
    """Return `array` with leading axes of length 1 added, so that it has `ndim` axes."""
    return array.reshape((1,) * (ndim - array.ndim) + array.shape)


def add_bias(y: Array, b: Array) -> Array:
    """Return y + b for y [..., *shape] and b [*shape]."""
    num_leading = y.ndim - b.ndim
    if y.shape[num_leading:] != b.shape:  # y broadcasts
        return y + expand_rank(b, y.ndim)
    rows = y.reshape(math.prod(y.shape[:num_leading]), *b.shape)
    return _add_to_rows(rows, b).reshape(y.shape)


@jax.custom_jvp
def _add_to_rows(rows: Array, b: Array) -> Array:
    return rows + b[None]


@_add_to_rows.defjvp
def _differentiate_addition(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Keep the rows in one axis on CPU, so that the gradient of b is a sum over one axis.

    Without the barrier, XLA sums over all leading axes of y. For two axes, that takes as long as
    the product with V.
    """
    rows_tangent, b_tangent = tangents
    b_rows = jnp.broadcast_to(b_tangent, rows_tangent.shape)
    if target_platform() == 'cpu':
        b_rows = jax.lax.optimization_barrier(b_rows)
    return _add_to_rows(*primals), rows_tangent + b_rows


@jax.custom_vjp
def compute_gradients_early(x: Array, *params: Array) -> tuple[Array, ...]:
    """Return x and the parameters of a layer, and compute the gradient of x after the others.

    XLA on CPU schedules a program depth-first: it computes the cotangents down to the first layer
    before the gradients of parameters, and keeps the inputs and cotangents of all layers for them.
    Therefore, 0 times an entry of each gradient is added to an entry of the gradient of x, in
    place. Other platforms have better schedulers, and nothing is added there.
    """
    return x, *params


def _compute_gradients_early_forward(x: Array, *params: Array) -> tuple[tuple[Array, ...], None]:
    return (x, *params), None


def _compute_gradients_early_backward(
    residuals: None, cotangents: tuple[Array, ...]
) -> tuple[Array, ...]:
    x_cotangent, *param_cotangents = cotangents
    if target_platform() != 'cpu':
        return cotangents
    entry = _first_entry(x_cotangent)
    for cotangent in param_cotangents:
        entry += 0.0 * _first_entry(cotangent).astype(entry.dtype)
    start = (0,) * x_cotangent.ndim
    entry = entry.reshape((1,) * x_cotangent.ndim)
    return jax.lax.dynamic_update_slice(x_cotangent, entry, start), *param_cotangents


def _first_entry(array: Array) -> Array:
    return jax.lax.slice(array, (0,) * array.ndim, (1,) * array.ndim).reshape(())


compute_gradients_early.defvjp(_compute_gradients_early_forward, _compute_gradients_early_backward)


def align_streams(x: Array, z: Array, *, ids: bool = False) -> tuple[Array, Array]:
    """Return x [..., n] and z [..., m] with the same number of leading axes.

    Args:
      x: the input, [..., n].
      z: the context, [..., m], or integer ids [...] of one-hot contexts.
      ids: whether to accept integer ids.

    Raises:
      ValueError: if x or z is a scalar, their leading axes do not broadcast, or z holds ids that
        are not accepted.
    """
    if not ids and z is not x:
        check_dense(z)
    has_ids = jnp.issubdtype(z.dtype, jnp.integer) and z is not x
    if x.ndim < 1 or (z.ndim < 1 and not has_ids):
        raise ValueError(f'x must be [..., n] and z [..., m]; got x {x.shape}, z {z.shape}')
    z_axes = z.shape if has_ids else z.shape[:-1]
    try:
        jnp.broadcast_shapes(x.shape[:-1], z_axes)
    except ValueError as error:
        raise ValueError(
            f'the leading axes of x {x.shape} and z {z.shape} do not broadcast. Give z an '
            'axis of length 1 where it is shared'
        ) from error
    num_axes = max(x.ndim - 1, len(z_axes))
    z_ndim = num_axes if has_ids else num_axes + 1
    return expand_rank(x, num_axes + 1), expand_rank(z, z_ndim)


class Affine(nn.Module):
    """An affine map Vx + b: `nn.Dense`, but with products of bf16 inputs accumulated in f32.

    Attributes:
      features: k, the number of output features.
      dtype, param_dtype, precision: as in `MultiplicativeInteraction`.
      V_init: initializer of V [n, k]. Defaults to `lecun_normal`.
      b_init: initializer of b [k]. Defaults to zeros.
      early_gradients: whether the backward pass computes the gradients of V and b before that of
        x. This saves memory on CPU if x or y is large, see `compute_gradients_early`.
    """

    features: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None
    V_init: Initializer = input_init()
    b_init: Initializer = initializers.zeros
    early_gradients: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        V = self.param('V', self.V_init, (x.shape[-1], self.features), self.param_dtype)
        b = self.param('b', self.b_init, (self.features,), self.param_dtype)
        x, V, b = nn.dtypes.promote_dtype(x, V, b, dtype=self.dtype)
        if self.early_gradients:
            x, V, b = compute_gradients_early(x, V, b)
        return add_bias(linear(x, V, precision=self.precision), b)


class MultiplicativeInteraction(nn.Module):
    """The full form: f(x, z) = zᵀWx + zᵀU + Vx + b (Jayakumar et al., 2020).

    With `use_W=False` it is a Dense layer on the concatenation of x and z. With a one-hot context
    it is a multi-head read-out. Written as (zᵀW + V) x + (zᵀU + b), it is a linear hypernetwork.
    The subclasses differ only in W, which they represent with fewer parameters.

    Attributes:
      features: k, the number of output features.
      context: 'dense' or 'one_hot', which determines the initial scale of W and U.
      contexts: m, the number of contexts. Required if z holds integer ids.
      use_W, use_U, use_V, use_b: whether to include each term.
      dtype: dtype of the computation. Defaults to the promoted dtype of inputs and parameters.
      param_dtype: dtype of the parameters.
      precision: as in `jax.lax.dot_general`.
      W_init, U_init, V_init: initializers. By default, each term has an equal share of variance 1.
      b_init: initializer of b. Defaults to zeros.
    """

    features: int
    context: Context = 'dense'
    contexts: int | None = None
    use_W: bool = True
    use_U: bool = True
    use_V: bool = True
    use_b: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None
    W_init: Initializer | None = None
    U_init: Initializer | None = None
    V_init: Initializer | None = None
    b_init: Initializer = initializers.zeros

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """Return f(x, z) [..., k] for x [..., n] and z [..., m].

        z can also hold integer ids [...] in [0, contexts), which stand for one-hot contexts. Then
        only the rows of W and U with these ids are read and multiplied.

        Raises:
          ValueError: if the leading axes do not broadcast, or z holds integers and `contexts` is
            None.
        """
        return self._sum_terms(*_prepare_inputs(self, x, z))

    def _sum_terms(self, x: Array, z: Array, context_size: int) -> Array:
        dtype = x.dtype
        share = 1 / max(1, self.use_W + self.use_U + self.use_V)
        U_init = self.U_init or context_init(self.context, share)
        V_init = self.V_init or input_init(share)

        # The terms of the equation, in its order.
        output = jnp.zeros((1,) * x.ndim, dtype)
        if self.use_W:
            output = output + self._compute_interaction(x, z, context_size, share)
        if self.use_U:
            U = self.param('U', U_init, (context_size, self.features), self.param_dtype)
            output = output + linear(z, U.astype(dtype), precision=self.precision)
        if self.use_V:
            V = self.param('V', V_init, (x.shape[-1], self.features), self.param_dtype)
            output = output + linear(x, V.astype(dtype), precision=self.precision)
        if self.use_b:
            b = self.param('b', self.b_init, (self.features,), self.param_dtype)
            output = add_bias(output, b.astype(dtype))

        # Broadcast, as the included terms may depend on one stream only.
        z_axes = z.shape if jnp.issubdtype(z.dtype, jnp.integer) else z.shape[:-1]
        output_axes = jnp.broadcast_shapes(x.shape[:-1], z_axes)
        return jnp.broadcast_to(output, (*output_axes, self.features))

    def _compute_interaction(self, x: Array, z: Array, context_size: int, variance: float) -> Array:
        """Return zᵀWx, initialized so that each entry has the given variance."""
        W_init = self.W_init or interaction_init(self.context, variance)
        W = self.param('W', W_init, (context_size, x.shape[-1], self.features), self.param_dtype)
        return bilinear(x, z, W.astype(x.dtype), precision=self.precision)


def _refuse_interaction_init(layer: MultiplicativeInteraction) -> None:
    if layer.W_init is not None:
        raise ValueError(
            f'{type(layer).__name__}.W_init = {layer.W_init!r}: expected None, because this form '
            f'has no W but factors. Try U_init, V_init or another form'
        )


class LowRankMultiplicativeInteraction(MultiplicativeInteraction, kw_only=True):
    """The low-rank form: W = Σ_r p_r ⊗ q_r ⊗ o_r, a CP decomposition.

        zᵀWx = Oᵀ(zᵀP ⊙ xᵀQ),   P [m, r], Q [n, r], O [r, k]

    Attributes:
      rank: r, the number of components.
      features, …: as in `MultiplicativeInteraction`, but `W_init` must be None, because the
        factors have fixed initializers.
    """

    rank: int

    def _compute_interaction(self, x: Array, z: Array, context_size: int, variance: float) -> Array:
        _refuse_interaction_init(self)
        rank, param_dtype = self.rank, self.param_dtype
        P = self.param('P', context_init(self.context), (context_size, rank), param_dtype)
        Q = self.param('Q', input_init(), (x.shape[-1], rank), param_dtype)
        O = self.param('O', input_init(variance), (rank, self.features), param_dtype)  # noqa: E741
        P, Q, O = (factor.astype(x.dtype) for factor in (P, Q, O))  # noqa: E741
        project = functools.partial(linear, precision=self.precision)
        return project(project(z, P) * project(x, Q), O)


class TuckerMultiplicativeInteraction(MultiplicativeInteraction, kw_only=True):
    """The Tucker form: W = Σ_abc G_abc p_a ⊗ q_b ⊗ o_c, an r × r × r core between linear maps.

        zᵀWx = Oᵀ((zᵀP) G (xᵀQ)),   P [m, r], Q [n, r], G [r, r, r], O [r, k]

    Attributes:
      rank: r, the size of the core along each axis.
      features, …: as in `MultiplicativeInteraction`, but `W_init` must be None, because the
        factors have fixed initializers.
    """

    rank: int

    def _compute_interaction(self, x: Array, z: Array, context_size: int, variance: float) -> Array:
        _refuse_interaction_init(self)
        rank, param_dtype = self.rank, self.param_dtype
        P = self.param('P', context_init(self.context), (context_size, rank), param_dtype)
        Q = self.param('Q', input_init(), (x.shape[-1], rank), param_dtype)
        G = self.param('G', interaction_init('dense'), (rank, rank, rank), param_dtype)
        O = self.param('O', input_init(variance), (rank, self.features), param_dtype)  # noqa: E741
        P, Q, G, O = (factor.astype(x.dtype) for factor in (P, Q, G, O))  # noqa: E741
        project = functools.partial(linear, precision=self.precision)
        core_output = bilinear(project(x, Q), project(z, P), G, precision=self.precision)
        return project(core_output, O)


class BlockMultiplicativeInteraction(MultiplicativeInteraction, kw_only=True):
    """The block-diagonal form: W maps each of the g blocks of x to one block of y.

        y_i = zᵀW_i x_i,   i = 1…g,   W [g, m, ⌈n/g⌉, ⌈k/g⌉]

    If g does not divide n or k, the last block is truncated.

    Attributes:
      blocks: g, the number of blocks.
      features, …: as in `MultiplicativeInteraction`. `W_init` gets the shape of W,
        [g, m, ⌈n/g⌉, ⌈k/g⌉].
    """

    blocks: int

    def _compute_interaction(self, x: Array, z: Array, context_size: int, variance: float) -> Array:
        # The widths of a block, rounded up; the last block of x is padded with zeros.
        input_size, num_blocks = x.shape[-1], self.blocks
        block_inputs, block_outputs = -(-input_size // num_blocks), -(-self.features // num_blocks)
        padding = [(0, 0)] * (x.ndim - 1) + [(0, num_blocks * block_inputs - input_size)]
        x_blocks = jnp.pad(x, padding).reshape(*x.shape[:-1], num_blocks, block_inputs)

        # A W for each block, with the fan-in of a block.
        is_one_hot = self.context == 'one_hot'
        block_init = initializers.variance_scaling(
            variance,
            'fan_in',
            'truncated_normal',
            in_axis=2 if is_one_hot else (1, 2),
            out_axis=3,
            batch_axis=(0, 1) if is_one_hot else 0,
        )
        shape = num_blocks, context_size, block_inputs, block_outputs
        W = self.param('W', self.W_init or block_init, shape, self.param_dtype)
        multiply_block = functools.partial(bilinear, precision=self.precision)
        multiply_blocks = jax.vmap(multiply_block, in_axes=(-2, None, 0), out_axes=-2)
        output_blocks = multiply_blocks(x_blocks, z, W.astype(x.dtype))
        output = output_blocks.reshape(*output_blocks.shape[:-2], num_blocks * block_outputs)
        return output[..., : self.features]


class MultiHead(MultiplicativeInteraction):
    """A read-out for each of m one-hot contexts: f(x, e_i) = W_i x + U_i.

    It is the full form without V and b, which are redundant if z is one-hot. Only the read-out of
    the given context is computed.

    Attributes:
      features, …: as in `MultiplicativeInteraction`, but `context` must be 'one_hot'.
    """

    context: Context = 'one_hot'
    use_V: bool = False
    use_b: bool = False

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """Return f(x, z) [..., k] for x [..., n] and one-hot z [..., m] or integer ids z [...].

        If z is a float array, only its largest entry is used. The output is zᵀWx + zᵀU if the
        other entries are zero, and zero if all entries are zero.

        Raises:
          ValueError: if `context` is not 'one_hot', and as in `MultiplicativeInteraction`.
        """
        if self.context != 'one_hot':
            raise ValueError(
                f"MultiHead.context = {self.context!r}: expected 'one_hot'. Try "
                f'MultiplicativeInteraction for other contexts'
            )
        x, z, context_size = _prepare_inputs(self, x, z)
        if jnp.issubdtype(z.dtype, jnp.integer):
            return self._sum_terms(x, z, context_size)
        return self._sum_terms(x, jnp.argmax(z, -1), context_size) * z.max(-1, keepdims=True)


class DiagonalMultiplicativeInteraction(nn.Module):
    """The diagonal form: f(x, z) = a(z) ⊙ x + c(z), a = zᵀW + V, c = zᵀU + b.

    W [m, n] and V [n] hold the diagonals of the full form's W [m, n, n] and V [n, n]. U is [m, n],
    b is [n]. Every entry of V starts at √(1/3), so that the three terms in x and z have equal
    variance.

    Attributes:
      context, contexts, dtype, param_dtype, precision: as in `MultiplicativeInteraction`.
    """

    context: Context = 'dense'
    contexts: int | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """Return f(x, z) [..., n] for x [..., n] and z [..., m] or integer ids z [...].

        Raises:
          ValueError: as in `MultiplicativeInteraction`.
        """
        x, z, context_size = _prepare_inputs(self, x, z)
        num_features, num_scales = x.shape[-1], self._count_scales(x.shape[-1])
        init, V_init = context_init(self.context, 1 / 3), initializers.constant(3**-0.5)
        W = self.param('W', init, (context_size, num_scales), self.param_dtype)
        U = self.param('U', init, (context_size, num_features), self.param_dtype)
        V = self.param('V', V_init, (num_scales,), self.param_dtype)
        b = self.param('b', initializers.zeros, (num_features,), self.param_dtype)
        W, U, V, b = (weights.astype(x.dtype) for weights in (W, U, V, b))
        scale = add_bias(linear(z, W, precision=self.precision), V)
        shift = add_bias(linear(z, U, precision=self.precision), b)
        return scale * x + shift

    def _count_scales(self, num_features: int) -> int:
        return num_features


class ScalarMultiplicativeInteraction(DiagonalMultiplicativeInteraction):
    """The scalar form: f(x, z) = s(z) x + c(z), s = zᵀW + V, c = zᵀU + b.

    It is the diagonal form with one scale for all features: W [m, 1], V [1], U [m, n], b [n].
    """

    def _count_scales(self, num_features: int) -> int:
        return 1


class _HasContexts(Protocol):
    """A module with the fields that `_prepare_inputs` reads."""

    contexts: int | None
    dtype: DTypeLike | None
    param_dtype: DTypeLike


def _prepare_inputs(module: _HasContexts, x: Array, z: Array) -> tuple[Array, Array, int]:
    """Align x and z, cast them to the dtype of the computation, and return them and m."""
    has_ids = jnp.issubdtype(z.dtype, jnp.integer)
    if has_ids and module.contexts is None:
        raise ValueError(
            f'z is {z.dtype}: expected the field `contexts`, because z holds ids of one-hot '
            'contexts. Try contexts=m for ids below m, or a float z'
        )
    x, z = align_streams(x, z, ids=True)
    dtype = module.dtype or jnp.result_type(x, *([] if has_ids else [z]), module.param_dtype)
    if module.contexts is not None and has_ids:
        return x.astype(dtype), z, module.contexts
    return x.astype(dtype), z.astype(dtype), z.shape[-1]
