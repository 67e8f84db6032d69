"""Validation of a config against a schema, before anything is built from it.

A schema maps every dotted key to a rule. A rule is either the type that the value must have, or a
function that takes the value and returns '' if it is valid, or else a description of the expected
value.
"""

import contextlib
import difflib
import errno
import importlib.metadata
import inspect
import math
import os
import pathlib
import re
import shlex
from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from mi.registry import Registry, is_reference

if TYPE_CHECKING:
    import ml_collections

Rule = type | Callable[[object], str]
SMALLEST, LARGEST = 2.0**-126, 2.0**127  # magnitudes of normal float32 numbers
EXPECTED = {bool: 'True or False', int: 'an integer', float: 'a number', str: 'a string'}
"""Type → description of its values, for errors."""


class UserError(Exception):
    """An error that the user can fix. Commands print its one-line message and exit with code 1."""


class ArgumentError(UserError, ValueError):
    """An invalid argument of a library function, named in backticks in the message.

    Trainers use `name_config_keys` to replace the argument's name with its config key.
    """


@contextlib.contextmanager
def name_config_keys(config_keys: Mapping[str, str]) -> Iterator[None]:
    """Convert an ArgumentError into a UserError that names the config keys of the arguments.

    Args:
      config_keys: config keys by argument name. {'options': 'config.env.options'} also replaces
        `options.length` with config.env.options.length.
    """

    def name_key(match: re.Match[str]) -> str:
        argument, fields = match.groups()
        return config_keys[argument] + fields if argument in config_keys else match[0]

    try:
        yield
    except ArgumentError as error:
        raise UserError(re.sub(r'`(\w+)((?:\.\w+)*)`', name_key, str(error))) from error


@contextlib.contextmanager
def name_output(flag: str, file: pathlib.Path) -> Iterator[None]:
    """Create the folder of a file to write, and name the file's flag if either cannot be written.

    Raises:
      UserError: if writing fails.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        yield
    except OSError as error:
        raise UserError(f'--{flag}={file}: {error.strerror or error}. Use another file') from error


def format_error(error: BaseException) -> str:
    """Return an error's message on one line, without the quotes that KeyError adds."""
    message: object = error
    while isinstance(message, KeyError | AttributeError) and message.args:
        message = message.args[0]  # ml_collections nests these errors
    return ' '.join(str(message).split())


def suggest_install(extra: str) -> str:
    """Return the command that installs the packages of an extra.

    In a clone, the command installs the clone with the extra. Elsewhere it installs the packages
    that the extra requires, because the project itself is not on PyPI.
    """
    clone = pathlib.Path(__file__).resolve().parent.parent
    if (clone / 'setup.py').exists():
        clone_path = '.' if clone == pathlib.Path.cwd() else str(clone)
        return f'pip install -e {shlex.quote(f"{clone_path}[{extra}]")}'
    return shlex.join(['pip', 'install', *_list_requirements(extra)])


def _list_requirements(extra: str) -> list[str]:
    """Return the packages of an extra, expanding other extras of this project that it includes."""
    requirements = importlib.metadata.requires('multiplicative-interactions') or []
    pattern = re.compile(rf'(.+?) *; *extra == [\'"]{extra}[\'"]')
    names: list[str] = []
    for match in filter(None, map(pattern.fullmatch, requirements)):
        included = re.fullmatch(r'multiplicative-interactions\[(.+)\]', match[1])
        if not included:
            names.append(match[1])
            continue
        for included_extra in included[1].split(','):
            names += _list_requirements(included_extra)
    return list(dict.fromkeys(names))


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the closest match, if there is one, and all known names.

    For a reference 'package.module:Object' into a registry, the hint says why it cannot be
    imported.
    """
    tables = known.maps if isinstance(known, ChainMap) else [known]
    registries = [table for table in tables if isinstance(table, Registry)]
    if registries and is_reference(name):
        return '; '.join(registry.explain(name) for registry in registries)
    known_names = sorted(known)
    close_names = difflib.get_close_matches(name, known_names, n=1)
    hint = f'did you mean {close_names[0]!r}? ' if close_names else ''
    return f'{hint}known: {", ".join(known_names)}'


def has_parameter(constructor: Callable[..., object], name: str) -> bool:
    """Return whether a class, function or partial has a parameter with this name."""
    return name in inspect.signature(constructor).parameters


def flatten(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Flatten nested keys: {'optim': {'name': 'adam'}} → {'optim.name': 'adam'}."""
    leaves: dict[str, Any] = {}
    for field_name, field_value in config.items():
        if isinstance(field_value, Mapping):
            leaves |= flatten(field_value, f'{prefix}{field_name}.')
        else:
            leaves[f'{prefix}{field_name}'] = field_value
    return leaves


def is_option_group(name: str) -> bool:
    """Return whether a section is a group of options, such as `options` or `core_options`."""
    return name == 'options' or name.endswith('_options')


def is_option(config_key: str) -> bool:
    """Return whether a key is in a group of options, such as 'env.options.sticky'.

    Unlike other keys, an option is in a config only if it is set. Where it is missing, it has its
    default, even if other configs have the key.
    """
    return any(map(is_option_group, config_key.split('.')[:-1]))


def find_added(
    old_config: Mapping[str, object], new_config: Mapping[str, object]
) -> dict[str, object]:
    """Return the new values of keys that only the new config has, because the code got them since.

    Options are not among them: a config that lacks an option has its default.
    """
    old_leaves, new_leaves = flatten(old_config), flatten(new_config)
    return {
        config_key: value
        for config_key, value in new_leaves.items()
        if config_key not in old_leaves and not is_option(config_key)
    }


def describe_difference(
    old_config: Mapping[str, object], new_config: Mapping[str, object], max_keys: int = 8
) -> str:
    """Describe the keys that differ, such as 'model.width was 3 and is 4 now', or return ''."""
    old_leaves, new_leaves = flatten(old_config), flatten(new_config)

    def format_leaf(leaves: Mapping[str, object], config_key: str) -> str:
        return repr(leaves[config_key]) if config_key in leaves else 'absent'

    changes = []
    for config_key in sorted(old_leaves | new_leaves):
        is_in_both = config_key in old_leaves and config_key in new_leaves
        if not (is_in_both and old_leaves[config_key] == new_leaves[config_key]):
            old_value, new_value = (
                format_leaf(leaves, config_key) for leaves in (old_leaves, new_leaves)
            )
            changes.append(f'{config_key} was {old_value} and is {new_value} now')
    omitted = [f'{len(changes) - max_keys} more'] if len(changes) > max_keys else []
    return ', '.join(changes[:max_keys] + omitted)


def check(config: 'ml_collections.ConfigDict', schema: Mapping[str, Rule]) -> None:
    """Raise UserError for the first unknown key, missing key, or invalid value.

    A rule for 'a.b.*' applies to all keys below a.b, which are optional.
    """
    values = flatten(config.to_dict())

    # Expand rules for optional keys.
    rules: dict[str, Rule] = {}
    for pattern, rule in schema.items():
        if pattern.endswith('.*'):
            prefix = pattern.removesuffix('*')
            rules |= {config_key: rule for config_key in values if config_key.startswith(prefix)}
        else:
            rules[pattern] = rule

    # Compare keys, then check values.
    for config_key in values:
        if config_key not in rules:
            close_keys = difflib.get_close_matches(config_key, rules, n=1)
            hint = f'; did you mean config.{close_keys[0]}?' if close_keys else ''
            raise UserError(f'config.{config_key} is unknown{hint}')
    for config_key, rule in rules.items():
        if config_key not in values:
            raise UserError(f'config.{config_key} is missing')
        if expected := find_violation(rule, values[config_key]):
            raise UserError(f'config.{config_key} = {values[config_key]!r}: expected {expected}')


def check_intervals(config: 'ml_collections.ConfigDict') -> None:
    """Check that every evaluation and every checkpoint comes with a record of the log.

    Raises:
      UserError: if `train.eval_every` or `train.save_every` is not a multiple of `train.log_every`.
    """
    log_every = config.train.log_every
    for field in ('eval_every', 'save_every'):
        interval = config.train[field]
        if interval % log_every:
            raise UserError(
                f'config.train.{field} = {interval}: expected a multiple of config.train.log_every '
                f'= {log_every}. Try {math.ceil(interval / log_every) * log_every}'
            )


def find_violation(rule: Rule, value: object) -> str:
    """Return a description of the values that a rule accepts, or '' if it accepts this value."""
    if isinstance(rule, type):
        return '' if isinstance(value, rule) else EXPECTED[rule]
    return rule(value)


def any_value(value: object) -> str:
    """Accept any value. This is the rule for options that their constructor validates."""
    return ''


def choice(known: Collection[str]) -> Rule:
    """Return a rule that accepts the names that `known` holds when the config is checked."""

    def check_choice(value: object) -> str:
        if isinstance(value, str) and value in known:
            return ''
        return f'a known name; {suggest(str(value), known)}'

    return check_choice


def integer(low: int, high: float = math.inf) -> Callable[[object], str]:
    """Return a rule that accepts the integers in [low, high]."""
    bounds = f'an integer of at least {low}' + ('' if math.isinf(high) else f', at most {high}')

    def check_integer(value: object) -> str:
        return '' if _is_integer(value) and low <= value <= high else bounds

    return check_integer


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def number(
    low: float, high: float = math.inf, *, exclusive: bool = False, below: float = math.inf
) -> Callable[[object], str]:
    """Return a rule that accepts the numbers in [low, high] that are less than `below`.

    If `exclusive` is True, the rule rejects `low` itself. It always rejects numbers that overflow
    or underflow in float32.
    """
    bounds = f'a finite number {"above" if exclusive else "of at least"} {low}'
    bounds += '' if math.isinf(high) else f', at most {high}'
    bounds += '' if math.isinf(below) else f', below {below}'

    def check_number(value: object) -> str:
        if not (_is_integer(value) or isinstance(value, float)):
            return bounds
        exceeds_low = value > low if exclusive else value >= low
        if not (exceeds_low and value <= high and value < below and math.isfinite(value)):
            return bounds
        is_float32 = value == 0 or SMALLEST <= abs(value) <= LARGEST
        return (
            '' if is_float32 else f'{bounds}, with a magnitude from {SMALLEST:.1g} to {LARGEST:.1g}'
        )

    return check_number


def seeds(value: object) -> str:
    is_valid = (
        isinstance(value, tuple | list)
        and len(value) > 0
        and not any(map(integer(0, 2**31 - 1), value))
        and len(set(value)) == len(value)
    )
    expected = 'a non-empty tuple of distinct non-negative integers, such as (0, 1, 2)'
    return '' if is_valid else expected


def mesh_shape(value: object) -> str:
    is_valid = (
        isinstance(value, tuple | list) and len(value) in (0, 3) and not any(map(integer(1), value))
    )
    return '' if is_valid else 'a tuple (seed, data, fsdp) of device counts, or ()'


def tuple_of(rule: Callable[[object], str], description: str) -> Rule:
    """Return a rule that accepts non-empty tuples whose entries all pass `rule`."""

    def check_entries(value: object) -> str:
        is_valid = isinstance(value, tuple | list) and len(value) > 0 and not any(map(rule, value))
        return '' if is_valid else f'a non-empty tuple of {description}'

    return check_entries


RUN_SCHEMA: dict[str, Rule] = {
    'seeds': seeds,
    'train.batch': integer(1),
    'train.log_every': integer(1),
    'train.eval_every': integer(1),
    'train.save_every': integer(1),
    'train.keep': integer(1),
}
"""Rules for the keys of every trainer: seeds, batch size, and how often a run logs and saves."""
