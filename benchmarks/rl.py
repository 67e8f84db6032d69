"""A comparison of the RL trainer with plain loops and RLlib, in environment steps per second.

    pip install -e '.[benchmark]' && python -m benchmarks.rl

    xland     30 tasks, topology 'fused', LSTM-128, B = 128, T = 20: every fusion at the read-out,
              and the plain fused loop with concat and with full mi
    babyai    4 levels, topology 'threads', instructions concatenated to observations or fused by
              full mi, against the plain loop and RLlib
    pong      the convolutions of DQN, topology 'threads', against the plain loop and RLlib
    parts     each part of a fused update, compiled and timed alone
    seeds     for a GPU: xland with 4,096 environments, one or eight seeds in a program
    conv      an update with the convolutions of DQN, against PyTorch's forward and backward pass of
              the convolutions alone. XLA's CPU backend is many times slower at them inside a scan

The sides take turns (`benchmarks.rounds`). Between its turns, a side with actor threads is stopped,
so that every step that it learns from is made on its clock. The peers are in `benchmarks.plain_rl`
and `benchmarks.rllib`. The table shows medians over the rounds, and the median over rounds of the
ratio to the peer.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from benchmarks import babyai, options, rounds
from configs import rl as configs
from mi.rl import envs, factory, learner
from mi.rl.actors import loop as actors_loop
from mi.rl.actors.worker import concatenate_trajectories
from mi.rl.agent import Carry, Inputs
from mi.rl.envs import auto_reset
from mi.rl.fused import loop as fused
from mi.rl.fused import rollout
from mi.rl.trajectory import Trajectory
from mi.training import host, optim, run_mesh, sharding

ROUNDS = options.define_rounds()
ONLY = options.define_only('Sets for this device')
SIDE = options.define_side()
JSON = options.define_json()

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


def make_config(set_name: str) -> ml_collections.ConfigDict:
    """Return the config of a set."""
    config = configs.get_config().unlock()
    if set_name == 'xland':
        config.model.sites = ('readout',)  # where the plain loop has its fusion
    elif set_name == 'babyai':
        config.update_from_flattened_dict(babyai.SETTINGS | {'model.fusion.name': 'concat'})
    elif set_name == 'seeds':
        config.train.batch = 4096
    elif set_name in ('pong', 'conv'):
        config.env.name = 'atari/Pong'
        config.model.update({'core': 'none', 'sites': (), 'features': 512})
        config.train.update({'topology': 'threads', 'batch': 64})
        config.actors.batch = 32
    return config


def count_steps(set_name: str, side: str) -> int:
    """Return the environment steps per update over all seeds."""
    config = make_config(set_name)
    num_seeds = int(side.split()[0]) if set_name == 'seeds' else 1
    return config.train.batch * config.train.length * num_seeds


def compile_fused(
    config: ml_collections.ConfigDict,
) -> tuple[jax.stages.Compiled, Callable[[], object]]:
    """Return the compiled update of the topology 'fused', and a function that runs it."""
    environment = envs.make(config.env.name)
    agent = factory.build_agent(config, environment.spec)
    optimizer = optim.make_optimizer(config.optim, 1000)
    mesh = run_mesh.make_run_mesh(config)
    train_state = fused.init_states(config, environment, agent, optimizer, mesh)
    update = fused.make_update(config, environment, agent, optimizer)
    compiled_update = fused.compile_updates(update, train_state, 1, mesh)

    def step() -> None:
        nonlocal train_state
        train_state, metrics = compiled_update(train_state)
        jax.block_until_ready(metrics)

    return compiled_update, step


def threads_step(config: ml_collections.ConfigDict) -> Callable[[], object]:
    """Return a function that runs an update of the topology 'threads', with running actors.

    It dispatches the update and returns its metrics without waiting for them, like the trainer.
    """
    pool = envs.pool(config.env.name, config.actors.batch, 0)
    agent = factory.build_agent(config, pool.spec)
    optimizer = optim.make_optimizer(config.optim, 1000)
    pool.close()
    mesh = sharding.make_mesh(1, config.train.batch)
    learner_state = actors_loop.init_state(agent, optimizer, 0, mesh)
    update = actors_loop.jit_update(agent, optimizer, factory.get_hyperparameters(config), mesh)
    actors = actors_loop.start_actors(config, agent, learner_state.params, 0)
    actors.__enter__()
    version, window = 0, actors_loop.Window()

    def step() -> dict[str, jax.Array]:
        nonlocal learner_state, version
        items = actors_loop.take_batch(config, actors, version, window)
        learner_state, metrics = update(
            learner_state, concatenate_trajectories([item.trajectory for item in items])
        )
        version += 1
        actors.publish(learner_state.params, version)
        return metrics

    return step


def parts_step(config: ml_collections.ConfigDict, part_name: str) -> Callable[[], object]:
    """Return a function that runs a part of an update: 'environment', 'policy' or 'learning'."""
    # Initialize environments, agent and learner.
    environment = envs.make(config.env.name)
    agent = factory.build_agent(config, environment.spec)
    optimizer = optim.make_optimizer(config.optim, 1000)
    num_steps, batch_size = config.train.length, config.train.batch
    init_state = functools.partial(fused.init_state, environment, agent, optimizer, batch_size)
    train_state = jax.jit(init_state)(jnp.asarray(0))
    params = train_state.learner.params

    env_step = jax.vmap(functools.partial(auto_reset.step, environment))

    def simulate(actor_state: rollout.ActorState) -> chex.ArrayTree:
        def step(env_state: chex.ArrayTree, step_key: chex.PRNGKey) -> chex.ArrayTree:
            action = jax.random.randint(step_key, (batch_size,), 0, environment.spec.actions)
            return env_step(env_state, action)

        step_keys = jax.random.split(jax.random.key(0), num_steps)
        return jax.lax.scan(step, actor_state.environment, step_keys)

    def act(actor_state: rollout.ActorState, inputs: Inputs) -> chex.ArrayTree:
        def step(
            carry: Carry, timestep: tuple[chex.PRNGKey, Inputs]
        ) -> tuple[Carry, tuple[chex.Array, chex.Array]]:
            step_key, inputs = timestep
            carry, action, log_prob = rollout.act(agent, params, carry, inputs, step_key)
            return carry, (action, log_prob)

        step_keys = jax.random.split(jax.random.key(0), num_steps)
        return jax.lax.scan(step, actor_state.carry, (step_keys, inputs))

    # Unroll a trajectory for the policy and the learner.
    unroll = functools.partial(rollout.unroll, environment, agent, num_steps)
    _, trajectory, *_ = jax.jit(unroll)(params, train_state.actor)
    policy_inputs = jax.tree.map(lambda array: array[:-1], trajectory.inputs)
    hyperparameters = factory.get_hyperparameters(config)
    update = functools.partial(learner.update, agent, optimizer, hyperparameters)
    part_calls: dict[str, Callable[[], object]] = {
        'environment': functools.partial(jax.jit(simulate), train_state.actor),
        'policy': functools.partial(jax.jit(act), train_state.actor, policy_inputs),
        'learning': functools.partial(jax.jit(update), train_state.learner, trajectory),
    }
    return lambda: jax.block_until_ready(part_calls[part_name]())


def conv_step(config: ml_collections.ConfigDict) -> Callable[[], object]:
    """Return a function that runs an update of the learner on random frames."""
    pool = envs.pool(config.env.name, 1, 0)
    agent = factory.build_agent(config, pool.spec)
    optimizer = optim.make_optimizer(config.optim, 1000)
    pool.close()
    batch_size = config.train.batch
    leading_axes = config.train.length + 1, batch_size
    # Draw a trajectory.
    rng = np.random.default_rng(0)
    observation = {
        name: rng.integers(0, 256 if name == 'pixels' else 1, (*leading_axes, *array.shape)).astype(
            array.dtype
        )
        for name, array in agent.spec.observation.items()
    }
    zeros = np.zeros(leading_axes, np.float32)
    never = np.zeros(leading_axes, bool)
    actions = np.zeros(leading_axes, np.int32)
    trajectory = Trajectory(
        inputs=Inputs(observation, actions, zeros, never),
        action=actions[1:],
        log_prob=zeros[1:],
        discount=1 + zeros[1:],
        valid=~never[1:],
        carry=agent.initial_carry(batch_size),
    )
    # Compile the update.
    mesh = sharding.make_mesh(1, config.train.batch)
    learner_state = actors_loop.init_state(agent, optimizer, 0, mesh)
    update = actors_loop.jit_update(agent, optimizer, factory.get_hyperparameters(config), mesh)
    return lambda: jax.block_until_ready(update(learner_state, trajectory))


def torch_convolutions(config: ml_collections.ConfigDict) -> Callable[[], object]:
    """Return a function that runs the forward and backward pass of the convolutions in torch."""
    import torch

    options.require_cpu("PyTorch's convolutions")
    convolutions = torch.nn.Sequential(
        *(torch.nn.Conv2d(4, 32, 8, 4), torch.nn.ReLU(), torch.nn.Conv2d(32, 64, 4, 2)),
        *(torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3, 1), torch.nn.ReLU()),
    )
    frames = torch.rand((config.train.length + 1) * config.train.batch, 4, 84, 84)

    def step() -> None:
        convolutions.zero_grad()
        convolutions(frames).sum().backward()

    return step


def make_step(set_name: str, side: str) -> Callable[[], object]:
    """Return a function that runs an update of a side."""
    config = make_config(set_name)
    if side.startswith('plain'):
        from benchmarks import plain_rl

        if set_name != 'xland':
            return plain_rl.host_step(config)
        return plain_rl.xland_step(config, 'mi' if side.endswith('mi') else 'concat')
    if side == 'rllib':
        from benchmarks import rllib

        return rllib.make_step(set_name, config)
    if set_name in ('babyai', 'pong'):
        config.model.fusion.name = 'mi' if side.endswith('mi') else config.model.fusion.name
        return threads_step(config)
    if set_name == 'conv':
        return conv_step(config) if side == 'update' else torch_convolutions(config)
    if set_name == 'seeds':
        num_seeds, config.model.fusion.name = side.split()
        config.seeds = tuple(range(int(num_seeds)))
        return compile_fused(config)[1]
    if side in FUSIONS:
        config.model.fusion.name = side
    if side in (*FUSIONS, 'whole'):
        return compile_fused(config)[1]
    return parts_step(config, side)


def main(argv: Sequence[str]) -> None:
    """Compare the sides of every set, or serve as one of them."""
    del argv
    if SIDE.value:
        set_name, side = SIDE.value.split('/')
        host.keep_freed_memory()
        host.set_xla_flags()
        is_slow = set_name in ('babyai', 'pong')
        rounds.serve(make_step(set_name, side), seconds=4.0 if is_slow else 1.5)
        return
    print(f'{host.describe_machine()}, jax {jax.__version__}')
    figures: list[dict[str, Any]] = []
    has_gpu = jax.default_backend() == 'gpu'
    device_sets = [set_name for set_name in SETS if (set_name == 'seeds') == has_gpu]
    selected_sets = options.select(ONLY, SETS) if ONLY.value else device_sets
    for set_name in selected_sets:
        commands = {
            side: ['-m', 'benchmarks.rl', f'--side={set_name}/{side}'] for side in SETS[set_name]
        }
        threads_sides = [side for side in commands if side.startswith('threads')]
        seconds = rounds.race(commands, ROUNDS.value, stopped=threads_sides)
        num_steps = {side: count_steps(set_name, side) for side in commands}
        for figure in rounds.print_ratios(set_name, 'steps', num_steps, seconds):
            figures.append({'set': set_name, **figure})
    peers = 'torch', 'ray', 'xminigrid'
    options.write_json(JSON.value, peers, rounds=ROUNDS.value, figures=figures)


if __name__ == '__main__':
    options.run(main)
