"""Sweep that tunes the learning rate and the entropy cost for experiments/rl_multitask.py.

The values in configs/rl.py were tuned by hand for the arms mi and none, which favors these arms. In
this sweep, every arm has the same five points: the values of configs/rl.py, and each of the two
halved and doubled. They are trained for 2.5 of the comparison's 6 million steps, on two seeds that
the comparison does not use. For each arm, the report chooses the point with the best mean
success in the last evaluation.

    python -m launch.local --sweep=experiments/rl_tuning.py --workdir=runs/rl_tuning --parallel=2
    MI_RL_TUNING=runs/rl_tuning/report/rl_tuning.json python -m launch.local \
        --sweep=experiments/rl_multitask.py --workdir=runs/rl_tuned --parallel=2

The budget of each arm is 5 points × 2 seeds × 2.5 million steps, or 25 million steps. The
comparison itself has 30 million steps for each arm.

The report also has rl_tuning.json, which the second command reads, and rl_tuning.md, with the mean
success at every point.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

from experiments.rl_multitask import ARMS, TUNED_KEYS
from launch.sweep import Overrides
from mi.report import runs, tables

CONFIG = 'configs/rl.py'
TITLE = 'Thirty tasks of XLand: learning rate and entropy cost of each arm'
METRIC = 'success'
SPLIT = 'eval'
CURVES = 'eval'
LOWER_IS_BETTER = False
BASELINE = None
PROBLEMS = ('model.fusion.name',)
NOTES = [
    'A label is the arm, the learning rate and the entropy cost.',
    'Two seeds and 2.5 of the 6 million steps of the comparison: enough to choose a point for an '
    'arm, and not to rank the arms.',
]
SEEDS = (10, 11)
STEPS = 2_500_000


class Point(NamedTuple):
    """A point of the search, with the values of `TUNED_KEYS`."""

    learning_rate: float
    entropy_cost: float


CENTER = Point(1e-3, 0.01)
POINTS = [
    CENTER,
    CENTER._replace(learning_rate=5e-4),
    CENTER._replace(learning_rate=2e-3),
    CENTER._replace(entropy_cost=0.005),
    CENTER._replace(entropy_cost=0.02),
]


def sweep() -> list[Overrides]:
    common = {'train.steps': STEPS, 'seeds': SEEDS}
    return [
        {'label': name_member(arm_label, point)} | arm | _to_overrides(point) | common
        for arm_label, arm in ARMS.items()
        for point in POINTS
    ]


def name_member(arm_label: str, point: Point) -> str:
    """Return the label for an arm of `rl_multitask` at a point."""
    return f'{arm_label}, {point.learning_rate:g}, {point.entropy_cost:g}'


def report(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Choose a point for each arm, write the choices as JSON, and tabulate all points."""
    arms = {arm.label: arm for arm in runs.read_sweep(workdir).arms}
    scores = {
        arm_label: score_points({
            point: arms[name_member(arm_label, point)]
            for point in POINTS
            if name_member(arm_label, point) in arms
        })
        for arm_label in ARMS
    }  # fmt: skip
    choices = {arm_label: choose_point(points) for arm_label, points in scores.items()}
    chosen = {arm_label: point for arm_label, point in choices.items() if point is not None}

    # The file for the comparison.
    steps = {arm.config['train']['steps'] for arm in arms.values() if 'train' in arm.config}
    tuning = {
        'metric': METRIC,
        'seeds': sorted({seed for arm in arms.values() for seed in arm.seeds}),
        'steps': sorted(steps),
        'points': [_to_overrides(point) for point in POINTS],
        'chosen': {
            arm_label: _to_overrides(point) | {METRIC: scores[arm_label][point]}
            for arm_label, point in chosen.items()
        },
    }
    (out / 'rl_tuning.json').write_text(json.dumps(tuning, indent=1) + '\n', encoding='utf-8')
    (out / 'rl_tuning.md').write_text(_tabulate(scores, choices), encoding='utf-8')


def score_points(arms: Mapping[Point, runs.Arm]) -> dict[Point, float]:
    """Compute the mean success over seeds at each finished point, or −∞ if a seed diverged."""
    scores = {}
    for point, arm in arms.items():
        has_diverged = arm.state == 'failed' and 'not finite' in (arm.reason or '')
        if has_diverged:  # mi.training.logger ended it
            scores[point] = -math.inf
        elif by_seed := arm.final_values(METRIC, SPLIT):
            is_finite = all(map(math.isfinite, by_seed.values()))
            scores[point] = math.fsum(by_seed.values()) / len(by_seed) if is_finite else -math.inf
    return scores


def choose_point(scores: Mapping[Point, float]) -> Point | None:
    """Return the first point with the best score, or None until all points are done."""
    if set(scores) != set(POINTS) or max(scores.values()) == -math.inf:
        return None
    return max(POINTS, key=scores.__getitem__)


def _to_overrides(point: Point) -> Overrides:
    return dict(zip(TUNED_KEYS, point, strict=True))


def _tabulate(
    scores: Mapping[str, Mapping[Point, float]], choices: Mapping[str, Point | None]
) -> str:
    """Tabulate the scores by arm, and list the choices away from the center."""
    header = ['arm', *(f'{point.learning_rate:g}, {point.entropy_cost:g}' for point in POINTS)]
    table_rows = []
    for arm_label, points in scores.items():
        cells = [
            tables.NONE if point not in points else _format_score(points[point]) for point in POINTS
        ]
        chosen = choices[arm_label]
        if chosen is not None:
            cells[POINTS.index(chosen)] += ' ←'
        table_rows.append([arm_label, *cells])
    off_center = [
        arm_label for arm_label, point in choices.items() if point is not None and point != CENTER
    ]
    return (
        f'Mean success of the last evaluation by learning rate and entropy cost; ← is chosen.\n\n'
        f'{tables.format_markdown(header, table_rows)}\n\n'
        f'Chosen away from the center, beyond which a better value may be: '
        f'{"; ".join(off_center) or "none"}.\n'
    )


def _format_score(score: float) -> str:
    return f'{score:.3f}' if math.isfinite(score) else 'diverged'
