"""Build an agent and its environment from a config."""

import functools
from collections import ChainMap
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from mi import cells, counting, fusion
from mi.config import (
    UserError,
)
from mi.rl import loss
from mi.rl.agent import (
    Agent,
    Inputs,
)
from mi.rl.config import CORES, LOOKS
from mi.rl.envs.spec import Spec
from mi.rl.torsos import Shallow
from mi.rl.transformer import GatedTransformer


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
    if model.torso == 'shallow' and min(height, width) < Shallow.min_side:
        raise UserError(
            f"config.model.torso = 'shallow': expected pictures of at least {Shallow.min_side} × "
            f'{Shallow.min_side} pixels (got {height} × {width} from config.env.name = '
            f"{config.env.name!r}). Try 'deep'"
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
        use_instruction=model.instruction,
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


def hyperparameters(config: ml_collections.ConfigDict) -> loss.Hyperparameters:
    return loss.Hyperparameters(**config.loss)


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
    flops = counting.flops(agent.apply, variables, carry, rows)
    of_fusions = parameters = 0.0
    for module, own, shapes in counting.modules(
        agent, '|'.join(agent.sites), variables, carry, rows
    ):
        parameters += counting.parameters(own)
        of_fusions += counting.flops(module.apply, own, *shapes)
    steps = batch * length
    return {
        'parameters': {'model': counting.parameters(variables), 'fusion': round(parameters)},
        'flops_per_step': {'model': round(flops / steps), 'fusion': round(of_fusions / steps)},
    }
