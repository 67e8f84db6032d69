"""What a config of mi.fit is checked for, and what is counted, whatever the problem."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.attention_conv import config as attention_conv
from experiments.composition import config as composition
from experiments.conditional import config as conditional
from experiments.expressivity import config as expressivity
from experiments.hamiltonian import config as hamiltonian
from experiments.regression import config as regression
from experiments.seq2seq import config as seq2seq
from mi.config import UserError, integer
from mi.fit import base_config, factory, train
from mi.fit.problem import Problem
from tests.fit.runs import edited


class Draws(Problem):
    """Its metrics are what the keys of the world and of the batch draw."""

    def draw_world(self, key):
        return {'drawn': jax.random.uniform(key)}

    def init_params(self, key, world):
        return jnp.zeros(())

    def loss(self, params, world, key):
        return params, {'batch': jax.random.uniform(key), **world}

    def evaluate(self, params, world, key):
        return {}

    def costs(self):
        return {}


DRAWS = Draws(examples=1)
CONFIGS = {
    'experiments.expressivity.problem': lambda: expressivity.get_config('fit'),
    'experiments.seq2seq.problem': seq2seq.get_config,
    'experiments.attention_conv.problem': attention_conv.get_config,
    'experiments.composition.problem': composition.get_config,
    'experiments.conditional.problem': conditional.get_config,
    'experiments.regression.problem': regression.get_config,
    'experiments.hamiltonian.phase_space': lambda: hamiltonian.get_config('phase'),
    'experiments.hamiltonian.frames': lambda: hamiltonian.get_config('frames'),
}


@pytest.mark.parametrize(
    ('word', 'changes'),
    [
        *((word, {}) for word in CONFIGS),
        ('experiments.seq2seq.problem', {'problem.targets': ('reverse', 'sort')}),
        ('experiments.attention_conv.problem', {'model.layer': 'convolution'}),
        (
            'experiments.composition.problem',
            {'problem.context': 'learned', 'problem.coefficients': 'equal'},
        ),
        ('experiments.conditional.problem', {'model.encodes_context': True}),
        ('experiments.regression.problem', {'problem.context': 'inferred'}),
    ],
)
def test_the_parameters_that_are_matched_are_those_that_are_written_down(word, changes):
    """Except for sequences: a run records one network of several."""
    config = edited(CONFIGS[word](), **{'model.parameters': 0}, **changes)
    assert config.problem.name == word
    problem = factory.make_problem(config)
    networks = len(config.problem.targets) if 'seq2seq' in word else 1
    assert factory.count_parameters(problem) == networks * problem.costs()['parameters']['model']


class Named(Draws):
    """A problem of this file, named 'tests.fit.test_setup:Named'."""

    SCHEMA = types.MappingProxyType({'problem.examples': integer(1)})

    @classmethod
    def make(cls, config):
        return cls(config.problem.examples)

    def costs(self):
        return {'parameters': {'model': 1, 'fusion': 0}}


def name_problem(problem_name):
    config = base_config.get_base_config(problem_name)
    config.problem.examples = 7
    config.model = {'width': 1, 'parameters': 0}
    config.train.update({'steps': 2, 'batch': 1, 'log_every': 1, 'eval_every': 1, 'save_every': 2})
    return config


def test_a_problem_of_one_s_own_is_named_by_its_class(tmp_path):
    config = name_problem(f'{__name__}:Named')
    problem = factory.make_problem(config)
    assert isinstance(problem, Named) and problem.examples == 7
    train.train(config.lock(), str(tmp_path))
    assert 'drawn' in (tmp_path / 'metrics.jsonl').read_text()
    config.unlock().problem.examples = 0
    with pytest.raises(UserError, match=r'config\.problem\.examples = 0: expected an integer'):
        factory.make_problem(config)


@pytest.mark.parametrize(
    ('problem_name', 'message'),
    [
        (f'{__name__}:Naemd', "no attribute 'Naemd'"),
        ('no_such.module:Named', "No module named 'no_such'"),
        (f'{__name__}:Draws', 'missing: SCHEMA and make'),
        ('mi.fit.problem', 'missing: SCHEMA and make'),
    ],
)
def test_a_problem_that_cannot_be_imported_says_why(problem_name, message):
    with pytest.raises(UserError, match=f'config.problem.name = .*{message}'):
        factory.make_problem(name_problem(problem_name))


def test_every_step_of_every_seed_draws_batches_of_its_own_and_metrics_are_means():
    optimizer = optax.sgd(0.1)

    def batches(seed, count, steps):
        state, means = train.init_train_state(DRAWS, optimizer, seed), []
        for _ in range(steps):
            state, measured = train.train_steps(DRAWS, optimizer, count, state, jnp.int32(seed))
            means.append(measured)
        return [[float(m[name]) for m in means] for name in ('batch', 'drawn')]

    first, world = batches(0, 1, 4)
    second, other_world = batches(1, 1, 4)
    assert len(set(first + second)) == 8
    assert len(set(world)) == 1 and world[0] != other_world[0]
    np.testing.assert_allclose(batches(0, 4, 1)[0], np.mean(first), rtol=1e-6)
