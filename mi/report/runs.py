"""A reader for run directories and sweeps, which does not depend on the trainers.

sweep.json    the comparison, and its members, each with its own run directory;
              members with the same label form one arm: several seeds, or one task each
config.json   resolved config          status.json    state of the run, where it ran
lock          held while it runs       stopped.json   why a rule of the sweep stopped it
metrics.jsonl one record per step,     timing.jsonl   seconds since the previous record
              seed and split           cost.json      parameters and FLOPs per token or step
versions.json software and device      data.json      hash of the tokens
"""

import dataclasses
import pathlib

from mi.config import UserError
from mi.report import provenance
from mi.report.arms import Arm as Arm
from mi.report.arms import Sweep as Sweep
from mi.report.records import (
    Record,
    average_timing,
    join_tasks,
    read_metrics,
    read_timing,
    require_field,
)
from mi.training.io import read_json
from mi.training.run_metric import MetricAppender
from mi.training.run_state import read_run_state


def read_sweep(workdir: pathlib.Path, flag: str = 'workdir') -> Sweep:
    """Read a sweep directory or a single run directory.

    Args:
      workdir: the directory.
      flag: name of the command-line flag for the directory, for error messages.

    Raises:
      UserError: if `workdir` is neither a sweep nor a run, if one of its files is malformed, or if
        a user-defined metric cannot be imported or computed.
    """
    if not workdir.is_dir():
        raise UserError(
            f'--{flag}={workdir}: expected a sweep or run directory, but it is not a directory'
        )
    if (workdir / 'sweep.json').exists():
        return _read_sweep_directory(workdir)
    if (workdir / 'config.json').exists():
        return _read_single_run(workdir)
    raise UserError(
        f'--{flag}={workdir}: expected a sweep (sweep.json) or a run (config.json), but found '
        f'neither'
    )


def _read_sweep_directory(workdir: pathlib.Path) -> Sweep:
    sweep_file = workdir / 'sweep.json'
    spec = read_json(sweep_file)
    metric = require_field(spec, 'metric', str, sweep_file)
    split = require_field(spec, 'split', str, sweep_file)
    curves = require_field({'curves': 'valid'} | spec, 'curves', str, sweep_file)

    # Read the members, grouped by label, and by task where members name one.
    warnings: list[str] = []
    runs: dict[str, list[Arm]] = {}  # {label: runs}
    task_runs: dict[str, dict[str, list[Arm]]] = {}  # {label: {task: runs}}
    for member in require_field(spec, 'members', list, sweep_file):
        run, task = _read_member(member, sweep_file, warnings)
        records = MetricAppender(metric, {split, curves}).append(run.metrics)
        run = dataclasses.replace(run, metrics=records)
        runs.setdefault(run.label, []).append(run)
        if task is not None:
            task_runs.setdefault(run.label, {}).setdefault(task, []).append(run)
    if not runs:
        raise UserError(f'{sweep_file}: members = []: expected at least one member')

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
        split=split,
        curves=curves,
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
    """Read the run of a member of sweep.json, and return it with its task, or None."""
    if not isinstance(member, dict):
        raise UserError(
            f'{sweep_file}: members: expected objects with a name, but found {member!r}'
        )
    member_name = require_field(member, 'name', str, sweep_file)
    overrides = require_field({'overrides': {}} | member, 'overrides', dict, sweep_file)
    label = require_field({'label': member_name} | member, 'label', str, sweep_file)
    run = _read_run(sweep_file.parent / member_name, label, overrides, warnings)
    return run, require_field(member, 'task', str, sweep_file) if 'task' in member else None


def _find_seed_sets(arms: list[list[Arm]]) -> tuple[tuple[int, ...], ...]:
    """Return the seed sets of the runs if all arms share the same several sets, or else ()."""
    arm_sets = {tuple(sorted({run.seeds for run in arm_runs})) for arm_runs in arms}
    common_sets = arm_sets.pop()
    has_several = len(common_sets) > 1 and all(len(seeds) > 1 for seeds in common_sets)
    return common_sets if has_several and not arm_sets else ()


def _merge_seeds(runs: list[Arm], path: pathlib.Path) -> Arm:
    """Merge the runs of one arm, which have different seeds.

    A run that has not started has neither timings nor costs; those of the others count.
    """
    if len(runs) == 1:
        return runs[0]
    first = next((run for run in runs if run.cost), runs[0])
    seeds = [seed for run in runs for seed in run.seeds]
    if len(set(seeds)) < len(seeds):
        raise UserError(
            f'{path}: expected members with different labels or different seeds, but the members '
            f'with the label {first.label!r} have the seeds {seeds}'
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
        timing=average_timing([run.timing for run in runs if run.timing]),
        environments=tuple(environment for run in runs for environment in run.environments),
    )


def _merge_tasks(arms: dict[str, Arm], metric: str) -> Arm:
    """Merge the runs of several tasks into one arm, whose metric is the mean over tasks.

    Each merged record has the metric of every task, like a record of an agent that learns all
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
        environments=tuple(record for arm in arms.values() for record in arm.environments),
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
        environments=provenance.read_environments(run_dir),
    )
