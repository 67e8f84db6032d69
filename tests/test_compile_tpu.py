"""Every preset, fusion, cell and core compiles for a TPU, and presets divide their work.

XLA's own compiler needs no TPU, but the extra `tpu`.
"""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest

from configs import (
    lm,
    lm_enwik8,
    lm_ptb,
    lm_wikitext103,
    rl,
    rl_dmlab30,
)
from experiments.attention_conv import config as attention_conv
from experiments.composition import config as composition
from experiments.conditional import config as conditional
from experiments.expressivity import config as expressivity
from experiments.hamiltonian import config as hamiltonian
from experiments.regression import config as regression
from experiments.seq2seq import config as seq2seq
from mi import cells, fusion
from mi.config import UserError
from mi.estimate import memory, program, topologies
from mi.lm import config as lm_setup
from mi.rl import config as rl_setup

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec('libtpu') is None,
        reason='libtpu is not installed: expected the extra tpu',
    ),
]
LM_CORES = (*cells.CELLS, *lm_setup.CORES)
RL_CORES = ('none', *cells.CELLS, *rl_setup.CORES)
FILES = (
    attention_conv, composition, conditional, expressivity, hamiltonian, lm, lm_enwik8, lm_ptb,
    lm_wikitext103, regression, rl, rl_dmlab30, seq2seq,
)  # fmt: skip
PRESETS = [(file, preset) for file in FILES for preset in getattr(file, 'PRESETS', (None,))]


@pytest.fixture(scope='module', autouse=True)
def _out_of_the_cache():
    """Keep the programs out of the persistent cache, which cannot read them."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update('jax_enable_compilation_cache', False)
    yield
    jax.config.update('jax_enable_compilation_cache', enabled)


@functools.cache
def one_chip():
    return topologies.describe_one('v5e:1x1')


def compile_for_one_chip(function, *args):
    sharding = jax.sharding.SingleDeviceSharding(one_chip())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    return jax.jit(function).lower(*shapes).compile()


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


@pytest.mark.parametrize('name', fusion.FUSIONS)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_fusion_and_its_gradient(name, dtype):
    x, z = shape(64, 128, dtype=dtype), shape(64, 16, dtype=dtype)
    layer = fusion.get(name, rank=8, hidden=32)(128, dtype=dtype)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x, z)

    def loss(variables, x, z):
        return layer.apply(variables, x, z).astype(jnp.float32).sum()

    compiled = compile_for_one_chip(jax.grad(loss, argnums=(0, 1, 2)), variables, x, z)
    assert program.analyze(compiled).cycles


@pytest.mark.parametrize('name', LM_CORES)
def test_the_step_of_a_language_model(name):
    config = lm.get_config(f'core={name},tiny').unlock()
    config.seeds = (0,)
    found = program.analyze(memory.make_programs(config, [one_chip()]).compile())
    assert found.flops and not found.collectives


@pytest.mark.parametrize('name', RL_CORES)
def test_the_updates_of_an_agent(name):
    config = rl.get_config('tiny,env=catch').unlock()
    config.model.core, config.seeds = name, (0,)
    found = program.analyze(memory.make_programs(config, [one_chip()]).compile())
    assert found.flops and not found.collectives


@pytest.mark.parametrize(
    ('file', 'preset'), PRESETS, ids=[f'{f.__name__.rpartition(".")[2]}-{p}' for f, p in PRESETS]
)
def test_a_preset_on_one_chip_and_on_eight(file, preset):
    """Its products are divided by the devices; loops whose length depends on data count once."""
    config = file.get_config(preset) if preset else file.get_config()
    if config.task not in memory.PROGRAMS:
        pytest.skip(f'task {config.task!r}: the run finds its models')
    devices = topologies.describe('v5e:2x4')
    try:
        training = memory.make_programs(config, devices)
    except UserError as error:
        assert 'devices' in str(error)  # they do not divide the batch
        training = None
    alone = program.analyze(memory.make_programs(config, [one_chip()]).compile())
    if training is not None:
        divided = program.analyze(training.compile())
        share = divided.flops / alone.flops
        seeds, shape = len(config.seeds), training.mesh.shape
        seed_share = math.ceil(seeds / shape['seed']) / seeds
        assert share <= 1.05 * seed_share / (shape['data'] * shape['fsdp'])
