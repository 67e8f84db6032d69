"""Sweeps as data: a file with the config, the overrides, and what to compare.

CONFIG = 'configs/lm.py:quickstart'      TITLE, METRIC, SPLIT, BASELINE, NOTES
LOWER_IS_BETTER = True                   may be left out
CURVES = 'valid'                         split of the learning curves; left out, 'valid' where the
                                         runs record METRIC there on their way, else SPLIT
TASK = 'env.name'                        of runs that learn one task each: its key; may be left out
PROBLEMS = ('problem.system',)           keys that make arms problems of their own, not to be ranked
                                         with each other; may be left out
def sweep() -> list[dict[str, Any]]      overrides of CONFIG, one dict for each member
def report(workdir, out) -> None         figures and tables of its own; may be left out
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import pathlib
import sys
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from launch import metric_names, state
from mi.config import UserError, describe_difference, flatten, format_error, suggest
from mi.overrides import find_file
from mi.overrides import parse as parsed_arguments
from mi.training.io import write_json
from mi.training.lock import is_locked
from mi.training.progress import track

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'
WATCHING = ('local', 'ray', 'pbt')  # engines that queue no member elsewhere, out of their sight


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
      name: of its run directory, made of what differs between the members.
      label: its name in tables and figures: the values that differ, but for seeds and task, with
        their keys where the values alone would be those of two arms. Members of one label are one
        arm.
      command: what runs it.
      overrides: dotted key → value.
    """

    name: str
    label: str
    command: list[str]
    overrides: dict[str, Any]


Overrides = dict[str, Any]  # dotted key → value


def product(*sweeps: list[Overrides], **values: Sequence[Any]) -> list[Overrides]:
    """Every combination: product(**{'model.fusion.name': ['mi', 'film'], …}), the last one fastest.

    Sweeps that stand before the keys are multiplied too: product(zip_(…), seeds=[(0,), (1,)]).

    Raises:
      UserError: if two of them set the same key.
    """
    factors = [*sweeps, *([{key: value} for value in of_key] for key, of_key in values.items())]
    return [_union(combination) for combination in itertools.product(*factors)]


def zip_(**values: Sequence[Any]) -> list[Overrides]:
    """One after the other: zip_(**{'model.width': [64, 128], 'optim.learning_rate': [0.1, 0.03]}).

    Raises:
      UserError: if they are not as many.
    """
    if len({len(of_key) for of_key in values.values()}) > 1:
        counts = ', '.join(f'{key} {len(of_key)}' for key, of_key in values.items())
        raise UserError(f'zip_: as many values are needed of every key, and there are {counts}')
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def chain(*sweeps: list[Overrides]) -> list[Overrides]:
    """The members of all of them, each once, where it comes first."""
    members = itertools.chain(*sweeps)
    return list({json.dumps(m, sort_keys=True, default=repr): m for m in members}.values())


def _union(parts: Sequence[Overrides]) -> Overrides:
    union: Overrides = {}
    for part in parts:
        if twice := union.keys() & part.keys():
            raise UserError(f'product: two of its sweeps set {", ".join(sorted(twice))}')
        union |= part
    return union


def load(
    file: str, workdir: pathlib.Path, engine: str = 'local', *, dry: bool = False
) -> list[Member]:
    """Reads a sweep file and writes workdir/sweep.json, which the report reads.

    A directory that holds the sweep already may get more members, and none of another config; those
    that have not begun may change.

    Args:
      file: the sweep.
      workdir: its directory.
      engine: what is to run it.
      dry: whether nothing is written, as nothing is to be run.

    Raises:
      UserError: if the file is not a sweep, its config has not a key that a member sets, its
        BASELINE is none of its arms, its runs will not record its METRIC in its SPLIT and CURVES,
        two members train the same seed of an arm, or the directory holds another sweep: what
        differs.
    """
    module = _module(file)
    task = getattr(module, 'TASK', None)
    with _in_one_line(file):
        overrides = [{k: _plain(k, v) for k, v in changes.items()} for changes in module.sweep()]
    members = _members(overrides, module.CONFIG, workdir, task)
    labels = list(dict.fromkeys(m.label for m in members))
    if module.BASELINE not in (None, *labels):
        hint = suggest(str(module.BASELINE), labels)
        raise UserError(f'--sweep={file}: BASELINE = {module.BASELINE!r} is no arm; {hint}')
    configs = {m.name: parsed(m.command) for m in members}
    _refuse_twice(members, configs, task)
    curves = _checked_curves(file, module, configs)
    description = {
        'name': sweep_name(pathlib.Path(file)),
        'title': module.TITLE,
        'metric': module.METRIC,
        'split': module.SPLIT,
        'lower_is_better': getattr(module, 'LOWER_IS_BETTER', True),
        'curves': curves,
        'baseline': module.BASELINE,
        'problems': list(getattr(module, 'PROBLEMS', ())),
        'notes': module.NOTES,
        'config': module.CONFIG,
        'base': json.loads(parsed([f'--config={module.CONFIG}']).to_json()),
        'engine': engine,
        'command': f'python -m launch.{engine} --sweep={file} --workdir={workdir}',
        'members': [
            {'name': m.name, 'label': m.label, 'overrides': m.overrides}
            | ({'task': str(m.overrides[task])} if task in m.overrides else {})
            for m in members
        ],
    }
    record = workdir / 'sweep.json'
    if record.exists():
        before = state.described(workdir, {'name': str, 'members': list})
        _refuse_changes(before, json.loads(json.dumps(description)), workdir)
    if not dry:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            write_json(record, description)
        except OSError as error:
            raise UserError(
                f'--workdir={workdir}: {error.strerror}; name another directory'
            ) from error
    return members


def parsed(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """The config that `mi.main` makes of its arguments --config=FILE and --config.KEY=VALUE.

    Raises:
      UserError: if there is no such file or key, or a value is not of the key's type.
    """
    try:
        return parsed_arguments(arguments)
    except UserError as error:
        given = ' '.join(a for a in arguments if a.startswith('--config'))
        raise UserError(f'{given}: {error}') from error


def _refuse_changes(before: dict[str, Any], now: dict[str, Any], workdir: pathlib.Path) -> None:
    """Refuses members that have begun and are gone or changed: their runs would not be its own."""
    members = {m['name']: m['overrides'] for m in now['members']}
    may_be_queued = before.get('engine') not in WATCHING
    changes: dict[str, list[str]] = {}  # what differs → the members that it differs in
    for member in before['members']:
        name = member['name']
        path = workdir / name
        begun = (path / 'config.json').exists() or is_locked(path / 'launched')
        if not begun and not may_be_queued:
            continue
        if name not in members:
            changes.setdefault('it is there no more', []).append(name)
            continue
        added = flatten(now['base'])  # keys that the config did not have then
        was = added | flatten(before.get('base', now['base'])) | member['overrides']
        if changed := describe_difference(was, flatten(now['base']) | members[name]):
            changes.setdefault(changed, []).append(name)
    if changes:
        what = '; '.join(f'{_some(names)}: {changed}' for changed, names in changes.items())
        raise UserError(
            f'{workdir} holds another sweep, {before["name"]} ({what}); name another --workdir'
        )


def _some(names: list[str]) -> str:
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def report(file: str, workdir: pathlib.Path) -> None:
    """Adds what the sweep file draws itself to workdir/report, if it draws anything."""
    draw = getattr(_module(file), 'report', None)
    if draw is not None:
        draw(workdir, workdir / 'report')


def sweep_name(file: pathlib.Path) -> str:
    """Return the name of a sweep: 'regression' for regression/sweep.py as for regression.py."""
    word, _, variant = file.stem.partition('_')
    if word != 'sweep':
        return file.stem
    return '_'.join(filter(None, (file.absolute().parent.name, variant)))


def _module(file: str) -> types.ModuleType:
    path = pathlib.Path(find_file(file, ('experiments',))).absolute()
    if not path.is_file():
        ours = sorted(
            sweep_name(p) for p in EXPERIMENTS.rglob('*.py') if 'CONFIG = ' in p.read_text()
        )
        raise UserError(
            f'--sweep={file}: no such file; expected one of your own or experiments/NAME.py; '
            f'{suggest(sweep_name(path), ours)}'
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _in_one_line(file):
        spec.loader.exec_module(module)
    for name in ('CONFIG', 'TITLE', 'METRIC', 'SPLIT', 'BASELINE', 'NOTES', 'sweep'):
        if not hasattr(module, name):
            raise UserError(f'--sweep={file}: it does not define {name}')
    return module


@contextlib.contextmanager
def _in_one_line(file: str) -> Iterator[None]:
    """What goes wrong in a sweep file becomes one line, with the line of the file that it is in."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # it is the user's program: anything may
        path = str(
            pathlib.Path(find_file(file, ('experiments',))).absolute()
        )  # as `_module` has it
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        said = format_error(error)
        if isinstance(error, SyntaxError) and error.filename == path:
            lines, said = [error.lineno], error.msg
        where = f', line {lines[-1]}' if lines else ''
        raise UserError(f'--sweep={file}{where}: {type(error).__name__}: {said}') from error


def _plain(key: str, value: Any) -> Any:
    """A value as JSON and flags have it: NumPy's numbers and arrays as Python's."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, tuple | list):
        return type(value)(_plain(key, each) for each in value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise UserError(f'{key} = {value!r}: expected a number, a word, or a tuple of them')


def _members(
    overrides: list[dict[str, Any]], config: str, workdir: pathlib.Path, task: str | None
) -> list[Member]:
    keys = list(dict.fromkeys(key for changes in overrides for key in changes))
    differing = [k for k in keys if len({repr(changes.get(k)) for changes in overrides}) > 1]
    shown = [{k: c[k] for k in (differing or keys) if k in c} for c in overrides]
    names = _names(shown, overrides)
    members = []
    for changes, name, label in zip(overrides, names, _labels(overrides, shown, task), strict=True):
        command = [sys.executable, '-m', 'mi.main', f'--config={config}', *_flags(changes)]
        command += [f'--workdir={workdir / name}']
        members.append(Member(name, label, command, changes))
    return members


def _flags(changes: Overrides) -> list[str]:
    return [f'--config.{key}={value}' for key, value in changes.items()]


def _names(shown: list[Overrides], overrides: list[Overrides]) -> list[str]:
    """A name of a run directory for each member, of what differs; no two have the same.

    Where another member before has the name, as that of 'a/b' is 'a_b', keys are spelled out, and
    if that is not enough a hash of the overrides is added.

    Raises:
      UserError: if two have the same overrides.
    """
    taken: list[str] = []
    known: set[tuple[str, ...]] = set()  # flags of the members
    for changes, of in zip(overrides, shown, strict=True):
        flags = tuple(sorted(_flags(changes)))
        mark = hashlib.sha256('\0'.join(flags).encode()).hexdigest()[:8]
        short, long = (
            ','.join(f'{name(k)}={v}' for k, v in of.items()).replace('/', '_') or 'only'
            for name in (_short, str)
        )
        names = [_file_name(short), _file_name(long), _file_name(f'{long},{mark}')]
        if flags in known:
            raise UserError(f'two members of the sweep have the same overrides: {names[0]}')
        known.add(flags)
        taken.append(next(name for name in names if name not in taken))
    return taken


def _file_name(name: str, most: int = 255) -> str:
    """The name; its beginning and a hash, where it has more bytes than that of a file may have."""
    if len(name.encode()) <= most:
        return name
    mark = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f'{name.encode()[: most - 55].decode(errors="ignore")}-{mark}'


def _labels(overrides: list[Overrides], shown: list[Overrides], task: str | None) -> list[str]:
    """One for each arm: its values, with their keys where another arm has the same values."""

    def apart(changes: Overrides) -> Overrides:
        return {k: changes[k] for k in sorted(changes) if k not in ('seeds', task)}

    arms = [repr(apart(changes)) for changes in overrides]
    words = [{k: v for k, v in of.items() if k not in ('seeds', task)} for of in shown]
    labels = [', '.join(map(str, of.values())) or 'only' for of in words]
    for name in (_short, str):  # of a key
        with_keys = [', '.join(f'{name(k)}={v}' for k, v in of.items()) or 'only' for of in words]
        arms_of: dict[str, set[str]] = {}
        for label, arm in zip(labels, arms, strict=True):
            arms_of.setdefault(label, set()).add(arm)
        labels = [
            label if len(arms_of[label]) == 1 else other
            for label, other in zip(labels, with_keys, strict=True)
        ]
    return labels


def _refuse_twice(
    members: list[Member], configs: Mapping[str, ml_collections.ConfigDict], task: str | None
) -> None:
    """Refuses two runs of the same seed of an arm: the report would not know which one counts."""
    trained: dict[tuple[str, str, int], str] = {}
    for member in members:
        values = flatten(configs[member.name].to_dict())
        for seed in values.get('seeds', ()):
            first = trained.setdefault(
                (member.label, str(values.get(task or '')), seed), member.name
            )
            if first != member.name:
                raise UserError(
                    f'{first} and {member.name} both train seed {seed} of {member.label!r}, and '
                    f'are one arm; give them different seeds'
                )


def _checked_curves(
    file: str, module: types.ModuleType, configs: Mapping[str, ml_collections.ConfigDict]
) -> str:
    """CURVES, or the default for what the members record.

    Raises:
      UserError: if a member will not record METRIC in SPLIT, or not in CURVES.
    """
    finder, found = metric_names.Finder(module.METRIC), []
    what = 'looking up what the members record'
    for name, config in track(configs.items(), what, len(configs), 'members'):
        try:
            splits = finder.splits(config)
        except UserError:  # a config that cannot work: the member itself will say why
            continue
        found.append(splits)
        for key in ('SPLIT', 'CURVES'):
            split = getattr(module, key, None)
            if split is not None and (
                wrong := metric_names.check(module.METRIC, key, split, splits)
            ):
                raise UserError(f'--sweep={file}: {wrong} (member {name})')
    named = getattr(module, 'CURVES', None)
    return named or metric_names.curves(module.METRIC, module.SPLIT, found)


def _short(key: str) -> str:
    """model.fusion.name → fusion: the part of a key that tells it apart."""
    return '.'.join(part for part in key.split('.')[1:] if part != 'name') or key
