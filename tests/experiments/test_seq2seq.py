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
from tests.fit.runs import edited, finals

N, D, TAU = 5, 2, 0.5


def config(**changes):
    return edited(seq2seq.get_config(), **changes)


def draw(seed, examples, n=N):
    X = np.random.default_rng(seed).uniform(-1, 1, (examples, n, D))
    return jnp.asarray(X, jnp.float32)


def mixer(word, heads=2, fuse='mi_low_rank'):
    return mixers.MIXERS[word](heads, fusion.get(fuse, rank=6), None)


def test_the_targets_are_what_they_are_said_to_be():
    (X,) = draw(0, 1)
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


def test_the_floors_are_those_that_can_be_calculated():
    """Of 'reverse' and 'sort', the mean over all orders is the mean token if n is odd, and its
    variance 1/n of a token's; 'reverse' and 'difference' are sums, and so is no product."""

    def f(X):
        of_two = X[:, :1, :1] * X[:, 1:2, :1] * jnp.ones_like(X)
        return (
            jnp.stack([X.mean(1, keepdims=True) - X, X[:, ::-1], jnp.sort(X, 1), of_two]) * 3**0.5
        )

    X, again = draw(1, 4000), draw(2, 4000)
    equivariant = sequences.compute_equivariant_floor(f, X[:500])
    assert equivariant[0] == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(equivariant[1:3], 1 - 1 / N, rtol=0.05)
    additive = sequences.compute_additive_floor(f, X, again)
    np.testing.assert_allclose(additive[:2], 0, atol=0.05)
    assert additive[3] == pytest.approx(3 / 9, rel=0.1)  # all of it: E x²x² = 1/9
    assert 0.04 < additive[2] < 0.14


def test_the_additive_floor_of_a_small_sample_is_unbiased():
    """f(X) = x_1 x_2 for both tokens owes nothing to one alone: its floor is Var f = 1/9."""

    def product(X):
        return jnp.broadcast_to(X[None, :, :1] * X[None, :, 1:], (1, *X.shape))

    def floor(key):
        X, again = jax.random.uniform(key, (2, 4, 2, 1), minval=-1)
        return sequences.compute_additive_floor(product, X, again)

    floors = jax.vmap(floor)(jax.random.split(jax.random.key(0), 20_000))
    assert floors.mean() == pytest.approx(1 / 9, rel=0.03)


def test_the_best_equivariant_function_has_the_floor_as_its_error_and_no_other_has_less():
    X = draw(3, 2000, n=3)

    def f(X):
        return (X[:, ::-1] * X[:, :1] + X**2)[None]

    floor = sequences.compute_equivariant_floor(f, X)[0]
    # Every function of (x_t, the sum of the others) is equivariant: the best polynomial of degree
    # 3 in them cannot be below the floor, up to the little that it fits of the sample.
    own, others = X, X.sum(1, keepdims=True) - X
    both = np.concatenate([own, others], -1).reshape(-1, 2 * D)
    powers = [p for p in itertools.product(range(4), repeat=2 * D) if sum(p) <= 3]
    rows = np.stack([np.prod(both ** np.array(p), 1) for p in powers], 1)
    y = np.asarray(f(X)[0]).reshape(-1, D)
    best = np.mean((rows @ np.linalg.lstsq(rows, y, rcond=None)[0] - y) ** 2)
    assert floor > 0.01
    assert 0.98 * floor <= best <= 1.3 * floor


def test_the_equivariant_floor_is_that_of_each_sequence_in_all_its_orders():
    """What is Y on X is Y's tokens in the order of X's on all of them: the best Y is the mean."""
    n, X = 4, draw(9, 8, n=4)

    def f(X):
        return jnp.stack([target(X, TAU) for target in sequences.TARGETS.values()])

    each = []
    for order in map(list, itertools.permutations(range(n))):
        y = np.empty((4, 8, n, D))
        y[:, :, order] = f(X[:, order])
        each.append(y)
    least = np.var(each, 0).mean((1, 2, 3))
    floor = dict(zip(sequences.TARGETS, sequences.compute_equivariant_floor(f, X), strict=True))
    np.testing.assert_allclose(list(floor.values()), least, rtol=1e-5, atol=1e-10)
    assert floor['difference'] < 1e-10 and floor['farthest'] < 1e-10
    assert floor['reverse'] > 0.1 and floor['sort'] > 0.1


@pytest.mark.parametrize('word', mixers.MIXERS)
def test_which_mixers_commute_with_permutations(word):
    x = jnp.asarray(np.random.default_rng(4).normal(size=(3, N, 8)), jnp.float32)
    module = mixer(word)
    y, variables = jax.jit(module.init_with_output)(jax.random.key(0), x)
    order = np.array([3, 0, 4, 1, 2])
    difference = jnp.abs(module.apply(variables, x[:, order]) - y[:, order]).max()
    if word in ('attention', 'pairs', 'summary'):
        assert difference < 1e-5
    else:
        assert difference > 0.05


def test_attention_is_that_of_the_motifs():
    x = jnp.asarray(np.random.default_rng(5).normal(size=(3, N, 8)), jnp.float32)
    y, variables = jax.jit(mixer('attention', heads=4).init_with_output)(jax.random.key(1), x)
    theirs = Attention(4)
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(theirs.init, jax.random.key(2), x))
    assert jax.tree.map(jnp.shape, variables) == shapes
    np.testing.assert_allclose(y, jax.jit(theirs.apply)(variables, x), rtol=1e-5, atol=1e-6)


def test_pairs_and_fixed_by_loops():
    x = np.random.default_rng(6).normal(size=(N, 8)).astype(np.float32)
    for word in ('pairs', 'fixed'):
        module = mixer(word)
        y, variables = jax.jit(module.init_with_output)(jax.random.key(1), x)
        p = jax.tree.map(np.asarray, variables['params'])
        value = x @ p['value']['V'] + p['value']['b']
        mixed = np.zeros((N, 8))
        for t, s, h in itertools.product(range(N), range(N), range(2)):
            if word == 'fixed':
                weight = p['M'][h, t, s]
            else:
                f = p['weights']
                low_rank = (x[s] @ f['P'] * (x[t] @ f['Q'])) @ f['O']
                weight = (low_rank + x[s] @ f['U'] + x[t] @ f['V'] + f['b'])[h] / N**0.5
            mixed[t, 4 * h : 4 * h + 4] += weight * value[s, 4 * h : 4 * h + 4]
        np.testing.assert_allclose(y, mixed @ p['out']['V'] + p['out']['b'], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('word', ['fixed', 'attention'])
def test_one_fixed_mixing_at_the_end_is_a_sum_over_tokens_and_attention_is_not(word):
    """Mixed differences of a sum of functions of one token each are 0."""
    changes = {'model.mixer': word, 'model.depth': 1, 'model.ends': 'mixer'}
    network = transformer.make(config(**changes).model, D)
    a, b = np.asarray(draw(7, 1)[0]), np.asarray(draw(8, 1)[0])
    params = jax.jit(network.init)(jax.random.key(3), a)
    apply = jax.jit(network.apply)

    def with_tokens(first, second):
        X = a.copy()
        X[0], X[3] = (b if first else a)[0], (b if second else a)[3]
        return apply(params, X)

    mixed = with_tokens(1, 1) - with_tokens(1, 0) - with_tokens(0, 1) + with_tokens(0, 0)
    elsewhere = np.abs(np.delete(mixed, (0, 3), 0)).max()
    assert (elsewhere < 1e-5) if word == 'fixed' else (elsewhere > 1e-3)


SHORT = {
    'problem.length': 3, 'problem.examples': 1000,
    'problem.orbits': 100, 'problem.floor_examples': 8000,
    'model.features': 8, 'model.heads': 2, 'model.width': 16, 'model.depth': 1, 'seeds': (0, 1),
    'train.batch': 32, 'train.log_every': 100, 'train.eval_every': 300, 'train.save_every': 300,
    'optim.warmup_steps': 20, 'optim.learning_rate': 1e-2,
}  # fmt: skip


@pytest.mark.slow
def test_without_positions_the_error_stays_at_the_floor_and_with_them_it_goes_below(tmp_path):
    kept = {}
    for word in ('none', 'learnt'):
        changes = {'model.positions': word, 'train.steps': 600, 'problem.targets': ('reverse',)}
        train.train(config(**SHORT | changes), str(tmp_path / word))
        kept[word] = np.load(tmp_path / word / 'artefacts.npz')
    floors = kept['none']['equivariant_floor'][:, 0]
    np.testing.assert_array_equal(floors, kept['learnt']['equivariant_floor'][:, 0])
    np.testing.assert_allclose(floors, 1 - 1 / 3, rtol=0.15)
    without, errors = (kept[word]['error_in_all_orders'][:, 0] for word in ('none', 'learnt'))
    assert np.all(without >= floors - 1e-5) and np.all(without <= 1.2 * floors)
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
