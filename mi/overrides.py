"""Config files, and the flags --config.KEY=VALUE that change what they say.

As in ml_collections' config_flags, a value is read as the type that its key has. Unlike there, the
last value of a key counts for tuples too, flags may come in any order, and a mistake is one line
that names the key.
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
WORD = re.compile(r'[\w./:+-]+')  # an entry of a tuple that needs no quotes
EXPECTED = {bool: 'True or False', int: 'an integer', float: 'a number'}
PARSERS: dict[type, flags.ArgumentParser] = {
    bool: flags.BooleanParser(),
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
}


class Override(NamedTuple):
    """One flag --config.KEY=TEXT; the text is None where there was none."""

    key: str
    text: str | None


def split(argv: Sequence[str]) -> tuple[list[str], list[Override]]:
    """Take the overrides out of a command line; return what is left of it, and them.

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
    """Read a config file, FILE.py or FILE.py:ARGUMENT, and apply the overrides; locked.

    Raises:
      UserError: if the file cannot be read or raises, or an override does not fit its config.
    """
    config = _get_config(file)
    apply(config, overrides)
    return config


def parse(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """Load the config that `mi.main` makes of its arguments; others than --config are ignored.

    Raises:
      UserError: if there is no such file or key, or a value is not of the key's type.
    """
    rest, overrides = split(arguments)
    files = [a.partition('=')[2] for a in rest if re.match('--?config=', a)]
    if not files:
        raise UserError('--config=FILE is needed')
    return load(files[-1], overrides)


def apply(config: ml_collections.ConfigDict, overrides: Sequence[Override]) -> None:
    """Change a config as the overrides say; the last one of a key counts.

    Raises:
      UserError: if there is no such key, the text is not of its type, or the task would change,
        which decides what keys there are.
    """
    task = config.get('task')
    for key, text in overrides:
        *sections, name = key.split('.')
        section: Any = config
        for part in sections:
            section = section.get(part) if isinstance(section, ml_collections.ConfigDict) else None
        if not isinstance(section, ml_collections.ConfigDict) or name not in section:
            raise UserError(_unknown(config, key))
        if isinstance(section[name], ml_collections.ConfigDict):
            inner = [f'config.{key}.{each}' for each in flatten(section[name].to_dict())]
            aim = next((each for each in inner if each.endswith('.name')), inner[0])
            raise UserError(
                f'config.{key}{_shown(text)}: it is a section, of {", ".join(inner)}; '
                f'try --{aim}={text or "VALUE"}'
            )
        value = _value(key, text, section.get_type(name))
        try:
            section[name] = value
        except (TypeError, ValueError) as error:
            raise UserError(f'config.{key}{_shown(text)}: {format_error(error)}') from error
    if config.get('task') != task:
        raise UserError(
            f'config.task = {config.task!r}: the keys are those of the task {task!r}; give another '
            f'--config instead'
        )


def _value(key: str, text: str | None, kind: type) -> Any:
    """The text as a value of the type that the key has."""
    if text is None:
        if kind is bool:
            return True
        raise UserError(f'config.{key} has no value: expected --config.{key}=VALUE')
    if kind is str:
        return text
    if kind in (tuple, list):
        return kind(_entries(key, text))
    if kind in PARSERS:
        try:
            return PARSERS[kind].parse(text)
        except (TypeError, ValueError):
            raise UserError(f'config.{key}{_shown(text)}: expected {EXPECTED[kind]}') from None
    try:  # a key without a type of its own, as one that is None
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _entries(key: str, text: str) -> tuple[Any, ...]:
    """'(0, 1)', '0,1' and '0' → their entries; a word needs no quotes."""
    try:
        value = ast.literal_eval(text.strip())
    except (SyntaxError, ValueError):
        words = [word.strip() for word in text.strip('() ').split(',')]
        closed = text.count('(') == text.count(')')
        if not closed or not all(WORD.fullmatch(word) for word in words if word):
            words = ['']
        if not any(words):
            raise UserError(
                f"config.{key}{_shown(text)}: expected a tuple, such as '(0, 1)'; () for none"
            ) from None
        return tuple(_literal(word) for word in words if word)
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _literal(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (SyntaxError, ValueError):
        return word


def _shown(text: str | None) -> str:
    return '' if text is None else f' = {text!r}'


def _unknown(config: ml_collections.ConfigDict, key: str) -> str:
    """Say that there is no such key, with the nearest one or those beside it."""
    section, where = config, 'config'
    for part in key.split('.'):
        if part not in section:
            break
        where, section = f'{where}.{part}', section[part]
        if not isinstance(section, ml_collections.ConfigDict):
            return f'config.{key} is unknown; {where} is a value and has no keys'
    if close := difflib.get_close_matches(key, flatten(config.to_dict()), n=1):
        return f'config.{key} is unknown; did you mean config.{close[0]}?'
    return f'config.{key} is unknown; the keys of {where} are {", ".join(sorted(section))}'


def find_file(path: str, folders: Collection[str]) -> str:
    """Return the path of a file of ours, such as configs/lm.py, from whatever directory.

    Args:
      path: as it is given; one that exists is that.
      folders: that come with the package and are searched if there is no such file.
    """
    ours = pathlib.Path(__file__).parents[1] / path
    is_ours = pathlib.Path(path).parts[0] in folders and ours.is_file()
    return str(ours) if is_ours and not pathlib.Path(path).is_file() else path


def _get_config(file: str) -> ml_collections.ConfigDict:
    path, colon, argument = file.partition(':')
    path = find_file(path, ('configs', 'experiments'))
    if not pathlib.Path(path).is_file() or not path.endswith('.py'):
        what = 'a directory' if pathlib.Path(path).is_dir() else 'no such file'
        what = 'not a Python file' if pathlib.Path(path).is_file() else what
        ours = sorted(p.stem for p in CONFIGS.glob('*.py') if p.stem != '__init__')
        raise UserError(
            f'--config={file}: {what}; expected FILE.py or FILE.py:ARGUMENT, of your own or '
            f'configs/NAME.py; {suggest(pathlib.Path(path).stem, ours)}'
        )
    module = _module(path)
    try:
        module.__spec__.loader.exec_module(module)  # type: ignore[union-attr]
        config = module.get_config(*([argument] if colon else []))
    except UserError:
        raise
    except Exception as error:  # it is the user's program: anything may
        raise UserError(f'--config={file}{_where(error, path)}: {_reason(error)}') from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f'--config={file}: get_config() returns a {type(config).__name__}; expected an '
            f'ml_collections.ConfigDict'
        )
    return config.lock()


def _module(path: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location('config_file', path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    return module


def _where(error: Exception, path: str) -> str:
    """The line of the config file that an error comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    absolute = str(pathlib.Path(path).absolute())
    lines = [frame.lineno for frame in frames if frame.filename == absolute]
    return f', line {lines[-1]}' if lines else ''


def _reason(error: Exception) -> str:
    said = format_error(error)
    known = isinstance(error, SyntaxError | ImportError)
    return said if known else f'{type(error).__name__}: {said}'
