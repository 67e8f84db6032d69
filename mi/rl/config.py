"""Validation of RL configs: a rule for each key, and conditions on several keys together."""

from collections import ChainMap
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from flax import linen as nn

from mi import cells, fusion
from mi.config import (
    RUN_SCHEMA,
    Rule,
    UserError,
    any_value,
    check,
    check_intervals,
    choice,
    integer,
    mesh_shape,
    number,
)
from mi.precision import PRECISIONS
from mi.registry import Registry
from mi.rl.agent import SITES, SOURCES, TORSOS, explain_source
from mi.rl.loss import CLIPS, POPART_ORDERS
from mi.rl.transformer import GatedTransformer
from mi.training import optim, trackers

CORES: Registry[Callable[..., nn.Module]] = Registry(transformer=GatedTransformer)
CORES.refuse = lambda core: 'it is a cell' if cells.is_cell(core) else ''
"""Cores beside the cells of `mi.cells`, with the same interface: name → module.

Every name in `mi.cells.CELLS` is a core too. A config file may add to both.
"""

TORSO_INPUTS = {  # torso → entries of the observation; it needs one of them
    'dense': ('grid', 'features'),
    'conv': ('grid',),
    'shallow': ('pixels',),
    'deep': ('pixels',),
}
TOPOLOGIES = ('fused', 'threads', 'ray')


def check_sites(sites: Any) -> str:
    """Return '' for a tuple of distinct sites, otherwise a description of valid values."""
    is_tuple = isinstance(sites, tuple | list)
    if is_tuple and len(set(sites)) == len(sites) and all(site in SITES for site in sites):
        return ''
    return f'a tuple of distinct sites out of {", ".join(SITES)}; () for none'


SCHEMA: dict[str, Rule] = {
    'task': choice(['rl']),
    **RUN_SCHEMA,
    'tracker': trackers.check_tracker,
    'env.name': str,
    'env.options.*': any_value,  # `mi.rl.envs` checks them against the maker's arguments
    'model.torso': choice(TORSOS),
    'model.features': integer(1),
    'model.core': choice(ChainMap[str, Any](CORES, cells.CELLS, {'none': None})),
    'model.core_options.*': any_value,  # `factory` checks them against the core's fields
    'model.hidden': integer(1),
    'model.instruction': bool,
    'model.dtype': choice(['float32', 'bfloat16']),
    'model.sites': check_sites,
    'model.source': choice(SOURCES),
    'model.context': integer(1),
    'model.fusion.name': choice(fusion.FUSIONS),
    'model.fusion.options.*': any_value,  # `fusion.get` checks them against the fields
    'model.fusion.rank': integer(1),
    'model.fusion.hidden': integer(1),
    'loss.discount': number(0, 1),
    'loss.lambda_': number(0, 1),
    'loss.rho_clip': number(0, exclusive=True),
    'loss.c_clip': number(0, exclusive=True),
    'loss.entropy_cost': number(0),
    'loss.baseline_cost': number(0),
    'loss.reward_clip': choice(CLIPS),
    'loss.popart': number(0, 1),
    'loss.popart_corrected': bool,
    'loss.popart_order': choice(POPART_ORDERS),
    'loss.popart_preserve': bool,
    'train.topology': choice(TOPOLOGIES),
    'train.steps': integer(1),
    'train.length': integer(1),
    'train.mesh': mesh_shape,
    'train.matmul_precision': choice(PRECISIONS),
    'actors.number': integer(1),
    'actors.batch': integer(1),
    'actors.groups': integer(1),
    'actors.queue': integer(1),
    'actors.max_lag': integer(1),
    'actors.timeout': number(0, exclusive=True),
    'eval.episodes': integer(1),
    'eval.batch': integer(0),
    'eval.steps': integer(1),
    'eval.seconds': number(0, exclusive=True),
    'eval.greedy': bool,
    'eval.held_out': str,
    **optim.SCHEMA,
}


def validate(config: ml_collections.ConfigDict) -> None:
    """Check that a config can work, before anything is built.

    Raises:
      UserError: if a value is invalid or contradicts another one.
    """
    check(config, SCHEMA)
    optim.validate(config.optim, count_updates(config))
    model, training, actors = config.model, config.train, config.actors

    # The fusion and its context.
    fusion_name = model.fusion.name
    is_one_hot = model.source == 'task' and 'instruction' not in model.sites
    if fusion_name in fusion.ONE_HOT and not is_one_hot:
        raise UserError(
            f'config.model.fusion.name = {fusion_name!r}: expected one-hot contexts, which this '
            f"fusion needs. Try config.model.source = 'task' and no site 'instruction'"
        )

    if error := explain_source(model.source, model.sites):
        raise UserError(f'config.model.source = {model.source!r}: {error}')

    check_intervals(config)

    # Actors: one seed, and batches of whole trajectories.
    if training.topology == 'fused':
        return
    if len(config.seeds) > 1:
        raise UserError(
            f'config.seeds = {tuple(config.seeds)}: expected one seed with config.train.topology = '
            f'{training.topology!r}. Start a run for each seed'
        )
    num_processes = jax.process_count()
    if training.batch % (actors.batch * num_processes):
        scope = f', in each of {num_processes} processes' if num_processes > 1 else ''
        raise UserError(
            f'config.train.batch = {training.batch}: expected a multiple of config.actors.batch = '
            f'{actors.batch}, the rows of a trajectory in the queue{scope}'
        )


def count_updates(config: ml_collections.ConfigDict) -> int:
    """Return the number of updates in a run."""
    return max(1, config.train.steps // (config.train.batch * config.train.length))
