import jax
import numpy as np
import pytest

from mi.rl.transformer import GatedTransformer
from tests import prng
from tests.motifs.checks import drawn

B, H, M = 3, 8, 4


def core(memory=M):
    return GatedTransformer(H, layers=2, heads=2, memory=memory)


@pytest.fixture(scope='module')
def case():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(13, B, 5)).astype(np.float32)
    reset = rng.random((13, B)) < 0.15
    module = core()
    variables = drawn(module, module.initial(B), x, reset)
    return module, variables, x, reset


def run(module, variables, x, reset, parts):
    carry, outputs, start = module.initial(B), [], 0
    step = jax.jit(module.apply)
    for length in parts:
        rows = slice(start, start + length)
        carry, h = step(variables, carry, x[rows], reset[rows])
        outputs.append(h)
        start += length
    return np.concatenate(outputs)


def test_step_by_step_is_the_whole_sequence(case):
    """The learner computes in one call what the actor computed step by step."""
    whole = run(*case, [13])
    assert case[3].any()
    np.testing.assert_allclose(run(*case, [1] * 13), whole, atol=2e-5)
    np.testing.assert_allclose(run(*case, [2, 6, 5]), whole, atol=2e-5)


def reaches(module, variables, x, reset, layers):
    """[T, T]: whether output t depends on input s."""

    def first(x):
        return module.apply(variables, module.initial(B), x, reset)[1][:, 0].sum(-1)

    jacobian = np.asarray(jax.jit(jax.jacrev(first))(x))[:, :, 0]
    return (jacobian != 0).any(-1)


def test_it_sees_its_episode_as_far_as_the_memory_goes_and_nothing_else(case):
    module, variables, x, reset = case
    reset = np.zeros_like(reset)
    reset[7] = True
    seen = reaches(module, variables, x, reset, 2)
    t, s = np.mgrid[:13, :13]
    same = (t >= 7) == (s >= 7)
    np.testing.assert_array_equal(seen, (s <= t) & (t - s <= 2 * M) & same)


def test_a_fresh_layer_is_close_to_the_identity(case):
    module, _, x, reset = case
    x = np.random.default_rng(1).normal(size=(6, B, H)).astype(np.float32)
    variables = jax.jit(module.init)(prng.key(0), module.initial(B), x, reset[:6])
    _, h = jax.jit(module.apply)(variables, module.initial(B), x, np.zeros((6, B), bool))
    params = variables['params']['input']
    before = x @ params['V'] + params['b'].reshape(1, 1, H)
    assert np.corrcoef(np.ravel(before), np.ravel(h))[0, 1] > 0.8
