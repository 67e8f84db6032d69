"""What every motif's tests share."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from mi.unify import as_mi


def random(seed, *shape):
    """Standard normal, by NumPy: jax would compile a program for every shape."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def normal_like(array, scale):
    """Normal numbers with the shape and the dtype of an array, seeded by its size, by NumPy."""
    return (scale * np.random.default_rng(array.size).normal(size=array.shape)).astype(array.dtype)


def off_the_zeros(variables):
    """Parameters moved, so that none of the terms is zero and hides a mistake."""
    return jax.tree.map(lambda p: jnp.asarray(np.asarray(p) + normal_like(p, 0.2)), variables)


def drawn(module, *inputs, **kwargs):
    """Random variables of a module for these inputs, nothing initialized."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **kwargs))
    return jax.tree.map(lambda a: jnp.asarray(normal_like(a, 0.5)), shapes)


def compose(module, variables, *args, **kwargs):
    """Return `as_mi` of a module, compiled as one program: operation by operation takes ten times
    as long. A module that is not affine gives NaN there.
    """
    arrays = [isinstance(a, np.ndarray | jax.Array | tuple) for a in args]
    traced_composition = []

    def run(variables, traced):
        traced = iter(traced)
        inputs = [next(traced) if is_array else a for a, is_array in zip(args, arrays, strict=True)]
        composition = as_mi(module, variables, *inputs, **kwargs)
        traced_composition.append(composition)
        tensors = [{name: getattr(p, name) for name in 'xzWUVb'} for p in composition.products]
        return composition.output, tensors

    output, tensors = jax.jit(run)(variables, list(itertools.compress(args, arrays)))
    (composition,) = traced_composition
    products = tuple(
        dataclasses.replace(product, **arrays)
        for product, arrays in zip(composition.products, tensors, strict=True)
    )
    return dataclasses.replace(composition, products=products, output=output)


def is_its_composition(module, variables, *args, tolerance=2e-5, **kwargs):
    """The output computed from products of the one equation is the module's; returns it."""
    composition = compose(module, variables, *args, **kwargs)
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
        assert np.any(np.asarray(product.W) != 0)
    return composition


def wide(tree):
    """The same with float64 for float32; inside `jax.enable_x64`."""
    return jax.tree.map(
        lambda a: (
            jnp.asarray(np.asarray(a, np.float64)) if jnp.issubdtype(a.dtype, jnp.floating) else a
        ),
        tree,
    )


def assert_float64(f, *args):
    """Outputs and gradients of f are in float64, and not only by their dtype.

    A finite difference with steps of 1e-5 along random directions has an error of some 1e-9 in
    float64, and of more than 1e-3 where anything on the way was rounded to float32.
    """
    rng = np.random.default_rng(0)

    def directions(tree):
        def draw(a):
            if not jnp.issubdtype(a.dtype, jnp.floating):
                return np.zeros(a.shape, jax.dtypes.float0)
            return rng.normal(size=a.shape)

        return jax.tree.map(draw, tree)

    def moved(step, tree, direction):
        def move(a, d):
            return a if d.dtype == jax.dtypes.float0 else np.asarray(a) + step * d

        return jax.tree.map(move, tree, direction)

    outputs = jax.eval_shape(f, *args)
    floats = [a for a in jax.tree.leaves(outputs) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert {a.dtype for a in floats} == {jnp.dtype('float64')}
    weights = jax.tree.map(lambda a: rng.normal(size=a.shape), outputs)

    def loss(args):
        terms = jax.tree.map(lambda w, y: (w * y).sum(), weights, f(*args))
        return sum(jax.tree.leaves(terms))

    # One program for all values, because compiling takes longer than its gradients.
    value_and_gradient = jax.jit(jax.value_and_grad(loss, allow_int=True))
    tangent = directions(args)
    _, gradient = value_and_gradient(args)
    slope = sum(
        float((np.asarray(g) * t).sum())
        for g, t in zip(jax.tree.leaves(gradient), jax.tree.leaves(tangent), strict=True)
        if t.dtype != jax.dtypes.float0
    )
    ends = [value_and_gradient(moved(step, args, tangent))[0] for step in (1e-5, -1e-5)]
    difference = float(ends[0] - ends[1]) / 2e-5
    assert abs(difference - slope) < 1e-6 * max(1, abs(slope)), (difference, slope)
