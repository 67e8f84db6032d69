"""Sweep files as Python modules: loading, names, overrides, and errors in them."""

import contextlib
import pathlib
import traceback
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from launch.members import Overrides
from launch.search_space import Space, sample
from mi.config import UserError, format_error, suggest
from mi.overrides import create_module, find_file

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'


def load_module(file: str) -> types.ModuleType:
    """Import a sweep file.

    Raises:
      UserError: if the file does not exist, raises an exception, or lacks a required definition.
    """
    path = pathlib.Path(find_file(file, ('experiments',))).absolute()
    if not path.is_file():
        known_names = sorted(
            sweep_name(path)
            for path in EXPERIMENTS.rglob('*.py')
            if 'CONFIG = ' in path.read_text()
        )
        raise UserError(
            f'--sweep={file}: expected your own sweep file or experiments/NAME.py; '
            f'{suggest(sweep_name(path), known_names)}'
        )

    # Run the file, then check what it defines.
    module = create_module(path.stem, str(path))
    assert module.__spec__ is not None and module.__spec__.loader is not None
    with user_errors(file):
        module.__spec__.loader.exec_module(module)
    for name in ('CONFIG', 'TITLE', 'METRIC', 'SPLIT', 'BASELINE', 'NOTES'):
        if not hasattr(module, name):
            raise UserError(f'--sweep={file}: expected the file to define {name}')
    if not hasattr(module, 'sweep') and not (hasattr(module, 'SPACE') and hasattr(module, 'COUNT')):
        raise UserError(f'--sweep={file}: expected the file to define sweep, or SPACE and COUNT')
    if not isinstance(get_space(module), Mapping):
        raise UserError(
            f'--sweep={file}: SPACE = {module.SPACE!r}: expected a dictionary, config key → '
            f'distribution, such as log_uniform(1e-4, 1e-1)'
        )
    return module


@contextlib.contextmanager
def user_errors(file: str) -> Iterator[None]:
    """Turn an error in a sweep file into a `UserError` with the line where it happened."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a sweep file is the user's program and may raise anything
        path = str(pathlib.Path(find_file(file, ('experiments',))).absolute())  # as imported
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        message = format_error(error)
        if isinstance(error, SyntaxError) and error.filename == path:
            lines, message = [error.lineno], error.msg
        location = f', line {lines[-1]}' if lines else ''
        raise UserError(f'--sweep={file}{location}: {type(error).__name__}: {message}') from error


def to_plain(changes: Overrides) -> Overrides:
    """Convert NumPy numbers and arrays in overrides to Python values, for JSON and flags.

    Raises:
      UserError: if a value is not a number, a string or a tuple of them.
    """
    return {config_key: _to_plain(config_key, value) for config_key, value in changes.items()}


def _to_plain(key: str, value: Any) -> Any:
    """Convert NumPy numbers and arrays in a value to Python values."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, tuple | list):
        return type(value)(_to_plain(key, item) for item in value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise UserError(f'{key} = {value!r}: expected a number, a string, or a tuple of them')


def sweep_name(file: pathlib.Path) -> str:
    """Return the name of a sweep: 'regression' for regression/sweep.py or regression.py."""
    prefix, _, variant = file.stem.partition('_')
    if prefix != 'sweep':
        return file.stem
    return '_'.join(filter(None, (file.absolute().parent.name, variant)))


def get_space(module: types.ModuleType) -> Space:
    """Return SPACE of a sweep file, or {} if it is not defined."""
    space: Space = getattr(module, 'SPACE', {})
    return space


def list_overrides(file: str, module: types.ModuleType) -> list[Overrides]:
    """Return the overrides from sweep(), or from a random search in SPACE."""
    with user_errors(file):
        if hasattr(module, 'sweep'):
            overrides = module.sweep()
        else:
            overrides = sample(module.SPACE, module.COUNT, getattr(module, 'SEED', 0))
        return [to_plain(changes) for changes in overrides]
