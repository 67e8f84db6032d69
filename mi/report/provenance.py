"""The environments of the runs in a sweep: versions, commit, device and tokens.

A difference between two arms may be caused by their environments. The report lists every difference
between environments, with the arms that have each value.
"""

import pathlib
from collections.abc import Sequence

from mi.report.arms import Arm
from mi.report.records import Record
from mi.training.io import read_json

# Key of versions.json → name in the report.
KEYS = {
    'python': 'Python',
    **{name: name for name in ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'mi')},
    'commit': 'commit',
    'dirty': 'uncommitted changes',
    'device': 'device',
    'devices': 'number of devices',
    'jax_default_matmul_precision': 'matmul precision',
    'data': 'tokens, by SHA-256',
}
UNIMPORTANT = ('dirty', 'devices', 'jax_default_matmul_precision', 'data')  # unless they differ


def read_environments(run_dir: pathlib.Path) -> tuple[Record, ...]:
    """Read the environment of a run at its last start, or return () if it is not recorded."""
    versions = read_json(run_dir / 'versions.json', missing={})
    environment = {key: versions[key] for key in KEYS if key in versions}
    restarts = versions.get('continued', [])
    for restart in restarts if isinstance(restarts, list) else []:
        changes = restart.get('changed', {}) if isinstance(restart, dict) else {}
        environment |= {key: changes[key] for key in KEYS if key in changes}
    data = read_json(run_dir / 'data.json', missing={})
    if isinstance(data.get('sha256'), str):
        environment['data'] = data['sha256']
    return (environment,) if environment else ()


def describe(arms: Sequence[Arm]) -> list[str]:
    """Return a note on the common environment of all runs, and a warning about differences."""
    values: dict[str, dict[str, list[str]]] = {}  # key → value → labels of its arms
    for arm in arms:
        for environment in arm.environments:
            for key, value in environment.items():
                labels = values.setdefault(key, {}).setdefault(_format_value(key, value), [])
                labels += [arm.label] if arm.label not in labels else []
    if not values:
        return []

    # What is equal, and what is not.
    common = [
        f'{KEYS[key]} {next(iter(values[key]))}'
        for key in KEYS
        if key in values and len(values[key]) == 1 and key not in UNIMPORTANT
    ]
    differences = [
        f'{KEYS[key]}: '
        + ', '.join(f'{value} ({", ".join(labels)})' for value, labels in values[key].items())
        for key in KEYS
        if key in values and len(values[key]) > 1
    ]
    notes = [f'Environment: {", ".join(common)}.'] if common else []
    if differences:
        notes.append(
            f'Warning: the runs have different environments, which may explain differences between '
            f'arms. {"; ".join(differences)}.'
        )
    return notes


def _format_value(key: str, value: object) -> str:
    """Format a value as text, with twelve digits for hashes and commits."""
    if value is None:
        return 'default' if key == 'jax_default_matmul_precision' else 'none'
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    return str(value)[:12] if key in ('commit', 'data') else str(value)
