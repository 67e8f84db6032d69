"""Reads run directories and sweeps of them; what a run was trained with is not needed for it.

sweep.json    what is compared, and one folder per member, each a run directory;
              members of one label are one arm: of several seeds, or of a task each
config.json   resolved config          status.json    how the run stands, where it ran
lock          held while it goes on    stopped.json   why a rule of the sweep has ended it
metrics.jsonl one record per step,     timing.jsonl   seconds since the record before
              seed and split           cost.json      parameters and FLOPs per token or step
"""

import dataclasses
import math
import pathlib

import numpy as np

from mi.config import UserError
from mi.report.files import Record, field, is_number, read_lines
from mi.training.io import is_locked, read_json


@dataclasses.dataclass(frozen=True)
class Arm:
    """One side of a comparison: a run directory with all its seeds.

    Attributes:
      label: what tables and figures call it; unique in a sweep.
      state: running, done, failed or preempted as the run wrote it; 'died' if it wrote running and
        is no more; 'stopped' by a rule of the sweep; 'missing' without a status.
      reason: why it failed, died, was stopped or is missing.
      seeds: the seeds that the config asks for, whether they have finished or not.
      overrides: how sweep.json says that the arm differs, {dotted key: value}.
      config, cost, status: the JSON files, empty where absent.
      metrics, timing: the records, in the order of the files.
      tasks: those that its runs learnt, each run one of them; empty where each agent learns all.
    """

    label: str
    state: str
    reason: str | None
    seeds: tuple[int, ...] = ()
    overrides: Record = dataclasses.field(default_factory=dict)
    config: Record = dataclasses.field(default_factory=dict)
    cost: Record = dataclasses.field(default_factory=dict)
    status: Record = dataclasses.field(default_factory=dict)
    metrics: list[Record] = dataclasses.field(default_factory=list)
    timing: list[Record] = dataclasses.field(default_factory=list)
    tasks: tuple[str, ...] = ()

    @property
    def own_runs(self) -> bool:
        """Whether it has several tasks, learnt by runs of their own and not all by each agent."""
        return len(self.tasks) > 1

    def names(self, split: str) -> list[str]:
        """The names of all numbers in the records of a split, in order of appearance."""
        rows = (r for r in self.metrics if r['split'] == split)
        names = {name: None for r in rows for name, value in r.items() if is_number(value)}
        return [name for name in names if name not in ('step', 'seed')]

    def by_seed(self, metric: str, split: str) -> dict[int, dict[int, float]]:
        """{seed: {step: value}}, both sorted; where a step was written twice, the last counts.

        What is not finite is written as null: it is nan here, and not left out, or a seed that
        diverged would have the value before that.
        """
        found: dict[int, dict[int, float]] = {}
        for r in self.metrics:
            value = math.nan if metric in r and r[metric] is None else r.get(metric)
            if r['split'] == split and is_number(value):
                found.setdefault(r['seed'], {})[r['step']] = float(value)
        return {seed: dict(sorted(found[seed].items())) for seed in sorted(found)}

    def final(self, metric: str, split: str) -> dict[int, float]:
        """{seed: value} at the end of training; empty where that has not been reached.

        The record of the test split is written once, at the end: where it exists, it is final.
        Other splits are recorded on the way, so their last record is final once the run is done.
        """
        if split != 'test' and self.state != 'done':
            return {}
        return {seed: values[max(values)] for seed, values in self.by_seed(metric, split).items()}

    def finite(self, metric: str, split: str) -> dict[int, float]:
        """As `final`; empty where a seed is not finite, for the others would be a selection."""
        values = self.final(metric, split)
        return values if all(map(math.isfinite, values.values())) else {}

    def curve(self, metric: str, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps [N] and values [seeds, N], at the steps that every recorded seed has."""
        seeds = list(self.by_seed(metric, split).values())
        steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
        values = np.array([[seed[step] for step in steps] for seed in seeds], float)
        return np.array(steps, int), values.reshape(len(seeds), len(steps))

    def scores(
        self, metric: str, split: str, step: int | None = None
    ) -> tuple[tuple[str, ...], np.ndarray]:
        """Tasks and [seeds, tasks] of `metric/TASK`, of seeds that are finite in all.

        At a step, or at the end.
        """
        prefix = f'{metric}/'
        names = [name for name in self.names(split) if name.startswith(prefix)]
        found = [
            self.final(name, split)
            if step is None
            else {s: of[step] for s, of in self.by_seed(name, split).items() if step in of}
            for name in names
        ]
        seeds = sorted(set.intersection(*map(set, found))) if found else []
        values = np.array([[of[seed] for of in found] for seed in seeds], float)
        values = values.reshape(len(seeds), len(names))
        values = values[np.isfinite(values).all(axis=1)]
        return tuple(name.removeprefix(prefix) for name in names) if len(values) else (), values

    def seconds(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps [M] and the seconds of training up to each [M]; a resumed run repeats steps."""
        last = {r['step']: float(r['seconds']) for r in self.timing}
        steps = sorted(last)
        return np.array(steps, int), np.cumsum([last[step] for step in steps])

    def rate(self, unit: str) -> float | None:
        """Tokens (or steps) over seconds of all training, not the mean of the recorded rates."""
        name = f'{unit}s_per_second'
        last = {r['step']: r for r in self.timing if is_number(r.get(name))}
        seconds = math.fsum(r['seconds'] for r in last.values())
        done = math.fsum(r['seconds'] * r[name] for r in last.values())
        return done / seconds if seconds > 0 else None

    def counted(self, what: str, part: str) -> int | None:
        """cost.json's number for what, 'parameters' or 'flops_per_…', of a part."""
        counts = self.cost.get(what)
        value = counts.get(part) if isinstance(counts, dict) else None
        return value if isinstance(value, int) else None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A comparison; a single run is a sweep of one arm without a baseline.

    Attributes:
      baseline: the label of the arm that the others are compared with, if there is one.
      metric, split: the number that is compared, in the last record of that split.
      curves: the split of the learning curves.
      draws: the sets of two or more seeds that every arm was trained with, a run for each; empty
        unless there are several.
      warnings: what had to be left out while reading, one line each.
      problems: keys of overrides; arms that differ in one of them learn different problems, and are
        not ranked with each other.
    """

    path: pathlib.Path
    title: str
    metric: str
    split: str
    curves: str
    lower_is_better: bool
    baseline: str | None
    arms: list[Arm]
    notes: list[str]
    command: str | None
    warnings: list[str]
    draws: tuple[tuple[int, ...], ...] = ()
    problems: tuple[str, ...] = ()

    def by_problem(self) -> dict[str, list[Arm]]:
        """The arms of each problem, in order; all under '' where there is only one."""
        found: dict[str, list[Arm]] = {}
        for arm in self.arms:
            name = ', '.join(
                str(arm.overrides[key]) for key in self.problems if key in arm.overrides
            )
            found.setdefault(name, []).append(arm)
        return found

    @property
    def tasks(self) -> tuple[str, ...]:
        """What arms have to have learnt to be compared, where each task has runs of its own.

        The tasks of the baseline; without one, all that any arm has learnt.
        """
        of_baseline = [arm.tasks for arm in self.arms if arm.label == self.baseline]
        every = (task for arm in self.arms for task in arm.tasks)
        return of_baseline[0] if of_baseline else tuple(dict.fromkeys(every))

    def compares(self, arm: Arm) -> bool:
        """Whether an arm has learnt these tasks: a mean over others is another number."""
        return set(arm.tasks) == set(self.tasks)

    def left_out(self) -> str:
        """Names the arms that are not done or not finite, for tables that do not show them."""
        undone = [f'{arm.label} ({arm.state})' for arm in self.arms if arm.state != 'done']
        diverged = [
            arm.label
            for arm in self.arms
            if arm.final(self.metric, self.split) and not arm.finite(self.metric, self.split)
        ]
        said = [f'Not here, as not done: {"; ".join(undone)}.'] if undone else []
        said += [f'Not here, as a seed is not finite: {"; ".join(diverged)}.'] if diverged else []
        return ' '.join(said)

    @property
    def unit(self) -> str:
        """What speed and FLOPs are counted in: token, example, or step of an environment."""
        units = (
            u for u in ('step', 'example') if any(f'flops_per_{u}' in a.cost for a in self.arms)
        )
        return next(units, 'token')


def read(workdir: pathlib.Path, flag: str = 'workdir') -> Sweep:
    """Reads a sweep directory or a single run directory.

    Args:
      workdir: the directory.
      flag: what it was given as.

    Raises:
      UserError: if it is neither, or a file in it is not what it should be.
    """
    if not workdir.is_dir():
        raise UserError(f'--{flag}={workdir} is not a directory')
    if (workdir / 'sweep.json').exists():
        return _read_sweep(workdir)
    if (workdir / 'config.json').exists():
        return _read_single(workdir)
    raise UserError(
        f'--{flag}={workdir} is neither a sweep (no sweep.json) nor a run (no config.json)'
    )


def _read_sweep(workdir: pathlib.Path) -> Sweep:
    path = workdir / 'sweep.json'
    sweep = read_json(path)
    members = field(sweep, 'members', list, path)
    metric = field(sweep, 'metric', str, path)
    warnings: list[str] = []
    arms: dict[str, list[Arm]] = {}
    tasks: dict[str, dict[str, list[Arm]]] = {}
    for member in members:
        if not isinstance(member, dict):
            raise UserError(f'{path}: a member is {member!r}: expected an object with a name')
        name = field(member, 'name', str, path)
        overrides = field({'overrides': {}} | member, 'overrides', dict, path)
        label = field({'label': name} | member, 'label', str, path)
        run = _read_run(workdir / name, label, overrides, warnings)
        if 'task' in member:
            task = field(member, 'task', str, path)
            tasks.setdefault(label, {}).setdefault(task, []).append(run)
        arms.setdefault(label, []).append(run)
    if not arms:
        raise UserError(f'{path}: members = []: expected one or more')
    every = dict.fromkeys(task for of_label in tasks.values() for task in of_label)
    joined = [
        _of_tasks({t: _joined(tasks[label][t], path) for t in every if t in tasks[label]}, metric)
        if label in tasks
        else _joined(members, path)
        for label, members in arms.items()
    ]
    baseline = sweep.get('baseline')
    if baseline is not None and baseline not in arms:
        raise UserError(f'{path}: baseline = {baseline!r}: expected null or one of {list(arms)}')
    return Sweep(
        path=workdir,
        title=sweep.get('title') or field(sweep, 'name', str, path),
        metric=metric,
        split=field(sweep, 'split', str, path),
        curves=field({'curves': 'valid'} | sweep, 'curves', str, path),
        lower_is_better=field(sweep, 'lower_is_better', bool, path),
        baseline=baseline,
        arms=joined,
        notes=[str(note) for note in field({'notes': []} | sweep, 'notes', list, path)],
        command=sweep.get('command'),
        warnings=warnings,
        draws=() if tasks else _draws(list(arms.values())),
        problems=tuple(map(str, field({'problems': []} | sweep, 'problems', list, path))),
    )


def _draws(arms: list[list[Arm]]) -> tuple[tuple[int, ...], ...]:
    """The sets of seeds that all arms have in common, if they have several and no others."""
    sets = {tuple(sorted({run.seeds for run in members})) for members in arms}
    common = sets.pop()
    several = len(common) > 1 and all(len(seeds) > 1 for seeds in common)
    return common if several and not sets else ()


def _joined(members: list[Arm], path: pathlib.Path) -> Arm:
    """The runs of one arm, each with seeds of its own; its seconds are their means."""
    first = members[0]
    if len(members) == 1:
        return first
    seeds = [seed for arm in members for seed in arm.seeds]
    if len(set(seeds)) < len(seeds):
        raise UserError(
            f'{path}: members of label {first.label!r} have seeds {seeds}: expected different '
            f'labels, or different seeds'
        )
    # The state that is furthest from the end, for the arm is not there before.
    worst = next((arm for arm in members if arm.state != 'done'), first)
    return dataclasses.replace(
        first,
        state=worst.state,
        reason=worst.reason,
        seeds=tuple(seeds),
        status=worst.status,
        metrics=[record for arm in members for record in arm.metrics],
        timing=_mean_timing([arm.timing for arm in members]),
    )


def _mean_timing(of_runs: list[list[Record]]) -> list[Record]:
    """The means of the records that all runs have."""
    by_step = [{r['step']: r for r in timing} for timing in of_runs]
    timing: list[Record] = []
    for step in sorted(set.intersection(*map(set, by_step))):
        rows = [rows[step] for rows in by_step]
        names = [name for name in rows[0] if all(is_number(r.get(name)) for r in rows)]
        timing.append({name: sum(r[name] for r in rows) / len(rows) for name in names})
        timing[-1]['step'] = step
    return timing


def _of_tasks(arms: dict[str, Arm], metric: str) -> Arm:
    """One arm of the runs of several tasks, whose metric is the mean over them.

    Each record holds the metric of every task, as that of an agent that learns all of them does;
    there is one where every task has a record of that step, seed and split. The mean is null where
    a task is, which is not finite there.
    """
    first = next(iter(arms.values()))
    if len(arms) == 1:
        return dataclasses.replace(first, tasks=tuple(arms))
    worst = next((arm for arm in arms.values() if arm.state != 'done'), first)
    values: dict[tuple[int, int, str], dict[str, float | None]] = {}
    for task, arm in arms.items():
        for r in arm.metrics:
            if metric in r and (r[metric] is None or is_number(r[metric])):
                values.setdefault((r['step'], r['seed'], r['split']), {})[task] = r[metric]
    records: list[Record] = []
    for (step, seed, split), of_task in values.items():
        if len(of_task) == len(arms):
            finite = [value for value in of_task.values() if value is not None]
            whole = math.fsum(finite) / len(arms) if len(finite) == len(arms) else None
            records.append({'step': step, 'seed': seed, 'split': split, metric: whole})
            records[-1] |= {f'{metric}/{task}': value for task, value in of_task.items()}
    return dataclasses.replace(
        first,
        state=worst.state,
        reason=worst.reason,
        seeds=tuple(sorted(set.intersection(*(set(arm.seeds) for arm in arms.values())))),
        status=worst.status,
        metrics=records,
        timing=_mean_timing([arm.timing for arm in arms.values()]),
        tasks=tuple(arms),
    )


def _read_single(workdir: pathlib.Path) -> Sweep:
    warnings: list[str] = []
    arm = _read_run(workdir, workdir.resolve().name, {}, warnings)
    learns = bool(arm.names('eval'))  # by reinforcement: there are returns, and no test text
    names = arm.names('eval') or arm.names('test') or arm.names('valid')
    # Bytes are the unit that runs with different vocabularies share; a run of one-hot targets has
    # none, and is shown by its first number.
    metric = 'bits_per_byte' if 'bits_per_byte' in names or not names else names[0]
    return Sweep(
        path=workdir,
        title=arm.label,
        metric='return' if learns else metric,
        split='eval' if learns else 'test',
        curves='eval' if learns else 'valid',
        lower_is_better=not learns,
        baseline=None,
        arms=[arm],
        notes=[],
        command=None,
        warnings=warnings,
    )


def _read_run(path: pathlib.Path, label: str, overrides: Record, warnings: list[str]) -> Arm:
    if not path.is_dir():
        return Arm(label, 'missing', f'no folder {path.name}', overrides=overrides)
    # The status is read first: a run that ends meanwhile counts as running, never the reverse.
    status = read_json(path / 'status.json', missing={})
    alive = is_locked(path / 'lock') or is_locked(path / 'launched')
    if status.get('state') == 'running' and not alive:  # or it has just ended, and says so now
        status = read_json(path / 'status.json', missing={})
    state, reason = status.get('state'), status.get('reason')
    stopped = read_json(path / 'stopped.json', missing={})
    if stopped and state != 'done' and not alive:
        state, reason = 'stopped', stopped.get('reason')
    elif not isinstance(state, str):
        state, reason = 'missing', f'no state in {path.name}/status.json'
    elif state == 'running' and not alive:
        state, reason = 'died', 'its process is gone'
    config = read_json(path / 'config.json', missing={})
    done = state == 'done'
    metrics = read_lines(path / 'metrics.jsonl', done, warnings)
    for number, r in metrics.items():
        fine = isinstance(r.get('step'), int) and isinstance(r.get('seed'), int)
        if not fine or not isinstance(r.get('split'), str):
            raise UserError(f'{path / "metrics.jsonl"}, line {number}: no step, seed and split')
    timing = read_lines(path / 'timing.jsonl', done, warnings)
    for number, r in timing.items():
        if not isinstance(r.get('step'), int) or not is_number(r.get('seconds')):
            raise UserError(f'{path / "timing.jsonl"}, line {number}: no step and seconds')
    seeds = config.get('seeds')
    if not isinstance(seeds, list):
        seeds = sorted({r['seed'] for r in metrics.values()})
    return Arm(
        label=label,
        state=state,
        reason=None if reason is None else str(reason),
        seeds=tuple(seeds),
        overrides=overrides,
        config=config,
        cost=read_json(path / 'cost.json', missing={}),
        status=status,
        metrics=list(metrics.values()),
        timing=list(timing.values()),
    )
