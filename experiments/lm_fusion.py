"""Sweep that compares fusions in language models, for two cores and two sites.

The models are a byte-level LSTM and Transformer with a recurrent context, which is fused at the
input embedding or at the output embedding. Arms of the same core and site only differ in the
fusion. The size of the core is adjusted so that all of them have as many parameters as the concat
arm, within 3 %. Every arm is trained with three seeds.

    python -m launch.local --sweep=experiments/lm_fusion.py --workdir=runs/lm_fusion --parallel=2
    MI_ENWIK8=enwik8.gz python -m launch.local --sweep=experiments/lm_fusion.py …

By default, the text is one million bytes of Austen, for two CPU cores. If MI_ENWIK8 is set to the
path of enwik8, the sweep is for a GPU. It then trains on 8 million of the first 9 million bytes,
and evaluates on the first 0.5 MB of the standard validation text, so that the results are not
comparable to published results on enwik8.

The report also has lm_fusion.md, .png and .pdf, with the differences from the concat arm of the
same core and site, paired by seed.

Source: the question of Jayakumar et al. (ICLR 2020), section on language modeling. The models,
sizes and texts are ours.
"""

import os
import pathlib
from collections.abc import Mapping

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launch.sweep import Overrides, chain, product
from mi.report import plots, runs, statistics, tables

ENWIK8 = os.environ.get('MI_ENWIK8', '')

CONFIG = 'configs/lm.py:fusion_study'
TITLE = 'Where and how a context meets a language model'
METRIC = 'bits_per_byte'
SPLIT = 'valid_whole'
BASELINE = None
PROBLEMS = ('model.core', 'model.site')
NOTES = [
    'Text: the first 9 MB of enwik8, evaluated on the first 0.5 MB of its standard validation '
    'text. Not the published split: no figure here compares with one.'
    if ENWIK8
    else 'Text: four novels by Jane Austen, evaluated on Northanger Abbey.',
    'Read once from a zero state, in 64 parts, with state or memory carried.',
    'Sizes set per arm so that all arms of one core and site have the parameters of concat, within '
    '3 %; the Transformers are larger than the LSTMs, so that arms of two cores do not compare. '
    'Differences to concat of the same core and site are in lm_fusion.md.',
    'none has no context, and a larger core in its place. It is the same at both sites, and listed '
    'at the encoder.',
]

FUSIONS = ['concat', 'mi', 'mi_low_rank', 'film', 'none']
COSTS = [('parameters', 'model'), ('parameters', 'fusion'), ('flops_per_token', 'model')]


def sweep() -> list[Overrides]:
    def arms(core: str, sites: list[str], fusions: list[str]) -> list[Overrides]:
        return product(**{'model.core': [core], 'model.site': sites, 'model.fusion.name': fusions})

    members = chain(*(
        chain(
            arms(core, ['encoder', 'decoder'], ['concat', 'mi', 'mi_low_rank', 'film']),
            arms(core, ['encoder'], ['none']),  # which is the same at any site
        )
        for core in ('transformer', 'lstm')
    ))  # fmt: skip
    # What is compared first comes first, of both cores.
    fusion_order = ['concat', 'mi', 'none', 'mi_low_rank', 'film']
    members.sort(key=lambda arm: fusion_order.index(arm['model.fusion.name']))
    if not ENWIK8:
        return members
    data = {'data.source': 'enwik8', 'data.path': ENWIK8, 'data.train_tokens': 9_000_000}
    schedule = {'train.batch': 32, 'train.steps': 4000, 'train.eval_every': 500}
    return [arm | data | schedule | {'train.save_every': 2000} for arm in members]


def report(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Compare each arm with the concat arm of the same core and site, in a table and a figure."""
    arms_by_site: dict[tuple[str, str], dict[str, runs.Arm]] = {}
    sweep = runs.read_sweep(workdir)
    for arm in sweep.arms:
        if arm.finite_values(METRIC, SPLIT):
            core, site, fusion = arm.label.split(', ')
            arms_by_site.setdefault((core, site), {})[fusion] = arm
    arms_by_site = {site_key: arms for site_key, arms in arms_by_site.items() if 'concat' in arms}

    # A row of the table and a point of the figure for each arm.
    header = ['core', 'site', 'fusion', 'bits per byte ↓ [95 %]', 'difference to concat [95 %]']
    header += ['parameters', 'of the fusion', 'FLOPs per token', 'train seconds']
    table_rows = []
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 2.4), layout='constrained')
        panels = figure.subplots(
            1, max(1, len(arms_by_site)), sharex=True, sharey=True, squeeze=False
        )[0]
        # A panel for each core and site; the arm none is the same at both sites of a core.
        for axes, ((core, site), arms) in zip(panels, arms_by_site.items(), strict=False):
            if site == 'encoder' and (core, 'decoder') in arms_by_site and 'none' in arms:
                arms_by_site[core, 'decoder'] |= {'none': arms['none']}
            arms = {fusion: arms[fusion] for fusion in FUSIONS if fusion in arms}
            concat_values = arms['concat'].final_values(METRIC, SPLIT)
            for fusion, arm in arms.items():
                gap = None
                if fusion != 'concat':
                    values = arm.final_values(METRIC, SPLIT)
                    gap = statistics.estimate_difference(values, concat_values, fusion)
                    _draw_gaps(axes, FUSIONS.index(fusion), values, concat_values, gap)
                table_rows.append([core, site, fusion, *_format_cells(arm, gap)])
            axes.axvline(0, color=plots.GREY, lw=0.8)
            axes.set_title(f'{core},\n{site}')
            axes.set_yticks(range(1, len(FUSIONS)), [*map(tables.humanize, FUSIONS[1:])])

        # Labels that the panels share.
        panels[0].set_ylim(len(FUSIONS) - 0.5, 0.5)
        figure.supxlabel('bits per byte − concat', fontsize='medium')
        plots.save(figure, out, 'lm_fusion')
    sections = [
        tables.format_markdown(header, table_rows),
        statistics.CAUTION,
        sweep.describe_excluded(),
    ]
    (out / 'lm_fusion.md').write_text('\n\n'.join(filter(None, sections)) + '\n', encoding='utf-8')


def _format_cells(arm: runs.Arm, gap: statistics.Estimate | None) -> list[str]:
    """Format the mean, the difference from concat, the costs and the seconds of an arm."""
    mean = statistics.estimate(arm.final_values(METRIC, SPLIT), arm.label)
    return [
        str(tables.format_interval(mean, 4)),
        str(tables.format_interval(gap, 4, '+')),
        *(f'{arm.get_cost(quantity, owner):,}' for quantity, owner in COSTS),
        f'{arm.training_seconds()[1][-1]:.0f}',
    ]


def _draw_gaps(
    axes: Axes,
    y: int,
    values: Mapping[int, float],
    concat_values: Mapping[int, float],
    mean_gap: statistics.Estimate | None,
) -> None:
    """Draw the difference from concat of each common seed, and the mean difference."""
    if mean_gap is None:
        return
    paired_seeds = [seed for seed in values if seed in concat_values]
    gaps = [values[seed] - concat_values[seed] for seed in paired_seeds]
    axes.plot(gaps, [y] * len(gaps), 'o', mfc='none', ms=3, color=plots.GREY)
    axes.plot([mean_gap.mean], [y], '|', ms=10, mew=1.6, color=plots.PALETTE[0])
