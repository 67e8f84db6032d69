"""Asynchronous successive halving: members that are behind are stopped early.

At the steps r, r·η, r·η², … (the rungs) a member's value is compared with those that the others had
there. It goes on if it is among the best 1/η of those that have come so far, itself included, or
the best of all; else it saves and is stopped for good. Nobody waits for anybody, so that what is
decided depends on who comes first: it is written down in WORKDIR/asha.jsonl in that order, and a
launcher that is started again decides no rung twice.

Source: Li et al., *A System for Massively Parallel Hyperparameter Tuning* (MLSys 2020), in the
variant that stops members instead of promoting them.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Sequence

import ml_collections

from launch import metric_names, state
from mi.config import UserError
from mi.training.io import write_json


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A member that has come to a rung.

    Attributes:
      rung: its step.
      name: of the member.
      value: of the metric there, the mean over seeds.
    """

    rung: int
    name: str
    value: float


def rungs(first: int, factor: int, steps: int) -> list[int]:
    """The steps at which members are compared: all below the last one."""
    found = []
    while first < steps:
        found.append(first)
        first *= factor
    return found


def stops(before: Iterable[Arrival], new: Arrival, factor: int, lower_is_better: bool) -> str:
    """Why a member is stopped where it has come to; '' if it goes on.

    Args:
      before: who has come anywhere before it.
      new: the member.
      factor: η.
      lower_is_better: of the metric.
    """
    sign = 1 if lower_is_better else -1

    def loss(arrival: Arrival) -> float:  # NaN compares with nothing and is the worst
        return math.inf if math.isnan(arrival.value) else sign * arrival.value

    values = [loss(a) for a in before if a.rung == new.rung]
    better = sum(value < loss(new) for value in values)
    stay = max(1, (len(values) + 1) // factor)
    if better < stay:
        return ''
    place = f'place {better + 1} of {len(values) + 1}, and {stay} stay'
    return f'{new.value:.4g} at step {new.rung} is {place}'


def refuse_idle(
    configs: Iterable[ml_collections.ConfigDict], first: int, metric: str, split: str
) -> None:
    """Refuses a rule that would compare no member at all.

    Args:
      configs: of the members.
      first: the first rung.
      metric, split: that are compared.

    Raises:
      UserError: if none has recorded the metric from the first rung on before its last step.
    """
    finder, seen = metric_names.Finder(metric), []
    for config in configs:
        try:
            steps, every = metric_names.steps(config), finder.splits(config)[split].every
        except UserError:  # a config that cannot work: the member itself will say why
            continue
        if every and -(-first // every) * every < steps:
            return
        seen.append((steps, every))
    if not seen:
        return
    steps, every = seen[0]
    often = f'every {every} steps' if every else 'at the last step alone'
    raise UserError(
        f'--asha={first}: expected a step at which members can be compared; they record {metric} '
        f'of the {split} split {often}, and have {steps}. Try a smaller step, or a config that '
        f'records it more often'
    )


class Asha:
    """The rule, applied to the members of a sweep by an engine that calls it now and then.

    Args:
      workdir: of the sweep.
      first: the first rung.
      factor: η.
    """

    def __init__(self, workdir: pathlib.Path, first: int, factor: int):
        sweep = state.described(workdir, {'metric': str, 'curves': str, 'lower_is_better': bool})
        self._workdir, self._first, self._factor = workdir, first, factor
        self._metric, self._split = sweep['metric'], sweep['curves']
        self._lower_is_better = sweep['lower_is_better']
        self._file = workdir / 'asha.jsonl'
        needs: state.Needs = {'rung': int, 'name': str, 'value': state.NUMBER}
        self._arrivals = [
            Arrival(record['rung'], record['name'], record['value'])
            for record in state.records(self._file, needs, most=2**62)
        ]
        for i, arrival in enumerate(self._arrivals):  # one that was decided and not carried out
            self._stop(arrival, self._arrivals[:i])

        self._curves: dict[pathlib.Path, state.Curve] = {}
        self._steps: dict[pathlib.Path, int] = {}
        self._compared: set[pathlib.Path] = set()  # at every rung that there is, or stopped

    def __call__(self, paths: Sequence[pathlib.Path]) -> None:
        """Compares members that have come to a rung since, and marks those that are to stop."""
        known = {(a.rung, a.name) for a in self._arrivals}
        for path in paths:
            if path in self._compared:
                continue
            if not (steps := self._steps.get(path, 0)):
                cost = state.written(path / 'cost.json')
                steps = self._steps[path] = state.count(cost, 'steps')
            curve = self._curves.setdefault(path, state.Curve(path, self._metric, self._split))
            values = curve.read()
            ahead = [
                rung
                for rung in rungs(self._first, self._factor, steps)
                if (rung, path.name) not in known
            ]
            for rung in list(ahead):
                there = [step for step in values if step >= rung]
                if not there or (path / state.STOPPED).exists():
                    continue
                arrival = Arrival(rung, path.name, values[min(there)])
                state.append(self._file, dataclasses.asdict(arrival))
                self._stop(arrival, self._arrivals)
                self._arrivals.append(arrival)
                ahead.remove(rung)
            if (steps and not ahead) or (path / state.STOPPED).exists():
                self._compared.add(path)
                self._curves.pop(path, None)

    def summary(self) -> str:
        """What was decided, in a line: that nobody was compared is to be seen."""
        names = {arrival.name for arrival in self._arrivals}
        if not names:
            return (
                f'asha: no member was compared, as none recorded {self._metric} of the '
                f'{self._split} split from step {self._first} on'
            )
        stopped = sum((self._workdir / name / state.STOPPED).exists() for name in names)
        return f'asha: {len(names)} members were compared, {stopped} of them stopped'

    def _stop(self, arrival: Arrival, before: Sequence[Arrival]) -> None:
        reason = stops(before, arrival, self._factor, self._lower_is_better)
        if reason:
            mark = self._workdir / arrival.name / state.STOPPED
            write_json(mark, {'reason': f'asha: {reason}', 'step': arrival.rung})
