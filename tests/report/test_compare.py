"""Two sweeps of known numbers side by side."""

import json
import shutil
import subprocess
import sys

import pytest

from mi.config import UserError
from mi.report import compare, runs
from tests.report import test_report as made

BEFORE = {'concat': made.CONCAT, 'mi': made.MI, 'film': {0: 2.0, 1: 3.0, 2: 4.0}}
# concat is as it was; every seed of mi is worse, in bits; film wins some and loses some.
AFTER = {
    'concat': made.CONCAT,
    'mi': {seed: bits + 0.5 + seed / 8 for seed, bits in made.MI.items()},
    'film': {0: 2.5, 1: 2.5, 2: 4.0},
}


def write(path, arms):
    for arm, final in arms.items():
        made.make_run(path / arm, arm, final)
    made.write_sweep(path, [{'name': arm, 'label': arm} for arm in arms])
    return path


@pytest.fixture
def sweeps(tmp_path):
    return write(tmp_path / 'before', BEFORE), write(tmp_path / 'after', AFTER)


def test_arms_are_matched_by_label_and_seed(sweeps, capsys):
    before, after = sweeps
    found = {pair.label: pair for pair in compare.compare(before, after)}
    verdicts = {label: pair.verdict for label, pair in found.items()}
    assert verdicts == {'concat': 'equal', 'mi': 'worse', 'film': 'no difference seen'}
    gap = found['mi'].difference
    assert (gap.mean, gap.low, gap.high, gap.n) == (0.625, 0.5, 0.75, 3)
    assert found['mi'].test.p == 0.25 and found['mi'].test.holm == 0.5  # of two arms
    text = (after / 'report' / 'compare.md').read_text()
    assert '| mi | 2.7 [1.8, 3.8] | 3.3 [2.2, 4.5] | +0.6 [+0.5, +0.8] | 0.50 too few |' in text
    assert 'worse (n = 3) |' in text and 'Too few seeds' in text
    printed = capsys.readouterr().out
    assert 'equal: concat; worse: mi; no difference seen: film.' in printed


def test_where_higher_is_better_the_verdict_turns(sweeps):
    for sweep in sweeps:
        made.change(sweep, lower_is_better=False)
    found = {p.label: p.verdict for p in compare.pairs(*map(runs.read, sweeps))}
    assert found['mi'] == 'better'


def test_only_seeds_that_both_have_are_paired(sweeps):
    before, _ = sweeps
    file = before / 'mi' / 'metrics.jsonl'
    file.write_text(''.join(file.read_text().splitlines(True)[:-1]))  # seed 2 has no record
    mi = next(p for p in compare.pairs(*map(runs.read, sweeps)) if p.label == 'mi')
    assert (mi.difference.mean, mi.difference.n) == (0.5625, 2)


def test_arms_that_one_side_has_not_are_lost_or_new(sweeps, tmp_path):
    before, after = sweeps
    made.make_run(after / 'gate', 'gate', made.MI)
    shutil.rmtree(after / 'film')
    members = [{'name': arm, 'label': arm} for arm in ('concat', 'mi', 'film', 'gate')]
    made.change(after, members=members)
    found = compare.compare(before, after, tmp_path / 'out')
    verdicts = {pair.label: pair.verdict for pair in found}
    assert verdicts == {'concat': 'equal', 'mi': 'worse', 'film': 'lost', 'gate': None}
    text = (tmp_path / 'out' / 'compare.md').read_text()
    assert 'lost missing in the candidate' in text and '— not in the baseline' in text


def test_an_arm_that_diverges_is_lost(sweeps, tmp_path):
    file = sweeps[1] / 'mi' / 'metrics.jsonl'
    file.write_text(file.read_text().replace('"bits_per_byte": 3.125', '"bits_per_byte": null'))
    found = {p.label: p for p in compare.compare(*sweeps, tmp_path / 'out')}
    assert found['mi'].verdict == 'lost' and compare.is_worse(found['mi'])
    assert 'lost not finite in the candidate' in (tmp_path / 'out' / 'compare.md').read_text()


def test_what_differs_in_configs_and_costs_is_said(sweeps):
    before, after = sweeps
    for arm in AFTER:
        config = after / arm / 'config.json'
        made.change_json(config, model=json.loads(config.read_text())['model'] | {'width': 16})
    made.change_json(after / 'mi' / 'cost.json', parameters={'model': 824690, 'fusion': 1})
    compare.compare(before, after)
    text = (after / 'report' / 'compare.md').read_text()
    assert 'The configs differ: model.width = 8 → 16 (all arms).' in text
    assert '| 0.50 too few | 2 | 1 | 1 | worse' in text


def test_two_single_runs_are_matched_whatever_their_names(sweeps):
    before, after = sweeps
    found = compare.pairs(runs.read(before / 'mi'), runs.read(after / 'film'))
    assert [(p.label, p.difference.n) for p in found] == [('film', 3)]


def test_sweeps_that_measure_other_things_are_refused(sweeps):
    made.change(sweeps[1], metric='nats_per_token')
    with pytest.raises(UserError, match="its metric is 'nats_per_token' and that of the baseline"):
        compare.compare(*sweeps)


@pytest.mark.parametrize(
    ('swapped', 'flags', 'code'),
    [(False, ['--fail_on_worse'], 1), (False, [], 0), (True, ['--fail_on_worse'], 0)],
)
def test_the_exit_code_says_whether_an_arm_is_worse(sweeps, swapped, flags, code):
    before, after = sweeps[::-1] if swapped else sweeps
    command = [sys.executable, '-m', 'mi.report', f'--baseline={before}', f'--candidate={after}']
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stderr == ('error: worse or lost: mi\n' if code else '')


@pytest.mark.parametrize(
    ('seeds', 'message'),
    [
        ((2,), 'mi (one seed in common), film (one seed in common)'),
        ((), 'concat (no seed in common), mi (no seed in common), film (no seed in common)'),
    ],
)
def test_what_cannot_be_judged_has_not_passed(sweeps, seeds, message):
    """Of the candidate's seeds only these are the baseline's; of concat, seed 2 is equal."""
    before, after = sweeps
    for arm in AFTER:
        file = after / arm / 'metrics.jsonl'
        records = [json.loads(line) for line in file.read_text().splitlines()]
        records = [r | {'seed': r['seed'] + 10 * (r['seed'] not in seeds)} for r in records]
        made.lines(file, records)
    if seeds:  # a better one, that one seed does not show
        file = after / 'film' / 'metrics.jsonl'
        file.write_text(file.read_text().replace('"bits_per_byte": 4.0', '"bits_per_byte": 1.0'))
    command = [sys.executable, '-m', 'mi.report', f'--baseline={before}', f'--candidate={after}']
    done = subprocess.run([*command, '--fail_on_worse'], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert done.stderr.startswith(f'error: cannot be judged: {message}; expected ')
    found = compare.pairs(*map(runs.read, sweeps))
    assert [pair.verdict for pair in found] == (['equal', None, None] if seeds else [None] * 3)
    assert not any(map(compare.why_not, compare.pairs(runs.read(before), runs.read(before))))


def test_a_baseline_without_values_passes_nobody(sweeps):
    before, after = sweeps
    for file in before.glob('*/metrics.jsonl'):
        file.unlink()
    command = [sys.executable, '-m', 'mi.report', f'--baseline={before}', f'--candidate={after}']
    done = subprocess.run([*command, '--fail_on_worse'], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith('error: nothing could be compared: no arm of the baseline ')


def test_a_directory_that_is_not_there_is_named_by_its_flag(sweeps, tmp_path):
    with pytest.raises(UserError, match=r'--baseline=.*nowhere is not a directory'):
        compare.compare(tmp_path / 'nowhere', sweeps[1])
    with pytest.raises(UserError, match=r'--candidate=.* is neither a sweep'):
        compare.compare(sweeps[0], tmp_path)


def test_a_comparison_that_cannot_be_written_is_one_line(sweeps, tmp_path):
    (tmp_path / 'out' / 'compare.md').mkdir(parents=True)
    with pytest.raises(UserError, match=r'--out=.*/out: Is a directory; name another'):
        compare.compare(*sweeps, tmp_path / 'out')


def test_half_a_comparison_is_refused(sweeps):
    command = [sys.executable, '-m', 'mi.report', f'--baseline={sweeps[0]}']
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and '--candidate=DIRECTORY' in done.stderr
