"""Search spaces: exact quantiles, distributions of the draws, and members of a random search."""

import json
import math

import numpy as np
import pytest
import scipy.stats

from launch import sweep
from launch.search_space import DIGITS
from launch.sweep import choice, integer, log_uniform, product, sample, uniform
from mi.config import UserError
from tests.launch.test_sweep import begin_members

SWEEP = """
from launch.sweep import choice, log_uniform, integer
CONFIG = 'configs/lm.py:tiny'
TITLE, METRIC, SPLIT, BASELINE, NOTES = 'a test', 'bits_per_byte', 'test', None, []
SPACE = {space}
COUNT = {count}
SEED = {seed}
"""
SPACE = """{
    'optim.learning_rate': log_uniform(1e-4, 1e-1),
    'model.hidden': integer(16, 64, log=True),
    'model.fusion.name': choice('concat', 'mi'),
    'train.steps': 7,
}"""


@pytest.mark.parametrize(
    ('distribution', 'quantiles'),
    [
        (uniform(-1, 3), {0.0: -1.0, 0.25: 0.0, 0.5: 1.0, 0.999999: 3.0}),
        (log_uniform(1e-4, 1.0), {0.0: 1e-4, 0.25: 1e-3, 0.5: 1e-2, 0.75: 0.1}),
        (log_uniform(1.0, 9.0), {0.5: 3.0, 0.25: 1.73205, 0.125: 1.31607}),
        (integer(2, 5), {0.0: 2, 0.249: 2, 0.25: 3, 0.5: 4, 0.749: 4, 0.75: 5, 0.999: 5}),
        (choice('a', 'b', (0, 1)), {0.0: 'a', 0.33: 'a', 0.34: 'b', 0.67: (0, 1)}),
    ],
)
def test_quantiles_are_those_of_the_distribution(distribution, quantiles):
    for probability, value in quantiles.items():
        assert distribution.quantile(probability) == value


def test_an_integer_is_log_uniform_between_half_integers():
    """P(n) = log((n + ½) / (n − ½)) / log(8.5 / 0.5) for integers from 1 to 8."""
    edges = np.log([n + 0.5 for n in range(9)])
    probabilities = (edges[1:] - edges[0]) / (edges[-1] - edges[0])
    drawn = integer(1, 8, log=True)
    for n, upper in enumerate(probabilities[:-1], 1):
        assert drawn.quantile(upper - 1e-6) == n and drawn.quantile(upper + 1e-6) == n + 1
    assert (drawn.quantile(0.0), drawn.quantile(1 - 1e-12)) == (1, 8)


@pytest.mark.parametrize(
    ('distribution', 'cdf'),
    [
        (uniform(-1, 3), scipy.stats.uniform(-1, 4).cdf),
        (log_uniform(1e-4, 1e-1), scipy.stats.loguniform(1e-4, 1e-1).cdf),
    ],
)
def test_draws_follow_the_distribution(distribution, cdf):
    """Kolmogorov–Smirnov, of 2,000 members with a fixed seed; and two keys are independent."""
    drawn = sample({'a': distribution, 'b': distribution}, 2000, seed=3)
    a, b = ([member[key] for member in drawn] for key in 'ab')
    assert scipy.stats.kstest(a, cdf).pvalue > 0.05 and scipy.stats.kstest(b, cdf).pvalue > 0.05
    assert abs(scipy.stats.spearmanr(a, b).statistic) < 0.06
    assert len(set(a)) > 1990 and all(float(f'{value:.{DIGITS}g}') == value for value in a)


def test_each_value_of_a_choice_and_each_integer_is_drawn_equally_often():
    drawn = sample({'a': choice('x', 'y', 'z'), 'b': integer(3, 6)}, 3000, seed=0)
    for key, values in (('a', 'xyz'), ('b', range(3, 7))):
        counts = [sum(member[key] == value for member in drawn) for value in values]
        assert sum(counts) == 3000 and scipy.stats.chisquare(counts).pvalue > 0.05


def test_members_depend_on_the_seed_their_index_and_their_key_alone():
    space = {'a': uniform(0, 1), 'b': choice(1, 2), 'seeds': (0, 1)}
    drawn = sample(space, 20, seed=1)
    assert sample(space, 20, seed=1) == drawn and sample(space, 30, seed=1)[:20] == drawn
    longer = sample({'c': uniform(0, 1), **space}, 20, seed=1)
    assert [{key: member[key] for key in space} for member in longer] == drawn
    assert sample(space, 20, seed=2) != drawn
    assert all(member['seeds'] == (0, 1) for member in drawn)
    assert [member['a'] for member in drawn[:2]] == [0.862067, 0.194186]  # on every machine
    arms = product(drawn, **{'model.fusion.name': ['concat', 'mi']})
    assert arms[0] == {**drawn[0], 'model.fusion.name': 'concat'} and len(arms) == 40


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: log_uniform(0, 1), r'log_uniform\(0, 1\): expected 0 < low < high'),
        (lambda: uniform(1, 1), r'uniform\(1, 1\): expected low < high, both finite'),
        (lambda: uniform(0, math.inf), 'both finite'),
        (lambda: integer(0, 8, log=True), 'expected 0 < low < high'),
        (lambda: integer(1.0, 8), 'expected two integers. Try uniform'),
        (lambda: choice('a'), 'expected two or more different values'),
        (lambda: choice('a', 'a', 'b'), 'expected two or more different values'),
        (lambda: sample({'a': uniform(0, 1)}, 0), 'count = 0: expected 1 or more'),
        (lambda: sample({'a': 1}, 3), 'expected at least one distribution'),
    ],
)
def test_a_space_that_cannot_be_drawn_from_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def load(folder, space=SPACE, count=3, seed=0):
    file = folder / 'a_sweep.py'
    file.write_text(SWEEP.format(space=space, count=count, seed=seed))
    return sweep.load(str(file), folder / 'runs')


def test_a_sweep_of_a_space_has_named_members_that_stay(tmp_path):
    """A longer one keeps them, even if they all have the same fusion; another seed is refused."""
    members = load(tmp_path, count=2, seed=5)
    values = [member.overrides for member in members]
    assert members[0].name == ','.join(
        [
            f'optim.learning_rate={values[0]["optim.learning_rate"]}'.removeprefix('optim.'),
            f'hidden={values[0]["model.hidden"]}',
            f'fusion={values[0]["model.fusion.name"]}',
        ]
    )
    assert {value['model.fusion.name'] for value in values} == {'mi'}
    begin_members(tmp_path / 'runs', *(member.name for member in members))
    assert load(tmp_path, count=2, seed=5) == members
    longer = load(tmp_path, count=9, seed=5)
    assert [(m.name, m.command) for m in longer[:2]] == [(m.name, m.command) for m in members]
    assert {member.overrides['model.fusion.name'] for member in longer} == {'concat', 'mi'}
    with pytest.raises(UserError, match=r'holds a different sweep.*removed from the sweep'):
        load(tmp_path, count=9, seed=6)
    written = json.loads((tmp_path / 'runs/sweep.json').read_text())
    assert written['space']['train.steps'] == '7'
    assert 'log=True' in written['space']['model.hidden']


@pytest.mark.parametrize(
    ('space', 'message'),
    [
        ('[1]', r'SPACE = \[1\]: expected a dictionary'),
        ("{'optim.learning_rat': log_uniform(1e-3, 1)}", 'did you mean config.optim.learning_rate'),
        ("{'optim.learning_rate': log_uniform(0, 1)}", 'expected 0 < low < high'),
    ],
)
def test_a_space_of_keys_that_no_config_has_is_refused(tmp_path, space, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, space)
