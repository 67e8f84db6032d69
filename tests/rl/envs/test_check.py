import dataclasses
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mi import testing
from mi.config import UserError
from mi.rl import envs, factory
from mi.rl.actors.worker import Policy, Worker
from mi.rl.envs.check import check_environment, check_spec, check_step
from mi.rl.envs.spec import Step
from tests import prng
from tests.conftest import ROOT
from tests.rl.catch_late import CatchLate, Knows
from tests.rl.ramp import Ramp

DOCS = ROOT / 'docs/rl.md'


def array(shape=(), dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


TASK = array(dtype=jnp.int32)


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'actions': 0}, 'Spec.actions = 0: expected an integer of at least 1'),
        ({'actions': 2.0}, 'Spec.actions = 2.0'),
        ({'tasks': ()}, r'Spec.tasks = \(\): expected a tuple of distinct names'),
        ({'tasks': ('one', 'one')}, 'Spec.tasks'),
        ({'tasks': 'one'}, "Spec.tasks = 'one'"),
        ({'random': (0.0,)}, r'Spec.random = \(0.0,\): expected None or 3 numbers'),
        ({'reference': (1.0, 2.0, float('nan'))}, 'Spec.reference'),
        (
            {'random': (0.0, 1.0, 0.0), 'reference': (1.0, 1.0, 1.0)},
            "Spec.reference of task 'two' = 1.0: expected a score different from that",
        ),
        ({'vocabulary': 4}, 'Spec.vocabulary = 4: expected the number of tokens'),
        ({'words': ('go',)}, r"Spec.words = \('go',\): expected \(\) or 0"),
        ({'episode': -1}, 'Spec.episode = -1: expected the maximum length of an episode'),
        ({'episode': 7.5}, 'Spec.episode = 7.5'),
        ({'observation': {'features': array((1,))}}, "'features': expected 'task' and at least"),
        ({'observation': {'task': TASK}}, 'at least one of grid, pixels, features'),
        (
            {'observation': {'task': array((1,), jnp.int32), 'features': array((1,))}},
            r"observation\['task'\] is int32\[1\]: expected int32 \[\]",
        ),
        ({'observation': {'task': TASK, 'features': array((0,))}}, r'float32\[0\]: expected float'),
        ({'observation': {'task': TASK, 'features': array((2, 2))}}, r'is float32\[2,2\]'),
        ({'observation': {'task': TASK, 'pixels': array((9, 9, 3))}}, r'is float32\[9,9,3\]'),
        (
            {'observation': {'task': TASK, 'grid': array((3, 3, 2), jnp.int32)}},
            r'Spec.categories = \(\): expected a positive number for each layer',
        ),
        (
            {
                'observation': {
                    'task': TASK,
                    'features': array((1,)),
                    'instruction': array((3,), jnp.int32),
                }
            },
            'Spec.vocabulary = 0: expected the number of tokens',
        ),
    ],
    ids=str,
)
def test_a_spec_that_contradicts_itself_is_refused(changes, said):
    check_spec(Ramp().spec)
    with pytest.raises(UserError, match=f"environment 'ramp': .*{said}"):
        check_spec(dataclasses.replace(Ramp().spec, **changes))


def test_numbers_of_numpy_are_integers():
    check_spec(dataclasses.replace(Ramp().spec, actions=np.int64(4), episode=np.int32(7)))


class Changed(Ramp):
    """What reset and step return, changed by functions."""

    def __init__(self, reset=None, step=None, **kwargs):
        super().__init__(**kwargs)
        self._change_reset, self._change_step = reset, step

    def reset(self, key, task):
        result = super().reset(key, task)
        return self._change_reset(*result) if self._change_reset else result

    def step(self, state, action):
        result = super().step(state, action)
        return self._change_step(*result) if self._change_step else result


def without_task(observation):
    return {'features': observation['features']}


@pytest.mark.parametrize(
    ('environment', 'said'),
    [
        (Changed(episode=0), 'Spec.episode = 0: expected the maximum length of an episode'),
        (
            Changed(reset=lambda state, seen: (state, Step(seen, 0.0, 1.0, True, False, False))),
            r'reset returned \(State, Step\): expected the state and the first observation',
        ),
        (Changed(reset=lambda state, seen: state), 'reset returned State: expected the state and'),
        (
            Changed(reset=lambda state, seen: (state, without_task(seen))),
            "reset returned the observation 'features': expected that of the spec, 'features', "
            "'task'",
        ),
        (
            Changed(reset=lambda state, seen: (state, {**seen, 'features': jnp.ones(2)})),
            r"reset returned observation\['features'\] as float32\[2\]: expected float32\[1\]",
        ),
        (
            Changed(step=lambda state, after: (state, Step(after.observation, 0, 1, 0, 0, 0))),
            r'step returned \(State, Step\): expected the state and a Transition',
        ),
        (
            Changed(
                step=lambda state, after: (
                    state,
                    after._replace(observation=without_task(after.observation)),
                )
            ),
            "step returned the observation 'features'",
        ),
        (
            Changed(step=lambda state, after: (state, after._replace(reward=jnp.ones(1)))),
            r'step returned reward as float32\[1\]: expected float32 \[\]',
        ),
        (
            Changed(step=lambda state, after: (state, after._replace(terminated=0.0))),
            r'step returned terminated as float32\[\]: expected bool \[\]',
        ),
        (
            Changed(step=lambda state, after: (state, after._replace(truncated=state.time))),
            r'step returned truncated as int32\[\]: expected bool \[\]',
        ),
        (
            Changed(step=lambda state, after: (state._replace(time=state.time + 0.5), after)),
            r'state.time is int32\[\] after reset and float32\[\] after step: expected the same',
        ),
        (
            Changed(step=lambda state, after: (state._replace(task=None), after)),
            r'state.task is int32\[\] after reset and absent after step',
        ),
    ],
    ids=range(12),
)
def test_an_environment_that_contradicts_its_spec_is_refused(monkeypatch, environment, said):
    """In every topology, before anything is compiled, by the argument or key that names it."""
    monkeypatch.setitem(envs.JAX, 'ramp', lambda suite: environment)
    said = f"= 'ramp': environment 'ramp': {said}"
    with pytest.raises(ValueError, match=f'^`env_name` {said}'):
        envs.make('ramp')
    with pytest.raises(ValueError, match=f'^`env_name` {said}'):
        envs.pool('ramp', 2, 0)
    config = ml_collections.ConfigDict(
        {'env': {'name': 'ramp', 'options': {}}, 'eval': {'held_out': 'ramp'}}
    )
    for config_key in ('env.name', 'eval.held_out'):
        with pytest.raises(UserError, match=f'^config.{config_key} {said}'):
            factory.make_environment(config, config_key)


def test_an_environment_without_a_method_is_refused():
    class Empty:
        spec = Ramp().spec

        def reset(self, key, task):
            raise AssertionError

    with pytest.raises(UserError, match='Empty has no step; see JaxEnvironment'):
        check_environment(Empty())


@pytest.mark.parametrize('name', ['catch', 'xland', 'xland/hold_red_ball', 'actuator_inversion'])
def test_our_own_are_what_their_specs_say(name):
    check_environment(envs.make(name))


def test_the_first_step_of_a_pool_is_what_its_spec_says():
    pool = CatchLate(3)
    step = pool.reset()
    check_step(pool.spec, 3, step)
    with pytest.raises(UserError, match=r"observation\['grid'\] as int32\[3,10,5,1\]: expected"):
        check_step(pool.spec, 4, step)
    with pytest.raises(UserError, match=r'reset returned reward of shape \(\): expected \(3,\)'):
        check_step(pool.spec, 3, step._replace(reward=0.0))
    observation = {**step.observation, 'grid': step.observation['grid'].astype(float)}
    with pytest.raises(UserError, match=r'as float64\[3,10,5,1\]: expected int32'):
        check_step(pool.spec, 3, step._replace(observation=observation))


def test_a_worker_refuses_a_pool_that_contradicts_its_spec():
    class Wrong(CatchLate):
        def _seen(self):
            seen = super()._seen()
            return {**seen, 'grid': seen['grid'][:, :-1]}

    with pytest.raises(UserError, match=r"'catch': reset returned observation\['grid'\] as int32"):
        Worker([Wrong()], Policy(Knows()), 3, prng.key(0))


def test_the_environment_of_the_docs(monkeypatch, tmp_path):
    """To the right: the first task is done after 5 − x steps, the second is cut after 50."""
    [code] = re.findall(r'```python\n(# my_walk.py.*?)```', DOCS.read_text(), flags=re.DOTALL)
    (tmp_path / 'my_walk.py').write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    environment = envs.make('my_walk:make')
    testing.check_environment(environment)
    for task, terminates in ((0, True), (1, False)):
        state, observation = environment.reset(prng.key(0), jnp.int32(task))
        start = round(float(observation['features'][0]) * 5)
        ends = []
        for _ in range(5 - start if terminates else 50):
            state, transition = environment.step(state, jnp.int32(1))
            ends.append(bool(transition.terminated | transition.truncated))
        assert ends == [False] * (len(ends) - 1) + [True]
        assert bool(transition.terminated) == terminates == bool(transition.success)
        assert transition.reward == float(terminates)
