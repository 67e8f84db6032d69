"""Traces of training, read with jax's own reader of what TensorBoard's profiler opens."""

import importlib

import pytest
from jax.profiler import ProfileData

from mi.config import UserError
from mi.fit import train as fit
from mi.lm import train as lm
from mi.rl import train as rl
from mi.training.run_dir import parse_steps

LM = {'train.steps': 6, 'train.log_every': 2, 'train.eval_every': 6, 'train.save_every': 6}
FIT = {'train.steps': 20, 'seeds': (0,), 'problem.examples': 64} | {
    f'train.{name}_every': 5 for name in ('log', 'eval', 'save')
}
RL = {'env.name': 'catch', 'train.steps': 40 * 6, 'train.log_every': 2, 'eval.episodes': 1} | {
    f'train.{name}_every': 6 for name in ('eval', 'save')
}


def config(file, preset, changes):
    made = importlib.import_module(file).get_config(preset)
    made.update_from_flattened_dict(changes)
    return made


def marked(workdir):
    """The first steps of the calls that a trace has marked, and what was computed in it."""
    [file] = (workdir / 'profile').glob('plugins/profile/*/*.xplane.pb')
    events = [
        event
        for plane in ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
    ]
    calls = [dict(e.stats)['step_num'] for e in events if e.name == 'train']
    return sorted(calls), {event.name for event in events}


@pytest.mark.slow
def test_every_step_of_a_language_model(tmp_path, texts, cache):
    changes = LM | {'data.source': texts, 'data.cache': cache}
    lm.train(config('configs.lm', 'tiny', changes), str(tmp_path), profile=(3, 5))
    calls, names = marked(tmp_path)
    assert calls == [3, 4, 5]
    assert any('dot' in name for name in names)


def test_programs_of_several_steps_are_recorded_as_a_whole(tmp_path):
    """Steps 7 to 12 lie in the programs of steps 6 to 10 and 11 to 15."""
    fit.train(config('experiments.expressivity.config', 'fit', FIT), str(tmp_path), profile=(7, 12))
    assert marked(tmp_path)[0] == [6, 11]


@pytest.mark.slow
@pytest.mark.parametrize(('topology', 'calls'), [('fused', [3, 5]), ('threads', [3, 4, 5])])
def test_updates_of_an_agent(tmp_path, topology, calls):
    changes = RL | {'train.topology': topology}
    rl.train(config('configs.rl', 'tiny', changes), str(tmp_path), profile=(3, 5))
    assert marked(tmp_path)[0] == calls


def test_a_profile_that_the_run_never_reaches_leaves_no_trace(tmp_path):
    fit.train(
        config('experiments.expressivity.config', 'fit', FIT), str(tmp_path), profile=(100, 120)
    )
    assert not (tmp_path / 'profile').exists()


def test_a_profile_that_the_run_does_not_end_is_written(tmp_path):
    fit.train(
        config('experiments.expressivity.config', 'fit', FIT), str(tmp_path), profile=(16, 120)
    )
    assert marked(tmp_path)[0] == [16]


@pytest.mark.parametrize('text', ['10', '20:10', '0:5', 'a:b', '-3:4'])
def test_a_malformed_profile_is_refused(text):
    with pytest.raises(UserError, match='expected FIRST:LAST'):
        parse_steps(text)
    assert parse_steps('10:20') == parse_steps('steps=10:20') == (10, 20)
