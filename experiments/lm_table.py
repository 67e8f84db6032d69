"""Sweep for a language-model table like the paper's: multiplicative encoder, decoder, or both.

The arms are a plain LSTM, and LSTMs that fuse the token with a context at the input embedding
(encoder), at the output embedding (decoder), or at both, by a full MI or by concatenation. The
context is the state of a separate small LSTM (recurrent), or the previous state of the core
(state). The size of the core is adjusted so that all arms have as many parameters as the plain
LSTM, within 3 %.

    python -m launch.local --sweep=experiments/lm_table.py --workdir=runs/lm_table --parallel=1

The text is four novels by Jane Austen at word level, for one CPU core. Other sweeps make the same
table for other texts:

    experiments/lm_table_enwik8.py        the first 10 MB of enwik8, at byte level
    experiments/lm_table_wikitext103.py   WikiText-103, for GPUs

The report also has the table, as lm_table.md and .tex, and test scores, as lm_table.png and .pdf.

Source: the rows and the validation and test columns follow the table of Jayakumar et al. (ICLR
2020) as far as it is known, see docs/paper.md. The sizes, the text, the training and the context
are ours.
"""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launch.sweep import Overrides, product
from mi.report import latex, plots, runs, statistics, tables
from mi.report.statistics import Estimate
from mi.report.tables import Cell

CONFIG = 'configs/lm.py:table'
TITLE = 'Multiplicative encoder and decoder of an LSTM, words of Jane Austen'
METRIC = 'perplexity'
SPLIT = 'test'
CURVES = 'valid'
BASELINE = 'none'
NOTES = [
    'Words of four novels by Jane Austen; validation is Northanger Abbey, test is Persuasion. All '
    'but the 2,000 most frequent words are one word, so that bits per byte are not defined.',
    'The first 50,000 tokens of each text are read once from a zero state, in 64 parts, with state '
    'carried.',
    'A label is the site, the source of the context and the fusion; none is the LSTM without a '
    'context. All arms have its parameters within 3 %, by the size of the core.',
    'Differences to concatenation at the same place are in lm_table.md.',
]

SITES = {'encoder': 'encoder', 'decoder': 'decoder', 'both': 'encoder and decoder'}
SOURCES = ('recurrent', 'state')
FUSIONS = {'concat': 'concatenation', 'mi': 'multiplicative'}
SEEDS = [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]  # two members of each arm
SPLITS = {'valid_whole': 'validation', 'test': 'test'}
MEASURES = ('perplexity', 'bits_per_byte')


class Place(NamedTuple):
    """The site and the source of a context: config.model.site and config.model.source."""

    site: str
    source: str


PLAIN = Place('none', '')
Arms = Mapping[tuple[Place, str], runs.Arm]  # by place and fusion; the plain LSTM has the fusion ''


def list_arms() -> list[Overrides]:
    fused = product(**{
        'model.source': SOURCES,
        'model.site': list(SITES),
        'model.fusion.name': list(FUSIONS),
    })  # fmt: skip
    return [{'model.site': 'none'}, *fused]


def sweep() -> list[Overrides]:
    """Return all arms with the first five seeds, and then with the others."""
    return [{**arm, 'seeds': seeds} for seeds in SEEDS for arm in list_arms()]


def report(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Write the table as Markdown and LaTeX, and draw the test scores."""
    sweep = runs.read_sweep(workdir)
    arms = select_arms(sweep)
    shape = tabulate_scores(arms)
    gaps = tabulate_differences(arms, sweep.metric)

    # Both tables as Markdown.
    sections = [f'{sweep.title}']
    for header, body in (shape, gaps):
        texts = [[str(cell) for cell in cells] for cells in (header, *body)]
        sections.append(tables.format_markdown(texts[0], texts[1:]))
    notes = [*sweep.notes, statistics.CAUTION, *filter(None, [sweep.describe_excluded()])]
    sections.append('\n'.join(f'- {tables.escape_markdown(note)}' for note in notes))
    (out / 'lm_table.md').write_text('\n\n'.join(sections) + '\n', encoding='utf-8')

    # Both as LaTeX, and the figure.
    origin = latex.describe_origin(sweep)
    captions = [sweep.title, *notes], [f'{sweep.title}: differences']
    tex = [
        latex.format_latex(header, body, caption, origin)
        for (header, body), caption in zip((shape, gaps), captions, strict=True)
    ]
    (out / 'lm_table.tex').write_text('\n'.join(tex), encoding='utf-8')
    with matplotlib.rc_context(plots.STYLE):
        plots.save(draw_scores(arms, sweep.metric, sweep.metric_title), out, 'lm_table')


def select_arms(sweep: runs.Sweep) -> Arms:
    """Select the arms with finite validation and test scores, in the order of the table."""
    finished: dict[tuple[Place, str], runs.Arm] = {}
    for arm in sweep.arms:
        if all(arm.finite_values(sweep.metric, split) for split in SPLITS):
            site = str(arm.overrides['model.site'])
            source = str(arm.overrides.get('model.source', ''))
            fusion = str(arm.overrides.get('model.fusion.name', ''))
            finished[Place(site, source), fusion] = arm
    places = [Place(site, source) for source in SOURCES for site in SITES]
    keys = [(PLAIN, ''), *((place, fusion) for place in places for fusion in FUSIONS)]
    return {key: finished[key] for key in keys if key in finished}


def tabulate_scores(arms: Arms) -> tuple[list[Cell], list[list[Cell]]]:
    """Return the header and the body of the table of validation and test scores."""
    # A column for each measure and split; bits per byte where the text has them.
    header = [Cell('model'), Cell('context')]
    columns: list[list[Cell]] = []
    for measure in MEASURES:
        for split, split_title in SPLITS.items():
            estimates = [_estimate(arm, measure, split) for arm in arms.values()]
            if any(estimates) or measure == 'perplexity':
                decimals = tables.count_decimals(estimates)
                header.append(Cell(f'{split_title} {tables.humanize(measure)} ↓', tables.INTERVAL))
                columns.append([tables.format_interval(mean, decimals) for mean in estimates])

    # Costs of each row.
    header += [Cell('parameters'), Cell('of the fusion'), Cell('train seconds')]
    body = []
    for row_index, (key, arm) in enumerate(arms.items()):
        counts = [arm.get_cost('parameters', component) for component in ('model', 'fusion')]
        costs = [Cell(tables.NONE if count is None else f'{count:,}') for count in counts]
        _, seconds = arm.training_seconds()
        costs.append(Cell(tables.format_seconds(float(seconds[-1]) if len(seconds) else None)))
        scores = [column[row_index] for column in columns]
        body.append([*_name_row(*key), *scores, *costs])
    return header, body


def tabulate_differences(arms: Arms, metric: str) -> tuple[list[Cell], list[list[Cell]]]:
    """Return the header and the body of a table of differences.

    The differences are from the plain LSTM, and from concat at the same site and source. The
    p-value tests MI against concat on the test split, corrected for all sites and sources.
    """
    # Differences of each row, by split and by the arm that they refer to; concat comes last.
    header = [Cell('model'), Cell('context')]
    columns: list[list[Cell]] = []
    for split, split_title in SPLITS.items():
        for reference, title in (('plain', 'LSTM'), ('concat', 'concatenation there')):
            header.append(Cell(f'{split_title} − {title}', tables.INTERVAL))
            gaps = [_find_gaps(arms, key, reference, metric, split) for key in arms]
            means = [statistics.estimate(by_seed, title) if by_seed else None for by_seed in gaps]
            decimals = tables.count_decimals([], means)
            columns.append([tables.format_interval(mean, decimals, '+') for mean in means])

    # The tests of MI against concat at the same place, with the last of these differences.
    tests = [statistics.sign_flip_test(np.array([*by_seed.values()])) for by_seed in gaps]
    header.append(Cell('p', 'Holm'))
    columns.append([tables.format_test(test) for test in statistics.correct_holm(tests)])
    return header, [
        [*_name_row(*key), *(column[row_index] for column in columns)]
        for row_index, key in enumerate(arms)
    ]


def draw_scores(arms: Arms, metric: str, metric_title: str) -> Figure:
    """Draw the test score of every arm, with a panel for each source and a line for each site."""
    figure = Figure(figsize=(plots.WIDTH, 2.2), layout='constrained')
    panels = figure.subplots(1, len(SOURCES), sharex=True, sharey=True)
    colors = dict(zip(FUSIONS, plots.PALETTE[1::-1], strict=True))
    for axes, source in zip(panels, SOURCES, strict=True):
        if (PLAIN, '') in arms:
            _draw_band(axes, _estimate(arms[PLAIN, ''], metric, SPLIT))
        for row_index, site in enumerate(SITES):
            for offset, (fusion, title) in zip((-0.16, 0.16), FUSIONS.items(), strict=True):
                if (arm := arms.get((Place(site, source), fusion))) is not None:
                    label = title if not row_index else None
                    _draw_arm(axes, row_index + offset, arm, metric, colors[fusion], label)
        axes.set_title(f'context: {source}')
        axes.set_xlabel(f'test {metric_title}')
        axes.set_yticks(range(len(SITES)), [*SITES.values()])
    panels[0].set_ylim(len(SITES) - 0.5, -0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc='outside lower center', ncols=3, frameon=False)
    return figure


def _draw_band(axes: Axes, mean: Estimate | None) -> None:
    """Draw the mean and the interval of the plain LSTM across all lines."""
    if mean is None:
        return
    axes.axvline(mean.mean, color=plots.GREY, lw=0.8, label='LSTM without context')
    if mean.low is not None and mean.high is not None:
        axes.axvspan(mean.low, mean.high, color=plots.GREY, alpha=0.2, lw=0)


def _draw_arm(
    axes: Axes, y: float, arm: runs.Arm, metric: str, color: str, label: str | None
) -> None:
    """Draw the score of each seed as a circle, and the mean as a bar."""
    values = arm.finite_values(metric, SPLIT)
    axes.plot([*values.values()], [y] * len(values), 'o', mfc='none', ms=3, color=color, alpha=0.6)
    mean = statistics.estimate(values, arm.label).mean
    axes.plot([mean], [y], '|', ms=10, mew=1.8, color=color, label=label)


def _name_row(place: Place, fusion: str) -> list[Cell]:
    if place == PLAIN:
        return [Cell('LSTM'), Cell(tables.NONE)]
    return [Cell(f'{FUSIONS[fusion]}, {SITES[place.site]}'), Cell(place.source)]


def _estimate(arm: runs.Arm, metric: str, split: str) -> Estimate | None:
    values = arm.finite_values(metric, split)
    return statistics.estimate(values, arm.label) if values else None


def _find_gaps(
    arms: Arms, key: tuple[Place, str], reference: str, metric: str, split: str
) -> dict[int, float]:
    """Return {seed: score − score of the reference}.

    The reference is the plain LSTM, or concat at the same site and source. The result is empty for
    the reference itself, and if there is no reference.
    """
    reference_key = (PLAIN, '') if reference == 'plain' else (key[0], 'concat')
    if key == reference_key or reference_key not in arms:
        return {}
    baseline = arms[reference_key].finite_values(metric, split)
    values = arms[key].finite_values(metric, split)
    return {seed: values[seed] - baseline[seed] for seed in values if seed in baseline}
