"""The config.json of a run directory, which restarts and evaluations compare to their config."""

import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections

from mi.config import UserError, describe_difference, find_added, flatten, is_option
from mi.training.io import read_json, write_json

ADDED: dict[str, Any] = {'data.tokenizer': '', 'optim.ema': 0.0}
"""Keys (SECTION.KEY) that were added after the first runs → their values in older runs."""


def record_config(
    file: pathlib.Path, config: ml_collections.ConfigDict, flag: str = '--workdir'
) -> None:
    """Write config.json, or check that it agrees with the config of a resumed run.

    A key that is missing in config.json was added to the code since the run started. It is written
    to config.json, with a warning. An option that is missing there had its default.

    Args:
      file: path of config.json in the run directory.
      config: config of the run.
      flag: flag that names the directory, for the error message.

    Raises:
      UserError: if the run was started with a different config.
    """
    resolved_config = json.loads(config.to_json())
    if not file.exists():
        write_json(file, resolved_config)
        return
    # Compare the flat values; keys that were added since are no difference.
    recorded_values, current_values = flatten(_read(file)), flatten(resolved_config)
    for config_values in (recorded_values, current_values):
        config_values.pop('tracker', None)  # it gets copies and does not change what is learned
    added_values = find_added(recorded_values, current_values)
    difference = describe_difference(recorded_values, current_values)
    if describe_difference(recorded_values | added_values, current_values):
        raise UserError(
            f'{file.parent} was started with a different config: {difference}. Use another {flag}'
        )

    # Record the added keys too.
    if added_values:
        assignments = ', '.join(
            f'config.{config_key} = {default!r}' for config_key, default in added_values.items()
        )
        print(
            f'warning: {file.parent} has no value for {assignments}; it continues with this value',
            file=sys.stderr,
        )
        write_json(file, resolved_config)


def has_run(workdir: str | os.PathLike[str] | None) -> bool:
    """Return whether a directory is a run directory."""
    return workdir is not None and (pathlib.Path(workdir) / 'config.json').exists()


def read_config(workdir: str | os.PathLike[str]) -> ml_collections.ConfigDict:
    """Read the config of a run, as a locked ConfigDict.

    Raises:
      UserError: if `workdir` is not a run directory.
    """
    file = pathlib.Path(workdir) / 'config.json'
    if not file.exists():
        raise UserError(f'--workdir={workdir}: expected a run directory, but found no config.json')
    return ml_collections.ConfigDict(_lists_to_tuples(_read(file))).lock()


def _read(file: pathlib.Path) -> dict[str, Any]:
    """Read a config.json, and add the keys of ADDED that are missing in its sections."""
    recorded: dict[str, Any] = read_json(file)
    for config_key, default in ADDED.items():
        section, _, name = config_key.partition('.')
        if section in recorded:
            recorded[section].setdefault(name, default)
    return recorded


def _lists_to_tuples(value: object) -> object:
    """Convert lists in a JSON value to tuples, which JSON stores as lists."""
    if isinstance(value, dict):
        return {config_key: _lists_to_tuples(entry) for config_key, entry in value.items()}
    return tuple(map(_lists_to_tuples, value)) if isinstance(value, list) else value


def merge_eval_config(
    workdir: str | os.PathLike[str],
    config: ml_collections.ConfigDict,
    *,
    overridable: Sequence[str],
    fixed: Sequence[str],
) -> ml_collections.ConfigDict:
    """Merge the config of a run with the config of an evaluation.

    Keys that are neither overridable nor fixed, such as those of the optimizer, have no effect on
    an evaluation. They keep the values of the run, whatever `config` contains.

    Args:
      workdir: run directory.
      config: config of the evaluation.
      overridable: sections and keys to take from `config`, such as 'eval'.
      fixed: sections and keys on which both configs must agree, because they determine the
        checkpoint, such as 'model'.

    Raises:
      UserError: if a fixed key differs, or if `workdir` is not a run directory.
    """
    trained_values = flatten(read_config(workdir).to_dict())
    requested_values = flatten(config.to_dict())

    def is_in_sections(config_key: str, sections: Sequence[str]) -> bool:
        return any(f'{config_key}.'.startswith(f'{section}.') for section in sections)

    # Refuse another model than the checkpoint's. A missing option has its default.
    for config_key in sorted(trained_values | requested_values):
        if not is_in_sections(config_key, fixed):
            continue
        is_in_both = config_key in trained_values and config_key in requested_values
        if not is_in_both and not is_option(config_key):
            continue
        trained, requested = trained_values.get(config_key), requested_values.get(config_key)
        if not is_in_both or _to_plain(trained) != _to_plain(requested):
            expected = repr(trained) if config_key in trained_values else 'no value'
            actual = repr(requested) if config_key in requested_values else 'no value'
            raise UserError(
                f'config.{config_key} = {actual}: expected {expected}, as in the training of '
                f'{workdir}. Remove the option, or use the --workdir of another run'
            )

    # Take everything that evaluation may not change from the run.
    merged = config.copy_and_resolve_references()
    with merged.unlocked(), merged.ignore_type():
        for config_key in requested_values.keys() - trained_values.keys():
            if is_option(config_key) and not is_in_sections(config_key, overridable):
                section, field_name = _find_section(merged, config_key)
                del section[field_name]
        for config_key, value in trained_values.items():
            is_known = config_key in requested_values or is_option(config_key)
            if is_known and not is_in_sections(config_key, overridable):
                section, field_name = _find_section(merged, config_key)
                section[field_name] = value
    return merged.lock()


def _find_section(
    config: ml_collections.ConfigDict, config_key: str
) -> tuple[ml_collections.ConfigDict, str]:
    """Return the section of a key, and the name of its field there."""
    *section_names, field_name = config_key.split('.')
    for section_name in section_names:
        config = config[section_name]
    return config, field_name


def _to_plain(value: object) -> object:
    """Return a value as JSON stores it."""
    return json.loads(json.dumps(value))
