"""Checks of a config's options against the arguments of the constructor that takes them."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from mi.config import UserError, suggest


def get_keyword_defaults(maker: Callable[..., Any]) -> dict[str, Any]:
    """Return name → default of the keyword-only arguments of a function."""
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(maker).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def get_field_defaults(module: Callable[..., Any]) -> dict[str, Any]:
    """Return name → default of the fields of a Flax module, or of a partial of one.

    Fields without a default, Flax's own and the dtypes, which have a config key, are left out.
    """
    reserved = ('parent', 'name', 'dtype', 'param_dtype')
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(module).parameters.values()
        if parameter.name not in reserved and parameter.default is not parameter.empty
    }


def get_options(config: ml_collections.ConfigDict, key: str) -> dict[str, Any]:
    """Return the options under a key; none for a config.json from before the key existed."""
    options = config.get(key)
    return options.to_dict() if options else {}


def check_options(
    key: str, name: str, options: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Refuse options that are unknown, or of another type than their default.

    An option whose default is None takes any value.

    Args:
      key: the config key of the options, as 'config.env.options'.
      name: name of the module or environment that takes the options, for errors.
      options: name → value.
      defaults: name → default of all known options.

    Raises:
      UserError: which option, and what is expected.
    """
    for option, value in options.items():
        if option not in defaults:
            hint = suggest(option, defaults) if defaults else 'it has no options'
            raise UserError(f'{key}.{option} is unknown to {name!r}; {hint}')
        default = defaults[option]
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if default is not None and type(value) not in kinds:
            raise UserError(
                f'{key}.{option} = {value!r}: expected {type(default).__name__}, as its default '
                f'{default!r}'
            )
