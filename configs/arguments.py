"""Arguments of config files: presets and KEY=VALUE in any order, as in `quickstart,fusion=concat`.

The whole argument is parsed before anything is built from it, so that the order does not matter.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from mi.config import UserError, suggest

Settings = dict[str, object]  # config key → value


class Argument(NamedTuple):
    """A parsed argument.

    Attributes:
      text: `FILE.py:ARGUMENT`, for error messages.
      presets: names of presets.
      values: config key → value, from the parts KEY=VALUE.
    """

    text: str
    presets: tuple[str, ...]
    values: dict[str, str]

    def merge(self, preset_settings: Mapping[str, Settings]) -> Settings:
        """Return config key → value, merged from all presets.

        Raises:
          UserError: if two presets set a key to different values.
        """
        merged: Settings = {}
        owners: dict[str, str] = {}
        for preset in self.presets:
            for config_key, setting in preset_settings[preset].items():
                if merged.setdefault(config_key, setting) != setting:
                    raise UserError(
                        f'--config={self.text}: expected presets that agree (got '
                        f'config.{config_key} = {merged[config_key]!r} in {owners[config_key]!r} '
                        f'and {setting!r} in {preset!r}). Choose one'
                    )
                owners[config_key] = preset
        return merged


def parse(file: str, text: str, presets: Collection[str], keys: Mapping[str, str]) -> Argument:
    """Parse the argument of a config file.

    Args:
      file: path of the config file, for error messages.
      text: the argument.
      presets: names of the presets in the file.
      keys: KEY of `KEY=VALUE` → config key that it sets.

    Raises:
      UserError: if a part is unknown, or a key has two values.
    """
    preset_names: set[str] = set()
    values: dict[str, str] = {}
    for part in text.split(','):
        short_key, equals, value = part.partition('=')
        if equals and short_key in keys:
            if values.setdefault(keys[short_key], value) != value:
                raise UserError(
                    f'--config={file}:{text}: expected one value for {short_key} '
                    f'(got {values[keys[short_key]]!r} and {value!r})'
                )
        elif part in presets:
            preset_names.add(part)
        else:
            forms = ', '.join(f'{short_key}=…' for short_key in keys)
            raise UserError(
                f'--config={file}:{part}: expected {forms} or a preset; {suggest(part, presets)}'
            )
    return Argument(f'{file}:{text}', tuple(sorted(preset_names)), values)
