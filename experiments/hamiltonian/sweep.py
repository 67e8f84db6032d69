"""Sweep that compares MI and concatenation in energies learned from states.

The systems are a mass and spring, a pendulum, and two bodies. The arms are energies H(q, p) that
fuse q and p, an MI of the state with itself, a separable T(p) + V(q), which is the true form, and
fields without an energy, with about 4,500 parameters each. They are learned from velocities at the
states of 100 trajectories, and predict motions that are ten times as long. Every arm is trained
with two sets of five seeds.

    python -m launch.local --sweep=experiments/hamiltonian/sweep.py --workdir=runs/states \
        --parallel=2

The report also has hamiltonian.png and .pdf, with phase portraits, errors and energy drift over
time, and hamiltonian.md, with all scores, their intervals, and ranks in each set of seeds.
experiments/hamiltonian/sweep_frames.py learns from frames instead.

Source: Toth et al. (ICLR 2020) and Greydanus et al. (NeurIPS 2019). The comparison of fusions, and
all constants except those of the systems, are ours.
"""

import pathlib

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import roll_outs
from experiments.figures.roll_outs import Style
from experiments.hamiltonian import reports
from experiments.hamiltonian.mechanics import SYSTEMS
from launch.sweep import Overrides
from mi.report import (
    plots,
    runs,
    statistics,
    tables,
)

CONFIG = 'experiments/hamiltonian/config.py:phase'
TITLE = 'Laws of motion from states: how long predictions hold'
METRIC = 'valid'
SPLIT = CURVES = 'eval'
LOWER_IS_BETTER = False
BASELINE = None
PROBLEMS = ('problem.system',)
NOTES = [
    'Valid: the time for which the squared distance to the true state is below 0.1 of the variance '
    'of states, as a share of 150 observations, ten times as many as a trajectory in training has; '
    'mean over 50 fresh trajectories. error_long: that distance, over all of them.',
    'A label is the system, the form of the law, and the fusion in it. All laws have about 4,500 '
    'parameters.',
    'An error or a drift that is above 100 or not a number counts as 100, so that a mean over '
    'trajectories may be that of the few that run away.',
]

ARMS = {
    'field, concat': Style('field, concat', plots.GREY, plots.DASHES[0]),
    'field, mi': Style('field, MI', plots.GREY, plots.DASHES[1]),
    'joint, concat': Style('energy, concat', plots.PALETTE[0], plots.DASHES[0]),
    'joint, mi': Style('energy, MI', plots.PALETTE[1], plots.DASHES[0]),
    'joint, mi_low_rank': Style('energy, low-rank MI', plots.PALETTE[4], plots.DASHES[1]),
    'joint, film': Style('energy, FiLM', plots.PALETTE[3], plots.DASHES[1]),
    'square, mi': Style('energy, MI of the state', plots.PALETTE[2], plots.DASHES[0]),
    'separable, none': Style('energy, T(p) + V(q)', plots.PALETTE[5], plots.DASHES[0]),
}
PORTRAIT_ARMS = ('field, concat', 'joint, concat', 'joint, mi')  # in the portraits
REFERENCE = ARMS['joint, concat'].label
SCORES = ('derivative', 'error', 'error_long', 'drift', 'drift_learnt')


def sweep() -> list[Overrides]:
    return reports.combine(list(ARMS))


def report(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Draw the phase portraits and curves of each system, and write tables of the scores."""
    sweep = runs.read_sweep(workdir)
    sections = []
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 0.6 + 1.5 * len(SYSTEMS)), layout='constrained')
        panel_grid = figure.subplots(len(SYSTEMS), 3)
        # A row for each system: the portrait, then error and drift over time.
        for (portrait_axes, *curve_axes), system in zip(panel_grid, SYSTEMS, strict=True):
            arms = reports.select_arms(sweep, system, list(ARMS))
            artifacts = {arm: roll_outs.load_artifacts(workdir, f'{system}, {arm}') for arm in arms}
            _draw_portrait(portrait_axes, system, artifacts)
            for axes, score in zip(curve_axes, ('error', 'drift'), strict=True):
                for arm, arrays in artifacts.items():
                    mean_scores = arrays[score].mean(-1)  # over trajectories
                    time = SYSTEMS[system].time * np.arange(mean_scores.shape[1])
                    roll_outs.draw_curve(axes, time, mean_scores, ARMS[arm])
            labeled_arms = {ARMS[arm_name].label: arm for arm_name, arm in arms.items()}
            sections.append(reports.describe(sweep, system, labeled_arms, SCORES, REFERENCE))
        # Labels that the panels share.
        for axes, panel_title in zip(panel_grid[0], ('', 'error', 'drift of energy'), strict=True):
            axes.set_title(panel_title, fontsize=8)
        for axes in panel_grid[-1][1:]:
            axes.set_xlabel('time')
        roll_outs.draw_legend(figure, columns=3)
        plots.save(figure, out, 'hamiltonian')
    sections += [
        f'{note}\n'
        for note in (roll_outs.NOTE, statistics.CAUTION, sweep.describe_excluded())
        if note
    ]
    (out / 'hamiltonian.md').write_text('\n'.join(sections), encoding='utf-8')


def _draw_portrait(axes: Axes, system: str, artifacts: dict[str, dict[str, np.ndarray]]) -> None:
    """Draw two trajectories of the first seed, as q and p, or as the orbit of the first body."""
    is_scalar = SYSTEMS[system].degrees == 1
    axes.set(
        xlabel='q' if is_scalar else 'x',
        ylabel=f'{tables.humanize(system)}\n{"p" if is_scalar else "y"}',
    )
    drawn_arms = [arm for arm in PORTRAIT_ARMS if arm in artifacts]
    for arm in drawn_arms:
        predicted_states = artifacts[arm]['predicted'][0, :, :2, :2]
        for trajectory in predicted_states.swapaxes(0, 1):
            axes.plot(*trajectory.T, color=ARMS[arm].color, lw=0.7, alpha=0.8)

    # The true motion is the same for all arms, and sets the limits.
    for arm in drawn_arms[:1]:
        true_states = artifacts[arm]['true'][0, :, :2, :2]
        for trajectory in true_states.swapaxes(0, 1):
            axes.plot(*trajectory.T, color=plots.INK, lw=0.6, ls=(0, (1, 2)), label='true')
        x_limit, y_limit = 1.4 * np.abs(true_states).max((0, 1))
        axes.set(xlim=(-x_limit, x_limit), ylim=(-y_limit, y_limit))
