"""Functions that restore a trained agent from its run directory, for any topology."""

import pathlib

import jax
import ml_collections
import optax

from mi.rl import config as rl_config
from mi.rl import factory, popart
from mi.rl.agent import Agent, Params
from mi.training import averaging, checkpoint, optim
from mi.training.sharding import Tree


def restore_params(
    config: ml_collections.ConfigDict, agent: Agent, run_path: pathlib.Path
) -> tuple[Params, int]:
    """Return the parameters for evaluation of all seeds, [S, …], and their step.

    Raises:
      UserError: if the directory has no complete checkpoint, or one of a different agent.
    """
    checkpoints = checkpoint.Checkpoints(run_path / 'checkpoints', config.train.keep)
    newest, meta = checkpoints.newest()
    has_seeds = has_seed_axis(config)
    optimizer = optim.make_optimizer(config.optim, rl_config.count_updates(config))

    def init_learner() -> tuple[Params, optax.OptState]:
        params = factory.init_params(agent, jax.random.key(0))
        return params, optimizer.init(params)

    params_shapes, opt_state_shapes = _place_shapes(config, jax.eval_shape(init_learner))
    params = averaging.restore_eval_params(
        checkpoints,
        newest,
        params_shapes,
        opt_state_shapes,
        prefix='learner.' if has_seeds else '',
        has_seeds=has_seeds,
    )
    if not has_seeds:
        params = jax.tree.map(lambda a: a[None], params)
    return params, meta['step']


def restore_statistics(
    config: ml_collections.ConfigDict, agent: Agent, run_path: pathlib.Path
) -> popart.Statistics:
    """Return the PopArt statistics, with a leading axis of seeds if the topology is 'fused'.

    Raises:
      UserError: under the same conditions as `restore_params`.
    """
    checkpoints = checkpoint.Checkpoints(run_path / 'checkpoints', config.train.keep)
    shapes = jax.eval_shape(lambda: popart.init(len(agent.spec.tasks)))
    prefix = 'learner.' if has_seed_axis(config) else ''
    statistics: popart.Statistics = checkpoints.restore_part(
        checkpoints.newest()[0], f'{prefix}statistics', _place_shapes(config, shapes)
    )
    return statistics


def init_seed_params(config: ml_collections.ConfigDict, agent: Agent, seed: int) -> Params:
    """Return the initial parameters of a seed."""
    rng_key = jax.random.key(seed)
    if has_seed_axis(config):
        rng_key, _ = jax.random.split(rng_key)
    return factory.init_params(agent, rng_key)


def has_seed_axis(config: ml_collections.ConfigDict) -> bool:
    """Return whether the arrays of a checkpoint have a leading axis of seeds."""
    is_fused: bool = config.train.topology == 'fused'
    return is_fused


def _place_shapes(config: ml_collections.ConfigDict, shapes: Tree) -> Tree:
    """Place shapes on the first device, and add the axis of seeds if there is one."""
    seed_axis = (len(config.seeds),) if has_seed_axis(config) else ()
    on_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed: Tree = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(seed_axis + a.shape, a.dtype, sharding=on_device), shapes
    )
    return placed
