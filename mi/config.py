"""Checking a config against a schema before anything is built from it.

A schema maps every dotted key to a rule. A rule takes the value and returns a description of the
expected value, or '' if the value is valid.
"""

import difflib
import importlib.metadata
import inspect
import math
import pathlib
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import ml_collections

from mi.registry import Registry, is_reference

Rule = Callable[[Any], str]
SMALLEST, LARGEST = 2.0**-126, 2.0**127  # magnitudes of normal float32 numbers


class UserError(Exception):
    """An error that the user can fix, with a one-line message; the exit code is 1."""


def format_error(error: BaseException) -> str:
    """Return the message of an error in one line, without the quotes of a KeyError."""
    message: Any = error
    while isinstance(message, KeyError | AttributeError) and message.args:
        message = message.args[0]  # ml_collections nests these errors
    return ' '.join(str(message).split())


def suggest_install(extra: str) -> str:
    """Return the command that installs the packages of an extra.

    The project is not on PyPI. In a clone the command installs the clone with the extra; otherwise
    it installs the packages that the project's metadata lists for the extra.
    """
    clone = pathlib.Path(__file__).resolve().parent.parent
    if (clone / 'setup.py').exists():
        path = '.' if clone == pathlib.Path.cwd() else str(clone)
        return f'pip install -e {shlex.quote(f"{path}[{extra}]")}'
    requirements = importlib.metadata.requires('multiplicative-interactions') or []
    pattern = re.compile(rf'(.+?) *; *extra == [\'"]{extra}[\'"]')
    matches = (pattern.fullmatch(requirement) for requirement in requirements)
    return shlex.join(['pip', 'install', *(match[1] for match in matches if match)])


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the closest known name, if any is close, and all names.

    For 'package.module:Object' in a registry, return why it cannot be imported.
    """
    if isinstance(known, Registry) and is_reference(name):
        return known.explain(name)
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f'did you mean {close[0]!r}? ' if close else ''
    return f'{hint}known: {", ".join(known)}'


def has_parameter(constructor: Callable[..., Any], name: str) -> bool:
    """Return whether a class, function or partial has a parameter with this name."""
    return name in inspect.signature(constructor).parameters


def flatten(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Flatten nested keys: {'optim': {'name': 'adam'}} → {'optim.name': 'adam'}."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            leaves |= flatten(value, f'{prefix}{key}.')
        else:
            leaves[f'{prefix}{key}'] = value
    return leaves


def describe_difference(
    old_config: Mapping[str, Any], new_config: Mapping[str, Any], max_keys: int = 8
) -> str:
    """Describe the keys that differ, 'model.width was 3 and is 4 now, …'; '' if none differ."""
    old, new = flatten(old_config), flatten(new_config)

    def format_value(leaves: Mapping[str, Any], key: str) -> str:
        return repr(leaves[key]) if key in leaves else 'absent'

    changes = [
        f'{key} was {format_value(old, key)} and is {format_value(new, key)} now'
        for key in sorted(old | new)
        if not (key in old and key in new and old[key] == new[key])
    ]
    rest = [f'{len(changes) - max_keys} more'] if len(changes) > max_keys else []
    return ', '.join(changes[:max_keys] + rest)


def check(config: ml_collections.ConfigDict, schema: Mapping[str, Rule]) -> None:
    """Raise UserError for the first unknown key, missing key, or invalid value.

    A rule for 'a.b.*' applies to all keys below a.b, which are optional.
    """
    values = flatten(config.to_dict())

    # Expand rules for optional keys.
    optional = {key.removesuffix('*'): rule for key, rule in schema.items() if key.endswith('.*')}
    for key in values:
        for prefix, rule in optional.items():
            if key.startswith(prefix):
                schema = {**schema, key: rule}
    schema = {key: rule for key, rule in schema.items() if not key.endswith('.*')}

    # Compare keys, then check values.
    for key in values:
        if key not in schema:
            close = difflib.get_close_matches(key, schema, n=1)
            hint = f'; did you mean config.{close[0]}?' if close else ''
            raise UserError(f'config.{key} is unknown{hint}')
    for key, rule in schema.items():
        if key not in values:
            raise UserError(f'config.{key} is missing')
        expected = rule(values[key])
        if expected:
            raise UserError(f'config.{key} = {values[key]!r}: expected {expected}')


def choice(known: Collection[str]) -> Rule:
    """Return a rule for the names in `known`, which may grow before the config is checked."""

    def check_choice(value: Any) -> str:
        if isinstance(value, str) and value in known:
            return ''
        return f'one of the known words; {suggest(str(value), known)}'

    return check_choice


def integer(low: int, high: float = math.inf) -> Rule:
    """Return a rule for integers in [low, high]."""
    bounds = f'an integer of at least {low}' + ('' if math.isinf(high) else f', at most {high}')

    def check_integer(value: Any) -> str:
        is_valid = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return '' if is_valid else bounds

    return check_integer


def number(
    low: float, high: float = math.inf, *, exclusive: bool = False, below: float = math.inf
) -> Rule:
    """Return a rule for numbers in [low, high], or (low, high] if exclusive, less than `below`.

    In float32 the number must be finite, and nonzero unless it is 0.
    """
    bounds = f'a finite number {"above" if exclusive else "of at least"} {low}'
    bounds += '' if math.isinf(high) else f', at most {high}'
    bounds += '' if math.isinf(below) else f', below {below}'

    def check_number(value: Any) -> str:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return bounds
        exceeds_low = value > low if exclusive else value >= low
        if not (exceeds_low and value <= high and value < below and math.isfinite(value)):
            return bounds
        is_float32 = value == 0 or SMALLEST <= abs(value) <= LARGEST
        return '' if is_float32 else f'{bounds}, from {SMALLEST:.1g} to {LARGEST:.1g} in size'

    return check_number


def boolean(value: Any) -> str:
    return '' if isinstance(value, bool) else 'True or False'


def text(value: Any) -> str:
    return '' if isinstance(value, str) else 'a string'


def seeds(value: Any) -> str:
    is_valid = (
        isinstance(value, tuple | list)
        and len(value) > 0
        and all(isinstance(s, int) and not isinstance(s, bool) and 0 <= s < 2**31 for s in value)
        and len(set(value)) == len(value)
    )
    expected = 'a non-empty tuple of distinct non-negative integers, such as (0, 1, 2)'
    return '' if is_valid else expected


def mesh_shape(value: Any) -> str:
    is_valid = isinstance(value, tuple | list) and len(value) in (0, 3)
    is_valid = is_valid and not any(map(integer(1), value))
    return '' if is_valid else 'a tuple (seed, data, fsdp) of numbers of devices, or ()'


def tuple_of(rule: Rule, description: str) -> Rule:
    """Return a rule for non-empty tuples whose entries pass `rule`."""

    def check_entries(value: Any) -> str:
        is_valid = isinstance(value, tuple | list) and len(value) > 0 and not any(map(rule, value))
        return '' if is_valid else f'a non-empty tuple of {description}'

    return check_entries
