"""A package of one's own reaches every trainer by names in a config: `examples/my_fusion`."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from configs import lm as lm_configs
from configs import rl as rl_configs
from launch import sweep
from mi import cells, fusion
from mi.cells import LSTM
from mi.config import UserError, check, choice
from mi.lm import config as lm_config
from mi.lm import factory as lm_factory
from mi.lm.data import sources
from mi.lm.data.texts import DataError
from mi.rl import config as rl_config
from mi.rl import envs
from mi.rl import factory as rl_factory
from mi.rl.envs.jax.batched import Batched
from mi.rl.envs.jax.catch import make as make_catch
from tests.conftest import ROOT

EXAMPLE = ROOT / 'examples/my_fusion'
FUSION = 'my_fusion.layers:TanhGate'
ENVIRONMENT = 'my_fusion.environment:make/two'


@pytest.fixture(autouse=True)
def _example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)


class Elman(nn.Module):
    """A cell of this file, named 'tests.test_extension:Elman'."""

    features: int
    slope: float = 1.0
    dtype: object = None
    param_dtype: object = jnp.float32

    @nn.compact
    def __call__(self, carry, x, reset=None, keep=None):
        cell = LSTM(self.features, dtype=self.dtype, param_dtype=self.param_dtype, name='lstm')
        carry, hidden = cell(carry, x, reset, keep)
        return carry, self.slope * hidden

    def initial(self, batch):
        return LSTM(self.features).initial(batch)


def make_pool(suite, *, batch, seed, speed=1):
    """Make an environment of the host, named 'tests.test_extension:make_pool'."""
    return Batched(make_catch(suite), batch, seed)


def read_poem(path, splits, cache):
    """Read a corpus, named 'tests.test_extension:read_poem'."""
    return sources.split_by_lines(sources.open_text(pathlib.Path(path), cache))


def read_string(path, splits, cache):
    """Return the text itself instead of `Text`, which is an error."""
    return {split: pathlib.Path(path).read_text() for split in splits}


def read_train_alone(path, splits, cache):
    """Leave out the splits for evaluation, which is an error."""
    return {'train': [sources.open_text(pathlib.Path(path), cache)]}


def test_a_fusion_and_a_cell_build_the_language_model():
    config = lm_configs.get_config('tiny').unlock()
    config.model.fusion.name, config.model.core = FUSION, f'{__name__}:Elman'
    lm_config.validate(config)
    trainer = lm_factory.build_trainer(config, 256)
    assert trainer.model is not None


@pytest.mark.parametrize('core', ['lstm', f'{__name__}:Elman'])
def test_a_fusion_a_core_and_an_environment_build_the_agent(core):
    config = rl_configs.get_config('tiny').unlock()
    config.env.name, config.model.fusion.name, config.model.core = ENVIRONMENT, FUSION, core
    rl_config.validate(config)
    environment = envs.make(config.env.name)
    assert environment.spec.tasks == ('plain', 'flipped')
    assert rl_factory.build_agent(config, environment.spec) is not None


def test_an_environment_of_the_host_is_told_by_its_argument():
    assert envs.is_on_host(f'{__name__}:make_pool') and not envs.is_on_host(ENVIRONMENT)
    pool = envs.pool(f'{__name__}:make_pool', 3, 0, {'speed': 2})
    assert pool.batch == 3 and pool.reset().reward.shape == (3,)
    with pytest.raises(ValueError, match=r'runs on the host.* Try mi\.rl\.envs\.pool'):
        envs.make(f'{__name__}:make_pool')
    with pytest.raises(ValueError, match=r'`options\.sped` is unknown'):
        envs.pool(f'{__name__}:make_pool', 3, 0, {'sped': 2})


@pytest.mark.parametrize(
    ('name', 'reason'),
    [
        ('my_fusion.environment:mak', "no attribute 'mak'"),
        ('my_fushion.environment:make', "No module named 'my_fushion'"),
    ],
)
def test_an_environment_that_cannot_be_imported_says_why(name, reason):
    with pytest.raises(UserError, match=reason):
        envs.make(name)


def test_a_core_is_no_cell():
    assert not choice(cells.CELLS)(f'{__name__}:Elman')
    assert 'no argument reset' in choice(cells.CELLS)(FUSION)


def test_options_are_fields_of_the_fusion():
    config = lm_configs.get_config('tiny').unlock()
    config.model.fusion.update({'name': 'mfb', 'rank': 6, 'options': {'factors': 2}})
    check(config, lm_config.SCHEMA)
    two = count_fusion('mfb', {'factors': 2})
    assert count_fusion('mfb', {'factors': 4}) == 2 * two
    for options, message in (
        ({'factor': 2}, "did you mean 'factors'"),
        ({'factors': 'two'}, 'expected int'),
        ({'features': 2}, r'`options\.features` is unknown'),
    ):
        with pytest.raises(ValueError, match=message):
            fusion.get('mfb', options)


def count_fusion(name, options):
    module = fusion.get(name, options)(6)
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 3)), jnp.zeros((1, 2)))
    return sum(leaf.size for leaf in jax.tree.leaves(variables) if leaf.ndim > 1)


def test_a_corpus_of_one_s_own_is_read(tmp_path):
    poem = tmp_path / 'poem.txt'
    poem.write_text('\n'.join(f'line {i}' for i in range(200)))
    texts = sources.load_texts(f'{__name__}:read_poem', str(poem), ('train', 'test'), tmp_path)
    assert texts['train'][0].array().tobytes().startswith(b'line 0')
    with pytest.raises(DataError, match='importable module'):
        sources.load_texts('no_such.module:read', '', ('train',), tmp_path)
    for name in ('read_string', 'read_train_alone'):
        with pytest.raises(DataError, match=rf'{name}.*lists of .*\.Text of train, test, by split'):
            sources.load_texts(f'{__name__}:{name}', str(poem), ('train', 'test'), tmp_path)


def test_the_sweep_of_the_example_is_read(tmp_path):
    members = sweep.load(str(EXAMPLE / 'my_fusion/sweep.py'), tmp_path, dry=True)
    assert len(members) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    'arguments',
    [
        ['--config=configs/lm.py:tiny', '--config.optim.name=optax:lion'],
        ['--config=configs/rl.py:tiny', f'--config.env.name={ENVIRONMENT}'],
    ],
    ids=['lm', 'rl'],
)
def test_a_trainer_runs_with_the_example(arguments, tmp_path):
    command = [sys.executable, '-m', 'mi.main', f'--workdir={tmp_path}']
    command += [*arguments, f'--config.model.fusion.name={FUSION}']
    subprocess.run(command, cwd=ROOT, env=_environment(), check=True, timeout=600)
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert json.loads(lines[-1])


@pytest.mark.slow
def test_the_tests_of_the_example_pass():
    subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'tests'],
        cwd=EXAMPLE,
        env=_environment(),
        check=True,
        timeout=600,
    )


def _environment():
    path = os.pathsep.join([str(EXAMPLE), str(ROOT), os.environ.get('PYTHONPATH', '')])
    return os.environ | {'PYTHONPATH': path}
