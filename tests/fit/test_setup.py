"""What a config of mi.fit is checked for, and what is counted, whatever the problem."""

import pytest

from configs import (
    attention_conv,
    composition,
    expressivity,
    hamiltonian,
    regression,
    seq2seq,
)
from mi.config import UserError
from mi.fit import setup
from tests.fit.runs import edited

CONFIGS = {
    'products': lambda: expressivity.get_config('fit'),
    'sequences': seq2seq.get_config,
    'digits': attention_conv.get_config,
    'composition': composition.get_config,
    'regression': regression.get_config,
    'phase_space': lambda: hamiltonian.get_config('phase'),
    'frames': lambda: hamiltonian.get_config('frames'),
}


@pytest.mark.parametrize(
    ('word', 'changes'),
    [
        *((word, {}) for word in setup.PROBLEMS),
        ('sequences', {'problem.targets': ('reverse', 'sort')}),
        ('digits', {'model.layer': 'convolution'}),
        ('composition', {'problem.context': 'learned', 'problem.coefficients': 'equal'}),
        ('regression', {'problem.context': 'inferred'}),
    ],
)
def test_the_parameters_that_are_matched_are_those_that_are_written_down(word, changes):
    """But for sequences, of which a run writes down one network of several."""
    config = edited(CONFIGS[word](), **{'model.parameters': 0}, **changes)
    assert config.problem.name == word
    problem = setup.problem(config)
    networks = len(config.problem.targets) if word == 'sequences' else 1
    assert setup.parameters(problem) == networks * problem.costs()['parameters']['model']


@pytest.mark.parametrize('word', expressivity.PRESETS)
def test_either_task_is_of_one_process(word, monkeypatch):
    config = expressivity.get_config(word)
    setup.validate(config)
    monkeypatch.setattr('jax.process_count', lambda: 2)
    with pytest.raises(UserError, match=f"config.task = '{word}' runs in one process"):
        setup.validate(config)
