"""The environment of a run: versions, code, settings of JAX, and device.

versions.json   the environment at the first start; `continued` lists later changes

Bit-identical results need an identical environment. A resumed run is refused if a setting would
change random numbers or precision. Other changes print one warning.
"""

import functools
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys

import jax

from mi.config import UserError, describe_difference
from mi.training.io import read_json

Environment = dict[str, object]  # name of a version or a setting → value

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'orbax-checkpoint')
SETTINGS = (  # of jax.config; the environment variable of each is its name in capitals
    'jax_default_prng_impl',
    'jax_threefry_partitionable',
    'jax_enable_x64',
    'jax_default_matmul_precision',
    'jax_numpy_dtype_promotion',
)


def describe_environment() -> Environment:
    """Describe the versions, the code, the settings and the device of this process."""
    device = jax.devices()[0]
    return {
        'python': platform.python_version(),
        'mi': _installed_version('multiplicative-interactions'),
        **{name: _installed_version(name) for name in PACKAGES},
        **_describe_commit(),
        **{name: getattr(jax.config, name) for name in SETTINGS},
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
        'device': f'{device.platform} {device.device_kind}',
        'devices': jax.device_count(),
    }


def compare(file: pathlib.Path, step: int | None) -> dict[str, object]:
    """Compare the environment with versions.json, and warn on stderr about changes.

    Args:
      file: path of versions.json.
      step: step of the checkpoint from which the run continues, or None for a new run.

    Returns:
      The new content of versions.json.

    Raises:
      UserError: if a setting differs that would silently change the results.
    """
    current = describe_environment()
    if step is None or not file.exists():
        return current | {'continued': []}

    # The environment of the last start is the first one with all changes since.
    versions_record = read_json(file)
    continued = versions_record.setdefault('continued', [])
    previous = {entry: versions_record[entry] for entry in versions_record if entry != 'continued'}
    for restart in continued:
        previous |= restart['changed']

    # Refuse what changes the numbers; warn about the rest.
    for setting_name in SETTINGS:
        if setting_name in previous and previous[setting_name] != current[setting_name]:
            raise UserError(
                f'{setting_name} = {current[setting_name]!r}: expected {previous[setting_name]!r}, '
                f'as when {file.parent} was started, because results would change. Try '
                f'{setting_name.upper()}={previous[setting_name]}, or another --workdir'
            )
    if difference := describe_difference(previous, current):
        print(f'warning: {file.parent} continues with a different {difference}', file=sys.stderr)
        changed = {
            entry: current[entry] for entry in current if previous.get(entry) != current[entry]
        }
        continued.append({'step': step, 'changed': changed})
    return versions_record


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.lru_cache
def _describe_commit() -> Environment:
    """Describe the commit of this code and any changes to it, or return None outside Git."""

    def git(*arguments: str) -> str | None:
        command = ['git', '-C', str(pathlib.Path(__file__).parent), *arguments]
        try:
            completed = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return completed.stdout.strip() if completed.returncode == 0 else None

    if git('ls-files', '--error-unmatch', pathlib.Path(__file__).name) is None:
        return {'commit': None, 'dirty': None}
    changes = git('status', '--porcelain', '--untracked-files=no')
    return {'commit': git('rev-parse', 'HEAD'), 'dirty': bool(changes)}
