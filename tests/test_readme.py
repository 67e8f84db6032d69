"""The code of the README runs, and its files exist."""

import re

import jax
import numpy as np
import pytest

import mi
from tests.conftest import ROOT
from tests.test_fusion import SHIPPED

README = (ROOT / 'README.md').read_text()
USE, EXPLAIN, ADD = re.findall(r'```python\n(.*?)```', README, flags=re.DOTALL)


def test_the_layer_is_used_as_shown():
    names: dict[str, object] = {}
    exec(USE, names)
    assert names['y'].shape == (32, 20, 128)


def test_a_motif_is_explained_as_shown(capsys):
    names: dict[str, object] = {}
    exec(EXPLAIN, names)
    assert names['W'].shape == (6, 6, 8)
    assert 'W       [6, 6, 8]' in capsys.readouterr().out


def test_the_dictionary_has_as_many_words_as_it_says():
    assert f'`FUSIONS` has {len(SHIPPED)} words' in README


def test_a_fusion_is_added_as_shown():
    names: dict[str, object] = {}
    before = dict(mi.FUSIONS)
    try:
        exec(ADD, names)
        assert mi.FUSIONS['scale'] is names['Scale']
    finally:
        mi.FUSIONS.clear()
        mi.FUSIONS |= before
    x, z = (
        jax.random.normal(jax.random.key(0), (6, 4)),
        jax.random.normal(jax.random.key(1), (6, 3)),
    )
    y, variables = names['Scale'](5).init_with_output(jax.random.key(2), x, z)
    p = variables['params']
    scale = 0.5**0.5 + z @ p['Affine_0']['V']
    np.testing.assert_allclose(y, scale * (x @ p['Affine_1']['V']), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'path',
    sorted(
        set(
            re.findall(
                r'[`(]((?:mi|configs|experiments|launch|benchmarks|docs)/[\w/.]*)[`)]', README
            )
        )
    ),
)
def test_what_it_names_is_there(path):
    assert (ROOT / path).exists()
