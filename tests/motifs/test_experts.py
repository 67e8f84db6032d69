import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mi.motifs.experts import DenseMixture, RoutedMixture, assign_blocks
from tests import prng
from tests.motifs.checks import is_its_composition


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


R, T, N, M, K, E, HIDDEN = 2, 6, 5, 3, 4, 4, 7
X, Z = random(0, R, T, N), random(1, R, T, M)
MASK = jnp.arange(T)[None] < jnp.array([T, 2])[:, None]
KEY = prng.key(2)


def run(module, variables, *inputs):
    """module.apply, compiled as a whole."""
    return jax.jit(module.apply)(variables, *inputs)


def run_with_losses(module, variables, *inputs):
    apply = jax.jit(lambda v, inputs: module.apply(v, *inputs, mutable='losses'))
    y, sown = apply(variables, inputs)
    return y, {name: float(value) for name, (value,) in sown['losses'].items()}


def parameters(module, *inputs):
    """Random values for all parameters, none of them zero."""
    shapes = jax.eval_shape(module.init, KEY, *inputs)
    return jax.tree.map(lambda p: random(p.size, *p.shape) / 2, shapes)


def numpy(variables):
    return jax.tree.map(lambda p: np.asarray(p, np.float64), variables['params'])


def softmax(a):
    e = np.exp(a - a.max())
    return e / e.sum()


def expert(p, i, x):
    return np.maximum(x @ p['V'][i] + p['b'][i], 0) @ p['A'][i] + p['a'][i]


def routed(p, x, z, top_k, mask=None, capacity=np.inf):
    """The sum over the chosen experts, token by token; first choices are served first."""
    shape, x = x.shape[:-1], np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    z = np.broadcast_to(z, (*shape, z.shape[-1])).reshape(len(x), -1)
    mask = np.ones(len(x), bool) if mask is None else np.asarray(mask).reshape(-1)
    y, taken = np.zeros((len(x), p['a'].shape[1])), np.zeros(len(p['V']), int)
    for choice in range(top_k):
        for t in range(len(x)):
            probabilities = softmax(z[t] @ p['G'])
            chosen = np.argsort(-probabilities)[:top_k]
            i = chosen[choice]
            g = probabilities[i] / (probabilities[chosen].sum() if top_k > 1 else 1)
            if mask[t] and taken[i] < capacity:
                taken[i] += 1
                y[t] += g * expert(p, i, x[t])
    return y.reshape(*shape, -1)


@pytest.mark.parametrize('z', [Z, Z[0]])
def test_the_dense_mixture_is_the_weighted_sum_of_its_experts(z):
    module = DenseMixture(K, E)
    variables = parameters(module, X, z)
    p, expected = numpy(variables), np.zeros((R, T, K))
    for row in np.ndindex(R, T):
        g = softmax(np.broadcast_to(z, (R, T, M))[row] @ p['G'])
        for i in range(E):
            expected[row] += g[i] * (np.asarray(X[row]) @ p['E'][i] + p['e'][i])
    np.testing.assert_allclose(run(module, variables, X, z), expected, rtol=1e-4, atol=1e-5)
    is_its_composition(module, variables, X, z)


@pytest.mark.parametrize('context', ['dense', 'one_hot'])
def test_the_dense_mixture_starts_at_unit_variance_near_the_mean_of_experts_drawn_apart(context):
    x = random(3, 256, 16)
    z = random(4, 256, M) if context == 'dense' else jax.nn.one_hot(jnp.arange(256) % M, M)
    module = DenseMixture(64, E, context)
    y, variables = jax.jit(module.init_with_output)(KEY, x, z)
    assert 0.85 < y.var() < 1.15
    experts = variables['params']['E'].reshape(E, -1)
    np.testing.assert_allclose(y, x @ experts.mean(0).reshape(16, 64), atol=1)
    assert np.abs(np.corrcoef(experts) - np.eye(E)).max() < 0.15


@pytest.mark.parametrize(
    'top_k, z, mask', [(1, None, None), (2, Z, None), (2, Z[:, :1], MASK), (E, None, None)]
)
def test_the_routed_mixture_is_the_sum_over_the_chosen_experts(top_k, z, mask):
    module = RoutedMixture(K, E, HIDDEN, top_k)
    variables = parameters(module, X, z)
    expected = routed(numpy(variables), X, X if z is None else z, top_k, mask)
    np.testing.assert_allclose(run(module, variables, X, z, mask), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('top_k, tokens', [(1, T), (2, 1), (2, T), (E, T)])
def test_no_token_is_dropped_where_all_prefer_the_same_experts(top_k, tokens):
    module = RoutedMixture(K, E, HIDDEN, top_k)
    x, z = X[0, :tokens], jnp.ones((tokens, M))
    variables = parameters(module, x, z)
    expected = routed(numpy(variables), x, z, top_k)
    np.testing.assert_allclose(run(module, variables, x, z), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('top_k, factor', [(1, 0.3), (2, 0.3), (E, 0.3), (2, 1.0), (2, 100.0)])
def test_a_token_beyond_an_experts_capacity_gets_nothing_from_it(top_k, factor):
    module = RoutedMixture(K, E, HIDDEN, top_k, capacity_factor=factor)
    variables = parameters(module, X)
    capacity = np.ceil(factor * R * T * top_k / E)
    p = numpy(variables)
    expected = routed(p, X, X, top_k, capacity=capacity)
    np.testing.assert_allclose(run(module, variables, X), expected, rtol=1e-4, atol=1e-5)
    if factor < 1:
        assert not np.allclose(expected, routed(p, X, X, top_k))


def test_masked_tokens_get_nothing_take_no_capacity_and_count_in_no_loss():
    module = RoutedMixture(K, E, HIDDEN, 2, 0.6)
    variables = parameters(module, X)
    y, losses = run_with_losses(module, variables, X, None, MASK)
    expected = routed(numpy(variables), X, X, 2, MASK, np.ceil(0.6 * R * T * 2 / E))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert not y[~MASK].any()
    _, token_losses = run_with_losses(module, variables, X[MASK])
    assert losses == pytest.approx(token_losses, rel=1e-5)


@pytest.mark.parametrize(
    'top_k, factor, z, mask', [(1, None, None, None), (2, 0.5, Z[:, :1], MASK)]
)
def test_the_routed_mixture_is_its_composition(top_k, factor, z, mask):
    module = RoutedMixture(K, E, HIDDEN, top_k, factor)
    is_its_composition(module, parameters(module, X, z), X, z, mask, tolerance=1e-4)


def test_the_gradients_are_those_of_all_experts_on_all_tokens_with_the_same_gates():
    module = RoutedMixture(K, E, HIDDEN, 2)
    variables = parameters(module, X)

    def dense(variables, x):
        p = variables['params']
        probabilities = jax.nn.softmax(x @ p['G'])
        least = jnp.sort(probabilities, axis=-1)[..., -2, None]
        g = jnp.where(probabilities >= least, probabilities, 0)
        g = g / g.sum(-1, keepdims=True)
        h = nn.relu(jnp.einsum('rtn,enh->rteh', x, p['V']) + p['b'][None, None])
        expert_outputs = jnp.einsum('rteh,ehk->rtek', h, p['A']) + p['a'][None, None]
        return jnp.einsum('rte,rtek->rtk', g, expert_outputs)

    def compute_grads(function):
        loss = lambda v, x: (function(v, x) ** 2).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1)))(variables, X)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        compute_grads(module.apply),
        compute_grads(dense),
    )


def test_the_losses_are_those_of_the_papers():
    module = RoutedMixture(K, E, HIDDEN, 2)
    variables = parameters(module, X)
    _, losses = run_with_losses(module, variables, X)
    logits = np.asarray(X).reshape(-1, N) @ numpy(variables)['G']
    P, f = np.zeros(E), np.zeros(E)
    for row in logits:
        P += softmax(row) / len(logits)
        for i in np.argsort(-row)[:2]:
            f[i] += 1 / (2 * len(logits))
    z_loss = np.mean([np.log(np.exp(row).sum()) ** 2 for row in logits])
    assert losses == pytest.approx({'load_balance': E * f @ P, 'router_z': z_loss}, rel=1e-5)


def test_the_load_is_1_where_even_and_the_number_of_experts_where_one_has_all():
    module = RoutedMixture(K, E, HIDDEN, 1)
    z = jnp.tile(jnp.eye(E), (3, 1))
    x = random(3, len(z), N)
    variables = parameters(module, x, z)
    for G, load in ((20 * jnp.eye(E), 1), (jnp.zeros((E, E)).at[:, 2].set(20.0), E)):
        variables = {'params': {**variables['params'], 'G': G}}
        _, losses = run_with_losses(module, variables, x, z)
        assert losses['load_balance'] == pytest.approx(load, rel=1e-4)


def test_the_losses_teach_the_router_and_are_not_variables():
    module = RoutedMixture(K, E, HIDDEN, 2)
    shapes = jax.eval_shape(module.init, KEY, X)
    assert set(shapes) == {'params'}
    variables = parameters(module, X)

    def loss(variables, name):
        return module.apply(variables, X, mutable='losses')[1]['losses'][name][0]

    for name in ('load_balance', 'router_z'):
        grads = jax.jit(jax.grad(loss), static_argnums=1)(variables, name)['params']
        assert [name for name, g in grads.items() if bool((g != 0).any())] == ['G']


@pytest.mark.parametrize('N, S, experts', [(24, 2, 4), (7, 3, 3), (1, 2, 8), (33, 1, 5)])
@pytest.mark.parametrize('capacity', [None, 2])
def test_every_assignment_has_a_row_of_its_own_in_a_block_of_its_expert(N, S, experts, capacity):
    rng = np.random.default_rng(0)
    same = np.tile(np.arange(S) + 1, (N, 1)) % experts
    all_experts = np.tile(np.arange(experts), (N, 1))
    random_choices = [rng.permuted(all_experts, axis=1)[:, :S] for _ in range(4)]
    for chosen in [same, *random_choices]:
        chosen = np.where(rng.random((N, 1)) < 0.1, experts, chosen)  # some tokens are masked
        slot, token, owner = map(np.asarray, assign_blocks(jnp.asarray(chosen), experts, capacity))
        number, rows = token.shape
        assert number < 2 * experts
        taken = np.zeros(experts, int)
        filled = {}
        for s, t in np.ndindex(S, N):
            i = chosen[t, s]
            if i == experts or (capacity is not None and taken[i] == capacity):
                assert slot[t, s] == number * rows
                continue
            taken[i] += 1
            assert slot[t, s] not in filled
            assert owner[slot[t, s] // rows] == i
            filled[slot[t, s]] = t
        for row, t in enumerate(token.reshape(-1)):
            assert t == filled.get(row, N)


def test_no_array_of_the_size_of_a_weight_for_each_token_is_made():
    tokens, experts, hidden = 256, 4, 32
    x = random(3, tokens, 16)
    module = RoutedMixture(16, experts, hidden, 2)
    shapes = jax.eval_shape(module.init, KEY, x)
    grad = jax.grad(lambda v, x: module.apply(v, x).sum())
    jaxpr = jax.make_jaxpr(grad)(shapes, x).jaxpr
    largest = max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars)
    assert largest <= 2 * (tokens * 2) * hidden  # twice the hidden units of two experts a token


def test_one_expert_a_token_keeps_its_probability_so_that_the_router_learns():
    module = RoutedMixture(K, E, HIDDEN, 1)
    variables = parameters(module, X)
    grads = jax.jit(jax.grad(lambda v: (module.apply(v, X) ** 2).sum()))(variables)
    assert bool((grads['params']['G'] != 0).any())


@pytest.mark.parametrize('module', [DenseMixture(K, E), RoutedMixture(K, E, 32)])
def test_bf16_is_close_to_f32(module):
    variables = parameters(module, X, Z)
    exact = run(module, variables, X, Z)
    y = run(module.clone(dtype=jnp.bfloat16), variables, X, Z)
    assert y.dtype == jnp.bfloat16
    assert jnp.linalg.norm(y.astype(jnp.float32) - exact) < 2e-2 * jnp.linalg.norm(exact)


@pytest.mark.parametrize(
    'module, inputs, message',
    [
        (DenseMixture(K), (X, Z[:, :2]), 'do not broadcast'),
        (RoutedMixture(K, E, HIDDEN, 0), (X,), 'top_k = 0: expected 1 to 4'),
        (RoutedMixture(K, E, HIDDEN, 5), (X,), 'top_k = 5: expected 1 to 4'),
        (RoutedMixture(K, E, HIDDEN, 2, 0.0), (X,), r'capacity_factor = 0\.0'),
        (RoutedMixture(K, E, HIDDEN), (X, Z[:, :2]), r'axes \(2, 2\) of z do not broadcast'),
        (RoutedMixture(K, E, HIDDEN), (X, None, MASK[:1, :2]), 'of the mask do not broadcast'),
    ],
)
def test_bad_input_is_refused_in_words(module, inputs, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, KEY, *inputs)
