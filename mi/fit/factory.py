"""Check a config and build its problem, with a model of the wanted size."""

import functools
import importlib
from collections.abc import Mapping
from typing import Protocol, cast

import jax
import ml_collections
from chex import PRNGKey

from mi import counting
from mi.config import (
    RUN_SCHEMA,
    Rule,
    UserError,
    check,
    choice,
    flatten,
    integer,
    number,
    tuple_of,
)
from mi.fit.problem import Params, Problem
from mi.precision import PRECISIONS
from mi.registry import import_object, is_reference
from mi.training import averaging, optim, trackers

SCHEMA: dict[str, Rule] = {
    'task': choice(['fit', 'search']),
    **RUN_SCHEMA,
    'tracker': trackers.check_tracker,
    'problem.name': str,
    'model.width': integer(1),
    'model.parameters': integer(0),
    'train.steps': integer(1),
    'train.matmul_precision': choice(PRECISIONS),
    **optim.SCHEMA,
}


SEARCH: dict[str, Rule] = {
    'search.over': choice(['problem.dimension']),
    'search.at': tuple_of(integer(1), 'positive integers'),
    'search.fit_from': integer(1),
    'search.target': number(0, exclusive=True),
    'search.parameters': integer(1),
    'search.per_octave': integer(1),
    'search.rates': tuple_of(number(0, exclusive=True), 'positive numbers'),
}


class ProblemMaker(Protocol):
    """A problem by name: a module, or a class or another object with these two names."""

    @property
    def SCHEMA(self) -> Mapping[str, Rule]:  # noqa: N802
        """The rules of its config keys."""

    def make(self, config: ml_collections.ConfigDict) -> Problem:
        """Build the problem of a config."""


def import_problem(problem_name: object) -> ProblemMaker:
    """Import what makes a problem: 'package.module', or 'package.module:Object'.

    Raises:
      UserError: if there is no such module or object, or if it lacks SCHEMA or make(config).
    """
    expected = (
        "expected a module with SCHEMA and make, such as 'experiments.regression.problem', or "
        "'package.module:Object' with both"
    )
    try:
        if not isinstance(problem_name, str):
            raise ValueError('it is not a name')
        is_object = is_reference(problem_name)
        maker = import_object(problem_name) if is_object else importlib.import_module(problem_name)
    except (ImportError, ValueError) as error:
        raise UserError(f'config.problem.name = {problem_name!r}: {expected} ({error})') from error
    if missing := [name for name in ('SCHEMA', 'make') if not hasattr(maker, name)]:
        raise UserError(
            f'config.problem.name = {problem_name!r}: {expected} (no {" and no ".join(missing)})'
        )
    return cast(ProblemMaker, maker)


def validate(config: ml_collections.ConfigDict) -> None:
    """Check a config before anything is built.

    Raises:
      UserError: if a value is invalid, or contradicts another.
    """
    # Each key by its rule; a problem has rules of its own.
    problem_name = flatten(config.to_dict()).get('problem.name')
    schema = {**SCHEMA, **import_problem(problem_name).SCHEMA}
    check(config, schema | (SEARCH if config.task == 'search' else {}))
    optim.validate(config.optim, config.train.steps)

    # Evaluations and checkpoints come with a record.
    for interval_key in ('eval_every', 'save_every'):
        interval = config.train[interval_key]
        if interval % config.train.log_every:
            raise UserError(
                f'config.train.{interval_key} = {interval}: expected a multiple of '
                f'config.train.log_every = {config.train.log_every}, the number of steps between '
                f'records'
            )

    # A search sets widths, scales the updates, and compares the last evaluations.
    if config.task == 'search' and config.model.parameters:
        raise UserError(
            f'config.model.parameters = {config.model.parameters}: expected 0. A '
            f'search sets the width; config.search.parameters is its limit'
        )
    if config.task == 'search' and averaging.has_eval_params(
        optim.get_state_shapes(config.optim, config.train.steps)
    ):
        raise UserError(
            f'config.optim.name = {config.optim.name!r}, config.optim.ema = {config.optim.ema}: '
            f'expected an optimizer whose parameters are evaluated as they are trained, '
            f"because a search scales the updates by config.search.rates. Try 'adam' and 0"
        )
    if config.task == 'search' and config.train.steps % config.train.eval_every:
        raise UserError(
            f'config.train.steps = {config.train.steps}: expected a multiple of '
            f'config.train.eval_every = {config.train.eval_every}, the number of steps between '
            f'evaluations'
        )


def make_problem(config: ml_collections.ConfigDict) -> Problem:
    """Build the problem of a config, with the width nearest to `model.parameters` if that is not 0.

    Raises:
      UserError: on an invalid config, or if no width comes near that number of parameters.
    """
    validate(config)
    num_params = config.model.parameters
    if num_params:
        config = set_width(config, _nearest_width(config, 'config.model.parameters', num_params))
    return import_problem(config.problem.name).make(config)


def largest_width(config: ml_collections.ConfigDict) -> int:
    """Return the largest width of at most `search.parameters`.

    It is 1 if there is none, and if the number of parameters does not grow with the width, as that
    of one MI without a hidden layer: a search then says whether this model reaches its target.
    """
    max_params = config.search.parameters
    smallest = _count_at_width(config, 1)
    if smallest > max_params or smallest == _count_at_width(config, 2):
        return 1
    width = _nearest_width(config, 'config.search.parameters', max_params)
    return width if _count_at_width(config, width) <= max_params else width - 1


def _nearest_width(config: ml_collections.ConfigDict, config_key: str, num_params: int) -> int:
    """Return the width whose number of parameters is nearest to that of `config_key`."""
    try:
        return counting.nearest_size(functools.partial(_count_at_width, config), num_params)
    except ValueError as error:
        smallest = _count_at_width(config, 1)
        if smallest == _count_at_width(config, 2):
            raise UserError(
                f'{config_key} = {num_params}: the model has {smallest:,} parameters at any width; '
                f'expected 0, or a model that grows with its width, such as config.model.depth = 1'
            ) from error
        advice = 'Raise it, or use another fusion.' if smallest > num_params else 'Lower it.'
        raise UserError(f'{config_key} = {num_params}: {error}. {advice}') from error


def _count_at_width(config: ml_collections.ConfigDict, width: int) -> int:
    return count_parameters(import_problem(config.problem.name).make(set_width(config, width)))


def count_parameters(problem: Problem) -> int:
    """Count the parameters of a problem's model."""

    def init_params(rng_key: PRNGKey) -> Params:
        return problem.init_params(rng_key, problem.draw_world(rng_key))

    params = jax.eval_shape(init_params, jax.random.key(0))
    return counting.parameters(problem.model_params(params))


def set_width(config: ml_collections.ConfigDict, width: int) -> ml_collections.ConfigDict:
    """Return the config with another `model.width`."""
    config = config.copy_and_resolve_references()
    config.model.width = width
    return config
