"""A race of the RL trainer against plain loops and RLlib, in environment steps per second.

    pip install -e '.[benchmark]' && python -m benchmarks.rl

    xland     30 tasks, topology 'fused', LSTM-128, B = 128, T = 20: every fusion at the read-out,
              and the plain fused loop with concat and with the full mi
    babyai    4 levels, topology 'threads', instructions concatenated to observations, against the
              plain loop and RLlib; and with the full mi of both
    pong      the convolutions of DQN, topology 'threads', against the plain loop and RLlib
    parts     each part of a fused update, compiled and timed alone
    seeds     for a GPU: xland with 4,096 environments, one seed or eight in a program
    conv      an update with the convolutions of DQN, against PyTorch's forward and backward pass of
              these alone: XLA's CPU backend is many times slower at them inside a scan

The sides take turns (`benchmarks.rounds`). The peers are in `benchmarks.plain_rl` and
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
from mi.rl import envs, factory, learner
from mi.rl.actors import loop as actors_loop
from mi.rl.actors.worker import concatenate_trajectories
from mi.rl.envs import auto_reset
from mi.rl.fused import loop as fused
from mi.rl.fused import rollout
from mi.rl.trajectory import Trajectory
from mi.training import host, optim, sharding

ROUNDS = flags.DEFINE_integer('rounds', 5, 'Interleaved rounds.', lower_bound=1)
ONLY = flags.DEFINE_list('only', None, 'Sets; by default all for this device.')
SIDE = flags.DEFINE_string('side', None, 'For the workers: set/side.')
JSON = flags.DEFINE_string('json', None, 'JSON file to write the figures to.')

LEVELS = 'babyai/GoToRedBallGrey,GoToLocal,PickupLoc,PutNextLocal'
FUSIONS = ('none', 'concat', 'multi_head', 'film', 'mi_low_rank', 'mi')
# Set → sides, the peer of the ratios first.
SETS = {
    'xland': ('plain concat', 'plain mi', *FUSIONS),
    'babyai': ('plain', 'rllib', 'threads', 'threads mi'),
    'pong': ('plain', 'rllib', 'threads'),
    'parts': ('whole', 'environment', 'policy', 'learning'),
    'seeds': tuple(
        f'{seeds} {name}' for name in ('concat', 'mi', 'mi_low_rank') for seeds in (1, 8)
    ),
    'conv': ('torch convolutions', 'update'),
}


def make_config(name: str) -> ml_collections.ConfigDict:
    """Return the config of a set."""
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


def count_steps(name: str, side: str) -> int:
    """Return the environment steps per update over all seeds."""
    config = make_config(name)
    seeds = int(side.split()[0]) if name == 'seeds' else 1
    return config.train.batch * config.train.length * seeds


def fused_step(config: ml_collections.ConfigDict) -> Callable[[], object]:
    """Return an update of the topology 'fused'."""
    environment = envs.make(config.env.name)
    agent, optimizer = (
        factory.build_agent(config, environment.spec),
        optim.make_optimizer(config.optim, 1000),
    )
    mesh = fused.make_mesh(config)
    state = fused.init_states(config, environment, agent, optimizer, mesh)
    update = fused.make_update(config, environment, agent, optimizer)
    compiled = fused.compile_updates(update, state, 1, mesh)

    def step() -> None:
        nonlocal state
        state, metrics = compiled(state)
        jax.block_until_ready(metrics)

    return step


def threads_step(config: ml_collections.ConfigDict) -> Callable[[], object]:
    """Return an update of the topology 'threads', with its actors running."""
    pool = envs.pool(config.env.name, config.actors.batch, 0)
    agent, optimizer = (
        factory.build_agent(config, pool.spec),
        optim.make_optimizer(config.optim, 1000),
    )
    pool.close()
    mesh = sharding.make_mesh(1, config.train.batch)
    state = actors_loop.init_state(agent, optimizer, 0, mesh)
    update = actors_loop.jit_update(agent, optimizer, factory.get_hyperparameters(config), mesh)
    actors = actors_loop.start_actors(config, agent, state.params, 0)
    actors.__enter__()
    version, window = 0, actors_loop.Window()

    def step() -> None:
        nonlocal state, version
        items = actors_loop.take_batch(config, actors, version, window)
        state, _ = update(state, concatenate_trajectories([item.trajectory for item in items]))
        version += 1
        actors.publish(state.params, version)

    return step


def parts_step(config: ml_collections.ConfigDict, part: str) -> Callable[[], object]:
    """Return one part of an update: environment, policy or learning."""
    # Initialize environments, agent and learner.
    environment = envs.make(config.env.name)
    agent, optimizer = (
        factory.build_agent(config, environment.spec),
        optim.make_optimizer(config.optim, 1000),
    )
    init = functools.partial(fused.init_state, environment, agent, optimizer, config.train.batch)
    state = jax.jit(init)(jnp.asarray(0))
    params, T = state.learner.params, config.train.length

    env_step = jax.vmap(functools.partial(auto_reset.step, environment))

    def simulate(acting: rollout.ActorState) -> Any:
        def step(state: Any, key: jax.Array) -> Any:
            action = jax.random.randint(key, (config.train.batch,), 0, environment.spec.actions)
            return env_step(state, action)

        keys = jax.random.split(jax.random.key(0), T)
        return jax.lax.scan(step, acting.environment, keys)

    def act(acting: rollout.ActorState, inputs: Any) -> Any:
        def step(carry: Any, row: Any) -> Any:
            key, inputs = row
            carry, action, log_prob = rollout.act(agent, params, carry, inputs, key)
            return carry, (action, log_prob)

        keys = jax.random.split(jax.random.key(0), T)
        return jax.lax.scan(step, acting.carry, (keys, inputs))

    # Unroll a trajectory for the policy and the learner.
    _, trajectory, *_ = jax.jit(functools.partial(rollout.unroll, environment, agent, T))(
        params, state.actor
    )
    parts: dict[str, Callable[[], Any]] = {
        'environment': functools.partial(jax.jit(simulate), state.actor),
        'policy': functools.partial(
            jax.jit(act), state.actor, jax.tree.map(lambda a: a[:-1], trajectory.inputs)
        ),
        'learning': functools.partial(
            jax.jit(
                functools.partial(
                    learner.update, agent, optimizer, factory.get_hyperparameters(config)
                )
            ),
            state.learner,
            trajectory,
        ),
    }
    return lambda: jax.block_until_ready(parts[part]())


def conv_step(config: ml_collections.ConfigDict) -> Callable[[], object]:
    """Return a learner's update on random frames."""
    pool = envs.pool(config.env.name, 1, 0)
    agent, optimizer = (
        factory.build_agent(config, pool.spec),
        optim.make_optimizer(config.optim, 1000),
    )
    pool.close()
    T, B = config.train.length, config.train.batch
    # Draw a trajectory.
    rng = np.random.default_rng(0)
    observation = {
        name: rng.integers(0, 256 if name == 'pixels' else 1, (T + 1, B, *a.shape)).astype(a.dtype)
        for name, a in agent.spec.observation.items()
    }
    zeros = np.zeros((T + 1, B), np.float32)
    false = np.zeros((T + 1, B), bool)
    actions = np.zeros((T + 1, B), np.int32)
    trajectory = Trajectory(
        inputs=rollout.Inputs(observation, actions, zeros, false),
        action=actions[1:],
        log_prob=zeros[1:],
        discount=1 + zeros[1:],
        valid=~false[1:],
        carry=agent.initial_carry(B),
    )
    # Compile the update.
    mesh = sharding.make_mesh(1, config.train.batch)
    state = actors_loop.init_state(agent, optimizer, 0, mesh)
    update = actors_loop.jit_update(agent, optimizer, factory.get_hyperparameters(config), mesh)
    return lambda: jax.block_until_ready(update(state, trajectory))


def torch_convolutions(config: ml_collections.ConfigDict) -> Callable[[], object]:
    """Return forward and backward pass of the convolutions in torch."""
    import torch

    layers = torch.nn.Sequential(
        *(torch.nn.Conv2d(4, 32, 8, 4), torch.nn.ReLU(), torch.nn.Conv2d(32, 64, 4, 2)),
        *(torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3, 1), torch.nn.ReLU()),
    )
    frames = torch.rand((config.train.length + 1) * config.train.batch, 4, 84, 84)

    def step() -> None:
        layers.zero_grad()
        layers(frames).sum().backward()

    return step


def make_step(name: str, side: str) -> Callable[[], object]:
    """Return an update of a side."""
    config = make_config(name)
    if side.startswith('plain'):
        from benchmarks import plain_rl

        if name != 'xland':
            return plain_rl.host_step(config)
        return plain_rl.xland_step(config, 'mi' if side.endswith('mi') else 'concat')
    if side == 'rllib':
        from benchmarks import rllib

        return rllib.make_step(name, config)
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
    """Race the sides of every set, or serve as one of them."""
    del argv
    if SIDE.value:
        name, side = SIDE.value.split('/')
        host.keep_freed_memory()
        host.set_xla_flags()
        rounds.serve(make_step(name, side), seconds=4.0 if name in ('babyai', 'pong') else 1.5)
        return
    print(f'{host.describe_machine()}, jax {jax.__version__}')
    figures = []
    on_gpu = jax.default_backend() == 'gpu'
    for name in ONLY.value or [name for name in SETS if (name == 'seeds') == on_gpu]:
        # Race.
        sides = SETS[name]
        commands = {s: ['-m', 'benchmarks.rl', f'--side={name}/{s}'] for s in sides}
        seconds = rounds.race(commands, ROUNDS.value)
        # Print.
        print(f'\n{name:<20}{"ms an update":>14}{"steps/s":>12}{"× " + sides[0]:>22}  range')
        for side in sides:
            pairs = zip(seconds[sides[0]], seconds[side], strict=True)
            ratios = sorted(peer_seconds / side_seconds for peer_seconds, side_seconds in pairs)
            median, ratio = statistics.median(seconds[side]), statistics.median(ratios)
            rate = count_steps(name, side) / median
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
        record = {
            'machine': host.describe_machine(),
            'jax': jax.__version__,
            'rounds': ROUNDS.value,
        }
        with open(JSON.value, 'w') as file:
            json.dump(record | {'figures': figures}, file, indent=2)


if __name__ == '__main__':
    app.run(main)
