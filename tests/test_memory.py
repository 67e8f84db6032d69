"""The estimated memory is that of the arrays, and estimating it allocates nothing."""

import gc
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import lm, rl
from experiments.expressivity import config as expressivity
from mi.config import UserError
from mi.estimate import cli, costs, memory
from mi.rl.fused import loop as fused
from mi.training import run_mesh, sharding


def taken(tree):
    arrays = [jax.random.key_data(a) if _is_key(a) else a for a in jax.tree.leaves(tree)]
    return sum(a.nbytes for a in arrays)


def _is_key(a):
    return jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key)


def test_of_a_small_network_every_byte_is_known_by_hand():
    config = expressivity.get_config('fit')
    with config.unlocked():
        config.problem.dimension, config.model.width, config.seeds = 3, 16, (0, 1)
    gc.collect()  # arrays of earlier tests, which could be freed meanwhile
    num_arrays = len(jax.live_arrays())
    told = memory.estimate_memory(config)
    gc.collect()
    assert len(jax.live_arrays()) <= num_arrays
    numbers = (3 + 3) * 16 + 16 + 16 + 1  # (x, z) → 16 features → y, and biases
    # Adam has two numbers for each parameter, and it and the schedule count the steps.
    assert told['parameters'] == 2 * 4 * numbers
    assert told['optimizer'] == 2 * 4 * (2 * numbers + 2)
    assert told['other'] == 2 * 4
    step = told['step']
    assert step['arguments'] == told['checkpoint'] + 2 * 4  # and the seeds
    assert step['in_place'] == told['checkpoint']
    assert (
        step['peak']
        == step['arguments'] + step['outputs'] - step['in_place'] + (step['temporaries'])
    )
    batch = 4 * 2 * config.train.batch
    assert step['temporaries'] > batch * 16  # what the batch makes of the layer


@pytest.mark.slow
def test_a_language_model_starts_with_so_many_bytes():
    config = lm.get_config('tiny')
    with config.unlocked():
        config.seeds = (0, 1)
    told = memory.estimate_memory(config, compiles=False)
    seeds, mesh = np.asarray(config.seeds, np.int32), sharding.make_mesh(2, config.train.batch)
    state = costs.make_lm_setup(config).trainer.init_seeds(seeds, mesh)
    found = [taken(part) for part in (state.params, state.opt_state, state.carry)]
    assert [told[name] for name in ('parameters', 'optimizer', 'other')] == found
    assert told['checkpoint'] == sum(found)


@pytest.mark.slow
def test_an_agent_starts_with_so_many_bytes():
    config = rl.get_config('tiny,env=catch')
    told = memory.estimate_memory(config, compiles=False)
    environment, agent, optimizer, _, _ = costs.make_rl_setup(config)
    state = fused.init_states(config, environment, agent, optimizer, run_mesh.make_run_mesh(config))
    assert told['checkpoint'] == taken(state) and 'step' not in told
    assert told['parameters'] == taken(state.learner.params)


def test_a_search_does_not_know_its_models_before():
    with pytest.raises(UserError, match='a search chooses its models during the run'):
        memory.estimate_memory(expressivity.get_config('search'))


@pytest.mark.slow
def test_the_command_prints_lines_or_json():
    command = [sys.executable, '-m', 'mi.estimate', '--config=configs/lm.py:tiny', '--nocompile']
    told = costs.estimate_costs(lm.get_config('tiny'))
    out = subprocess.run([*command, '--json'], capture_output=True, text=True, check=True).stdout
    printed = json.loads(out)
    assert {name: printed[name] for name in told} == told
    assert printed['memory']['parameters'] == 4 * told['parameters']['model']


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['--config=configs/lm.py:tiny', '--config.model.hiden=3'], 'hiden'),
        (['--config=configs/lm.py:tiny', '--config.model.hidden=-3'], 'config.model.hidden = -3'),
        (['--config=configs/none.py'], 'configs/none.py'),
        ([], 'expected --config=FILE'),
    ],
)
def test_what_is_wrong_with_a_command_is_one_line(arguments, said):
    with pytest.raises(UserError, match=said) as raised:
        cli.main(['', *arguments])
    assert '\n' not in str(raised.value)


def test_lines_are_for_people():
    told = {'parameters': {'model': 429720, 'fusion': 137280}, 'steps': 400, 'seeds': 3}
    told |= {'flops_per_token': {'model': 859_000, 'fusion': 279_000}, 'units': 2048}
    bytes_ = {'parameters': 5_160_000, 'optimizer': 10_300_000, 'other': 0, 'checkpoint': 15.5e6}
    lines = cli.format_estimate(told | {'flops': 5.28e9, 'memory': bytes_})
    assert lines[0].split() == ['parameters', '429,720', 'of', 'them', 'the', 'fusion', '137,280']
    assert 'FLOPs of the run          6.34 T  all steps and seeds, without evaluations' in lines
    assert any('checkpoint, bytes' in line and '15.5 MB' in line for line in lines)
