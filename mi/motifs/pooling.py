"""Bilinear pooling: zᵀWx with a factorized W, or with a random W that is never materialized.

Shapes: input x [..., n], context z [..., m], output y [..., k]; leading axes broadcast. Every
module has the fields `features` (k), `context`, `dtype` and `param_dtype` of
`mi.layers.MultiplicativeInteraction` and is called with (x, z). In the papers, x is an image and z
a question. None of the modules has the terms zᵀU and Vx.

The initialization is not from the papers. It gives the output unit variance for inputs of unit
variance, or for a one-hot z.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.kernels.linear import accumulation_dtype, linear
from mi.layers import (
    Context,
    add_bias,
    align_streams,
    check_context,
    context_init,
    expand_rank,
    input_init,
    stacked_init,
)

_TANH_VARIANCE = 0.394  # variance of tanh(g), g ~ N(0, 1)


class MLB(nn.Module):
    """Multimodal low-rank bilinear pooling (Kim et al., 2017).

        y = Oᵀ(tanh(Pᵀz) ⊙ tanh(Qᵀx)) + b,   P [m, r], Q [n, r], O [r, k]

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`.
      rank: r, the rank of W.
    """

    features: int
    rank: int
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """Return y [..., k] for x [..., n] and z [..., m].

        Raises:
          ValueError: if the leading axes do not broadcast, or `context` is unknown.
        """
        x, z, P, Q = _prepare_factors(self, x, z, self.rank)
        joint = jnp.tanh(linear(z, P)) * jnp.tanh(linear(x, Q))
        return _map_output(self, joint, variance=_TANH_VARIANCE**-2)


class MFB(nn.Module):
    """Multimodal factorized bilinear pooling (Yu et al., 2017).

        y_i = sum of the i-th window of f entries of Pᵀz ⊙ Qᵀx,   P [m, k·f], Q [n, k·f]

    Every slice W[:, :, i] has rank f. With `normalize`, y ← sign(y) √|y| and then y ← y / ‖y‖₂, as
    published, so that the output has length 1 instead of unit variance.

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`.
      factors: f, the number of factors per output feature.
      normalize: whether to take the signed square root and divide by the length.
      dropout: dropout rate of Pᵀz ⊙ Qᵀx, before the sum.
    """

    features: int
    factors: int = 5
    normalize: bool = False
    dropout: float = 0.0
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array, deterministic: bool = True) -> Array:
        """Return y [..., k] for x [..., n] and z [..., m].

        Args:
          x: the input.
          z: the context.
          deterministic: whether to disable dropout, which requires the rng 'dropout'.

        Raises:
          ValueError: as in `MLB`.
        """
        width = self.features * self.factors
        x, z, P, Q = _prepare_factors(self, x, z, width, variance=1 / self.factors)
        sum_dtype = accumulation_dtype(x)
        joint = linear(z, P, out_dtype=sum_dtype) * linear(x, Q, out_dtype=sum_dtype)
        joint = nn.Dropout(self.dropout)(joint, deterministic=deterministic)
        output = joint.reshape(*joint.shape[:-1], self.features, self.factors).sum(-1)
        if self.normalize:
            root = jnp.sqrt(jnp.where(output == 0, 1, jnp.abs(output)))  # finite gradient at 0
            output = jnp.sign(output) * root
            square_length = jnp.square(output).sum(-1, keepdims=True)
            output = output * jax.lax.rsqrt(jnp.maximum(square_length, 1e-24))
        return output.astype(x.dtype)


class MUTAN(nn.Module):
    """Multimodal Tucker fusion (Ben-younes et al., 2017): a Tucker form of W with a low-rank core.

        y = Oᵀ Σ_r (M_rᵀ Pᵀz) ⊙ (N_rᵀ Qᵀx) + b

    The parameters are P [m, h], Q [n, h], M and N [R, h, h], and O [h, k]. Every slice [:, :, i] of
    the core [h, h, h] has rank R. The authors' code applies tanh to Pᵀz and Qᵀx; without it, y is a
    single product zᵀWx.

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`.
      rank: R, the rank of every slice of the core.
      hidden: h, the size of the core. Defaults to `features`.
    """

    features: int
    rank: int
    hidden: int | None = None
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """Return y [..., k] for x [..., n] and z [..., m]. Raises errors as `MLB` does."""
        return _fuse_blocks(self, x, z, blocks=None)


class BLOCK(nn.Module):
    """Block-superdiagonal fusion (Ben-younes et al., 2019): `MUTAN` in chunks.

        Pᵀz = [p_1; …; p_C],   Qᵀx = [q_1; …; q_C]
        y = Oᵀ[s_1; …; s_C] + b,   s_c = Σ_r (M_crᵀ p_c) ⊙ (N_crᵀ q_c)

    The parameters are P [m, h], Q [n, h], M and N [C, R, h/C, h/C], and O [h, k]. The core [h, h,
    h] is zero outside the C cubes on its diagonal. The authors' code takes the signed square root
    of every s_c and divides it by its length; without these operations, y is a single product zᵀWx.

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`.
      rank: R, the rank of every slice of a cube.
      blocks: C, the number of cubes, which must divide h.
      hidden: h, the size of the core. Defaults to `features`.
    """

    features: int
    rank: int
    blocks: int
    hidden: int | None = None
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """Return y [..., k] for x [..., n] and z [..., m].

        Raises:
          ValueError: as in `MLB`, or if C does not divide h.
        """
        return _fuse_blocks(self, x, z, blocks=self.blocks)


class CompactBilinear(nn.Module):
    """Compact bilinear pooling (Gao et al., 2016; for two streams, Fukui et al., 2016).

        y = √(k / mn) · ψ_z(z) * ψ_x(x),   ψ(a)_i = Σ_{j: hash_j = i} sign_j a_j

    Here * is the circular convolution, computed by FFT. y is a count sketch of z ⊗ x: up to the
    factor, inner products of sketches equal those of z ⊗ x in expectation. The factor is not from
    the papers and gives y unit variance. For a one-hot z it is √(k / n).

    The module has no parameters. The hashes in 0 … k − 1 and the signs ±1 are constants that depend
    only on the field `seed` and the numbers of features.

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`. Sketches and FFTs
        are in at least f32, and `param_dtype` has no effect.
      seed: seed of the hashes and signs.
    """

    features: int
    seed: int = 0
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """Return y [..., k] for x [..., n] and z [..., m]. Raises errors as `MLB` does."""
        x, z = _prepare_streams(x, z, self.context)
        x, z = nn.dtypes.promote_dtype(x, z, dtype=self.dtype)
        context_size, input_size = z.shape[-1], x.shape[-1]
        hash_z, sign_z, hash_x, sign_x = self.draw_hashes(context_size, input_size)
        z_spectrum = _compute_spectrum(z, hash_z, sign_z, self.features)
        x_spectrum = _compute_spectrum(x, hash_x, sign_x, self.features)
        num_terms = input_size if self.context == 'one_hot' else context_size * input_size
        scale = (self.features / num_terms) ** 0.5
        output = scale * jnp.fft.irfft(z_spectrum * x_spectrum, n=self.features)
        return output.astype(x.dtype)

    def draw_hashes(
        self, context_size: int, input_size: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Draw a hash and a sign for every entry of z and x: [m], [m], [n], [n]."""
        rng = np.random.default_rng([self.seed, self.features])
        sizes = context_size, input_size
        hash_z, hash_x = (rng.integers(self.features, size=size) for size in sizes)
        sign_z, sign_x = (rng.choice([-1.0, 1.0], size=size) for size in sizes)
        return hash_z, sign_z, hash_x, sign_x


def _compute_spectrum(stream: Array, hashes: np.ndarray, signs: np.ndarray, features: int) -> Array:
    """Return the Fourier transform of a stream's sketch ψ."""
    sign_row = expand_rank(jnp.asarray(signs, accumulation_dtype(stream)), stream.ndim)
    sketch = jnp.zeros((*stream.shape[:-1], features), sign_row.dtype)
    return jnp.fft.rfft(sketch.at[..., hashes].add(stream * sign_row))


def _prepare_streams(x: Array, z: Array, context: str) -> tuple[Array, Array]:
    """Check `context`, and align the leading axes of the streams."""
    check_context(context)
    return align_streams(x, z)


def _prepare_factors(
    module: MLB | MFB | MUTAN | BLOCK, x: Array, z: Array, width: int, variance: float = 1.0
) -> tuple[Array, Array, Array, Array]:
    """Return x, z and the parameters P [m, width] and Q [n, width] in the dtype of the computation.

    At initialization, each entry of Pᵀz has variance 1, and each entry of Qᵀx the given variance.
    """
    x, z = _prepare_streams(x, z, module.context)
    P_init, Q_init = context_init(module.context), input_init(variance)
    P = module.param('P', P_init, (z.shape[-1], width), module.param_dtype)
    Q = module.param('Q', Q_init, (x.shape[-1], width), module.param_dtype)
    x, z, P, Q = nn.dtypes.promote_dtype(x, z, P, Q, dtype=module.dtype)
    return x, z, P, Q


def _fuse_blocks(module: MUTAN | BLOCK, x: Array, z: Array, blocks: int | None) -> Array:
    """Return the output of `BLOCK`, or of `MUTAN` if `blocks` is None.

    `MUTAN` has one block, and no block axis in M and N.
    """
    hidden_size, rank = module.hidden or module.features, module.rank
    num_blocks = 1 if blocks is None else blocks
    if num_blocks < 1 or hidden_size % num_blocks:
        raise ValueError(
            f'blocks = {blocks}: expected a divisor of hidden = {hidden_size}, which '
            'defaults to features'
        )

    # Parameters.
    x, z, P, Q = _prepare_factors(module, x, z, hidden_size)
    block_size = hidden_size // num_blocks
    core_shape = num_blocks, rank, block_size, block_size
    param_shape = core_shape[1:] if blocks is None else core_shape
    core_init = stacked_init(num_axes=len(param_shape) - 2)
    M = module.param('M', core_init, param_shape, module.param_dtype).astype(x.dtype)
    N = module.param('N', core_init, param_shape, module.param_dtype).astype(x.dtype)

    # The products of all blocks, summed over the rank.
    def map_blocks(stream: Array, maps: Array) -> Array:
        stream_blocks = stream.reshape(*stream.shape[:-1], num_blocks, block_size)
        maps = maps.reshape(core_shape)
        sum_dtype = accumulation_dtype(stream, maps)
        return jnp.einsum(
            '...cl,crlj->...crj', stream_blocks, maps, preferred_element_type=sum_dtype
        )

    joint = (map_blocks(linear(z, P), M) * map_blocks(linear(x, Q), N)).sum(-2)
    joint = joint.reshape(*joint.shape[:-2], hidden_size).astype(x.dtype)
    return _map_output(module, joint, variance=1 / rank)


def _map_output(module: MLB | MUTAN | BLOCK, joint: Array, variance: float) -> Array:
    """Return Oᵀs + b, with O initialized so that Var(Oᵀs) = variance · Var(s)."""
    O_shape = joint.shape[-1], module.features
    O = module.param('O', input_init(variance), O_shape, module.param_dtype)  # noqa: E741
    b = module.param('b', initializers.zeros, O_shape[1:], module.param_dtype)
    return add_bias(linear(joint, O.astype(joint.dtype)), b.astype(joint.dtype))
