"""The code of the README runs, and its files exist."""

import re

import pytest

from tests.conftest import ROOT

README = (ROOT / 'README.md').read_text()
USE, EXPLAIN = re.findall(r'```python\n(.*?)```', README, flags=re.DOTALL)


def test_the_layer_is_used_as_shown():
    names: dict[str, object] = {}
    exec(USE, names)
    assert names['y'].shape == (32, 20, 128)


def test_a_motif_is_explained_as_shown(capsys):
    names: dict[str, object] = {}
    exec(EXPLAIN, names)
    assert names['W'].shape == (6, 6, 8)
    assert 'W       [6, 6, 8]' in capsys.readouterr().out


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
def test_a_path_of_the_readme_exists(path):
    assert (ROOT / path).exists()
