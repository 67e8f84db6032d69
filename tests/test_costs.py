"""Estimates before a run equal what the run records; FLOPs are counted by hand."""

import json
import subprocess
import sys

import pytest

from configs import (
    lm,
    lm_ptb,
    rl,
    rl_dmlab30,
)
from experiments.expressivity import config as expressivity
from mi.config import UserError
from mi.estimate import costs


@pytest.mark.slow
@pytest.mark.parametrize(
    'file, changes',
    [
        ('configs/lm.py:tiny', {'match.by': 'parameters', 'train.steps': 1}),
        ('configs/rl.py:tiny,env=catch', {'train.steps': 40}),
        ('experiments/expressivity/config.py:fit', {'train.steps': 1, 'model.parameters': 500}),
    ],
    ids=['lm', 'rl', 'fit'],
)
def test_a_run_writes_down_what_was_told_before_it(tmp_path, texts, file, changes):
    if file.startswith('configs/lm.py'):
        changes = changes | {'data.source': texts}
    flags = [f'--config.{key}={value}' for key, value in changes.items()]
    command = [sys.executable, '-m', 'mi.main', f'--config={file}', f'--workdir={tmp_path}', *flags]
    subprocess.run(command, check=True)
    module = {'lm': lm, 'rl': rl}.get(file[8:10], expressivity)
    config = module.get_config(file.partition(':')[2])
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    told = costs.estimate_costs(config)
    for name, value in json.loads((tmp_path / 'cost.json').read_text()).items():
        assert told[name] == value, name


def test_flops_of_a_step_are_those_of_its_products():
    """A layer of n to m features for B rows: 2·B·n·m forward, as much for the gradient of its
    weights, and for that of its input, which the first layer has not.
    """
    config = expressivity.get_config('fit')
    with config.unlocked():
        config.problem.dimension, config.model.width, config.train.batch = 3, 16, 8
        config.model.site = 'last'  # x → 16 features, and these with z → y
    forward = [2 * 8 * 3 * 16, 2 * 8 * (16 + 3) * 1]
    told = costs.estimate_costs(config)
    assert told['flops_per_example']['model'] == sum(forward) / 8
    assert told['flops'] == 2 * forward[0] + 3 * forward[1]
    assert told['units'] == 8 and told['seeds'] == 5


def test_training_costs_three_times_its_forward_pass_and_acting_once_more():
    for module, task in ((lm, 'token'), (rl, 'step')):
        told = costs.estimate_costs(module.get_config())
        forward = told['units'] * told[f'flops_per_{task}']['model']
        times = 3 if module is lm else 4
        assert (times - 0.7) * forward < told['flops'] < (times + 0.3) * forward


def test_the_parameters_of_a_corpus_that_is_not_here_can_be_told():
    config = lm_ptb.get_config()
    told = costs.estimate_costs(config)
    with config.unlocked():
        config.data.vocabulary -= 1000
    of_words = 1000 * (config.model.embed + 1)  # and a bias
    fewer = costs.estimate_costs(config)['parameters']['model']
    assert told['parameters']['model'] - fewer == of_words


def test_what_runs_on_a_gpu_alone_can_be_told_anywhere():
    config = lm.get_config('tiny')
    told = costs.estimate_costs(config)
    config.model.impl = 'cudnn'
    assert costs.estimate_costs(config) == told


@pytest.mark.parametrize(
    ('name', 'torso', 'tasks', 'actions'),
    [
        ('dmlab30', 'deep', 30, 9),
        ('dmlab30/rooms_watermaze', 'deep', 1, 9),
        ('procgen', 'deep', 16, 15),
        ('procgen/test/Maze', 'deep', 1, 15),
        ('atari', 'shallow', 57, 18),
        ('atari/Pong,Breakout', 'shallow', 2, 18),
    ],
)
def test_a_simulator_that_is_not_installed_is_not_needed(monkeypatch, name, torso, tasks, actions):
    for module in ('deepmind_lab', 'envpool'):
        monkeypatch.setitem(sys.modules, module, None)
    config = rl_dmlab30.get_config().unlock()
    config.env.name, config.model.torso = name, torso
    config.model.instruction = name.startswith('dmlab30')
    config.model.hidden = config.model.features = 32
    config.actors.batch = config.train.batch = 60
    spec = costs.make_rl_setup(config).agent.spec
    assert (len(spec.tasks), spec.actions) == (tasks, actions)


def test_rows_that_are_fewer_than_tasks_are_refused_without_a_simulator():
    config = rl_dmlab30.get_config().unlock()
    config.actors.batch, config.train.batch = 15, 60
    with pytest.raises(UserError, match='30 tasks but the batch has only 15'):
        costs.estimate_costs(config)


def test_a_search_has_no_parameters_before_it_is_done():
    told = costs.estimate_costs(expressivity.get_config('search'))
    assert 'parameters' not in told and told['steps'] == 5


def test_an_unknown_task_is_named():
    config = lm.get_config('tiny')
    with config.unlocked():
        config.task = 'lmm'
    with pytest.raises(UserError, match="did you mean 'lm'"):
        costs.estimate_costs(config)
