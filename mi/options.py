"""Validation of a config's options against the constructor that takes them."""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from mi.config import ArgumentError, suggest

if TYPE_CHECKING:
    import ml_collections

Options: TypeAlias = dict[str, Any]  # name → value, of the types that a config can hold


def get_keyword_defaults(maker: Callable[..., object]) -> Options:
    """Return the defaults of a function's keyword-only arguments, by name."""
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(maker).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def get_field_defaults(module: Callable[..., object]) -> Options:
    """Return the field defaults of a Flax module, or of a partial of one, by name.

    This omits fields without a default, Flax's own fields, and the dtypes, which have a config key.
    """
    reserved = ('parent', 'name', 'dtype', 'param_dtype')
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(module).parameters.values()
        if parameter.name not in reserved and parameter.default is not parameter.empty
    }


def get_options(config: 'ml_collections.ConfigDict', config_key: str) -> Options:
    """Return the options under a config key, or {} for an older config that lacks the key."""
    options = config.get(config_key)
    return options.to_dict() if options else {}


def check_options(
    owner: str, options: Mapping[str, object], defaults: Mapping[str, object]
) -> None:
    """Check that every option is known and has the type of its default.

    An option whose default is None takes any value.

    Args:
      owner: name of the module or environment that takes the options, for error messages.
      options: the values of the options, by name.
      defaults: the defaults of all known options, by name.

    Raises:
      ArgumentError: if an option is unknown or has a different type than its default.
    """
    for option, setting in options.items():
        if option not in defaults:
            hint = suggest(option, defaults) if defaults else 'it has no options'
            raise ArgumentError(f'`options.{option}` is unknown to {owner!r}; {hint}')
        default = defaults[option]
        expected_types = (int, float) if isinstance(default, float) else (type(default),)
        if default is not None and type(setting) not in expected_types:
            raise ArgumentError(
                f'`options.{option}` = {setting!r}: expected {type(default).__name__}, the type '
                f'of the default {default!r}'
            )
