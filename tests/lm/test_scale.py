"""Devices, parts of a batch and blocks made anew change what a step costs, and not what it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import lm, lm_enwik8, lm_ptb, lm_wikitext103
from mi.lm import config as lm_config
from mi.lm import factory, train
from mi.training import optim
from tests.conftest import printed_on_devices


@pytest.mark.slow
@pytest.mark.parametrize('core', ['lstm', 'transformer'])
def test_the_losses_are_the_same_on_1_2_and_4_devices_and_with_split_parameters(texts, core):
    found = printed_on_devices(4, 'tests.lm.devices', core, texts)
    for how in found.values():
        np.testing.assert_allclose(how['nats'], found['one']['nats'], rtol=2e-4)
        np.testing.assert_allclose(how['norms'], found['one']['norms'], rtol=1e-3)
    assert not found['one']['split'] and not found['four']['split']
    for name in ('seeds', 'split', 'all', 'parts'):
        assert found[name]['split'], name


@pytest.mark.parametrize('word', ['core=lstm', 'core=transformer'])
def test_the_gradient_of_parts_is_that_of_the_batch(word):
    """With dropout too, whose masks are those of the rows."""
    config = lm.get_config(f'{word},tiny').unlock()
    config.dropout.update({'word': 0.3, 'input': 0.3, 'layer': 0.3, 'output': 0.3})
    if word == 'core=lstm':
        config.dropout.state = 0.3
    else:
        config.dropout.attention = 0.3
    config.optim.name = 'sgd'
    model, optimiser = factory.build(config, 11), optim.make_optimizer(config.optim, 10)
    tokens = jax.random.randint(jax.random.key(0), (9, 4), 0, 11)
    after = []
    for parts in (1, 2, 4):
        state = train.init(model, optimiser, jnp.asarray(0), 4)
        step = jax.jit(lambda *a, parts=parts: train.train_step(model, optimiser, parts, *a, None))
        after.append(step(state, jnp.asarray(0), jnp.asarray(0), tokens))
    for other in after[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), after[0], other
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
    model, optimiser = factory.build(config, vocabulary), optim.make_optimizer(config.optim, 20)
    seed = jnp.asarray(0)
    state = jax.eval_shape(lambda: train.init(model, optimiser, seed, config.train.batch))
    shape = config.train.length + 1, config.train.batch
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    step = jax.jit(lambda *args: train.train_step(model, optimiser, 1, *args, None))
    exported = jax.export.export(step, platforms=['cuda', 'tpu'])(state, seed, seed, tokens)
    assert exported.platforms == ('cuda', 'tpu')
