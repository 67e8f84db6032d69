"""Products, activations and parameters of the training jobs in `benchmarks.scaling`.

Everything is traced abstractly, without allocating arrays.
"""

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import ml_collections
import optax

from benchmarks.cluster import Job, Work
from configs import rl_dmlab30
from mi import counting
from mi.kernels.linear import Platform
from mi.lm import factory as lm
from mi.lm.data.batches import Batch
from mi.lm.trainer import Trainer
from mi.rl import factory as rl
from mi.rl import learner
from mi.rl.envs.host import dmlab30
from mi.rl.envs.spec import Spec
from mi.rl.trajectory import Trajectory
from mi.training import optim

DMLAB_FRAMES = 10e9  # four per environment step


class Training(NamedTuple):
    """A model, its optimizer and the shapes of its training state.

    Attributes:
      model: language model or agent.
      optimizer: optimizer of the model.
      state: shapes of the training state.
    """

    model: Any  # nn.Module, or an Agent
    optimizer: optax.GradientTransformation
    state: Any  # TrainState or learner.LearnerState


def tracing_for(platform: Platform) -> contextlib.AbstractContextManager[None]:
    """Trace with the orders and kernels of a platform, whose devices need not be present."""
    device = jax.sharding.AbstractDevice('', None, platform)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def lm_training(config: ml_collections.ConfigDict, vocabulary: int, rows: int) -> Training:
    """Return a language model, its optimizer and the shapes of its training state."""
    trainer = make_lm_trainer(config, vocabulary, rows)
    state_shapes = jax.eval_shape(trainer.init, jax.ShapeDtypeStruct((), jnp.int32))
    return Training(trainer.model, trainer.optimizer, state_shapes)


def make_lm_trainer(config: ml_collections.ConfigDict, vocabulary: int, rows: int) -> Trainer:
    """Return the trainer for batches of `rows` sequences, without gradient accumulation."""
    trainer = lm.build_trainer(config, vocabulary)
    return dataclasses.replace(trainer, batch_size=rows, accumulation=1)


def lm_work(
    config: ml_collections.ConfigDict, vocabulary: int, rows: int, platform: Platform
) -> Work:
    """Return the work of a training step, including all blocks of an adaptive softmax."""
    model, _, state_shapes = lm_training(config, vocabulary, rows)
    scalar: Any = jax.ShapeDtypeStruct((), jnp.int32)
    tokens: Any = jax.ShapeDtypeStruct((config.train.length + 1, rows), jnp.int32)
    batch = Batch(tokens, None, seed=scalar, step=scalar)
    train_step = make_lm_trainer(config, vocabulary, rows).step

    def loss(params: chex.ArrayTree, carry: chex.ArrayTree, tokens: chex.Array) -> chex.Array:
        rng_key = jax.random.key(0)
        arguments = carry, tokens[:-1], tokens[1:]
        _, losses = model.apply(
            {'params': params}, *arguments, train=True, rngs={'dropout': rng_key, 'state': rng_key}
        )
        return losses.objective.mean()  # type: ignore[attr-defined]

    with tracing_for(platform):
        products = counting.products(train_step, state_shapes, batch)
        num_bytes = saved_bytes(loss, state_shapes.params, state_shapes.carry, tokens)
    return Work(products, num_bytes)


def lm_job(name: str, config: ml_collections.ConfigDict, total: float) -> Job:
    """Return the job that trains a language model on `total` tokens."""
    vocabulary = config.data.vocabulary
    return Job(
        name=name,
        parameters=counting.parameters(lm_training(config, vocabulary, 1).state.params),
        units=config.train.length,
        total=total,
        work=functools.lru_cache(functools.partial(lm_work, config, vocabulary)),
    )


def saved_bytes(
    loss: Callable[..., chex.Array], params: chex.ArrayTree, *args: chex.ArrayTree
) -> int:
    """Return the bytes that reverse-mode differentiation of loss(params, …) saves.

    Parameters are not counted. XLA saves less where it fuses or recomputes.
    """

    def pull_back(params: chex.ArrayTree, *args: chex.ArrayTree) -> chex.ArrayTree:
        return jax.vjp(lambda params: loss(params, *args), params)[1]

    unseen_params = collections.Counter(
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)
    )
    num_bytes = 0
    for leaf in jax.tree.leaves(jax.eval_shape(pull_back, params, *args)):
        if unseen_params[leaf.shape, leaf.dtype]:
            unseen_params[leaf.shape, leaf.dtype] -= 1
        else:
            num_bytes += math.prod(leaf.shape) * leaf.dtype.itemsize
    return num_bytes


def rl_training(config: ml_collections.ConfigDict, spec: Spec) -> Training:
    """Return an agent, its optimizer and the shapes of the learner's state."""
    agent = rl.build_agent(config, spec)
    optimizer = optim.make_optimizer(config.optim, 1000)

    def init_state() -> learner.LearnerState:
        params = rl.init_params(agent, jax.random.key(0))
        return learner.init_learner_state(params, optimizer, len(spec.tasks))

    return Training(agent, optimizer, jax.eval_shape(init_state))


def trajectory_shapes(config: ml_collections.ConfigDict, spec: Spec, rows: int) -> Trajectory:
    """Return the shapes of a trajectory from `rows` environments."""
    num_steps = config.train.length
    agent = rl.build_agent(config, spec)
    integers, floats, booleans = (
        jax.ShapeDtypeStruct((num_steps, rows), dtype)
        for dtype in (jnp.int32, jnp.float32, jnp.bool_)
    )
    return Trajectory(
        inputs=rl.make_input_shapes(spec, num_steps + 1, rows),
        action=integers,
        log_prob=floats,
        discount=floats,
        valid=booleans,
        carry=jax.eval_shape(lambda: agent.initial_carry(rows)),
    )


def rl_work(config: ml_collections.ConfigDict, spec: Spec, rows: int, platform: Platform) -> Work:
    """Return the work of an update with trajectories from `rows` environments."""
    agent, optimizer, state_shapes = rl_training(config, spec)
    trajectory = trajectory_shapes(config, spec, rows)
    update = functools.partial(learner.update, agent, optimizer, rl.get_hyperparameters(config))

    def loss(params: chex.ArrayTree, trajectory: Trajectory) -> chex.Array:
        _, outputs = learner.forward(agent, params, trajectory.carry, trajectory.inputs)
        return outputs.value.sum() + outputs.logits.sum()

    with tracing_for(platform):
        products = counting.products(update, state_shapes, trajectory)
        return Work(products, saved_bytes(loss, state_shapes.params, trajectory))


def dmlab_config() -> ml_collections.ConfigDict:
    """Return the config of DMLab-30 with full MI at the core's input and two groups per actor.

    The fusion at the core's input is the largest one. The second group simulates while the policy
    acts for the first.
    """
    config = rl_dmlab30.get_config().unlock()
    config.model.sites = ('core_input',)
    config.actors.groups = 2
    return config.lock()


def dmlab_job() -> Job:
    """Return the job that trains on DMLab-30."""
    config, spec = dmlab_config(), dmlab30.make_spec()
    agent_costs = rl.compute_costs(rl.build_agent(config, spec), 1, config.train.length)
    return Job(
        name='DMLab-30',
        parameters=agent_costs['parameters']['model'],
        units=config.train.length,
        total=DMLAB_FRAMES / dmlab30.REPEAT,
        work=functools.lru_cache(functools.partial(rl_work, config, spec)),
    )


def policy_flops() -> int:
    """Return the FLOPs of the policy for DMLab-30, for one step of one environment."""
    agent = rl.build_agent(dmlab_config(), dmlab30.make_spec())
    return rl.compute_costs(agent, 1, 1)['flops_per_step']['model']


def policy_products(
    config: ml_collections.ConfigDict, spec: Spec, rows: int, platform: Platform
) -> list[counting.Product]:
    """Return the products of the policy for one step of `rows` environments."""
    agent, _, state_shapes = rl_training(config, spec)
    carry = jax.eval_shape(lambda: agent.initial_carry(rows))
    policy = functools.partial(learner.forward, agent)
    inputs = rl.make_input_shapes(spec, 1, rows)
    with tracing_for(platform):
        return counting.products(policy, state_shapes.params, carry, inputs)


def trajectory_bytes() -> float:
    """Return the bytes per environment step that an actor of DMLab-30 sends to the learner."""
    config = dmlab_config()
    rows = config.actors.batch
    trajectory = trajectory_shapes(config, dmlab30.make_spec(), rows)
    total_bytes = sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(trajectory)
    )
    return total_bytes / (rows * config.train.length)
