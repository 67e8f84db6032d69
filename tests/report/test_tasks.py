"""Sweeps in which each task has runs of its own, of known numbers."""

import json

import numpy as np
import pytest

from mi import report
from mi.report import analysis, compare, runs, statistics
from tests.report import synthetic

PONG, BREAKOUT = {0: 10.0, 1: 12.0, 2: 11.0}, {0: 100.0, 1: 101.0, 2: 105.0}
BOTH = {'Pong': PONG, 'Breakout': BREAKOUT}


def add(values, shift):
    return {seed: value + shift for seed, value in values.items()}


def write(path, scores, baseline='concat'):
    """{arm: {task: {seed: return}}}, at step 20; half of it at step 10."""
    members = []
    for arm, arm_scores in scores.items():
        for task, seed_values in arm_scores.items():
            run = path / f'{arm},{task}'
            synthetic.make_run(run, arm, {})
            synthetic.write_lines(run / 'metrics.jsonl', [
                {'step': step, 'seed': seed, 'split': 'eval'}
                | {'return': value if value is None else value * step / 20}
                for step in (10, 20)
                for seed, value in seed_values.items()
            ])  # fmt: skip
            synthetic.change_json(run / 'config.json', seeds=list(seed_values))
            members.append({'name': run.name, 'label': arm, 'task': task})
    settings = {'metric': 'return', 'split': 'eval', 'curves': 'eval', 'lower_is_better': False}
    synthetic.write_sweep(path, members, baseline=baseline, **settings)
    return path


def bold(path):
    lines = synthetic.read_text(path, 'table.md').splitlines()
    return [line.split('|')[1].strip() for line in lines if '| **' in line]


@pytest.mark.usefixtures('svg_files')
def test_an_arm_of_fewer_tasks_is_not_compared(tmp_path):
    """mi has learned Pong alone, and better than concat has; its mean is that of an easier set."""
    gate = {task: add(values, 2) for task, values in BOTH.items()}
    write(tmp_path, {'concat': BOTH, 'mi': {'Pong': add(PONG, 500)}, 'gate': gate})
    report.write(tmp_path)
    rows = synthetic.read_table(tmp_path)
    columns = ('difference_mean', 'p', 'verdict', 'improvement_mean', 'equal_time_mean')
    assert [rows['mi'][key] for key in columns] == [''] * 5
    assert float(rows['mi']['mean']) == 511.0
    assert rows['mi']['remarks'] == 'mi learned 1 of 2 tasks: not compared'
    assert (float(rows['gate']['difference_mean']), rows['gate']['verdict']) == (2.0, 'better')
    assert float(rows['gate']['p_holm']) == 2 / 2**6  # of six pairs, and one arm
    assert bold(tmp_path) == ['gate']
    assert '<!-- mi -->' not in synthetic.read_text(tmp_path, 'pareto.svg')
    page = synthetic.read_text(tmp_path)
    data = json.loads(page.partition('id="data">')[2].partition('</script>')[0])
    assert [any(arm['costs'].values()) for arm in data['arms']] == [True, False, True]


def test_scores_that_move_between_tasks_are_not_equal(tmp_path):
    """The mean over both tasks is the same, and each of them has the scores of the other."""
    swapped = {'Pong': BREAKOUT, 'Breakout': PONG}
    sweeps = [
        runs.read_sweep(write(tmp_path / name, {'concat': scores}))
        for name, scores in (('before', BOTH), ('after', swapped))
    ]
    (comparison,) = compare.compare_arms(*sweeps)
    assert comparison.difference.mean == 0 and comparison.test.p == 1
    assert comparison.verdict == 'no difference seen'
    (comparison,) = compare.compare_arms(sweeps[0], sweeps[0])
    assert (comparison.verdict, comparison.test) == ('equal', None)


def test_rates_of_several_runs_are_weighted_by_their_seconds(tmp_path):
    """300 tokens in 1 s, and as many in 3 s."""
    write(tmp_path, {'concat': BOTH})
    for task, seconds in (('Pong', 1.0), ('Breakout', 3.0)):
        record = {'step': 20, 'seconds': seconds, 'tokens_per_second': 300 / seconds}
        record |= {'mfu': 0.3 / seconds, 'queue': seconds}
        synthetic.write_lines(tmp_path / f'concat,{task}' / 'timing.jsonl', [record])
    (arm,) = runs.read_sweep(tmp_path).arms
    expected = {'step': 20, 'seconds': 2.0, 'tokens_per_second': 150.0, 'mfu': 0.15, 'queue': 2.0}
    assert arm.timing == [pytest.approx(expected)]
    assert arm.throughput('token') == pytest.approx(150.0)


def test_without_a_baseline_the_arms_of_all_tasks_are_compared(tmp_path):
    write(tmp_path, {'concat': BOTH, 'mi': {'Pong': add(PONG, 500)}}, baseline=None)
    report.write(tmp_path)
    assert bold(tmp_path) == ['concat']
    assert (
        synthetic.read_table(tmp_path)['mi']['remarks'] == 'mi learned 1 of 2 tasks: not compared'
    )


def test_arms_of_one_task_each_are_not_compared_where_it_is_another(tmp_path):
    write(tmp_path, {'concat': {'Pong': PONG}, 'mi': {'Breakout': BREAKOUT}})
    concat, mi = analysis.compute_results(runs.read_sweep(tmp_path))
    assert (mi.difference, mi.test, mi.verdict, mi.summary.improvement) == (None,) * 4
    assert mi.remarks == ['mi learned other tasks: not compared'] and concat.remarks == []


def test_the_tasks_are_paired_in_whatever_order_the_members_come(tmp_path):
    turned = {task: add(BOTH[task], 1) for task in ('Breakout', 'Pong')}
    write(tmp_path, {'concat': BOTH, 'mi': turned})
    _, mi = analysis.compute_results(runs.read_sweep(tmp_path))
    assert (mi.difference.mean, mi.difference.low, mi.difference.high) == (1, 1, 1)
    assert mi.test.p == 2 / 2**6 and mi.summary.tasks == ('Pong', 'Breakout')


def test_every_interval_draws_the_runs_of_each_task_on_their_own(tmp_path):
    """Also at equal time, and of the difference where an arm lacks a seed."""
    rng = np.random.default_rng(0)
    scores = {
        arm: {task: dict(enumerate(rng.normal(size=seeds).tolist())) for task in BOTH}
        for arm, seeds in (('concat', 6), ('mi', 5))
    }
    write(tmp_path, scores)
    read = runs.read_sweep(tmp_path)
    _, mi = analysis.compute_results(read)
    theirs, ours = (
        np.array([list(values.values()) for values in scores[arm].values()]).T for arm in scores
    )
    assert mi.metric == statistics.bootstrap_runs(ours, statistics.mean)
    assert mi.difference == statistics.bootstrap_runs(ours - theirs[:5], statistics.mean)
    assert mi.test.p == statistics.sign_flip_test((ours - theirs[:5]).ravel()).p
    assert mi.equal_time == mi.metric
    late = tmp_path / 'mi,Pong' / 'timing.jsonl'  # concat is done when mi has made half its steps
    synthetic.write_lines(late, [{'step': 20, 'seconds': 24.0}])
    _, mi = analysis.compute_results(runs.read_sweep(tmp_path))
    assert mi.equal_time == statistics.bootstrap_runs(ours / 2, statistics.mean)


def test_a_task_that_diverged_leaves_its_arm_without_a_mean(tmp_path):
    write(tmp_path, {'concat': BOTH, 'mi': {'Pong': PONG, 'Breakout': BREAKOUT | {1: None}}})
    _, mi = analysis.compute_results(runs.read_sweep(tmp_path))
    assert (mi.metric, mi.difference, mi.verdict, mi.summary) == (None,) * 4
    assert mi.remarks == ['mi: the value of seed 1 is nan; no mean']


@pytest.mark.parametrize(
    ('scores', 'verdict', 'reason'),
    [({'Pong': add(PONG, 500)}, None, 'learned 1 of 2 tasks'), (BOTH, 'equal', '')],
)
def test_two_sweeps_of_other_tasks_are_not_compared(tmp_path, scores, verdict, reason):
    baseline = write(tmp_path / 'before', {'mi': BOTH}, baseline=None)
    candidate = write(tmp_path / 'after', {'mi': scores}, baseline=None)
    (pair,) = compare.compare_arms(runs.read_sweep(baseline), runs.read_sweep(candidate))
    assert pair.verdict == verdict
    assert compare.explain_missing_verdict(pair) == reason


THREE = BOTH | {'Qbert': {0: 7.0, 1: 8.0, 2: 9.0}}


def take_seeds(tasks, seeds, shift=0.0):
    return {
        task: {seed: values[seed] + shift for seed in range(seeds)}
        for task, values in tasks.items()
    }


def test_the_warning_of_too_few_seeds_counts_pairs_of_task_and_seed(tmp_path):
    """Three pairs of one seed have p = 0.25 at least; six of two seeds have 0.031."""
    write(tmp_path, {'concat': take_seeds(THREE, 1), 'mi': take_seeds(THREE, 1, shift=1)})
    read = runs.read_sweep(tmp_path)
    tests = [result.test for result in analysis.compute_results(read)]
    assert (tests[1].num_pairs, tests[1].pairs_per_seed, tests[1].min_p) == (3, 3, 0.25)
    assert statistics.warn_too_few_seeds(tests) == (
        'Too few seeds to call any difference significant: with 3 pairs even differences that all '
        'agree in sign have p = 0.25. 2 seeds of 3 tasks each are the fewest that can reach 0.05.'
    )
    report.write(tmp_path)
    assert synthetic.read_table(tmp_path)['mi']['difference_pairs'] == '3'


def test_the_number_of_seeds_in_the_warning_is_enough(tmp_path):
    write(tmp_path, {'concat': take_seeds(THREE, 2), 'mi': take_seeds(THREE, 2, shift=1)})
    result = analysis.compute_results(runs.read_sweep(tmp_path))[1]
    assert result.test.p == 2 / 2**6 and result.test.can_be_significant
    assert statistics.warn_too_few_seeds([result.test]) is None


@pytest.mark.parametrize('seeds', [1, 2])
def test_two_sweeps_of_tasks_count_their_pairs_too(tmp_path, seeds):
    old, new = (
        write(tmp_path / name, {'mi': take_seeds(THREE, seeds, shift)}, baseline=None)
        for name, shift in (('before', 0), ('after', 1))
    )
    compare.compare_sweeps(old, new)
    notes = (new / 'report' / 'compare.md').read_text()
    assert ('2 seeds of 3 tasks each are the fewest' in notes) == (seeds == 1)
    assert ('Too few seeds' in notes) == (seeds == 1)


def test_the_joined_record_of_tasks_is_their_mean(tmp_path):
    """Of the curve as of the final value, of every step and seed; null where a task is."""
    write(tmp_path, {'mi': {'Pong': PONG, 'Breakout': BREAKOUT | {1: None}}}, baseline=None)
    (arm,) = runs.read_sweep(tmp_path).arms
    steps, values = arm.curve('return', 'eval')
    assert steps.tolist() == [10, 20]
    np.testing.assert_array_equal(values, [[27.5, 55.0], [np.nan, np.nan], [29.0, 58.0]])
    final = arm.final_values('return', 'eval')
    assert (final[0], final[2]) == (55.0, 58.0) and np.isnan(final[1])


def test_scores_of_tasks_are_those_of_the_seeds_that_are_finite_in_all(tmp_path):
    """One agent that learns both tasks, and whose second seed is not finite in one of them."""
    run = tmp_path / 'run'
    synthetic.make_run(run, 'mi', {})
    synthetic.write_lines(run / 'metrics.jsonl', [
        {'step': 20, 'seed': seed, 'split': 'eval', 'return': 1.0 + seed}
        | {'return/a': seed, 'return/b': score}
        for seed, score in enumerate([4.0, None, 6.0])
    ])  # fmt: skip
    settings = {'metric': 'return', 'split': 'eval', 'curves': 'eval', 'lower_is_better': False}
    synthetic.write_sweep(tmp_path, [{'name': 'run', 'label': 'mi'}], baseline=None, **settings)
    read = runs.read_sweep(tmp_path)
    tasks, scores = read.arms[0].scores('return', 'eval')
    assert tasks == ('a', 'b')
    np.testing.assert_array_equal(scores, [[0, 4], [2, 6]])
    (result,) = analysis.compute_results(read)
    assert (result.task_summary.median.mean, result.task_summary.iqm.mean) == (3.0, 3.0)
    assert np.isfinite([result.task_summary.median.low, result.task_summary.iqm.high]).all()
