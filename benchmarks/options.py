"""What the command lines of several benchmarks share; each benchmark defines the flags it reads.

absl refuses a second definition of a flag in a process unless it may override the first one. Tests
import several benchmarks into one process.
"""

import json
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
from absl import app, flags

from mi.config import UserError
from mi.training import host


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Run the main function of a benchmark. A user error prints one line and exits with code 1."""
    try:
        app.run(main)
    except UserError as error:
        sys.exit(f'error: {error}')


def define_rounds() -> flags.FlagHolder[int]:
    """Define --rounds."""
    return flags.DEFINE_integer(
        'rounds', 7, 'Interleaved rounds.', lower_bound=1, allow_override=True
    )


def define_only(description: str) -> flags.FlagHolder[list[str]]:
    """Define --only, a list of what to run, which is everything by default."""
    return flags.DEFINE_list('only', [], f'{description}; all by default.', allow_override=True)


def define_side() -> flags.FlagHolder[str | None]:
    """Define --side, with which a benchmark starts its workers."""
    return flags.DEFINE_string(
        'side', None, 'For the workers: the side to serve.', allow_override=True
    )


def define_json() -> flags.FlagHolder[str | None]:
    """Define --json, the file for the figures."""
    return flags.DEFINE_string(
        'json', None, 'JSON file to write the figures to.', allow_override=True
    )


def write_json(file: str | None, **record: object) -> None:
    """Write a record, and the machine and version of JAX, to the file of --json, if any."""
    if file:
        record = {'machine': host.describe_machine(), 'jax': jax.__version__} | record
        pathlib.Path(file).write_text(json.dumps(record, indent=2) + '\n')
