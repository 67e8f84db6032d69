"""Reader for run directories and sweeps; it needs neither the trainer nor its dependencies.

sweep.json    what is compared, and one folder per member, each a run directory;
              members with the same label form one arm: several seeds, or one task each
config.json   resolved config          status.json    state of the run, where it ran
lock          held while it runs       stopped.json   why a rule of the sweep ended it
metrics.jsonl one record per step,     timing.jsonl   seconds since the previous record
              seed and split           cost.json      parameters and FLOPs per token or step
"""

import dataclasses
import math
import pathlib

import numpy as np

from mi.config import UserError
from mi.report.records import (
    Record,
    average_timing,
    is_number,
    join_tasks,
    read_metrics,
    read_timing,
    require_field,
)
from mi.training.io import read_json
from mi.training.run_state import read_run_state


@dataclasses.dataclass(frozen=True)
class Arm:
    """One side of a comparison: a run directory with all its seeds.

    Attributes:
      label: name of the arm in tables and figures; unique in a sweep.
      state: phase of the run, see `mi.training.run_state`; 'waiting' if it has no run directory.
      reason: why it failed, died, was stopped or is waiting.
      seeds: the seeds that the config asks for, whether they have finished or not.
      overrides: the differences that sweep.json declares, {dotted key: value}.
      config, cost, status: the JSON files, empty where absent.
      metrics, timing: the records, in file order.
      tasks: the tasks of its runs if each run learned one; empty where each agent learns all tasks.
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
    def has_separate_runs(self) -> bool:
        """Whether separate runs learned its several tasks, rather than one agent all of them."""
        return len(self.tasks) > 1

    def metric_names(self, split: str) -> list[str]:
        """Return the names of all numbers in the records of a split, in order of appearance."""
        records = (record for record in self.metrics if record['split'] == split)
        names = {
            name: None for record in records for name, value in record.items() if is_number(value)
        }
        return [name for name in names if name not in ('step', 'seed')]

    def values_by_seed(self, metric: str, split: str) -> dict[int, dict[int, float]]:
        """Return {seed: {step: value}}, both sorted; the last record of a repeated step counts.

        Runs write null for values that are not finite. They are NaN here instead of absent;
        otherwise a seed that diverged would be scored by its last finite value.
        """
        values: dict[int, dict[int, float]] = {}
        for record in self.metrics:
            is_null = metric in record and record[metric] is None
            metric_value = math.nan if is_null else record.get(metric)
            if record['split'] == split and is_number(metric_value):
                values.setdefault(record['seed'], {})[record['step']] = float(metric_value)
        return {seed: dict(sorted(values[seed].items())) for seed in sorted(values)}

    def final_values(self, metric: str, split: str) -> dict[int, float]:
        """Return {seed: value} at the end of training; empty before the end.

        The test split is recorded once, at the end, so any test record is final. Other splits are
        recorded during training; their last record is final once the run is done.
        """
        if split != 'test' and self.state != 'done':
            return {}
        values_by_seed = self.values_by_seed(metric, split)
        return {seed: values[max(values)] for seed, values in values_by_seed.items()}

    def finite_values(self, metric: str, split: str) -> dict[int, float]:
        """Return `final_values`; {} if one is not finite, as a mean of the others is biased."""
        values = self.final_values(metric, split)
        return values if all(map(math.isfinite, values.values())) else {}

    def curve(self, metric: str, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Return steps [N] and values [seeds, N], at the steps that every recorded seed has."""
        seed_values = list(self.values_by_seed(metric, split).values())
        steps = sorted(set.intersection(*map(set, seed_values))) if seed_values else []
        values = np.array([[values[step] for step in steps] for values in seed_values], float)
        return np.array(steps, int), values.reshape(len(seed_values), len(steps))

    def scores(
        self, metric: str, split: str, step: int | None = None
    ) -> tuple[tuple[str, ...], np.ndarray]:
        """Return the tasks and [seeds, tasks] of the metrics `metric/TASK`.

        Seeds that are not finite in every task are left out.

        Args:
          metric: the prefix of the metrics.
          split: the split of the records.
          step: the step of the records; None for the final values.
        """
        # The columns are the metrics of single tasks; the rows are the seeds that have all of them.
        prefix = f'{metric}/'
        metric_names = [name for name in self.metric_names(split) if name.startswith(prefix)]
        columns = [
            self.final_values(metric_name, split)
            if step is None
            else {
                seed: values[step]
                for seed, values in self.values_by_seed(metric_name, split).items()
                if step in values
            }
            for metric_name in metric_names
        ]
        seeds = sorted(set.intersection(*map(set, columns))) if columns else []
        scores = np.array([[column[seed] for column in columns] for seed in seeds], float)
        scores = scores.reshape(len(seeds), len(metric_names))
        scores = scores[np.isfinite(scores).all(axis=1)]
        tasks = tuple(name.removeprefix(prefix) for name in metric_names)
        return tasks if len(scores) else (), scores

    def training_seconds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return steps [M] and the training seconds up to each of them [M].

        A resumed run repeats steps; the last record of a step counts.
        """
        step_seconds = {record['step']: float(record['seconds']) for record in self.timing}
        steps = sorted(step_seconds)
        return np.array(steps, int), np.cumsum([step_seconds[step] for step in steps])

    def throughput(self, unit: str) -> float | None:
        """Return the mean tokens or steps per second over all training, weighted by duration."""
        column = f'{unit}s_per_second'
        timed_records = {
            record['step']: record for record in self.timing if is_number(record.get(column))
        }
        seconds = math.fsum(record['seconds'] for record in timed_records.values())
        num_units = math.fsum(
            record['seconds'] * record[column] for record in timed_records.values()
        )
        return num_units / seconds if seconds > 0 else None

    def get_cost(self, quantity: str, component: str) -> int | None:
        """Return a count from cost.json.

        Args:
          quantity: 'parameters' or 'flops_per_UNIT'.
          component: 'model' or 'fusion'.
        """
        counts = self.cost.get(quantity)
        count = counts.get(component) if isinstance(counts, dict) else None
        return count if isinstance(count, int) else None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A comparison; a single run is a sweep of one arm without a baseline.

    Attributes:
      path: the sweep directory.
      title: the heading of the report.
      metric, split: the compared number, in the last record of that split.
      curves: the split of the learning curves.
      lower_is_better: the direction of the metric.
      baseline: the label of the arm that the others are compared with, if there is one.
      arms: the arms, in the order of sweep.json.
      notes: remarks of the sweep's author.
      command: the command that launched the sweep.
      warnings: messages on skipped content, one line each.
      seed_sets: the sets of two or more seeds with which every arm was trained, one run per set;
        empty unless there are several.
      problems: keys of overrides; arms that differ in one of them learn different problems and are
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
    seed_sets: tuple[tuple[int, ...], ...] = ()
    problems: tuple[str, ...] = ()

    def group_by_problem(self) -> dict[str, list[Arm]]:
        """Return the arms of each problem, in order; all under '' where there is only one."""
        groups: dict[str, list[Arm]] = {}
        for arm in self.arms:
            problem = ', '.join(
                str(arm.overrides[key]) for key in self.problems if key in arm.overrides
            )
            groups.setdefault(problem, []).append(arm)
        return groups

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks an arm must have learned to be compared, where each task has separate runs.

        These are the tasks of the baseline; without one, all tasks of the sweep.
        """
        baseline_tasks = [arm.tasks for arm in self.arms if arm.label == self.baseline]
        all_tasks = (task for arm in self.arms for task in arm.tasks)
        return baseline_tasks[0] if baseline_tasks else tuple(dict.fromkeys(all_tasks))

    def is_comparable(self, arm: Arm) -> bool:
        """Return whether an arm has the tasks of the sweep, over which means are comparable."""
        return set(arm.tasks) == set(self.tasks)

    def describe_excluded(self) -> str:
        """Return a note on the arms that a table leaves out: not done or not finite; '' if none."""
        unfinished = [f'{arm.label} ({arm.state})' for arm in self.arms if arm.state != 'done']
        diverged = [
            arm.label
            for arm in self.arms
            if arm.final_values(self.metric, self.split)
            and not arm.finite_values(self.metric, self.split)
        ]
        notes = [f'Left out, because not done: {"; ".join(unfinished)}.'] if unfinished else []
        if diverged:
            notes.append(f'Left out, because a seed is not finite: {"; ".join(diverged)}.')
        return ' '.join(notes)

    @property
    def unit(self) -> str:
        """The unit of speed and FLOPs: token, example, or environment step."""
        units = (
            unit
            for unit in ('step', 'example')
            if any(f'flops_per_{unit}' in arm.cost for arm in self.arms)
        )
        return next(units, 'token')


def read_sweep(workdir: pathlib.Path, flag: str = 'workdir') -> Sweep:
    """Read a sweep directory or a single run directory.

    Args:
      workdir: the directory.
      flag: the command-line flag that names it, for errors.

    Raises:
      UserError: if it is neither, or one of its files is malformed.
    """
    if not workdir.is_dir():
        raise UserError(
            f'--{flag}={workdir}: expected a sweep or run directory; it is not a directory'
        )
    if (workdir / 'sweep.json').exists():
        return _read_sweep_directory(workdir)
    if (workdir / 'config.json').exists():
        return _read_single_run(workdir)
    raise UserError(
        f'--{flag}={workdir}: expected a sweep (sweep.json) or a run (config.json); it has neither'
    )


def _read_sweep_directory(workdir: pathlib.Path) -> Sweep:
    sweep_file = workdir / 'sweep.json'
    spec = read_json(sweep_file)
    metric = require_field(spec, 'metric', str, sweep_file)

    # Read the members, grouped by label, and by task where members name one.
    warnings: list[str] = []
    runs: dict[str, list[Arm]] = {}  # {label: runs}
    task_runs: dict[str, dict[str, list[Arm]]] = {}  # {label: {task: runs}}
    for member in require_field(spec, 'members', list, sweep_file):
        run, task = _read_member(member, sweep_file, warnings)
        runs.setdefault(run.label, []).append(run)
        if task is not None:
            task_runs.setdefault(run.label, {}).setdefault(task, []).append(run)
    if not runs:
        raise UserError(f'{sweep_file}: members = []: expected one or more')

    # Merge the runs of each label into one arm; all arms list their tasks in the same order.
    tasks = dict.fromkeys(task for arm_runs in task_runs.values() for task in arm_runs)
    arms = []
    for label, arm_runs in runs.items():
        if label in task_runs:
            task_arms = {
                task: _merge_seeds(task_runs[label][task], sweep_file)
                for task in tasks
                if task in task_runs[label]
            }
            arms.append(_merge_tasks(task_arms, metric))
        else:
            arms.append(_merge_seeds(arm_runs, sweep_file))

    # Check the baseline, and the types of all fields.
    baseline, labels = spec.get('baseline'), list(runs)
    if baseline is not None and baseline not in labels:
        raise UserError(f'{sweep_file}: baseline = {baseline!r}: expected null or one of {labels}')
    return Sweep(
        path=workdir,
        title=spec.get('title') or require_field(spec, 'name', str, sweep_file),
        metric=metric,
        split=require_field(spec, 'split', str, sweep_file),
        curves=require_field({'curves': 'valid'} | spec, 'curves', str, sweep_file),
        lower_is_better=require_field(spec, 'lower_is_better', bool, sweep_file),
        baseline=baseline,
        arms=arms,
        notes=list(map(str, require_field({'notes': []} | spec, 'notes', list, sweep_file))),
        command=spec.get('command'),
        warnings=warnings,
        seed_sets=() if task_runs else _find_seed_sets(list(runs.values())),
        problems=tuple(
            map(str, require_field({'problems': []} | spec, 'problems', list, sweep_file))
        ),
    )


def _read_member(
    member: object, sweep_file: pathlib.Path, warnings: list[str]
) -> tuple[Arm, str | None]:
    """Return the run of a member of sweep.json, and its task if it names one."""
    if not isinstance(member, dict):
        raise UserError(
            f'{sweep_file}: members contains {member!r}: expected an object with a name'
        )
    member_name = require_field(member, 'name', str, sweep_file)
    overrides = require_field({'overrides': {}} | member, 'overrides', dict, sweep_file)
    label = require_field({'label': member_name} | member, 'label', str, sweep_file)
    run = _read_run(sweep_file.parent / member_name, label, overrides, warnings)
    return run, require_field(member, 'task', str, sweep_file) if 'task' in member else None


def _find_seed_sets(arms: list[list[Arm]]) -> tuple[tuple[int, ...], ...]:
    """Return the seed sets of the runs if all arms have the same ones, and several; else ()."""
    arm_sets = {tuple(sorted({run.seeds for run in arm_runs})) for arm_runs in arms}
    common_sets = arm_sets.pop()
    has_several = len(common_sets) > 1 and all(len(seeds) > 1 for seeds in common_sets)
    return common_sets if has_several and not arm_sets else ()


def _merge_seeds(runs: list[Arm], path: pathlib.Path) -> Arm:
    """Merge the runs of one arm, which have different seeds; their timings are averaged."""
    first = runs[0]
    if len(runs) == 1:
        return first
    seeds = [seed for run in runs for seed in run.seeds]
    if len(set(seeds)) < len(seeds):
        raise UserError(
            f'{path}: members of label {first.label!r} have seeds {seeds}: expected different '
            f'labels, or different seeds'
        )
    # An arm is done once all its runs are; until then it has the state of the first other run.
    status_run = next((run for run in runs if run.state != 'done'), first)
    return dataclasses.replace(
        first,
        state=status_run.state,
        reason=status_run.reason,
        seeds=tuple(seeds),
        status=status_run.status,
        metrics=[record for run in runs for record in run.metrics],
        timing=average_timing([run.timing for run in runs]),
    )


def _merge_tasks(arms: dict[str, Arm], metric: str) -> Arm:
    """Merge the runs of several tasks into one arm, whose metric is the mean over tasks.

    Each merged record holds the metric of every task, like the record of an agent that learns all
    tasks.
    """
    first = next(iter(arms.values()))
    if len(arms) == 1:
        return dataclasses.replace(first, tasks=tuple(arms))
    status_arm = next((arm for arm in arms.values() if arm.state != 'done'), first)
    return dataclasses.replace(
        first,
        state=status_arm.state,
        reason=status_arm.reason,
        seeds=tuple(sorted(set.intersection(*(set(arm.seeds) for arm in arms.values())))),
        status=status_arm.status,
        metrics=join_tasks({task: arm.metrics for task, arm in arms.items()}, metric),
        timing=average_timing([arm.timing for arm in arms.values()]),
        tasks=tuple(arms),
    )


def _read_single_run(workdir: pathlib.Path) -> Sweep:
    warnings: list[str] = []
    arm = _read_run(workdir, workdir.resolve().name, {}, warnings)
    # An agent records returns in the eval split and has no test text.
    is_agent = bool(arm.metric_names('eval'))
    metric_names = arm.metric_names('eval') or arm.metric_names('test') or arm.metric_names('valid')
    # Bits per byte are comparable across vocabularies. A run of one-hot targets has none, and is
    # shown by its first number.
    metric = 'bits_per_byte'
    if metric_names and metric not in metric_names:
        metric = metric_names[0]
    return Sweep(
        path=workdir,
        title=arm.label,
        metric='return' if is_agent else metric,
        split='eval' if is_agent else 'test',
        curves='eval' if is_agent else 'valid',
        lower_is_better=not is_agent,
        baseline=None,
        arms=[arm],
        notes=[],
        command=None,
        warnings=warnings,
    )


def _read_run(run_dir: pathlib.Path, label: str, overrides: Record, warnings: list[str]) -> Arm:
    if not run_dir.is_dir():
        return Arm(label, 'waiting', f'no folder {run_dir.name}', overrides=overrides)
    # The state is read before the records: a run that ends in between counts as running.
    run_state = read_run_state(run_dir)
    status = read_json(run_dir / 'status.json', missing={})
    is_done = run_state.phase == 'done'
    metrics = read_metrics(run_dir / 'metrics.jsonl', is_done, warnings)
    config = read_json(run_dir / 'config.json', missing={})
    seeds = sorted({record['seed'] for record in metrics})  # until a config lists them
    if 'seeds' in config:
        seeds = require_field(config, 'seeds', list, run_dir / 'config.json')
    return Arm(
        label=label,
        state=run_state.phase,
        reason=run_state.reason or None,
        seeds=tuple(seeds),
        overrides=overrides,
        config=config,
        cost=read_json(run_dir / 'cost.json', missing={}),
        status=status,
        metrics=metrics,
        timing=read_timing(run_dir / 'timing.jsonl', is_done, warnings),
    )
