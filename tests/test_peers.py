"""The layers are the multiplicative interactions of MultiBench and DI-engine, by their values.

tests/golden/make_peers.py ran both. Their initial parameters, the roles of their inputs and their
options differ from ours; docs/evaluation.md lists how.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi

PEERS = json.loads((pathlib.Path(__file__).parent / 'golden/peers.json').read_text())
CASES = {name: {k: np.array(v) for k, v in case.items()} for name, case in PEERS['cases'].items()}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def compute(layer, params, x, z, output_gradient):
    """Return the output of a layer, and the gradients of its parameters, x and z."""
    shape = output_gradient.shape

    def apply(params, x, z):
        return layer.apply({'params': params}, x, z).reshape(shape)

    output, vjp = jax.vjp(apply, params, x, z)
    return output, *vjp(jnp.asarray(output_gradient))


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-13)


def get_params(case):
    return {name: jnp.asarray(case[name]) for name in 'WUVb'}


@pytest.mark.parametrize(
    ('form', 'layer'),
    [
        ('matrix', mi.MultiplicativeInteraction(2)),
        ('vector', mi.DiagonalMultiplicativeInteraction()),
    ],
)
def test_multibench_matrix_and_vector_are_the_full_and_the_diagonal_form(form, layer):
    """Their first input is z, the second one x; all parameters have our layout."""
    case = CASES[f'multibench_{form}']
    output, of_params, of_x, of_z = compute(
        layer, get_params(case), case['second'], case['first'], case['output_gradient']
    )
    assert_close(output, case['output'])
    assert_close(of_z, case['first_gradient'])
    assert_close(of_x, case['second_gradient'])
    for name in 'WUVb':
        assert_close(of_params[name], case[f'{name}_gradient'])


def test_multibench_scalar_is_the_scalar_form_with_one_shift_for_all_features():
    """Their U is [m] and their b [1], ours have a column and an entry for each feature."""
    case = CASES['multibench_scalar']
    theirs = get_params(case)
    num_features = case['second'].shape[-1]
    params = {
        'W': theirs['W'][:, None],
        'U': jnp.tile(theirs['U'][:, None], (1, num_features)),
        'V': theirs['V'],
        'b': jnp.tile(theirs['b'], num_features),
    }
    output, of_params, of_x, of_z = compute(
        mi.ScalarMultiplicativeInteraction(),
        params,
        case['second'],
        case['first'],
        case['output_gradient'],
    )
    assert_close(output, case['output'])
    assert_close(of_z, case['first_gradient'])
    assert_close(of_x, case['second_gradient'])
    assert_close(of_params['W'][:, 0], case['W_gradient'])
    assert_close(of_params['V'], case['V_gradient'])
    assert_close(of_params['U'].sum(1), case['U_gradient'])
    assert_close(of_params['b'].sum(keepdims=True), case['b_gradient'])


def test_multibench_matrix3d_is_the_full_form_with_its_output_as_a_matrix():
    case = CASES['multibench_matrix3D']
    output_shape = case['output'].shape[1:]
    num_features = int(np.prod(output_shape))
    params = {
        name: value.reshape(*value.shape[:-2], num_features)
        for name, value in get_params(case).items()
    }
    output, of_params, of_x, of_z = compute(
        mi.MultiplicativeInteraction(num_features),
        params,
        case['second'],
        case['first'],
        case['output_gradient'],
    )
    assert_close(output, case['output'])
    assert_close(of_z, case['first_gradient'])
    assert_close(of_x, case['second_gradient'])
    for name in 'WUVb':
        assert_close(of_params[name].reshape(case[name].shape), case[f'{name}_gradient'])


def test_multibench_flip_exchanges_the_roles_of_the_inputs():
    case = CASES['multibench_flip']
    output, of_params, of_x, of_z = compute(
        mi.MultiplicativeInteraction(2),
        get_params(case),
        case['first'],
        case['second'],
        case['output_gradient'],
    )
    assert_close(output, case['output'])
    assert_close(of_x, case['first_gradient'])
    assert_close(of_z, case['second_gradient'])
    for name in 'WUVb':
        assert_close(of_params[name], case[f'{name}_gradient'])


def test_multibench_clip_is_of_the_inputs():
    """Its docstring says of the parameters; a clipped entry has no gradient."""
    case, (low, high) = CASES['multibench_clip'], PEERS['clip']
    x, z = (jnp.clip(case[name], low, high) for name in ('second', 'first'))
    output, of_params, of_x, of_z = compute(
        mi.MultiplicativeInteraction(2), get_params(case), x, z, case['output_gradient']
    )
    assert_close(output, case['output'])
    for name in 'WUVb':
        assert_close(of_params[name], case[f'{name}_gradient'])
    for gradient, name in ((of_x, 'second'), (of_z, 'first')):
        is_inside = (case[name] > low) & (case[name] < high)
        assert is_inside.any() and not is_inside.all()
        assert_close(np.where(is_inside, gradient, 0), case[f'{name}_gradient'])
    assert (np.abs(case['W']) > high).any()  # the parameters are not clipped


def test_multibench_grad_clip_is_of_each_entry_of_the_gradients_of_parameters():
    case, (low, high) = CASES['multibench_grad_clip'], PEERS['grad_clip']
    output, of_params, of_x, of_z = compute(
        mi.MultiplicativeInteraction(2),
        get_params(case),
        case['second'],
        case['first'],
        case['output_gradient'],
    )
    assert_close(output, case['output'])
    assert_close(of_z, case['first_gradient'])
    assert_close(of_x, case['second_gradient'])
    assert any((jnp.abs(of_params[name]) > high).any() for name in 'WUVb')
    for name in 'WUVb':
        assert_close(jnp.clip(of_params[name], low, high), case[f'{name}_gradient'])


def test_di_engine_is_the_full_form_with_its_output_first():
    """Its W is [k, n, m] and its U and V are transposed; x is the first input."""
    case = CASES['di_engine']
    theirs = get_params(case)
    params = {
        'W': theirs['W'].transpose(2, 1, 0),
        'U': theirs['U'].T,
        'V': theirs['V'].T,
        'b': theirs['b'],
    }
    output, of_params, of_x, of_z = compute(
        mi.MultiplicativeInteraction(2),
        params,
        case['first'],
        case['second'],
        case['output_gradient'],
    )
    assert_close(output, case['output'])
    assert_close(of_x, case['first_gradient'])
    assert_close(of_z, case['second_gradient'])
    assert_close(of_params['W'].transpose(2, 1, 0), case['W_gradient'])
    for name in 'UVb':
        assert_close(of_params[name].T, case[f'{name}_gradient'])
