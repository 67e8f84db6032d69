"""What every motif's tests share."""

import jax
import jax.numpy as jnp
import numpy as np

from mi.unify import as_mi


def random(seed, *shape):
    """Standard normal, by NumPy: jax would compile a program for every shape."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def off_the_zeros(variables):
    """Parameters moved, so that none of the terms is zero and hides a mistake."""
    return jax.tree.map(lambda p: p + 0.2 * random(p.size, *p.shape).astype(p.dtype), variables)


def drawn(module, *inputs, **kwargs):
    """Random variables of a module for these inputs, nothing initialised."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **kwargs))
    return jax.tree.map(lambda a: 0.5 * random(a.size, *a.shape).astype(a.dtype), shapes)


def is_its_composition(module, variables, *args, tolerance=2e-5, **kwargs):
    """The output computed from products of the one equation is the module's; returns it."""
    composition = as_mi(module, variables, *args, **kwargs)
    expected = jax.jit(lambda v: module.apply(v, *args, **kwargs))(variables)
    assert composition.products
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        composition.output,
        expected,
    )
    for product in composition.products:
        m, n, _ = product.W.shape
        assert product.x.shape[-1] == n and product.z.shape[-1] == m
        assert jnp.any(product.W != 0)
    return composition
