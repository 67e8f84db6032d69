"""What a run of a config will cost, from shapes alone: no data is read and nothing is trained.

The counterpart of a run's cost.json, for `python -m launch.local --dry_run` and the like. What it
takes in memory, which needs a compilation, is `mi.estimate.memory`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from mi import counting
from mi.config import UserError, suggest
from mi.fit import factory as fit
from mi.fit import train as train_fit
from mi.lm import config as lm_config
from mi.lm import factory as lm
from mi.lm.data import sources
from mi.lm.data.batches import Batch
from mi.lm.trainer import Trainer
from mi.rl import config as rl_config
from mi.rl import envs, learner
from mi.rl import factory as rl
from mi.rl.agent import Agent
from mi.rl.envs.spec import JaxEnvironment
from mi.rl.trajectory import Trajectory
from mi.training import optim

Costs = dict[str, Any]


def estimate_costs(config: ml_collections.ConfigDict) -> Costs:
    """Return the cost of a config's run.

    - 'parameters': {'model': …, 'fusion': …} of one seed, as in cost.json;
    - 'flops_per_token', '…_step' (of an environment) or '…_example': the same for a forward pass;
    - 'steps': number of training steps; 'seeds': number of seeds that train simultaneously;
    - 'units': tokens, environment steps or examples per training step and seed;
    - 'flops': FLOPs per training step and seed, forward and backward, plus acting in RL.

    A search (task 'search') chooses the sizes of its models itself, so it only has 'steps' and
    'seeds'. Evaluations are not counted.

    The vocabulary of a model of words or byte pairs is `data.vocabulary`; a run uses fewer entries
    if its text has fewer.

    Raises:
      UserError: if the config is invalid.
    """
    task = config.task
    if task not in TASKS:
        raise UserError(f'config.task = {task!r}: {suggest(str(task), TASKS)}')
    return TASKS[task](config)


class LMSetup(NamedTuple):
    """The language model of a config, without its text."""

    config: ml_collections.ConfigDict
    trainer: Trainer
    vocabulary: int
    domains: int  # 0 if the model does not use domains


def lm_setup(config: ml_collections.ConfigDict) -> LMSetup:
    """Return the language model of a config, with its optimizer and sizes."""
    config = config.copy_and_resolve_references()
    config.model.impl = 'xla'  # FLOPs of cuDNN calls cannot be counted
    lm_config.validate(config)
    is_multi_domain = config.model.source == 'domain'
    domains = _count_domains(config) if is_multi_domain else 0
    vocabulary = 256 if config.data.level == 'byte' else config.data.vocabulary
    config = lm.match_size(config, vocabulary, domains)
    return LMSetup(config, lm.build_trainer(config, vocabulary, domains), vocabulary, domains)


def _lm(config: ml_collections.ConfigDict) -> Costs:
    config, trainer, vocabulary, domains = lm_setup(config)
    B, T = config.train.batch, config.train.length
    number: Any = jax.ShapeDtypeStruct((), jnp.int32)
    tokens: Any = jax.ShapeDtypeStruct((T + 1, B), jnp.int32)
    state = jax.eval_shape(trainer.init, number)
    batch = Batch(tokens, tokens if domains else None, seed=number, step=number)
    return {
        **lm.compute_costs(config, vocabulary, domains),
        'steps': config.train.steps,
        'seeds': len(config.seeds),
        'units': B * T,
        'flops': counting.flops(trainer.step, state, batch),
    }


def _count_domains(config: ml_collections.ConfigDict) -> int:
    data = config.data
    cache = sources.get_cache_directory(data.cache)
    texts = sources.load_texts(data.source, data.path, ['train'], cache)['train']
    return len([text for text in texts if text.domain])


class RLSetup(NamedTuple):
    """The agent of a config, and its environment if it is written in JAX."""

    environment: JaxEnvironment | None
    agent: Agent
    optimizer: optax.GradientTransformation
    learner: learner.LearnerState  # shapes, of one seed
    trajectory: Trajectory  # shapes, of one seed's update


def rl_setup(config: ml_collections.ConfigDict) -> RLSetup:
    """Return the agent of a config, with its optimizer and the shapes of one update."""
    rl_config.validate(config)
    B, T = config.train.batch, config.train.length
    environment = None
    name, options = rl.get_environment_args(config)
    if envs.is_on_host(name):
        spec = envs.host_spec(name, config.actors.batch, options)
    else:
        environment = envs.make(name, options)
        spec = environment.spec
    agent = rl.build_agent(config, spec)
    optimizer = optim.make_optimizer(config.optim, rl_config.count_updates(config))

    def start(seed: jax.Array) -> learner.LearnerState:
        params = rl.init_params(agent, jax.random.key(seed))
        return learner.init_learner_state(params, optimizer, len(spec.tasks))

    def rows(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((T, B), dtype)

    trajectory = Trajectory(
        inputs=rl.make_input_shapes(spec, T + 1, B),
        action=rows(jnp.int32),
        log_prob=rows(jnp.float32),
        discount=rows(jnp.float32),
        valid=rows(jnp.bool_),
        carry=jax.eval_shape(lambda: agent.initial_carry(B)),
    )
    state = jax.eval_shape(start, jax.ShapeDtypeStruct((), jnp.int32))
    return RLSetup(environment, agent, optimizer, state, trajectory)


def _rl(config: ml_collections.ConfigDict) -> Costs:
    _, agent, optimizer, state, trajectory = rl_setup(config)
    B, T = config.train.batch, config.train.length
    update = functools.partial(learner.update, agent, optimizer, rl.get_hyperparameters(config))
    costs = rl.compute_costs(agent, B, T)
    acting_flops = B * T * costs['flops_per_step']['model']
    return {
        **costs,
        'steps': rl_config.count_updates(config),
        'seeds': len(config.seeds),
        'units': B * T,
        'flops': acting_flops + counting.flops(update, state, trajectory),
    }


def _fit(config: ml_collections.ConfigDict) -> Costs:
    problem = fit.make_problem(config)
    optimizer = optim.make_optimizer(config.optim, config.train.steps)
    seed = jax.ShapeDtypeStruct((), jnp.int32)
    state = jax.eval_shape(functools.partial(train_fit.init_train_state, problem, optimizer), seed)
    step = functools.partial(train_fit.train_steps, problem, optimizer, 1)
    return {
        **problem.costs(),
        'steps': config.train.steps,
        'seeds': len(config.seeds),
        'units': problem.examples,
        'flops': counting.flops(step, state, seed),
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
