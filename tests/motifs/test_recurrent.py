"""Every cell against loops in NumPy, float64, written from the equations of its paper."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_vjp

from mi import cells
from mi.unify import as_mi
from tests import prng
from tests.motifs.checks import is_its_composition

T, B, N, H, G = 4, 3, 6, 5, 3  # N > H > G, so that the columns of every weight can be orthogonal
MODULES = {
    'lstm': cells.LSTM(H),
    'mlstm': cells.MultiplicativeLSTM(H),
    'mi_lstm': cells.MILSTM(H),
    'mogrifier': cells.MogrifierLSTM(H),
    'hyper_lstm': cells.HyperLSTM(H, hyper_features=G, embedding=2),
    'mogrifier of rank 2': cells.MogrifierLSTM(H, rounds=4, rank=2),
    'mogrifier, capped': cells.MogrifierLSTM(H, rounds=3, capped=True),
    'hyper_lstm, layer norm': cells.HyperLSTM(H, hyper_features=G, embedding=2, layer_norm=True),
}
each = pytest.mark.parametrize('name', MODULES)
each_class = pytest.mark.parametrize('name', cells.CELLS)

RUN = {name: jax.jit(module.apply) for name, module in MODULES.items()}  # compiled once for all


@functools.cache
def drawn(name, seed=0):
    """All parameters random, a random carry, x and some resets: the arguments of `apply`."""
    module = MODULES[name]
    rng = np.random.default_rng(seed)
    normal = lambda a: rng.normal(size=a.shape).astype(np.float32)  # noqa: E731
    carry = jax.tree.map(normal, module.initial(B))
    x = rng.normal(size=(T, B, N)).astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), carry, x)
    variables = jax.tree.map(lambda a: 0.6 * normal(a), shapes)
    reset = np.zeros((T, B), bool)
    reset[1, 0] = reset[2, 2] = True
    return variables, carry, x, reset


@functools.cache
def initial_parameters(name, param_dtype=jnp.float32):
    module = MODULES[name].clone(param_dtype=param_dtype)
    init = jax.jit(lambda key: module.init(key, module.initial(B), jnp.zeros((T, B, N))))
    return init(prng.key(1))['params']


def assert_close(a, b, tolerance=1e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b
    )


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def gate_columns(a):
    """{'i': [H], …} from [4H]."""
    return dict(zip('ifoj', np.split(a, 4), strict=True))


def lstm_step(p, state, x):
    c, h = state
    a = gate_columns(x @ p['W'] + h @ p['U'] + p['b'])
    c = sigmoid(a['f']) * c + sigmoid(a['i']) * np.tanh(a['j'])
    return c, sigmoid(a['o']) * np.tanh(c)


def mlstm_step(p, state, x):
    c, h = state
    m = (x @ p['W_m']) * (h @ p['U_m'])
    a = gate_columns(x @ p['W'] + m @ p['U'] + p['b'])
    c = sigmoid(a['f']) * c + sigmoid(a['i']) * np.tanh(a['j'])
    return c, sigmoid(a['o']) * np.tanh(c)


def mi_lstm_step(p, state, x):
    c, h = state
    Wx, Uh = x @ p['W'], h @ p['U']
    a = gate_columns(p['alpha'] * Wx * Uh + p['beta_1'] * Uh + p['beta_2'] * Wx + p['b'])
    c = sigmoid(a['f']) * c + sigmoid(a['i']) * np.tanh(a['j'])
    return c, sigmoid(a['o']) * np.tanh(c)


def mogrifier_step(p, state, x, *, rounds, low_rank, capped):
    c, h = state
    for i in range(1, rounds + 1):
        if i % 2 == 1:
            Q = p[f'Q_{i}_left'] @ p[f'Q_{i}_right'] if low_rank else p[f'Q_{i}']
            x = 2 * sigmoid(h @ Q + p[f'q_{i}']) * x
        else:
            R = p[f'R_{i}_left'] @ p[f'R_{i}_right'] if low_rank else p[f'R_{i}']
            h = 2 * sigmoid(x @ R + p[f'r_{i}']) * h
    a = gate_columns(x @ p['W'] + h @ p['U'] + p['b'])
    i, f = sigmoid(a['i']), sigmoid(a['f'])
    if capped:
        i = np.minimum(1 - f, i)
    c = f * c + i * np.tanh(a['j'])
    return c, sigmoid(a['o']) * np.tanh(c)


def hyper_lstm_step(p, state, x, *, layer_norm):
    """Equations 10 to 13 of the paper, without dropout; the z from ĥ_t."""
    c, h, c_hat, h_hat = state

    def LN(name, y, a):
        if not layer_norm:
            return a
        a = (a - a.mean()) / np.sqrt(a.var() + 1e-3)
        gain, shift = p[f'{name}_gain'], p[f'{name}_shift']
        if y is not None:
            gain, shift = gate_columns(gain)[y], gate_columns(shift)[y]
        return gain * a + shift

    x_hat = np.concatenate([x, h])
    W_hat = np.concatenate([p['hyper_W'], p['hyper_U']])
    a = gate_columns(x_hat @ W_hat + h_hat @ p['hyper_V'] + p['hyper_b'])
    a = {y: LN('hyper_gates', y, a[y]) for y in 'ifoj'}
    c_hat = sigmoid(a['f']) * c_hat + sigmoid(a['i']) * np.tanh(a['j'])
    h_hat = sigmoid(a['o']) * np.tanh(LN('hyper_c', None, c_hat))

    a = {}
    for k, y in enumerate('ifoj'):
        columns = lambda M, k=k: np.split(M, 4, axis=-1)[k]  # noqa: E731
        z_x = h_hat @ columns(p['Z_x']) + columns(p['z_x'])
        z_h = h_hat @ columns(p['Z_h']) + columns(p['z_h'])
        z_b = h_hat @ columns(p['Z_b'])
        d_x, d_h, b = z_x @ p['D_x'][k], z_h @ p['D_h'][k], z_b @ p['D_b'][k] + columns(p['b'])
        a[y] = LN('gates', y, d_h * (h @ columns(p['U'])) + d_x * (x @ columns(p['W'])) + b)
    c = sigmoid(a['f']) * c + sigmoid(a['i']) * np.tanh(a['j'])
    h = sigmoid(a['o']) * np.tanh(LN('c', None, c))
    return c, h, c_hat, h_hat


STEPS = {
    'lstm': (lstm_step, {}),
    'mlstm': (mlstm_step, {}),
    'mi_lstm': (mi_lstm_step, {}),
    'mogrifier': (mogrifier_step, {'rounds': 5, 'low_rank': False, 'capped': False}),
    'mogrifier of rank 2': (mogrifier_step, {'rounds': 4, 'low_rank': True, 'capped': False}),
    'mogrifier, capped': (mogrifier_step, {'rounds': 3, 'low_rank': False, 'capped': True}),
    'hyper_lstm': (hyper_lstm_step, {'layer_norm': False}),
    'hyper_lstm, layer norm': (hyper_lstm_step, {'layer_norm': True}),
}


@each
def test_two_calls_are_the_one_loop_of_its_paper_s_equations(name):
    variables, carry, x, reset = drawn(name)
    middle, first = RUN[name](variables, carry, x, reset)
    last, second = RUN[name](variables, middle, x[::-1], reset)

    step, options = STEPS[name]
    p = {k: np.asarray(v, np.float64) for k, v in variables['params'].items()}
    xs, resets = np.concatenate([x, x[::-1]]), np.concatenate([reset, reset])
    hs, states = np.zeros((2 * T, B, H)), []
    for b in range(B):
        state = tuple(a[b].astype(np.float64) for a in carry)
        for t in range(2 * T):
            if resets[t, b]:
                state = tuple(np.zeros_like(a) for a in state)
            state = step(p, state, xs[t, b].astype(np.float64), **options)
            hs[t, b] = state[1]
        states.append(state)
    assert_close(np.concatenate([first, second]), hs)
    assert_close(last, tuple(np.stack(a) for a in zip(*states, strict=True)))


@each
def test_a_reset_sequence_starts_from_the_initial_carry_which_is_zero(name):
    variables, carry, x, _ = drawn(name)
    zero = MODULES[name].initial(B)
    assert jax.tree.map(jnp.shape, zero) == jax.tree.map(jnp.shape, carry)
    assert not any(a.any() for a in zero)
    at_2, never = np.zeros((2, T, B), bool)
    at_2[2] = True
    _, h = RUN[name](variables, carry, x, at_2)
    _, fresh = RUN[name](variables, zero, np.roll(x, -2, axis=0), never)
    assert_close(h[2:], fresh[: T - 2])


@each_class
def test_gradients_are_those_of_finite_differences_and_none_is_to_a_later_input(name):
    inputs, reset = drawn(name)[:3], drawn(name)[3]
    f = functools.partial(RUN[name], reset=reset)
    pulled = jax.jit(lambda inputs, cotangents: jax.vjp(f, *inputs)[1](cotangents))
    check_vjp(f, lambda *a: (f(*a), functools.partial(pulled, a)), inputs, atol=2e-2, rtol=2e-2)

    no_carry, of_h = jax.tree.map(np.zeros_like, f(*inputs))
    of_h[2, 2] = of_h[2, 1] = 1
    *_, of_x = pulled(inputs, (no_carry, of_h))
    expected = np.zeros((T, B), bool)
    expected[:3, 1] = expected[2, 2] = True  # sequence 2 is reset before step 2
    np.testing.assert_array_equal((of_x != 0).any(-1), expected)


@each_class
def test_vmap_over_seeds_without_reset_is_the_loop_with_one_that_is_never_true(name):
    draws = drawn(name)[:3], drawn(name, seed=1)[:3]
    over_seeds = jax.vmap(RUN[name])(*jax.tree.map(lambda *a: jnp.stack(a), *draws))
    one_by_one = [RUN[name](*draw, np.zeros((T, B), bool)) for draw in draws]
    assert_close(over_seeds, jax.tree.map(lambda *a: jnp.stack(a), *one_by_one))


@each_class
def test_bf16_is_that_of_the_products_and_neither_of_their_sums_nor_of_the_state(name):
    variables, carry, x, reset = drawn(name)
    variables = jax.tree.map(lambda p: p / 2, variables)
    in_bf16 = jax.jit(MODULES[name].clone(dtype=jnp.bfloat16).apply)
    lowered = in_bf16.lower(variables, carry, x, reset).as_text()
    products = [line for line in lowered.splitlines() if 'dot_general' in line]
    bf16_to_f32 = re.compile(r'\(tensor<[\dx]*bf16>, tensor<[\dx]*bf16>\) -> tensor<[\dx]*f32>')
    assert products and all(bf16_to_f32.search(line) for line in products)
    last, h = in_bf16(variables, carry, x, reset)
    assert h.dtype == jnp.bfloat16
    assert {a.dtype for a in last} == {jnp.dtype('float32')}
    exact = RUN[name](variables, carry, x, reset)
    assert_close((last, h.astype(jnp.float32)), exact, tolerance=2e-2)


GATES = ['input gate', 'forget gate', 'output gate']
OF_THE_HYPER_LSTM = [*(f'small LSTM: {gate}' for gate in GATES), 'α(z) ⊙ x W', 'α(z) ⊙ h U']
BEFORE_THE_GATES = {
    'lstm': [],
    'mlstm': ['intermediate state m'],
    'mi_lstm': ['gates before their activation'],
    'mogrifier': [f'round {i}' for i in range(1, 6)],
    'hyper_lstm': OF_THE_HYPER_LSTM,
    'mogrifier of rank 2': [f'round {i}' for i in range(1, 5)],
    'mogrifier, capped': [f'round {i}' for i in range(1, 4)],
    'hyper_lstm, layer norm': OF_THE_HYPER_LSTM,
}


@each
def test_a_step_is_its_composition_of_every_multiplication_in_its_equations(name):
    variables, carry, x, reset = drawn(name)
    module = MODULES[name]
    composition = is_its_composition(module, variables, carry, x[:1], reset[1:2])
    assert composition.around
    assert [p.name for p in composition.products] == [*BEFORE_THE_GATES[name], *GATES]
    if name == 'mi_lstm':  # all four terms of the equation
        assert all(getattr(composition.products[0], term) is not None for term in 'WUVb')
    with pytest.raises(ValueError, match='one step'):
        as_mi(module, variables, carry, x)


def test_a_mogrifier_of_no_rounds_is_the_lstm():
    variables, carry, x, reset = drawn('lstm')
    mogrifier = cells.MogrifierLSTM(H, rounds=0, rank=2)
    shapes = jax.eval_shape(mogrifier.init, jax.random.key(0), carry, x)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
    assert_close(
        jax.jit(mogrifier.apply)(variables, carry, x, reset),
        RUN['lstm'](variables, carry, x, reset),
    )


def test_a_factorized_mogrifier_is_the_full_one_of_the_products():
    variables, *inputs = drawn('mogrifier of rank 2')
    p = dict(variables['params'])
    for name in ('Q_1', 'R_2', 'Q_3', 'R_4'):
        p[name] = p.pop(f'{name}_left') @ p.pop(f'{name}_right')
        assert np.linalg.matrix_rank(p[name]) == 2
    full = jax.jit(cells.MogrifierLSTM(H, rounds=4).apply)
    assert_close(full({'params': p}, *inputs), RUN['mogrifier of rank 2'](variables, *inputs))


def test_the_capped_mogrifier_keeps_c_within_one():
    variables, _, x, reset = drawn('mogrifier, capped')
    variables = jax.tree.map(lambda p: 3 * p, variables)  # gates far from rest
    free = jax.jit(MODULES['mogrifier, capped'].clone(capped=False).apply)
    zero = cells.initial_carry(B, H)
    (capped_c, _), _ = RUN['mogrifier, capped'](variables, zero, x, reset)
    (free_c, _), _ = free(variables, zero, x, reset)
    assert jnp.abs(capped_c).max() <= 1 < jnp.abs(free_c).max()


def test_mi_lstm_with_no_product_is_the_lstm():
    variables, *inputs = drawn('lstm')
    one = jnp.ones(4 * H)
    p = variables['params'] | {'alpha': 0 * one, 'beta_1': one, 'beta_2': one}
    assert_close(RUN['mi_lstm']({'params': p}, *inputs), RUN['lstm'](variables, *inputs))


def test_mi_lstm_starts_at_1_and_a_half():
    p = initial_parameters('mi_lstm', jnp.bfloat16)
    assert (p['alpha'] == 1).all() and (p['beta_1'] == 0.5).all() and (p['beta_2'] == 0.5).all()


def test_hyper_lstm_starts_as_an_lstm_with_a_tenth_of_its_weights():
    _, carry, x, reset = drawn('hyper_lstm')
    p = initial_parameters('hyper_lstm')
    (c, h, *_), hs = RUN['hyper_lstm']({'params': p}, carry, x, reset)
    tenth = {'W': 0.1 * p['W'], 'U': 0.1 * p['U'], 'b': np.repeat([0.0, 1.0, 0.0, 0.0], H)}
    assert_close(((c, h), hs), RUN['lstm']({'params': tenth}, carry[:2], x, reset))


def test_hyper_lstm_s_published_initialization():
    p = initial_parameters('hyper_lstm')
    for W in np.split(p['W'], 4, axis=1) + np.split(p['U'], 4, axis=1):
        np.testing.assert_allclose(W.T @ W, np.eye(H), atol=1e-5)
    for W in np.split(p['hyper_W'], 4, axis=1) + np.split(p['hyper_V'], 4, axis=1):
        np.testing.assert_allclose(W.T @ W, np.eye(G), atol=1e-5)
    assert not p['Z_x'].any() and not p['Z_h'].any() and not p['D_b'].any()
    assert (p['z_x'] == 1).all() and (p['z_h'] == 1).all()
    np.testing.assert_allclose(p['D_x'], 0.1 / 2)
    np.testing.assert_allclose(p['D_h'], 0.1 / 2)
    assert 0.005 < float(p['Z_b'].std()) < 0.015


@pytest.mark.parametrize('name', [*list(cells.CELLS)[1:-1], 'hyper_lstm, layer norm'])
def test_the_forget_gate_starts_with_a_bias_of_one_and_parameters_in_their_dtype(name):
    p = initial_parameters(name, jnp.bfloat16)
    assert {a.dtype for a in p.values()} == {jnp.dtype('bfloat16')}
    normed = name == 'hyper_lstm, layer norm'
    bias, other = (p['gates_shift'], p['b']) if normed else (p['b'], np.zeros(4 * H))
    np.testing.assert_array_equal(bias.astype(jnp.float32), np.repeat([0, 1, 0, 0], H))
    assert not other.any()


def test_every_word_makes_a_cell_of_the_one_interface():
    x = jax.ShapeDtypeStruct((T, B, N), jnp.float32)
    reset = jax.ShapeDtypeStruct((T, B), jnp.bool)
    for word, constructor in cells.CELLS.items():
        cell = constructor(H, dtype=jnp.bfloat16, param_dtype=jnp.float32)
        carry = cell.initial(B)
        (after, h), variables = jax.eval_shape(
            cell.init_with_output, jax.random.key(0), carry, x, reset
        )
        assert (h.shape, h.dtype) == ((T, B, H), jnp.bfloat16), word
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, carry)
        assert carry[0].shape == carry[1].shape == (B, H)
        assert {p.dtype for p in jax.tree.leaves((variables, after))} == {jnp.dtype('float32')}


@each_class
def test_shapes_that_do_not_fit_are_refused(name):
    variables, carry, x, reset = drawn(name)
    run = functools.partial(MODULES[name].apply, variables)
    with pytest.raises(ValueError, match=r'x must be \[T, B, n\]'):
        run(carry, x[0])
    with pytest.raises(ValueError, match=r'the carry must be .* Try cell\.initial\(2\)'):
        run(carry, x[:, :2])
    with pytest.raises(ValueError, match=r'the carry must be'):
        run(carry[:1], x)
    with pytest.raises(ValueError, match=r'reset must be \(4, 3\); got \(3, 3\)'):
        run(carry, x, reset[:3])


@pytest.mark.parametrize('options', [{'rounds': -1}, {'rank': 0}])
def test_a_mogrifier_refuses_rounds_or_a_rank_that_cannot_be(options):
    module = cells.MogrifierLSTM(H, **options)
    with pytest.raises(ValueError, match='expected rounds of at least 0, and a rank of at least 1'):
        module.init(prng.key(0), module.initial(B), jnp.zeros((T, B, N)))
