"""From a config to typed parts: what may stand in it, and the agent and optimiser that it names."""

import functools
from collections import ChainMap
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from mi import cells, cost, fusion, optim, tracking
from mi.config import (
    Rule,
    UserError,
    boolean,
    check,
    choice,
    integer,
    mesh_shape,
    number,
    seeds,
    text,
)
from mi.precision import PRECISIONS
from mi.rl import learner
from mi.rl.envs.spec import Spec
from mi.rl.loss import CLIPS
from mi.rl.networks import SITES, SOURCES, TORSOS, Agent, Inputs, Shallow
from mi.rl.transformer import GatedTransformer

CORES: dict[str, Callable[..., nn.Module]] = {'transformer': GatedTransformer}
"""The cores that are no cell of `mi.cells`, called like one: config word → module.

Every word of `mi.cells.CELLS` is a core too. A config file may add to both.
"""
LOOKS = {  # torso → entries of the observation, of which it needs one
    'dense': ('grid', 'features'),
    'conv': ('grid',),
    'shallow': ('pixels',),
    'deep': ('pixels',),
}
TOPOLOGIES = ('fused', 'threads', 'ray')


def sites(value: Any) -> str:
    fine = isinstance(value, tuple | list) and len(set(value)) == len(value)
    if fine and all(word in SITES for word in value):
        return ''
    return f'a tuple of distinct words out of {", ".join(SITES)}; () for none'


SCHEMA: dict[str, Rule] = {
    'task': choice(['rl']),
    'seeds': seeds,
    'tracker': tracking.known,
    'env.name': text,
    'env.options.*': lambda value: '',  # checked against the environment's own, by `envs.pool`
    'model.torso': choice(TORSOS),
    'model.features': integer(1),
    'model.core': choice(ChainMap[str, Any](CORES, cells.CELLS, {'none': None})),
    'model.hidden': integer(1),
    'model.instruction': boolean,
    'model.dtype': choice(['float32', 'bfloat16']),
    'model.sites': sites,
    'model.source': choice(SOURCES),
    'model.context': integer(1),
    'model.fusion.name': choice(fusion.FUSIONS),
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
    'loss.popart_corrected': boolean,
    'loss.popart_order': choice(learner.POPART_ORDERS),
    'loss.popart_preserve': boolean,
    'train.topology': choice(TOPOLOGIES),
    'train.steps': integer(1),
    'train.batch': integer(1),
    'train.length': integer(1),
    'train.mesh': mesh_shape,
    'train.matmul_precision': choice(PRECISIONS),
    'train.log_every': integer(1),
    'train.eval_every': integer(1),
    'train.save_every': integer(1),
    'train.keep': integer(1),
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
    'eval.greedy': boolean,
    'eval.held_out': text,
    **optim.SCHEMA,
}


def validate(config: ml_collections.ConfigDict) -> None:
    """Refuses a config that cannot work, before anything is built.

    Raises:
      UserError: which key, what was expected, what to change.
    """
    check(config, SCHEMA)
    optim.validate(config.optim, updates(config))
    model, training, actors = config.model, config.train, config.actors
    word = model.fusion.name
    if word in fusion.ONE_HOT and ('instruction' in model.sites or model.source != 'task'):
        raise UserError(
            f'config.model.fusion.name = {word!r} takes one-hot contexts alone; it needs '
            f"config.model.source = 'task' and no site 'instruction'"
        )
    for name in ('eval_every', 'save_every'):
        if training[name] % training.log_every:
            raise UserError(
                f'config.train.{name} = {training[name]}: expected a multiple of '
                f'config.train.log_every = {training.log_every}, the updates of one record'
            )
    if training.topology == 'fused':
        return
    if len(config.seeds) > 1:
        raise UserError(
            f'config.seeds = {tuple(config.seeds)}: the topology {training.topology!r} trains one '
            f'seed; start a run for each'
        )
    processes = jax.process_count()
    if training.batch % (actors.batch * processes):
        each = f', in each of {processes} processes' if processes > 1 else ''
        raise UserError(
            f'config.train.batch = {training.batch}: expected a multiple of config.actors.batch = '
            f'{actors.batch}, the rows of one trajectory in the queue{each}'
        )


def environment(
    config: ml_collections.ConfigDict, key: str = 'env.name'
) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of an environment of a config.

    Args:
      config: the config.
      key: that names it, 'env.name' or 'eval.held_out'. The options are the same for both.
    """
    name: str = config.env.name if key == 'env.name' else config.eval.held_out
    options = config.env.get('options')  # runs of before have none
    return name, options.to_dict() if options else {}


def updates(config: ml_collections.ConfigDict) -> int:
    """How many updates a run has."""
    return max(1, config.train.steps // (config.train.batch * config.train.length))


def agent(config: ml_collections.ConfigDict, spec: Spec) -> Agent:
    """The agent of a config, with typed fields.

    Raises:
      UserError: if the environment has not what the agent is to look at.
    """
    model = config.model
    instructed = 'instruction' in model.sites or model.source == 'instruction'
    if instructed and not (model.instruction and spec.vocabulary):
        what = 'has no instructions' if model.instruction else 'is not to be read'
        raise UserError(
            f'config.model.sites and source name the instruction, but it {what}: '
            f'config.env.name = {spec.name!r}, config.model.instruction = {model.instruction}'
        )
    if model.instruction and not spec.vocabulary:
        raise UserError(
            f'config.model.instruction = True: expected an environment with instructions, and '
            f'config.env.name = {config.env.name!r} has none. Set it to False'
        )
    looks = LOOKS.get(model.torso, ())
    if looks and not spec.observation.keys() & set(looks):
        there = ', '.join(name for name in spec.observation if name != 'task')
        raise UserError(
            f'config.model.torso = {model.torso!r} looks at {" or ".join(looks)}, and '
            f"config.env.name = {config.env.name!r} has {there}; 'auto' takes what fits"
        )
    height, width = spec.observation['pixels'].shape[:2] if 'pixels' in spec.observation else (0, 0)
    if model.torso == 'shallow' and min(height, width) < Shallow.least:
        raise UserError(
            f"config.model.torso = 'shallow' needs pictures of {Shallow.least} × {Shallow.least} "
            f'pixels at least, and config.env.name = {config.env.name!r} has {height} × {width}; '
            f"try 'deep'"
        )
    core = None
    if model.core != 'none':
        core = functools.partial(ChainMap(CORES, cells.CELLS)[model.core], model.hidden)
    if model.core == 'transformer' and model.hidden % GatedTransformer.heads:
        raise UserError(
            f'config.model.hidden = {model.hidden}: expected a multiple of '
            f'{GatedTransformer.heads}, the heads of the transformer'
        )
    word = model.fusion
    return Agent(
        spec=spec,
        torso=model.torso,
        features=model.features,
        core=core,
        sites=tuple(model.sites),
        source=model.source,
        context=model.context,
        fusion=fusion.get(word.name, rank=word.rank, hidden=word.hidden),
        see_instruction=model.instruction,
        dtype=jnp.dtype(model.dtype),
    )


def fits(config: ml_collections.ConfigDict, trained: Spec, held_out: Spec) -> None:
    """Refuses an environment for evaluation in which the agent cannot act.

    Raises:
      UserError: if it does not look as what the agent was trained on, or if its tasks are others
        and the agent is told the index.
    """

    def looks(spec: Spec) -> dict[str, Any]:
        shapes = {n: a.shape for n, a in spec.observation.items() if n != 'instruction'}
        words = spec.vocabulary if config.model.instruction else 0
        return {'observation': shapes, 'actions': spec.actions, 'categories': spec.categories,
                'vocabulary': words}  # fmt: skip

    name = f'config.eval.held_out = {config.eval.held_out!r}'
    one, other = looks(trained), looks(held_out)
    for key, value in one.items():
        if value != other[key]:
            raise UserError(
                f'{name}: its {key} is {other[key]} and that of config.env.name = '
                f'{config.env.name!r} {value}; expected the same world with other tasks'
            )
    if config.model.source in ('task', 'embedding') and trained.tasks != held_out.tasks:
        raise UserError(
            f'{name}: tasks that were never trained have no index; it needs config.model.source = '
            f"'instruction' or 'inferred'"
        )


def hyperparameters(config: ml_collections.ConfigDict) -> learner.Hyperparameters:
    return learner.Hyperparameters(**config.loss)


def example(spec: Spec, length: int, batch: int) -> Inputs:
    """Shapes of inputs [T, B, …], without memory."""

    def rows(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((length, batch, *shape), dtype)

    observation = {name: rows(a.shape, a.dtype) for name, a in spec.observation.items()}
    inputs: Any = observation, rows((), jnp.int32), rows((), jnp.float32), rows((), jnp.bool_)
    return Inputs(*inputs)


def init_params(agent: Agent, key: jax.Array) -> Any:
    """The parameters of an agent."""
    inputs = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), example(agent.spec, 1, 1))
    return agent.init(key, agent.initial_carry(1), inputs)['params']


def costs(agent: Agent, batch: int, length: int) -> dict[str, Any]:
    """Parameters, and forward FLOPs of products per step of an environment: agent and fusions."""
    rows = example(agent.spec, length, batch)
    carry = jax.eval_shape(lambda: agent.initial_carry(batch))
    variables: Any = jax.eval_shape(agent.init, jax.random.key(0), carry, rows)
    flops = cost.flops(agent.apply, variables, carry, rows)
    of_fusions = parameters = 0.0
    for module, own, shapes in cost.modules(agent, '|'.join(agent.sites), variables, carry, rows):
        parameters += cost.parameters(own)
        of_fusions += cost.flops(module.apply, own, *shapes)
    steps = batch * length
    return {
        'parameters': {'model': cost.parameters(variables), 'fusion': round(parameters)},
        'flops_per_step': {'model': round(flops / steps), 'fusion': round(of_fusions / steps)},
    }
