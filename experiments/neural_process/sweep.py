"""Sweep that compares fusions in the decoders of neural processes.

Conditional and latent neural processes learn a mixture of Gaussian processes with RBF kernels,
Gaussian processes with periodic kernels, and sinusoids. The decoder fuses the target with the
representation of the context or with the latent: by concatenation at its input, by concatenation at
every layer, or by an MI, a low-rank MI or FiLM at every layer. All conditional models have about
15,100 parameters, and all latent models about 20,600. The report compares the likelihood, error and
calibration on held-out points with Gaussian-process regression by the true kernel, for several
numbers of context points. Every arm is trained with ten seeds.

    python -m launch.local --sweep=experiments/neural_process/sweep.py --workdir=runs/np \
        --parallel=1

The report also has neural_process.png, .pdf and .md, and neural_process_bands_PATH.png and .pdf,
with the predictions of each decoder for single functions.

Source: Garnelo et al. (2018a, b) for the models, and Jayakumar et al. (ICLR 2020), recalled from
memory, for the arms. The functions, sizes and training are ours.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import panels, roll_outs
from launch.sweep import Overrides, product, zip_
from mi.report import plots, runs, statistics, tables

CONFIG = 'experiments/neural_process/config.py'
TITLE = 'Likelihood of held-out points of a function, by the decoder'
METRIC = 'log_likelihood'
SPLIT = CURVES = 'eval'
LOWER_IS_BETTER = False
BASELINE = None
PROBLEMS = ('model.paths',)
NOTES = [
    'Log-likelihood of the held-out targets together, per target in nats, mean over 0, 1, 2, 4, 8 '
    'and 16 points of context and over three families of functions. Of a latent neural process it '
    'is the importance-weighted bound with 32 samples.',
    'A label is the path of the neural process, the fusion of the decoder, and the maps that take '
    'the representation or the latent.',
    'One learning rate, 0.005 and falling to 0, and 4,000 steps of 12 functions for all. With '
    'concatenation at the input of a larger conditional neural process, on seeds 100 and 101, '
    '0.006 was a little better than 0.003: −0.94 and −0.97.',
]

SEEDS = [tuple(range(10))]
DECODERS = {
    ('concat', 'first'): 'concat at the input',
    ('concat', 'all'): 'concat at every layer',
    ('mi', 'all'): 'MI at every layer',
    ('mi_low_rank', 'all'): 'low-rank MI at every layer',
    ('film', 'all'): 'FiLM at every layer',
}
BASELINE_DECODERS = ('concat at the input', 'concat at every layer')
PATHS = {'deterministic': 'conditional', 'latent': 'latent'}
PARAMETERS = {'deterministic': 15_100, 'latent': 20_600}  # the same decoders
CEILING = 'GP, true kernel'
FAMILIES = {'rbf': 'RBF', 'periodic': 'periodic', 'sinusoid': 'sinusoid'}
NUM_SAMPLES = 8  # in a panel


def sweep() -> list[Overrides]:
    fusions, sites = zip(*DECODERS, strict=True)
    decoders = zip_(**{'model.fusion.name': fusions, 'model.site': sites})
    models = zip_(**{'model.paths': list(PATHS), 'model.parameters': list(PARAMETERS.values())})
    return product(models, decoders, seeds=SEEDS)


class ArmKey(NamedTuple):
    """The path and the decoder of an arm: a key of PATHS, and a value of DECODERS."""

    path: str
    decoder: str


Arms = dict[ArmKey, runs.Arm]
Values = dict[int, float]  # seed → value


def report(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Draw scores by context size and predictions of single functions, and write tables."""
    sweep = runs.read_sweep(workdir)
    arms = {make_key(arm): arm for arm in sweep.arms if arm.finite_values(METRIC, SPLIT)}
    paths = [path for path in PATHS if any(key.path == path for key in arms)]
    with matplotlib.rc_context(plots.STYLE):
        if paths:
            _draw_scores(arms, paths, out)
        for path in paths:
            _draw_bands(workdir, arms, path, out)
    sections = [section for path in paths for section in tabulate_path(arms, path)]
    sections = [*filter(None, [*sections, sweep.describe_excluded()])]
    (out / 'neural_process.md').write_text('\n\n'.join(sections) + '\n', encoding='utf-8')


def make_key(arm: runs.Arm) -> ArmKey:
    overrides = arm.overrides
    decoder = overrides['model.fusion.name'], overrides['model.site']
    return ArmKey(overrides['model.paths'], DECODERS[decoder])


def read_counts(arm: runs.Arm, metric: str, split: str) -> dict[float, Values]:
    """Read {context points: {seed: value}} from `metric/COUNT` in a split."""
    prefix = f'{metric}/'
    names = [name for name in arm.metric_names(split) if name.startswith(prefix)]
    counts = sorted(int(name.removeprefix(prefix)) for name in names)
    return {count: arm.final_values(f'{prefix}{count}', split) for count in counts}


def _list_arms(arms: Arms, path: str) -> dict[str, runs.Arm]:
    """Return {decoder: arm} for a path."""
    return {key.decoder: arm for key, arm in arms.items() if key.path == path}


# The figure of scores.

PANELS = {
    'log_likelihood': 'log-likelihood, nats per target',
    'mse': 'mean squared error',
    'coverage_90': 'coverage of 90 % intervals',
}


def _draw_scores(arms: Arms, paths: Sequence[str], out: pathlib.Path) -> None:
    """Draw scores against context points, with a row for each score and a column for each path."""
    styles = panels.assign_styles(DECODERS.values(), grey=BASELINE_DECODERS)
    figure = Figure(figsize=(plots.WIDTH, 6.2), layout='constrained')
    panel_grid = figure.subplots(len(PANELS), len(paths), sharex=True, sharey='row', squeeze=False)
    for (metric, label), panel_row in zip(PANELS.items(), panel_grid, strict=True):
        panel_row[0].set_ylabel(label)
        for axes, path in zip(panel_row, paths, strict=True):
            by_decoder = _list_arms(arms, path)
            for decoder, arm in by_decoder.items():
                _draw_counts(axes, read_counts(arm, metric, 'contexts'), decoder, styles[decoder])
            ceiling = read_counts(next(iter(by_decoder.values())), metric, 'gp_contexts')
            _draw_counts(axes, ceiling, CEILING, (plots.INK, plots.DASHES[2]))
            if metric == 'mse':
                axes.set_yscale('log')
                panels.set_power_ticks(axes.yaxis)
    for axes, path in zip(panel_grid[0], paths, strict=True):
        axes.set_title(f'{PATHS[path]} neural process')
    for axes in panel_grid[-1]:
        axes.set_xlabel('points of context')
    handles, labels = panel_grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=3, frameon=False)
    plots.save(figure, out, 'neural_process')


def _draw_counts(
    axes: Axes, values: Mapping[float, Values], label: str, style: panels.Style
) -> None:
    """Draw a line with evenly spaced ticks, one for each number of context points."""
    counts = list(values)
    by_place = {place: values[count] for place, count in enumerate(counts)}
    panels.draw_line(axes, by_place, label, style)
    axes.set_xticks(range(len(counts)), [f'{count:g}' for count in counts])


# The figures of single functions.


def _draw_bands(workdir: pathlib.Path, arms: Arms, path: str, out: pathlib.Path) -> None:
    """Draw predictions of the first seed, by decoder or ceiling (row) and by family (column)."""
    artifacts = {
        decoder: roll_outs.load_artifacts(workdir, arm.label)
        for decoder, arm in _list_arms(arms, path).items()
    }
    artifacts = {decoder: arrays for decoder, arrays in artifacts.items() if arrays}
    if not artifacts:
        return
    num_rows = len(artifacts) + 1
    figure = Figure(figsize=(plots.WIDTH, 0.4 + 1.05 * num_rows), layout='constrained')
    panel_grid = figure.subplots(num_rows, len(FAMILIES), sharex=True, sharey='col')
    rows = [(decoder, arrays, '') for decoder, arrays in artifacts.items()]
    rows.append((CEILING, next(iter(artifacts.values())), 'gp_'))
    for panel_row, (title, arrays, prefix) in zip(panel_grid, rows, strict=True):
        panel_row[0].set_ylabel(title.replace(' at ', '\nat ').replace(', ', ',\n'))
        has_samples = path != 'deterministic' or prefix
        for index, axes in enumerate(panel_row):
            _draw_function(axes, arrays, prefix, index, NUM_SAMPLES if has_samples else 0)
    for axes, title in zip(panel_grid[0], FAMILIES.values(), strict=True):
        axes.set_title(title)
    for axes in panel_grid[-1]:
        axes.set_xlabel('x')
    plots.save(figure, out, f'neural_process_bands_{PATHS[path]}')


def _draw_function(
    axes: Axes, arrays: Mapping[str, np.ndarray], prefix: str, index: int, num_samples: int
) -> None:
    """Draw a function, its context points, and the band, mean and samples of a prediction."""
    color = plots.INK if prefix else plots.PALETTE[0]
    grid = arrays['grid'][0]
    low, high = (arrays[f'{prefix}{name}'][0, index] for name in ('low', 'high'))
    axes.fill_between(grid, low, high, color=color, alpha=0.15, lw=0)
    for sample in arrays[f'{prefix}samples'][0, :num_samples, index]:
        axes.plot(grid, sample, color=color, lw=0.4, alpha=0.6)
    axes.plot(grid, arrays[f'{prefix}mean'][0, index], color=color, lw=1.2)
    axes.plot(grid, arrays['f'][0, index], color=plots.PALETTE[1], lw=0.8, ls=plots.DASHES[2])
    axes.plot(arrays['x'][0, index], arrays['y'][0, index], 'o', color=plots.INK, ms=2.5, mew=0)


# The tables.


def tabulate_path(arms: Arms, path: str) -> list[str]:
    """Tabulate all scores of a path, then the likelihood by context and by family."""
    by_decoder = _list_arms(arms, path)
    title = f'{PATHS[path].capitalize()} neural process'
    first_arm = next(iter(by_decoder.values()))
    counts = list(read_counts(first_arm, METRIC, 'contexts'))
    families = [family for family in FAMILIES if first_arm.metric_names(family)]

    def tabulate(columns: Mapping[str, tuple[str, str]]) -> str:
        """Tabulate columns {title: (metric, split)} for each decoder and the ceiling."""
        rows = [(decoder, arm, '') for decoder, arm in by_decoder.items()]
        rows.append((CEILING, first_arm, 'gp_'))
        body = []
        for label, arm, prefix in rows:
            cells = []
            for metric, split in columns.values():
                values = arm.final_values(metric, prefix + split)
                cells.append(panels.format_mean(values, label))
            body.append([label, *cells])
        header = ['decoder', *(f'{column} [95 %]' for column in columns)]
        return tables.format_markdown(header, body)

    by_count = {f'{count:g} points': (f'{METRIC}/{count:g}', 'contexts') for count in counts}
    by_family = {FAMILIES[family]: (METRIC, family) for family in families}
    return [
        f'**{title}: scores**\n\n{_tabulate_differences(by_decoder)}',
        f'**{title}: errors and calibration**\n\n' + tabulate({
            'marginal log-likelihood': ('marginal_log_likelihood', SPLIT),
            'mse': ('mse', SPLIT),
            'coverage of 50 %': ('coverage_50', SPLIT),
            'coverage of 90 %': ('coverage_90', SPLIT),
            'calibration error': ('calibration_error', SPLIT),
        }),
        f'**{title}: log-likelihood by points of context**\n\n{tabulate(by_count)}',
        f'**{title}: log-likelihood by family**\n\n{tabulate(by_family)}',
    ]  # fmt: skip


def _tabulate_differences(by_decoder: Mapping[str, runs.Arm]) -> str:
    """Tabulate the likelihood and its differences from both concatenations, paired by seed.

    The p-values are from sign-flip tests against concatenation at the input, with Holm's correction
    for the number of decoders.
    """
    values = {decoder: arm.final_values(METRIC, SPLIT) for decoder, arm in by_decoder.items()}
    baselines = [decoder for decoder in BASELINE_DECODERS if decoder in values]
    tests: dict[str, statistics.SignFlipTest | None] = {}
    for baseline in baselines[:1]:
        compared = [decoder for decoder in values if decoder != baseline]
        differences = {
            decoder: np.array([
                values[decoder][seed] - values[baseline][seed]
                for seed in values[decoder]
                if seed in values[baseline]
            ])
            for decoder in compared
        }  # fmt: skip
        corrected = statistics.correct_holm(
            [statistics.sign_flip_test(differences[decoder]) for decoder in compared]
        )
        tests = dict(zip(compared, corrected, strict=True))

    # A row for each decoder: size, likelihood, differences and the test of the first.
    body = []
    for decoder, arm in by_decoder.items():
        num_params = arm.get_cost('parameters', 'model')
        row = [decoder, tables.NONE if num_params is None else f'{num_params:,}']
        row.append(panels.format_mean(values[decoder], decoder))
        for baseline in baselines:
            gap = statistics.estimate_difference(values[decoder], values[baseline], decoder)
            is_itself = decoder == baseline
            row.append(str(tables.format_interval(None if is_itself else gap, 3)))
        test = tests.get(decoder)
        row.append(tables.NONE if test is None else statistics.format_p(test.p_holm))
        body.append(row)
    first_arm = next(iter(by_decoder.values()))
    ceiling = panels.format_mean(first_arm.final_values(METRIC, f'gp_{SPLIT}'), CEILING)
    body.append([CEILING, tables.NONE, ceiling, *[tables.NONE] * (len(baselines) + 1)])
    header = ['decoder', 'parameters', 'log-likelihood [95 %]']
    header += [f'minus {baseline} [95 %]' for baseline in baselines]
    header.append(f'p of the difference from {baselines[0]}' if baselines else 'p')
    return tables.format_markdown(header, body)
