"""Sweeps as data: a Python file with the config, the overrides, and what to compare.

CONFIG = 'configs/lm.py:quickstart'      with TITLE, METRIC, SPLIT, BASELINE and NOTES
METRIC = 'bits_per_byte'                 a number that the runs record in SPLIT, or a function of
                                         their records, 'package.module:function', as described in
                                         `mi.training.run_metric`
LOWER_IS_BETTER = True                   optional; a function may have it as an attribute
CURVES = 'valid'                         split of the learning curves; optional. The default is
                                         'valid' if the runs record METRIC there during training,
                                         else SPLIT
TASK = 'env.name'                        key of the task, if each run learns one task; optional
PROBLEMS = ('problem.system',)           keys that make arms separate problems, which are not ranked
                                         with each other; optional
def sweep() -> list[dict[str, Any]]      overrides of CONFIG, one dict for each member
def report(workdir, out) -> None         figures and tables of its own; optional
"""

import contextlib
import itertools
import json
import pathlib
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from launch import metric_names, state
from launch.members import Member, Overrides, make_members
from mi.config import UserError, describe_difference, flatten, format_error, suggest
from mi.overrides import create_module, find_file
from mi.overrides import parse as parse_arguments
from mi.registry import is_reference
from mi.training.io import write_json
from mi.training.lock import is_locked
from mi.training.progress import track
from mi.training.run_metric import find_direction

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'
WATCHING_ENGINES = ('local', 'ray', 'pbt')  # they start all members themselves and queue none


def product(*sweeps: list[Overrides], **values: Sequence[Any]) -> list[Overrides]:
    """Return every combination: product(**{'model.fusion.name': ['mi', 'film'], …}).

    The last key varies fastest. Sweeps as positional arguments are multiplied too:
    product(zip_(…), seeds=[(0,), (1,)]).

    Raises:
      UserError: if two of them set the same key.
    """
    factors = [
        *sweeps,
        *([{key: value} for value in key_values] for key, key_values in values.items()),
    ]
    return [_merge_overrides(combination) for combination in itertools.product(*factors)]


def zip_(**values: Sequence[Any]) -> list[Overrides]:
    """Return the i-th values together: zip_(**{'model.width': [64, 128], 'seeds': [(0,), (1,)]}).

    Raises:
      UserError: if the keys have different numbers of values.
    """
    if len({len(key_values) for key_values in values.values()}) > 1:
        counts = ', '.join(f'{key} {len(key_values)}' for key, key_values in values.items())
        raise UserError(f'zip_: expected the same number of values for every key (got {counts})')
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def chain(*sweeps: list[Overrides]) -> list[Overrides]:
    """Return the members of all sweeps in order, without repetitions."""
    members = itertools.chain(*sweeps)
    return list(
        {json.dumps(member, sort_keys=True, default=repr): member for member in members}.values()
    )


def _merge_overrides(parts: Sequence[Overrides]) -> Overrides:
    merged: Overrides = {}
    for part in parts:
        if repeated_keys := merged.keys() & part.keys():
            raise UserError(f'product: two of its sweeps set {", ".join(sorted(repeated_keys))}')
        merged |= part
    return merged


def load(
    file: str, workdir: pathlib.Path, engine: str = 'local', *, dry: bool = False
) -> list[Member]:
    """Read a sweep file and write workdir/sweep.json, which the report reads.

    A directory that holds the sweep already may get more members. Members that have not begun may
    change; the others must keep their configs.

    Args:
      file: the sweep file.
      workdir: directory of the sweep.
      engine: name of the engine that will run it.
      dry: whether nothing is written, because nothing will run.

    Raises:
      UserError: if the file is not a sweep; a member sets a key that the config does not have;
        BASELINE is not an arm; the runs will not record METRIC in SPLIT and CURVES; two members
        train the same seed of an arm; or the directory holds another sweep.
    """
    # Read the members and check them.
    module = _load_module(file)
    task_key = getattr(module, 'TASK', None)
    with _user_errors(file):
        overrides = [
            {config_key: _to_plain(config_key, value) for config_key, value in changes.items()}
            for changes in module.sweep()
        ]
    members = make_members(overrides, module.CONFIG, workdir, task_key)
    labels = list(dict.fromkeys(member.label for member in members))
    if module.BASELINE not in (None, *labels):
        hint = suggest(str(module.BASELINE), labels)
        raise UserError(f'--sweep={file}: BASELINE = {module.BASELINE!r}: expected an arm; {hint}')
    configs = {member.name: parse_config(member.command) for member in members}
    _refuse_repeated_seeds(members, configs, task_key)

    curves = _choose_curves(file, module, configs)
    description = {
        **_describe_sweep(file, module, members),
        'curves': curves,
        'engine': engine,
        'command': f'python -m launch.{engine} --sweep={file} --workdir={workdir}',
    }

    # Compare the description with that in the directory, and write it.
    sweep_file = workdir / 'sweep.json'
    if sweep_file.exists():
        last_description = state.read_sweep_file(workdir, {'name': str, 'members': list})
        _refuse_changes(last_description, json.loads(json.dumps(description)), workdir)
    if not dry:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            write_json(sweep_file, description)
        except OSError as error:
            raise UserError(
                f'--workdir={workdir}: {error.strerror}; name another directory'
            ) from error
    return members


def parse_config(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """Return the config that `mi.main` makes of --config=FILE and --config.KEY=VALUE.

    Raises:
      UserError: if there is no such file or key, or a value has the wrong type.
    """
    try:
        return parse_arguments(arguments)
    except UserError as error:
        config_flags = ' '.join(arg for arg in arguments if arg.startswith('--config'))
        raise UserError(f'{config_flags}: {error}') from error


def _describe_sweep(
    file: str, module: types.ModuleType, members: Sequence[Member]
) -> dict[str, Any]:
    """Return the part of sweep.json that comes from the sweep file."""
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
        'members': [_describe_member(member, task_key) for member in members],
    }


def _choose_direction(file: str, module: types.ModuleType) -> bool:
    """Return LOWER_IS_BETTER, or its default: that of a METRIC by reference, else True.

    Raises:
      UserError: if LOWER_IS_BETTER and the function of METRIC disagree.
    """
    declared = getattr(module, 'LOWER_IS_BETTER', None)
    by_function = find_direction(module.METRIC) if is_reference(module.METRIC) else None
    if None not in (declared, by_function) and declared != by_function:
        raise UserError(
            f'--sweep={file}: LOWER_IS_BETTER = {declared!r}: expected {by_function!r}, the '
            f'attribute lower_is_better of METRIC = {module.METRIC!r}. Remove one of them'
        )
    return next(direction for direction in (declared, by_function, True) if direction is not None)


def sweep_name(file: pathlib.Path) -> str:
    """Return the name of a sweep: 'regression' for regression/sweep.py as for regression.py."""
    prefix, _, variant = file.stem.partition('_')
    if prefix != 'sweep':
        return file.stem
    return '_'.join(filter(None, (file.absolute().parent.name, variant)))


def _describe_member(member: Member, task_key: str | None) -> dict[str, Any]:
    """Return the entry of a member in sweep.json."""
    entry = {'name': member.name, 'label': member.label, 'overrides': member.overrides}
    if task_key in member.overrides:
        entry['task'] = str(member.overrides[task_key])
    return entry


def _refuse_changes(
    last_sweep: dict[str, Any], new_sweep: dict[str, Any], workdir: pathlib.Path
) -> None:
    """Refuse to change or remove members that have begun."""
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
        last_base = new_base | flatten(last_sweep.get('base', new_sweep['base']))
        change = describe_difference(last_base | member['overrides'], new_base | new_members[name])
        if change:
            changes.setdefault(change, []).append(name)
    if changes:
        details = '; '.join(f'{_shorten(names)}: {change}' for change, names in changes.items())
        raise UserError(
            f'{workdir} holds another sweep, {last_sweep["name"]} ({details}); name another '
            f'--workdir'
        )


def _shorten(names: list[str]) -> str:
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def report(file: str, workdir: pathlib.Path) -> None:
    """Add the sweep file's own figures and tables to workdir/report, if it has any."""
    draw = getattr(_load_module(file), 'report', None)
    if draw is not None:
        draw(workdir, workdir / 'report')


def _load_module(file: str) -> types.ModuleType:
    """Import a sweep file.

    Raises:
      UserError: if there is no such file, it raises, or it does not define what it must.
    """
    path = pathlib.Path(find_file(file, ('experiments',))).absolute()
    if not path.is_file():
        known_names = sorted(
            sweep_name(path)
            for path in EXPERIMENTS.rglob('*.py')
            if 'CONFIG = ' in path.read_text()
        )
        raise UserError(
            f'--sweep={file}: expected a file of your own or experiments/NAME.py; '
            f'{suggest(sweep_name(path), known_names)}'
        )
    module = create_module(path.stem, str(path))
    assert module.__spec__ is not None and module.__spec__.loader is not None
    with _user_errors(file):
        module.__spec__.loader.exec_module(module)
    for name in ('CONFIG', 'TITLE', 'METRIC', 'SPLIT', 'BASELINE', 'NOTES', 'sweep'):
        if not hasattr(module, name):
            raise UserError(f'--sweep={file}: it does not define {name}')
    return module


@contextlib.contextmanager
def _user_errors(file: str) -> Iterator[None]:
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


def _to_plain(key: str, value: Any) -> Any:
    """Return a value with NumPy's numbers and arrays as Python's, for JSON and flags."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, tuple | list):
        return type(value)(_to_plain(key, item) for item in value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise UserError(f'{key} = {value!r}: expected a number, a string, or a tuple of them')


def _refuse_repeated_seeds(
    members: list[Member], configs: Mapping[str, ml_collections.ConfigDict], task_key: str | None
) -> None:
    """Refuse two runs of the same seed in an arm: the report would not know which one counts."""
    first_names: dict[tuple[str, str, int], str] = {}  # label, task and seed → member
    for member in members:
        values = flatten(configs[member.name].to_dict())
        task = str(values[task_key]) if task_key in values else ''
        for seed in values.get('seeds', ()):  # a config of an unknown task may have none
            first_name = first_names.setdefault((member.label, task, seed), member.name)
            if first_name != member.name:
                raise UserError(
                    f'{first_name} and {member.name} both train seed {seed} of {member.label!r}, '
                    f'and are one arm; give them different seeds'
                )


def _choose_curves(
    file: str, module: types.ModuleType, configs: Mapping[str, ml_collections.ConfigDict]
) -> str:
    """Return CURVES, or its default given what the members record.

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
