"""Sweep files: Python files that define the config, the overrides and the comparison.

CONFIG = 'configs/lm.py:quickstart'      with TITLE, METRIC, SPLIT, BASELINE and NOTES
METRIC = 'bits_per_byte'                 a number that the runs record in SPLIT, or a function of
                                         their records, 'package.module:function', as described in
                                         `mi.training.run_metric`
LOWER_IS_BETTER = True                   optional; may be an attribute of the function instead
CURVES = 'valid'                         split of the learning curves; optional. The default is
                                         'valid' if the runs record METRIC there during training,
                                         else SPLIT
TASK = 'env.name'                        key of the task, if each run learns one task; optional
PROBLEMS = ('problem.system',)           keys that make arms separate problems, which are not ranked
                                         with each other; optional
def sweep() -> list[dict[str, Any]]      overrides of CONFIG, one dict for each member; the key
                                         'label' names the arm, in place of the values that differ
SPACE, COUNT = {…}, 20                   in place of sweep(): a random search of COUNT members in a
SEED = 0                                 space (`launch.search_space`), and its seed; optional
def report(workdir, out) -> None         adds figures and tables to the report; optional
"""

import itertools
import json
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from launch import metric_names, state
from launch.members import Member, Overrides, make_members
from launch.members import parse_config as parse_config
from launch.search_space import choice as choice
from launch.search_space import describe_space, list_searched_keys
from launch.search_space import integer as integer
from launch.search_space import log_uniform as log_uniform
from launch.search_space import sample as sample
from launch.search_space import uniform as uniform
from launch.sweep_file import get_space, list_overrides, load_module, sweep_name
from mi.config import UserError, describe_difference, find_added, flatten, suggest
from mi.registry import is_reference
from mi.training.io import write_json
from mi.training.lock import is_locked
from mi.training.progress import track
from mi.training.run_metric import find_direction

# Engines that start all members themselves and queue none.
WATCHING_ENGINES = ('local', 'ray', 'pbt', 'optuna')


def product(*sweeps: list[Overrides], **values: Sequence[Any]) -> list[Overrides]:
    """Return all combinations, as in product(**{'model.fusion.name': ['mi', 'film'], …}).

    The last key varies fastest. Positional arguments are sweeps to combine with the values, as in
    product(zip_(…), seeds=[(0,), (1,)]).

    Raises:
      UserError: if two arguments set the same key.
    """
    factors = [
        *sweeps,
        *([{key: value} for value in key_values] for key, key_values in values.items()),
    ]
    return [_merge_overrides(combination) for combination in itertools.product(*factors)]


def zip_(**values: Sequence[Any]) -> list[Overrides]:
    """Combine the i-th values, as in zip_(**{'model.width': [64, 128], 'seeds': [(0,), (1,)]}).

    Raises:
      UserError: if the keys have different numbers of values.
    """
    if len({len(key_values) for key_values in values.values()}) > 1:
        counts = ', '.join(f'{key} {len(key_values)}' for key, key_values in values.items())
        raise UserError(f'zip_: expected the same number of values for every key (got {counts})')
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def chain(*sweeps: list[Overrides]) -> list[Overrides]:
    """Return the members of all sweeps in order, without duplicates."""
    members = itertools.chain(*sweeps)
    return list(
        {json.dumps(member, sort_keys=True, default=repr): member for member in members}.values()
    )


def _merge_overrides(parts: Sequence[Overrides]) -> Overrides:
    merged: Overrides = {}
    for part in parts:
        if repeated_keys := merged.keys() & part.keys():
            raise UserError(f'product: two arguments set {", ".join(sorted(repeated_keys))}')
        merged |= part
    return merged


def load(
    file: str, workdir: pathlib.Path, engine: str = 'local', *, dry: bool = False
) -> list[Member]:
    """Read a sweep file and write workdir/sweep.json, which the report reads.

    If the directory already holds the sweep, members may be added. Members that have begun must
    keep their configs. The others may change.

    Args:
      file: the sweep file.
      workdir: directory of the sweep.
      engine: name of the engine that will run the sweep.
      dry: whether to skip writing, because nothing will run.

    Raises:
      UserError: if the file is not a sweep, if a member sets a key that the config does not have,
        if BASELINE is not an arm, if the runs will not record METRIC in SPLIT and CURVES, if two
        members train the same seed of an arm, or if the directory holds a different sweep.
    """
    # Read the members and check them.
    module = load_module(file)
    task_key = getattr(module, 'TASK', None)
    members = make_members(
        list_overrides(file, module),
        module.CONFIG,
        workdir,
        task_key,
        list_searched_keys(get_space(module)),
    )
    labels = list(dict.fromkeys(member.label for member in members))
    if module.BASELINE not in (None, *labels):
        hint = suggest(str(module.BASELINE), labels)
        raise UserError(f'--sweep={file}: BASELINE = {module.BASELINE!r}: expected an arm; {hint}')
    configs = {member.name: member.config for member in members}
    _refuse_repeated_seeds(members, configs, task_key)
    description = describe(file, module, members, configs)
    description |= describe_command(file, workdir, engine)
    write_description(workdir, description, dry=dry)
    return members


def write_description(workdir: pathlib.Path, description: dict[str, Any], *, dry: bool) -> None:
    """Check the sweep directory, and write sweep.json unless `dry` is True.

    Raises:
      UserError: if the directory holds a different sweep, or cannot be written.
    """
    sweep_file = workdir / 'sweep.json'
    if sweep_file.exists():
        last_description = state.read_sweep_file(workdir, {'name': str, 'members': list})
        _refuse_changes(last_description, json.loads(json.dumps(description)), workdir)
    if dry:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(sweep_file, description)
    except OSError as error:
        raise UserError(f'--workdir={workdir}: {error.strerror}. Use another directory') from error


def describe(
    file: str,
    module: types.ModuleType,
    members: Sequence[Member],
    configs: Mapping[str, ml_collections.ConfigDict],
) -> dict[str, Any]:
    """Return the part of sweep.json that comes from the sweep file.

    Raises:
      UserError: if a member will not record METRIC in SPLIT and CURVES.
    """
    task_key = getattr(module, 'TASK', None)
    return {
        'name': sweep_name(pathlib.Path(file)),
        'title': module.TITLE,
        'metric': module.METRIC,
        'split': module.SPLIT,
        'lower_is_better': _choose_direction(file, module),
        'baseline': module.BASELINE,
        'problems': list(getattr(module, 'PROBLEMS', ())),
        'notes': module.NOTES,
        'config': module.CONFIG,
        'base': json.loads(parse_config([f'--config={module.CONFIG}']).to_json()),
        'space': describe_space(get_space(module)),
        'members': [describe_member(member, task_key) for member in members],
        'curves': _choose_curves(file, module, configs),
    }


def describe_command(file: str, workdir: pathlib.Path, engine: str) -> dict[str, str]:
    """Return the part of sweep.json that records how the sweep was started."""
    command = f'python -m launch.{engine} --sweep={file} --workdir={workdir}'
    return {'engine': engine, 'command': command}


def _choose_direction(file: str, module: types.ModuleType) -> bool:
    """Return LOWER_IS_BETTER, or its default.

    If METRIC refers to a function, the default is the function's attribute, otherwise True.

    Raises:
      UserError: if LOWER_IS_BETTER and the attribute disagree.
    """
    declared = getattr(module, 'LOWER_IS_BETTER', None)
    by_function = find_direction(module.METRIC) if is_reference(module.METRIC) else None
    if None not in (declared, by_function) and declared != by_function:
        raise UserError(
            f'--sweep={file}: LOWER_IS_BETTER = {declared!r}: expected {by_function!r}, the '
            f'attribute lower_is_better of METRIC = {module.METRIC!r}. Remove one of the two'
        )
    return next(direction for direction in (declared, by_function, True) if direction is not None)


def describe_member(member: Member, task_key: str | None) -> dict[str, Any]:
    """Return the entry of a member in sweep.json."""
    entry = {'name': member.name, 'label': member.label, 'overrides': member.overrides}
    if task_key in member.overrides:
        entry['task'] = str(member.overrides[task_key])
    return entry


def _refuse_changes(
    last_sweep: dict[str, Any], new_sweep: dict[str, Any], workdir: pathlib.Path
) -> None:
    """Raise an error if members that have begun were changed or removed."""
    new_members = {member['name']: member['overrides'] for member in new_sweep['members']}
    new_base = flatten(new_sweep['base'])
    may_be_queued = last_sweep.get('engine') not in WATCHING_ENGINES  # absent in old files
    changes: dict[str, list[str]] = {}  # difference → names of the members
    for member in last_sweep['members']:
        name = member['name']
        run_dir = workdir / name
        has_begun = (run_dir / 'config.json').exists() or is_locked(run_dir / 'launched')
        if not has_begun and not may_be_queued:
            continue
        if name not in new_members:
            changes.setdefault('removed from the sweep', []).append(name)
            continue
        # Keys that the config did not have then do not count as changes.
        last_base = flatten(last_sweep.get('base', new_base))
        last_base |= find_added(last_base, new_base)
        change = describe_difference(last_base | member['overrides'], new_base | new_members[name])
        if change:
            changes.setdefault(change, []).append(name)
    if changes:
        details = '; '.join(f'{_shorten(names)}: {change}' for change, names in changes.items())
        raise UserError(
            f'--workdir={workdir} holds a different sweep, {last_sweep["name"]} ({details}). Use '
            f'another --workdir'
        )


def _shorten(names: list[str]) -> str:
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def report(file: str, workdir: pathlib.Path) -> None:
    """Add the sweep file's own figures and tables to workdir/report if it defines any."""
    draw = getattr(load_module(file), 'report', None)
    if draw is not None:
        draw(workdir, workdir / 'report')


def _refuse_repeated_seeds(
    members: list[Member], configs: Mapping[str, ml_collections.ConfigDict], task_key: str | None
) -> None:
    """Raise an error if two members of an arm train the same seed, which would be ambiguous."""
    first_names: dict[tuple[str, str, int], str] = {}  # label, task and seed → member
    for member in members:
        values = flatten(configs[member.name].to_dict())
        task = str(values[task_key]) if task_key in values else ''
        for seed in values.get('seeds', ()):  # a config of an unknown task may have none
            first_name = first_names.setdefault((member.label, task, seed), member.name)
            if first_name != member.name:
                raise UserError(
                    f'{first_name} and {member.name} both train seed {seed} of the arm '
                    f'{member.label!r}. Give them different seeds'
                )


def _choose_curves(
    file: str, module: types.ModuleType, configs: Mapping[str, ml_collections.ConfigDict]
) -> str:
    """Return CURVES, or its default for the records of the members.

    Raises:
      UserError: if a member will not record METRIC in SPLIT or CURVES.
    """
    finder, member_splits = metric_names.Finder(module.METRIC), []
    activity = 'looking up what the members record'
    for name, config in track(configs.items(), activity, len(configs), 'members'):
        try:
            splits = finder.find(config)
        except UserError:  # an invalid config: the member itself reports that
            continue
        member_splits.append(splits)
        for key in ('SPLIT', 'CURVES'):
            split = getattr(module, key, None)
            if split is None:
                continue
            if error := metric_names.find_error(module.METRIC, key, split, splits):
                raise UserError(f'--sweep={file}: {error} (member {name})')
    curves = getattr(module, 'CURVES', None)
    return curves or metric_names.choose_curves(module.METRIC, module.SPLIT, member_splits)
