"""What every motif's tests share."""

import jax
import jax.numpy as jnp
import numpy as np

from mi.unify import as_mi


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def off_the_zeros(variables):
    """Parameters moved, so that none of the terms is zero and hides a mistake."""
    return jax.tree.map(lambda p: p + 0.2 * random(p.size, *p.shape).astype(p.dtype), variables)


def is_its_composition(module, variables, *args, tolerance=2e-5, **kwargs):
    """The output computed from products of the one equation is the module's; returns it."""
    composition = as_mi(module, variables, *args, **kwargs)
    assert composition.products
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        composition.output,
        module.apply(variables, *args, **kwargs),
    )
    for product in composition.products:
        m, n, _ = product.W.shape
        assert product.x.shape[-1] == n and product.z.shape[-1] == m
        assert jnp.any(product.W != 0)
    return composition
