"""The sides of a comparison: an arm with the records of its seeds, and a sweep of arms."""

import dataclasses
import math
import pathlib

import numpy as np

from mi.registry import is_reference
from mi.report.records import Record, is_number


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
      environments: of each run, versions, commit and device at its last start, and 'data', the hash
        of its tokens; as far as they are known.
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
    environments: tuple[Record, ...] = ()

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
      metric, split: the compared number, in the last record of that split. It may be
        'package.module:function', which reading a sweep has added to its records.
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
    def metric_title(self) -> str:
        """The metric in words: 'bits per byte', and 'best return' for my.metrics:best_return."""
        name = self.metric.rpartition(':')[2] if is_reference(self.metric) else self.metric
        return name.replace('_', ' ')

    @property
    def unit(self) -> str:
        """The unit of speed and FLOPs: token, example, or environment step."""
        units = (
            unit
            for unit in ('step', 'example')
            if any(f'flops_per_{unit}' in arm.cost for arm in self.arms)
        )
        return next(units, 'token')
