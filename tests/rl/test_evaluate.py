import jax
import pytest

from mi.rl import evaluate, setup
from mi.rl.envs.catch import Catch
from mi.rl.worker import Policy
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
        evaluate.Evaluation(config) as compiled,
        evaluate.Evaluation(config) as on_host,
    ):
        on_host._compiled = None
        agent = setup.agent(config, compiled.spec)
        params = setup.init_params(agent, jax.random.key(0))
        for step in (1, 2):
            for evaluation in (compiled, on_host):
                measured = evaluation(agent, params, step, 0)['']
                assert measured['length'] == 9
                assert -1 <= measured['return'] <= 1
                assert measured['return'] == pytest.approx(2 * measured['success'] - 1)
    assert [agent.spec.name for agent, _ in made] == [Catch.spec.name]
