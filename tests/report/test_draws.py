"""Ranks in each set of seeds, on a sweep of known numbers."""

import itertools
import json

import pytest
import scipy.stats

from mi import report
from mi.report import rankings, runs

FINALS = {  # arm → seed → error
    'concat': {0: 3.0, 1: 5.0, 7: 4.0, 9: 4.0},
    'mi': {0: 1.0, 1: 2.0, 7: 1.0, 9: 2.4},
    'film': {0: 2.0, 1: 3.0, 7: 5.0, 9: 4.4},
}


def write(workdir, sets, finals=FINALS):
    members = []
    for (arm, arm_finals), seeds in itertools.product(finals.items(), sets):
        path = workdir / f'{arm},{seeds}'
        path.mkdir(parents=True)
        (path / 'config.json').write_text(json.dumps({'seeds': seeds}))
        (path / 'status.json').write_text(json.dumps({'state': 'done', 'step': 1}))
        rows = [
            {'step': 1, 'seed': seed, 'split': 'eval', 'error': arm_finals[seed]} for seed in seeds
        ]
        (path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
        members.append({'name': path.name, 'label': arm})
    spec = {'name': 'a', 'metric': 'error', 'split': 'eval', 'lower_is_better': True}
    (workdir / 'sweep.json').write_text(json.dumps(spec | {'baseline': None, 'members': members}))
    return workdir


def test_each_set_has_its_means_and_ranks(tmp_path):
    report.write(write(tmp_path, ([0, 1], [7, 9])))
    lines = (tmp_path / 'report/draws.md').read_text().splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[:5]]
    assert header[1].startswith('error, seeds 0 to 1') and header[3].startswith('error, seeds 7, 9')
    table = {row[0]: (float(row[1].split()[0]), row[2], float(row[3].split()[0]), row[4])
             for row in rows}  # fmt: skip
    assert table == {
        'concat': (4.0, '3', 4.0, '2'), 'mi': (1.5, '1', 1.7, '1'), 'film': (2.5, '2', 4.7, '3')
    }  # fmt: skip
    tau = scipy.stats.kendalltau([4.0, 1.5, 2.5], [4.0, 1.7, 4.7]).statistic
    assert tau == pytest.approx(1 / 3) and lines[-1].endswith(f'{tau:.2f}.')


def test_higher_is_better_reverses_the_ranks(tmp_path):
    write(tmp_path, ([0, 1], [7, 9]))
    file = tmp_path / 'sweep.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {'lower_is_better': False}))
    lines = rankings.to_markdown(runs.read_sweep(tmp_path)).splitlines()
    ranks = [[cell.strip() for cell in line.strip('|').split('|')][2::2] for line in lines[2:5]]
    assert ranks == [['1', '2'], ['3', '3'], ['2', '1']]


def test_arms_that_are_alike_have_the_same_rank(tmp_path):
    finals = FINALS | {'gate': FINALS['film']}
    text = rankings.to_markdown(runs.read_sweep(write(tmp_path, ([0, 1], [7, 9]), finals)))
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines()]
    ranks = {row[0]: row[2::2] for row in rows[2:6]}
    assert ranks == {'concat': ['4', '2'], 'mi': ['1', '1'], 'film': ['2', '3'], 'gate': ['2', '3']}


def test_an_arm_that_diverged_is_named_and_not_ranked(tmp_path):
    finals = FINALS | {'gate': {0: 0.1, 1: None, 7: 0.1, 9: 0.1}}
    text = rankings.to_markdown(runs.read_sweep(write(tmp_path, ([0, 1], [7, 9]), finals)))
    lines = text.splitlines()
    assert [line.split('|')[3].strip() for line in lines[2:5]] == ['3', '1', '2']
    assert lines[-1] == 'Not ranked, because a seed is not finite: gate.' and '| gate' not in text


@pytest.mark.parametrize('sets', [([0, 1, 7, 9],), ([0], [1], [7])])
def test_one_set_or_single_seeds_have_no_rankings(tmp_path, sets):
    report.write(write(tmp_path, sets))
    assert not (tmp_path / 'report/draws.md').exists()


def test_nothing_is_ranked_before_every_arm_has_every_seed(tmp_path):
    write(tmp_path, ([0, 1], [7, 9]))
    (tmp_path / 'mi,[7, 9]/status.json').write_text(json.dumps({'state': 'running', 'step': 0}))
    report.write(tmp_path)
    assert not (tmp_path / 'report/draws.md').exists()


def test_arms_of_different_problems_are_not_ranked_with_each_other(tmp_path):
    """Two arms in one system, and with ten times the errors in another."""
    small = {'a': {0: 1.0, 1: 1.0, 7: 1.0, 9: 1.0}, 'b': {0: 2.0, 1: 2.0, 7: 0.5, 9: 0.5}}
    large = {
        arm: {seed: 10 * error for seed, error in values.items()} for arm, values in small.items()
    }
    finals = {
        f'{arm}, {system}': values
        for system, arms in (('x', small), ('y', large))
        for arm, values in arms.items()
    }
    write(tmp_path, ([0, 1], [7, 9]), finals)
    file = tmp_path / 'sweep.json'
    spec = json.loads(file.read_text())
    for member in spec['members']:
        member['overrides'] = {'system': member['label'][-1]}
    file.write_text(json.dumps(spec | {'problems': ['system']}))
    report.write(tmp_path)
    text = (tmp_path / 'report/draws.md').read_text()
    lines = [line for line in text.splitlines() if line.startswith('| a, y ')]
    assert [cell.strip() for cell in lines[0].strip('|').split('|')][2::2] == ['1', '2']
    assert text.count(': -1.00.') == 2 and '**x**' in text and '**y**' in text
    table = (tmp_path / 'report/table.md').read_text().splitlines()
    bold = [line.split('|')[1].strip() for line in table if '| **' in line]
    assert bold == ['a, x', 'a, y']  # the best of each
