"""Arms, which hold the records of their seeds, and sweeps, which compare arms."""

import dataclasses
import math
import pathlib

import numpy as np

from mi.registry import is_reference
from mi.report.records import Record, is_number


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm of a comparison: a run directory with all its seeds.

    Attributes:
      label: name of the arm in tables and figures, unique in a sweep.
      state: phase of the run, see `mi.training.run_state`, or 'waiting' without a run directory.
      reason: reason why the run failed, died, was stopped or is waiting.
      seeds: all seeds in the config, whether they have finished or not.
      overrides: config changes that sweep.json declares, {dotted key: value}.
      config, cost, status: contents of the JSON files, empty if a file is missing.
      metrics, timing: records in file order.
      tasks: tasks of the runs if each run learned one task, empty if each agent learns all tasks.
      environments: known versions, commit and device of each run at its last start, and 'data', the
        hash of its tokens.
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
        """Whether separate runs learned several tasks, instead of one agent that learned all."""
        return len(self.tasks) > 1

    def metric_names(self, split: str) -> list[str]:
        """Return the names of all numbers in the records of a split, in order of appearance."""
        records = (record for record in self.metrics if record['split'] == split)
        names = {
            name: None for record in records for name, value in record.items() if is_number(value)
        }
        return [name for name in names if name not in ('step', 'seed')]

    def values_by_seed(self, metric: str, split: str) -> dict[int, dict[int, float]]:
        """Return {seed: {step: value}} with sorted keys. The last record of a repeated step counts.

        Runs write null for non-finite values. These become NaN here, because a seed that diverged
        would otherwise be scored by its last finite value.
        """
        values: dict[int, dict[int, float]] = {}
        for record in self.metrics:
            is_null = metric in record and record[metric] is None
            metric_value = math.nan if is_null else record.get(metric)
            if record['split'] == split and is_number(metric_value):
                values.setdefault(record['seed'], {})[record['step']] = float(metric_value)
        return {seed: dict(sorted(values[seed].items())) for seed in sorted(values)}

    def final_values(self, metric: str, split: str) -> dict[int, float]:
        """Return {seed: value} at the end of training, or {} before the end.

        Any record of the test split is final, because the split is only recorded at the end. The
        last record of any other split is final once the run is done.
        """
        if split != 'test' and self.state != 'done':
            return {}
        values_by_seed = self.values_by_seed(metric, split)
        return {seed: values[max(values)] for seed, values in values_by_seed.items()}

    def finite_values(self, metric: str, split: str) -> dict[int, float]:
        """Return `final_values`, or {} if any is not finite, because the mean would be biased."""
        values = self.final_values(metric, split)
        return values if all(map(math.isfinite, values.values())) else {}

    def curve(self, metric: str, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps [N] that all recorded seeds share, and the values [seeds, N]."""
        seed_values = list(self.values_by_seed(metric, split).values())
        steps = sorted(set.intersection(*map(set, seed_values))) if seed_values else []
        values = np.array([[values[step] for step in steps] for values in seed_values], float)
        return np.array(steps, int), values.reshape(len(seed_values), len(steps))

    def scores(
        self, metric: str, split: str, step: int | None = None
    ) -> tuple[tuple[str, ...], np.ndarray]:
        """Return the tasks and the scores [seeds, tasks] of the metrics `metric/TASK`.

        Seeds without a finite score in every task are omitted.

        Args:
          metric: prefix of the metrics.
          split: split of the records.
          step: step of the records, or None for the final values.
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
        """Return steps [M], and the training seconds up to each step [M].

        A resumed run repeats steps, in which case the last record of a step counts.
        """
        step_seconds = {record['step']: float(record['seconds']) for record in self.timing}
        steps = sorted(step_seconds)
        return np.array(steps, int), np.cumsum([step_seconds[step] for step in steps])

    def throughput(self, unit: str) -> float | None:
        """Return the mean number of tokens or steps per second, weighted by duration."""
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
    """A comparison of arms. A single run is a sweep of one arm without a baseline.

    Attributes:
      path: sweep directory.
      title: heading of the report.
      metric, split: name of the compared metric, and the split in whose last record it is. The name
        may be 'package.module:function', a metric that the reader has added to the records.
      curves: split of the learning curves.
      lower_is_better: direction of the metric.
      baseline: label of the arm to compare the others with, or None if there is none.
      arms: the arms, in the order of sweep.json.
      notes: remarks by the author of the sweep.
      command: command that launched the sweep.
      warnings: messages about skipped content, one line each.
      seed_sets: sets of two or more seeds with which every arm was trained, one run per set, empty
        unless there are several sets.
      problems: keys of overrides. Arms that differ in one of them learn different problems and are
        not ranked together.
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

    def name_problem(self, arm: Arm) -> str:
        """Return the name of the problem that an arm learns, or '' if there is a single one."""
        return ', '.join(str(arm.overrides[key]) for key in self.problems if key in arm.overrides)

    def group_by_problem(self) -> dict[str, list[Arm]]:
        """Group the arms by the name of their problem, in order."""
        groups: dict[str, list[Arm]] = {}
        for arm in self.arms:
            groups.setdefault(self.name_problem(arm), []).append(arm)
        return groups

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that an arm must have learned to be compared, if each task has separate runs.

        These are the tasks of the baseline or, without a baseline, all tasks of the sweep.
        """
        baseline_tasks = [arm.tasks for arm in self.arms if arm.label == self.baseline]
        all_tasks = (task for arm in self.arms for task in arm.tasks)
        return baseline_tasks[0] if baseline_tasks else tuple(dict.fromkeys(all_tasks))

    def is_comparable(self, arm: Arm) -> bool:
        """Return whether an arm has all tasks of the sweep, so that its means are comparable."""
        return set(arm.tasks) == set(self.tasks)

    def describe_excluded(self) -> str:
        """Describe the arms that a table omits because they are not done or not finite."""
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
        """The metric in words, such as 'best return' for my.metrics:best_return."""
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
