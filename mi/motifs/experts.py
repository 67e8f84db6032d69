"""Mixtures of experts: a context weighs, or chooses, among maps of the input.

Shapes: x [..., n] the input, z [..., m] the context, y [..., k] the output; E experts, N tokens
(all leading axes together), S the experts that a token is sent to, h the width of an expert's
hidden layer.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.kernels.bilinear import accumulation_dtype, bilinear, linear
from mi.layers import Context, align_streams, check_dense, context_init


class DenseMixture(nn.Module):
    """A mixture of linear experts: y = Σ_i g_i (E_i x + e_i), g = softmax(zᵀG).

    Jacobs et al., Adaptive Mixtures of Local Experts, 1991. With g in place of z it is the
    multiplicative interaction with W = E [E, n, k] and U = e [E, k]. G [m, E] starts small (zᵀG has
    variance 1/100), so that y starts near the mean of the experts, each drawn apart with E times
    the variance of a single layer: y has unit variance for unit-variance x.

    Attributes:
      features: k.
      experts: E.
      context, dtype, param_dtype: as in `MultiplicativeInteraction`; the softmax is f32 at least.
    """

    features: int
    experts: int = 4
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """x [..., n], z [..., m] → [..., k]; ValueError if the leading axes do not broadcast."""
        x, z = align_streams(x, z)
        m, n, k = z.shape[-1], x.shape[-1], self.features
        G = self.param('G', context_init(self.context, 0.01), (m, self.experts), self.param_dtype)
        E = self.param('E', _apart(self.experts), (self.experts, n, k), self.param_dtype)
        e = self.param('e', initializers.zeros, (self.experts, k), self.param_dtype)
        x, z, G, E, e = nn.dtypes.promote_dtype(x, z, G, E, e, dtype=self.dtype)
        g = jax.nn.softmax(linear(z, G, out_dtype=accumulation_dtype(x))).astype(x.dtype)
        return bilinear(x, g, E) + linear(g, e)


class RoutedMixture(nn.Module):
    """A sparse mixture: each token passes the S experts that its router prefers.

        y = Σ_{i ∈ top S} g_i (A_i act(V_i x + b_i) + a_i),   p = softmax(zᵀG),   z = x if not given

    V [E, n, h], b [E, h], A [E, h, k], a [E, k], G [m, E]. Shazeer et al., Outrageously Large
    Neural Networks, 2017, without their noise: g is p over its sum among the chosen, which is their
    softmax of the chosen logits. For S = 1 that would be 1 and teach the router nothing: g = p
    then, as in Fedus et al., Switch Transformers, 2022.

    Two losses are sown into 'losses', unscaled, each a tuple of one scalar for each call:
      `load_balance`: E · Σ_i f_i P_i, f_i the share of the assignments that expert i gets and P_i
        the mean of p_i; 1 where both are even (Fedus et al.; their weight is 0.01).
      `router_z`: the mean of logsumexp(zᵀG)² (Zoph et al., ST-MoE, 2022; their weight is 0.001).

    No token is dropped by default, whatever the routing: the assignments, sorted by expert, fill
    fewer than 2 E blocks of ⌈N · S / E⌉ rows, each of one expert. So the products, and the weights
    gathered for them, are at most twice those of an even routing. With a capacity, an expert takes
    ⌈capacity_factor · N · S / E⌉ tokens, all first choices before the second ones and earlier
    tokens before later ones; for a token beyond, its term is zero.

    Attributes:
      features: k.
      experts: E.
      hidden: h.
      top_k: S.
      capacity_factor: None to drop nothing.
      activation: of the hidden layer.
      context: 'dense' or 'one_hot'; decides the scale at which G is initialised.
      dtype, param_dtype: as in `MultiplicativeInteraction`; the router is f32 at least.
    """

    features: int
    experts: int
    hidden: int
    top_k: int = 2
    capacity_factor: float | None = None
    activation: Callable[[Array], Array] = nn.relu
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array | None = None, mask: Array | None = None) -> Array:
        """x [..., n] → [..., k].

        Args:
          x: the input.
          z: [..., m], what the router sees; its leading axes broadcast to those of x. None for x.
          mask: [...], true where there is a token; elsewhere y is zero, no expert's capacity is
            taken and no loss counts. None for all true.

        Raises:
          ValueError: if the shapes do not fit, or on a top_k or a capacity factor out of range.
        """
        E, S, k = self.experts, self.top_k, self.features
        if not 1 <= S <= E:
            raise ValueError(f'top_k = {S}: expected 1 to {E}, the number of experts')
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(
                f'capacity_factor = {self.capacity_factor}: expected above 0, or None for no limit'
            )
        lead, n = x.shape[:-1], x.shape[-1]
        if z is None:
            z = x
        else:
            check_dense(z)
        G = self.param('G', context_init(self.context), (z.shape[-1], E), self.param_dtype)
        V = self.param('V', _apart(), (E, n, self.hidden), self.param_dtype)
        b = self.param('b', initializers.zeros, (E, self.hidden), self.param_dtype)
        A = self.param('A', _apart(2.0), (E, self.hidden, k), self.param_dtype)
        a = self.param('a', initializers.zeros, (E, k), self.param_dtype)

        dtype = nn.dtypes.canonicalize_dtype(x, V, b, A, a, dtype=self.dtype)
        wide = accumulation_dtype(dtype)
        logits = _rows('z', linear(*nn.dtypes.promote_dtype(z, G, dtype=wide)), lead)
        mask = jnp.ones(lead, bool) if mask is None else mask
        valid = _rows('the mask', mask[..., None], lead)[:, 0]
        p = jax.nn.softmax(logits)
        g, chosen = jax.lax.top_k(p, S)
        if S > 1:
            g = g / g.sum(-1, keepdims=True)
        chosen = jnp.where(valid[:, None], chosen, E)
        if not self.is_initializing():
            counts = jnp.bincount(chosen.reshape(-1), length=E)
            f = counts / counts.sum().clip(1)
            share = valid / valid.sum().clip(1)
            self.sow('losses', 'load_balance', E * f @ (share @ p))
            self.sow('losses', 'router_z', share @ jax.nn.logsumexp(logits, axis=-1) ** 2)

        x, V, b, A, a = nn.dtypes.promote_dtype(x, V, b, A, a, dtype=dtype)
        capacity = None
        if self.capacity_factor is not None:
            capacity = math.ceil(self.capacity_factor * chosen.size / E)
        slot, token, expert = assign_blocks(chosen, E, capacity)
        if capacity is None:
            V, b, A, a = V[expert], b[expert], A[expert], a[expert]
        tokens = x.reshape(-1, n).at[token].get(mode='fill', fill_value=0)
        h = self.activation(_each(tokens, V) + b[:, None])
        y = (_each(h, A) + a[:, None]).reshape(-1, k).at[slot].get(mode='fill', fill_value=0)
        return (g[..., None] * y).sum(1).astype(x.dtype).reshape(*lead, k)


@functools.partial(jax.jit, static_argnums=(1, 2))
def assign_blocks(chosen: Array, experts: int, capacity: int | None) -> tuple[Array, Array, Array]:
    """Lays out assignments of tokens to experts as B blocks of R rows, each of one expert.

    Args:
      chosen: [N, S], the experts of each token, all different; `experts` for none.
      experts: E.
      capacity: the most tokens that an expert takes; None for no limit. Without a limit R is
        ⌈N · S / E⌉, and as many blocks as any assignment can need, fewer than 2 E, start a new
        expert each; with one, each expert has one block of that many rows.

    Returns:
      slot [N, S]: the row among the B · R in which each assignment is; B · R where there is none.
      token [B, R]: the token in each row; N where there is none.
      expert [B]: whose block it is.
    """
    N, S = chosen.shape
    flat = chosen.T.reshape(-1)  # first choices first
    counts = jnp.bincount(flat, length=experts)
    order = jnp.argsort(flat)
    before = (jnp.cumsum(counts) - counts)[flat[order]]
    rank = jnp.zeros_like(flat).at[order].set((jnp.arange(N * S) - before).astype(flat.dtype))
    if capacity is None:
        R = max(1, math.ceil(N * S / experts))
        B = (N * S + min(experts, N * S) * (R - 1)) // R
        own = -(-counts // R)
        end = jnp.cumsum(own)
        expert = jnp.searchsorted(end, jnp.arange(B), side='right').clip(max=experts - 1)
        first = end - own
        kept = flat < experts
    else:
        R, B = min(capacity, N), experts
        expert = first = jnp.arange(experts)
        kept = (flat < experts) & (rank < R)
    slot = jnp.where(kept, first[flat] * R + rank, B * R)
    token = jnp.full(B * R, N).at[slot].set(jnp.tile(jnp.arange(N), S), mode='drop')
    return slot.reshape(S, N).T, token.reshape(B, R), expert


def _each(x: Array, W: Array) -> Array:
    """[B, R, n] by [B, n, k], block by block, summed in f32 at least."""
    wide = accumulation_dtype(x, W)
    return jnp.einsum('brn,bnk->brk', x, W, preferred_element_type=wide).astype(x.dtype)


def _rows(name: str, a: Array, lead: tuple[int, ...]) -> Array:
    """a [..., c], its leading axes broadcast to those of x and flattened: [N, c]."""
    try:
        a = jnp.broadcast_to(a, (*lead, a.shape[-1]))
    except ValueError as error:
        raise ValueError(
            f'the leading axes {a.shape[:-1]} of {name} do not broadcast to those of x, {lead}'
        ) from error
    return a.reshape(-1, a.shape[-1])


def _apart(variance: float = 1.0) -> initializers.Initializer:
    """Initialiser of a stack [E, n, k]: the outputs of each expert have this variance."""
    return initializers.variance_scaling(variance, 'fan_in', 'truncated_normal', batch_axis=0)
