import collections
import json
import pathlib
import random
import subprocess
import sys

import pytest

from launch import engine, pbt, process
from launch.members import Member
from launch.population import Population, exploit, explore
from mi.training import checkpoint

MEMBER = str(pathlib.Path(__file__).with_name('member.py'))
SWEEP = """
from launch.sweep import product
CONFIG = 'experiments/expressivity/config.py:fit'
TITLE, METRIC, SPLIT, BASELINE, NOTES = 'a test', 'mse', 'eval', None, []
def sweep():
    return product(**{
        'optim.learning_rate': [1e-2, 1e-6],
        'seeds': [(0,)],
        'train.batch': [64],
        'train.steps': [2400],
        'train.log_every': [20],
        'train.eval_every': [20],
        'train.save_every': [20],
    })
"""


def test_only_one_that_is_more_than_the_margin_better_is_copied():
    def copied(mine, candidates, margin=0.05):
        fitness = {'me': mine, **{str(i): value for i, value in enumerate(candidates)}}
        draws = (exploit(fitness, 'me', margin, random.Random(i)) for i in range(200))
        return {None if name is None else fitness[name] for name in draws}

    assert copied(0.5, [0.6, 0.54, 0.2]) == {0.6, None}  # each is drawn, one is copied
    assert copied(0.5, [0.5625]) == {0.5625}
    assert copied(0.5, [0.5625], margin=0.0625) == {None}  # more than, and absolute
    assert copied(0.5, []) == {None}
    assert exploit({'a': 1.0}, 'me', 0.05, random.Random(0)) is None  # no fitness yet


def test_each_hyperparameter_changes_by_a_fifth_a_third_of_the_time():
    draw = random.Random(0)
    values = {'a': 1.0, 'b': 10.0, 'c': 1e-3}
    tries = [explore(values, draw) for _ in range(6000)]
    for key, value in values.items():
        ratios = collections.Counter(round(t[key] / value, 6) for t in tries)
        assert ratios.keys() == {1.0, 1.2, 0.833333}
        assert ratios[1.0] == pytest.approx(4000, abs=150)
        assert ratios[1.2] == pytest.approx(1000, abs=120)
    together = sum(t['a'] != 1.0 and t['b'] != 10.0 for t in tries)
    assert together == pytest.approx(6000 / 9, abs=100)  # independent
    assert values == {'a': 1.0, 'b': 10.0, 'c': 1e-3}


def test_one_that_was_made_and_has_not_begun_can_be_copied(tmp_path):
    """The copy of a copy: its parent has no config.json until its process has started."""
    sweep_file = {'metric': 'return', 'split': 'eval', 'lower_is_better': False}
    (tmp_path / 'sweep.json').write_text(json.dumps(sweep_file))
    for name, fitness in ('good', 0.9), ('bad', 0.1):
        saved = tmp_path / name / 'checkpoints' / '00000800'
        saved.mkdir(parents=True)
        record = json.dumps({'split': 'eval', 'step': 800, 'return': fitness}) + '\n'
        (tmp_path / name / 'metrics.jsonl').write_text(record)
        (saved / 'meta.json').write_text(json.dumps({'metrics': len(record)}))
        manifest = {'meta.json': checkpoint.hash_file(saved / 'meta.json')}
        (saved / 'manifest.json').write_text(json.dumps(manifest))
        config = {'task': 'rl', 'optim': {'learning_rate': 0.5, 'eps': 0.5}, 'seeds': [0]}
        (tmp_path / name / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'late').mkdir()  # it is the best, and has nothing yet that could be copied
    (tmp_path / 'late/metrics.jsonl').write_text(record.replace('0.1', '2.0'))
    members = [Member(name, name, [], {}) for name in ('good', 'bad', 'late')]

    def fits(seed):  # the good one is perturbed, and the bad one would take the late
        draw = random.Random(f'{seed} good 800')
        exploit({'good': 0.9, 'bad': 0.1}, 'good', 0.05, draw)
        late = random.Random(f'{seed} bad 800').choice(['good', 'late']) == 'late'
        return late and explore({'rate': 1.0}, draw) != {'rate': 1.0}

    seed = next(filter(fits, range(100)))
    (tmp_path / 'pbt.jsonl').write_text('{"member": "go')  # of a launcher that was killed
    population = Population(tmp_path, members, 0.05, ['optim.learning_rate'], seed)
    population.decide('good')
    assert population.summary() == 'pbt: 1 comparisons, 0 copies'
    assert population.run_dir('good').name == 'good.1'
    assert not (population.run_dir('good') / 'config.json').exists()
    # The newest checkpoint of its parent is just being cleared away: the one before is copied.
    (population.run_dir('good') / 'checkpoints/00000820').mkdir()
    population.decide('bad')
    assert population.summary() == 'pbt: 2 comparisons, 1 copies'
    copied = [p.name for p in (population.run_dir('bad') / 'checkpoints').iterdir()]
    assert copied == ['00000800']
    first, second = (json.loads(line) for line in (tmp_path / 'pbt.jsonl').read_text().splitlines())
    assert (second['copied'], second['from'], second['to']) == ('good', 'good.1', 'bad.1')
    rates = [d['overrides']['optim.learning_rate'] for d in (first, second)]
    assert rates[0] in (0.5 * 1.2, 0.5 / 1.2)
    assert round(rates[1] / rates[0], 6) in {1.0, 1.2, 0.833333}


@pytest.mark.parametrize('lower_is_better', [True, False])
def test_the_better_one_is_copied_as_far_as_it_had_saved(tmp_path, lower_is_better):
    """Its newest value decides, of the split that is compared; its later records stay behind."""
    sweep_file = {'metric': 'score', 'split': 'eval', 'lower_is_better': lower_is_better}
    (tmp_path / 'sweep.json').write_text(json.dumps(sweep_file))
    values = {'a': [0.9, 0.1], 'b': [0.1, 0.9]}  # at steps 10 and 20, saved at 10 alone
    for name, scores in values.items():
        path = tmp_path / name
        saved = path / 'checkpoints/00000010'
        saved.mkdir(parents=True)
        lines = [
            json.dumps({'step': 10 * (i + 1), 'split': split, 'score': value}) + '\n'
            for i, score in enumerate(scores)
            for split, value in (('eval', score), ('train', 1 - score))
        ]
        (path / 'metrics.jsonl').write_text(''.join(lines))
        meta = {'metrics': len(''.join(lines[:2]))}
        (saved / 'meta.json').write_text(json.dumps(meta))
        manifest = {'meta.json': checkpoint.hash_file(saved / 'meta.json')}
        (saved / 'manifest.json').write_text(json.dumps(manifest))
        config = {'task': 'rl', 'optim': {'learning_rate': 0.5}}
        (path / 'config.json').write_text(json.dumps(config))
    members = [Member(name, name, [], {}) for name in values]
    population = Population(tmp_path, members, 0.05, ['optim.learning_rate'], 0)
    better, worse = ('a', 'b') if lower_is_better else ('b', 'a')
    population.decide(worse)
    (decision,) = map(json.loads, (tmp_path / 'pbt.jsonl').read_text().splitlines())
    assert (decision['copied'], decision['from'], decision['to']) == (better, better, f'{worse}.1')
    records = (tmp_path / f'{worse}.1/metrics.jsonl').read_text().splitlines()
    parents = (tmp_path / better / 'metrics.jsonl').read_text().splitlines()
    assert records == parents[:2]
    population.decide(better)
    assert population.summary() == 'pbt: 2 comparisons, 1 copies'  # the worse is not copied


def test_what_a_killed_launcher_has_left_keeps_its_slot_and_is_waited_for(tmp_path):
    """One slot, and the second member has it: the first begins when that one has ended."""
    sweep_file = {'metric': 'loss', 'split': 'train', 'lower_is_better': True}
    (tmp_path / 'sweep.json').write_text(json.dumps(sweep_file))
    commands = {
        name: [sys.executable, MEMBER, f'--steps={steps}', '--seconds=0.1']
        for name, steps in (('first', 2), ('second', 15))
    }
    path = tmp_path / 'second'
    adopted = process.start(path, [*commands['second'], f'--workdir={path}'])
    members = [Member(name, name, command, {}) for name, command in commands.items()]
    population = Population(tmp_path, members, 0.05, [], 0)
    assert population.summary().startswith('pbt: no member was compared, because none recorded')
    states = pbt.train(population, 10**9, engine.Resources(parallel=1))
    assert states == {'first': 'done', 'second': 'done'} and adopted.wait() == 0
    begun, ended = tmp_path / 'first/starts.jsonl', path / 'status.json'
    assert begun.stat().st_mtime >= ended.stat().st_mtime
    assert len((path / 'starts.jsonl').read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_dry_run_trains_nothing(tmp_path):
    (tmp_path / 'a_sweep.py').write_text(SWEEP)
    command = [sys.executable, '-m', 'launch.pbt', f'--sweep={tmp_path / "a_sweep.py"}']
    command += [f'--workdir={tmp_path / "runs"}', '--interval=800', '--dry_run']
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'learning_rate=1e-06' in result.stdout and 'all of it' in result.stdout
    assert not (tmp_path / 'runs').exists()


@pytest.mark.slow
def test_a_member_that_is_behind_goes_on_from_the_better_one(tmp_path):
    (tmp_path / 'a_sweep.py').write_text(SWEEP)
    runs = tmp_path / 'runs'
    command = [sys.executable, '-m', 'launch.pbt', f'--sweep={tmp_path / "a_sweep.py"}']
    command += [f'--workdir={runs}', '--interval=800', '--parallel=2']
    command += ['--perturb=optim.learning_rate']
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    decisions = [json.loads(line) for line in (runs / 'pbt.jsonl').read_text().splitlines()]
    # The first copy, and where its member was at last: on a busy machine the better one may be
    # behind at first, and be copied again.
    copy = next(d for d in decisions if d['copied'])
    last = runs / [d['to'] for d in decisions if d['member'] == copy['member']][-1]
    assert copy['member'] == 'learning_rate=1e-06' and copy['copied'] == 'learning_rate=0.01'
    child, parent = runs / copy['to'], runs / copy['from']
    assert json.loads((child / 'fork.json').read_text())['parent'] == parent.name
    rate = json.loads((child / 'config.json').read_text())['optim']['learning_rate']
    assert rate == copy['overrides']['optim.learning_rate']
    parent_rate = json.loads((parent / 'config.json').read_text())['optim']['learning_rate']
    assert round(rate / parent_rate, 6) in {1.0, 1.2, 0.833333}
    steps = [r['step'] for r in _records(last) if r['split'] == 'train']
    assert steps == list(range(20, 2401, 20))  # the parent's, and then its own
    parent_records = [r for r in _records(parent) if r['step'] <= copy['step']]
    assert _records(child)[: len(parent_records)] == parent_records
    finals = {run: _records(run)[-1]['mse'] for run in (last, runs / copy['member'])}
    assert finals[last] < 0.8 * finals[runs / copy['member']]  # it has left its own bad start
    second_result = subprocess.run(command, capture_output=True, text=True)
    assert second_result.returncode == 0, second_result.stderr
    assert len((runs / 'pbt.jsonl').read_text().splitlines()) == len(decisions)


def _records(run):
    return [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
