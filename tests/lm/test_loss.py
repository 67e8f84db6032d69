import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi import counting
from mi.lm.adaptive_softmax import AdaptiveWords
from mi.lm.loss import Objective, losses_from_logits, softmax_losses

N, E, V = 23, 6, 40


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    y, table, bias = (rng.normal(size=s).astype(np.float32) for s in [(N, E), (V, E), (V,)])
    return y, table, bias, rng.integers(V, size=N)


def in_numpy(y, table, bias, targets, label_smoothing=0.0, z_loss=0.0):
    """Sums over the vocabulary written out, float64."""
    costs = []
    for row, target in zip(np.asarray(y, np.float64), targets, strict=True):
        logits = [float(row @ table[v] + bias[v]) for v in range(V)]
        log_z = np.log(sum(np.exp(a) for a in logits))
        nats = log_z - logits[target]
        spread = sum(log_z - a for a in logits) / V
        objective = (1 - label_smoothing) * nats + label_smoothing * spread + z_loss * log_z**2
        costs.append((nats, objective))
    return np.array(costs).T


@pytest.mark.parametrize('chunk', [0, 1, 8, 23, 100])
@pytest.mark.parametrize('options', [{}, {'label_smoothing': 0.1, 'z_loss': 0.01}])
def test_losses_are_the_sums_written_out_however_they_are_cut(inputs, chunk, options):
    losses = softmax_losses(*inputs, Objective(chunk=chunk, **options))
    np.testing.assert_allclose(losses, in_numpy(*inputs, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('chunk', [5, 23])
def test_the_gradient_of_chunks_is_that_of_the_whole(inputs, chunk):
    *floats, targets = inputs
    weights = jnp.cos(jnp.arange(N))

    def weighted(chunk, *floats):
        losses = softmax_losses(*floats, targets, Objective(0.1, z_loss=0.01, chunk=chunk))
        return (losses.objective * weights).sum() + losses.nats.mean()

    whole, parts = (
        jax.grad(functools.partial(weighted, c), (0, 1, 2))(*floats) for c in (0, chunk)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole, parts)


def test_chunks_take_a_fraction_of_the_memory():
    shapes = [(1024, 32), (8192, 32), (8192,)]
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    args.append(jax.ShapeDtypeStruct((1024,), jnp.int32))

    def temporary(chunk):
        def loss(*args):
            return softmax_losses(*args, Objective(chunk=chunk)).nats.mean()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(128) < temporary(0) / 3


@pytest.mark.parametrize('scale', [1.0, 40.0])
def test_the_gradient_of_the_loss_is_the_softmax_minus_the_target(scale):
    """With the large scale, some targets have a probability of almost 1 or 0."""
    rng = np.random.default_rng(3)
    logits, targets = scale * rng.standard_normal((N, V)), rng.integers(0, V, N)
    nats_weights, z_weights = rng.standard_normal((2, N))

    def weighted(logits):
        losses = losses_from_logits(logits, jnp.asarray(targets), Objective(z_loss=1.0))
        log_z_squared = losses.objective - losses.nats
        return (losses.nats * nats_weights + log_z_squared * z_weights).sum()

    gradient = jax.grad(weighted)(jnp.asarray(logits, jnp.float32))
    log_z = np.log(np.exp(logits).sum(axis=1, keepdims=True))
    softmax, is_target = np.exp(logits - log_z), np.arange(V) == targets[:, None]
    expected = (softmax - is_target) * nats_weights[:, None]
    expected += 2 * log_z * softmax * z_weights[:, None]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=2e-5 * scale)


def test_a_training_step_has_two_arrays_of_the_size_of_the_logits():
    """These are the logits and their gradient, although the step also reports the loss."""
    num_tokens, num_words, features = 512, 4096, 8

    def step(y, table, bias, targets):
        def loss(y, table, bias):
            losses = softmax_losses(y, table, bias, targets, Objective())
            return losses.objective.mean(), losses.nats

        gradients, nats = jax.grad(loss, (0, 1, 2), has_aux=True)(y, table, bias)
        return gradients, nats.mean()

    shapes = [(num_tokens, features), (num_words, features), (num_words,)]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    args.append(jax.ShapeDtypeStruct((num_tokens,), jnp.int32))
    memory = jax.jit(step).lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2.5 * 4 * num_tokens * num_words


@functools.cache
def adaptive(tied=True, chunk=0, divisor=2):
    words = AdaptiveWords(V, 8, (5, 12, 30), divisor=divisor, tied=tied, chunk=chunk)
    rng = np.random.default_rng(1)
    y = jnp.zeros((N, 8))
    init = functools.partial(words.init, method='logits')
    shapes = jax.eval_shape(init, jax.random.key(0), y)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes)
    return words, params, rng.normal(size=(N, 8)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def adaptive_losses(words, params, y, targets):
    return words.apply(params, y, targets, method='losses')


def log_probability(params, y, word, tied=True):
    """ln p(word) of one token, written out in float64 from the equations."""
    p = {name: np.asarray(a, np.float64) for name, a in params['params'].items()}
    table, P = ('embedding', 'P') if tied else ('output', 'P_out')
    ends = [0, 5, 12, 30, V]
    head = np.concatenate([p[f'{table}_0'], p['T']]) @ y + p['bias_0']
    head = head - np.log(np.exp(head).sum())
    if word < 5:
        return head[word]
    i = next(i for i in range(1, 4) if word < ends[i + 1])
    tail = p[f'{table}_{i}'] @ (p[f'{P}_{i}'] @ y) + p[f'bias_{i}']
    tail = tail - np.log(np.exp(tail).sum())
    return head[5 + i - 1] + tail[word - ends[i]]


TARGETS = {
    'spread': np.arange(N) * 7 % V,
    'all in the head': np.arange(N) % 5,
    'all in the last tail': 30 + np.arange(N) % 10,
    'one tail empty': np.where(np.arange(N) % 2, 3, 35),
    'one word': np.full(N, 12),
}


@pytest.mark.parametrize('targets', TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize('chunk', [0, 4])
def test_an_adaptive_softmax_drops_no_token(targets, chunk):
    for tied in (True, False):
        words, params, y = adaptive(tied, chunk)
        cost = adaptive_losses(words, params, y, targets).nats
        expected = [-log_probability(params, *pair, tied) for pair in zip(y, targets, strict=True)]
        np.testing.assert_allclose(cost, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize('targets', list(TARGETS.values())[:3], ids=list(TARGETS)[:3])
def test_its_gradient_is_that_of_the_whole_distribution(targets):
    words, params, y = adaptive(chunk=4)

    def block_loss(params, y):
        return words.apply(params, y, targets, method='losses').objective.mean()

    def full_loss(params, y):
        log_p = words.apply(params, y, method='logits')
        return -jnp.take_along_axis(log_p, targets[:, None], axis=-1).mean()

    blocks, whole = (jax.jit(jax.grad(f, (0, 1)))(params, y) for f in (block_loss, full_loss))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), blocks, whole)


def test_tokens_that_do_not_fill_a_chunk_are_not_padded_to_one():
    """As on many devices with few rows of the batch each."""

    def flops(chunk):
        words, params, y = adaptive(chunk=chunk)
        losses = functools.partial(words.apply, method='losses')
        return counting.flops(losses, params, y, TARGETS['spread'])

    assert flops(100 * N) == flops(N) > 0


def test_its_distribution_sums_to_one_and_seeds_can_be_vmapped():
    words, params, y = adaptive()
    log_p = jax.jit(functools.partial(words.apply, method='logits'))(params, y)
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=1e-5)
    targets = TARGETS['spread']
    stacked = jax.tree.map(lambda a: np.stack([a, a / 2]), params)
    over_seeds = jax.vmap(lambda p: adaptive_losses(words, p, y, targets).nats)(stacked)
    alone = adaptive_losses(words, params, y, targets).nats
    np.testing.assert_allclose(over_seeds[0], alone, rtol=1e-5)
    assert (over_seeds[0] != over_seeds[1]).all()


def test_its_embedding_is_e_of_the_head_and_e_P_of_the_tails():
    words, params, _ = adaptive()
    x = words.apply(params, jnp.arange(V).reshape(4, 10), method='embed').reshape(V, 8)
    p = params['params']
    np.testing.assert_allclose(x[:5], 8**0.5 * p['embedding_0'], rtol=1e-5)
    tail = 8**0.5 * p['embedding_2'] @ p['P_2']
    np.testing.assert_allclose(x[12:30], tail, rtol=1e-4, atol=1e-5)


def test_logits_and_embedding_start_with_unit_variance():
    words = AdaptiveWords(4_000, 64, (500, 1_500), divisor=4)
    y = jax.random.normal(jax.random.key(0), (64, 64))
    params = jax.jit(functools.partial(words.init, method='logits'))(jax.random.key(1), y)
    x = np.asarray(words.apply(params, jnp.arange(4_000), method='embed'))
    for part in (slice(0, 500), slice(500, 1_500), slice(1_500, 4_000)):
        assert 0.7 < x[part].var() < 1.4
    bound = words.bind(params)
    for logits in (bound._head_logits(y), bound._tail_logits(1, y), bound._tail_logits(2, y)):
        assert 0.7 < logits.var() < 1.4


def test_cutoffs_that_do_not_rise_are_refused():
    with pytest.raises(ValueError, match='expected increasing integers'):
        AdaptiveWords(10, 4, (5, 5)).init(jax.random.key(0), jnp.zeros((1, 4)), method='logits')
