"""Prints what is evaluated on one device and on two that the rows do not divide, as JSON.

And the parameters after an update of the topologies 'threads' and 'ray' on 1, 2 and 8 devices. A
program of its own, because the number of devices is fixed when jax starts:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.uneven TEXTS
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from mi.estimate import costs
from mi.lm import factory, sample
from mi.lm.data import token_store
from mi.lm.data.token_store import Recipe
from mi.lm.evaluate import Excerpt, Reading, evaluate
from mi.rl import envs
from mi.rl import evaluate as rl_evaluate
from mi.rl import factory as rl_setup
from mi.rl.actors import loop as actors_loop
from mi.rl.fused import loop as fused
from mi.training import optim, sharding
from tests.lm.test_train import tiny as lm_tiny
from tests.rl.ramp import PARAMS, Knows, Ramp
from tests.rl.test_train import tiny as rl_tiny


class LateRamp(Ramp):
    """Episodes of the third task are longer than the spec says."""

    def step(self, state, action):
        state, transition = super().step(state, action)
        return state, transition._replace(truncated=transition.truncated & (state.task < 2))


def mesh_of(devices, batch):
    return sharding.make_mesh(1, batch, shape=(1, devices, 1), devices=jax.devices()[:devices])


def language_model(texts, devices):
    """Return nats per token of three parts of a text, and four texts that are drawn."""
    config = lm_tiny()
    corpus = token_store.load(Recipe(texts, 'byte', 256))
    model = factory.build_model(config, 256)
    row = jnp.zeros((1, 1), jnp.int32)
    params = model.init(jax.random.key(1), model.initial_carry(1), row)['params']
    params = jax.tree.map(lambda a: np.asarray(3 * a)[None], params)
    excerpt = Excerpt(corpus, 'valid', 200)
    scores = evaluate(model, params, excerpt, Reading(3, 16), mesh_of(devices, 4))
    prompt = np.arange(3, dtype=np.int32)
    local_devices = jax.devices()[:devices]
    texts = sample.generate_all(
        model, params, prompt, [0], sample.Decoding(6, num_texts=4), local_devices
    )
    return scores[0]['nats_per_token'], texts.tolist()


def agent(devices):
    """Return returns of three tasks, one episode each, and the longest episode of an unroll."""
    mesh = mesh_of(devices, 4)
    params = jax.tree.map(lambda a: jnp.asarray(a)[None], PARAMS)
    keys = rl_evaluate.make_evaluation_keys([0], 0)
    simulation = rl_evaluate.Simulation(Ramp(), Knows(), mesh)
    (played,) = rl_evaluate.play_episodes(simulation, params, keys, 1, False)

    config = rl_tiny(**{'train.batch': 4, 'train.length': 9})
    environment = LateRamp()
    net, optimizer = (
        rl_setup.build_agent(config, environment.spec),
        optim.make_optimizer(config.optim, 10),
    )
    state = fused.init_states(config, environment, net, optimizer, mesh)
    update = fused.make_update(config, environment, net, optimizer)
    compiled = fused.compile_updates(update, state, 1, mesh)
    _, measured = compiled(state)
    longest = measured.counts.longest_unfinished.tolist()
    return np.ravel(played.returns).tolist(), longest


def learner_update(devices):
    """Return the norms of the parameters after an update on a trajectory of eight rows, and μ."""
    config = rl_tiny(**{'train.batch': 8, 'loss.popart': 0.1})
    net = rl_setup.build_agent(config, envs.make(config.env.name).spec)
    optimizer, mesh = optim.make_optimizer(config.optim, 10), mesh_of(devices, 8)
    state = actors_loop.init_state(net, optimizer, 0, mesh)
    update = actors_loop.jit_update(net, optimizer, rl_setup.get_hyperparameters(config), mesh)
    shapes = costs.make_rl_setup(config).trajectory
    rng = np.random.default_rng(0)
    trajectory = jax.tree.map(
        lambda a: (
            rng.integers(0, 2, a.shape).astype(a.dtype)
            if a.dtype in (bool, np.int32)
            else rng.normal(size=a.shape).astype(a.dtype)
        ),
        shapes,
    )
    state, measured = update(state, actors_loop.shard_trajectory(trajectory, mesh))
    norms = [float(jnp.linalg.norm(a)) for a in jax.tree.leaves(state.params)]
    return norms, state.statistics.mu.tolist(), float(measured['loss'])


if __name__ == '__main__':
    evaluated = [[*language_model(sys.argv[1], n), *agent(n)] for n in (1, 2)]
    print(json.dumps([evaluated, [learner_update(n) for n in (1, 2, 8)]]))
