"""Checking a config against a schema before anything is built from it.

A schema maps every dotted key to a rule. A rule takes the value and returns what was expected,
'' where the value is fine.
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

Rule = Callable[[Any], str]
SMALLEST, LARGEST = 2.0**-126, 2.0**127  # normal numbers of float32


class UserError(Exception):
    """Something the user can mend; its message is one line that says how. Ends with exit code 1."""


def format_error(error: BaseException) -> str:
    """What an error says; of a KeyError its words, which `str` would quote."""
    said: Any = error
    while isinstance(said, KeyError | AttributeError) and said.args:
        said = said.args[0]  # ml_collections puts the one into the other
    return ' '.join(str(said).split())


def suggest_install(extra: str) -> str:
    """Return the command that installs what an extra needs.

    The project is on no index: from a clone it is installed by its path. Elsewhere the packages of
    the extra are named, which the metadata of the installed project knows.
    """
    clone = pathlib.Path(__file__).resolve().parent.parent
    if (clone / 'setup.py').exists():
        path = '.' if clone == pathlib.Path.cwd() else str(clone)
        return f'pip install -e {shlex.quote(f"{path}[{extra}]")}'
    required = importlib.metadata.requires('multiplicative-interactions') or []
    found = (re.fullmatch(rf'(.+?) *; *extra == [\'"]{extra}[\'"]', each) for each in required)
    return shlex.join(['pip', 'install', *(match[1] for match in found if match)])


def suggest(word: str, known: Iterable[str]) -> str:
    """A hint for an unknown word: the closest known one, if any is close, and all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    hint = f'did you mean {close[0]!r}? ' if close else ''
    return f'{hint}known: {", ".join(known)}'


def has_parameter(constructor: Callable[..., Any], name: str) -> bool:
    """Whether a class, function or partial of one has a parameter of this name."""
    return name in inspect.signature(constructor).parameters


def flatten(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """{'optim': {'name': 'adam'}} → {'optim.name': 'adam'}."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            leaves |= flatten(value, f'{prefix}{key}.')
        else:
            leaves[f'{prefix}{key}'] = value
    return leaves


def describe_difference(before: Mapping[str, Any], now: Mapping[str, Any], most: int = 8) -> str:
    """What differs between two configs, 'model.width was 3 and is 4, …'; '' if nothing does."""
    old, new = flatten(before), flatten(now)

    def value(of: Mapping[str, Any], key: str) -> str:
        return repr(of[key]) if key in of else 'absent'

    changed = [
        f'{key} was {value(old, key)} and is {value(new, key)} now'
        for key in sorted(old | new)
        if not (key in old and key in new and old[key] == new[key])
    ]
    more = [f'{len(changed) - most} more'] if len(changed) > most else []
    return ', '.join(changed[:most] + more)


def check(config: ml_collections.ConfigDict, schema: Mapping[str, Rule]) -> None:
    """Raise UserError on the first unknown key, missing key, or value that its rule refuses.

    A rule for 'a.b.*' is that of any keys below a.b, which need not be there.
    """
    values = flatten(config.to_dict())
    free = {key.removesuffix('*'): rule for key, rule in schema.items() if key.endswith('.*')}
    for key in values:
        for prefix, rule in free.items():
            if key.startswith(prefix):
                schema = {**schema, key: rule}
    schema = {key: rule for key, rule in schema.items() if not key.endswith('.*')}
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
    """A word that is in `known` when the config is checked: a dictionary may have got more."""

    def rule(value: Any) -> str:
        if isinstance(value, str) and value in known:
            return ''
        return f'one of the known words; {suggest(str(value), known)}'

    return rule


def integer(low: int, high: float = math.inf) -> Rule:
    bounds = f'an integer of at least {low}' + ('' if math.isinf(high) else f', at most {high}')

    def rule(value: Any) -> str:
        fine = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return '' if fine else bounds

    return rule


def number(
    low: float, high: float = math.inf, *, exclusive: bool = False, below: float = math.inf
) -> Rule:
    """Accept a number in [low, high], or (low, high] if exclusive, that is less than `below`.

    It has to be a finite number in float32 too, and not 0 there unless it is 0.
    """
    bounds = f'a finite number {"above" if exclusive else "of at least"} {low}'
    bounds += '' if math.isinf(high) else f', at most {high}'
    bounds += '' if math.isinf(below) else f', below {below}'

    def rule(value: Any) -> str:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return bounds
        above = value > low if exclusive else value >= low
        if not (above and value <= high and value < below and math.isfinite(value)):
            return bounds
        in_float32 = value == 0 or SMALLEST <= abs(value) <= LARGEST
        return '' if in_float32 else f'{bounds}, from {SMALLEST:.1g} to {LARGEST:.1g} in size'

    return rule


def boolean(value: Any) -> str:
    return '' if isinstance(value, bool) else 'True or False'


def text(value: Any) -> str:
    return '' if isinstance(value, str) else 'a string'


def seeds(value: Any) -> str:
    fine = (
        isinstance(value, tuple | list)
        and len(value) > 0
        and all(isinstance(s, int) and not isinstance(s, bool) and 0 <= s < 2**31 for s in value)
        and len(set(value)) == len(value)
    )
    return '' if fine else 'a non-empty tuple of distinct non-negative integers, such as (0, 1, 2)'


def mesh_shape(value: Any) -> str:
    is_valid = isinstance(value, tuple | list) and len(value) in (0, 3)
    is_valid = is_valid and not any(map(integer(1), value))
    return '' if is_valid else 'a tuple (seed, data, fsdp) of numbers of devices, or ()'


def tuple_of(rule: Rule, what: str) -> Rule:
    """A non-empty tuple whose every entry passes a rule."""

    def check_entries(value: Any) -> str:
        fine = isinstance(value, tuple | list) and len(value) > 0 and not any(map(rule, value))
        return '' if fine else f'a non-empty tuple of {what}'

    return check_entries
