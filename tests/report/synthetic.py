"""Synthetic run directories and sweeps of known numbers, and what the report wrote of them."""

import csv
import json

SEEDS = [0, 1, 2]
CONCAT = {0: 2.0, 1: 3.0, 2: 4.0}
MI = {0: 1.75, 1: 2.5, 2: 3.75}  # − CONCAT: −0.25, −0.5, −0.25


def write_lines(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))


def make_run(path, fusion, final, state='done', reason=None):
    """A run of three seeds, 20 steps; 1 bit per byte is 0.5 nats per token here."""
    path.mkdir(parents=True)
    config = {'seeds': SEEDS, 'model': {'fusion': {'name': fusion}, 'width': 8}}
    status = {'state': state, 'reason': reason, 'step': 20, 'machine': 'a <machine>'}
    status['updated'] = '2026-11-22T10:00:00+00:00'
    cost = {'parameters': {'model': 412345, 'fusion': 20480}}
    cost['flops_per_token'] = {'model': 2400000, 'fusion': 40960}
    for name, value in (('config', config), ('status', status), ('cost', cost)):
        (path / f'{name}.json').write_text(json.dumps(value))
    records = [
        {'step': step, 'seed': seed, 'split': 'valid', 'bits_per_byte': 9.0 - step / 5 + seed}
        for step in (0, 10, 20)
        for seed in SEEDS
    ]
    for seed, value in final.items():
        values = {'nats_per_token': value / 2, 'perplexity': None, 'bits_per_byte': value}
        records.append({'step': 20, 'seed': seed, 'split': 'test', **values})
    write_lines(path / 'metrics.jsonl', records)
    timing = [
        {'step': 10, 'seconds': 2.0, 'tokens_per_second': 100.0},
        {'step': 20, 'seconds': 99.0, 'tokens_per_second': 1.0},
        {'step': 20, 'seconds': 6.0, 'tokens_per_second': 300.0},  # resumed: this one counts
    ]
    write_lines(path / 'timing.jsonl', timing)


def write_sweep(path, members, **changes):
    sweep = {'name': 'small', 'title': 'A & B', 'baseline': 'concat', 'metric': 'bits_per_byte'}
    sweep |= {'split': 'test', 'lower_is_better': True, 'notes': ['a <note>']}
    sweep |= {'command': 'python -m launch', 'members': members}
    (path / 'sweep.json').write_text(json.dumps(sweep | changes))


def write_problems(path):
    """A sweep of an easy and a hard problem. In both, the larger of two arms is better.

    The third arm of the easy problem is beaten by both.
    """
    arms = [  # (name, problem, error, parameters)
        ('small', 'easy', 0.125, 100),
        ('large', 'easy', 0.0625, 200),
        ('beaten', 'easy', 0.25, 300),
        ('small', 'hard', 5.0, 150),
        ('large', 'hard', 3.0, 250),
    ]
    members = []
    for arm, problem, error, num_parameters in arms:
        name = f'{arm}, {problem}'
        make_run(path / name, arm, dict.fromkeys(SEEDS, error))
        counts = {'model': num_parameters, 'fusion': 1}
        change_json(path / name / 'cost.json', parameters=counts)
        members.append({'name': name, 'overrides': {'problem.system': problem}})
    write_sweep(path, members, baseline=None, problems=['problem.system'])


def change_sweep(path, **changes):
    change_json(path / 'sweep.json', **changes)


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read_table(workdir):
    with open(workdir / 'report' / 'table.csv', newline='') as file:
        return {row['arm']: row for row in csv.DictReader(file)}


def read_text(workdir, name='report.html'):
    return (workdir / 'report' / name).read_text()
