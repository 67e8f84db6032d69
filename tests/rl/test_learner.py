import functools
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import rl as configs
from mi.rl import envs, factory, learner
from mi.rl.fused import rollout
from mi.rl.trajectory import Trajectory
from mi.training import averaging, optim, sharding
from tests import prng
from tests.conftest import ROOT, forced

COPIES = [
    {'ema': 0.5},
    {'name': 'optax.contrib:schedule_free_sgd'},
]  # optimizers with copies of parameters


def parts(**changes):
    config = configs.get_config('tiny').unlock()
    config.update_from_flattened_dict(changes)
    environment = envs.make(config.env.name)
    agent = factory.build_agent(config, environment.spec)
    return config, environment, agent, optim.make_optimizer(config.optim, 100)


@pytest.mark.slow
def test_the_update_lowers_for_accelerators():
    config, environment, agent, optimiser = parts()
    B, T = config.train.batch, config.train.length
    state = jax.eval_shape(
        lambda: learner.init_learner_state(factory.init_params(agent, prng.key(0)), optimiser, 30)
    )
    carry = jax.eval_shape(lambda: agent.initial_carry(B))
    inputs = factory.make_input_shapes(environment.spec, T + 1, B)
    rows = [inputs.action, inputs.reward, inputs.reward, inputs.is_first]
    rows = [jax.ShapeDtypeStruct((T, B), a.dtype) for a in rows]
    update = functools.partial(
        learner.update, agent, optimiser, factory.get_hyperparameters(config)
    )
    exported = jax.export.export(jax.jit(update), platforms=['cuda', 'tpu'])(
        state, Trajectory(inputs, *rows, carry)
    )
    assert exported.platforms == ('cuda', 'tpu')


def test_the_learner_at_a_fused_read_out_is_on_the_policy_that_acted():
    """With equal parameters all ratios of V-trace are 1, so it clips nothing and weighs nothing."""
    config, environment, agent, _ = parts(
        **{'env.name': 'catch', 'model.source': 'state', 'model.sites': ('readout',)}
    )
    params = factory.init_params(agent, prng.key(0))
    actor = rollout.init_actor_state(environment, agent, config.train.batch, prng.key(1))
    _, trajectory, _, _ = rollout.unroll(environment, agent, 20, params, actor)
    assert trajectory.inputs.is_first[1:].any()  # with an episode's start on the way

    def rate(params):
        _, outputs = agent.apply({'params': params}, trajectory.carry, trajectory.inputs)
        log_pi = jax.nn.log_softmax(outputs.logits[:-1])
        return jnp.take_along_axis(log_pi, trajectory.action[..., None], -1)[..., 0]

    np.testing.assert_allclose(jax.jit(rate)(params), trajectory.log_prob, rtol=1e-5, atol=1e-5)
    other = params | {'readout': jax.tree.map(lambda a: 2 * a + 0.1, params['readout'])}
    assert (abs(jax.jit(rate)(other) - trajectory.log_prob) > 1e-4).any()


@pytest.mark.parametrize(
    'order', ['gradient_first', pytest.param('statistics_first', marks=pytest.mark.slow)]
)
@pytest.mark.parametrize('settings', COPIES)
def test_popart_rescales_the_copies_of_the_parameters(settings, order):
    """With no learning, all copies stay equal, gain and shift in the new units among them."""
    settings = {f'optim.{key}': value for key, value in settings.items()}
    config, environment, agent, optimizer = parts(
        **{'env.name': 'catch', 'loss.popart': 0.5, 'loss.popart_order': order},
        **{'optim.learning_rate': 1e-30, **settings},
    )
    params = factory.init_params(agent, prng.key(0))
    state = learner.init_learner_state(params, optimizer, len(environment.spec.tasks))
    actor = rollout.init_actor_state(environment, agent, config.train.batch, prng.key(1))
    _, trajectory, _, _ = rollout.unroll(environment, agent, 20, params, actor)
    hyperparameters = factory.get_hyperparameters(config)
    update = functools.partial(learner.update, agent, optimizer, hyperparameters)
    state, _ = jax.jit(update)(state, trajectory)

    assert abs(float(state.params['shift'][0])) > 1e-2  # the statistics have moved
    eval_params = averaging.get_eval_params(state.opt_state, state.params)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        eval_params,
        state.params,
    )


def test_numbers_of_a_sweep_replace_those_of_the_config():
    settings = {'env.name': 'catch', 'loss.entropy_cost': 0.3, 'optim.learning_rate': 0.02}
    config, environment, agent, optimizer = parts(**settings)
    *_, other_optimizer = parts(**{'env.name': 'catch', 'optim.learning_rate': 1e-4})
    params = factory.init_params(agent, prng.key(0))
    state = learner.init_learner_state(params, optimizer, len(environment.spec.tasks))
    actor = rollout.init_actor_state(environment, agent, config.train.batch, prng.key(1))
    _, trajectory, _, _ = rollout.unroll(environment, agent, 20, params, actor)
    hyperparameters = factory.get_hyperparameters(config)
    other_hyperparameters = hyperparameters._replace(entropy_cost=0.0)
    numbers = factory.get_swept_numbers(config, 100, sharding.make_mesh(1, config.train.batch))

    @jax.jit
    def update(state, trajectory, numbers):
        bound = learner.bind_numbers(other_optimizer, other_hyperparameters, numbers)
        return learner.update(agent, *bound, state, trajectory)

    expected = jax.jit(functools.partial(learner.update, agent, optimizer, hyperparameters))(
        state, trajectory
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7),
        update(state, trajectory, numbers),
        expected,
    )
    no_cost = update(state, trajectory, numbers._replace(entropy_cost=jnp.float32(0)))
    assert abs(no_cost[1]['loss'] - expected[1]['loss']) > 1e-3  # the entropy counts


MESH = """
import json, sys
import jax
from tests.rl.test_learner import parts
from mi.rl.fused import loop as fused
from mi.training import run_mesh

config, environment, agent, optimiser = parts(seeds=(0, 1))
config.train.mesh = json.loads(sys.argv[1])
mesh = run_mesh.make_run_mesh(config)
state = fused.init_states(config, environment, agent, optimiser, mesh)
update_once = fused.make_update(config, environment, agent, optimiser)
update = fused.compile_updates(update_once, state, 3, mesh)
for _ in range(2):
    state, measured = jax.block_until_ready(update(state))
rows = state.actor.episode_return.sharding.shard_shape(state.actor.episode_return.shape)
print(json.dumps({
    'rows': rows,
    'loss': measured.learner['loss'].tolist(),
    'mu': state.learner.statistics.mu.tolist(),
    'params': [float(abs(a).sum()) for a in jax.tree.leaves(state.learner.params)],
    'episodes': measured.episodes.number.sum().tolist(),
    'transitions': measured.counts.transitions.tolist(),
    'positions': state.actor.environment.env_state.y.tolist(),
}))
"""


def on_devices(*shape):
    count = math.prod(shape)
    done = subprocess.run(
        [sys.executable, '-c', MESH, json.dumps(shape)],
        cwd=ROOT,
        env={
            'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': forced(count),
            'PATH': '',
            'PYTHONPATH': str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(1, 2, 1), (2, 1, 1), (2, 2, 1)])
def test_seeds_and_environments_split_over_devices_learn_the_same(shape):
    """PopArt's statistics too: the tasks of all devices count."""
    one, several = on_devices(1, 1, 1), on_devices(*shape)
    assert one.pop('rows') == [2, 8]
    assert several.pop('rows') == [2 // shape[0], 8 // shape[1]]
    assert one['positions'] == several['positions']
    assert one['episodes'] == several['episodes']
    assert one['transitions'] == several['transitions'] == [3 * 8 * 5] * 2
    for name in ('loss', 'mu', 'params'):
        np.testing.assert_allclose(one[name], several[name], rtol=2e-4, atol=1e-6)
