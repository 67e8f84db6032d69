"""Bilinear pooling: zᵀWx with W in a factorised form, or drawn once and never formed.

Shapes: x [..., n], z [..., m] → y [..., k]; leading axes broadcast. Every module has the fields
`features` (k), `context`, `dtype` and `param_dtype`, as `mi.layers.MultiplicativeInteraction`, and
is called (x, z). In the papers x and z are an image and a question; none of these has the terms
zᵀU and Vx.

Initialisation is ours: for inputs of unit variance, or a one-hot z, the output has unit variance.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.kernels.bilinear import accumulation_dtype, linear
from mi.layers import Context, align_streams, check_context, context_init, input_init

_VARIANCE_OF_TANH = 0.394  # of tanh(g), g ~ N(0, 1)


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
        """x [..., n], z [..., m] → [..., k].

        Raises:
          ValueError: if the leading axes do not broadcast, or context is no known word.
        """
        x, z = _inputs(x, z, self.context)
        P = self.param('P', context_init(self.context), (z.shape[-1], self.rank), self.param_dtype)
        Q = self.param('Q', input_init(), (x.shape[-1], self.rank), self.param_dtype)
        x, z, P, Q = nn.dtypes.promote_dtype(x, z, P, Q, dtype=self.dtype)
        joint = jnp.tanh(linear(z, P)) * jnp.tanh(linear(x, Q))
        return _output(self, joint, variance=_VARIANCE_OF_TANH**-2)


class MFB(nn.Module):
    """Multimodal factorised bilinear pooling (Yu et al., 2017).

        y = sum over each window of f of (Pᵀz ⊙ Qᵀx),   P [m, k·f], Q [n, k·f]

    Every W[:, :, i] is of rank f. With `normalize`, as published, y ← sign(y) √|y| and then
    y ← y / ‖y‖₂ follow; the output has length 1 then, not unit variance.

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`.
      factors: f.
      normalize: whether the signed root and the division by the length follow.
      dropout: rate, on Pᵀz ⊙ Qᵀx before the sum.
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
        """x [..., n], z [..., m] → [..., k].

        Args:
          x: the input.
          z: the context.
          deterministic: False for dropout, which needs the rng 'dropout'.

        Raises:
          ValueError: as `MLB`.
        """
        x, z = _inputs(x, z, self.context)
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
            root = jnp.sqrt(jnp.where(y == 0, 1, jnp.abs(y)))  # where, for a finite gradient at 0
            y = jnp.sign(y) * root
            y = y * jax.lax.rsqrt(jnp.maximum(jnp.square(y).sum(-1, keepdims=True), 1e-24))
        return y.astype(x.dtype)


class MUTAN(nn.Module):
    """Multimodal Tucker fusion (Ben-younes et al., 2017): W in a Tucker form with a low-rank core.

        y = Oᵀ Σ_r (M_rᵀ Pᵀz) ⊙ (N_rᵀ Qᵀx) + b

    P [m, h], Q [n, h], M and N [R, h, h], O [h, k]: every slice [:, :, i] of the core [h, h, h] is
    of rank R. The authors' code has a tanh after Pᵀz and Qᵀx; without it y is one product.

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
        """x [..., n], z [..., m] → [..., k]; ValueError as `MLB`."""
        return _block_tucker(self, x, z, blocks=None)


class BLOCK(nn.Module):
    """Block-superdiagonal fusion (Ben-younes et al., 2019): `MUTAN` in chunks.

        Pᵀz = [p_1; …; p_C],   Qᵀx = [q_1; …; q_C]
        y = Oᵀ[s_1; …; s_C] + b,   s_c = Σ_r (M_crᵀ p_c) ⊙ (N_crᵀ q_c)

    P [m, h], Q [n, h], M and N [C, R, h/C, h/C], O [h, k]: the core [h, h, h] is zero off the C
    cubes on its diagonal. The authors' code takes the signed root of every s_c and divides it by
    its length; without that y is one product.

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
        """x [..., n], z [..., m] → [..., k]; ValueError as `MLB`, and if C does not divide h."""
        return _block_tucker(self, x, z, blocks=self.blocks)


class CompactBilinear(nn.Module):
    """Compact bilinear pooling (Gao et al., 2016; of two streams: Fukui et al., 2016).

        y = √(k / mn) · ψ_z(z) * ψ_x(x),   ψ(a)_i = Σ_{j: hash_j = i} sign_j a_j

    with * the circular convolution, made by FFT: the count sketch of z ⊗ x, whose inner products
    are those of z ⊗ x in expectation, up to the factor. The factor is ours and gives y unit
    variance; for a one-hot z it is √(k / n).

    There is nothing to learn. The hashes in 0 … k − 1 and the signs ±1 are constants of the
    program, drawn from the field `seed` and the number of features.

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`; sketches and FFT are
        f32 at least, and there are no parameters.
      seed: of the hashes and signs.
    """

    features: int
    seed: int = 0
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """x [..., n], z [..., m] → [..., k]; ValueError as `MLB`."""
        x, z = _inputs(x, z, self.context)
        k, m, n = self.features, z.shape[-1], x.shape[-1]
        x, z = nn.dtypes.promote_dtype(x, z, dtype=self.dtype)
        hash_z, sign_z, hash_x, sign_x = self.hashes(m, n)
        spectrum = _sketch(z, hash_z, sign_z, k) * _sketch(x, hash_x, sign_x, k)
        scale = (k / n if self.context == 'one_hot' else k / (m * n)) ** 0.5
        return (scale * jnp.fft.irfft(spectrum, n=k)).astype(x.dtype)

    def hashes(self, m: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Hash and sign of every entry of z, then of x: [m], [m], [n], [n]."""
        rng = np.random.default_rng([self.seed, self.features])
        hash_z, hash_x = (rng.integers(self.features, size=size) for size in (m, n))
        sign_z, sign_x = (rng.choice([-1.0, 1.0], size=size) for size in (m, n))
        return hash_z, sign_z, hash_x, sign_x


def _sketch(a: Array, hash_: np.ndarray, sign: np.ndarray, k: int) -> Array:
    """The Fourier transform of ψ(a)."""
    signs = jnp.asarray(sign, accumulation_dtype(a)).reshape((1,) * (a.ndim - 1) + (-1,))
    sketch = jnp.zeros((*a.shape[:-1], k), signs.dtype).at[..., hash_].add(a * signs)
    return jnp.fft.rfft(sketch)


def _inputs(x: Array, z: Array, context: str) -> tuple[Array, Array]:
    """`streams`, with a check of the word that initialisers and scales depend on."""
    check_context(context)
    return align_streams(x, z)


def _block_tucker(module: Any, x: Array, z: Array, blocks: int | None) -> Array:
    """The output of `BLOCK`, or with None that of `MUTAN`, one block and M, N without its axis."""
    x, z = _inputs(x, z, module.context)
    hidden, R = module.hidden or module.features, module.rank
    C = 1 if blocks is None else blocks
    if C < 1 or hidden % C:
        raise ValueError(
            f'blocks={blocks} must divide hidden={hidden} (features, where hidden is None); '
            f'change one of them'
        )
    L = hidden // C
    shape = (R, L, L) if blocks is None else (C, R, L, L)
    core = initializers.variance_scaling(
        1.0, 'fan_in', 'truncated_normal', batch_axis=tuple(range(len(shape) - 2))
    )
    P = module.param('P', context_init(module.context), (z.shape[-1], hidden), module.param_dtype)
    Q = module.param('Q', input_init(), (x.shape[-1], hidden), module.param_dtype)
    M = module.param('M', core, shape, module.param_dtype)
    N = module.param('N', core, shape, module.param_dtype)
    x, z, P, Q, M, N = nn.dtypes.promote_dtype(x, z, P, Q, M, N, dtype=module.dtype)

    def mapped(a: Array, maps: Array) -> Array:
        chunks = a.reshape(*a.shape[:-1], C, L)
        maps = maps.reshape(C, R, L, L)
        wide = accumulation_dtype(a, maps)
        return jnp.einsum('...cl,crlj->...crj', chunks, maps, preferred_element_type=wide)

    s = (mapped(linear(z, P), M) * mapped(linear(x, Q), N)).sum(-2)
    s = s.reshape(*s.shape[:-2], hidden).astype(x.dtype)
    return _output(module, s, variance=1 / R)


def _output(module: Any, s: Array, variance: float) -> Array:
    """Oᵀs + b."""
    shape = s.shape[-1], module.features
    O = module.param('O', input_init(variance), shape, module.param_dtype)  # noqa: E741
    b = module.param('b', initializers.zeros, shape[1:], module.param_dtype)
    b = b.reshape((1,) * (s.ndim - 1) + b.shape)
    return linear(s, O.astype(s.dtype)) + b.astype(s.dtype)
