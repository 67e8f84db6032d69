"""Metrics by reference: functions of a run's records, in readers, reports, rules and checks."""

import json

import numpy as np
import pytest

from launch import asha, metric_names, records, state, sweep
from launch.population import Population
from mi import report
from mi.config import UserError
from mi.report import runs
from mi.training import run_metric
from mi.training.run_metric import MetricAppender
from tests.report.synthetic import MI, make_run, read_table, write_sweep

SPREAD = f'{__name__}:spread'
GREATEST = f'{__name__}:greatest'


def spread(records):
    """Return the largest loss minus the smallest one; the first record has none."""
    losses = [record['loss'] for record in records]
    return np.ptp(losses) if len(losses) > 1 else None  # NaN if one of them is


def greatest(records):
    return max(record['bits_per_byte'] for record in records)


greatest.lower_is_better = False


def broken(records):
    return 'high'


def misspelled(records):
    return records[-1]['bits_per_bite']


def record(step, loss, seed=0, split='train'):
    return {'step': step, 'seed': seed, 'split': split, 'loss': loss}


def test_the_value_at_a_step_is_that_of_the_records_up_to_it():
    """Of each seed and split alone; a repeated step counts once, and a number may be missing."""
    appender = MetricAppender(SPREAD, {'train'})
    appended = appender.append(
        [
            *(record(10, 5.0), record(10, 1.0, seed=1), record(10, 9.0, split='valid')),
            *(record(20, 3.0), record(20, 1.5, seed=1), record(20, 0.0, split='valid')),
        ]
    )
    assert [values.get(SPREAD) for values in appended] == [None, None, None, 2.0, 0.5, None]
    assert not any(SPREAD in values for values in appended[:3])
    assert [values['loss'] for values in appended] == [5.0, 1.0, 9.0, 3.0, 1.5, 0.0]
    (repeated,) = appender.append([record(20, 9.0)])
    assert repeated[SPREAD] == 4.0  # 9 − 5, without the first record of step 20
    (diverged,) = appender.append([record(30, None)])
    assert diverged[SPREAD] is None
    appender.clear()
    assert appender.append([record(40, 1.0)]) == [record(40, 1.0)]


def test_a_recorded_metric_adds_nothing():
    rows = [record(10, 5.0), record(20, 3.0)]
    assert MetricAppender('loss').append(rows) == rows


@pytest.mark.parametrize(
    ('function', 'message'),
    [
        ('misspelled', r'train records up to step 10 \(KeyError: bits_per_bite\)'),
        ('broken', r'could not convert string to float'),
        ('no_such', "has no attribute 'no_such'"),
        ('SPREAD', 'expected a function of records'),
    ],
)
def test_a_function_that_cannot_be_used_is_named(function, message):
    with pytest.raises(UserError, match=message):
        MetricAppender(f'{__name__}:{function}', {'train'}).append([record(10, 1.0)])


def write_records(path, rows):
    path.mkdir(exist_ok=True)
    with open(path / 'metrics.jsonl', 'a') as file:
        file.writelines(json.dumps(row) + '\n' for row in rows)


def test_curves_are_read_as_they_grow(tmp_path):
    """The mean over seeds of the function, of old and new records together."""
    path = tmp_path / 'a'
    write_records(path, [record(10, 5.0), record(10, 1.0, seed=1), record(20, 3.0)])
    reader = records.CurveReader(path, SPREAD, 'train')
    assert reader.read() == {20: 2.0}
    write_records(path, [record(20, 1.5, seed=1), record(30, 1.0)])
    assert reader.read() == {20: 1.25, 30: 4.0}
    assert records.read_curve(path, SPREAD, 'valid') == {}


def test_the_table_of_members_shows_it_or_says_why_not(tmp_path):
    path = tmp_path / 'a'
    write_records(path, [record(10, 5.0), record(20, 3.0)])
    assert state.read_member_state(path, SPREAD).metric == f'{SPREAD} 2 (train)'
    assert 'no_such' in state.read_member_state(path, f'{__name__}:no_such').metric
    assert state.read_member_state(path, GREATEST).metric == f'no {GREATEST} yet, loss 3 (train)'


def test_the_rules_of_a_sweep_compare_it(tmp_path):
    """By their losses at step 20 b would be the better one, by the spread it is a."""
    fields = {'metric': SPREAD, 'split': 'train', 'curves': 'train', 'lower_is_better': True}
    (tmp_path / 'sweep.json').write_text(json.dumps(fields))
    for name, losses in (('a', (3.0, 2.9)), ('b', (9.0, 1.0))):
        write_records(tmp_path / name, [record(10 + 10 * i, v) for i, v in enumerate(losses)])
        (tmp_path / name / 'cost.json').write_text('{"steps": 80}')
    rule = asha.Asha(tmp_path, 20, 3)
    rule([tmp_path / 'a', tmp_path / 'b'])
    decided = [json.loads(line) for line in (tmp_path / 'asha.jsonl').read_text().splitlines()]
    assert [(d['name'], d['value']) for d in decided] == [('a', pytest.approx(0.1)), ('b', 8.0)]
    assert (tmp_path / 'b/stopped.json').exists() and not (tmp_path / 'a/stopped.json').exists()

    (tmp_path / 'a/checkpoints/00000020').mkdir(parents=True)
    members = [sweep.Member(name, name, [], {}) for name in 'ab']
    assert Population(tmp_path, members, 0.05, [], 0)._measure_fitness() == {
        'a': pytest.approx(-0.1)
    }


def test_the_report_compares_it(tmp_path):
    """The greatest value of each seed in its valid records 9 − step / 5 + seed is the first one."""
    for arm, final in (('concat', MI), ('mi', MI)):
        make_run(tmp_path / arm, arm, final)
    members = [{'name': arm, 'label': arm, 'overrides': {}} for arm in ('concat', 'mi')]
    write_sweep(
        tmp_path, members, metric=GREATEST, split='valid', curves='valid', lower_is_better=False
    )
    arm = runs.read_sweep(tmp_path).arms[0]
    assert arm.final_values(GREATEST, 'valid') == {0: 9.0, 1: 10.0, 2: 11.0}
    steps, values = arm.curve(GREATEST, 'valid')
    assert list(steps) == [0, 10, 20] and values.tolist() == [[9.0 + seed] * 3 for seed in range(3)]
    report.write(tmp_path)
    row = read_table(tmp_path)['mi']
    assert (float(row['mean']), row['metric']) == (10.0, GREATEST)
    page = (tmp_path / 'report/table.md').read_text().replace('\\', '')
    assert '| greatest ↑' in page and f'greatest: {GREATEST}, a function of the valid' in page


SWEEP = """
CONFIG, METRIC, SPLIT = 'configs/lm.py:tiny', {metric!r}, {split!r}
TITLE, BASELINE, NOTES = 'a test', None, []
{more}
def sweep():
    return [{{}}]
"""


def load(folder, function, split='valid', more=''):
    file = folder / 'a_sweep.py'
    file.write_text(SWEEP.format(metric=f'{__name__}:{function}', split=split, more=more))
    sweep.load(str(file), folder / 'runs')
    return json.loads((folder / 'runs/sweep.json').read_text())


def test_a_sweep_takes_its_direction_and_its_curves_from_the_function(tmp_path):
    loaded = load(tmp_path, 'greatest', 'test')
    assert loaded['lower_is_better'] is False
    assert (loaded['metric'], loaded['curves']) == (GREATEST, 'valid')
    with pytest.raises(UserError, match='LOWER_IS_BETTER = True: expected False'):
        load(tmp_path, 'greatest', more='LOWER_IS_BETTER = True')


@pytest.mark.parametrize(
    ('function', 'split', 'message'),
    [
        (
            'misspelled',
            'valid',
            r"KeyError: bits_per_bite\); SPLIT = 'valid' has bits_per_byte",
        ),
        ('greatest', 'train', r"KeyError: bits_per_byte\); SPLIT = 'train' has nats_per_token "),
        ('greatest', 'vald', "SPLIT = 'vald': expected a recorded split; did you mean"),
        ('no_such', 'valid', "METRIC = .* has no attribute 'no_such'"),
    ],
)
def test_a_sweep_of_a_function_that_reads_what_no_run_records_is_refused(
    tmp_path, function, split, message
):
    with pytest.raises(UserError, match=message):
        load(tmp_path, function, split)
    assert not (tmp_path / 'runs').exists()


def test_a_function_may_read_names_that_are_known_once_the_run_has_started():
    assert 'KeyError' in run_metric.find_refusal(GREATEST, 'eval', {'return'})
    assert not run_metric.find_refusal(GREATEST, 'eval', {'return'}, has_more_names=True)
    finder = metric_names.Finder(GREATEST)
    split = metric_names.Split({'return'}, 10, ('bits_per_',))
    assert finder._add_reference('eval', split).has(GREATEST)
    assert not finder._add_reference('eval', split._replace(prefixes=())).has(GREATEST)
