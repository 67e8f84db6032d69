import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import pytest

from mi.lm import corpora

jax.config.update('jax_numpy_rank_promotion', 'raise')

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='session', autouse=True)
def _from_the_root() -> None:
    os.chdir(ROOT)  # configs/ and experiments/ are named relative to it


@pytest.fixture(scope='session')
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a little of each split of Austen: real text, evaluated in no time."""
    directory = tmp_path_factory.mktemp('texts')
    for split, [(_, text)] in corpora.austen().items():
        (directory / f'{split}.txt').write_bytes(text[:12_000])
    return str(directory)


@pytest.fixture(scope='session')
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp('tokens'))
