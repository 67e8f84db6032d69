"""The config.json of a run directory: written once, compared at every restart, read to evaluate."""

import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections

from mi.config import UserError, describe_difference, flatten
from mi.training.io import read_json, write_json


def record_config(file: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Write config.json, or compare it with the config of a continued run.

    A key that config.json lacks was added to the code since; it is written, with a warning.

    Raises:
      UserError: if the run was made with another config.
    """
    resolved = json.loads(config.to_json())
    if not file.exists():
        write_json(file, resolved)
        return
    recorded, current = flatten(read_json(file)), flatten(resolved)
    for side in (recorded, current):
        side.pop('tracker', None)  # a tracker gets copies and does not change what is learned
    added = {key: value for key, value in current.items() if key not in recorded}
    difference = describe_difference(recorded, current)
    if describe_difference(recorded | added, current):
        raise UserError(
            f'{file.parent} was made with another config: {difference}; name another --workdir'
        )
    if added:
        keys = ', '.join(f'config.{key} = {value!r}' for key, value in added.items())
        print(
            f'warning: {file.parent} is older than {keys}; it continues with that', file=sys.stderr
        )
        write_json(file, resolved)


def read_config(workdir: str | os.PathLike[str]) -> ml_collections.ConfigDict:
    """Return the config that a run directory was made with; locked.

    Raises:
      UserError: if it is not the directory of a run.
    """
    file = pathlib.Path(workdir) / 'config.json'
    if not file.exists():
        raise UserError(f'--workdir={workdir} has no config.json: expected the directory of a run')
    return ml_collections.ConfigDict(_lists_to_tuples(read_json(file))).lock()


def _lists_to_tuples(value: Any) -> Any:
    """Return a JSON value with the tuples of the config, which JSON writes as lists."""
    if isinstance(value, dict):
        return {key: _lists_to_tuples(entry) for key, entry in value.items()}
    return tuple(map(_lists_to_tuples, value)) if isinstance(value, list) else value


def merge_eval_config(
    workdir: str | os.PathLike[str],
    config: ml_collections.ConfigDict,
    *,
    overridable: Sequence[str],
    fixed: Sequence[str],
) -> ml_collections.ConfigDict:
    """Return the config of a run, with the sections of `config` that evaluation may change.

    Keys that are neither overridable nor fixed, such as the optimizer's, have no effect on an
    evaluation. They keep the values of the run, whatever `config` contains.

    Args:
      workdir: the directory of the run.
      config: the config of this evaluation.
      overridable: sections and keys taken from `config`, such as 'eval'.
      fixed: sections and keys that determine the checkpoint, such as 'model'; both configs have to
        agree on them.

    Raises:
      UserError: if a fixed key differs, or it is not the directory of a run.
    """
    trained = flatten(read_config(workdir).to_dict())
    requested = flatten(config.to_dict())

    def is_in(key: str, sections: Sequence[str]) -> bool:
        return any(f'{key}.'.startswith(f'{section}.') for section in sections)

    # Refuse another model than the checkpoint's.
    for key in trained.keys() & requested.keys():
        if is_in(key, fixed) and _to_plain(trained[key]) != _to_plain(requested[key]):
            raise UserError(
                f'config.{key} = {requested[key]!r}: {workdir} was trained with {trained[key]!r}; '
                f'remove it, or name the --workdir of another run'
            )

    # Take everything that evaluation may not change from the run.
    recorded = {
        key: value
        for key, value in trained.items()
        if key in requested and not is_in(key, overridable)
    }
    merged = config.copy_and_resolve_references()
    with merged.ignore_type():
        merged.update_from_flattened_dict(recorded)
    return merged.lock()


def _to_plain(value: Any) -> Any:
    """Return the value as JSON stores it."""
    return json.loads(json.dumps(value))
