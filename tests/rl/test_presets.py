"""The presets of configs/rl.py: each is valid, and has an agent for its environment."""

import jax
import pytest

from configs import rl as configs
from mi.rl import config as rl_config
from mi.rl import envs, factory

ON_THE_HOST = {
    'cartpole': ('gymnasium', ('CartPole-v1',)),
    'acrobot': ('gymnasium', ('Acrobot-v1',)),
    'pong': ('envpool', ('Pong',)),
    'babyai_goto': ('envpool', None),
}


@pytest.mark.parametrize('preset', configs.PRESETS)
def test_every_preset_is_valid_and_differs_from_the_defaults(preset):
    config = configs.get_config(preset)
    rl_config.validate(config)
    assert (preset == 'default') == (config.to_dict() == configs.get_config().to_dict())


@pytest.mark.parametrize('preset', ON_THE_HOST)
def test_a_preset_has_an_agent_for_its_environment(preset):
    package, tasks = ON_THE_HOST[preset]
    pytest.importorskip(package, reason=f'the extra for {package} is not installed')
    config = configs.get_config(preset)
    pool = envs.pool(config.env.name, config.actors.batch, seed=0)
    try:
        spec = pool.spec
    finally:
        pool.close()
    assert spec.tasks == tasks or (tasks is None and all(t.startswith('GoTo') for t in spec.tasks))
    agent = factory.build_agent(config, spec)
    params = jax.eval_shape(lambda: factory.init_params(agent, jax.random.key(0)))
    assert params['readout']['b'].shape == (spec.actions + 1,)
