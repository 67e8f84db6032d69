"""From a config, checked, to the problem that it names, its model of the size that is asked for."""

import functools
import importlib
import types
from typing import Any

import jax
import ml_collections

from mi import counting
from mi.config import (
    Rule,
    UserError,
    check,
    choice,
    flatten,
    integer,
    number,
    seeds,
    text,
    tuple_of,
)
from mi.fit.problem import Problem
from mi.precision import PRECISIONS
from mi.training import optim, trackers

SCHEMA: dict[str, Rule] = {
    'task': choice(['fit', 'search']),
    'seeds': seeds,
    'tracker': trackers.check_tracker,
    'problem.name': text,
    'model.width': integer(1),
    'model.parameters': integer(0),
    'train.steps': integer(1),
    'train.batch': integer(1),
    'train.matmul_precision': choice(PRECISIONS),
    'train.log_every': integer(1),
    'train.eval_every': integer(1),
    'train.save_every': integer(1),
    'train.keep': integer(1),
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


def problem_module(name: Any) -> types.ModuleType:
    """Import the module of a problem, such as 'experiments.regression.problem'.

    Raises:
      UserError: if there is no such module, or if it lacks SCHEMA or make(config) → Problem.
    """
    expected = "expected a module with SCHEMA and make, such as 'experiments.regression.problem'"
    try:
        module = importlib.import_module(name)
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(f'config.problem.name = {name!r}: {expected} ({error})') from error
    if not (hasattr(module, 'SCHEMA') and hasattr(module, 'make')):
        raise UserError(f'config.problem.name = {name!r}: {expected}')
    return module


def validate(config: ml_collections.ConfigDict) -> None:
    """Refuses a config that cannot work, before anything is built.

    Raises:
      UserError: which key, what was expected, what to change.
    """
    name = flatten(config.to_dict()).get('problem.name')
    schema = SCHEMA | problem_module(name).SCHEMA
    check(config, schema | (SEARCH if config.task == 'search' else {}))
    optim.validate(config.optim, config.train.steps)
    for key in ('eval_every', 'save_every'):
        if config.train[key] % config.train.log_every:
            raise UserError(
                f'config.train.{key} = {config.train[key]}: expected a multiple of '
                f'config.train.log_every = {config.train.log_every}, the steps of one record'
            )
    if config.task == 'search' and config.model.parameters:
        raise UserError(
            f'config.model.parameters = {config.model.parameters}: expected 0, for a search sets '
            f'the width; the most is config.search.parameters'
        )
    if config.task == 'search' and config.train.steps % config.train.eval_every:
        raise UserError(
            f'config.train.steps = {config.train.steps}: expected a multiple of '
            f'config.train.eval_every = {config.train.eval_every}, where the error is looked at'
        )


def problem(config: ml_collections.ConfigDict) -> Problem:
    """The problem of a config; where `model.parameters` is not 0, at the width that comes nearest.

    Raises:
      UserError: on a config that cannot work, or if no width has about so many parameters.
    """
    validate(config)
    wanted = config.model.parameters
    if wanted:
        config = of_width(config, _nearest_width(config, 'config.model.parameters', wanted))
    return problem_module(config.problem.name).make(config)


def largest_width(config: ml_collections.ConfigDict) -> int:
    """The largest width of at most `search.parameters`; 1 if there is none.

    Raises:
      UserError: if no width costs so many: nothing grows with it.
    """
    most = config.search.parameters
    if _parameters_at(config, 1) > most:
        return 1
    width = _nearest_width(config, 'config.search.parameters', most)
    return width if _parameters_at(config, width) <= most else width - 1


def _nearest_width(config: ml_collections.ConfigDict, key: str, wanted: int) -> int:
    """Where the number of parameters comes nearest to the one wanted, which stands at the key."""
    try:
        return counting.nearest_size(functools.partial(_parameters_at, config), wanted)
    except ValueError as error:
        smallest = _parameters_at(config, 1)
        if smallest == _parameters_at(config, 2):
            expected = '0, or ' * (key == 'config.model.parameters') + 'a model that grows'
            raise UserError(
                f'{key} = {wanted}: nothing in the model grows with config.model.width, it has '
                f'{smallest:,} at any; expected {expected}, as with config.model.depth = 1'
            ) from error
        change = 'give more of them, or another fusion' if smallest > wanted else 'give fewer'
        raise UserError(f'{key}: {error}; {change}') from error


def _parameters_at(config: ml_collections.ConfigDict, width: int) -> int:
    return parameters(problem_module(config.problem.name).make(of_width(config, width)))


def parameters(problem: Problem) -> int:
    """Of the model of a problem."""
    key = jax.random.key(0)
    params = jax.eval_shape(lambda key: problem.init_params(key, problem.draw_world(key)), key)
    return counting.parameters(problem.model_params(params))


def of_width(config: ml_collections.ConfigDict, width: int) -> ml_collections.ConfigDict:
    """The config with another width of the model."""
    config = config.copy_and_resolve_references()
    config.model.width = width
    return config
