"""Names, labels and commands for the members of a sweep.

A member is named after its run directory and labeled with its arm. Both texts show the values in
which members differ, with their keys where the values alone are ambiguous. The override `label`,
which is not a config key, sets the label instead.
"""

import dataclasses
import functools
import hashlib
import pathlib
import sys
from collections.abc import Collection, Sequence
from typing import Any

import ml_collections

from mi import overrides as config_overrides
from mi.config import UserError

Overrides = dict[str, Any]  # dotted key → value
LABEL = 'label'  # the override that is not a key of a config


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
      name: name of the run directory, made from the values that differ between members.
      label: name of the arm in tables and figures. It is the override `label` or shows the values
        that differ, except seeds and task, with their keys if two arms would have the same values.
        Members with the same label belong to one arm.
      command: command that runs the member.
      overrides: overrides of the config.
    """

    name: str
    label: str
    command: list[str]
    overrides: Overrides

    @functools.cached_property
    def config(self) -> ml_collections.ConfigDict:
        """The locked config of the run, which is read only once. See `parse_config`."""
        return parse_config(self.command)


def parse_config(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """Return the config that `mi.main` parses from --config=FILE and --config.KEY=VALUE.

    Raises:
      UserError: if the file or a key does not exist, or a value has the wrong type.
    """
    try:
        return config_overrides.parse(arguments)
    except UserError as error:
        config_flags = ' '.join(arg for arg in arguments if arg.startswith('--config'))
        raise UserError(f'{config_flags}: {error}') from error


def make_members(
    overrides: list[Overrides],
    config: str,
    workdir: pathlib.Path,
    task_key: str | None,
    searched_keys: Collection[str] = (),
) -> list[Member]:
    """Return the members with their names, labels and commands.

    Args:
      overrides: overrides of each member.
      config: CONFIG of the sweep.
      workdir: directory of the sweep.
      task_key: TASK of the sweep.
      searched_keys: keys to show even if all members have the same value, so that names stay the
        same when more members are drawn.

    Raises:
      UserError: if two members have the same overrides, or two arms the same label.
    """
    given_labels = [changes.get(LABEL) for changes in overrides]
    overrides = [
        {key: value for key, value in changes.items() if key != LABEL} for changes in overrides
    ]

    # Names and labels show the keys in which members differ; a missing key differs from any value.
    keys = list(dict.fromkeys(key for changes in overrides for key in changes))
    differing_keys = [
        key
        for key in keys
        if key in searched_keys or len({repr(changes.get(key)) for changes in overrides}) > 1
    ]
    shown_overrides = [
        {key: changes[key] for key in (differing_keys or keys) if key in changes}
        for changes in overrides
    ]
    names = _make_names(shown_overrides, overrides)
    labels = make_labels(overrides, shown_overrides, task_key)
    if any(given_labels):
        labels = [
            str(override_label or label)
            for override_label, label in zip(given_labels, labels, strict=True)
        ]
        _refuse_shared_labels(labels, overrides, task_key)

    return [
        Member(name, label, make_command(config, changes, workdir / name), changes)
        for changes, name, label in zip(overrides, names, labels, strict=True)
    ]


def make_command(config: str, changes: Overrides, run_dir: pathlib.Path) -> list[str]:
    """Return the command that runs a config with overrides in a run directory."""
    command = [sys.executable, '-m', 'mi.main', f'--config={config}', *_to_flags(changes)]
    return [*command, f'--workdir={run_dir}']


def _to_flags(changes: Overrides) -> list[str]:
    return [f'--config.{key}={value}' for key, value in changes.items()]


def _make_names(shown_overrides: list[Overrides], overrides: list[Overrides]) -> list[str]:
    """Return a unique name of a run directory for each member.

    A name shows the values that differ between members. If an earlier member already has the name,
    for example because 'a/b' and 'a_b' give the same one, it also shows the keys. If this is still
    ambiguous, a hash of the overrides is added.

    Raises:
      UserError: if two members have the same overrides.
    """
    used_names: list[str] = []
    used_flags: set[tuple[str, ...]] = set()
    for changes, shown_keys in zip(overrides, shown_overrides, strict=True):
        # Spell the name in three ways, from the shortest to the one that is always unique.
        flags = tuple(sorted(_to_flags(changes)))
        digest = hashlib.sha256('\0'.join(flags).encode()).hexdigest()[:8]
        short_name, long_name = (
            ','.join(f'{format_key(key)}={value}' for key, value in shown_keys.items()).replace(
                '/', '_'
            )
            or 'only'
            for format_key in (_shorten_key, str)
        )
        candidates = [
            _to_file_name(name) for name in (short_name, long_name, f'{long_name},{digest}')
        ]
        if flags in used_flags:
            raise UserError(
                f'two members of the sweep have the same overrides: {candidates[0]}. Remove one'
            )
        used_flags.add(flags)
        used_names.append(next(name for name in candidates if name not in used_names))
    return used_names


def _to_file_name(name: str, max_bytes: int = 255) -> str:
    """Shorten a name that is too long for a file system to its beginning and a hash."""
    if len(name.encode()) <= max_bytes:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f'{name.encode()[: max_bytes - 55].decode(errors="ignore")}-{digest}'


def make_labels(
    overrides: list[Overrides], shown_overrides: list[Overrides], task_key: str | None
) -> list[str]:
    """Return the label of each member, which shows keys if another arm has the same values."""

    arms = [_identify_arm(changes, task_key) for changes in overrides]
    shown_values = [_drop_seeds_and_task(changes, task_key) for changes in shown_overrides]
    labels = [', '.join(map(str, values.values())) or 'only' for values in shown_values]

    # Add short keys to labels that two arms share, then whole keys to those that still are shared.
    for format_key in (_shorten_key, str):
        labels_with_keys = [
            ', '.join(f'{format_key(key)}={value}' for key, value in values.items()) or 'only'
            for values in shown_values
        ]
        label_arms: dict[str, set[str]] = {}
        for label, arm in zip(labels, arms, strict=True):
            label_arms.setdefault(label, set()).add(arm)
        labels = [
            label if len(label_arms[label]) == 1 else label_with_keys
            for label, label_with_keys in zip(labels, labels_with_keys, strict=True)
        ]
    return labels


def _drop_seeds_and_task(changes: Overrides, task_key: str | None) -> Overrides:
    return {key: changes[key] for key in changes if key not in ('seeds', task_key)}


def _identify_arm(changes: Overrides, task_key: str | None) -> str:
    """Return a text that is the same for all members of an arm, and different for others."""
    return repr(sorted(_drop_seeds_and_task(changes, task_key).items()))


def _refuse_shared_labels(
    labels: list[str], overrides: list[Overrides], task_key: str | None
) -> None:
    """Raise an error if the sweep file gives the same label to two arms."""
    arms: dict[str, str] = {}  # label → its arm
    for label, changes in zip(labels, overrides, strict=True):
        arm = _identify_arm(changes, task_key)
        if arms.setdefault(label, arm) != arm:
            raise UserError(
                f'label = {label!r}: expected a different label for each arm (got it for '
                f'{arms[label]} and {arm})'
            )


def _shorten_key(key: str) -> str:
    """Return the part of a key that identifies it, such as 'fusion' in 'model.fusion.name'."""
    return '.'.join(part for part in key.split('.')[1:] if part != 'name') or key
