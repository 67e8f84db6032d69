import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import rnn

from mi import cells
from mi.kernels import cudnn
from mi.kernels import lstm as lstm_kernel
from tests import prng
from tests.motifs.checks import assert_float64, drawn, random

T, B, N, H = 7, 3, 4, 5


def inputs(seed=0):
    """carry, x, weights; and reset."""
    keys = jax.random.split(prng.key(seed), 7)
    shapes = (B, H), (B, H), (T, B, N), (N, 4 * H), (H, 4 * H), (4 * H,)
    c, h, *rest = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False))
    x, *weights = rest
    reset = jax.random.bernoulli(keys[-1], 0.3, (T, B))
    return ((c, h), x, lstm_kernel.LSTMWeights(*weights)), reset


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize('with_reset', [False, True])
@pytest.mark.parametrize('over_seeds', [False, True])
def test_own_backward_pass_is_automatic_differentiation(with_reset, over_seeds):
    args, reset = inputs()
    keep = jnp.asarray([0.0, 2.0, 2.0])[jnp.arange(B * H).reshape(B, H) % 3]
    reset, keep = (reset, keep) if with_reset else (None, None)

    def weighted(function, *args):
        outputs = jax.tree.leaves(function(*args, reset, keep))
        weights = [jnp.cos(jnp.arange(o.size).reshape(o.shape)) for o in outputs]
        return sum((w * o).sum() for w, o in zip(weights, outputs, strict=True))

    def gradients(function):
        grad = jax.value_and_grad(lambda *a: weighted(function, *a), argnums=range(3))
        if not over_seeds:
            return jax.jit(grad)(*args)
        stacked = jax.tree.map(lambda *a: jnp.stack(a), inputs(0)[0], inputs(1)[0])
        return jax.jit(jax.vmap(grad))(*stacked)

    assert_trees_close(
        gradients(lstm_kernel.lstm), gradients(lstm_kernel.lstm_reference), rtol=2e-4, atol=2e-5
    )


def test_lstm_is_flax_s():
    keys = jax.random.split(prng.key(0), 2)
    x = jax.random.normal(keys[0], (T, B, N))
    lstm = cells.LSTM(H)
    params = lstm.init(keys[1], cells.initial_carry(B, H), x)['params']
    W = dict(zip('ifog', jnp.split(params['W'], 4, axis=1), strict=True))
    U = dict(zip('ifog', jnp.split(params['U'], 4, axis=1), strict=True))
    b = dict(zip('ifog', jnp.split(params['b'], 4), strict=True))
    theirs = {f'i{g}': {'kernel': W[g]} for g in 'ifog'}
    theirs |= {f'h{g}': {'kernel': U[g], 'bias': b[g]} for g in 'ifog'}
    cell = nn.OptimizedLSTMCell(H)
    state = cells.initial_carry(B, H)
    hs = []
    for t in range(T):
        state, h = cell.apply({'params': theirs}, state, x[t])
        hs.append(h)
    ours, h = lstm.apply({'params': params}, cells.initial_carry(B, H), x)
    np.testing.assert_allclose(h, jnp.stack(hs), rtol=1e-5, atol=1e-6)
    assert_trees_close(ours, state, rtol=1e-5, atol=1e-6)


def test_reset_starts_afresh():
    (carry, x, weights), _ = inputs()
    reset = jnp.zeros((T, B), bool).at[3].set(True)
    last, h = lstm_kernel.lstm(carry, x, weights, reset)
    fresh_last, fresh = lstm_kernel.lstm(cells.initial_carry(B, H), x[3:], weights)
    np.testing.assert_allclose(h[3:], fresh, rtol=1e-5, atol=1e-6)
    assert_trees_close(last, fresh_last, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('word', cells.CELLS)
def test_a_state_that_is_dropped_is_not_read(word):
    """keep = 0 is every step from h = 0; keep = 1 is no keep."""
    cell = cells.CELLS[word](H)
    carry = cell.initial(B)
    x = random(0, T, B, N)
    params = drawn(cell, carry, x)
    apply = jax.jit(cell.apply)
    ones = apply(params, carry, x, None, jnp.ones((B, H)))
    assert_trees_close(ones, apply(params, carry, x), rtol=1e-5, atol=1e-6)
    _, dropped = apply(params, carry, x, None, jnp.zeros((B, H)))
    state, rows = carry, []
    for row in x:
        (c, h, *rest), _ = apply(params, state, row[None])
        rows.append(h)
        state = (c, jnp.zeros_like(h), *rest)
    np.testing.assert_allclose(dropped, jnp.stack(rows), rtol=1e-5, atol=1e-6)


def test_two_halves_with_the_carry_are_the_whole():
    (carry, x, weights), _ = inputs()
    lstm = jax.jit(lstm_kernel.lstm)
    middle, first = lstm(carry, x[:4], weights)
    last, second = lstm(middle, x[4:], weights)
    whole_last, whole = lstm(carry, x, weights)
    np.testing.assert_allclose(jnp.concatenate([first, second]), whole, rtol=1e-5, atol=1e-6)
    assert_trees_close(last, whole_last, rtol=1e-5, atol=1e-6)


def test_forget_bias_is_one_and_recurrent_weights_orthogonal():
    params = cells.LSTM(H).init(prng.key(0), cells.initial_carry(B, H), jnp.zeros((T, B, N)))[
        'params'
    ]
    np.testing.assert_array_equal(params['b'], np.repeat([0, 1, 0, 0], H))
    for U in jnp.split(params['U'], 4, axis=1):
        np.testing.assert_allclose(U.T @ U, np.eye(H), atol=1e-5)


def test_recurrent_weights_are_decomposed_one_at_a_time():
    """jaxlib's decomposition of a batch deadlocks on CPU if two of them run simultaneously."""

    def draw(key):
        args = jnp.zeros((B, H)), jnp.zeros((B, H))
        return cells.LSTM(H).init(key, args, jnp.zeros((T, B, N)))

    seeds = jax.random.split(prng.key(0), 3)
    text = jax.jit(jax.vmap(draw)).lower(seeds).as_text()
    batches = re.findall(r'@lapack_s\w+.*num_batch_dims = "(\d+)"', text)
    assert batches == ['0', '0']  # Q R, and Q from it


def test_bf16_products_keep_an_f32_state():
    x = jax.random.normal(prng.key(0), (T, B, N))
    lstm = cells.LSTM(H, dtype=jnp.bfloat16)
    ((c, h), y), variables = lstm.init_with_output(prng.key(1), cells.initial_carry(B, H), x)
    assert (c.dtype, h.dtype, y.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    _, exact = cells.LSTM(H).apply(variables, cells.initial_carry(B, H), x)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=2e-2)
    grads = jax.grad(
        lambda v: lstm.apply(v, cells.initial_carry(B, H), x)[1].sum().astype(jnp.float32)
    )(variables)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


def test_weights_are_packed_as_cudnn_takes_them():
    """By jax's own reference of cuDNN's LSTM, which runs everywhere."""
    keys = jax.random.split(prng.key(0), 3)
    x = jax.random.normal(keys[0], (T, B, N))
    (carry, *_), _ = inputs()
    lstm = cells.LSTM(H)
    params = lstm.init(keys[1], carry, x)['params']
    params['b'] = jax.random.normal(keys[2], (4 * H,))
    vector = cudnn.pack_weights(params['W'], params['U'], params['b'])
    assert vector.size == rnn.get_num_params_in_lstm(N, H, 1, False)
    y, h, c = rnn.lstm_ref(
        x.swapaxes(0, 1), carry[1][None], carry[0][None],
        *rnn.unpack_lstm_weights(vector, N, H, 1, False), jnp.full(B, T, jnp.int32),
        input_size=N, hidden_size=H, num_layers=1, dropout=0.0, bidirectional=False,
    )  # fmt: skip
    ours = lstm.apply({'params': params}, carry, x)
    assert_trees_close(((c[0], h[0]), y.swapaxes(0, 1)), ours, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs an NVIDIA GPU')
@pytest.mark.parametrize('over_seeds', [False, True])
def test_cudnn_is_the_lstm(over_seeds):
    keys = jax.random.split(prng.key(0), 2)
    x = jax.random.normal(keys[0], (2, T, B, N))
    (carry, *_), _ = inputs()
    sides = []
    for impl in ('xla', 'cudnn'):
        lstm = cells.LSTM(H, impl=impl)
        params = lstm.init(keys[1], carry, x[0])

        def weighted(params, carry, x, lstm=lstm):
            outputs = jax.tree.leaves(lstm.apply(params, carry, x))
            return sum((jnp.cos(jnp.arange(o.size).reshape(o.shape)) * o).sum() for o in outputs)

        gradient = jax.value_and_grad(weighted, argnums=(0, 1, 2))
        with jax.default_matmul_precision('highest'):
            if over_seeds:
                gradient = jax.vmap(gradient, in_axes=(None, None, 0))
                sides.append(jax.jit(gradient)(params, carry, x))
            else:
                sides.append(jax.jit(gradient)(params, carry, x[0]))
    assert_trees_close(*sides, rtol=2e-4, atol=2e-5)


def test_cudnn_refuses_what_it_has_not():
    carry, x = cells.initial_carry(B, H), jnp.zeros((T, B, N))
    lstm = cells.LSTM(H, impl='cudnn', dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="Try impl='xla'"):
        lstm.init(prng.key(0), carry, x)


@pytest.mark.parametrize('word', cells.CELLS)
def test_each_gate_is_drawn_on_its_own(word):
    """Gates with equal weights would start as one, and differ by their activations alone."""
    cell = cells.CELLS[word](H)
    key = prng.key(0)
    params = jax.jit(cell.init)(key, cell.initial(B), jnp.zeros((T, B, N)))['params']
    for name in ('W', 'U'):
        gates = np.split(np.asarray(params[name]), 4, axis=1)
        for i in range(4):
            for j in range(i):
                assert np.abs(gates[i] - gates[j]).max() > 0.1, (name, i, j)


@pytest.mark.parametrize('word', cells.CELLS)
@pytest.mark.parametrize('steps, rows', [(0, B), (T, 0), (0, 0)])
def test_no_step_keeps_the_carry_and_no_row_has_no_state(word, steps, rows):
    cell = cells.CELLS[word](H)
    x = jnp.zeros((T, B, N))
    params = jax.eval_shape(cell.init, jax.random.key(0), cell.initial(B), x)
    params = jax.tree.map(lambda p: jnp.ones(p.shape), params)
    carry = jax.tree.map(jnp.ones_like, cell.initial(rows))
    x, reset = jnp.zeros((steps, rows, N)), jnp.zeros((steps, rows), bool)

    def run(params, carry):
        after, h = cell.apply(params, carry, x, reset)
        return sum(a.sum() for a in jax.tree.leaves((after, h))), (after, h)

    gradient = jax.grad(run, argnums=(0, 1), has_aux=True)
    (dparams, dcarry), (after, h) = jax.jit(gradient)(params, carry)
    assert h.shape == (steps, rows, H)
    jax.tree.map(np.testing.assert_array_equal, after, carry)
    jax.tree.map(np.testing.assert_array_equal, dcarry, jax.tree.map(jnp.ones_like, carry))
    assert not any(a.any() for a in jax.tree.leaves(dparams))


@pytest.mark.slow
@pytest.mark.parametrize('word', cells.CELLS)
def test_float64_is_computed_in_float64_with_a_state_of_float64(word):
    with jax.enable_x64(True):
        cell = cells.CELLS[word](H, dtype=jnp.float64, param_dtype=jnp.float64)
        carry, x = cell.initial(B), jnp.zeros((3, B, N))
        assert {a.dtype for a in carry} == {jnp.dtype('float64')}
        shapes = jax.eval_shape(cell.init, jax.random.key(0), carry, x)
        rng = np.random.default_rng(0)
        draw = lambda a: jnp.asarray(0.5 * rng.normal(size=a.shape))  # noqa: E731
        variables, carry, x = jax.tree.map(draw, (shapes, carry, x))
        reset, keep = jnp.zeros((3, B), bool).at[1, 0].set(True), jnp.full((B, H), 0.5)
        apply = lambda v, c, x: cell.apply(v, c, x, reset, keep)  # noqa: E731
        assert_float64(apply, variables, carry, x)
        narrow = cells.CELLS[word](H)
        assert {a.dtype for a in narrow.initial(B)} == {jnp.dtype('float32')}
        in_f32 = jax.tree.map(lambda a: a.astype(jnp.float32), (variables, x))
        after, h = jax.eval_shape(narrow.apply, in_f32[0], carry, in_f32[1])
        assert {a.dtype for a in (*after, h)} == {jnp.dtype('float32')}
