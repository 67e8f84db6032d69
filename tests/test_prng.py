"""Tests of the generator of the tests: what they rely on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tests import prng


@pytest.mark.parametrize('seed', [0, 1, 7])
def test_draws_are_uniform_and_normal(seed):
    key = prng.key(seed)
    uniform = np.asarray(jax.random.uniform(key, (50_000,)))
    assert scipy.stats.kstest(uniform, 'uniform').pvalue > 1e-3
    normal = np.asarray(jax.random.normal(jax.random.fold_in(key, 3), (50_000,)))
    assert scipy.stats.kstest(normal, 'norm').pvalue > 1e-3


def test_draws_of_derived_keys_are_uncorrelated():
    """Of seeds, of splits and of folds; and of neighbors in one draw."""
    draw = jax.vmap(lambda key: jax.random.normal(key, (20_000,)))
    keys = [prng.key(0), prng.key(1), *jax.random.split(prng.key(0), 3)]
    keys += [jax.random.fold_in(prng.key(0), i) for i in range(3)]
    draws = np.asarray(draw(jnp.stack(keys)))
    draws = np.concatenate([draws, draws[:1, np.arange(1, 20_001) % 20_000]])
    correlations = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlations).max() < 4.5 / np.sqrt(20_000)


def test_keys_do_not_repeat():
    words = jax.random.key_data(jax.random.split(prng.key(0), 10_000))
    assert len(np.unique(words)) >= 9_990


@pytest.mark.parametrize('dtype', [jnp.uint8, jnp.uint16, jnp.uint32])
def test_bits_of_every_width_fill_it(dtype):
    bits = np.asarray(jax.random.bits(prng.key(2), (4096,), dtype))
    assert bits.dtype == dtype
    assert np.mean(bits / np.iinfo(dtype).max) == pytest.approx(0.5, abs=0.03)
