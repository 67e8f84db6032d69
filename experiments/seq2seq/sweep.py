"""Sweep that compares attention with other mixers on functions of sequences, and with theory.

The four targets mix tokens depending on their order, their content, both, or neither
(experiments/seq2seq/problem.py). The networks are narrow and wide Transformers with one to three
mixers, which are attention or other mixers. The width of the feed-forward layers is adjusted so
that all have the same number of parameters. Two theoretical predictions are drawn as bounds that no
training can cross:

- Without positions, attention and the interactions commute with permutations of the tokens. On
  'reverse' and 'sort', they cannot be better than the mean over all orders. With positions, they
  can.
- One fixed mixer after layers that process single tokens is a sum of functions of single tokens. On
  'farthest' and 'sort', it cannot be better than the best such sum, at any width. Attention can.
  This does not rule out a fixed mixer followed by a feed-forward layer, or several fixed mixers.

    python -m launch.local --sweep=experiments/seq2seq/sweep.py --workdir=runs/seq2seq --parallel=2

The report also has seq2seq.png, .pdf and .md, with figures and tables of the errors against depth
and parameters, and of these bounds.

Source: Yun et al., Are Transformers universal approximators of sequence-to-sequence functions?
(ICLR 2020), for the question, the positions, and the comparison of attention with other mixers. The
targets, networks, sizes and training are ours.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from launch.sweep import Overrides, product, zip_
from mi.report import plots, runs, statistics, tables

CONFIG = 'experiments/seq2seq/config.py'
TITLE = 'Error of Transformers and of other mixers on four functions of sequences'
METRIC = 'mse'
SPLIT = 'eval'
CURVES = 'eval'
BASELINE = None
PROBLEMS = ('model.parameters',)
NOTES = [
    'The error is a share of the mean square of the target; the mean is that over four targets.',
    'A label is the mixer, how many of them, the features, and the parameters of all networks, '
    'the same for all arms of this size; then the fusion, where there is one, and what is unusual: '
    "one head, no positions ('none'), no feed-forward layer at the end ('mixer').",
    'One learning rate for all. 1,200 steps of 32 sequences: a network that would fit with more '
    'training is counted as one that does not.',
]

SEEDS = [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
TARGETS = {
    'difference': 'no order, constant',
    'farthest': 'no order, by content',
    'reverse': 'order, constant',
    'sort': 'order, by content',
}
NAMES = {
    'attention': 'attention',
    'pairs, mi_low_rank': 'MI of pairs',
    'summary, mi_low_rank': 'MI with summary',
    'summary, concat': 'concat with summary',
    'dynamic_conv': 'dynamic convolution',
    'fixed': 'fixed mixing',
}
DEPTH, FEATURES, HEADS = 2, 16, 4


def count_parameters(depth: int, features: int) -> int:
    """Return the rounded number of parameters of four networks with feed-forward width 2 C."""
    return 4 * (8 * depth + 5) * features**2


def sweep() -> list[Overrides]:
    def size_overrides(depth: int, features: int) -> Overrides:
        shape = {'model.depth': depth, 'model.features': features}
        return shape | {'model.parameters': count_parameters(depth, features)}

    def mixers(*mixer_names: str) -> list[Overrides]:
        overrides = []
        for mixer_name in mixer_names:
            mixer, _, fusion_name = mixer_name.partition(', ')
            fusion = {'model.fusion.name': fusion_name} if fusion_name else {}
            overrides.append({'model.mixer': mixer} | fusion)
        return overrides

    seeds = zip_(seeds=SEEDS)
    equivariant = mixers('attention', 'pairs, mi_low_rank')
    sizes = [size_overrides(DEPTH, features) for features in (8, 32)]
    return [
        # Every mixer by depth, and most of them by size.
        *product(mixers(*NAMES), [size_overrides(depth, FEATURES) for depth in (1, 2, 3)], seeds),
        *product(
            mixers('attention', 'pairs, mi_low_rank', 'summary, mi_low_rank', 'fixed'),
            sizes,
            seeds,
        ),
        # One head in place of four.
        *product(
            mixers('attention', 'pairs, mi_low_rank', 'fixed'),
            [{'model.heads': 1}],
            [size_overrides(DEPTH, FEATURES)],
            seeds,
        ),
        # What the two bounds rule out: no positions, and one mixing at the end.
        *product(
            equivariant,
            [{'model.positions': 'none'}],
            [size_overrides(depth, FEATURES) for depth in (1, 2, 3)],
            seeds,
        ),
        *product(
            mixers('attention', 'fixed'),
            [{'model.ends': 'mixer'}],
            [size_overrides(1, features) for features in (8, 16, 32)],
            seeds,
        ),
    ]


class Floors(NamedTuple):
    """Lower bounds on the error by target, averaged over all seeds.

    Attributes:
      equivariant: bound for functions that commute with permutations.
      additive: bound for sums of functions of single tokens.
      above: {label: {target: {seed: value}}}, where the value is the error minus `equivariant` on
        the sequences of that bound.
    """

    equivariant: dict[str, float]
    additive: dict[str, float]
    above: dict[str, dict[str, dict[int, float]]]


def report(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Draw the errors against depth and parameters, and tabulate them with the bounds."""
    sweep_runs = runs.read_sweep(workdir)
    arms = [arm for arm in sweep_runs.arms if arm.finite_values(METRIC, SPLIT)]
    floors = read_floors(workdir)
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 4.4), layout='constrained')
        panel_grid = figure.subplots(2, len(TARGETS), sharey=True, sharex='row')
        # A column for each target: errors by depth above, by size below.
        for column, (target, target_kind) in enumerate(TARGETS.items()):
            depth_axes, size_axes = panel_grid[:, column]
            depth_axes.set_title(f'{target}\n{target_kind}', fontsize=8)
            _draw_by_depth(depth_axes, arms, target, floors)
            _draw_by_size(size_axes, arms, target, floors)

        # Scales and labels that the panels share.
        for axes in panel_grid[:, 0]:
            axes.set_yscale('log')
            axes.yaxis.set_major_formatter('{x:g}')
            axes.yaxis.set_minor_formatter('')
        panel_grid[0, 0].set_xticks((1, 2, 3))
        panel_grid[1, 0].set_xscale('log')
        panel_grid[1, 0].xaxis.set_major_formatter(EngFormatter(sep=''))
        panel_grid[1, 0].xaxis.set_minor_formatter('')
        for row_index, label in enumerate(('mixers', 'parameters')):
            panel_grid[row_index, 0].set_ylabel('error')
            for axes in panel_grid[row_index]:
                axes.set_xlabel(label)
        handles = {
            label: handle
            for axes in panel_grid.flat
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(), handles.keys(), loc='outside lower center', ncols=3, frameon=False
        )
        plots.save(figure, out, 'seq2seq')
    sections = [
        _tabulate_predictions(arms, floors),
        _tabulate_errors(arms),
        statistics.CAUTION,
        sweep_runs.describe_excluded(),
    ]
    (out / 'seq2seq.md').write_text('\n\n'.join(filter(None, sections)) + '\n', encoding='utf-8')


def read_floors(workdir: pathlib.Path) -> Floors:
    """Read the bounds of every run, counting each seed once, because its runs share the bounds."""
    floors: dict[int, np.ndarray] = {}
    gaps_by_label: dict[str, dict[str, dict[int, float]]] = {}
    targets: list[str] = []
    for member in json.loads((workdir / 'sweep.json').read_text())['members']:
        run_dir = workdir / member['name']
        if not (run_dir / 'artefacts.npz').exists():
            continue
        config = json.loads((run_dir / 'config.json').read_text())
        targets = config['problem']['targets']
        arrays = np.load(run_dir / 'artefacts.npz')
        arm_gaps = gaps_by_label.setdefault(member['label'], {target: {} for target in targets})
        names = 'equivariant_floor', 'additive_floor', 'error_in_all_orders'
        equivariant_floors, additive_floors, errors = (arrays[name] for name in names)
        for seed_index, seed in enumerate(config['seeds']):
            floors[seed] = np.stack([equivariant_floors[seed_index], additive_floors[seed_index]])
            target_gaps = errors[seed_index] - equivariant_floors[seed_index]
            for target, gap in zip(targets, target_gaps, strict=True):
                arm_gaps[target][seed] = float(gap)
    means = np.mean(list(floors.values()), axis=0) if floors else ((), ())
    equivariant, additive = (dict(zip(targets, map(float, mean), strict=True)) for mean in means)
    return Floors(equivariant, additive, gaps_by_label)


def get_mixer_name(arm: runs.Arm) -> str:
    """Return the key in NAMES of an arm's mixer."""
    model = arm.config['model']
    has_fusion = model['mixer'] in ('pairs', 'summary')
    return f'{model["mixer"]}, {model["fusion"]["name"]}' if has_fusion else str(model['mixer'])


def select_arms(arms: Sequence[runs.Arm], **settings: object) -> list[runs.Arm]:
    """Select the arms whose model settings match. Unspecified settings must have default values.

    A setting of None matches any value, and any mixer matches.
    """
    defaults = {'positions': 'learned', 'ends': 'feed_forward', 'heads': HEADS}
    defaults |= {'depth': DEPTH, 'features': FEATURES}
    filters = {key: value for key, value in (defaults | settings).items() if value is not None}

    def has_settings(arm: runs.Arm) -> bool:
        return all(arm.config['model'][key] == value for key, value in filters.items())

    return [arm for arm in arms if has_settings(arm)]


def _draw_line(
    axes: Axes,
    arms: Sequence[runs.Arm],
    target: str,
    get_position: Callable[[runs.Arm], float],
    **style: Any,
) -> None:
    """Draw the means over seeds with their intervals."""
    positions, means, lower_bars, upper_bars = [], [], [], []
    for arm in sorted(arms, key=get_position):
        if errors := arm.final_values(f'{METRIC}/{target}', SPLIT):
            estimate = statistics.estimate(errors, arm.label)
            positions.append(get_position(arm))
            means.append(estimate.mean)
            low, high = (
                estimate.mean if bound is None else bound for bound in (estimate.low, estimate.high)
            )
            lower_bars.append(max(estimate.mean - low, 0))
            upper_bars.append(max(high - estimate.mean, 0))
    if positions:
        bars = [lower_bars, upper_bars]
        axes.errorbar(positions, means, bars, lw=1.1, ms=4, elinewidth=0.8, **style)


def _make_styles() -> dict[str, dict[str, Any]]:
    colors = dict(zip(NAMES, (plots.GREY, *plots.PALETTE), strict=False))
    return {name: {'color': color, 'marker': '.'} for name, color in colors.items()}


def _get_depth(arm: runs.Arm) -> int:
    return int(arm.config['model']['depth'])


def _get_size(arm: runs.Arm) -> float:
    return arm.get_cost('parameters', 'model') or 0


def _draw_by_depth(axes: Axes, arms: Sequence[runs.Arm], target: str, floors: Floors) -> None:
    for mixer, style in _make_styles().items():
        mixer_arms = [arm for arm in arms if get_mixer_name(arm) == mixer]
        ordered_arms = select_arms(mixer_arms, depth=None)
        _draw_line(axes, ordered_arms, target, _get_depth, label=NAMES[mixer], **style)
        unordered_arms = select_arms(mixer_arms, depth=None, positions='none')
        style = style | {'marker': 'o', 'mfc': 'none', 'ls': ':'}
        curve_label = f'{NAMES[mixer]}, no positions' if unordered_arms else None
        _draw_line(axes, unordered_arms, target, _get_depth, label=curve_label, **style)
    if floors.equivariant.get(target, 0) > 1e-3:
        axes.axhline(
            floors.equivariant[target], color=plots.INK, ls=(0, (4, 2)), lw=0.8,
            label='bound of functions without order',
        )  # fmt: skip


def _draw_by_size(axes: Axes, arms: Sequence[runs.Arm], target: str, floors: Floors) -> None:
    for mixer, style in _make_styles().items():
        mixer_arms = [arm for arm in arms if get_mixer_name(arm) == mixer]
        usual_arms = select_arms(mixer_arms, features=None)
        _draw_line(axes, usual_arms, target, _get_size, label=NAMES[mixer], **style)
        final_mixing_arms = select_arms(mixer_arms, features=None, depth=1, ends='mixer')
        style = style | {'marker': 's', 'mfc': 'none', 'ls': (0, (4, 1, 1, 1))}
        curve_label = f'one {NAMES[mixer]} at the end' if final_mixing_arms else None
        _draw_line(axes, final_mixing_arms, target, _get_size, label=curve_label, **style)
    if floors.additive.get(target, 0) > 0.02:
        axes.axhline(
            floors.additive[target], color=plots.INK, ls=(0, (1, 1)), lw=0.8,
            label='bound of sums over tokens',
        )  # fmt: skip


def _tabulate_predictions(arms: Sequence[runs.Arm], floors: Floors) -> str:
    """Tabulate the theoretical bounds and the lowest error of any seed and size."""
    table_rows: list[list[str]] = []

    def add_rows(network: str, is_orderless: bool, arms: list[runs.Arm], expected: str) -> None:
        bound = floors.equivariant if is_orderless else floors.additive
        for target in TARGETS:
            if bound.get(target, 0) < 0.02 or not arms:
                continue
            table_row = [network, target, f'{bound[target]:.3f}', expected]
            for seeds in SEEDS:
                gaps = [
                    floors.above[arm.label][target][seed] if is_orderless else error - bound[target]
                    for arm in arms
                    for seed, error in arm.final_values(f'{METRIC}/{target}', SPLIT).items()
                    if seed in seeds
                ]
                table_row.append(f'{min(gaps):+.4f}'.replace('-', '−') if gaps else tables.NONE)
            table_rows.append(table_row)

    # Functions without order, against the first bound.
    for mixer in ('attention', 'pairs, mi_low_rank'):
        mixer_arms = [arm for arm in arms if get_mixer_name(arm) == mixer]
        add_rows(
            f'{NAMES[mixer]}, no positions',
            True,
            select_arms(mixer_arms, depth=None, positions='none'),
            '0 or above',
        )
        add_rows(f'{NAMES[mixer]}, positions', True, select_arms(mixer_arms, depth=None), 'below 0')

    # Sums over tokens, against the second bound.
    for mixer in ('fixed', 'attention'):
        mixer_arms = [arm for arm in arms if get_mixer_name(arm) == mixer]
        final_mixing_arms = select_arms(mixer_arms, features=None, depth=1, ends='mixer')
        add_rows(
            f'one {NAMES[mixer]} at the end',
            False,
            final_mixing_arms,
            '0 or above' if mixer == 'fixed' else 'below 0',
        )
    fixed_mixings = [arm for arm in arms if get_mixer_name(arm) == 'fixed']
    fixed_arms = [
        *select_arms(fixed_mixings, features=None),
        *select_arms(fixed_mixings, depth=1),
        *select_arms(fixed_mixings, depth=3),
    ]
    add_rows('fixed mixings, a feed-forward layer last', False, fixed_arms, 'any')

    header = ['network', 'target', 'bound', 'error − bound, by theory']
    header += [f'least of seeds {seeds[0]} to {seeds[-1]}' for seeds in SEEDS]
    note = (
        'The first bound is that of functions without order, and errors above it are those on the '
        'same sequences in all orders, so that theory holds to rounding; the second is that of '
        'sums over tokens, from a sample, to about 0.005. Least of all sizes and seeds.'
    )
    return f'**Bounds**\n\n{tables.format_markdown(header, table_rows)}\n\n{note}'


def _tabulate_errors(arms: Sequence[runs.Arm]) -> str:
    table_rows = []
    for arm in arms:
        model = arm.config['model']
        mixer = NAMES[get_mixer_name(arm)]
        if model['positions'] == 'none':
            mixer += ', no positions'
        if model['ends'] == 'mixer':
            mixer += ', at the end'
        table_row = [mixer, *(str(model[key]) for key in ('depth', 'heads', 'features'))]
        table_row += [f'{_get_size(arm):,.0f}']
        for target in TARGETS:
            errors = arm.final_values(f'{METRIC}/{target}', SPLIT)
            estimate = statistics.estimate(errors, arm.label) if errors else None
            table_row.append(_format_estimate(estimate))
        table_rows.append(table_row)
    header = ['mixer', 'mixers', 'heads', 'features', 'parameters']
    header += [f'{target} [95 %]' for target in TARGETS]
    return '**Errors**\n\n' + tables.format_markdown(header, table_rows)


def _format_estimate(estimate: statistics.Estimate | None) -> str:
    """Format the mean with two significant digits, because errors span four orders of magnitude."""
    if estimate is None:
        return tables.NONE
    num_decimals = max(0, 1 - int(np.floor(np.log10(estimate.mean)))) if estimate.mean > 0 else 0
    return str(tables.format_interval(estimate, num_decimals))
