"""The sentence of each comparison, from differences and p-values that are known exactly."""

import pytest

from mi.report import analysis, conclusions, html, runs, tables
from mi.report.tables import Cell
from tests.report import synthetic
from tests.report.test_tasks import BOTH, THREE, add, take_seeds
from tests.report.test_tasks import write as write_tasks

CONCAT = [2.0, 2.1, 2.3, 2.2, 2.4, 2.6, 2.5, 2.8]


def conclude(path, arms, **changes):
    """The sentences of a sweep; arms: {label: values of the seeds 0, 1, …}."""
    for label, values in arms.items():
        synthetic.make_run(path / label, label, dict(enumerate(values)))
        synthetic.change_json(path / label / 'config.json', seeds=list(range(len(values))))
    synthetic.write_sweep(path, [{'name': label} for label in arms], **changes)
    return conclude_sweep(path)


def conclude_sweep(path):
    sweep = runs.read_sweep(path)
    return conclusions.write_conclusions(sweep, analysis.compute_results(sweep))


def shift(values, *amounts):
    """The values plus the amounts, by turns."""
    return [value + amounts[i % len(amounts)] for i, value in enumerate(values)]


@pytest.mark.parametrize(('lower_is_better', 'verb'), [(True, 'beats'), (False, 'loses to')])
def test_eight_pairs_of_one_sign_are_settled(tmp_path, lower_is_better, verb):
    """Two of 2⁸ choices of signs are as far from zero: p = 1/128."""
    arms = {'concat': CONCAT, 'mi': shift(CONCAT, -0.5, -0.25)}
    (sentence,) = conclude(tmp_path, arms, lower_is_better=lower_is_better)
    assert sentence == f'mi {verb} concat by 0.38 bits per byte, p = 0.008, 8 seeds.'


def test_p_is_corrected_for_the_number_of_arms(tmp_path):
    """1/128 · 3 and · 2; with five pairs too few would be settled."""
    arms = {'concat': CONCAT, 'mi': shift(CONCAT, -0.5), 'film': shift(CONCAT, 0.25)}
    arms['gate'] = shift(CONCAT, 0.5, -0.5)
    mi, film, gate = conclude(tmp_path, arms)
    assert mi == 'mi beats concat by 0.50 bits per byte, p = 0.023, 8 seeds.'
    assert film == 'film loses to concat by 0.25 bits per byte, p = 0.023, 8 seeds.'
    assert gate == (
        'gate and concat: not settled, a difference of +0.00 bits per byte, p = 1.00, 8 seeds.'
    )


def test_the_table_marks_no_comparison_that_is_settled(tmp_path):
    """Holm multiplies the second p, 1/32 of six seeds, by one."""
    arms = {'concat': CONCAT, 'mi': shift(CONCAT, -0.5), 'film': shift(CONCAT[:6], -0.25)}
    _, film = conclude(tmp_path, arms)
    assert film == 'film beats concat by 0.25 bits per byte, p = 0.031, 6 seeds.'
    results = analysis.compute_results(runs.read_sweep(tmp_path))
    assert tables.format_test(results[2].test) == Cell('0.031', '', 2 / 2**6)
    assert html._verdict_class(results[2], Cell('better')) == 'good'


def test_an_interval_that_excludes_zero_does_not_settle_a_comparison(tmp_path):
    """Six pairs, one of the other sign: 4 of 2⁶ choices are as far, p = 0.0625 and no less."""
    arms = {'concat': CONCAT[:6], 'mi': [2.0 - 0.5, 2.1 - 0.5, 2.3 - 0.5, 1.7, 1.9, 2.6 + 0.1]}
    (sentence,) = conclude(tmp_path, arms)
    results = analysis.compute_results(runs.read_sweep(tmp_path))
    assert results[1].verdict == 'better' and results[1].test.p == 4 / 2**6
    assert sentence == (
        'mi and concat: not settled, a difference of −0.40 bits per byte, p = 0.062, 6 seeds.'
    )


@pytest.mark.parametrize(
    ('num_seeds', 'num_arms', 'tail'),
    [
        (1, 1, '1 seed; expected at least 6.'),
        (5, 1, '5 seeds; expected at least 6.'),
        (6, 3, '6 seeds; expected at least 7.'),
    ],
)
def test_too_few_seeds_are_named_with_how_many_it_takes(tmp_path, num_seeds, num_arms, tail):
    arms = {'concat': CONCAT[:num_seeds]}
    arms |= {f'mi{i}': shift(CONCAT[:num_seeds], -0.5) for i in range(num_arms)}
    for sentence in conclude(tmp_path, arms):
        assert 'not settled, a difference of −0.5' in sentence and sentence.endswith(tail)


def test_tasks_with_separate_runs_count_as_pairs(tmp_path):
    arms = {'concat': take_seeds(THREE, 2), 'mi': take_seeds(THREE, 2, shift=1)}
    (sentence,) = conclude_sweep(write_tasks(tmp_path, arms))
    assert sentence == 'mi beats concat by 1.0 return, p = 0.031, 2 seeds of 3 tasks each.'


def test_an_arm_that_cannot_be_compared_has_no_sentence(tmp_path):
    arms = {'concat': BOTH, 'mi': {'Pong': add(BOTH['Pong'], 500)}}
    assert conclude_sweep(write_tasks(tmp_path / 'tasks', arms)) == []
    assert conclude(tmp_path / 'alone', {'mi': CONCAT}, baseline=None) == []
