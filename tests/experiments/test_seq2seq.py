"""Mixers of tokens, functions of sequences, and the errors that theory says are the least."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.seq2seq import config as seq2seq
from experiments.seq2seq import mixers, transformer
from experiments.seq2seq import problem as sequences
from mi import fusion
from mi.config import UserError
from mi.fit import factory, train
from mi.motifs.attention import Attention
from tests import prng
from tests.fit.runs import edited, finals

N, D, TAU = 5, 2, 0.5


def config(**changes):
    return edited(seq2seq.get_config(), **changes)


def draw_sequences(seed, examples, n=N):
    X = np.random.default_rng(seed).uniform(-1, 1, (examples, n, D))
    return jnp.asarray(X, jnp.float32)


def make_mixer(word, heads=2, fuse='mi_low_rank'):
    return mixers.MIXERS[word](heads, fusion.get(fuse, rank=6), None)


def test_the_targets_are_their_definitions():
    (X,) = draw_sequences(0, 1)
    Y = {word: np.asarray(f(X, TAU)) for word, f in sequences.TARGETS.items()}
    for t in range(N):
        distance = [sum((X[t, j] - X[s, j]) ** 2 for j in range(D)) for s in range(N)]
        w = np.exp(np.array(distance, np.float64) / TAU)
        expected = {
            'difference': sum(X) / N - X[t],
            'farthest': (w[:, None] * X).sum(0) / w.sum(),
            'reverse': X[N - 1 - t],
            'sort': [sorted(X[:, j])[t] for j in range(D)],
        }
        for word, y in expected.items():
            np.testing.assert_allclose(Y[word][t], y, rtol=1e-5, atol=1e-6)


def test_floors_match_closed_forms():
    """Of 'reverse' and 'sort', the mean over all orders is the mean token if n is odd, and its
    variance 1/n of a token's; 'reverse' and 'difference' are sums, and so is no product."""

    def f(X):
        token_product = X[:, :1, :1] * X[:, 1:2, :1] * jnp.ones_like(X)
        targets = [X.mean(1, keepdims=True) - X, X[:, ::-1], jnp.sort(X, 1), token_product]
        return jnp.stack(targets) * 3**0.5

    X, X_other = draw_sequences(1, 4000), draw_sequences(2, 4000)
    equivariant = sequences.compute_equivariant_floor(f, X[:500])
    assert equivariant[0] == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(equivariant[1:3], 1 - 1 / N, rtol=0.05)
    additive = sequences.compute_additive_floor(f, X, X_other)
    np.testing.assert_allclose(additive[:2], 0, atol=0.05)
    assert additive[3] == pytest.approx(3 / 9, rel=0.1)  # all of it: E x²x² = 1/9
    assert 0.04 < additive[2] < 0.14


def test_the_additive_floor_of_a_small_sample_is_unbiased():
    """f(X) = x_1 x_2 for both tokens owes nothing to one alone: its floor is Var f = 1/9."""

    def product(X):
        return jnp.broadcast_to(X[None, :, :1] * X[None, :, 1:], (1, *X.shape))

    def compute_floor(key):
        X, X_other = jax.random.uniform(key, (2, 4, 2, 1), minval=-1)
        return sequences.compute_additive_floor(product, X, X_other)

    floors = jax.vmap(compute_floor)(jax.random.split(prng.key(0), 20_000))
    assert floors.mean() == pytest.approx(1 / 9, rel=0.03)


def test_the_best_equivariant_polynomial_reaches_the_floor():
    X = draw_sequences(3, 2000, n=3)

    def f(X):
        return (X[:, ::-1] * X[:, :1] + X**2)[None]

    floor = sequences.compute_equivariant_floor(f, X)[0]
    # Every function of (x_t, the sum of the others) is equivariant: the best polynomial of degree
    # 3 in them cannot be below the floor, up to the little that it fits of the sample.
    tokens, others = X, X.sum(1, keepdims=True) - X
    features = np.concatenate([tokens, others], -1).reshape(-1, 2 * D)
    powers = [power for power in itertools.product(range(4), repeat=2 * D) if sum(power) <= 3]
    monomials = np.stack([np.prod(features ** np.array(power), 1) for power in powers], 1)
    y = np.asarray(f(X)[0]).reshape(-1, D)
    least_error = np.mean((monomials @ np.linalg.lstsq(monomials, y, rcond=None)[0] - y) ** 2)
    assert floor > 0.01
    assert 0.98 * floor <= least_error <= 1.3 * floor


def test_the_equivariant_floor_is_the_variance_over_all_orders():
    """What is Y on X is Y's tokens in the order of X's on all of them: the best Y is the mean."""
    n, X = 4, draw_sequences(9, 8, n=4)

    def f(X):
        return jnp.stack([target(X, TAU) for target in sequences.TARGETS.values()])

    outputs = []
    for order in map(list, itertools.permutations(range(n))):
        y = np.empty((4, 8, n, D))
        y[:, :, order] = f(X[:, order])
        outputs.append(y)
    variance = np.var(outputs, 0).mean((1, 2, 3))
    floor = dict(zip(sequences.TARGETS, sequences.compute_equivariant_floor(f, X), strict=True))
    np.testing.assert_allclose(list(floor.values()), variance, rtol=1e-5, atol=1e-10)
    assert floor['difference'] < 1e-10 and floor['farthest'] < 1e-10
    assert floor['reverse'] > 0.1 and floor['sort'] > 0.1


@pytest.mark.parametrize('word', mixers.MIXERS)
def test_which_mixers_commute_with_permutations(word):
    x = jnp.asarray(np.random.default_rng(4).normal(size=(3, N, 8)), jnp.float32)
    module = make_mixer(word)
    y, variables = jax.jit(module.init_with_output)(prng.key(0), x)
    order = np.array([3, 0, 4, 1, 2])
    difference = jnp.abs(jax.jit(module.apply)(variables, x[:, order]) - y[:, order]).max()
    if word in ('attention', 'pairs', 'summary'):
        assert difference < 1e-5
    else:
        assert difference > 0.05


def test_attention_matches_that_of_the_motifs():
    x = jnp.asarray(np.random.default_rng(5).normal(size=(3, N, 8)), jnp.float32)
    y, variables = jax.jit(make_mixer('attention', heads=4).init_with_output)(prng.key(1), x)
    attention = Attention(4)
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(attention.init, jax.random.key(2), x))
    assert jax.tree.map(jnp.shape, variables) == shapes
    np.testing.assert_allclose(y, jax.jit(attention.apply)(variables, x), rtol=1e-5, atol=1e-6)


def test_pairs_and_fixed_match_sums_by_loops():
    x = np.random.default_rng(6).normal(size=(N, 8)).astype(np.float32)
    for word in ('pairs', 'fixed'):
        module = make_mixer(word)
        y, variables = jax.jit(module.init_with_output)(prng.key(1), x)
        params = jax.tree.map(np.asarray, variables['params'])
        value = x @ params['value']['V'] + params['value']['b']
        mixed = np.zeros((N, 8))
        for t, s, head in itertools.product(range(N), range(N), range(2)):
            if word == 'fixed':
                weight = params['M'][head, t, s]
            else:
                weights = params['weights']
                low_rank = (x[s] @ weights['P'] * (x[t] @ weights['Q'])) @ weights['O']
                affine = x[s] @ weights['U'] + x[t] @ weights['V'] + weights['b']
                weight = (low_rank + affine)[head] / N**0.5
            mixed[t, 4 * head : 4 * head + 4] += weight * value[s, 4 * head : 4 * head + 4]
        expected = mixed @ params['out']['V'] + params['out']['b']
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('word', ['fixed', 'attention'])
def test_one_fixed_mixing_at_the_end_is_a_sum_over_tokens_and_attention_is_not(word):
    """Mixed differences of a sum of functions of one token each are 0."""
    changes = {'model.mixer': word, 'model.depth': 1, 'model.ends': 'mixer'}
    network = transformer.make(config(**changes).model, D)
    a, b = np.asarray(draw_sequences(7, 1)[0]), np.asarray(draw_sequences(8, 1)[0])
    params = jax.jit(network.init)(prng.key(3), a)
    apply = jax.jit(network.apply)

    def with_tokens(first, second):
        X = a.copy()
        X[0], X[3] = (b if first else a)[0], (b if second else a)[3]
        return apply(params, X)

    mixed = with_tokens(1, 1) - with_tokens(1, 0) - with_tokens(0, 1) + with_tokens(0, 0)
    other_tokens = np.abs(np.delete(mixed, (0, 3), 0)).max()
    assert (other_tokens < 1e-5) if word == 'fixed' else (other_tokens > 1e-3)


SHORT = {
    'problem.length': 3, 'problem.examples': 1000,
    'problem.orbits': 100, 'problem.floor_examples': 8000,
    'model.features': 8, 'model.heads': 2, 'model.width': 16, 'model.depth': 1, 'seeds': (0, 1),
    'train.batch': 32, 'train.log_every': 100, 'train.eval_every': 300, 'train.save_every': 300,
    'optim.warmup_steps': 20, 'optim.learning_rate': 1e-2,
}  # fmt: skip


@pytest.mark.slow
def test_without_positions_the_error_stays_at_the_floor_and_with_them_it_goes_below(tmp_path):
    artifacts = {}
    for word in ('none', 'learned'):
        changes = {'model.positions': word, 'train.steps': 600, 'problem.targets': ('reverse',)}
        train.train(config(**SHORT | changes), str(tmp_path / word))
        artifacts[word] = np.load(tmp_path / word / 'artefacts.npz')
    floors = artifacts['none']['equivariant_floor'][:, 0]
    np.testing.assert_array_equal(floors, artifacts['learned']['equivariant_floor'][:, 0])
    np.testing.assert_allclose(floors, 1 - 1 / 3, rtol=0.15)
    unordered_errors, errors = (
        artifacts[word]['error_in_all_orders'][:, 0] for word in ('none', 'learned')
    )
    assert np.all(unordered_errors >= floors - 1e-5) and np.all(unordered_errors <= 1.2 * floors)
    assert np.all(errors < 0.3 * floors)


@pytest.mark.slow
def test_a_fixed_mixing_at_the_end_stays_above_its_floor_and_attention_goes_below(tmp_path):
    errors = {}
    for word in ('fixed', 'attention'):
        changes = {'model.mixer': word, 'model.ends': 'mixer', 'model.width': 32}
        changes |= {'train.steps': 900, 'problem.targets': ('farthest',)}
        train.train(config(**SHORT | changes), str(tmp_path / word))
        errors[word] = finals(tmp_path / word, 'mse/farthest', 'eval').values()
    floors = np.load(tmp_path / 'fixed/artefacts.npz')['additive_floor'][:, 0]
    for fixed, attention, floor in zip(*errors.values(), floors, strict=True):
        assert floor > 0.1
        assert fixed >= 0.9 * floor
        assert attention < 0.8 * floor


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'problem.targets': ('sort', 'rverse')}, r"problem\.targets.*did you mean 'reverse'"),
        ({'problem.targets': ('sort', 'sort')}, r'problem\.targets.*distinct'),
        ({'problem.length': 8}, r'problem\.length = 8: .*at most 7'),
        ({'model.heads': 3}, r'model\.heads = 3: expected a divisor of config\.model\.features'),
        ({'model.mixer': 'attn'}, r'model\.mixer.*attention'),
        ({'optim.clip_norm': 1.0}, r'optim\.clip_norm = 1\.0: expected 0'),
        ({'model.fusion.name': 'multi_head'}, r'one-hot'),
    ],
)
def test_bad_values_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        factory.make_problem(config(**changes))
