"""Agents are evaluated at the average of their parameters."""

import json

import jax
import numpy as np
import pytest

from configs import rl as configs
from mi.rl import assess, envs, factory, restore, train
from tests.lm.test_resume import restored


def tiny(**changes):
    config = configs.get_config('tiny,env=catch').unlock()
    config.update_from_flattened_dict({'optim.ema': 0.8, 'optim.learning_rate': 0.01, **changes})
    return config.lock()


def average_checkpoints(directory, prefix):
    """Name → average of the parameters of all checkpoints, by the recursion; and the saved one."""
    e, steps = {}, sorted(path for path in directory.iterdir() if path.name.isdigit())
    for step in steps:
        arrays = restored(step / 'state')
        for name in (name for name in arrays if name.startswith(f"{prefix}['params']")):
            p = np.frombuffer(arrays[name], np.float32).astype(np.float64)
            e[name] = 0.8 * e.get(name, 0) + (1 - 0.8) * p
    saved = {name: arrays[name.replace("['params']", "['opt_state']['ema']")] for name in e}
    return {name: value / (1 - 0.8 ** len(steps)) for name, value in e.items()}, saved


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['fused', 'threads'])
def test_a_run_is_evaluated_at_the_average_of_its_parameters(topology, tmp_path):
    each_step = {'train.log_every': 1, 'train.save_every': 1, 'train.keep': 100}
    config = tiny(**each_step, **{'train.topology': topology, 'loss.popart': 0.0})
    train.train(config, str(tmp_path))
    is_fused = topology == 'fused'
    prefix = "['learner']" if is_fused else ''
    average, saved = average_checkpoints(tmp_path / 'checkpoints', prefix)
    assert len(average) > 5
    for name, expected in average.items():
        found = np.frombuffer(saved[name], np.float32)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)

    # --mode=eval restores it, and the same episodes have the scores of the last record.
    agent = factory.build_agent(config, envs.make('catch').spec)
    params, step = restore.restore_params(config, agent, tmp_path)
    assert step == 20
    leaves, _ = jax.tree.flatten_with_path(params)
    for path, leaf in leaves:
        name = f"{prefix}['params']{jax.tree_util.keystr(path)}"
        assert np.asarray(leaf).tobytes() == saved[name]
    assess.assess(config, str(tmp_path))
    scores = json.loads((tmp_path / 'evaluation/scores.json').read_text())['eval']['0']
    lines = map(json.loads, (tmp_path / 'metrics.jsonl').read_text().splitlines())
    *_, last = (record for record in lines if record['split'] == 'eval')
    assert {key: last[key] for key in ('return', 'length')} == {
        key: scores[key] for key in ('return', 'length')
    }
