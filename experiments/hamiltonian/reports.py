"""Arms and tables that the sweeps on states and on frames share."""

import dataclasses
from collections.abc import Mapping, Sequence

from experiments.figures import roll_outs
from experiments.hamiltonian.mechanics import SYSTEMS
from launch.sweep import Overrides, product, zip_
from mi.report import rankings, runs, tables


def combine(arms: Sequence[str]) -> list[Overrides]:
    """Return the overrides of each member: all systems, arms 'FORM, FUSION' and sets of seeds."""
    forms, fusions = zip(*(arm.split(', ') for arm in arms), strict=True)
    return product(
        product(**{'problem.system': list(SYSTEMS)}),
        zip_(**{'model.form': forms, 'model.fusion.name': fusions}),
        product(seeds=[(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]),
    )


def select_arms(sweep: runs.Sweep, system: str, arms: Sequence[str]) -> dict[str, runs.Arm]:
    """Select the arms 'FORM, FUSION' of a system that have a finite final error."""
    finished = {
        arm.label: arm for arm in sweep.arms if arm.finite_values(sweep.metric, sweep.split)
    }
    labels = {arm: f'{system}, {arm}' for arm in arms}
    return {arm: finished[label] for arm, label in labels.items() if label in finished}


def describe(
    sweep: runs.Sweep,
    system: str,
    arms: Mapping[str, runs.Arm],
    scores: Sequence[str],
    reference: str,
) -> str:
    """Format the tables of scores and rankings for a system, as Markdown.

    Args:
      sweep: sweep to which the arms belong.
      system: a name in SYSTEMS.
      arms: arms by the names that the tables show.
      scores: metrics in the table of scores.
      reference: name of the arm relative to which ratios of `error_long` are computed.
    """
    split, draws = sweep.split, sweep.seed_sets
    score_table = roll_outs.tabulate_scores(arms, scores, 'error_long', split, reference, draws)
    labeled_arms = [dataclasses.replace(arm, label=label) for label, arm in arms.items()]
    rank_table = rankings.to_markdown(dataclasses.replace(sweep, arms=labeled_arms))
    return f'**{tables.humanize(system)}**\n\n{score_table}\n\n{rank_table}'
