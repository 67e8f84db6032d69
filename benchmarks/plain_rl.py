"""Straightforward training loops, which `benchmarks.rl` compares with ours.

Loss, optimizer and sizes are the same as ours, so that the work is comparable. The loops use
XLand-MiniGrid's own step, one-hot contexts in dense products, and a textbook LSTM cell in
`nn.scan`. They encode the instruction at every step, have one group of environments, and alternate
between acting and learning.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

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
from mi.rl.agent import Carry, Inputs, Outputs, Params
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


def lstm(hidden_size: int, carry: Carry, inputs: Array, is_first: Array) -> tuple[Carry, Array]:
    """Apply a textbook LSTM along the first axis. Each episode starts from an all-zero state."""

    def step(
        cell: nn.OptimizedLSTMCell, carry: Carry, timestep: tuple[Array, Array]
    ) -> tuple[Carry, Array]:
        inputs, is_first = timestep
        carry = jax.tree.map(lambda array: jnp.where(is_first[:, None], 0.0, array), carry)
        return cell(carry, inputs)

    unroll = nn.scan(step, variable_broadcast='params', split_rngs={'params': False})
    return unroll(nn.OptimizedLSTMCell(hidden_size), carry, (inputs, is_first))


class Net(nn.Module):
    """A network that maps grid, action and reward to policy and value through an LSTM.

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
    def __call__(self, carry: Carry, inputs: Inputs) -> tuple[Carry, Outputs]:
        # Encode the observation.
        grid = inputs.observation['grid']
        one_hots = [
            jax.nn.one_hot(grid[..., channel], num_categories)
            for channel, num_categories in enumerate(self.categories)
        ]
        features = jnp.concatenate(one_hots, -1).reshape(*grid.shape[:2], -1)
        if 'features' in inputs.observation:
            features = jnp.concatenate([features, inputs.observation['features']], -1)
        for _ in range(2):
            features = nn.relu(nn.Dense(self.features)(features))
        # Encode the instruction.
        if self.vocabulary:
            tokens = inputs.observation['instruction']
            words = tokens.reshape(-1, tokens.shape[-1]).T  # [L, T · B]
            embedded = nn.Embed(self.vocabulary, InstructionEncoder.embed)(words)
            encoder_carry = (jnp.zeros((words.shape[1], InstructionEncoder.hidden)),) * 2
            _, encoder_states = lstm(InstructionEncoder.hidden, encoder_carry, embedded, words < 0)
            last_words = jnp.maximum((words > 0).sum(0) - 1, 0)
            encoding = jnp.take_along_axis(encoder_states, last_words[None, :, None], axis=0)[0]
            encoding = encoding.reshape(*tokens.shape[:-1], -1)
            features = nn.relu(nn.Dense(self.features)(jnp.concatenate([features, encoding], -1)))
        # Run the core.
        action = jax.nn.one_hot(inputs.action, self.actions)
        features = jnp.concatenate([features, action, inputs.reward[..., None]], -1)
        carry, hidden = lstm(self.hidden, carry, features, inputs.is_first)
        # Read out policy and value.
        context = jax.nn.one_hot(inputs.observation['task'], self.tasks)
        if self.fusion == 'none':
            outputs = nn.Dense(self.actions + 1)(hidden)
        elif self.fusion == 'concat':
            outputs = nn.Dense(self.actions + 1)(jnp.concatenate([hidden, context], -1))
        else:
            shape = self.tasks, self.hidden, self.actions + 1
            W = self.param('W', nn.initializers.normal(self.hidden**-0.5), shape)
            outputs = jnp.einsum('tbm,mnk,tbn->tbk', context, W, hidden)
            outputs = outputs + nn.Dense(self.actions + 1)(hidden)
            outputs = outputs + nn.Dense(self.actions + 1, use_bias=False)(context)
        # Apply PopArt's statistics.
        gain = self.param('gain', nn.initializers.ones, (self.tasks,))
        shift = self.param('shift', nn.initializers.zeros, (self.tasks,))
        task = inputs.observation['task']
        return carry, Outputs(outputs[..., :-1], gain[task] * outputs[..., -1] + shift[task])


class LoopState(NamedTuple):
    """The state of all environments and the agent between two steps."""

    time_step: TimeStep
    task: Array
    action: Array
    carry: Carry


class PlainXLand:
    """Our tasks in the environment of XLand-MiniGrid."""

    def __init__(self) -> None:
        self._environment = XLandMiniGrid()
        self._params = self._environment.default_params(
            grid_type='R1',
            height=xland.SIZE,
            width=xland.SIZE,
            view_size=xland.VIEW,
            max_steps=xland.STEPS,
        )
        tiles = {
            name: jnp.array(divmod(tile, xland.COLORS), jnp.uint8)
            for name, tile in xland.OBJECTS.items()
        }
        self._goals = jnp.stack(
            [
                GOALS[goal.kind](tile=tiles[f'{goal.paint} {goal.shape}']).encode()
                for goal in xland.TRAIN
            ]
        )
        self._tiles = jnp.stack(list(tiles.values()))

    def reset(self, reset_key: chex.PRNGKey) -> tuple[TimeStep, Array]:
        """Begin an episode of a random task and return the first time step and the task."""
        task_key, reset_key = jax.random.split(reset_key)
        task = jax.random.randint(task_key, (), 0, len(xland.TRAIN))
        rules = RuleSet(
            goal=self._goals[task], rules=EmptyRule().encode()[None], init_tiles=self._tiles
        )
        return self._environment.reset(self._params.replace(ruleset=rules), reset_key), task

    def step(
        self, time_step: TimeStep, task: Array, action: Array, reset_key: chex.PRNGKey
    ) -> tuple[TimeStep, Array, Array]:
        """Step or restart all environments, and return time steps, tasks and discounts."""
        step = jax.vmap(self._environment.step, (None, 0, 0))
        next_step = step(self._params, time_step, action)
        is_last = next_step.step_type == 2
        reset_keys = jax.random.split(reset_key, task.shape[0])
        first_step, new_task = jax.vmap(self.reset)(reset_keys)

        def where_last(first: Array, following: Array) -> Array:
            is_last_row = is_last.reshape(-1, *[1] * (first.ndim - 1))
            return jnp.where(is_last_row, first, following)

        merged = jax.tree.map(where_last, first_step, next_step).replace(reward=next_step.reward)
        return merged, jnp.where(is_last, new_task, task), jnp.where(is_last, 0.0, 1.0)


def make_inputs(time_step: TimeStep, task: Array, action: Array) -> Inputs:
    """Convert time steps of XLand-MiniGrid to inputs of the agent."""
    direction = jax.nn.one_hot(time_step.state.agent.direction, 4)
    has_object = (time_step.state.agent.pocket[:, :1] > 0).astype(jnp.float32)
    features = jnp.concatenate([direction, has_object], -1)
    observation = {'grid': time_step.observation, 'features': features, 'task': task}
    return Inputs(observation, action, time_step.reward, time_step.step_type == 0)


def act(
    network: Net, params: Params, carry: Carry, inputs: Inputs, action_key: chex.PRNGKey
) -> tuple[Carry, Array, Array]:
    """Return the next carry, the actions [B] and their log-probabilities [B]."""
    carry, outputs = network.apply(
        {'params': params}, carry, jax.tree.map(lambda array: array[None], inputs)
    )
    logits = outputs.logits[0]
    action = jax.random.categorical(action_key, logits).astype(jnp.int32)
    return carry, action, compute_log_prob(logits, action)


def make_xland_update(
    config: ml_collections.ConfigDict, fusion: Literal['concat', 'mi']
) -> tuple[Callable[..., Any], tuple[learner.LearnerState, LoopState, chex.PRNGKey]]:
    """Return an update of the plain fused loop on our tasks, and its initial arguments.

    The update maps learner state, loop state and random key to the next states and the loss.
    """
    batch_size, num_steps = config.train.batch, config.train.length
    environment = PlainXLand()
    network = Net(len(xland.TRAIN), 6, config.model.features, config.model.hidden, fusion)
    optimizer = optim.make_optimizer(config.optim, 1000)
    hyperparameters = factory.get_hyperparameters(config)

    def step(
        params: Params, loop_state: LoopState, step_key: chex.PRNGKey
    ) -> tuple[LoopState, tuple[Inputs, Array, Array, Array]]:
        time_step, task, action, carry = loop_state
        inputs = make_inputs(time_step, task, action)
        action_key, reset_key = jax.random.split(step_key)
        carry, action, log_prob = act(network, params, carry, inputs, action_key)
        time_step, task, discount = environment.step(time_step, task, action, reset_key)
        loop_state = LoopState(time_step, task, action, carry)
        return loop_state, (inputs, action, log_prob, discount)

    def update(
        learner_state: learner.LearnerState, loop_state: LoopState, unroll_key: chex.PRNGKey
    ) -> tuple[learner.LearnerState, LoopState, Array]:
        # Unroll a trajectory.
        initial_carry = loop_state.carry
        scanned = functools.partial(step, learner_state.params)
        step_keys = jax.random.split(unroll_key, num_steps)
        loop_state, (inputs, *transitions) = jax.lax.scan(scanned, loop_state, step_keys)
        last_inputs = make_inputs(*loop_state[:3])
        inputs = jax.tree.map(
            lambda array, last_array: jnp.concatenate([array, last_array[None]]),
            inputs,
            last_inputs,
        )
        is_valid = jnp.ones((num_steps, batch_size), bool)
        trajectory = Trajectory(inputs, *transitions, is_valid, initial_carry)
        # Learn from it.
        learner_state, metrics = learner.update(
            network,  # type: ignore[arg-type]
            optimizer,
            hyperparameters,
            learner_state,
            trajectory,
        )
        return learner_state, loop_state, metrics['loss']

    # Initialize.
    with jax.numpy_rank_promotion('allow'):
        reset_all = jax.jit(jax.vmap(environment.reset))
        time_step, task = reset_all(jax.random.split(jax.random.key(0), batch_size))
        # Two buffers, because the state is donated.
        carry = tuple(jnp.zeros((batch_size, config.model.hidden)) for _ in range(2))
        loop_state = LoopState(time_step, task, jnp.zeros(batch_size, jnp.int32), carry)
        inputs = jax.tree.map(lambda array: array[None], make_inputs(*loop_state[:3]))
        params = jax.jit(network.init)(jax.random.key(1), carry, inputs)['params']
        learner_state = learner.init_learner_state(params, optimizer, len(xland.TRAIN))
    return update, (learner_state, loop_state, jax.random.key(0))


def xland_step(
    config: ml_collections.ConfigDict, fusion: Literal['concat', 'mi']
) -> Callable[[], object]:
    """Return a function that runs an update of the plain fused loop on our tasks."""
    update, arguments = make_xland_update(config, fusion)
    learner_state, loop_state, _ = arguments
    with jax.numpy_rank_promotion('allow'):
        jitted = jax.jit(update, donate_argnums=(0, 1))
        compiled = jitted.lower(*arguments).compile()
    update_keys = iter(jax.random.split(jax.random.key(2), 100_000))

    def run_update() -> None:
        nonlocal learner_state, loop_state
        learner_state, loop_state, loss = compiled(learner_state, loop_state, next(update_keys))
        jax.block_until_ready(loss)

    return run_update


def host_step(config: ml_collections.ConfigDict) -> Callable[[], object]:
    """Return a function that runs an update of the plain loop on host environments.

    Pixel environments use our network.
    """
    batch_size, num_steps = config.train.batch, config.train.length
    # Make environments, agent and learner.
    pool = envs.pool(config.env.name, batch_size, 0)
    agent: Any = factory.build_agent(config, pool.spec)
    carry = agent.initial_carry(batch_size)
    if pool.spec.vocabulary:
        agent = Net(
            tasks=len(pool.spec.tasks),
            actions=pool.spec.actions,
            features=config.model.features,
            hidden=config.model.hidden,
            fusion='none',
            categories=pool.spec.categories,
            vocabulary=pool.spec.vocabulary,
        )
        carry = (jnp.zeros((batch_size, config.model.hidden)),) * 2
    optimizer = optim.make_optimizer(config.optim, 1000)
    hyperparameters = factory.get_hyperparameters(config)
    update = jax.jit(functools.partial(learner.update, agent, optimizer, hyperparameters))
    policy = jax.jit(functools.partial(rollout.act, agent))
    # Initialize them.
    time_step, action = pool.reset(), np.zeros(batch_size, np.int32)
    inputs = Inputs(time_step.observation, action, time_step.reward, time_step.is_first)
    unroll_inputs = jax.tree.map(lambda array: jnp.asarray(array)[None], inputs)
    params = jax.jit(agent.init)(jax.random.key(0), carry, unroll_inputs)['params']
    learner_state = learner.init_learner_state(params, optimizer, len(pool.spec.tasks))
    act_keys = iter(jax.random.split(jax.random.key(2), 1_000_000))

    def run_update() -> None:
        nonlocal learner_state, time_step, action, carry
        # Collect a trajectory, whose last inputs bootstrap.
        initial_carry, unroll, transitions = carry, [], []
        for time_index in range(num_steps + 1):
            inputs = Inputs(time_step.observation, action, time_step.reward, time_step.is_first)
            unroll.append(jax.tree.map(np.array, inputs))
            if time_index == num_steps:
                break
            carry, sampled, log_prob = policy(learner_state.params, carry, inputs, next(act_keys))
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
