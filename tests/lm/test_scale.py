"""Devices, accumulation and rematerialization change the cost of a step, not its result."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import lm, lm_enwik8, lm_ptb, lm_wikitext103
from mi.lm import config as lm_config
from mi.lm import factory
from mi.lm.data.batches import Batch
from mi.lm.trainer import Trainer
from mi.training import optim, sharding
from tests import prng
from tests.conftest import printed_on_devices


@pytest.mark.slow
@pytest.mark.parametrize('core', ['lstm', 'transformer'])
def test_the_losses_are_the_same_on_1_2_and_4_devices_and_with_split_parameters(texts, core):
    printed = printed_on_devices(4, 'tests.lm.devices', core, texts)
    for curve in printed.values():
        np.testing.assert_allclose(curve['nats'], printed['one']['nats'], rtol=2e-4)
        np.testing.assert_allclose(curve['norms'], printed['one']['norms'], rtol=1e-3)
    assert not printed['one']['split'] and not printed['four']['split']
    for name in ('seeds', 'split', 'all', 'parts'):
        assert printed[name]['split'], name


@pytest.mark.parametrize('parts', [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    'word', ['core=lstm', pytest.param('core=transformer', marks=pytest.mark.slow)]
)
def test_the_gradient_of_parts_is_that_of_the_batch(word, parts):
    """With dropout too, whose masks are those of the rows."""
    config = lm.get_config(f'{word},tiny').unlock()
    config.model.layers = 2
    config.dropout.update({'word': 0.3, 'input': 0.3, 'layer': 0.3, 'output': 0.3})
    if word == 'core=lstm':
        config.dropout.state = 0.3
    else:
        config.dropout.attention = 0.3
    config.optim.name = 'sgd'
    model, optimizer = factory.build_model(config, 11), optim.make_optimizer(config.optim, 10)
    tokens = jax.random.randint(prng.key(0), (9, 4), 0, 11)
    seed, step = jnp.asarray(0), jnp.asarray(0)
    state = jax.jit(Trainer(model, optimizer, batch_size=4).init)(seed)
    results = []
    for accumulation in (1, parts):
        trainer = Trainer(model, optimizer, batch_size=4, accumulation=accumulation)
        results.append(jax.jit(trainer.step)(state, Batch(tokens, None, seed, step)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *results)


@pytest.mark.parametrize(
    'preset', ['tiny', pytest.param('core=transformer,tiny', marks=pytest.mark.slow)]
)
def test_the_optimizer_updates_its_donated_state_in_place(preset):
    config = lm.get_config(preset).unlock()
    config.seeds = (0,)
    seeds, mesh = np.asarray(config.seeds, np.int32), sharding.make_mesh(1, config.train.batch)
    optimizer = optim.make_optimizer(config.optim, config.train.steps)
    trainer = Trainer(factory.build_model(config, 64), optimizer, config.train.batch)
    state = trainer.shapes(seeds, mesh)
    batch = trainer.batch_shapes(seeds, config.train.length, mesh)
    text = trainer.compile(state, batch, mesh).as_text()
    moments = re.findall(r'(copy\()?%state_opt_state\w*__[mn]u__', text)
    assert len(moments) > 10 and not any(moments)


def test_the_initial_state_is_traced_once(monkeypatch):
    """Its shapes and its values share a trace, which takes as long as compiling it."""
    seeds, traced, init = np.array([0, 1], np.int32), [], Trainer.init
    monkeypatch.setattr(
        Trainer, 'init', lambda trainer, seed: (traced.append(seed), init(trainer, seed))[1]
    )
    config = lm.get_config('tiny')
    trainer = factory.build_trainer(config, 11)
    state = trainer.init_seeds(seeds, sharding.make_mesh(2, config.train.batch))
    assert len(traced) == 1
    expected = jax.jit(jax.vmap(trainer.init))(seeds)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state, expected
    )


ALL = [
    (file, preset) for file in (lm, lm_enwik8, lm_ptb, lm_wikitext103) for preset in file.PRESETS
]


@pytest.mark.slow
@pytest.mark.parametrize(
    'file, preset', ALL, ids=[f'{f.__name__.rpartition(".")[2]}-{p}' for f, p in ALL]
)
def test_the_step_of_every_config_lowers_for_accelerators(file, preset):
    config = file.get_config(preset)
    lm_config.validate(config)
    vocabulary = 256 if config.data.level == 'byte' else config.data.vocabulary
    trainer = dataclasses.replace(factory.build_trainer(config, vocabulary), accumulation=1)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    state = jax.eval_shape(trainer.init, number)
    shape = config.train.length + 1, config.train.batch
    batch = Batch(jax.ShapeDtypeStruct(shape, jnp.int32), None, seed=number, step=number)
    exported = jax.export.export(jax.jit(trainer.step), platforms=['cuda', 'tpu'])(state, batch)
    assert exported.platforms == ('cuda', 'tpu')
