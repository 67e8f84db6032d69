"""DMLab-30 in the topology of the paper, without the engine."""

import jax
import jax.numpy as jnp
import numpy as np

from configs import rl_dmlab30 as configs
from experiments import rl_readout
from launch import sweep as sweeps
from mi.rl import config as rl_config
from mi.rl import factory
from mi.rl.envs.host import dmlab30
from mi.training import optim
from tests.conftest import ROOT


def test_dmlab30_has_five_engines_for_each_level_and_a_batch_for_four_gpus(tmp_path):
    config = configs.get_config()
    rl_config.validate(config)
    actors, spec = config.actors, dmlab30.make_spec()
    assert actors.number * actors.groups * actors.batch == 5 * len(spec.tasks) == 150
    assert actors.batch % len(spec.tasks) == 0  # rows of a group have the levels by turns
    assert config.train.batch % 4 == config.train.batch % actors.batch == 0
    members = sweeps.load(str(ROOT / 'experiments/rl_dmlab30.py'), tmp_path, dry=True)
    arms = {member.label: sweeps.parse_config(member.command) for member in members}
    assert not list(tmp_path.iterdir())
    assert list(arms) == [arm['label'] for arm in rl_readout.ARMS]
    for arm in arms.values():
        rl_config.validate(arm)
        assert tuple(arm.model.sites) == ('readout',) and len(arm.seeds) == 1
        agent = factory.build_agent(arm, spec)
        params = jax.eval_shape(lambda agent=agent: factory.init_params(agent, jax.random.key(0)))
        outputs = {a.shape[-1] for a in jax.tree.leaves(params['readout'])}
        assert outputs == {spec.actions + 1}


def test_rmsprop_of_dmlab30_is_that_of_a_loss_summed_over_32_rows():
    """The public code sums over a batch of 32, with ε = 0.1 under the root of TensorFlow's RMSProp.

    The average of squares starts at 1 there.
    """
    config = configs.get_config().unlock()
    optim.validate(config.optim, 3000)
    config.optim.schedule = 'constant'
    optimizer = optim.make_optimizer(config.optim, 3000)
    grads = np.random.default_rng(0).normal(size=(3000, 5)) * [1e-3, 1e-2, 0.1, 1, 10]
    params = jnp.zeros(5)

    def step(state, grad):
        updates, state = optimizer.update(grad, state, params)
        return state, updates

    scan = jax.jit(lambda state: jax.lax.scan(step, state, grads.astype(np.float32)))
    _, updates = scan(optimizer.init(params))
    square = np.ones(5)
    for update, grad in zip(updates, 32 * grads, strict=True):
        square = 0.99 * square + 0.01 * grad**2
        expected = -3.1867e-4 * grad / np.sqrt(square + 0.1)
        np.testing.assert_allclose(update, expected, rtol=1e-3)
