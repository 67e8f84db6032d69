"""Estimates of a run's cost from shapes alone: no data is read, and nothing is trained.

The estimates correspond to a run's cost.json and serve commands such as `python -m launch.local
--dry_run`. `mi.estimate.memory` estimates the memory, which requires compilation.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.typing import DTypeLike

from mi import counting
from mi.config import UserError, name_config_keys, suggest
from mi.fit import factory as fit
from mi.fit import train as train_fit
from mi.lm import config as lm_config
from mi.lm import factory as lm
from mi.lm.data import sources, tokenizers
from mi.lm.data.batches import Batch
from mi.lm.trainer import Trainer
from mi.rl import config as rl_config
from mi.rl import envs, learner
from mi.rl import factory as rl
from mi.rl.agent import Agent
from mi.rl.envs.spec import JaxEnvironment
from mi.rl.trajectory import Trajectory
from mi.training import optim

Costs = dict[str, Any]  # a JSON object


def estimate_costs(config: ml_collections.ConfigDict) -> Costs:
    """Return the cost of a config's run.

    - 'parameters': {'model': …, 'fusion': …} of one seed, as in cost.json.
    - 'flops_per_token', '…_step' (of an environment) or '…_example': likewise, for a forward pass.
    - 'steps', 'seeds': numbers of training steps, and of seeds that train simultaneously.
    - 'units': tokens, environment steps or examples per training step and seed.
    - 'flops': FLOPs per training step and seed, forward and backward, plus acting in RL.

    A search (task 'search') chooses the sizes of its models itself, so its costs are only 'steps'
    and 'seeds'. Evaluations are not counted.

    For words or byte pairs, the vocabulary is assumed to have `data.vocabulary` entries. A run has
    fewer if its text does.

    Raises:
      UserError: if the config is invalid.
    """
    task = config.task
    if task not in TASKS:
        raise UserError(
            f'config.task = {task!r}: expected a known task; {suggest(str(task), TASKS)}'
        )
    return TASKS[task](config)


class LMSetup(NamedTuple):
    """A config's language model, without its text."""

    config: ml_collections.ConfigDict
    trainer: Trainer
    vocabulary: int
    num_domains: int  # 0 if the model does not use domains


def make_lm_setup(config: ml_collections.ConfigDict) -> LMSetup:
    """Build the language model of a config, with its trainer and sizes."""
    config = config.copy_and_resolve_references()
    config.model.impl = 'xla'  # FLOPs of cuDNN calls cannot be counted
    lm_config.validate(config)
    is_multi_domain = config.model.source == 'domain'
    num_domains = _count_domains(config) if is_multi_domain else 0
    vocabulary = _count_vocabulary(config)
    config = lm.match_size(config, vocabulary, num_domains)
    trainer = lm.build_trainer(config, vocabulary, num_domains)
    return LMSetup(config, trainer, vocabulary, num_domains)


def _count_vocabulary(config: ml_collections.ConfigDict) -> int:
    if config.data.level == 'file':
        with name_config_keys(lm.DATA_KEYS):
            return tokenizers.count_ids(tokenizers.read_tokenizer(config.data.tokenizer))
    return 256 if config.data.level == 'byte' else config.data.vocabulary


def _lm(config: ml_collections.ConfigDict) -> Costs:
    config, trainer, vocabulary, num_domains = make_lm_setup(config)
    batch_size, num_tokens = config.train.batch, config.train.length
    scalar_shape: Any = jax.ShapeDtypeStruct((), jnp.int32)
    token_shape: Any = jax.ShapeDtypeStruct((num_tokens + 1, batch_size), jnp.int32)
    train_state = jax.eval_shape(trainer.init, scalar_shape)
    domain_shape = token_shape if num_domains else None
    batch = Batch(token_shape, domain_shape, seed=scalar_shape, step=scalar_shape)
    return {
        **lm.compute_costs(config, vocabulary, num_domains),
        'steps': config.train.steps,
        'seeds': len(config.seeds),
        'units': batch_size * num_tokens,
        'flops': counting.flops(trainer.step, train_state, batch),
    }


def _count_domains(config: ml_collections.ConfigDict) -> int:
    data = config.data
    cache = sources.get_cache_directory(data.cache)
    with name_config_keys(lm.DATA_KEYS):
        documents = sources.load_texts(data.source, data.path, ['train'], cache)['train']
    return len([document for document in documents if document.domain])


class RLSetup(NamedTuple):
    """A config's agent, and its environment if that is written in JAX."""

    environment: JaxEnvironment | None
    agent: Agent
    optimizer: optax.GradientTransformation
    learner: learner.LearnerState  # shapes, of one seed
    trajectory: Trajectory  # shapes, of one seed's update


def make_rl_setup(config: ml_collections.ConfigDict) -> RLSetup:
    """Build the agent of a config, with its optimizer and the shapes of one update."""
    rl_config.validate(config)
    # The environment says what the agent observes and which actions it has.
    batch_size, num_steps = config.train.batch, config.train.length
    environment = None
    if envs.is_on_host(config.env.name):
        env_spec = rl.read_spec(config)
    else:
        environment = rl.make_environment(config)
        env_spec = environment.spec
    agent = rl.build_agent(config, env_spec)
    optimizer = optim.make_optimizer(config.optim, rl_config.count_updates(config))

    # A state and a trajectory of one seed, as shapes.
    def init_state(seed: jax.Array) -> learner.LearnerState:
        params = rl.init_params(agent, jax.random.key(seed))
        return learner.init_learner_state(params, optimizer, len(env_spec.tasks))

    def make_shape(dtype: DTypeLike) -> Any:
        return jax.ShapeDtypeStruct((num_steps, batch_size), dtype)

    trajectory = Trajectory(
        inputs=rl.make_input_shapes(env_spec, num_steps + 1, batch_size),
        action=make_shape(jnp.int32),
        log_prob=make_shape(jnp.float32),
        discount=make_shape(jnp.float32),
        valid=make_shape(jnp.bool_),
        carry=jax.eval_shape(lambda: agent.initial_carry(batch_size)),
    )
    state_shapes = jax.eval_shape(init_state, jax.ShapeDtypeStruct((), jnp.int32))
    return RLSetup(environment, agent, optimizer, state_shapes, trajectory)


def _rl(config: ml_collections.ConfigDict) -> Costs:
    _, agent, optimizer, learner_state, trajectory = make_rl_setup(config)
    batch_size, num_steps = config.train.batch, config.train.length
    update = functools.partial(learner.update, agent, optimizer, rl.get_hyperparameters(config))
    agent_costs = rl.compute_costs(agent, batch_size, num_steps)
    acting_flops = batch_size * num_steps * agent_costs['flops_per_step']['model']
    return {
        **agent_costs,
        'steps': rl_config.count_updates(config),
        'seeds': len(config.seeds),
        'units': batch_size * num_steps,
        'flops': acting_flops + counting.flops(update, learner_state, trajectory),
    }


def _fit(config: ml_collections.ConfigDict) -> Costs:
    problem = fit.make_problem(config)
    optimizer = optim.make_optimizer(config.optim, config.train.steps)
    seed_shape = jax.ShapeDtypeStruct((), jnp.int32)
    init_state = functools.partial(train_fit.init_train_state, problem, optimizer)
    train_state = jax.eval_shape(init_state, seed_shape)
    train_step = functools.partial(train_fit.train_steps, problem, optimizer, 1)
    return {
        **problem.costs(),
        'steps': config.train.steps,
        'seeds': len(config.seeds),
        'units': problem.examples,
        'flops': counting.flops(train_step, train_state, seed_shape),
    }


def _search(config: ml_collections.ConfigDict) -> Costs:
    fit.validate(config)
    return {'steps': len(config.search.at), 'seeds': len(config.seeds)}


TASKS: dict[str, Callable[[ml_collections.ConfigDict], Costs]] = {
    'lm': _lm,
    'rl': _rl,
    'fit': _fit,
    'search': _search,
}
