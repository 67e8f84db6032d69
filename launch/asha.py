"""Asynchronous successive halving, which stops members early if others are better.

At steps r, r·η, r·η², … (the rungs), the metric of a member is compared with the values of all
members that have reached the same rung. The member continues if it is the best one or among the
best 1/η. Otherwise it saves and is stopped for good. No member waits for another, so decisions
depend on the order of arrival. WORKDIR/asha.jsonl records them in this order, so that a restarted
launcher does not repeat a decision.

Source: Li et al., *A System for Massively Parallel Hyperparameter Tuning* (MLSys 2020), in the
variant that stops members instead of promoting them.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Sequence

import ml_collections

from launch import metric_names, records, state
from mi.config import UserError
from mi.training.io import write_json
from mi.training.run_state import STOP_MARK, read_object


@dataclasses.dataclass(frozen=True)
class Arrival:
    """The arrival of a member at a rung.

    Attributes:
      rung: step of the rung.
      name: name of the member.
      value: metric of the member at this step, averaged over seeds.
    """

    rung: int
    name: str
    value: float


def list_rungs(first: int, factor: int, num_steps: int) -> list[int]:
    """Return the steps at which members are compared, all before the last step."""
    rungs = []
    while first < num_steps:
        rungs.append(first)
        first *= factor
    return rungs


def find_stop_reason(
    earlier: Iterable[Arrival], arrival: Arrival, factor: int, lower_is_better: bool
) -> str:
    """Return why a member is stopped at its rung, or '' if it continues.

    Args:
      earlier: earlier arrivals of all members, at any rung.
      arrival: the arrival of the member.
      factor: η.
      lower_is_better: whether a lower metric is better.
    """
    sign = 1 if lower_is_better else -1

    def loss(arrival: Arrival) -> float:  # NaN is the worst; it does not compare
        return math.inf if math.isnan(arrival.value) else sign * arrival.value

    losses = [loss(rival) for rival in earlier if rival.rung == arrival.rung]
    num_better = sum(rival_loss < loss(arrival) for rival_loss in losses)
    num_continuing = max(1, (len(losses) + 1) // factor)
    if num_better < num_continuing:
        return ''
    place = f'place {num_better + 1} of {len(losses) + 1}, and {num_continuing} stay'
    return f'{arrival.value:.4g} at step {arrival.rung} is {place}'


def refuse_idle(
    configs: Iterable[ml_collections.ConfigDict], first: int, metric: str, split: str
) -> None:
    """Check that the rule would compare at least one member.

    Args:
      configs: configs of the members.
      first: the first rung.
      metric: metric to compare.
      split: split whose records are compared.

    Raises:
      UserError: if no member records the metric between the first rung and its last step.
    """
    # Find how often the members record the metric; one that can be compared is enough.
    finder, schedules = metric_names.Finder(metric), []
    for config in configs:
        try:
            num_steps = metric_names.count_steps(config)
            interval = finder.find(config)[split].interval
        except UserError:  # an invalid config: the member itself reports that
            continue
        if interval and -(-first // interval) * interval < num_steps:
            return
        schedules.append((num_steps, interval))

    # Name the schedule of the first member.
    if not schedules:
        return
    num_steps, interval = schedules[0]
    frequency = f'every {interval} steps' if interval else 'only at the last step'
    raise UserError(
        f'--asha={first}: expected a step at which members can be compared. They record {metric} '
        f'of the {split} split {frequency}, and have {num_steps} steps. Try a smaller step, or a '
        f'config that records the metric more often'
    )


class Asha:
    """The rule of successive halving, which an engine calls repeatedly on the members of a sweep.

    Args:
      workdir: directory of the sweep.
      first: the first rung.
      factor: η.
    """

    def __init__(self, workdir: pathlib.Path, first: int, factor: int):
        # Read what is compared.
        fields: records.Fields = {'metric': str, 'curves': str, 'lower_is_better': bool}
        sweep = state.read_sweep_file(workdir, fields)
        self._workdir, self._first, self._factor = workdir, first, factor
        self._metric, self._split = sweep['metric'], sweep['curves']
        self._lower_is_better = sweep['lower_is_better']

        # Read earlier arrivals, and carry out decisions that a killed launcher has only recorded.
        self._file = workdir / 'asha.jsonl'
        fields = {'rung': int, 'name': str, 'value': records.NUMBER}
        self._arrivals = [
            Arrival(record['rung'], record['name'], record['value'])
            for record in records.read_records(self._file, fields, tail=records.WHOLE_FILE)
        ]
        for place, arrival in enumerate(self._arrivals):
            self._mark_if_behind(arrival, self._arrivals[:place])

        self._curves: dict[pathlib.Path, records.CurveReader] = {}
        self._num_steps: dict[pathlib.Path, int] = {}
        self._finished: set[pathlib.Path] = set()  # compared at every rung, or stopped

    def __call__(self, run_dirs: Sequence[pathlib.Path]) -> None:
        """Compare the members that have reached a rung, and mark those that must stop."""
        compared = {(arrival.rung, arrival.name) for arrival in self._arrivals}
        for run_dir in run_dirs:
            if run_dir in self._finished:
                continue
            num_steps = self._read_num_steps(run_dir)
            curve = self._read_curve(run_dir)
            remaining_rungs = [
                rung
                for rung in list_rungs(self._first, self._factor, num_steps)
                if (rung, run_dir.name) not in compared
            ]

            # Decide about each rung that the curve has reached.
            for rung in list(remaining_rungs):
                reached_steps = [step for step in curve if step >= rung]
                if not reached_steps or (run_dir / STOP_MARK).exists():
                    continue
                arrival = Arrival(rung, run_dir.name, curve[min(reached_steps)])
                records.append_record(self._file, dataclasses.asdict(arrival))
                self._mark_if_behind(arrival, self._arrivals)
                self._arrivals.append(arrival)
                remaining_rungs.remove(rung)

            # Forget a member that has nothing left to decide.
            if (num_steps and not remaining_rungs) or (run_dir / STOP_MARK).exists():
                self._finished.add(run_dir)
                self._curves.pop(run_dir, None)

    def summary(self) -> str:
        """Summarize the decisions in one line, even if no member was compared."""
        names = {arrival.name for arrival in self._arrivals}
        if not names:
            return (
                f'asha: no member was compared, because none recorded {self._metric} of the '
                f'{self._split} split from step {self._first} on'
            )
        num_stopped = sum((self._workdir / name / STOP_MARK).exists() for name in names)
        return f'asha: {len(names)} members were compared, {num_stopped} of them stopped'

    def _read_num_steps(self, run_dir: pathlib.Path) -> int:
        """Return the number of steps in a run, or 0 while it is unknown."""
        if not self._num_steps.get(run_dir):
            cost = read_object(run_dir / 'cost.json')
            self._num_steps[run_dir] = records.get_int(cost, 'steps')
        return self._num_steps[run_dir]

    def _read_curve(self, run_dir: pathlib.Path) -> dict[int, float]:
        if run_dir not in self._curves:
            self._curves[run_dir] = records.CurveReader(run_dir, self._metric, self._split)
        return self._curves[run_dir].read()

    def _mark_if_behind(self, arrival: Arrival, earlier: Sequence[Arrival]) -> None:
        reason = find_stop_reason(earlier, arrival, self._factor, self._lower_is_better)
        run_dir = self._workdir / arrival.name
        is_over = read_object(run_dir / 'status.json').get('state') == 'done'
        if reason and run_dir.is_dir() and not is_over:
            write_json(run_dir / STOP_MARK, {'reason': f'asha: {reason}', 'step': arrival.rung})
