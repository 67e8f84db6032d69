"""The argument of a config file: presets and KEY=VALUE in any order, as `quickstart,fusion=concat`.

An argument is parsed before anything is built from it, so that its order cannot matter.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from mi.config import UserError, suggest


class Argument(NamedTuple):
    """A parsed argument.

    Attributes:
      text: `FILE.py:ARGUMENT`, for messages.
      presets: names.
      values: config key → value, of the parts KEY=VALUE.
    """

    text: str
    presets: tuple[str, ...]
    values: dict[str, str]

    def merge(self, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return the settings of all presets, config key → value.

        Raises:
          UserError: if two presets set a key to different values.
        """
        merged: dict[str, Any] = {}
        owners: dict[str, str] = {}
        for preset in self.presets:
            for key, value in settings[preset].items():
                if merged.setdefault(key, value) != value:
                    raise UserError(
                        f'--config={self.text}: expected presets that agree (got config.{key} = '
                        f'{merged[key]!r} in {owners[key]!r} and {value!r} in {preset!r}). '
                        f'Choose one'
                    )
                owners[key] = preset
        return merged


def parse(file: str, text: str, presets: Collection[str], keys: Mapping[str, str]) -> Argument:
    """Return the presets and values that an argument names.

    Args:
      file: path of the config file, for messages.
      text: the argument, as the user gave it.
      presets: names of the file's presets.
      keys: KEY of `KEY=VALUE` → config key that it sets.

    Raises:
      UserError: if a part is unknown, or a key has two values.
    """
    names: set[str] = set()
    values: dict[str, str] = {}
    for part in text.split(','):
        key, equals, value = part.partition('=')
        if equals and key in keys:
            if values.setdefault(keys[key], value) != value:
                raise UserError(
                    f'--config={file}:{text}: expected one value of {key} '
                    f'(got {values[keys[key]]!r} and {value!r})'
                )
        elif part in presets:
            names.add(part)
        else:
            forms = ', '.join(f'{key}=…' for key in keys)
            raise UserError(
                f'--config={file}:{part}: expected {forms} or a preset; {suggest(part, presets)}'
            )
    return Argument(f'{file}:{text}', tuple(sorted(names)), values)
