import dataclasses
import functools

import jax
import numpy as np
import pytest

from mi.rl import envs, evaluate, factory
from mi.rl.actors.worker import Policy
from mi.rl.envs.jax.batched import Batched
from mi.rl.envs.jax.catch import Catch
from tests import prng
from tests.rl.ramp import Ramp
from tests.rl.test_train import tiny


def test_on_the_host_and_compiled_every_game_is_played_and_nothing_compiled_twice(monkeypatch):
    made = []

    class Counted(Policy):
        def __init__(self, *arguments):
            made.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(evaluate, 'Policy', Counted)

    def make_on_host(suite, *, batch, seed):
        return Batched(Catch(), batch, seed)

    monkeypatch.setitem(envs.HOST, 'catch_on_host', make_on_host)
    config = tiny(**{'eval.episodes': 6})
    host_config = tiny(**{'eval.episodes': 6, 'env.name': 'catch_on_host'})
    with (
        evaluate.Evaluation(config) as compiled,
        evaluate.Evaluation(host_config) as on_host,
    ):
        agent = factory.build_agent(config, compiled.spec)
        params = jax.jit(functools.partial(factory.init_params, agent))(prng.key(0))
        for step in (1, 2):
            for evaluation in (compiled, on_host):
                measured = evaluation(agent, params, step, 0)['']
                assert measured['length'] == 9
                assert -1 <= measured['return'] <= 1
                assert measured['return'] == pytest.approx(2 * measured['success'] - 1)
    assert [agent.spec.name for agent, _ in made] == [Catch.spec.name]


def test_scores_are_normalised_by_task_and_capped_at_one():
    """(8 − 0) / (4 − 0) = 2 and (30 − 10) / (20 − 10) = 2, capped 1; (−1 − 1) / (3 − 1) = −1."""
    spec = dataclasses.replace(
        Ramp().spec, random=(0.0, 10.0, 1.0), reference=(4.0, 20.0, 3.0), has_success=False
    )
    returned = [np.array([7.0, 9.0]), np.array([30.0]), np.array([-1.0, -1.0])]
    measured = evaluate.summarize(spec, returned, returned, returned)
    assert measured['capped_mean'] == pytest.approx((1 + 1 - 1) / 3)
    assert measured['capped_median'] == 1
    assert measured['return'] == pytest.approx((8 + 30 - 1) / 3)
