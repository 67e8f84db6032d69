"""The language model, which fuses a token stream with a context at one site.

Shapes: T steps, B sequences, E embedding features, H hidden features, m context features, V words.
Tokens are [T, B].
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from chex import ArrayTree
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

Carry = dict[str, Any]  # 'core' and, if it has a state, 'context' → its state

Params = ArrayTree  # parameters of a model, one array for each


class LanguageModel(nn.Module):
    """A language model: words → [encoder fusion] → core → decoder fusion or affine map → words.

        e_t = embedding of token t                       [E]
        x_t = fuse(e_t, z_t)  or  e_t                    [E]   sites 'encoder' and 'both'
        h_t = core(x_≤t)                                 [H]   other sites are inside the core
        y_t = fuse(h_t, z_t)  or  an affine map of h_t   [E]   sites 'decoder' and 'both'
        logits_t = y_t · output embedding + bias         [V]   prediction of token t + 1

    The context z_t [m] depends only on tokens before t, see `mi.lm.context`.

    With a fusion at the decoder, the logits are a multiplicative interaction of h and z, bilinear
    in both. Its W is factored through the E features of the output embedding, so that it has m·H·E
    entries instead of m·H·V.

    With the source 'state' and a site before the decoder, x_t depends on h_{t−1}, so that fusion
    and input projection run inside the loop over time. In all other cases, one product computes
    all steps.

    Attributes:
      words: constructor of `Words` or `AdaptiveWords`, the embedding of E features and the softmax.
      core: constructor of `Recurrent` or `Transformer`.
      site: position of the fusion, or 'none' for a plain model.
      source: source of the context, as in `mi.lm.context`.
      context: m, or 0 for no context, which the fusion 'none' requires.
      fusion: constructor of a module (x, z) → y, one of `mi.fusion.FUSIONS`.
      rates: dropout rates.
      dtype: dtype of the products. Parameters, state and logits are f32.
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
        """Predict the token that follows each of the given tokens.

        Args:
          carry: carry from `initial_carry`, or from the call on the preceding tokens.
          tokens: ids [T, B].
          targets: ids of the tokens to predict, [T, B], or None to return logits instead of losses.
          domains: domain of each token, [T, B], for the source 'domain'.
          train: whether to apply dropout, which requires the rngs 'dropout' and 'state'.

        Returns:
          The carry after the last token, and either the logits [T, B, V] in f32 (log-probabilities
          for an adaptive softmax) or the losses of the targets, each [T, B].

        Raises:
          ValueError: if the source is 'domain' and `domains` is None.
        """
        # x_t and h_t.
        words = self.words(dtype=self.dtype, name='words')
        x = self._embed(words, tokens, train)
        run_core = self._run_step_by_step if self._fuses_state_in_core else self._run_sequence
        carry, h, z = run_core(carry, x, domains, train)
        h = drop(self.rates.output, self.rates, h, train)

        # y_t and the logits, or the losses.
        y = self._decode(words.features, h, z)
        return carry, words.logits(y) if targets is None else words.losses(y, targets)

    def initial_carry(self, batch: int) -> Carry:
        """Return the all-zero initial carry."""
        carry: Carry = {'core': self._make_core(parent=None).initial(batch)}
        if self._has_context and self.source in NETWORKS:
            carry['context'] = NETWORKS[self.source](self.context, parent=None).initial(batch)
        return carry

    def decoder(self) -> 'LanguageModel':
        """Return the same model with a cache of keys and values, see `Transformer.decode`."""
        if self.memory is None:
            return self
        return self.clone(core=functools.partial(self.core, decode=True))

    @property
    def memory(self) -> int | None:
        """The number of tokens in a Transformer's memory, or None for other cores."""
        return getattr(self._make_core(parent=None), 'memory', None)

    @property
    def _has_context(self) -> bool:
        return self.site != 'none' and self.context > 0

    @property
    def _fuses_state_in_core(self) -> bool:
        """Whether the context of a step is the core's own state after the previous step."""
        return self._has_context and self.source == 'state' and self.site != 'decoder'

    def _embed(self, words: Words | AdaptiveWords, tokens: Array, train: bool) -> Array:
        """Embed tokens as [T, B, E], with dropout of whole words and of features."""
        x = words.embed(tokens)
        if train and self.rates.word:
            keep = RowDropout(self.rates.word, row_axis=None)(jnp.ones(words.vocabulary), False)
            x = x * keep[tokens][..., None].astype(x.dtype)
        return drop(self.rates.input, self.rates, x, train)

    def _run_step_by_step(
        self, carry: Carry, x: Array, domains: Array | None, train: bool
    ) -> tuple[Carry, Array, Array]:
        """Run the core in a loop over time, in which it computes z_t from its own h_{t−1}."""
        del domains  # the source is 'state'

        def step(
            core: nn.Module, core_state: ArrayTree, x_t: Array
        ) -> tuple[ArrayTree, tuple[Array, Array]]:
            core_state, h, z = core(core_state, x_t[None], None, train)
            return core_state, (h, z)

        loop = nn.scan(
            step,
            variable_broadcast='params',
            split_rngs={'params': False, 'dropout': not self.rates.locked, 'state': False},
        )
        core_state, (h, z) = loop(self._make_core(name='core'), carry['core'], x)
        return {'core': core_state}, h[:, 0], z[:, 0]

    def _run_sequence(
        self, carry: Carry, x: Array, domains: Array | None, train: bool
    ) -> tuple[Carry, Array, Array]:
        """Compute z for all steps, then run the core on the whole sequence."""
        core = self._make_core(name='core')
        next_carry, z = self._compute_context(carry, x, domains)
        next_carry['core'], h, _ = core(carry['core'], x, z, train)
        if z is None:  # the source 'state' at the decoder, which reads all states of the core
            top_h = carry['core'][-1][1]
            affine = Affine(self.context, dtype=self.dtype, name='context')
            z = affine(previous(top_h, h))
        return next_carry, h, z

    def _compute_context(
        self, carry: Carry, x: Array, domains: Array | None
    ) -> tuple[Carry, Array | None]:
        """Compute the carry of the context network, and z, which is None for the source 'state'."""
        if not self._has_context:
            return {}, jnp.zeros((1, x.shape[1], 0), self.dtype)
        if self.source == 'domain':
            if domains is None:
                raise ValueError(
                    "domains = None: expected the domain of each token for source = 'domain'"
                )
            return {}, jax.nn.one_hot(domains, self.context, dtype=self.dtype)
        if self.source == 'state':
            return {}, None
        network = NETWORKS[self.source](self.context, dtype=self.dtype, name='context')
        network_state, z = network(carry['context'], x)
        return {'context': network_state}, z

    def _decode(self, features: int, h: Array, z: Array) -> Array:
        """Compute the features y [T, B, E] from which the logits are computed."""
        if self.site in ('decoder', 'both'):
            return self.fusion(features, dtype=self.dtype, name='fuse_decoder')(h, z)
        return Affine(features, dtype=self.dtype, early_gradients=True, name='decoder')(h)

    def _make_core(self, **options: Any) -> Any:
        if self._fuses_state_in_core:
            options['context'] = self.context
        return self.core(
            site=self.site, fusion=self.fusion, rates=self.rates, dtype=self.dtype, **options
        )
