"""Straightforward training loops that `benchmarks.rl` compares ours with.

Loss, optimizer and sizes are ours, so that the work is the same. The loops use XLand-MiniGrid's own
step, one-hot contexts in dense products and the textbook LSTM cell in `nn.scan`. They encode the
instruction at every step, have one group of environments, and alternate between acting and
learning.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn
from jax import Array
from xminigrid.core import goals as kinds
from xminigrid.core.rules import EmptyRule
from xminigrid.envs.xland import XLandMiniGrid
from xminigrid.types import RuleSet, TimeStep

from mi.rl import envs, factory, learner
from mi.rl.agent import Inputs, Outputs
from mi.rl.envs.jax import xland
from mi.rl.fused import rollout
from mi.rl.instructions import InstructionEncoder
from mi.rl.trajectory import Trajectory, compute_log_prob
from mi.training import optim

GOALS = {
    'hold': kinds.AgentHoldGoal,
    'near': kinds.AgentNearGoal,
    'up': kinds.AgentNearUpGoal,
    'right': kinds.AgentNearRightGoal,
    'down': kinds.AgentNearDownGoal,
    'left': kinds.AgentNearLeftGoal,
}


def lstm(hidden: int, carry: Any, x: Array, is_first: Array) -> tuple[Any, Array]:
    """Run a textbook LSTM along the first axis; each episode starts from zeros."""

    def step(cell: nn.Module, carry: Any, row: Any) -> Any:
        x, first = row
        carry = jax.tree.map(lambda a: jnp.where(first[:, None], 0.0, a), carry)
        return cell(carry, x)

    scan = nn.scan(step, variable_broadcast='params', split_rngs={'params': False})
    return scan(nn.OptimizedLSTMCell(hidden), carry, (x, is_first))


class Net(nn.Module):
    """A network from grid, action and reward through an LSTM to policy and value.

    The task is concatenated or multiplied at the read-out. Instructions are encoded at every step
    and concatenated to the observation.
    """

    tasks: int
    actions: int
    features: int
    hidden: int
    fusion: Literal['concat', 'mi', 'none']
    categories: tuple[int, ...] = (xland.TILES, xland.COLORS)
    vocabulary: int = 0

    @nn.compact
    def __call__(self, carry: Any, inputs: Inputs) -> tuple[Any, Outputs]:
        # Encode the observation.
        grid = inputs.observation['grid']
        parts = [jax.nn.one_hot(grid[..., i], c) for i, c in enumerate(self.categories)]
        x = jnp.concatenate(parts, -1).reshape(*grid.shape[:2], -1)
        if 'features' in inputs.observation:
            x = jnp.concatenate([x, inputs.observation['features']], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(self.features)(x))
        # Encode the instruction.
        if self.vocabulary:
            tokens = inputs.observation['instruction']
            words = tokens.reshape(-1, tokens.shape[-1]).T  # [L, T · B]
            embedded = nn.Embed(self.vocabulary, InstructionEncoder.embed)(words)
            zeros = (jnp.zeros((words.shape[1], InstructionEncoder.hidden)),) * 2
            _, states = lstm(InstructionEncoder.hidden, zeros, embedded, words < 0)
            ends = jnp.maximum((words > 0).sum(0) - 1, 0)
            encoding = jnp.take_along_axis(states, ends[None, :, None], axis=0)[0]
            encoding = encoding.reshape(*tokens.shape[:-1], -1)
            x = nn.relu(nn.Dense(self.features)(jnp.concatenate([x, encoding], -1)))
        # Run the core.
        action = jax.nn.one_hot(inputs.action, self.actions)
        x = jnp.concatenate([x, action, inputs.reward[..., None]], -1)
        carry, h = lstm(self.hidden, carry, x, inputs.is_first)
        # Read out policy and value.
        z = jax.nn.one_hot(inputs.observation['task'], self.tasks)
        if self.fusion == 'none':
            y = nn.Dense(self.actions + 1)(h)
        elif self.fusion == 'concat':
            y = nn.Dense(self.actions + 1)(jnp.concatenate([h, z], -1))
        else:
            shape = self.tasks, self.hidden, self.actions + 1
            W = self.param('W', nn.initializers.normal(self.hidden**-0.5), shape)
            y = jnp.einsum('tbm,mnk,tbn->tbk', z, W, h)
            y = y + nn.Dense(self.actions + 1)(h) + nn.Dense(self.actions + 1, use_bias=False)(z)
        # Apply PopArt's statistics.
        gain = self.param('gain', nn.initializers.ones, (self.tasks,))
        shift = self.param('shift', nn.initializers.zeros, (self.tasks,))
        task = inputs.observation['task']
        return carry, Outputs(y[..., :-1], gain[task] * y[..., -1] + shift[task])


class PlainXLand:
    """Our tasks in XLand-MiniGrid's own environment.

    A state is (time step, task, action, carry).
    """

    def __init__(self) -> None:
        self._environment = XLandMiniGrid()
        self._params = self._environment.default_params(
            grid_type='R1',
            height=xland.SIZE,
            width=xland.SIZE,
            view_size=xland.VIEW,
            max_steps=xland.STEPS,
        )
        tiles = [jnp.array(divmod(t, xland.COLORS), jnp.uint8) for t in xland.OBJECTS.values()]
        names = list(xland.OBJECTS)
        self._goals = jnp.stack(
            [
                GOALS[goal.kind](tile=tiles[names.index(f'{goal.paint} {goal.shape}')]).encode()
                for goal in xland.TRAIN
            ]
        )
        self._tiles = jnp.stack(tiles)

    def reset(self, key: chex.PRNGKey) -> tuple[TimeStep, Array]:
        """Begin an episode of a random task; return its first time step and the task."""
        task_key, key = jax.random.split(key)
        task = jax.random.randint(task_key, (), 0, len(xland.TRAIN))
        rules = RuleSet(
            goal=self._goals[task], rules=EmptyRule().encode()[None], init_tiles=self._tiles
        )
        return self._environment.reset(self._params.replace(ruleset=rules), key), task

    def step(self, time_step: TimeStep, task: Array, action: Array, key: chex.PRNGKey) -> Any:
        """Step all environments; return time steps, tasks and discounts. Episodes restart."""
        step = jax.vmap(self._environment.step, (None, 0, 0))
        next_step = step(self._params, time_step, action)
        is_last = next_step.step_type == 2
        keys = jax.random.split(key, task.shape[0])
        first_step, new_task = jax.vmap(self.reset)(keys)

        def where_last(a: Array, b: Array) -> Array:
            return jnp.where(is_last.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        merged = jax.tree.map(where_last, first_step, next_step).replace(reward=next_step.reward)
        return merged, jnp.where(is_last, new_task, task), jnp.where(is_last, 0.0, 1.0)


def make_inputs(time_step: TimeStep, task: Array, action: Array) -> Inputs:
    """Return the agent's inputs at time steps of XLand-MiniGrid."""
    direction = jax.nn.one_hot(time_step.state.agent.direction, 4)
    has_object = (time_step.state.agent.pocket[:, :1] > 0).astype(jnp.float32)
    features = jnp.concatenate([direction, has_object], -1)
    observation = {'grid': time_step.observation, 'features': features, 'task': task}
    return Inputs(observation, action, time_step.reward, time_step.step_type == 0)


def make_xland_update(
    config: ml_collections.ConfigDict, fusion: Literal['concat', 'mi']
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return an update of the plain fused loop on our tasks, and its first arguments.

    The update maps learner state, actor state and key to the next states and the loss.
    """
    B, T = config.train.batch, config.train.length
    environment = PlainXLand()
    net = Net(len(xland.TRAIN), 6, config.model.features, config.model.hidden, fusion)
    optimizer = optim.make_optimizer(config.optim, 1000)
    hyperparameters = factory.get_hyperparameters(config)

    def act(params: chex.ArrayTree, key: chex.PRNGKey, carry: Any, inputs: Inputs) -> Any:
        carry, outputs = net.apply(
            {'params': params}, carry, jax.tree.map(lambda a: a[None], inputs)
        )
        logits = outputs.logits[0]
        action = jax.random.categorical(key, logits).astype(jnp.int32)
        return carry, action, compute_log_prob(logits, action)

    def step(params: chex.ArrayTree, state: Any, key: chex.PRNGKey) -> Any:
        time_step, task, action, carry = state
        inputs = make_inputs(time_step, task, action)
        action_key, reset_key = jax.random.split(key)
        carry, action, log_prob = act(params, action_key, carry, inputs)
        time_step, task, discount = environment.step(time_step, task, action, reset_key)
        return (time_step, task, action, carry), (inputs, action, log_prob, discount)

    def update(learner_state: learner.LearnerState, state: Any, key: chex.PRNGKey) -> Any:
        # Unroll a trajectory.
        carry = state[3]
        scanned = functools.partial(step, learner_state.params)
        state, (inputs, *rest) = jax.lax.scan(scanned, state, jax.random.split(key, T))
        last_inputs = make_inputs(*state[:3])
        inputs = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), inputs, last_inputs)
        trajectory = Trajectory(inputs, *rest, jnp.ones((T, B), bool), carry)
        # Learn from it.
        learner_state, metrics = learner.update(
            net,  # type: ignore[arg-type]
            optimizer,
            hyperparameters,
            learner_state,
            trajectory,
        )
        return learner_state, state, metrics['loss']

    # Initialize.
    with jax.numpy_rank_promotion('allow'):
        reset = jax.jit(jax.vmap(environment.reset))
        time_step, task = reset(jax.random.split(jax.random.key(0), B))
        carry = (jnp.zeros((B, config.model.hidden)),) * 2
        state = time_step, task, jnp.zeros(B, jnp.int32), carry
        inputs = jax.tree.map(lambda a: a[None], make_inputs(time_step, task, state[2]))
        params = jax.jit(net.init)(jax.random.key(1), carry, inputs)['params']
        learner_state = learner.init_learner_state(params, optimizer, len(xland.TRAIN))
    return update, (learner_state, state, jax.random.key(0))


def xland_step(
    config: ml_collections.ConfigDict, fusion: Literal['concat', 'mi']
) -> Callable[[], object]:
    """Return a function that runs an update of the plain fused loop on our tasks."""
    update, arguments = make_xland_update(config, fusion)
    learner_state, state, _ = arguments
    with jax.numpy_rank_promotion('allow'):
        compiled = jax.jit(update).lower(*arguments).compile()
    keys = iter(jax.random.split(jax.random.key(2), 100_000))

    def run_update() -> None:
        nonlocal learner_state, state
        learner_state, state, loss = compiled(learner_state, state, next(keys))
        jax.block_until_ready(loss)

    return run_update


def host_step(config: ml_collections.ConfigDict) -> Callable[[], object]:
    """Return an update of the plain loop on host environments; pixels use our network."""
    B, T = config.train.batch, config.train.length
    # Make environments, agent and learner.
    pool = envs.pool(config.env.name, B, 0)
    agent: Any = factory.build_agent(config, pool.spec)
    carry = agent.initial_carry(B)
    if pool.spec.vocabulary:
        spec, sizes = pool.spec, (config.model.features, config.model.hidden)
        agent = Net(len(spec.tasks), spec.actions, *sizes, 'none', spec.categories, spec.vocabulary)
        carry = (jnp.zeros((B, config.model.hidden)),) * 2
    optimizer = optim.make_optimizer(config.optim, 1000)
    hyperparameters = factory.get_hyperparameters(config)
    update = jax.jit(functools.partial(learner.update, agent, optimizer, hyperparameters))
    policy = jax.jit(functools.partial(rollout.act, agent))
    # Initialize them.
    time_step, action = pool.reset(), np.zeros(B, np.int32)
    inputs = Inputs(time_step.observation, action, time_step.reward, time_step.is_first)
    unroll_inputs = jax.tree.map(lambda a: jnp.asarray(a)[None], inputs)
    params = jax.jit(agent.init)(jax.random.key(0), carry, unroll_inputs)['params']
    learner_state = learner.init_learner_state(params, optimizer, len(pool.spec.tasks))
    keys = iter(jax.random.split(jax.random.key(2), 1_000_000))

    def run_update() -> None:
        nonlocal learner_state, time_step, action, carry
        # Collect a trajectory, whose last inputs bootstrap.
        initial_carry, unroll, transitions = carry, [], []
        for t in range(T + 1):
            inputs = Inputs(time_step.observation, action, time_step.reward, time_step.is_first)
            unroll.append(jax.tree.map(np.array, inputs))
            if t == T:
                break
            carry, sampled, log_prob = policy(learner_state.params, carry, inputs, next(keys))
            is_valid, action = ~time_step.is_last, np.asarray(sampled)
            pool.send(action)
            time_step = pool.recv()
            discount = np.array(time_step.discount)
            transitions.append((action, np.asarray(log_prob), discount, is_valid))
        stacked = [np.stack(arrays) for arrays in zip(*transitions, strict=True)]
        inputs = jax.tree.map(lambda *arrays: np.stack(arrays), *unroll)
        # Learn from it.
        trajectory = Trajectory(inputs, *stacked, initial_carry)
        learner_state, metrics = update(learner_state, trajectory)
        jax.block_until_ready(metrics)

    return run_update
