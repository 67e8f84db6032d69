"""The loops that `benchmarks.rl` compares us with: what one writes without this project's tricks.

Loss, optimiser and sizes are ours, so that the work is the same. What is plain: XLand-MiniGrid's
own step, one-hot contexts in dense products, the textbook LSTM cell in `nn.scan`, an instruction
encoded at every step, one group of environments, acting and learning one after the other.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

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

from mi.rl import (
    envs,
    factory,
    learner,
)
from mi.rl import (
    trajectory as rl_trajectory,
)
from mi.rl.agent import Inputs, Outputs
from mi.rl.envs.jax import xland
from mi.rl.fused import rollout
from mi.rl.instructions import InstructionEncoder
from mi.rl.trajectory import Trajectory
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
    """The textbook's LSTM along the first axis, from zeros at the first step of an episode."""

    def step(cell: nn.Module, carry: Any, row: Any) -> Any:
        x, first = row
        carry = jax.tree.map(lambda a: jnp.where(first[:, None], 0.0, a), carry)
        return cell(carry, x)

    scan = nn.scan(step, variable_broadcast='params', split_rngs={'params': False})
    return scan(nn.OptimizedLSTMCell(hidden), carry, (x, is_first))


class Net(nn.Module):
    """Grid, action and reward → LSTM → policy and value, with the task joined or multiplied.

    Where there are instructions, their encoding at every step is joined to what is seen.
    """

    tasks: int
    actions: int
    features: int
    hidden: int
    fusion: Literal['concat', 'mi', 'none']
    categories: tuple[int, ...] = (xland.TILES, xland.COLOURS)
    vocabulary: int = 0

    @nn.compact
    def __call__(self, carry: Any, inputs: Inputs) -> tuple[Any, Outputs]:
        grid = inputs.observation['grid']
        parts = [jax.nn.one_hot(grid[..., i], c) for i, c in enumerate(self.categories)]
        x = jnp.concatenate(parts, -1).reshape(*grid.shape[:2], -1)
        if 'features' in inputs.observation:
            x = jnp.concatenate([x, inputs.observation['features']], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(self.features)(x))
        if self.vocabulary:
            tokens = inputs.observation['instruction']
            words = tokens.reshape(-1, tokens.shape[-1]).T  # [L, T · B]
            embedded = nn.Embed(self.vocabulary, InstructionEncoder.embed)(words)
            zeros = (jnp.zeros((words.shape[1], InstructionEncoder.hidden)),) * 2
            _, states = lstm(InstructionEncoder.hidden, zeros, embedded, words < 0)
            last = jnp.maximum((words > 0).sum(0) - 1, 0)
            read = jnp.take_along_axis(states, last[None, :, None], axis=0)[0]
            read = read.reshape(*tokens.shape[:-1], -1)
            x = nn.relu(nn.Dense(self.features)(jnp.concatenate([x, read], -1)))
        action = jax.nn.one_hot(inputs.action, self.actions)
        x = jnp.concatenate([x, action, inputs.reward[..., None]], -1)
        carry, h = lstm(self.hidden, carry, x, inputs.is_first)
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
        gain = self.param('gain', nn.initializers.ones, (self.tasks,))
        shift = self.param('shift', nn.initializers.zeros, (self.tasks,))
        task = inputs.observation['task']
        return carry, Outputs(y[..., :-1], gain[task] * y[..., -1] + shift[task])


def xland_step(config: ml_collections.ConfigDict, fusion: Literal['concat', 'mi']) -> Callable:
    """One update of the plain fused loop on our tasks, in XLand-MiniGrid's own environment."""
    goals = xland.TRAIN
    B, T = config.train.batch, config.train.length
    theirs = XLandMiniGrid()
    params = theirs.default_params(
        grid_type='R1',
        height=xland.SIZE,
        width=xland.SIZE,
        view_size=xland.VIEW,
        max_steps=xland.STEPS,
    )
    tiles = [jnp.array(divmod(t, xland.COLOURS), jnp.uint8) for t in xland.OBJECTS.values()]
    names = list(xland.OBJECTS)
    encodings = jnp.stack(
        [GOALS[g.kind](tile=tiles[names.index(f'{g.paint} {g.shape}')]).encode() for g in goals]
    )

    def reset(key: Array) -> tuple[TimeStep, Array]:
        of_task, key = jax.random.split(key)
        task = jax.random.randint(of_task, (), 0, len(goals))
        rules = RuleSet(
            goal=encodings[task], rules=EmptyRule().encode()[None], init_tiles=jnp.stack(tiles)
        )
        return theirs.reset(params.replace(ruleset=rules), key), task

    net = Net(len(goals), 6, config.model.features, config.model.hidden, fusion)
    optimiser = optim.optimiser(config.optim, 1000)
    h = factory.hyperparameters(config)

    def seen(now: TimeStep, task: Array, action: Array) -> Inputs:
        direction = jax.nn.one_hot(now.state.agent.direction, 4)
        carries = (now.state.agent.pocket[:, :1] > 0).astype(jnp.float32)
        features = jnp.concatenate([direction, carries], -1)
        observation = {'grid': now.observation, 'features': features, 'task': task}
        return Inputs(observation, action, now.reward, now.step_type == 0)

    def act(params_: Any, key: Array, carry: Any, row: Inputs) -> Any:
        carry, outputs = net.apply({'params': params_}, carry, jax.tree.map(lambda a: a[None], row))
        logits = outputs.logits[0]
        action = jax.random.categorical(key, logits).astype(jnp.int32)
        return carry, action, rl_trajectory.log_probability(logits, action)

    def step(weights: Any, state: Any, key: Array) -> Any:
        now, task, action, carry = state
        row = seen(now, task, action)
        of_action, of_reset = jax.random.split(key)
        carry, action, log_prob = act(weights, of_action, carry, row)
        after = jax.vmap(theirs.step, (None, 0, 0))(params, now, action)
        over = after.step_type == 2
        fresh, other = jax.vmap(reset)(jax.random.split(of_reset, B))

        def where(a: Array, b: Array) -> Array:
            return jnp.where(over.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        following = jax.tree.map(where, fresh, after).replace(reward=after.reward)
        discount = jnp.where(over, 0.0, 1.0)
        state = following, jnp.where(over, other, task), action, carry
        return state, (row, action, log_prob, discount)

    def update(learning: learner.State, state: Any, key: Array) -> Any:
        carry = state[3]
        one = functools.partial(step, learning.params)
        state, (rows, *rest) = jax.lax.scan(one, state, jax.random.split(key, T))
        last = seen(*state[:3])
        inputs = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), rows, last)
        trajectory = Trajectory(inputs, *rest, jnp.ones((T, B), bool), carry)
        learning, measured = learner.update(net, optimiser, h, learning, trajectory)  # type: ignore[arg-type]
        return learning, state, measured['loss']

    with jax.numpy_rank_promotion('allow'):
        now, task = jax.jit(jax.vmap(reset))(jax.random.split(jax.random.key(0), B))
        carry = (jnp.zeros((B, config.model.hidden)),) * 2
        state = now, task, jnp.zeros(B, jnp.int32), carry
        rows = jax.tree.map(lambda a: a[None], seen(now, task, state[2]))
        weights = jax.jit(net.init)(jax.random.key(1), carry, rows)['params']
        learning = learner.start(weights, optimiser, len(goals))
        compiled = jax.jit(update).lower(learning, state, jax.random.key(0)).compile()
    keys = iter(jax.random.split(jax.random.key(2), 100_000))

    def once() -> None:
        nonlocal learning, state
        learning, state, loss = compiled(learning, state, next(keys))
        jax.block_until_ready(loss)

    return once


def host_step(config: ml_collections.ConfigDict) -> Callable:
    """One update of the plain loop on environments of the host; pixels go through our network."""
    B, T = config.train.batch, config.train.length
    pool = envs.pool(config.env.name, B, 0)
    agent: Any = factory.agent(config, pool.spec)
    carry = agent.initial_carry(B)
    if pool.spec.vocabulary:
        spec, sizes = pool.spec, (config.model.features, config.model.hidden)
        agent = Net(len(spec.tasks), spec.actions, *sizes, 'none', spec.categories, spec.vocabulary)
        carry = (jnp.zeros((B, config.model.hidden)),) * 2
    optimiser = optim.optimiser(config.optim, 1000)
    update = jax.jit(
        functools.partial(learner.update, agent, optimiser, factory.hyperparameters(config))
    )
    policy = jax.jit(functools.partial(rollout.act, agent))
    now, action = pool.reset(), np.zeros(B, np.int32)
    row = Inputs(now.observation, action, now.reward, now.is_first)
    rows = jax.tree.map(lambda a: jnp.asarray(a)[None], row)
    weights = jax.jit(agent.init)(jax.random.key(0), carry, rows)['params']
    learning = learner.start(weights, optimiser, len(pool.spec.tasks))
    keys = iter(jax.random.split(jax.random.key(2), 1_000_000))

    def once() -> None:
        nonlocal learning, now, action, carry
        start, rows, kept = carry, [], []
        for t in range(T + 1):
            row = Inputs(now.observation, action, now.reward, now.is_first)
            rows.append(jax.tree.map(np.array, row))
            if t == T:
                break
            carry, chosen, log_prob = policy(learning.params, carry, row, next(keys))
            valid, action = ~now.is_last, np.asarray(chosen)
            pool.send(action)
            now = pool.recv()
            kept.append((action, np.asarray(log_prob), np.array(now.discount), valid))
        stacked = [np.stack(a) for a in zip(*kept, strict=True)]
        inputs = jax.tree.map(lambda *a: np.stack(a), *rows)
        learning, measured = update(learning, Trajectory(inputs, *stacked, start))
        jax.block_until_ready(measured)

    return once
