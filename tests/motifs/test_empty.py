"""Motifs take an empty batch, as fusions and cells do."""

import jax
import pytest

from tests import prng
from tests.motifs.test_float64 import MOTIFS


@pytest.mark.parametrize('name', MOTIFS)
def test_an_empty_batch_gives_an_empty_output(name):
    constructor, inputs = MOTIFS[name]
    with jax.enable_x64(True):
        init = constructor().init_with_output
        output, _ = jax.eval_shape(init, prng.key(0), *inputs)
        empty, _ = jax.eval_shape(init, prng.key(0), *(array[:0] for array in inputs))
    for array, empty_array in zip(jax.tree.leaves(output), jax.tree.leaves(empty), strict=True):
        assert empty_array.shape in ((0, *array.shape[1:]), ())  # the routing has a scalar loss
