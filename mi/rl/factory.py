"""Constructors that build environments and agents from a config."""

import contextlib
import functools
from collections import ChainMap
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from mi import cells, counting, fusion
from mi.config import UserError, name_config_keys
from mi.options import check_options, get_field_defaults, get_options
from mi.rl import envs, loss
from mi.rl.agent import Agent, Inputs, Params
from mi.rl.config import CORES, TORSO_INPUTS
from mi.rl.envs.spec import HostEnvironment, JaxEnvironment, Spec
from mi.rl.learner import SweptNumbers
from mi.rl.torsos import Shallow
from mi.training import optim, sharding

EnvironmentKey = Literal['env.name', 'eval.held_out']
"""Config keys that name an environment; both have the options `config.env.options`."""


def get_environment_keys(config: ml_collections.ConfigDict) -> dict[str, EnvironmentKey]:
    """Return evaluation split → config key that names its environment."""
    config_keys: dict[str, EnvironmentKey] = {'eval': 'env.name'}
    if config.eval.held_out:
        config_keys['held_out'] = 'eval.held_out'
    return config_keys


def get_environment_name(
    config: ml_collections.ConfigDict, config_key: EnvironmentKey = 'env.name'
) -> str:
    """Return the name of an environment in a config."""
    env_name: str = config.env.name if config_key == 'env.name' else config.eval.held_out
    return env_name


def make_environment(
    config: ml_collections.ConfigDict, config_key: EnvironmentKey = 'env.name'
) -> JaxEnvironment:
    """Make a JAX environment from a config.

    Raises:
      UserError: if the environment runs on the host, or `envs.make` raises an error.
    """
    env_name = get_environment_name(config, config_key)
    if envs.is_on_host(env_name):
        raise UserError(
            f'config.{config_key} = {env_name!r} runs on the host: expected an environment in '
            f"JAX for the topology 'fused'. Try config.train.topology = 'threads' or 'ray'"
        )
    with name_environment_keys(config_key):
        return envs.make(env_name, get_options(config.env, 'options'))


def make_pool(
    config: ml_collections.ConfigDict,
    batch_size: int,
    seed: int,
    config_key: EnvironmentKey = 'env.name',
    batch_key: str = 'config.actors.batch',
) -> HostEnvironment:
    """Make a batch of environments on the host from a config.

    Args:
      config: config of the run.
      batch_size: number of environments.
      seed: seed of the environments.
      config_key: the config key that names the environment.
      batch_key: the config key of `batch_size`, for error messages.

    Raises:
      UserError: if `envs.pool` raises an error.
    """
    env_name, options = get_environment_name(config, config_key), get_options(config.env, 'options')
    with name_environment_keys(config_key, batch_key):
        return envs.pool(env_name, batch_size, seed, options)


def read_spec(config: ml_collections.ConfigDict, config_key: EnvironmentKey = 'env.name') -> Spec:
    """Return the spec of an environment in a config, without its simulator where possible.

    Raises:
      UserError: if `envs.make` or `envs.host_spec` raises an error.
    """
    env_name = get_environment_name(config, config_key)
    if not envs.is_on_host(env_name):
        return make_environment(config, config_key).spec
    with name_environment_keys(config_key):
        return envs.host_spec(env_name, config.actors.batch, get_options(config.env, 'options'))


def count_evaluation_rows(
    config: ml_collections.ConfigDict, config_key: EnvironmentKey = 'env.name'
) -> int:
    """Return the number of environments for evaluation on the host if `config.eval.batch` is 0.

    Raises:
      UserError: if the suite is unknown.
    """
    env_name = get_environment_name(config, config_key)
    with name_environment_keys(config_key):
        return envs.count_evaluation_rows(env_name, config.actors.batch, config.eval.episodes)


def name_environment_keys(
    config_key: EnvironmentKey = 'env.name', batch_key: str = 'config.actors.batch'
) -> contextlib.AbstractContextManager[None]:
    """Replace argument names with config keys in errors about an environment and its actors."""
    return name_config_keys(
        {
            'env_name': f'config.{config_key}',
            'options': 'config.env.options',
            'batch': batch_key,
            'timeout': 'config.actors.timeout',
            'num_actors': 'config.actors.number',
        }
    )


def build_agent(config: ml_collections.ConfigDict, spec: Spec) -> Agent:
    """Build the agent of a config for an environment.

    Raises:
      UserError: if the environment lacks an observation that the agent reads.
    """
    model = config.model
    _check_instruction(config, spec)
    _check_torso(config, spec)
    with name_config_keys({'options': 'config.model.fusion.options'}):
        make_fusion = fusion.get(
            model.fusion.name,
            get_options(model.fusion, 'options'),
            rank=model.fusion.rank,
            hidden=model.fusion.hidden,
        )
    return Agent(
        spec=spec,
        torso=model.torso,
        features=model.features,
        core=_get_core(model),
        sites=tuple(model.sites),
        source=model.source,
        context=model.context,
        fusion=make_fusion,
        use_instruction=model.instruction,
        dtype=jnp.dtype(model.dtype),
    )


def _get_core(model: ml_collections.ConfigDict) -> Callable[..., nn.Module] | None:
    """Return the constructor of the core, or None for an agent without memory."""
    options = get_options(model, 'core_options')
    constructor = None if model.core == 'none' else ChainMap(CORES, cells.CELLS)[model.core]
    defaults = {} if constructor is None else get_field_defaults(constructor)
    with name_config_keys({'options': 'config.model.core_options'}):
        check_options(model.core, options, defaults)
    if constructor is None:
        return None
    if model.core == 'transformer':
        num_heads = (defaults | options)['heads']
        if model.hidden % num_heads:
            raise UserError(
                f'config.model.hidden = {model.hidden}: expected a multiple of {num_heads}, the '
                f"transformer's number of heads"
            )
    return functools.partial(constructor, model.hidden, **options)


def _check_instruction(config: ml_collections.ConfigDict, spec: Spec) -> None:
    """Check that the agent and the environment provide the instructions that the config uses."""
    model = config.model
    is_fused = 'instruction' in model.sites or model.source == 'instruction'
    if is_fused and not (model.instruction and spec.vocabulary):
        problem = 'has no instructions' if model.instruction else 'does not read them'
        subject = 'the environment' if model.instruction else 'the agent'
        advice = (
            'Choose another environment, or other sites and source'
            if not spec.vocabulary
            else 'Try config.model.instruction = True'
        )
        raise UserError(
            f'config.model.sites = {tuple(model.sites)} and config.model.source = '
            f'{model.source!r} use the instruction, but {subject} {problem} (config.env.name = '
            f'{spec.name!r}, config.model.instruction = {model.instruction}). {advice}'
        )
    if model.instruction and not spec.vocabulary:
        raise UserError(
            f'config.model.instruction = True: expected an environment with instructions, but '
            f'config.env.name = {config.env.name!r} has none. Set it to False'
        )


def _check_torso(config: ml_collections.ConfigDict, spec: Spec) -> None:
    """Check that the torso can read the observations of the environment."""
    torso, env_name = config.model.torso, config.env.name
    entries = TORSO_INPUTS.get(torso, ())
    if entries and not spec.observation.keys() & set(entries):
        available = ', '.join(name for name in spec.observation if name != 'task')
        raise UserError(
            f'config.model.torso = {torso!r}: expected an observation with '
            f'{" or ".join(entries)} (got {available} from config.env.name = {env_name!r}). '
            f"Try 'auto'"
        )

    # The convolutions without padding must leave at least a pixel.
    if torso == 'shallow':
        height, width, _ = spec.observation['pixels'].shape
        if min(height, width) < Shallow.min_side:
            raise UserError(
                f"config.model.torso = 'shallow': expected images of at least "
                f'{Shallow.min_side} × {Shallow.min_side} pixels (got {height} × {width} from '
                f"config.env.name = {env_name!r}). Try 'deep'"
            )


def check_held_out(config: ml_collections.ConfigDict, trained: Spec, held_out: Spec) -> None:
    """Check that the agent can act in the held-out environment.

    Raises:
      UserError: if its observations or actions differ from those in training, or if its tasks
        differ and the agent reads the index of the task.
    """

    # What the shapes of the agent's parameters depend on.
    def describe(spec: Spec) -> dict[str, object]:
        return {
            'observation': {
                entry: array.shape
                for entry, array in spec.observation.items()
                if entry != 'instruction'
            },
            'actions': spec.actions,
            'categories': spec.categories,
            'vocabulary': spec.vocabulary if config.model.instruction else 0,
        }

    # The same network must fit both environments.
    setting = f'config.eval.held_out = {config.eval.held_out!r}'
    actual = describe(held_out)
    for field, expected in describe(trained).items():
        if actual[field] != expected:
            raise UserError(
                f'{setting}: expected the {field} of config.env.name = {config.env.name!r}, '
                f'{expected} (got {actual[field]}). Try a suite of the same environment'
            )
    # An index of a task means the same task in both.
    reads_index = (
        config.model.source in ('task', 'embedding')
        and config.model.fusion.name != 'none'
        and not {'core_input', 'readout'}.isdisjoint(config.model.sites)
    )
    if reads_index and trained.tasks != held_out.tasks:
        raise UserError(
            f'{setting}: expected the trained tasks, because config.model.source = '
            f"{config.model.source!r} reads their index. Try config.model.source = 'instruction', "
            f"'inferred' or 'state'"
        )


def get_hyperparameters(config: ml_collections.ConfigDict) -> loss.Hyperparameters:
    """Return the hyperparameters of the loss from a config."""
    return loss.Hyperparameters(**config.loss)


def get_swept_numbers(
    config: ml_collections.ConfigDict, num_updates: int, mesh: jax.sharding.Mesh
) -> SweptNumbers:
    """Return the numbers to pass to a training program, replicated over the mesh."""
    learning_rates = optim.compute_learning_rates(config.optim, num_updates)
    numbers = np.asarray(learning_rates), np.asarray(config.loss.entropy_cost, np.float32)
    replicated = sharding.replicated(mesh)
    return SweptNumbers(*(sharding.shard_array(number, replicated) for number in numbers))


def make_input_shapes(spec: Spec, num_steps: int, batch_size: int) -> Inputs:
    """Return the shapes of an agent's inputs, [T, B, …]."""

    def add_rows(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        return jax.ShapeDtypeStruct((num_steps, batch_size, *shape), dtype)

    observation = {
        entry: add_rows(array.shape, array.dtype) for entry, array in spec.observation.items()
    }
    return Inputs(
        observation=observation,
        action=add_rows((), jnp.int32),
        reward=add_rows((), jnp.float32),
        is_first=add_rows((), jnp.bool_),
    )


def init_params(agent: Agent, rng_key: jax.Array) -> Params:
    """Draw the initial parameters of an agent."""
    input_shapes = make_input_shapes(agent.spec, 1, 1)
    inputs = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), input_shapes)
    params: Params = agent.init(rng_key, agent.initial_carry(1), inputs)['params']
    return params


def compute_costs(agent: Agent, batch_size: int, num_steps: int) -> dict[str, dict[str, int]]:
    """Count the parameters and forward FLOPs per environment step of an agent and its fusions."""
    # The whole agent.
    inputs = make_input_shapes(agent.spec, num_steps, batch_size)
    carry = jax.eval_shape(lambda: agent.initial_carry(batch_size))
    variables = jax.eval_shape(agent.init, jax.random.key(0), carry, inputs)
    model_flops = counting.flops(agent.apply, variables, carry, inputs)

    # The fusions alone.
    fusion_flops = fusion_parameters = 0.0
    sites = '|'.join(agent.sites)
    for module, module_variables, shapes in counting.modules(
        agent, sites, variables, carry, inputs
    ):
        fusion_parameters += counting.parameters(module_variables)
        fusion_flops += counting.flops(module.apply, module_variables, *shapes)

    env_steps = batch_size * num_steps
    return {
        'parameters': {
            'model': counting.parameters(variables),
            'fusion': round(fusion_parameters),
        },
        'flops_per_step': {
            'model': round(model_flops / env_steps),
            'fusion': round(fusion_flops / env_steps),
        },
    }
