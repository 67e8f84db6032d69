import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mi import FUSIONS, fusion
from mi.layers import Affine
from mi.lm import model as lm

V, T, B = 11, 6, 3
ARMS = list(itertools.product(lm.SITES, lm.SOURCES))


class OnlyContext(nn.Module):
    """A fusion that lets nothing through but the context."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, z):
        return Affine(self.features)(z)


def make(site='encoder', source='recurrent', fuse='mi', **options):
    constructor = fusion.get(fuse, rank=3, hidden=4) if isinstance(fuse, str) else fuse
    sizes = {'embed': 8, 'hidden': 10, 'context': 5} | options
    return lm.LanguageModel(V, site=site, source=source, fusion=constructor, **sizes)


def run(model, tokens, seed=0):
    """Random variables, none zero so that none hides another, and a carry."""
    carry = model.initial_carry(tokens.shape[1])
    shapes = jax.eval_shape(model.init, jax.random.key(0), carry, tokens)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: 0.4 * rng.normal(size=a.shape).astype(a.dtype), shapes), carry


@pytest.fixture
def tokens():
    return jax.random.randint(jax.random.key(0), (T, B), 0, V)


@pytest.mark.parametrize('site, source', ARMS)
@pytest.mark.parametrize('fuse', ['concat', 'mi'])
def test_no_logit_depends_on_later_tokens(site, source, fuse, tokens):
    model = make(site, source, fuse, layers=2)
    variables, carry = run(model, tokens)
    apply = jax.jit(model.apply)
    _, before = apply(variables, carry, tokens)
    for t in range(T):
        other = tokens.at[t].set((tokens[t] + 1) % V)
        _, after = apply(variables, carry, other)
        np.testing.assert_array_equal(before[:t], after[:t])
        assert (before[t] != after[t]).any(axis=-1).all()


@pytest.mark.parametrize('site, source', [arm for arm in ARMS if arm[0] != 'none'])
def test_the_context_has_seen_the_tokens_before_and_not_the_present_one(site, source, tokens):
    model = make(site, source, OnlyContext)
    variables, carry = run(model, tokens)
    apply = jax.jit(model.apply)
    _, before = apply(variables, carry, tokens)
    t = 2
    _, after = apply(variables, carry, tokens.at[t].set((tokens[t] + 1) % V))
    np.testing.assert_array_equal(before[: t + 1], after[: t + 1])
    if source == 'recurrent':
        assert (before[t + 1] != after[t + 1]).any()


@pytest.mark.parametrize('site, source', ARMS)
def test_two_segments_with_carried_state_are_the_whole(site, source, tokens):
    model = make(site, source)
    variables, carry = run(model, tokens)
    apply = jax.jit(model.apply)
    _, whole = apply(variables, carry, tokens)
    middle, first = apply(variables, carry, tokens[:4])
    _, second = apply(variables, middle, tokens[4:])
    np.testing.assert_allclose(jnp.concatenate([first, second]), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('fuse', FUSIONS)
def test_every_fusion_fits_both_sites_and_all_its_parameters_learn(fuse, tokens):
    model = make('both', 'state', fuse, context=0 if fuse == 'none' else 5)
    variables, carry = run(model, tokens)

    def loss(variables):
        return (model.apply(variables, carry, tokens)[1] ** 2).mean()

    gradients = jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(variables))
    dead = [jax.tree_util.keystr(path) for path, g in gradients if not (g != 0).any()]
    assert not dead


def test_the_arms_of_a_comparison_differ_in_the_fusion_alone(tokens):
    carry = make().initial_carry(B)
    of_mi, of_concat = (
        jax.eval_shape(make(fuse=f).init, jax.random.key(0), carry, tokens)['params']
        for f in ('mi', 'concat')
    )
    encoder_mi, encoder_concat = of_mi['core'].pop('encoder'), of_concat['core'].pop('encoder')
    assert jax.tree.map(jnp.shape, of_mi) == jax.tree.map(jnp.shape, of_concat)
    assert set(encoder_mi) - set(encoder_concat) == {'W'}


def test_without_site_or_context_there_is_no_context_network(tokens):
    for model in (make(site='none'), make(fuse='none', context=0)):
        variables, _ = run(model, tokens)
        assert 'context' not in variables['params']
        assert 'context' not in model.initial_carry(B)


def test_dropout_is_for_training_alone(tokens):
    model = make(dropout=0.5, layers=2)
    variables, carry = run(model, tokens)

    @jax.jit
    def apply(key):
        rngs = {'dropout': jax.random.key(key, impl='rbg')}
        return model.apply(variables, carry, tokens, train=True, rngs=rngs)[1]

    assert (apply(0) != apply(1)).any()
    np.testing.assert_array_equal(apply(0), apply(0))
    evaluate = jax.jit(model.apply)
    still = [evaluate(variables, carry, tokens)[1] for _ in range(2)]
    np.testing.assert_array_equal(*still)


def test_bf16_products_give_f32_logits(tokens):
    exact = make()
    variables, carry = run(exact, tokens)
    _, logits = jax.jit(make(dtype=jnp.bfloat16).apply)(variables, carry, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, jax.jit(exact.apply)(variables, carry, tokens)[1], atol=0.2)
