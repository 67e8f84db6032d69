import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mi import FUSIONS, cells, fusion
from mi.layers import Affine
from mi.lm import feed_forward
from mi.lm import model as lm
from mi.lm.context import SOURCES
from mi.lm.dropout import Rates
from mi.lm.embeddings import Words
from mi.lm.recurrent import Recurrent
from mi.lm.transformer import Transformer
from tests import prng

V, T, B, D = 19, 6, 3, 4
EVERY = [
    *itertools.product(['lstm'], lm.SITES[:-1], SOURCES),
    *itertools.product(['transformer'], lm.SITES, SOURCES[:-1]),
    *itertools.product([core for core in cells.CELLS if core != 'lstm'], ['encoder'], SOURCES[::3]),
]
FEW = [
    ('lstm', 'encoder', 'state'),
    ('lstm', 'decoder', 'recurrent'),
    ('transformer', 'attention', 'summary'),
    ('transformer', 'both', 'domain'),
]
SOME = [*EVERY[1::7], *EVERY[-8:]]


def fast(arms):
    """The first few in every run of the tests, the others in the whole one."""
    return [pytest.param(*arm, marks=() if arm in FEW else pytest.mark.slow) for arm in arms]


class OnlyContext(nn.Module):
    """A fusion that lets nothing through but the context."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, z):
        return Affine(self.features)(z)


def make(
    core='lstm', site='encoder', source='recurrent', fuse='mi', *, tied=True, context=5, **options
):
    constructor = fusion.get(fuse, rank=3, hidden=4) if isinstance(fuse, str) else fuse
    sizes = {'features': 12, 'layers': 1, 'hidden': 6}
    core_options = {
        name: options.pop(name) for name in list(options) if name not in ('rates', 'dtype')
    }
    if core == 'transformer':
        core_options = {'heads': 2, 'memory': 5} | core_options
        constructor_of_core = Transformer
    else:
        small = {'hyper_features': 4, 'embedding': 3} if core == 'hyper_lstm' else {}
        cell = functools.partial(cells.CELLS[core], **small)
        constructor_of_core = functools.partial(Recurrent, cell=cell)
    return lm.LanguageModel(
        words=functools.partial(Words, vocabulary=V, features=8, tied=tied),
        core=functools.partial(constructor_of_core, **(sizes | core_options)),
        site=site,
        source=source,
        context=D if source == 'domain' and context else context,
        fusion=constructor,
        **options,
    )


def run(model, tokens, seed=0):
    """Random variables, none zero so that none hides another, a carry, and domains."""
    carry = model.initial_carry(tokens.shape[1])
    domains = tokens % D
    shapes = jax.eval_shape(model.init, jax.random.key(0), carry, tokens, None, domains)
    rng = np.random.default_rng(seed)
    variables = jax.tree.map(lambda a: 0.4 * rng.normal(size=a.shape).astype(a.dtype), shapes)
    return variables, carry, domains


@pytest.fixture
def tokens():
    """All different, so that each row of the embedding is one place in the text."""
    return jax.random.permutation(prng.key(0), V)[: T * B].reshape(T, B)


@pytest.mark.parametrize('core, site, source', fast(EVERY))
def test_no_logit_depends_on_later_tokens_and_each_on_all_before(core, site, source, tokens):
    """By gradient: that of the logits at t with respect to the embedding of every token."""
    model = make(core, site, source, tied=False, layers=2)
    variables, carry, domains = run(model, tokens)
    weights = jax.random.normal(prng.key(1), (T, B, V))

    def weighted(table):
        params = variables['params'] | {
            'words': variables['params']['words'] | {'embedding': table}
        }
        _, logits = model.apply({'params': params}, carry, tokens, None, domains)
        return (logits * weights).sum(axis=(1, 2))

    jacobian = jax.jit(jax.jacrev(weighted))(variables['params']['words']['embedding'])
    reaches = np.abs(jacobian).max(-1)[:, tokens].max(-1) > 0  # [T of logits, T of tokens]
    np.testing.assert_array_equal(reaches, np.tri(T, dtype=bool))


@pytest.mark.parametrize(
    'core, site, source',
    [
        ('lstm', 'encoder', 'recurrent'),
        ('lstm', 'decoder', 'state'),
        ('lstm', 'decoder', 'summary'),
        ('transformer', 'encoder', 'summary'),
        ('transformer', 'decoder', 'recurrent'),
    ],
)
def test_the_context_has_seen_the_tokens_before_and_not_the_present_one(core, site, source, tokens):
    model = make(core, site, source, OnlyContext)
    variables, carry, domains = run(model, tokens)
    apply = jax.jit(model.apply)
    _, before = apply(variables, carry, tokens, None, domains)
    other = tokens.at[3].set(tokens[3, ::-1])
    _, after = apply(variables, carry, other, None, domains)
    np.testing.assert_array_equal(before[:4], after[:4])
    assert (before[4] != after[4]).any()


@pytest.mark.parametrize('core, site, source', fast(dict.fromkeys(FEW + SOME)))
def test_two_segments_with_carried_state_are_the_whole(core, site, source, tokens):
    model = make(core, site, source, layers=2)
    variables, carry, domains = run(model, tokens)
    apply = jax.jit(model.apply)
    _, whole = apply(variables, carry, tokens, None, domains)
    middle, first = apply(variables, carry, tokens[:3], None, domains[:3])
    _, second = apply(variables, middle, tokens[3:], None, domains[3:])
    np.testing.assert_allclose(jnp.concatenate([first, second]), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'fuse',
    [
        pytest.param(word, marks=() if word in ('none', 'mi', 'multi_head') else pytest.mark.slow)
        for word in FUSIONS
    ],
)
def test_every_fusion_fits_both_sites_and_all_its_parameters_learn(fuse, tokens):
    one_hot = {'source': 'domain'} if fuse in fusion.ONE_HOT else {'source': 'state'}
    constructor = functools.partial(fusion.get(fuse, rank=3, hidden=4))
    if fuse in fusion.ONE_HOT:
        constructor = functools.partial(constructor, context='one_hot')
    model = make('lstm', 'both', **one_hot, fuse=constructor, context=0 if fuse == 'none' else 5)
    variables, carry, domains = run(model, tokens)

    def loss(variables):
        return (model.apply(variables, carry, tokens, None, domains)[1] ** 2).mean()

    gradients = jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(variables))
    dead = [jax.tree_util.keystr(path) for path, g in gradients if not (g != 0).any()]
    assert not dead


@pytest.mark.slow
@pytest.mark.parametrize('site', lm.SITES[1:])
def test_every_parameter_of_a_transformer_learns_at_every_site(site, tokens):
    model = make('transformer', site, layers=2, tied=False)
    variables, carry, domains = run(model, tokens)
    words = variables['params']['words']

    def loss(variables):
        return (model.apply(variables, carry, tokens, None, domains)[1] ** 2).mean()

    gradients = jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(variables))
    assert words['embedding'].shape == (V, 8)
    dead = [
        jax.tree_util.keystr(path)
        for path, g in gradients
        if not (g != 0).any() and "'key']['b'" not in jax.tree_util.keystr(path)
    ]
    assert not dead  # but the bias of keys, which adds the same to all scores of a query


def test_the_arms_of_a_comparison_differ_in_the_fusion_alone(tokens):
    carry = make().initial_carry(B)
    mi_params, concat_params = (
        jax.eval_shape(make(fuse=f).init, jax.random.key(0), carry, tokens)['params']
        for f in ('mi', 'concat')
    )
    name = 'fuse_encoder'
    encoder_mi, encoder_concat = mi_params['core'].pop(name), concat_params['core'].pop(name)
    assert jax.tree.map(jnp.shape, mi_params) == jax.tree.map(jnp.shape, concat_params)
    assert set(encoder_mi) - set(encoder_concat) == {'W'}


def test_without_site_or_context_there_is_no_context_network(tokens):
    for model in (make(site='none'), make(fuse='none', context=0)):
        variables, _, _ = run(model, tokens)
        assert 'context' not in variables['params']
        assert 'context' not in model.initial_carry(B)


@pytest.mark.parametrize('core', ['lstm', 'transformer'])
def test_dropout_is_for_training_alone(core, tokens):
    rates = Rates(0.2, 0.2, 0.2, 0.2 if core == 'lstm' else 0, 0.2 if core != 'lstm' else 0, 0.2)
    model = make(core, layers=2, rates=rates)
    variables, carry, _ = run(model, tokens)

    @jax.jit
    def apply(key):
        key = prng.key(key)
        rngs = {'dropout': key, 'state': key}
        return model.apply(variables, carry, tokens, train=True, rngs=rngs)[1]

    assert (apply(0) != apply(1)).any()
    np.testing.assert_array_equal(apply(0), apply(0))
    evaluate = jax.jit(model.apply)
    still = [evaluate(variables, carry, tokens)[1] for _ in range(2)]
    np.testing.assert_array_equal(*still)


@pytest.mark.parametrize('source', ['recurrent', 'state'])
def test_locked_dropout_drops_the_same_features_at_all_steps(source, tokens):
    """Also where the core runs in a loop: words that are all alike look alike at every step."""
    rates = Rates(input=0.5, layer=0.5, locked=True)
    model = make('lstm', 'encoder', source, OnlyInput, rates=rates, layers=2)
    variables, carry, _ = run(model, tokens)
    for i in range(2):
        layer = variables['params']['core'][f'layer_{i}']
        layer['U'][:] = 0  # no memory but c,
        layer['W'][:, 12:24] = 0
        layer['b'][12:24] = -100  # and c is forgotten
    alike = jnp.full_like(tokens, 3)
    rngs = {'dropout': prng.key(0), 'state': prng.key(1)}
    apply = jax.jit(functools.partial(model.apply, train=True))
    _, logits = apply(variables, carry, alike, rngs=rngs)
    np.testing.assert_allclose(logits, jnp.broadcast_to(logits[:1], logits.shape), rtol=1e-5)
    assert (logits[0, 0] != logits[0, 1]).any()  # another mask for another sequence


def test_locked_dropout_of_a_transformer_drops_the_same_features_at_all_steps(tokens):
    """Words that are all alike look alike at every step: attention has one thing to attend to."""
    rates = Rates(layer=0.5, locked=True)
    model = make('transformer', 'none', rates=rates, layers=2, memory=0)
    variables, carry, _ = run(model, tokens)
    alike = jnp.full_like(tokens, 3)
    rngs = {'dropout': prng.key(0), 'state': prng.key(1)}
    apply = jax.jit(functools.partial(model.apply, train=True))
    _, logits = apply(variables, carry, alike, rngs=rngs)
    same = jnp.broadcast_to(logits[:1], logits.shape)
    np.testing.assert_allclose(logits, same, rtol=1e-4, atol=1e-5)
    assert abs(logits[0, 0] - logits[0, 1]).max() > 1e-2  # another mask for another sequence


class OnlyInput(OnlyContext):
    """A fusion that lets nothing through but the input."""

    @nn.compact
    def __call__(self, x, z):
        return Affine(self.features)(x)


def test_bf16_products_give_f32_logits(tokens):
    exact = make()
    variables, carry, _ = run(exact, tokens)
    _, logits = jax.jit(make(dtype=jnp.bfloat16).apply)(variables, carry, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, jax.jit(exact.apply)(variables, carry, tokens)[1], atol=0.2)


@pytest.mark.parametrize('site', ['none', 'attention'])
@pytest.mark.parametrize('memory', [0, 3])
def test_one_token_at_a_time_with_a_cache_is_the_whole(site, memory, tokens):
    """KV cache: a Transformer computes the same from cached keys and values as from all tokens."""
    model = make('transformer', site, layers=2, memory=memory, kv_heads=1)
    variables, carry, domains = run(model, tokens)
    _, whole = jax.jit(model.apply)(variables, carry, tokens, None, domains)
    decoder = model.decoder()
    carry = decoder.initial_carry(B)
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), carry, tokens)
    cache = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes['cache'])
    apply = jax.jit(functools.partial(decoder.apply, mutable=['cache']))
    parts = []
    for rows in (slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 6)):
        (carry, logits), updated = apply(
            {**variables, 'cache': cache}, carry, tokens[rows], None, domains[rows]
        )
        cache = updated['cache']
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('positions', ['rotary', 'relative'])
def test_segments_with_a_memory_are_one_long_segment(positions, tokens):
    """Transformer-XL: with a memory of M tokens, where segments end has no effect at all."""
    model = make('transformer', 'none', layers=2, memory=4, positions=positions)
    variables, carry, _ = run(model, tokens)
    apply = jax.jit(model.apply)
    _, whole = apply(variables, carry, tokens)
    parts = []
    for rows in (slice(0, 1), slice(1, 3), slice(3, 6)):
        carry, logits = apply(variables, carry, tokens[rows])
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts), whole, rtol=1e-4, atol=1e-5)
    assert (carry['core']['filled'] == 4).all()
    long = make('transformer', 'none', layers=2, memory=T, positions=positions)
    _, all_before = jax.jit(long.apply)(variables, long.initial_carry(B), tokens)
    np.testing.assert_allclose(all_before[:5], whole[:5], rtol=1e-4, atol=1e-5)
    assert (all_before[5] != whole[5]).any()  # the sixth sees four before it, and not five


def test_a_rematerialized_block_has_the_same_gradient(tokens):
    plain = make('transformer', 'ffn', layers=2)
    variables, carry, domains = run(plain, tokens)

    def gradient(model):
        def loss(variables):
            return model.apply(variables, carry, tokens, None, domains)[1].std()

        return jax.jit(jax.grad(loss))(variables)

    remade = gradient(make('transformer', 'ffn', layers=2, remat=True))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient(plain), remade
    )


def test_a_summary_is_the_decaying_mean_of_what_came_before():
    from mi.lm.context import Summary

    summary = Summary(4, longest=16.0)
    x = jax.random.normal(prng.key(0), (T, B, 5))
    s = jax.random.normal(prng.key(1), (B, 4))
    params = summary.init(prng.key(2), s, x)
    after, z = summary.apply(params, s, x)
    decay = np.exp(-1 / np.geomspace(1, 16, 4))
    V, b = (np.asarray(params['params']['input'][name]) for name in ('V', 'b'))
    now = np.asarray(s, np.float64)
    for t in range(T):
        np.testing.assert_allclose(z[t], now, rtol=1e-5, atol=1e-6)
        now = decay * now + np.sqrt(1 - decay**2) * (np.asarray(x[t]) @ V + b)
    np.testing.assert_allclose(after, now, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_normalization_is_a_sum_over_one_axis():
    """Of rows of B · T. XLA on CPU sums two axes in small windows, which takes far longer."""
    model = make('transformer', 'none', layers=1, memory=0)
    tokens = jnp.zeros((16, 8), jnp.int32)
    variables = jax.jit(model.init)(prng.key(0), model.initial_carry(8), tokens)
    gradient = jax.grad(lambda v: (model.apply(v, model.initial_carry(8), tokens)[1] ** 2).sum())
    program = jax.jit(gradient).lower(variables).compile().as_text()
    assert re.search(r'= f32\[12\]\S* reduce\(.*dimensions=\{0\}', program)
    assert not re.search(r'= f32\[12\]\S* reduce\(.*dimensions=\{0,1\}', program)
    assert not re.search(r'window=\{size=\d+x(?!1 )\d+', program)


@pytest.mark.parametrize(
    ('activation', 'bytes_per_entry'), [('swiglu', 8), ('gelu', 4), ('relu', 9)]
)
def test_activations_keep_few_arrays_for_the_backward_pass(activation, bytes_per_entry):
    """These are the arguments of the activation.

    relu has a boolean, and its value for the next product in two shapes.
    """
    layer = feed_forward.FeedForward(48, activation)
    x = jax.ShapeDtypeStruct((2, 5, 16), jnp.float32)
    params = jax.eval_shape(layer.init, jax.random.key(0), x, None)

    def pull_back(params, x):
        return jax.vjp(lambda params, x: layer.apply(params, x, None), params, x)[1]

    saved = jax.tree.leaves(jax.eval_shape(pull_back, params, x))
    num_entries = 2 * 5 * 48
    saved_bytes = sum(a.size * a.dtype.itemsize for a in saved if a.size == num_entries)
    assert saved_bytes == bytes_per_entry * num_entries
