"""Two sweeps of known numbers side by side."""

import json
import shutil
import subprocess
import sys

import pytest

from mi.config import UserError
from mi.report import compare, runs
from tests.report import synthetic

BEFORE = {'concat': synthetic.CONCAT, 'mi': synthetic.MI, 'film': {0: 2.0, 1: 3.0, 2: 4.0}}
# concat is as it was; every seed of mi is worse, in bits; film wins some and loses some.
AFTER = {
    'concat': synthetic.CONCAT,
    'mi': {seed: bits + 0.5 + seed / 8 for seed, bits in synthetic.MI.items()},
    'film': {0: 2.5, 1: 2.5, 2: 4.0},
}


def write(path, arms):
    for arm, final in arms.items():
        synthetic.make_run(path / arm, arm, final)
    synthetic.write_sweep(path, [{'name': arm, 'label': arm} for arm in arms])
    return path


@pytest.fixture
def sweeps(tmp_path):
    return write(tmp_path / 'before', BEFORE), write(tmp_path / 'after', AFTER)


def run_report(*flags):
    command = [sys.executable, '-m', 'mi.report', *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_arms_are_matched_by_label_and_seed(sweeps, capsys):
    baseline, candidate = sweeps
    comparisons = {arm.label: arm for arm in compare.compare_sweeps(baseline, candidate)}
    verdicts = {label: arm.verdict for label, arm in comparisons.items()}
    assert verdicts == {'concat': 'equal', 'mi': 'worse', 'film': 'no difference seen'}
    gap = comparisons['mi'].difference
    assert (gap.mean, gap.low, gap.high, gap.num_seeds) == (0.625, 0.5, 0.75, 3)
    assert comparisons['mi'].test.p == 0.25 and comparisons['mi'].test.p_holm == 0.5  # of two arms
    text = (candidate / 'report' / 'compare.md').read_text()
    assert '| mi | 2.7 [1.8, 3.8] | 3.3 [2.2, 4.5] | +0.6 [+0.5, +0.8] | 0.50 too few |' in text
    assert 'worse (n = 3) |' in text and 'Too few seeds' in text
    printed = capsys.readouterr().out
    assert 'equal: concat; worse: mi; no difference seen: film.' in printed


def test_higher_is_better_reverses_the_verdict(sweeps):
    for sweep in sweeps:
        synthetic.change_sweep(sweep, lower_is_better=False)
    comparisons = compare.compare_arms(*map(runs.read_sweep, sweeps))
    verdicts = {arm.label: arm.verdict for arm in comparisons}
    assert verdicts['mi'] == 'better'


def test_only_seeds_that_both_have_are_paired(sweeps):
    baseline, _ = sweeps
    file = baseline / 'mi' / 'metrics.jsonl'
    file.write_text(''.join(file.read_text().splitlines(True)[:-1]))  # seed 2 has no record
    mi = next(
        arm for arm in compare.compare_arms(*map(runs.read_sweep, sweeps)) if arm.label == 'mi'
    )
    assert (mi.difference.mean, mi.difference.num_seeds) == (0.5625, 2)


def test_arms_of_one_side_are_lost_or_new(sweeps, tmp_path):
    baseline, candidate = sweeps
    synthetic.make_run(candidate / 'gate', 'gate', synthetic.MI)
    shutil.rmtree(candidate / 'film')
    members = [{'name': arm, 'label': arm} for arm in ('concat', 'mi', 'film', 'gate')]
    synthetic.change_sweep(candidate, members=members)
    comparisons = compare.compare_sweeps(baseline, candidate, tmp_path / 'out')
    verdicts = {arm.label: arm.verdict for arm in comparisons}
    assert verdicts == {'concat': 'equal', 'mi': 'worse', 'film': 'lost', 'gate': None}
    text = (tmp_path / 'out' / 'compare.md').read_text()
    assert 'lost waiting in the candidate' in text and '— not in the baseline' in text


def test_an_arm_that_diverges_is_lost(sweeps, tmp_path):
    file = sweeps[1] / 'mi' / 'metrics.jsonl'
    file.write_text(file.read_text().replace('"bits_per_byte": 3.125', '"bits_per_byte": null'))
    comparisons = {arm.label: arm for arm in compare.compare_sweeps(*sweeps, tmp_path / 'out')}
    assert comparisons['mi'].verdict == 'lost' and compare.is_worse(comparisons['mi'])
    assert 'lost not finite in the candidate' in (tmp_path / 'out' / 'compare.md').read_text()


def test_changes_of_configs_and_costs_are_listed(sweeps):
    baseline, candidate = sweeps
    for arm in AFTER:
        config = candidate / arm / 'config.json'
        synthetic.change_json(config, model=json.loads(config.read_text())['model'] | {'width': 16})
    synthetic.change_json(candidate / 'mi' / 'cost.json', parameters={'model': 824690, 'fusion': 1})
    compare.compare_sweeps(baseline, candidate)
    text = (candidate / 'report' / 'compare.md').read_text()
    assert 'The configs differ: model.width = 8 → 16 (all arms).' in text
    assert '| 0.50 too few | 2 | 1 | 1 | worse' in text


def test_two_single_runs_are_matched_whatever_their_names(sweeps):
    baseline, candidate = sweeps
    (arm,) = compare.compare_arms(
        runs.read_sweep(baseline / 'mi'), runs.read_sweep(candidate / 'film')
    )
    assert (arm.label, arm.difference.num_seeds) == ('film', 3)


def test_sweeps_with_different_metrics_are_refused(sweeps):
    synthetic.change_sweep(sweeps[1], metric='nats_per_token')
    with pytest.raises(UserError, match="metric = 'nats_per_token': expected 'bits_per_byte'"):
        compare.compare_sweeps(*sweeps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('swapped', 'flags', 'code'),
    [(False, ['--fail_on_worse'], 1), (False, [], 0), (True, ['--fail_on_worse'], 0)],
)
def test_the_exit_code_says_whether_an_arm_is_worse(sweeps, swapped, flags, code):
    baseline, candidate = sweeps[::-1] if swapped else sweeps
    result = run_report(f'--baseline={baseline}', f'--candidate={candidate}', *flags)
    assert result.returncode == code
    assert result.stderr == ('error: worse or lost: mi\n' if code else '')


@pytest.mark.parametrize(
    ('seeds', 'message'),
    [
        ((2,), 'mi (one seed in common), film (one seed in common)'),
        ((), 'concat (no seed in common), mi (no seed in common), film (no seed in common)'),
    ],
)
def test_arms_without_a_verdict_fail_the_command(sweeps, seeds, message):
    """Of the candidate's seeds only these are the baseline's; of concat, seed 2 is equal."""
    baseline, candidate = sweeps
    for arm in AFTER:
        file = candidate / arm / 'metrics.jsonl'
        records = [json.loads(line) for line in file.read_text().splitlines()]
        for record in records:
            record['seed'] += 0 if record['seed'] in seeds else 10
        synthetic.write_lines(file, records)
    if seeds:  # a better one, that one seed does not show
        file = candidate / 'film' / 'metrics.jsonl'
        file.write_text(file.read_text().replace('"bits_per_byte": 4.0', '"bits_per_byte": 1.0'))
    result = run_report(f'--baseline={baseline}', f'--candidate={candidate}', '--fail_on_worse')
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    assert result.stderr.startswith(f'error: cannot be judged: {message}; expected ')
    comparisons = compare.compare_arms(*map(runs.read_sweep, sweeps))
    assert [arm.verdict for arm in comparisons] == (['equal', None, None] if seeds else [None] * 3)
    same = compare.compare_arms(runs.read_sweep(baseline), runs.read_sweep(baseline))
    assert not any(map(compare.explain_missing_verdict, same))


def test_a_baseline_without_values_fails_the_command(sweeps):
    baseline, candidate = sweeps
    for file in baseline.glob('*/metrics.jsonl'):
        file.unlink()
    result = run_report(f'--baseline={baseline}', f'--candidate={candidate}', '--fail_on_worse')
    assert result.returncode == 1
    assert result.stderr.startswith('error: nothing could be compared: no arm of the baseline ')


def test_a_missing_directory_is_named_by_its_flag(sweeps, tmp_path):
    with pytest.raises(UserError, match=r'--baseline=.*nowhere: .* it is not a directory'):
        compare.compare_sweeps(tmp_path / 'nowhere', sweeps[1])
    with pytest.raises(UserError, match=r'--candidate=.*: expected a sweep \(sweep\.json\)'):
        compare.compare_sweeps(sweeps[0], tmp_path)


def test_a_comparison_that_cannot_be_written_is_one_line(sweeps, tmp_path):
    (tmp_path / 'out' / 'compare.md').mkdir(parents=True)
    with pytest.raises(UserError, match=r'--out=.*/out: Is a directory\. Use another'):
        compare.compare_sweeps(*sweeps, tmp_path / 'out')


def test_a_baseline_without_a_candidate_is_refused(sweeps):
    result = run_report(f'--baseline={sweeps[0]}')
    assert result.returncode == 1 and '--candidate=DIRECTORY' in result.stderr
