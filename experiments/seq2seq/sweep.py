"""What can stand in place of attention: four functions of sequences, and what theory rules out.

The targets are mixings of the tokens, which may depend on the order, on what the tokens say, on
both, or on neither (experiments/seq2seq/problem.py). Transformers of one to three mixers, narrow
and wide, with attention or with another mixer of as many parameters, which the width of the
feed-forward layers makes up for. Two of theory's predictions are drawn as lines that no training
can cross:

- Without positions, attention and the interactions commute with permutations of the tokens: on
  'reverse' and 'sort' they cannot be better than the mean over all orders. With positions they can.
- One fixed mixing after layers that see one token is a sum of functions of one token each: on
  'farthest' and 'sort' it cannot be better than the best such sum, at any width. Attention can.
  With a feed-forward layer after it, or several, fixed mixings are not ruled out.

    python -m launch.local --sweep=experiments/seq2seq/sweep.py --workdir=runs/seq2seq --parallel=2

The report also has seq2seq.png, .pdf and .md: errors against depth and parameters beside these
lines, and tables of them.

Source: Yun et al., Are Transformers universal approximators of sequence-to-sequence functions?
(ICLR 2020), for the question, positions, and attention against other mixings; targets, networks,
sizes and training are ours.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from launch.sweep import product, zip_
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
Overrides = dict[str, Any]


def parameters(depth: int, features: int) -> int:
    """Return the parameters of four networks with feed-forward layers of about 2 C, rounded."""
    return 4 * (8 * depth + 5) * features**2


def sweep() -> list[Overrides]:
    def size_overrides(depth: int, features: int) -> Overrides:
        sizes = {'model.depth': depth, 'model.features': features}
        return sizes | {'model.parameters': parameters(depth, features)}

    def mixers(*words: str) -> list[Overrides]:
        names = [mixer_name.split(', ') for mixer_name in words]
        fusions = [{'model.fusion.name': name[1]} if name[1:] else {} for name in names]
        return [
            {'model.mixer': name[0], **fusion} for name, fusion in zip(names, fusions, strict=True)
        ]

    seeds = zip_(seeds=SEEDS)
    equivariant = mixers('attention', 'pairs, mi_low_rank')
    sizes = [size_overrides(DEPTH, features) for features in (8, 32)]
    return [
        *product(mixers(*NAMES), [size_overrides(depth, FEATURES) for depth in (1, 2, 3)], seeds),
        *product(
            mixers('attention', 'pairs, mi_low_rank', 'summary, mi_low_rank', 'fixed'), sizes, seeds
        ),
        *product(
            mixers('attention', 'pairs, mi_low_rank', 'fixed'),
            [{'model.heads': 1}],
            [size_overrides(DEPTH, FEATURES)],
            seeds,
        ),
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
    """Lower bounds of the error by target, averaged over all seeds.

    Attributes:
      equivariant: bound of functions that commute with permutations.
      additive: bound of sums over tokens.
      above: {label: {target: {seed: error above `equivariant`, on the sequences of that bound}}}.
    """

    equivariant: dict[str, float]
    additive: dict[str, float]
    above: dict[str, dict[str, dict[int, float]]]


def report(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Draw the errors against depth and parameters, and tabulate them with the floors."""
    sweep_runs = runs.read_sweep(workdir)
    arms = [arm for arm in sweep_runs.arms if arm.finite_values(METRIC, SPLIT)]
    floors = read_floors(workdir)
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 4.4), layout='constrained')
        panels = figure.subplots(2, len(TARGETS), sharey=True, sharex='row')
        # A column for each target: errors by depth above, by size below.
        for column, (target, kind) in enumerate(TARGETS.items()):
            top, bottom = panels[:, column]
            top.set_title(f'{target}\n{kind}', fontsize=8)
            _by_depth(top, arms, target, floors)
            _by_size(bottom, arms, target, floors)

        # Scales and labels that the panels share.
        for axes in panels[:, 0]:
            axes.set_yscale('log')
            axes.yaxis.set_major_formatter('{x:g}')
            axes.yaxis.set_minor_formatter('')
        panels[0, 0].set_xticks((1, 2, 3))
        panels[1, 0].set_xscale('log')
        panels[1, 0].xaxis.set_major_formatter(EngFormatter(sep=''))
        panels[1, 0].xaxis.set_minor_formatter('')
        for row, label in enumerate(('mixers', 'parameters')):
            panels[row, 0].set_ylabel('error')
            for axes in panels[row]:
                axes.set_xlabel(label)
        handles = {
            label: handle
            for axes in panels.flat
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(), handles.keys(), loc='outside lower center', ncols=3, frameon=False
        )
        plots.save(figure, out, 'seq2seq')
    parts = [
        _predictions(arms, floors),
        _errors(arms),
        statistics.CAUTION,
        sweep_runs.describe_excluded(),
    ]
    (out / 'seq2seq.md').write_text('\n\n'.join(filter(None, parts)) + '\n', encoding='utf-8')


def read_floors(workdir: pathlib.Path) -> Floors:
    """Read the floors of every run; runs of one seed have the same, so each seed counts once."""
    floors: dict[int, np.ndarray] = {}
    above: dict[str, dict[str, dict[int, float]]] = {}
    targets: list[str] = []
    for member in json.loads((workdir / 'sweep.json').read_text())['members']:
        folder = workdir / member['name']
        if not (folder / 'artefacts.npz').exists():
            continue
        config = json.loads((folder / 'config.json').read_text())
        targets = config['problem']['targets']
        arrays = np.load(folder / 'artefacts.npz')
        arm_gaps = above.setdefault(member['label'], {target: {} for target in targets})
        for i, seed in enumerate(config['seeds']):
            floors[seed] = np.stack([arrays['equivariant_floor'][i], arrays['additive_floor'][i]])
            gaps = arrays['error_in_all_orders'][i] - arrays['equivariant_floor'][i]
            for target, gap in zip(targets, gaps, strict=True):
                arm_gaps[target][seed] = float(gap)
    means = np.mean(list(floors.values()), axis=0) if floors else ((), ())
    equivariant, additive = (dict(zip(targets, map(float, mean), strict=True)) for mean in means)
    return Floors(equivariant, additive, above)


def mixer_name(arm: runs.Arm) -> str:
    """Return the key of NAMES of an arm's mixer."""
    model = arm.config['model']
    fused = model['mixer'] in ('pairs', 'summary')
    return f'{model["mixer"]}, {model["fusion"]["name"]}' if fused else str(model['mixer'])


def select_arms(arms: Sequence[runs.Arm], **values: Any) -> list[runs.Arm]:
    """Return the arms with these model settings, and defaults for all others but the mixer."""
    defaults = {'positions': 'learnt', 'ends': 'feed_forward', 'heads': HEADS}
    defaults |= {'depth': DEPTH, 'features': FEATURES}
    settings = {name: value for name, value in (defaults | values).items() if value is not None}
    return [
        arm for arm in arms if all(arm.config['model'][name] == v for name, v in settings.items())
    ]


def _line(axes: Axes, arms: Sequence[runs.Arm], target: str, along: Any, **style: Any) -> None:
    """Draw means over seeds with their intervals."""
    points = []
    for arm in sorted(arms, key=along):
        if errors := arm.final_values(f'{METRIC}/{target}', SPLIT):
            estimate = statistics.estimate(errors, arm.label)
            points.append(
                (
                    along(arm),
                    estimate.mean,
                    estimate.low or estimate.mean,
                    estimate.high or estimate.mean,
                )
            )
    if points:
        x, mean, low, high = (np.array(values, float) for values in zip(*points, strict=True))
        axes.errorbar(
            x, mean, [np.maximum(mean - low, 0), np.maximum(high - mean, 0)],
            lw=1.1, ms=4, elinewidth=0.8, **style,
        )  # fmt: skip


def _styles() -> dict[str, dict[str, Any]]:
    colors = dict(zip(NAMES, (plots.GREY, *plots.PALETTE), strict=False))
    return {name: {'color': color, 'marker': '.'} for name, color in colors.items()}


def _depth(arm: runs.Arm) -> int:
    return int(arm.config['model']['depth'])


def _size(arm: runs.Arm) -> float:
    return arm.get_cost('parameters', 'model') or 0


def _by_depth(axes: Axes, arms: Sequence[runs.Arm], target: str, floors: Floors) -> None:
    for name, style in _styles().items():
        mixer_arms = [arm for arm in arms if mixer_name(arm) == name]
        _line(axes, select_arms(mixer_arms, depth=None), target, _depth, label=NAMES[name], **style)
        unordered_arms = select_arms(mixer_arms, depth=None, positions='none')
        style = style | {'marker': 'o', 'mfc': 'none', 'ls': ':'}
        label = f'{NAMES[name]}, no positions' if unordered_arms else None
        _line(axes, unordered_arms, target, _depth, label=label, **style)
    if floors.equivariant.get(target, 0) > 1e-3:
        axes.axhline(
            floors.equivariant[target], color=plots.INK, ls=(0, (4, 2)), lw=0.8,
            label='bound of functions without order',
        )  # fmt: skip


def _by_size(axes: Axes, arms: Sequence[runs.Arm], target: str, floors: Floors) -> None:
    for name, style in _styles().items():
        mixer_arms = [arm for arm in arms if mixer_name(arm) == name]
        _line(
            axes, select_arms(mixer_arms, features=None), target, _size, label=NAMES[name], **style
        )
        final_mixing_arms = select_arms(mixer_arms, features=None, depth=1, ends='mixer')
        style = style | {'marker': 's', 'mfc': 'none', 'ls': (0, (4, 1, 1, 1))}
        label = f'one {NAMES[name]} at the end' if final_mixing_arms else None
        _line(axes, final_mixing_arms, target, _size, label=label, **style)
    if floors.additive.get(target, 0) > 0.02:
        axes.axhline(
            floors.additive[target], color=plots.INK, ls=(0, (1, 1)), lw=0.8,
            label='bound of sums over tokens',
        )  # fmt: skip


def _predictions(arms: Sequence[runs.Arm], floors: Floors) -> str:
    """Tabulate what theory rules out, beside the lowest error of any seed and size."""
    rows: list[list[str]] = []

    def add_rows(network: str, is_orderless: bool, arms: list[runs.Arm], expected: str) -> None:
        bound = floors.equivariant if is_orderless else floors.additive
        for target in TARGETS:
            if bound.get(target, 0) < 0.02 or not arms:
                continue
            line = [network, target, f'{bound[target]:.3f}', expected]
            for seeds in SEEDS:
                gaps = [
                    floors.above[arm.label][target][seed] if is_orderless else error - bound[target]
                    for arm in arms
                    for seed, error in arm.final_values(f'{METRIC}/{target}', SPLIT).items()
                    if seed in seeds
                ]
                line.append(f'{min(gaps):+.4f}'.replace('-', '−') if gaps else tables.NONE)
            rows.append(line)

    # Functions without order, against the first bound.
    for name in ('attention', 'pairs, mi_low_rank'):
        mixer_arms = [arm for arm in arms if mixer_name(arm) == name]
        add_rows(
            f'{NAMES[name]}, no positions',
            True,
            select_arms(mixer_arms, depth=None, positions='none'),
            '0 or above',
        )
        add_rows(f'{NAMES[name]}, positions', True, select_arms(mixer_arms, depth=None), 'below 0')

    # Sums over tokens, against the second bound.
    for name in ('fixed', 'attention'):
        mixer_arms = [arm for arm in arms if mixer_name(arm) == name]
        final_mixing_arms = select_arms(mixer_arms, features=None, depth=1, ends='mixer')
        add_rows(
            f'one {NAMES[name]} at the end',
            False,
            final_mixing_arms,
            '0 or above' if name == 'fixed' else 'below 0',
        )
    fixed = [arm for arm in arms if mixer_name(arm) == 'fixed']
    fixed_arms = [
        *select_arms(fixed, features=None),
        *select_arms(fixed, depth=1),
        *select_arms(fixed, depth=3),
    ]
    add_rows('fixed mixings, a feed-forward layer last', False, fixed_arms, 'any')

    header = ['network', 'target', 'bound', 'error − bound, by theory']
    header += [f'least of seeds {s[0]} to {s[-1]}' for s in SEEDS]
    note = (
        'The first bound is that of functions without order, and errors above it are those on the '
        'same sequences in all orders, so that theory holds to rounding; the second is that of '
        'sums over tokens, from a sample, to about 0.005. Least of all sizes and seeds.'
    )
    return f'**Bounds**\n\n{tables.format_markdown(header, rows)}\n\n{note}'


def _errors(arms: Sequence[runs.Arm]) -> str:
    body = []
    for arm in arms:
        model = arm.config['model']
        kind = NAMES[mixer_name(arm)]
        kind += ', no positions' * (model['positions'] == 'none')
        kind += ', at the end' * (model['ends'] == 'mixer')
        line = [kind, *(str(model[name]) for name in ('depth', 'heads', 'features'))]
        line += [f'{_size(arm):,.0f}']
        for target in TARGETS:
            errors = arm.final_values(f'{METRIC}/{target}', SPLIT)
            line.append(_cell(statistics.estimate(errors, arm.label)) if errors else tables.NONE)
        body.append(line)
    header = ['mixer', 'mixers', 'heads', 'features', 'parameters']
    header += [f'{target} [95 %]' for target in TARGETS]
    return '**Errors**\n\n' + tables.format_markdown(header, body)


def _cell(estimate: statistics.Estimate) -> str:
    """Write the mean in two significant digits, as errors span four orders of magnitude."""
    digits = max(0, 1 - int(np.floor(np.log10(estimate.mean)))) if estimate.mean > 0 else 0
    return str(tables.format_interval(estimate, digits))
