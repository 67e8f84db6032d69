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
    """What a run of a config will cost.

    - 'parameters' and 'flops_per_token' ('…_step' of an environment, '…_example'): {'model': …,
      'fusion': …} of one seed and of a forward pass, as in cost.json;
    - 'steps': how many the run has; 'seeds': how many it trains at once;
    - 'units': tokens, steps of environments or examples of one step and one seed;
    - 'flops': of one step and one seed, forward and backward, for an agent acting too.

    Of a search (task 'search'), which finds the sizes of its models itself, there are only 'steps'
    and 'seeds'. Evaluations count nothing anywhere.

    A model of words or byte pairs has `data.vocabulary` of them here. A run has as many where its
    text has.

    Raises:
      UserError: on a config that cannot work.
    """
    task = config.task
    if task not in TASKS:
        raise UserError(f'config.task = {task!r}: {suggest(str(task), TASKS)}')
    return TASKS[task](config)


class LMSetup(NamedTuple):
    """A language model of a config, as far as it can be known without the text."""

    config: ml_collections.ConfigDict
    trainer: Trainer
    vocabulary: int
    domains: int  # 0 if the model does not use domains


def lm_setup(config: ml_collections.ConfigDict) -> LMSetup:
    config = config.copy_and_resolve_references()
    config.model.impl = 'xla'  # of cuDNN's calls nothing could be counted, nor is a GPU needed here
    lm_config.validate(config)
    by_domain = config.model.source == 'domain'
    domains = _domains(config) if by_domain else 0
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


def _domains(config: ml_collections.ConfigDict) -> int:
    source = config.data
    cache = sources.get_cache_directory(source.cache)
    texts = sources.load_texts(source.source, source.path, ['train'], cache)['train']
    return len([text for text in texts if text.domain])


class RLSetup(NamedTuple):
    """An agent of a config; the environment where it is a JAX one."""

    environment: JaxEnvironment | None
    agent: Agent
    optimiser: optax.GradientTransformation
    learner: learner.LearnerState  # shapes, of one seed
    trajectory: Trajectory  # shapes, of one seed's update


def rl_setup(config: ml_collections.ConfigDict) -> RLSetup:
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
    optimiser = optim.make_optimizer(config.optim, rl_config.count_updates(config))

    def start(seed: jax.Array) -> learner.LearnerState:
        params = rl.init_params(agent, jax.random.key(seed))
        return learner.init_learner_state(params, optimiser, len(spec.tasks))

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
    return RLSetup(environment, agent, optimiser, state, trajectory)


def _rl(config: ml_collections.ConfigDict) -> Costs:
    _, agent, optimiser, state, trajectory = rl_setup(config)
    B, T = config.train.batch, config.train.length
    update = functools.partial(learner.update, agent, optimiser, rl.get_hyperparameters(config))
    costs = rl.compute_costs(agent, B, T)
    of_acting = B * T * costs['flops_per_step']['model']
    return {
        **costs,
        'steps': rl_config.count_updates(config),
        'seeds': len(config.seeds),
        'units': B * T,
        'flops': of_acting + counting.flops(update, state, trajectory),
    }


def _fit(config: ml_collections.ConfigDict) -> Costs:
    problem = fit.make_problem(config)
    optimiser = optim.make_optimizer(config.optim, config.train.steps)
    seed = jax.ShapeDtypeStruct((), jnp.int32)
    state = jax.eval_shape(functools.partial(train_fit.init_train_state, problem, optimiser), seed)
    one = functools.partial(train_fit.train_steps, problem, optimiser, 1)
    return {
        **problem.costs(),
        'steps': config.train.steps,
        'seeds': len(config.seeds),
        'units': problem.examples,
        'flops': counting.flops(one, state, seed),
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
