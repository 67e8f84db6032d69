"""Config files, and the flags --config.KEY=VALUE that override their values.

As in ml_collections' config_flags, a value is parsed as the type of its key. Unlike there, the last
value of a key also wins for tuples, flags may come in any order, and an error is one line that
names the key.
"""

import ast
import difflib
import importlib.util
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import ml_collections
from absl import flags

from mi.config import UserError, flatten, format_error, suggest

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
FLAG = re.compile(r'--?(?P<no>no)?config\.(?P<key>[^=]*)(?:=(?P<text>.*))?', re.DOTALL)
UNQUOTED = re.compile(r'[\w./:+-]+')  # an unquoted entry of a tuple
EXPECTED = {bool: 'True or False', int: 'an integer', float: 'a number'}
PARSERS: dict[type, flags.ArgumentParser] = {
    bool: flags.BooleanParser(),
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
}


class Override(NamedTuple):
    """One flag --config.KEY=TEXT; the text is None for --config.KEY."""

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
    rest: list[str] = []
    overrides: list[Override] = []
    while arguments:
        argument = arguments.pop(0)
        match = FLAG.fullmatch(argument)
        if argument == '--':
            rest += [argument, *arguments]
            break
        if match is None:
            rest.append(argument)
            continue
        text = match['text']
        if match['no']:
            if text is not None:
                raise UserError(f'{argument}: expected no value; use --config.{match["key"]}=VALUE')
            text = 'False'
        elif text is None and arguments and not arguments[0].startswith('--'):
            text = arguments.pop(0)
        overrides.append(Override(match['key'], text))
    return rest, overrides


def load(file: str, overrides: Sequence[Override] = ()) -> ml_collections.ConfigDict:
    """Read a config file, FILE.py or FILE.py:ARGUMENT, and apply the overrides.

    Returns:
      The locked config.

    Raises:
      UserError: if the file cannot be read or raises, or an override is invalid.
    """
    config = _get_config(file)
    apply(config, overrides)
    return config


def parse(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """Load the config that `mi.main` builds from its arguments, ignoring other flags.

    Raises:
      UserError: if the file or a key does not exist, or a value does not have the type of its key.
    """
    rest, overrides = split(arguments)
    files = [argument.partition('=')[2] for argument in rest if re.match('--?config=', argument)]
    if not files:
        raise UserError('--config: expected --config=FILE')
    return load(files[-1], overrides)


def apply(config: ml_collections.ConfigDict, overrides: Sequence[Override]) -> None:
    """Apply the overrides to a config; the last override of a key wins.

    Raises:
      UserError: if a key does not exist, a value does not have the type of its key, or the task
        changes, which determines the keys.
    """
    task = config.get('task')
    for key, text in overrides:
        # Find the section that has the key.
        *sections, name = key.split('.')
        section: Any = config
        for part in sections:
            section = section.get(part) if isinstance(section, ml_collections.ConfigDict) else None
        if not isinstance(section, ml_collections.ConfigDict) or name not in section:
            raise UserError(_describe_unknown_key(config, key))
        if isinstance(section[name], ml_collections.ConfigDict):
            keys = [f'config.{key}.{leaf}' for leaf in flatten(section[name].to_dict())]
            example = next((leaf for leaf in keys if leaf.endswith('.name')), keys[0])
            raise UserError(
                f'config.{key}{_format_text(text)}: it is a section, of {", ".join(keys)}; '
                f'try --{example}={text or "VALUE"}'
            )

        # Parse and assign the value.
        value = _parse_value(key, text, section.get_type(name))
        try:
            section[name] = value
        except (TypeError, ValueError) as error:
            raise UserError(f'config.{key}{_format_text(text)}: {format_error(error)}') from error
    if config.get('task') != task:
        raise UserError(
            f'config.task = {config.task!r}: expected {task!r}, the task of the config file. '
            f'Try another --config'
        )


def _parse_value(key: str, text: str | None, kind: type) -> Any:
    """Parse the text as a value of the key's type."""
    if text is None:
        if kind is bool:
            return True
        raise UserError(f'config.{key} has no value: expected --config.{key}=VALUE')
    if kind is str:
        return text
    if kind in (tuple, list):
        return kind(_parse_entries(key, text))
    if kind in PARSERS:
        try:
            return PARSERS[kind].parse(text)
        except (TypeError, ValueError):
            raise UserError(
                f'config.{key}{_format_text(text)}: expected {EXPECTED[kind]}'
            ) from None
    try:  # the key has no type, for example because its value is None
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _parse_entries(key: str, text: str) -> tuple[Any, ...]:
    """Parse '(0, 1)', '0,1' or '0' as a tuple; strings need no quotes."""
    try:
        value = ast.literal_eval(text.strip())
    except (SyntaxError, ValueError):
        entries = [entry.strip() for entry in text.strip('() ').split(',')]
        is_balanced = text.count('(') == text.count(')')
        if not is_balanced or not all(UNQUOTED.fullmatch(entry) for entry in entries if entry):
            entries = ['']
        if not any(entries):
            raise UserError(
                f"config.{key}{_format_text(text)}: expected a tuple, such as '(0, 1)'; () for none"
            ) from None
        return tuple(_parse_literal(entry) for entry in entries if entry)
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _parse_literal(entry: str) -> Any:
    try:
        return ast.literal_eval(entry)
    except (SyntaxError, ValueError):
        return entry


def _format_text(text: str | None) -> str:
    return '' if text is None else f' = {text!r}'


def _describe_unknown_key(config: ml_collections.ConfigDict, key: str) -> str:
    """Describe an unknown key, with the nearest key or the keys of its section."""
    section, path = config, 'config'
    for part in key.split('.'):
        if part not in section:
            break
        path, section = f'{path}.{part}', section[part]
        if not isinstance(section, ml_collections.ConfigDict):
            return f'config.{key} is unknown; {path} is a value and has no keys'
    if close := difflib.get_close_matches(key, flatten(config.to_dict()), n=1):
        return f'config.{key} is unknown; did you mean config.{close[0]}?'
    return f'config.{key} is unknown; the keys of {path} are {", ".join(sorted(section))}'


def find_file(path: str, folders: Collection[str]) -> str:
    """Resolve a path such as configs/lm.py, falling back to the copy in the project.

    Args:
      path: a path, returned unchanged if it exists.
      folders: folders of the project. If `path` begins with one of these and is not a file
        relative to the current directory, the project's copy is returned, if there is one.
    """
    project_path = pathlib.Path(__file__).parents[1] / path
    is_in_project = pathlib.Path(path).parts[0] in folders and project_path.is_file()
    return str(project_path) if is_in_project and not pathlib.Path(path).is_file() else path


def _get_config(file: str) -> ml_collections.ConfigDict:
    # Find the file.
    path, colon, argument = file.partition(':')
    path = find_file(path, ('configs', 'experiments'))
    if not pathlib.Path(path).is_file() or not path.endswith('.py'):
        problem = 'a directory' if pathlib.Path(path).is_dir() else 'no such file'
        problem = 'not a Python file' if pathlib.Path(path).is_file() else problem
        names = sorted(config.stem for config in CONFIGS.glob('*.py') if config.stem != '__init__')
        raise UserError(
            f'--config={file}: {problem}; expected FILE.py or FILE.py:ARGUMENT, of your own or '
            f'configs/NAME.py; {suggest(pathlib.Path(path).stem, names)}'
        )

    # Execute it.
    module = _create_module(path)
    try:
        module.__spec__.loader.exec_module(module)  # type: ignore[union-attr]
        config = module.get_config(*([argument] if colon else []))
    except UserError:
        raise
    except Exception as error:  # the user's program may raise any error
        location = _locate_error(error, path)
        raise UserError(f'--config={file}{location}: {_describe_error(error)}') from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f'--config={file}: get_config() returns a {type(config).__name__}; expected an '
            f'ml_collections.ConfigDict'
        )
    return config.lock()


def _create_module(path: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location('config_file', path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module here
    return module


def _locate_error(error: Exception, path: str) -> str:
    """Return the line of the config file that raised an error, as a suffix of the file."""
    frames = traceback.extract_tb(error.__traceback__)
    absolute = str(pathlib.Path(path).absolute())
    lines = [frame.lineno for frame in frames if frame.filename == absolute]
    return f', line {lines[-1]}' if lines else ''


def _describe_error(error: Exception) -> str:
    message = format_error(error)
    is_clear = isinstance(error, SyntaxError | ImportError)
    return message if is_clear else f'{type(error).__name__}: {message}'
