"""What the sweeps of states and of frames share: their arms, and the text of a system."""

import dataclasses
from collections.abc import Mapping, Sequence

from experiments.figures import roll_outs
from experiments.hamiltonian.mechanics import SYSTEMS
from launch.sweep import Overrides, product, zip_
from mi.report import rankings, runs, tables


def combine(arms: Sequence[str]) -> list[Overrides]:
    """Return overrides for every system, every arm 'FORM, FUSION' and two sets of seeds."""
    forms, fusions = zip(*(arm.split(', ') for arm in arms), strict=True)
    return product(
        product(**{'problem.system': list(SYSTEMS)}),
        zip_(**{'model.form': forms, 'model.fusion.name': fusions}),
        product(seeds=[(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]),
    )


def select_arms(sweep: runs.Sweep, system: str, arms: Sequence[str]) -> dict[str, runs.Arm]:
    """Return the arms 'FORM, FUSION' of a system whose final error is finite."""
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
    """Return the tables of scores and of rankings of a system, as Markdown.

    Args:
      sweep: what `arms` belong to.
      system: name of SYSTEMS.
      arms: by the name that the tables show.
      scores: metrics of the first table.
      reference: the arm that ratios of `error_long` refer to.
    """
    split, draws = sweep.split, sweep.seed_sets
    score_table = roll_outs.tabulate_scores(arms, scores, 'error_long', split, reference, draws)
    labeled_arms = [dataclasses.replace(arm, label=label) for label, arm in arms.items()]
    rank_table = rankings.to_markdown(dataclasses.replace(sweep, arms=labeled_arms))
    return f'**{tables.humanize(system)}**\n\n{score_table}\n\n{rank_table}'
