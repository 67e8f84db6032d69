"""A language model with a place, its site, where a token stream meets a context.

Shapes: T steps, B sequences, E embedding, H hidden, m context, V vocabulary; tokens are [T, B].
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from mi.dropout import RowDropout
from mi.layers import Affine, MultiplicativeInteraction
from mi.lm.adaptive_softmax import AdaptiveWords
from mi.lm.context import NETWORKS, Source, previous
from mi.lm.dropout import Rates, drop
from mi.lm.embeddings import Words
from mi.lm.loss import Losses
from mi.lm.recurrent import Recurrent

Site = Literal['none', 'encoder', 'decoder', 'both', 'input_gate', 'norm', 'ffn', 'attention']
SITES = get_args(Site)

Carry = dict[str, Any]


class LanguageModel(nn.Module):
    """Words → [encoder fusion] → core → decoder fusion or affine map → words.

        e_t = embedding of token t                       [E]
        x_t = fuse(e_t, z_t)  or  e_t                    [E]   site 'encoder', 'both'
        h_t = core(x_≤t)                                 [H]   the other sites are in the core
        y_t = fuse(h_t, z_t)  or  an affine map of h_t   [E]   site 'decoder', 'both'
        logits_t = y_t · output embedding + bias         [V]   predicts token t + 1

    At the decoder the logits are a multiplicative interaction of h and z, bilinear in both, whose W
    is factored through the E features of the output embedding: m·H·E numbers and not m·H·V.

    The context z_t [m] has seen the tokens before t and no other, see `mi.lm.context`.

    With the source 'state' at any other site than the decoder, x_t depends on h_{t−1}, so that
    fusion and input projection run inside the loop over time; in all other cases they are one
    product for all steps.

    Attributes:
      words: constructor of the embedding and the softmax, `Words` or `AdaptiveWords`, with E.
      core: constructor of `Recurrent` or `Transformer`.
      site: where the fusion is; 'none' for a plain model.
      source: where the context comes from.
      context: m; 0 for no context at all, as the fusion 'none' wants it.
      fusion: constructor of the module (x, z) → y, one of `mi.fusion.FUSIONS`.
      rates: of dropout.
      dtype: of the products; parameters, state and logits are f32.
    """

    words: Callable[..., Words | AdaptiveWords]
    core: Callable[..., nn.Module] = Recurrent
    site: Site = 'encoder'
    source: Source = 'recurrent'
    context: int = 64
    fusion: Callable[..., nn.Module] = MultiplicativeInteraction
    rates: Rates = Rates()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        carry: Carry,
        tokens: Array,
        targets: Array | None = None,
        domains: Array | None = None,
        train: bool = False,
    ) -> tuple[Carry, Array | Losses]:
        """Carry, [T, B] ids → carry after the last token, and what is predicted.

        Args:
          carry: from `initial_carry`, or from the call on the tokens before these.
          tokens: the inputs; what is predicted at t is the token after tokens[t].
          targets: [T, B], those tokens, if only what they cost is wanted.
          domains: [T, B], of the tokens, for the source 'domain'.
          train: whether dropout is on; needs the rngs 'dropout' and 'state'.

        Returns:
          The carry, and logits [T, B, V] in f32 (log-probabilities of an adaptive softmax), or the
          losses of the targets, each [T, B].
        """
        rates = self.rates
        words = self.words(dtype=self.dtype, name='words')
        x = words.embed(tokens)
        if train and rates.word:
            keep = RowDropout(rates.word, row_axis=None)(jnp.ones(words.vocabulary), False)
            x = x * keep[tokens][..., None].astype(x.dtype)
        x = drop(rates.input, rates, x, train)

        core = self._core(name='core')
        after: Carry = {}
        if self.source == 'state' and self._has_context() and self.site != 'decoder':
            loop = nn.scan(
                lambda core, state, x_t: _pair(core(state, x_t[None], None, train)),
                variable_broadcast='params',
                split_rngs={'params': False, 'dropout': not rates.locked, 'state': False},
            )
            after['core'], (h, z) = loop(core, carry['core'], x)
            h, z = h[:, 0], z[:, 0]
        else:
            after, z = self._context(carry, x, domains)
            after['core'], h, _ = core(carry['core'], x, z, train)
            if z is None:
                z = Affine(self.context, dtype=self.dtype, name='context')(
                    previous(carry['core'][-1][1], h)
                )

        h = drop(rates.output, rates, h, train)
        if self.site in ('decoder', 'both'):
            y = self.fusion(words.features, dtype=self.dtype, name='fuse_decoder')(h, z)
        else:
            y = Affine(words.features, dtype=self.dtype, name='decoder')(h)
        return after, words.logits(y) if targets is None else words.losses(y, targets)

    def initial_carry(self, batch: int) -> Carry:
        """The state before the first token: zeros."""
        carry: Carry = {'core': self._core(parent=None).initial(batch)}
        if self._has_context() and self.source in NETWORKS:
            carry['context'] = NETWORKS[self.source](self.context, parent=None).initial(batch)
        return carry

    def decoder(self) -> 'LanguageModel':
        """The same model, going on from call to call by keys and values, see `Transformer`."""
        if self.memory is None:
            return self
        return self.clone(core=functools.partial(self.core, decode=True))

    @property
    def memory(self) -> int | None:
        """Tokens that a Transformer remembers from segment to segment; None for another core."""
        return getattr(self._core(parent=None), 'memory', None)

    def _core(self, **options: Any) -> Any:
        of_state = self._has_context() and self.source == 'state' and self.site != 'decoder'
        extra = {'context': self.context} if of_state else {}
        return self.core(
            site=self.site,
            fusion=self.fusion,
            rates=self.rates,
            dtype=self.dtype,
            **extra,
            **options,
        )

    def _context(self, carry: Carry, x: Array, domains: Array | None) -> tuple[Carry, Array | None]:
        """What of the carry is the context's, and z; no z for one that is made of the states."""
        if not self._has_context():
            return {}, jnp.zeros((1, x.shape[1], 0), self.dtype)
        if self.source == 'domain':
            if domains is None:
                raise ValueError("the source 'domain' needs domains, [T, B]")
            return {}, jax.nn.one_hot(domains, self.context, dtype=self.dtype)
        if self.source == 'state':
            return {}, None
        network = NETWORKS[self.source](self.context, dtype=self.dtype, name='context')
        after, z = network(carry['context'], x)
        return {'context': after}, z

    def _has_context(self) -> bool:
        return self.site != 'none' and self.context > 0


def _pair(result: tuple[Any, Any, Any]) -> tuple[Any, tuple[Any, Any]]:
    return result[0], result[1:]
