"""What the command lines of several benchmarks share; each benchmark defines the flags it reads.

absl refuses a second definition of a flag in a process unless it may override the first one. Tests
import several benchmarks into one process.
"""

import contextlib
import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence

import jax
from absl import app, flags, logging

from mi.config import UserError, suggest
from mi.training import host


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Run the main function of a benchmark. A user error prints one line and exits with code 1."""

    def run_quietly(argv: Sequence[str]) -> None:
        if not flags.FLAGS['verbosity'].present:
            logging.set_verbosity(logging.WARNING)  # JAX reports each missing backend
        main(argv)

    try:
        app.run(run_quietly)
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


def select(
    flag: flags.FlagHolder[list[str]], known: Iterable[str], by_beginning: bool = False
) -> list[str]:
    """Return the known names that a flag lists, in the flag's order, or all of them by default.

    Args:
      flag: flag with a list of names, such as --only.
      known: all names.
      by_beginning: whether the flag lists beginnings of names. If so, the known names keep their
        order.

    Raises:
      UserError: if a name, or a beginning, is unknown.
    """
    known_names = list(known)
    for name in flag.value:
        beginnings = [known_name[: len(name)] for known_name in known_names]
        if name not in (beginnings if by_beginning else known_names):
            raise UserError(f'--{flag.name}={name} is unknown; {suggest(name, known_names)}')
    if by_beginning:
        return [name for name in known_names if name.startswith(tuple(flag.value or ['']))]
    return flag.value or known_names


def require_cpu(peer: str) -> None:
    """Raise a `UserError` unless JAX runs on the CPU, where a peer runs. Starts JAX."""
    backend = jax.default_backend()
    if backend != 'cpu':
        raise UserError(
            f"JAX's backend is {backend}: expected cpu, like that of {peer}. Try JAX_PLATFORMS=cpu"
        )


def write_json(file: str | None, peers: Iterable[str] = (), **record: object) -> None:
    """Write a record to the file of --json, if any, with the machine and the version of JAX.

    Args:
      file: path of the file, or None.
      peers: other packages that take part, whose versions are written too if they are installed.
      **record: the record.
    """
    if file:
        versions = {'jax': jax.__version__}
        for peer in peers:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[peer] = importlib.metadata.version(peer)
        record = {'machine': host.describe_machine()} | versions | record
        pathlib.Path(file).write_text(json.dumps(record, indent=2) + '\n')
