import dataclasses

import jax
import numpy as np
import pytest

from mi.rl import evaluate, setup
from mi.rl.envs.catch import Catch
from mi.rl.worker import Policy
from tests.rl.catch_late import CatchLate, Knows
from tests.rl.test_train import tiny


def test_on_the_host_and_compiled_every_game_is_played_and_nothing_compiled_twice(monkeypatch):
    made = []

    class Counted(Policy):
        def __init__(self, *arguments):
            made.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(evaluate, 'Policy', Counted)
    config = tiny(**{'eval.episodes': 6})
    with (
        evaluate.Evaluation('catch', config) as compiled,
        evaluate.Evaluation('catch', config) as on_host,
    ):
        on_host._compiled = None
        agent = setup.agent(config, compiled.spec)
        params = setup.init_params(agent, jax.random.key(0))
        for step in (1, 2):
            for evaluation in (compiled, on_host):
                measured = evaluation(agent, params, step, 0)['']
                assert measured['length'] == 9
                assert measured['env_steps'] == step * 40
                assert -1 <= measured['return'] <= 1
                assert measured['return'] == pytest.approx(2 * measured['success'] - 1)
    assert [agent.spec.name for agent, _ in made] == [Catch.spec.name]


@pytest.mark.parametrize(
    ('tasks', 'each', 'expected'),
    [((0, 0, 0, 1), 6, [6, 6]), ((0, 1, 0, 1), 3, [4, 4]), ((0, 1), 2, [2, 2])],
)
def test_every_task_is_played_as_often_as_is_asked_for(tasks, each, expected):
    """Rows of a task share its episodes, however many rows the others have."""

    class Pool(CatchLate):
        def __init__(self):
            super().__init__(len(tasks))
            self.spec = dataclasses.replace(self.spec, tasks=('one', 'other'))

        def _seen(self):
            return {**super()._seen(), 'task': np.array(tasks, np.int32)}

    pool = Pool()
    played = evaluate.play(pool, Policy(Knows()), {}, jax.random.key(0), each)
    assert [len(returns) for returns in played[0]] == expected
    assert evaluate.summary(pool.spec, *played)['episodes_per_task'] == expected[0]
