"""Bilinear pooling: zᵀWx with a factorized W, or with a random W that is never formed.

Shapes: x [..., n], z [..., m] → y [..., k]; leading axes broadcast. Every module has the fields
`features` (k), `context`, `dtype` and `param_dtype` of `mi.layers.MultiplicativeInteraction`, and
its call takes (x, z). In the papers x and z are an image and a question. No module has the terms
zᵀU and Vx.

Initialization is ours: for inputs of unit variance, or a one-hot z, the output has unit variance.
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
)

_TANH_VARIANCE = 0.394  # variance of tanh(g), g ~ N(0, 1)


class MLB(nn.Module):
    """Multimodal low-rank bilinear pooling (Kim et al., 2017).

        y = Oᵀ(tanh(Pᵀz) ⊙ tanh(Qᵀx)) + b,   P [m, r], Q [n, r], O [r, k]

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`.
      rank: r.
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
        x, z = _prepare_streams(x, z, self.context)
        P = self.param('P', context_init(self.context), (z.shape[-1], self.rank), self.param_dtype)
        Q = self.param('Q', input_init(), (x.shape[-1], self.rank), self.param_dtype)
        x, z, P, Q = nn.dtypes.promote_dtype(x, z, P, Q, dtype=self.dtype)
        joint = jnp.tanh(linear(z, P)) * jnp.tanh(linear(x, Q))
        return _map_output(self, joint, variance=_TANH_VARIANCE**-2)


class MFB(nn.Module):
    """Multimodal factorized bilinear pooling (Yu et al., 2017).

        y = sum over each window of f of (Pᵀz ⊙ Qᵀx),   P [m, k·f], Q [n, k·f]

    Every slice W[:, :, i] has rank f. With `normalize`, y ← sign(y) √|y| and y ← y / ‖y‖₂ follow,
    as published. The output then has length 1 instead of unit variance.

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`.
      factors: f.
      normalize: whether to take the signed root and divide by the length.
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
          deterministic: False enables dropout, which needs the rng 'dropout'.

        Raises:
          ValueError: as in `MLB`.
        """
        x, z = _prepare_streams(x, z, self.context)
        width = self.features * self.factors
        Q_init = input_init(1 / self.factors)
        P = self.param('P', context_init(self.context), (z.shape[-1], width), self.param_dtype)
        Q = self.param('Q', Q_init, (x.shape[-1], width), self.param_dtype)
        x, z, P, Q = nn.dtypes.promote_dtype(x, z, P, Q, dtype=self.dtype)
        wide = accumulation_dtype(x)
        joint = linear(z, P, out_dtype=wide) * linear(x, Q, out_dtype=wide)
        joint = nn.Dropout(self.dropout)(joint, deterministic=deterministic)
        y = joint.reshape(*joint.shape[:-1], self.features, self.factors).sum(-1)
        if self.normalize:
            root = jnp.sqrt(jnp.where(y == 0, 1, jnp.abs(y)))  # finite gradient at 0
            y = jnp.sign(y) * root
            y = y * jax.lax.rsqrt(jnp.maximum(jnp.square(y).sum(-1, keepdims=True), 1e-24))
        return y.astype(x.dtype)


class MUTAN(nn.Module):
    """Multimodal Tucker fusion (Ben-younes et al., 2017): a Tucker form of W with a low-rank core.

        y = Oᵀ Σ_r (M_rᵀ Pᵀz) ⊙ (N_rᵀ Qᵀx) + b

    P [m, h], Q [n, h], M and N [R, h, h], O [h, k]: every slice [:, :, i] of the core [h, h, h] has
    rank R. The authors' code applies tanh to Pᵀz and Qᵀx. Without it, y is one product.

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`.
      rank: R.
      hidden: h; None for `features`.
    """

    features: int
    rank: int
    hidden: int | None = None
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """Return y [..., k] for x [..., n] and z [..., m]; errors as in `MLB`."""
        return _fuse_blocks(self, x, z, blocks=None)


class BLOCK(nn.Module):
    """Block-superdiagonal fusion (Ben-younes et al., 2019): `MUTAN` in chunks.

        Pᵀz = [p_1; …; p_C],   Qᵀx = [q_1; …; q_C]
        y = Oᵀ[s_1; …; s_C] + b,   s_c = Σ_r (M_crᵀ p_c) ⊙ (N_crᵀ q_c)

    P [m, h], Q [n, h], M and N [C, R, h/C, h/C], O [h, k]: the core [h, h, h] is zero outside the
    C cubes on its diagonal. The authors' code takes the signed root of every s_c and divides it by
    its length. Without these operations, y is one product.

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`.
      rank: R.
      blocks: C, a divisor of h.
      hidden: h; None for `features`.
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
    """Compact bilinear pooling (Gao et al., 2016; of two streams: Fukui et al., 2016).

        y = √(k / mn) · ψ_z(z) * ψ_x(x),   ψ(a)_i = Σ_{j: hash_j = i} sign_j a_j

    Here * is the circular convolution, computed by FFT. y is the count sketch of z ⊗ x: up to the
    factor, its inner products are those of z ⊗ x in expectation. The factor is ours and gives y
    unit variance; for a one-hot z it is √(k / n).

    The module has no parameters. The hashes in 0 … k − 1 and the signs ±1 are constants of the
    program, drawn from the field `seed` and the number of features.

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`; sketches and FFT are
        in f32 at least, and there are no parameters.
      seed: seed of the hashes and signs.
    """

    features: int
    seed: int = 0
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """Return y [..., k] for x [..., n] and z [..., m]; errors as in `MLB`."""
        x, z = _prepare_streams(x, z, self.context)
        k, m, n = self.features, z.shape[-1], x.shape[-1]
        x, z = nn.dtypes.promote_dtype(x, z, dtype=self.dtype)
        hash_z, sign_z, hash_x, sign_x = self.draw_hashes(m, n)
        spectrum = _compute_spectrum(z, hash_z, sign_z, k) * _compute_spectrum(x, hash_x, sign_x, k)
        scale = (k / n if self.context == 'one_hot' else k / (m * n)) ** 0.5
        return (scale * jnp.fft.irfft(spectrum, n=k)).astype(x.dtype)

    def draw_hashes(self, m: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Draw a hash and a sign for every entry of z and x: [m], [m], [n], [n]."""
        rng = np.random.default_rng([self.seed, self.features])
        hash_z, hash_x = (rng.integers(self.features, size=size) for size in (m, n))
        sign_z, sign_x = (rng.choice([-1.0, 1.0], size=size) for size in (m, n))
        return hash_z, sign_z, hash_x, sign_x


def _compute_spectrum(a: Array, hashes: np.ndarray, signs: np.ndarray, k: int) -> Array:
    """Return the Fourier transform of the sketch ψ(a)."""
    sign_row = expand_rank(jnp.asarray(signs, accumulation_dtype(a)), a.ndim)
    sketch = jnp.zeros((*a.shape[:-1], k), sign_row.dtype).at[..., hashes].add(a * sign_row)
    return jnp.fft.rfft(sketch)


def _prepare_streams(x: Array, z: Array, context: str) -> tuple[Array, Array]:
    """Check `context` and align the streams."""
    check_context(context)
    return align_streams(x, z)


def _fuse_blocks(module: MUTAN | BLOCK, x: Array, z: Array, blocks: int | None) -> Array:
    """Return the output of `BLOCK`, or of `MUTAN` if `blocks` is None.

    `MUTAN` has one block, and no block axis in M and N.
    """
    x, z = _prepare_streams(x, z, module.context)
    hidden, R = module.hidden or module.features, module.rank
    C = 1 if blocks is None else blocks
    if C < 1 or hidden % C:
        raise ValueError(
            f'blocks={blocks} must divide hidden={hidden}, which is features if hidden is None'
        )

    # Parameters.
    L = hidden // C
    shape = (R, L, L) if blocks is None else (C, R, L, L)
    core_init = initializers.variance_scaling(
        1.0, 'fan_in', 'truncated_normal', batch_axis=tuple(range(len(shape) - 2))
    )
    P = module.param('P', context_init(module.context), (z.shape[-1], hidden), module.param_dtype)
    Q = module.param('Q', input_init(), (x.shape[-1], hidden), module.param_dtype)
    M = module.param('M', core_init, shape, module.param_dtype)
    N = module.param('N', core_init, shape, module.param_dtype)
    x, z, P, Q, M, N = nn.dtypes.promote_dtype(x, z, P, Q, M, N, dtype=module.dtype)

    # The products of all blocks, summed over the rank.
    def map_chunks(a: Array, maps: Array) -> Array:
        chunks = a.reshape(*a.shape[:-1], C, L)
        maps = maps.reshape(C, R, L, L)
        wide = accumulation_dtype(a, maps)
        return jnp.einsum('...cl,crlj->...crj', chunks, maps, preferred_element_type=wide)

    s = (map_chunks(linear(z, P), M) * map_chunks(linear(x, Q), N)).sum(-2)
    s = s.reshape(*s.shape[:-2], hidden).astype(x.dtype)
    return _map_output(module, s, variance=1 / R)


def _map_output(module: MLB | MUTAN | BLOCK, s: Array, variance: float) -> Array:
    """Return Oᵀs + b, with Oᵀs of this variance per unit variance of s."""
    shape = s.shape[-1], module.features
    O = module.param('O', input_init(variance), shape, module.param_dtype)  # noqa: E741
    b = module.param('b', initializers.zeros, shape[1:], module.param_dtype)
    return add_bias(linear(s, O.astype(s.dtype)), b.astype(s.dtype))
