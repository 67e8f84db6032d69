"""Environment steps per second of the RL trainer, against the loops one would write without it.

    pip install -e '.[benchmark]' && python -m benchmarks.rl

    xland     30 tasks, topology 'fused', LSTM-128, B = 128, T = 20: every fusion at the read-out,
              and the plain fused loop with concat and with the full mi
    babyai    4 levels, topology 'threads', instructions joined to what is seen, against the plain
              loop and RLlib; and with the full mi of both
    pong      the convolutions of DQN, topology 'threads', against the plain loop and RLlib
    parts     where the time of a fused update goes: each part compiled and timed alone
    seeds     for a GPU: xland at 4,096 environments, concat and mi, one seed and eight in a program
    conv      an update with the convolutions of DQN, against PyTorch's forward and backward pass of
              them alone: XLA's CPU backend is many times slower at them inside a scan

The sides take turns (`benchmarks.rounds`), the peers are in `benchmarks.plain_rl` and
`benchmarks.rllib`. The table has medians over the rounds, and the median of the rounds' ratios to
the peer.
"""

import functools
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags

from benchmarks import rounds
from configs import rl as configs
from mi.rl import (
    envs,
    factory,
    learner,
)
from mi.rl import (
    trajectory as rl_trajectory,
)
from mi.rl.actors import loop as actors_loop
from mi.rl.envs import auto_reset
from mi.rl.fused import loop as fused
from mi.rl.fused import rollout
from mi.training import host, optim, sharding

ROUNDS = flags.DEFINE_integer('rounds', 5, 'Interleaved rounds.', lower_bound=1)
ONLY = flags.DEFINE_list('only', None, 'Of the sets; by default all that this device is for.')
SIDE = flags.DEFINE_string('side', None, 'For the workers: set/side.')
JSON = flags.DEFINE_string('json', None, 'Where to write the figures too.')

LEVELS = 'babyai/GoToRedBallGrey,GoToLocal,PickupLoc,PutNextLocal'
FUSIONS = ('none', 'concat', 'multi_head', 'film', 'mi_low_rank', 'mi')
# Set → sides, the peer of the ratios first.
SETS = {
    'xland': ('plain concat', 'plain mi', *FUSIONS),
    'babyai': ('plain', 'rllib', 'threads', 'threads mi'),
    'pong': ('plain', 'rllib', 'threads'),
    'parts': ('whole', 'environment', 'policy', 'learning'),
    'seeds': tuple(
        f'{seeds} {word}' for word in ('concat', 'mi', 'mi_low_rank') for seeds in (1, 8)
    ),
    'conv': ('torch convolutions', 'update'),
}


def config_of(name: str) -> ml_collections.ConfigDict:
    """The config of a set."""
    config = configs.get_config().unlock()
    if name == 'xland':
        config.model.sites = ('readout',)  # where the plain loop has its fusion
    elif name == 'babyai':
        config.env.name = LEVELS
        config.model.update({'instruction': True, 'sites': ('instruction',)})
        config.model.fusion.name = 'concat'
        config.train.topology = 'threads'
    elif name == 'seeds':
        config.train.batch = 4096
    elif name in ('pong', 'conv'):
        config.env.name = 'atari/Pong'
        config.model.update({'core': 'none', 'sites': (), 'features': 512})
        config.train.update({'topology': 'threads', 'batch': 64})
        config.actors.batch = 32
    return config


def steps_of(name: str, side: str) -> int:
    """Environment steps of an update, of all seeds."""
    config = config_of(name)
    seeds = int(side.split()[0]) if name == 'seeds' else 1
    return config.train.batch * config.train.length * seeds


def fused_step(config: ml_collections.ConfigDict) -> Callable[[], object]:
    """One update of the topology 'fused'."""
    environment = envs.make(config.env.name)
    agent, optimiser = factory.agent(config, environment.spec), optim.optimiser(config.optim, 1000)
    mesh = fused.mesh_of(config)
    state = fused.start(config, environment, agent, optimiser, mesh)
    compiled = fused.compile_updates(environment, agent, optimiser, config, state, 1, mesh)

    def once() -> None:
        nonlocal state
        state, measured = compiled(state)
        jax.block_until_ready(measured)

    return once


def threads_step(config: ml_collections.ConfigDict) -> Callable[[], object]:
    """One update of the topology 'threads', its actors at work."""
    pool = envs.pool(config.env.name, config.actors.batch, 0)
    agent, optimiser = factory.agent(config, pool.spec), optim.optimiser(config.optim, 1000)
    pool.close()
    mesh = sharding.mesh(1, config.train.batch)
    state = actors_loop.start(agent, optimiser, 0, mesh)
    update = actors_loop.learner_update(agent, optimiser, factory.hyperparameters(config), mesh)
    actors = actors_loop.start_actors(config, agent, state.params, 0)
    actors.__enter__()
    version, window = 0, actors_loop.Window()

    def once() -> None:
        nonlocal state, version
        items = actors_loop.take(config, actors, version, window)
        state, _ = update(state, actors_loop.joined([item.trajectory for item in items]))
        version += 1
        actors.publish(state.params, version)

    return once


def parts_step(config: ml_collections.ConfigDict, part: str) -> Callable[[], object]:
    """What one update does of the environment, the policy and the learning, each alone."""
    environment = envs.make(config.env.name)
    agent, optimiser = factory.agent(config, environment.spec), optim.optimiser(config.optim, 1000)
    start = functools.partial(fused.init, environment, agent, optimiser, config.train.batch)
    state = jax.jit(start)(jnp.asarray(0))
    params, T = state.learner.params, config.train.length

    env_step = jax.vmap(functools.partial(auto_reset.step, environment))

    def simulate(acting: rollout.State) -> Any:
        def step(state: Any, key: jax.Array) -> Any:
            action = jax.random.randint(key, (config.train.batch,), 0, environment.spec.actions)
            return env_step(state, action)

        keys = jax.random.split(jax.random.key(0), T)
        return jax.lax.scan(step, acting.environment, keys)

    def act(acting: rollout.State, inputs: Any) -> Any:
        def step(carry: Any, row: Any) -> Any:
            key, inputs = row
            carry, action, log_prob = rollout.act(agent, params, carry, inputs, key)
            return carry, (action, log_prob)

        keys = jax.random.split(jax.random.key(0), T)
        return jax.lax.scan(step, acting.carry, (keys, inputs))

    h = factory.hyperparameters(config)
    _, trajectory, *_ = jax.jit(functools.partial(rollout.unroll, environment, agent, T))(
        params, state.actor
    )
    work: dict[str, Callable[[], Any]] = {
        'environment': functools.partial(jax.jit(simulate), state.actor),
        'policy': functools.partial(
            jax.jit(act), state.actor, jax.tree.map(lambda a: a[:-1], trajectory.inputs)
        ),
        'learning': functools.partial(
            jax.jit(functools.partial(learner.update, agent, optimiser, h)),
            state.learner,
            trajectory,
        ),
    }
    return lambda: jax.block_until_ready(work[part]())


def conv_step(config: ml_collections.ConfigDict) -> Callable[[], object]:
    """A learner's update on random frames."""
    pool = envs.pool(config.env.name, 1, 0)
    agent, optimiser = factory.agent(config, pool.spec), optim.optimiser(config.optim, 1000)
    pool.close()
    T, B = config.train.length, config.train.batch
    rng = np.random.default_rng(0)
    observation = {
        name: rng.integers(0, 256 if name == 'pixels' else 1, (T + 1, B, *a.shape)).astype(a.dtype)
        for name, a in agent.spec.observation.items()
    }
    no, zero = np.zeros((T + 1, B), bool), np.zeros((T + 1, B), np.float32)
    inputs: Any = rollout.Inputs(observation, no.astype(np.int32), zero, no)
    rows: Any = zero[1:].astype(np.int32), zero[1:], 1 + zero[1:], ~no[1:]
    trajectory = rl_trajectory.Trajectory(inputs, *rows, agent.initial_carry(B))
    mesh = sharding.mesh(1, config.train.batch)
    state = actors_loop.start(agent, optimiser, 0, mesh)
    update = actors_loop.learner_update(agent, optimiser, factory.hyperparameters(config), mesh)
    return lambda: jax.block_until_ready(update(state, trajectory))


def torch_convolutions(config: ml_collections.ConfigDict) -> Callable[[], object]:
    import torch

    layers = torch.nn.Sequential(
        *(torch.nn.Conv2d(4, 32, 8, 4), torch.nn.ReLU(), torch.nn.Conv2d(32, 64, 4, 2)),
        *(torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3, 1), torch.nn.ReLU()),
    )
    frames = torch.rand((config.train.length + 1) * config.train.batch, 4, 84, 84)

    def once() -> None:
        layers.zero_grad()
        layers(frames).sum().backward()

    return once


def step_of(name: str, side: str) -> Callable[[], object]:
    config = config_of(name)
    if side.startswith('plain'):
        from benchmarks import plain_rl

        if name != 'xland':
            return plain_rl.host_step(config)
        return plain_rl.xland_step(config, 'mi' if side.endswith('mi') else 'concat')
    if side == 'rllib':
        from benchmarks import rllib

        return rllib.step(name, config)
    if name in ('babyai', 'pong'):
        config.model.fusion.name = 'mi' if side.endswith('mi') else config.model.fusion.name
        return threads_step(config)
    if name == 'conv':
        return conv_step(config) if side == 'update' else torch_convolutions(config)
    if name == 'seeds':
        seeds, config.model.fusion.name = side.split()
        config.seeds = tuple(range(int(seeds)))
        return fused_step(config)
    if side in FUSIONS:
        config.model.fusion.name = side
    return fused_step(config) if side in (*FUSIONS, 'whole') else parts_step(config, side)


def main(argv: Sequence[str]) -> None:
    del argv
    if SIDE.value:
        name, side = SIDE.value.split('/')
        host.keep_freed_memory()
        host.set_xla_flags()
        rounds.serve(step_of(name, side), seconds=4.0 if name in ('babyai', 'pong') else 1.5)
        return
    print(f'{host.machine()}, jax {jax.__version__}')
    figures = []
    on_gpu = jax.default_backend() == 'gpu'
    for name in ONLY.value or [name for name in SETS if (name == 'seeds') == on_gpu]:
        sides = SETS[name]
        commands = {s: ['-m', 'benchmarks.rl', f'--side={name}/{s}'] for s in sides}
        seconds = rounds.race(commands, ROUNDS.value)
        print(f'\n{name:<20}{"ms an update":>14}{"steps/s":>12}{"× " + sides[0]:>22}  range')
        for side in sides:
            ratios = sorted(a / b for a, b in zip(seconds[sides[0]], seconds[side], strict=True))
            median, ratio = statistics.median(seconds[side]), statistics.median(ratios)
            rate = steps_of(name, side) / median
            print(
                f'{side:<20}{1000 * median:14.2f}{rate:12,.0f}{ratio:22.2f}  '
                f'{ratios[0]:.2f}–{ratios[-1]:.2f}',
                flush=True,
            )
            figures.append(
                {'set': name, 'side': side, 'seconds': median, 'steps_per_second': rate,
                 'ratio': ratio, 'ratios': ratios}
            )  # fmt: skip
    if JSON.value:
        record = {'machine': host.machine(), 'jax': jax.__version__, 'rounds': ROUNDS.value}
        with open(JSON.value, 'w') as file:
            json.dump(record | {'figures': figures}, file, indent=2)


if __name__ == '__main__':
    app.run(main)
