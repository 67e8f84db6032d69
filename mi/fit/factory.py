"""Validation of a config, and construction of its problem with a model of a given size."""

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
    check_intervals,
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
    """A maker of a problem: a module, a class or another object with SCHEMA and make."""

    @property
    def SCHEMA(self) -> Mapping[str, Rule]:  # noqa: N802
        """The rules for the problem's config keys."""

    def make(self, config: ml_collections.ConfigDict) -> Problem:
        """Build the problem of a config."""


def import_problem(problem_name: object) -> ProblemMaker:
    """Import the maker of a problem, 'package.module' or 'package.module:Object'.

    Raises:
      UserError: if the module or object does not exist, or lacks SCHEMA or make(config).
    """
    expected = (
        "expected a module with SCHEMA and make, such as 'experiments.regression.problem', or "
        "'package.module:Object' with both"
    )
    try:
        if not isinstance(problem_name, str):
            raise ValueError('it is not a string')
        is_object = is_reference(problem_name)
        maker = import_object(problem_name) if is_object else importlib.import_module(problem_name)
    except (ImportError, ValueError) as error:
        raise UserError(f'config.problem.name = {problem_name!r}: {expected} ({error})') from error
    if missing := [name for name in ('SCHEMA', 'make') if not hasattr(maker, name)]:
        raise UserError(
            f'config.problem.name = {problem_name!r}: {expected} (missing: {" and ".join(missing)})'
        )
    return cast(ProblemMaker, maker)


def validate(config: ml_collections.ConfigDict) -> None:
    """Validate a config before anything is built.

    Raises:
      UserError: if a value is invalid or conflicts with another.
    """
    # Each key by its rule; a problem has rules of its own.
    problem_name = flatten(config.to_dict()).get('problem.name')
    schema = {**SCHEMA, **import_problem(problem_name).SCHEMA}
    check(config, schema | (SEARCH if config.task == 'search' else {}))
    optim.validate(config.optim, config.train.steps)

    check_intervals(config)

    # A search sets widths, scales the updates, and compares the last evaluations.
    if config.task == 'search' and config.model.parameters:
        raise UserError(
            f'config.model.parameters = {config.model.parameters}: expected 0, because a '
            'search sets the width itself. Try config.search.parameters, which limits its '
            'size'
        )
    if config.task == 'search' and averaging.has_eval_params(
        optim.get_state_shapes(config.optim, config.train.steps)
    ):
        raise UserError(
            f'config.optim.name = {config.optim.name!r}, config.optim.ema = {config.optim.ema}: '
            'expected an optimizer that does not average parameters for evaluation, because a '
            "search scales the updates by config.search.rates. Try 'adam' and 0"
        )
    if config.task == 'search' and config.train.steps % config.train.eval_every:
        raise UserError(
            f'config.train.steps = {config.train.steps}: expected a multiple of '
            f'config.train.eval_every = {config.train.eval_every}, the number of steps between '
            f'evaluations'
        )


def make_problem(config: ml_collections.ConfigDict) -> Problem:
    """Build the problem of a config.

    If `model.parameters` is not 0, the model gets the width with the nearest number of parameters.

    Raises:
      UserError: if the config is invalid, or no width is near that number of parameters.
    """
    validate(config)
    num_params = config.model.parameters
    if num_params:
        config = set_width(config, _nearest_width(config, 'config.model.parameters', num_params))
    return import_problem(config.problem.name).make(config)


def largest_width(config: ml_collections.ConfigDict) -> int:
    """Return the largest width with at most `search.parameters` parameters.

    It is 1 if there is no such width, or if the number of parameters does not depend on the width,
    as for a single MI layer without a hidden layer. A search then only tests whether this model
    reaches the target.
    """
    max_params = config.search.parameters
    smallest = _count_at_width(config, 1)
    if smallest > max_params or smallest == _count_at_width(config, 2):
        return 1
    width = _nearest_width(config, 'config.search.parameters', max_params)
    return width if _count_at_width(config, width) <= max_params else width - 1


def _nearest_width(config: ml_collections.ConfigDict, config_key: str, num_params: int) -> int:
    """Return the width whose number of parameters is nearest to `num_params`."""
    try:
        return counting.nearest_size(functools.partial(_count_at_width, config), num_params)
    except ValueError as error:
        smallest = _count_at_width(config, 1)
        if smallest == _count_at_width(config, 2):
            raise UserError(
                f'{config_key} = {num_params}: expected 0, or a model whose size depends on its '
                f'width; this one always has {smallest:,} parameters. Try config.model.depth = 1'
            ) from error
        advice = (
            'Try a larger value or another fusion' if smallest > num_params else 'Try a lower value'
        )
        raise UserError(f'{config_key} = {num_params}: {error}. {advice}') from error


def _count_at_width(config: ml_collections.ConfigDict, width: int) -> int:
    return count_parameters(import_problem(config.problem.name).make(set_width(config, width)))


def count_parameters(problem: Problem) -> int:
    """Count the parameters of the problem's model."""

    def init_params(rng_key: PRNGKey) -> Params:
        return problem.init_params(rng_key, problem.draw_world(rng_key))

    params = jax.eval_shape(init_params, jax.random.key(0))
    return counting.parameters(problem.model_params(params))


def set_width(config: ml_collections.ConfigDict, width: int) -> ml_collections.ConfigDict:
    """Return a copy of the config with a different `model.width`."""
    config = config.copy_and_resolve_references()
    config.model.width = width
    return config
