"""The recipe for NNX: the same results and gradients as Linen, and a step that learns."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mi
from mi.cells import LSTM, initial_carry
from mi.motifs.conditioning import FiLM
from tests.conftest import ROOT

MODEL, GATE = re.findall(
    r'```python\n(.*?)```', (ROOT / 'docs/tutorials/nnx.md').read_text(), flags=re.S
)


@pytest.fixture(scope='module')
def names():
    """The names of the page after its code has run."""
    names = {'__name__': 'page'}
    exec(MODEL, names)
    exec(GATE, names)
    return names


@pytest.mark.slow
def test_the_training_step_of_the_page_learns(names):
    losses = [float(loss) for loss in names['losses']]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]


def test_the_bridged_modules_compute_what_linen_does(names):
    """With the parameters that the page has trained."""
    model, x, z = (names[name] for name in ('model', 'x', 'z'))
    linen = {'fuse': mi.MultiplicativeInteraction(16), 'core': LSTM(16), 'film': FiLM(16)}
    h = np.asarray(jax.nn.relu(model.fuse(x, z)))
    inputs = {'fuse': (x, z), 'core': (initial_carry(4, 16), h), 'film': (h, z)}
    for name, module in linen.items():
        bridged = getattr(model, name)
        params = nnx.to_pure_dict(nnx.state(bridged, nnx.Param))
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs[name])
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes['params'])
        found, expected = bridged(*inputs[name]), module.apply({'params': params}, *inputs[name])
        jax.tree.map(np.testing.assert_allclose, found, expected)
    assert model.fuse.W.shape == (3, 8, 16)


def test_the_bridged_gate_is_its_equation(names):
    """σ(z V + b) ⊙ x, in NumPy."""
    x, z, y = (np.asarray(names[name]) for name in ('x', 'z', 'y'))
    gate = names['variables']['params']['gate']
    kernel, bias = (
        np.asarray(getattr(gate[key], 'value', gate[key])) for key in ('kernel', 'bias')
    )
    expected = x / (1 + np.exp(-(z @ kernel + bias)))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
