"""What a run computes with: versions, code, settings of JAX, device.

versions.json   of the first start, and in `continued`, what was another at a later one

The same bits need the same of all. What draws other random numbers or computes in another precision
is refused when a run is continued; of the rest one line says what is another.
"""

import functools
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

from mi.config import UserError, describe_difference
from mi.training.io import read_json

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'orbax-checkpoint')
SETTINGS = (  # of jax.config; each is set by an environment variable of its name in capitals
    'jax_default_prng_impl',
    'jax_threefry_partitionable',
    'jax_enable_x64',
    'jax_default_matmul_precision',
    'jax_numpy_dtype_promotion',
)


def current() -> dict[str, Any]:
    """Return what this process computes with."""
    device = jax.devices()[0]
    return {
        'python': platform.python_version(),
        **{name: _installed(name) for name in PACKAGES},
        **_code(),
        **{name: getattr(jax.config, name) for name in SETTINGS},
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
        'device': f'{device.platform} {device.device_kind}',
        'devices': jax.device_count(),
    }


def compare(file: pathlib.Path, step: int | None) -> dict[str, Any]:
    """Return what versions.json has to hold now; say on stderr what is another than before.

    Args:
      file: versions.json.
      step: of the checkpoint that the run is continued from; None for a run that starts.

    Raises:
      UserError: if a setting is another that would silently give other numbers.
    """
    now = current()
    if step is None or not file.exists():
        return now | {'continued': []}
    record = read_json(file)
    continued = record.setdefault('continued', [])
    before = {name: value for name, value in record.items() if name != 'continued'}
    for later in continued:
        before |= later['changed']
    for name in SETTINGS:
        if name in before and before[name] != now[name]:
            raise UserError(
                f'{name} = {now[name]!r}: {file.parent} was computed with {before[name]!r}, and '
                f'would go on with other numbers; set {name.upper()}={before[name]}, or name '
                f'another --workdir'
            )
    if changed := describe_difference(before, now):
        print(f'warning: {file.parent} is continued with another {changed}', file=sys.stderr)
        values = {name: now[name] for name in now if before.get(name) != now[name]}
        continued.append({'step': step, 'changed': values})
    return record


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.lru_cache
def _code() -> dict[str, Any]:
    """The commit of this code and whether its files differ from it; None where Git has no part."""

    def git(*arguments: str) -> str | None:
        command = ['git', '-C', str(pathlib.Path(__file__).parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git('ls-files', '--error-unmatch', pathlib.Path(__file__).name) is None:
        return {'commit': None, 'dirty': None}
    changes = git('status', '--porcelain', '--untracked-files=no')
    return {'commit': git('rev-parse', 'HEAD'), 'dirty': bool(changes)}
