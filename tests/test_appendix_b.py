"""The layer in ten lines of docs/appendix_b.md: the same function as ours, with other defaults."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi
from benchmarks import appendix_b
from mi import counting
from tests import prng
from tests.conftest import ROOT

SIMPLE, SAME = re.findall(
    r'```python\n(.*?)```', (ROOT / 'docs/appendix_b.md').read_text(), flags=re.S
)
SHAPES = {  # leading axes of x and z
    'a context per row': ((6,), (6,)),
    'a shared context': ((3, 4), (3, 1)),
    'a shared input': ((3, 1), (3, 4)),
}


@pytest.fixture(scope='module')
def page():
    """The names of the page after its code has run."""
    names: dict[str, object] = {}
    exec(SIMPLE, names)
    exec(SAME, names)
    return names


def test_the_page_shows_the_measured_layer_and_it_has_ten_lines(page):
    body = SIMPLE[SIMPLE.index('class SimpleMI') :].strip()
    assert body == inspect.getsource(appendix_b.SimpleMI).strip()
    assert len([line for line in body.split('\n') if line.strip()]) <= 10
    params = {'W': {'kernel': jnp.arange(24.0).reshape(2, 12), 'bias': jnp.arange(12.0)}}
    params['b'] = {'kernel': jnp.ones((2, 4)), 'bias': jnp.zeros(4)}
    for map_params in (page['map_params'], appendix_b.map_params):
        mapped = map_params(params, 3, 4)
        assert mapped['W'][1, 2, 3] == 23 and mapped['V'][2, 3] == 11


def jit_output_and_gradients(layer):
    """(params, x, z) → the output, and the gradients of Σ sin y in all three."""

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def compute(params, x, z):
        y = layer.apply({'params': params}, x, z)
        return jnp.sum(jnp.sin(y)), y

    return compute


@pytest.mark.parametrize('shapes', SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float32, 2e-5), (jnp.float64, 1e-12)])
def test_both_have_the_same_outputs_and_gradients(page, shapes, dtype, tolerance):
    """Parameters, and their gradients, go from one to the other by the same map."""
    n, m, k = 5, 3, 4
    with jax.enable_x64(True):
        keys = jax.random.split(prng.key(0), 3)
        x, z = (
            jax.random.normal(key, (*lead, size), dtype)
            for key, lead, size in zip(keys, shapes, (n, m), strict=False)
        )
        simple, ours = page['SimpleMI'](k), mi.MultiplicativeInteraction(k)
        template = jax.eval_shape(simple.init, keys[2], x, z)['params']
        leaves, tree = jax.tree.flatten(template)  # biases too are not zero
        params = jax.tree.unflatten(tree, [
            jax.random.normal(key, leaf.shape, dtype)
            for key, leaf in zip(jax.random.split(keys[2], len(leaves)), leaves, strict=True)
        ])  # fmt: skip
        mapped = page['map_params'](params, n, k)
        compare = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
        (theirs, *stream_grads), y = jit_output_and_gradients(simple)(params, x, z)
        (grads, *our_stream_grads), our_y = jit_output_and_gradients(ours)(mapped, x, z)
        assert y.dtype == dtype
        compare(our_y, y)
        for name, grad in page['map_params'](theirs, n, k).items():
            compare(grads[name], grad, err_msg=name)
        for our_grad, grad in zip(our_stream_grads, stream_grads, strict=True):
            compare(our_grad, grad)


@pytest.mark.slow
@pytest.mark.parametrize(('context', 'expected'), [('dense', 64.0), ('one_hot', 64 / 32)])
def test_the_variance_of_the_output_grows_with_the_inputs_and_ours_is_one(page, context, expected):
    """n = 64, m = 32, k = 128: zᵀWx has variance n for a dense context, and n/m for a one-hot one.

    V and b start at zero in the ten lines; U adds 1, or 1/m.
    """
    n, m, k, rows = 64, 32, 128, 512
    keys = jax.random.split(prng.key(0), 3)
    x = jax.random.normal(keys[0], (rows, n))
    z = jax.random.normal(keys[1], (rows, m))
    if context == 'one_hot':
        z = jax.nn.one_hot(jnp.arange(rows) % m, m)
    layers = page['SimpleMI'](k), mi.MultiplicativeInteraction(k, context=context)
    theirs, ours = (np.var(jax.jit(layer.init_with_output)(keys[2], x, z)[0]) for layer in layers)
    added = 1.0 if context == 'dense' else 1 / m
    for layer, slope in zip(layers, (0.0, 1 / 3), strict=True):  # of y by x, where z = 0: V
        V_norm = _measure_slope(layer, layer.init(keys[2], x, z), x[0], 0 * z[0])
        assert V_norm == pytest.approx(slope, abs=0.03)
    assert theirs == pytest.approx(expected + added, rel=0.15)
    assert ours == pytest.approx(1.0, rel=0.1)


def _measure_slope(layer, variables, x, z):
    """The sum of squares of ∂y/∂x, for each output."""
    jacobian = jax.jit(jax.jacobian(lambda x: layer.apply(variables, x, z)))(x)
    return float(np.sum(jacobian**2)) / len(jacobian)


def test_ids_are_read_and_not_multiplied(page):
    """The ten lines need one-hot contexts: m times the products of the ids of ours."""
    n, m, k, rows = 16, 8, 16, 4
    x, ids = jnp.ones((rows, n)), jnp.arange(rows)
    z = jax.nn.one_hot(ids, m)
    simple, ours = page['SimpleMI'](k), mi.MultiplicativeInteraction(k, 'one_hot', contexts=m)
    variables = simple.init(prng.key(0), x, z)
    mapped = {'params': page['map_params'](variables['params'], n, k)}
    np.testing.assert_allclose(
        ours.apply(mapped, x, ids), simple.apply(variables, x, z), rtol=1e-5, atol=1e-5
    )
    theirs = counting.flops(simple.apply, variables, x, z)
    assert theirs == 2 * rows * (m * n * k + m * k + n * k)
    assert counting.flops(ours.apply, mapped, x, ids) == 2 * rows * (n * k + n * k)
    with pytest.raises(Exception, match=r'.'):
        simple.apply(variables, x, ids)


def test_many_contexts_need_no_weights_of_each_row():
    """4,096 rows: the ten lines write W'(z) of every row, 256 MiB; ours less than a tenth."""
    regime = appendix_b.REGIMES[1]
    assert regime.x == regime.z == (4096,)
    mebibytes = {}
    for side, (function, arguments) in appendix_b.make_sides(regime).items():
        compiled = appendix_b.compile_pass(function, arguments, has_gradient=False)
        mebibytes[side] = compiled.memory_analysis().temp_size_in_bytes / 2**20
    assert mebibytes['ten lines'] > 250 and mebibytes['mi'] < 70
