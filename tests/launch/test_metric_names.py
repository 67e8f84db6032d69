"""What a sweep compares is looked up before it starts, in what its runs will record."""

import json
import pkgutil

import pytest

from launch import asha, metric_names, pbt, sweep
from launch.members import Member
from launch.population import Population
from mi import main
from mi.config import UserError

SWEEP = """
from launch.sweep import product
CONFIG, METRIC, SPLIT = {config!r}, {metric!r}, {split!r}
TITLE, BASELINE, NOTES = 'a test', None, []
{more}
def sweep():
    return {overrides!r}
"""
LM, FIT, SEARCH = (
    'configs/lm.py:tiny',
    'experiments/expressivity/config.py:fit',
    'experiments/expressivity/config.py',
)
GYM = 'configs/rl.py:tiny,env=gymnasium/CartPole-v1'
CATCH, KINDS = 'configs/rl.py:tiny,env=catch', 'configs/rl.py:tiny,env=xland/kinds'


def load(folder, config, metric, split, *, more='', overrides=({},)):
    file = folder / 'a_sweep.py'
    values = {'config': config, 'metric': metric, 'split': split, 'more': more}
    file.write_text(SWEEP.format(overrides=list(overrides), **values))
    members = sweep.load(str(file), folder / 'runs')
    return members, json.loads((folder / 'runs/sweep.json').read_text())


SEARCH = 'experiments/expressivity/config.py:search'


@pytest.mark.parametrize(
    'config, metric, split, message',
    [
        (LM, 'bits_per_bite', 'test', "METRIC = 'bits_per_bite': .* did you mean 'bits_per_byte'"),
        (LM, 'bits_per_byte', 'tset', "SPLIT = 'tset': .* did you mean 'test'"),
        (LM, 'bits_per_byte', 'train', 'it is recorded in valid, valid_whole, test'),
        (CATCH, 'sucess', 'eval', "did you mean 'success'"),
        (CATCH, 'success', 'valid', "SPLIT = 'valid': .* known: eval, train"),
        (CATCH, 'success/cach', 'eval', "did you mean 'success/catch'"),
        (CATCH, 'success', 'held_out', 'known: eval, train'),
        (KINDS, 'popart_mu', 'train', 'popart_mu/.* red ball.* success, and 24 of single tasks'),
        (GYM, 'success', 'eval', 'known: cut, env_steps, episodes_per_task, length, return'),
        (GYM, 'capped_mean', 'eval', 'known: cut, env_steps'),
        (FIT, 'mes', 'eval', "did you mean 'mse'"),
        (FIT, 'mse', 'evil', "did you mean 'eval'"),
        (SEARCH, 'parameters/5', 'eval', "did you mean 'parameters/"),
    ],
)  # fmt: skip
def test_a_metric_that_no_run_records_is_refused_with_the_nearest(
    tmp_path, config, metric, split, message
):
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path, config, metric, split)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'runs').exists()


def test_each_member_is_looked_at_as_overrides_change_what_is_recorded(tmp_path):
    levels = [{'data.level': 'byte'}, {'data.level': 'word'}]  # bits per byte mean nothing of words
    with pytest.raises(UserError, match=r"'bits_per_byte'.*\(member level=word\)"):
        load(tmp_path, LM, 'bits_per_byte', 'test', overrides=levels)
    load(tmp_path, LM, 'nats_per_token', 'test', overrides=levels)
    with pytest.raises(UserError, match=r"CURVES = 'vald': .*did you mean 'valid'"):
        load(tmp_path, LM, 'nats_per_token', 'test', more="CURVES = 'vald'")
    broken = [{'optim.learning_rate': -1.0}, {'optim.learning_rate': 0.1}]
    members, _ = load(tmp_path / 'runs', FIT, 'mse', 'eval', overrides=broken)
    assert len(members) == 2  # the first one says itself why it cannot work


@pytest.mark.parametrize(
    'config, metric, split, curves',
    [
        (LM, 'bits_per_byte', 'test', 'valid'),
        (LM, 'nats_per_token', 'valid', 'valid'),
        (FIT, 'mse', 'eval', 'eval'),
        (CATCH, 'success', 'eval', 'eval'),
        (CATCH, 'entropy', 'train', 'train'),
        ('experiments/expressivity/config.py:search', 'exponent', 'eval', 'eval'),
    ],
)
def test_curves_are_by_default_those_that_the_runs_have(tmp_path, config, metric, split, curves):
    assert load(tmp_path, config, metric, split)[1]['curves'] == curves


def parsed(config, **values):
    return sweep.parse_config(
        [f'--config={config}', *(f'--config.{k}={v}' for k, v in values.items())]
    )


def test_a_rule_that_would_compare_no_member_is_refused():
    often, rarely, never = (
        parsed(LM, **{'train.steps': 40, 'train.eval_every': every}) for every in (10, 30, 40)
    )
    asha.refuse_idle([often], 39 - 10 + 1, 'bits_per_byte', 'valid')
    asha.refuse_idle([never, rarely], 30, 'bits_per_byte', 'valid')  # one of them can be
    for members, first in (([never], 1), ([rarely], 31), ([often], 40), ([often], 31)):
        with pytest.raises(UserError, match=f'--asha={first}: expected a step at which'):
            asha.refuse_idle(members, first, 'bits_per_byte', 'valid')
    with pytest.raises(UserError, match='only at the last step, and have 40'):
        asha.refuse_idle([often], 10, 'bits_per_byte', 'test')


def test_population_without_fitness_or_looks_is_refused():
    def split(interval, splits=('test', 'valid'), **values):
        values = {'train.steps': 40, 'train.eval_every': 10, 'train.save_every': 10} | values
        return pbt.choose_fitness_split(
            {'a': parsed(LM, **values)}, 'bits_per_byte', splits, interval
        )

    assert split(20) == 'valid'  # test is read at the end, when no member can learn from it
    assert split(20, ['valid_whole', 'valid']) == 'valid'
    for interval, save_every in ((40, 10), (31, 10), (10, 40)):
        with pytest.raises(UserError, match=f'--interval={interval}: expected a comparison'):
            split(interval, **{'train.save_every': save_every})
    with pytest.raises(UserError, match='expected a metric that SPLIT or CURVES'):
        split(20, ['test'])
    with pytest.raises(UserError, match='records before the last step'):
        split(20, **{'train.eval_every': 40})


def test_hyperparameters_are_by_default_those_of_the_task():
    def default(*configs):
        return pbt.choose_hyperparameters({str(i): c for i, c in enumerate(configs)}, None)

    assert default(parsed(LM)) == ['optim.learning_rate']  # no weight decay: 0 stays 0
    decays = parsed(LM, **{'optim.weight_decay': 0.1})
    assert default(decays) == ['optim.learning_rate', 'optim.weight_decay']
    assert default(decays, parsed(LM)) == ['optim.learning_rate']
    assert default(parsed(FIT)) == ['optim.learning_rate']
    assert default(parsed(CATCH)) == ['optim.learning_rate', 'loss.entropy_cost', 'optim.eps']


@pytest.mark.parametrize(
    'config, key, message',
    [
        (LM, 'loss.entropy_cost', 'but a has no such key'),
        (LM, 'optim.learning_rat', "did you mean 'optim.learning_rate'"),
        (LM, 'model.hidden', r'a nonzero float.* but a has model\.hidden = \d+; '),
        (LM, 'model.tied', r'but a has model\.tied = True'),
        (LM, 'optim.weight_decay', r'nonzero float.* but a has optim\.weight_decay = 0\.0'),
        (LM, 'optim.name', "'adam'"),
        (SEARCH, 'optim.learning_rate', "config.task = 'search' of a"),
    ],
)  # fmt: skip
def test_what_cannot_be_perturbed_is_refused_before_anything_starts(config, key, message):
    with pytest.raises(UserError, match=message):
        pbt.choose_hyperparameters({'a': parsed(config)}, [key])


def test_no_perturbation_leads_to_a_config_that_is_refused(tmp_path):
    """A rate of 0.9 times 1.2 is none: it stays as it is, and the others change."""
    sweep_file = {'metric': 'loss', 'split': 'eval', 'lower_is_better': True}
    (tmp_path / 'sweep.json').write_text(json.dumps(sweep_file))
    keys = ['optim.learning_rate', 'dropout.word']
    population = Population(tmp_path, [], 0.05, keys, 0)
    (tmp_path / 'a').mkdir()
    config = json.loads(parsed(LM, **{'dropout.word': 0.9}).to_json())
    (tmp_path / 'a/config.json').write_text(json.dumps(config))
    values = population._read_hyperparameters(tmp_path / 'a')
    assert values == {'optim.learning_rate': 2e-3, 'dropout.word': 0.9}
    up = {key: value * 1.2 for key, value in values.items()}
    accepted = population._drop_refused(tmp_path / 'a', values, up)
    assert accepted == {'optim.learning_rate': 2e-3 * 1.2, 'dropout.word': 0.9}
    down = {key: value / 1.2 for key, value in values.items()}
    assert population._drop_refused(tmp_path / 'a', values, down) == down


def test_no_copy_takes_the_directory_of_another_member(tmp_path):
    """Members dropout=0 and dropout=0.1: the first one's first copy would be the second."""
    sweep_file = {'metric': 'loss', 'split': 'eval', 'lower_is_better': True}
    (tmp_path / 'sweep.json').write_text(json.dumps(sweep_file))
    names = ['dropout=0', 'dropout=0.1', 'dropout=0.01']
    members = [Member(name, name, [], {}) for name in names]
    population = Population(tmp_path, members, 0.05, [], 0)
    assert population._next_name('dropout=0') == 'dropout=0.001'
    assert population._next_name('dropout=0.1') == 'dropout=0.1.1'


@pytest.mark.slow
@pytest.mark.parametrize(
    'config, values',
    [
        (LM, {'train.steps': 10, 'data.level': 'byte'}),
        (LM, {'train.steps': 10, 'data.level': 'word', 'data.vocabulary': 100}),
        (CATCH, {'train.steps': 400, 'eval.greedy': True}),
        (CATCH, {'train.steps': 400, 'train.topology': 'threads'}),
        (FIT, {'train.steps': 40, 'train.log_every': 20, 'train.eval_every': 20}),
    ],
)
def test_what_is_said_to_be_recorded_is(tmp_path, texts, config, values):
    """The same splits, and in each the same numbers, as a run has written."""
    if config == LM:
        values = values | {'data.source': str(texts), 'data.cache': str(tmp_path / 'cache')}
    config_object = parsed(config, **values)
    train = pkgutil.resolve_name(main.TASKS['train'][config_object.task])
    train(config_object, str(tmp_path / 'run'))
    lines = (tmp_path / 'run/metrics.jsonl').read_text().splitlines()
    written, steps = {}, {}
    for record in map(json.loads, lines):
        numbers = {k for k, v in record.items() if isinstance(v, int | float) or v is None}
        written.setdefault(record['split'], set()).update(numbers - {'step', 'seed'})
        steps.setdefault(record['split'], set()).add(record['step'])
        if values.get('data.level') == 'word':
            written[record['split']] -= {'bits_per_byte'}  # always null
    splits = metric_names.find_splits(config_object)
    assert splits.keys() == written.keys()
    total = metric_names.count_steps(config_object)
    for split, records in splits.items():
        assert all(map(records.has, written[split])), written[split] - set(records.names)
        assert set(records.names) <= written[split]
        regular = (
            set(range(records.interval, total + 1, records.interval)) if records.interval else set()
        )
        assert steps[split] == regular | {total}
