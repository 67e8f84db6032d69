"""Config files, and the flags --config.KEY=VALUE that override their values.

As in ml_collections' config_flags, a value is parsed as the type of its key. In contrast to
config_flags, the last value of a key also wins for tuples, flags can come in any order, and errors
are one line that names the key.
"""

import ast
import difflib
import importlib.machinery
import importlib.util
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Collection, Sequence
from typing import NamedTuple

import ml_collections
from absl import flags

from mi.config import (
    EXPECTED,
    UserError,
    flatten,
    format_error,
    is_option,
    is_option_group,
    suggest,
)

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
FLAG = re.compile(r'--?(?P<no>no)?config\.(?P<key>[^=]*)(?:=(?P<text>.*))?', re.DOTALL)
UNQUOTED = re.compile(r'[\w./:+-]+')  # an unquoted entry of a tuple
PARSERS: dict[type, flags.ArgumentParser] = {
    bool: flags.BooleanParser(),
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
}


class Override(NamedTuple):
    """A flag --config.KEY=TEXT, where `text` is None for a bare --config.KEY."""

    key: str
    text: str | None


def split(argv: Sequence[str]) -> tuple[list[str], list[Override]]:
    """Split a command line into the remaining arguments and the overrides.

    Raises:
      UserError: if a flag file cannot be read.
    """
    try:
        arguments = flags.FlagValues().read_flags_from_files(list(argv), force_gnu=False)
    except flags.Error as error:
        raise UserError(format_error(error)) from error

    # Take the arguments one by one; an override may take the next one as its text.
    other_arguments: list[str] = []
    overrides: list[Override] = []
    while arguments:
        argument = arguments.pop(0)
        flag_match = FLAG.fullmatch(argument)
        if argument == '--':
            other_arguments += [argument, *arguments]
            break
        if flag_match is None:
            other_arguments.append(argument)
            continue

        # The forms are --config.KEY=TEXT, --config.KEY TEXT, --config.KEY and --noconfig.KEY.
        override_text = flag_match['text']
        if flag_match['no']:
            if override_text is not None:
                raise UserError(
                    f'{argument}: expected no value. Use --config.{flag_match["key"]}=VALUE'
                )
            override_text = 'False'
        elif override_text is None and arguments and not arguments[0].startswith('--'):
            override_text = arguments.pop(0)
        overrides.append(Override(flag_match['key'], override_text))
    return other_arguments, overrides


def load(file: str, overrides: Sequence[Override] = ()) -> ml_collections.ConfigDict:
    """Read a config file, FILE.py or FILE.py:ARGUMENT, and apply the overrides.

    Returns:
      The locked config.

    Raises:
      UserError: if the file cannot be read or raises an error, or an override is invalid.
    """
    config = _get_config(file)
    apply(config, overrides)
    return config


def parse(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """Load the config that `mi.main` would build from these arguments, ignoring all other flags.

    Raises:
      UserError: if the file or a key does not exist, or a value does not have the type of its key.
    """
    other_arguments, overrides = split(arguments)
    config_files = [
        argument.partition('=')[2]
        for argument in other_arguments
        if re.match('--?config=', argument)
    ]
    if not config_files:
        raise UserError('--config is missing: expected --config=FILE')
    return load(config_files[-1], overrides)


def apply(config: ml_collections.ConfigDict, overrides: Sequence[Override]) -> None:
    """Apply the overrides to a config in order, so that the last one of a key wins.

    Raises:
      UserError: if a key does not exist, a value does not have the type of its key, or an override
        changes the task, which would need other keys.
    """
    for override in overrides:
        key, text = override
        section, field_name = _find_field(config, override)
        if is_option_group(field_name):
            section[field_name] = _parse_group(key, text)
            continue
        value_type = section.get_type(field_name) if field_name in section else type(None)
        new_value = _parse_value(key, text, value_type)
        if key == 'task' and new_value != config.task:
            raise UserError(
                f'config.task = {new_value!r}: expected {config.task!r}, the task of the config '
                f'file. Try another --config'
            )
        try:
            with section.unlocked():  # a group may get new keys
                section[field_name] = new_value
        except (TypeError, ValueError) as error:
            raise UserError(f'config.{key}{_format_text(text)}: {format_error(error)}') from error


def _find_field(
    config: ml_collections.ConfigDict, override: Override
) -> tuple[ml_collections.ConfigDict, str]:
    """Return the section and the field that an override sets.

    A group of options, such as `env.options`, accepts any field. The names are checked later, by
    the module or environment that takes the options.

    Raises:
      UserError: if the key does not exist, or is a section.
    """
    key, text = override
    *section_names, field_name = key.split('.')
    section = config
    for section_name in section_names:
        if not isinstance(section.get(section_name), ml_collections.ConfigDict):
            raise UserError(_describe_unknown_key(config, key))
        section = section[section_name]
    is_known = field_name in section or is_option(key)
    if not is_known:
        raise UserError(_describe_unknown_key(config, key))
    if is_option_group(field_name) or is_option(key):
        return section, field_name

    # A section has no value; suggest one of its keys.
    if isinstance(section[field_name], ml_collections.ConfigDict):
        keys = [f'config.{key}.{leaf}' for leaf in flatten(section[field_name].to_dict())]
        example = next((leaf for leaf in keys if leaf.endswith('.name')), keys[0])
        raise UserError(
            f'config.{key}{_format_text(text)}: expected a key of this section, one of '
            f'{", ".join(keys)}. Try --{example}={text or "VALUE"}'
        )
    return section, field_name


def _parse_group(key: str, text: str | None) -> ml_collections.ConfigDict:
    """Parse a dictionary of options.

    Raises:
      UserError: if the text is not a dictionary with string keys.
    """
    options = None if text is None else _parse_literal(text)
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise UserError(
            f'config.{key}{_format_text(text)}: expected a dictionary of options. Try '
            f'--config.{key}="{{\'NAME\': VALUE}}", or --config.{key}.NAME=VALUE'
        )
    return ml_collections.ConfigDict(options)


def _parse_value(key: str, text: str | None, value_type: type) -> object:
    """Parse the text as a value of the key's type."""
    if text is None:
        if value_type is bool:
            return True
        raise UserError(f'config.{key} has no value: expected --config.{key}=VALUE')
    if value_type is str:
        return text
    if value_type in (tuple, list):
        return value_type(_parse_entries(key, text))
    if value_type in PARSERS:
        try:
            return PARSERS[value_type].parse(text)
        except (TypeError, ValueError):
            raise UserError(
                f'config.{key}{_format_text(text)}: expected {EXPECTED[value_type]}'
            ) from None
    return _parse_literal(text)  # the key has no type, for example because its value is None


def _parse_entries(key: str, text: str) -> tuple[object, ...]:
    """Parse '(0, 1)', '0,1' or '0' as a tuple, where strings need no quotes."""
    try:
        literal = ast.literal_eval(text.strip())
    except (SyntaxError, ValueError):
        entries = [entry.strip() for entry in text.strip('() ').split(',')]
        is_balanced = text.count('(') == text.count(')')
        if not is_balanced or not all(UNQUOTED.fullmatch(entry) for entry in entries if entry):
            entries = ['']
        if not any(entries):
            raise UserError(
                f"config.{key}{_format_text(text)}: expected a tuple such as '(0, 1)', or () "
                'for an empty one'
            ) from None
        return tuple(_parse_literal(entry) for entry in entries if entry)
    return tuple(literal) if isinstance(literal, tuple | list) else (literal,)


def _parse_literal(entry: str) -> object:
    """Parse a Python literal, or return any other text unchanged."""
    try:
        return ast.literal_eval(entry)
    except (SyntaxError, ValueError):
        return entry


def _format_text(text: str | None) -> str:
    return '' if text is None else f' = {text!r}'


def _describe_unknown_key(config: ml_collections.ConfigDict, key: str) -> str:
    """Return an error for an unknown key that suggests the nearest key, or lists its section."""
    section, section_path = config, 'config'
    for field_name in key.split('.'):
        if field_name not in section:
            break
        section_path, section = f'{section_path}.{field_name}', section[field_name]
        if not isinstance(section, ml_collections.ConfigDict):
            return f'config.{key} is unknown; {section_path} is a value and has no keys'
    if close_keys := difflib.get_close_matches(key, flatten(config.to_dict()), n=1):
        return f'config.{key} is unknown; did you mean config.{close_keys[0]}?'
    return f'config.{key} is unknown; the keys of {section_path} are {", ".join(sorted(section))}'


def find_file(path: str, folders: Collection[str]) -> str:
    """Resolve a path such as configs/lm.py, falling back to the copy in the project.

    Args:
      path: a path, returned unchanged if it exists.
      folders: folders of the project. If `path` begins with one of these and is not a file
        relative to the current directory, the project's copy is returned, if there is one.
    """
    project_path = pathlib.Path(__file__).parents[1] / path
    is_in_project = pathlib.Path(path).parts[:1] in {(name,) for name in folders}
    is_in_project = is_in_project and project_path.is_file()
    return str(project_path) if is_in_project and not pathlib.Path(path).is_file() else path


def _get_config(file: str) -> ml_collections.ConfigDict:
    # Find the file.
    file_path, colon, argument = file.partition(':')
    file_path = find_file(file_path, ('configs', 'experiments'))
    if not pathlib.Path(file_path).is_file() or not file_path.endswith('.py'):
        problem = 'a directory' if pathlib.Path(file_path).is_dir() else 'no such file'
        problem = 'not a Python file' if pathlib.Path(file_path).is_file() else problem
        config_names = sorted(
            config.stem for config in CONFIGS.glob('*.py') if config.stem != '__init__'
        )
        raise UserError(
            f'--config={file}: {problem}; expected FILE.py or FILE.py:ARGUMENT, where '
            'FILE.py is your own file or configs/NAME.py; '
            f'{suggest(pathlib.Path(file_path).stem, config_names)}'
        )

    # Execute it.
    module = _create_module(file_path)
    try:
        module.__spec__.loader.exec_module(module)  # type: ignore[union-attr]
        config = module.get_config(*([argument] if colon else []))
    except UserError:
        raise
    except Exception as error:  # the user's program may raise any error
        location = _locate_error(error, file_path)
        raise UserError(f'--config={file}{location}: {_describe_error(error)}') from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f'--config={file}: get_config() returned a {type(config).__name__}; expected an '
            'ml_collections.ConfigDict'
        )
    return config.lock()


def _create_module(file_path: str) -> types.ModuleType:
    module = create_module('config_file', file_path)
    sys.modules[module.__name__] = module  # dataclasses look up their module here
    return module


def create_module(name: str, file_path: str) -> types.ModuleType:
    """Create a module for a user's file, which `module.__spec__.loader.exec_module(module)` runs.

    Python's bytecode cache is not used, because it would be stale for a file that was edited twice
    within a second without changing its size.
    """
    absolute_path = str(pathlib.Path(file_path).absolute())
    loader = _UncachedLoader(name, absolute_path)
    spec = importlib.util.spec_from_file_location(name, absolute_path, loader=loader)
    assert spec is not None
    return importlib.util.module_from_spec(spec)


class _UncachedLoader(importlib.machinery.SourceFileLoader):
    """A loader that compiles the source on every import."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _locate_error(error: Exception, file_path: str) -> str:
    """Return ', line N' for the line of the config file that raised the error, if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    absolute_path = str(pathlib.Path(file_path).absolute())
    line_numbers = [frame.lineno for frame in frames if frame.filename == absolute_path]
    return f', line {line_numbers[-1]}' if line_numbers else ''


def _describe_error(error: Exception) -> str:
    message = format_error(error)
    is_clear = isinstance(error, SyntaxError | ImportError)
    return message if is_clear else f'{type(error).__name__}: {message}'
