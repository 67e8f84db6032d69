"""Figures: what they leave out, and that no two ticks, colors or names in them are alike."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.figures import panels
from mi import report
from mi.report import analysis, plots, runs
from mi.report.figures import Curve, _draw_pareto, _later_half_limits
from tests.report import synthetic


def curve(*values):
    mean = np.array(values)
    return Curve(np.arange(1, len(values) + 1), mean, mean - 0.01, mean + 0.01, False)


def test_early_losses_that_would_hide_the_end_are_cut_off():
    low, high = _later_half_limits([curve(9.0, 4.0, 2.2, 2.0), curve(9.0, 5.0, 2.4, 2.1)])
    # Steps 2 to 4 are the later half: from 1.99 to 5.01, of a whole range up to 9.01.
    assert (low, high) == pytest.approx((1.99 - 0.08 * 3.02, 5.01 + 0.08 * 3.02))


def test_a_score_that_was_lower_at_first_is_shown_whole():
    low, high = _later_half_limits([curve(0.10, 0.05, 0.20, 0.30, 0.40)])
    assert low < 0.04 and high > 0.41


def test_a_flat_curve_has_a_margin():
    low, high = _later_half_limits([Curve(np.array([1]), *[np.array([2.0])] * 3, False)])
    assert low < 2 < high


def test_every_problem_has_a_front_of_its_own(tmp_path):
    synthetic.write_problems(tmp_path)
    sweep = runs.read_sweep(tmp_path)
    figure = _draw_pareto(sweep, analysis.compute_results(sweep))
    fronts = [
        line.get_xydata().tolist()
        for line in figure.axes[0].lines
        if line.get_drawstyle() == 'steps-post'
    ]
    assert fronts == [[[100, 0.125], [200, 0.0625]], [[150, 5.0], [250, 3.0]]]


@pytest.mark.parametrize(
    ('values', 'expected'),
    [
        ([429_500, 429_750, 430_000], ['429.50k', '429.75k', '430.00k']),
        ([430_000, 430_500], ['430.0k', '430.5k']),
        ([1_234_567, 1_234_568], ['1.234567M', '1.234568M']),
        ([0, 500, 1000, 1500], ['0', '500', '1000', '1500']),
        ([-2e6, 0, 2e6], ['−2M', '0', '2M']),
        ([0, 2.5, 5], ['0', '2.5', '5.0']),
        ([0, 1e-5], ['0', '0.00001']),
        ([3e9], ['3G']),
        ([0.0], ['0']),
        ([], []),
    ],
)
def test_ticks_have_one_unit_and_the_digits_that_tell_them_apart(values, expected):
    assert plots.format_ticks(values) == expected


@pytest.mark.parametrize('low', [0, 1, 1234, 429_720, 1.5e9])
@pytest.mark.parametrize('span', [1, 7, 430, 1e5])
def test_no_two_ticks_are_alike(low, span):
    axes = Figure().subplots()
    axes.plot([low, low + span], [0, 1])
    plots.set_round_ticks(axes, 4, integer=True)
    axes.figure.draw_without_rendering()
    words = [tick.get_text() for tick in axes.get_xticklabels()]
    assert len(words) == len(set(words)) > 1
    assert all(tick == round(tick) for tick in axes.get_xticks())


@pytest.mark.parametrize('ends', [(2, 8), (0.5, 3), (1.1, 1.3), (1e-9, 1), (3e-4, 2e5), (1, 1e12)])
def test_a_logarithmic_axis_has_a_few_ticks_that_show_their_value(ends):
    axes = Figure().subplots()
    axes.plot([0, 1], ends)
    axes.set_yscale('log')
    panels.set_power_ticks(axes.yaxis)
    axes.figure.draw_without_rendering()
    low, high = axes.get_ylim()
    texts = [label.get_text() for label in axes.get_yticklabels()]
    ticks = {y: text for y, text in zip(axes.get_yticks(), texts, strict=True) if low <= y <= high}
    assert 3 <= len(ticks) <= 9
    digits = str.maketrans('⁻⁰¹²³⁴⁵⁶⁷⁸⁹', '-0123456789')
    for value, label in ticks.items():
        mantissa, _, exponent = label.rpartition('10')
        number = float(mantissa.rstrip('·') or 1) * 10.0 ** int(exponent.translate(digits))
        assert number == pytest.approx(value, rel=1e-3)


def test_no_two_arms_have_the_same_color():
    styles = [plots.make_style(i) for i in range(300)]
    assert [style.color for style in styles[:6]] == list(plots.PALETTE)
    assert len({style.color for style in styles}) == 300
    # Shades of one color are told apart by their dashes, and points by their markers.
    assert len({(i % 6, style.dashes) for i, style in enumerate(styles[:24])}) == 24
    assert len({(i % 6, style.marker) for i, style in enumerate(styles[:24])}) == 24
    styles = panels.assign_styles(
        [f'arm {i}' for i in range(30)], grey=[f'grey {i}' for i in range(12)]
    )
    assert len(set(styles.values())) == len(styles) == 42


def test_the_arms_of_a_page_have_colors_of_their_own(tmp_path):
    names = [f'arm {i}' for i in range(20)]
    for name in names:
        synthetic.make_run(tmp_path / name, name, synthetic.MI)
    synthetic.write_sweep(tmp_path, [{'name': name} for name in names], baseline=names[0])
    report.write(tmp_path)
    data = synthetic.read_text(tmp_path).partition('id="data">')[2].partition('</script>')[0]
    assert len({arm['color'] for arm in json.loads(data)['arms']}) == 20


def test_names_that_are_cut_stay_apart():
    prefix = 'transformer with many words, '
    names = [f'{prefix}{label}{" and what all of them end with" * 2}' for label in ('film', 'gate')]
    names += ['short', '_hidden', 'two  spaces', 'two spaces', f'{prefix} a different, long end']
    labels = plots.shorten_labels(names)
    assert len(set(labels.values())) == len(labels) == 7
    assert all(len(label) <= plots.LONGEST for label in labels.values())
    assert 'film' in labels[names[0]] and 'gate' in labels[names[1]]
    assert (labels['short'], labels['_hidden']) == ('short', '_hidden')


@pytest.mark.usefixtures('svg_files')
def test_an_arm_whose_name_begins_with_an_underscore_is_in_every_legend(tmp_path):
    for name in ('_mi', 'concat'):
        synthetic.make_run(tmp_path / name, name, {})
        scores = {'bits_per_byte': 2.0, 'bits_per_byte/a': 1.0, 'bits_per_byte/b': 3.0}
        records = [{'step': 20, 'seed': seed, 'split': 'test'} | scores for seed in (0, 1)]
        synthetic.write_lines(tmp_path / name / 'metrics.jsonl', records)
    members = [{'name': name} for name in ('_mi', 'concat')]
    synthetic.write_sweep(tmp_path, members, baseline=None, curves='test')
    report.write(tmp_path)
    for figure in ('curves', 'pareto', 'tasks'):
        assert '<!-- _mi -->' in synthetic.read_text(tmp_path, f'{figure}.svg'), figure
