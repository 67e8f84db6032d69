import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import rl as configs
from mi.config import UserError
from mi.rl import evaluate, train
from mi.rl.actors import loop as actors_loop
from mi.rl.evaluate import Evaluation
from mi.training import checkpoint
from tests.conftest import ROOT
from tests.lm.test_resume import restored


def tiny(**changes):
    config = configs.get_config('tiny,env=catch').unlock()
    config.update_from_flattened_dict(changes)
    return config.lock()


def records(path):
    return [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]


@pytest.mark.slow
def test_a_run_leaves_its_directory_and_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    config = tiny(**{'seeds': (3, 4), 'env.name': 'xland/hold_red_ball', 'optim.ema': 0.8})
    train.train(config, str(tmp_path / 'whole'))
    whole = records(tmp_path / 'whole')
    # Episodes have at most 40 steps, and the one after a truncated episode is no transition.
    env_steps = {r['step']: r['env_steps'] for r in whole if r['seed'] == 3}
    assert env_steps[5] == 5 * 40 and 800 - 8 * 3 < env_steps[20] < 800
    assert {r['split'] for r in whole} == {'train', 'eval'}
    assert {r['seed'] for r in whole} == {3, 4}
    assert json.loads((tmp_path / 'whole/status.json').read_text())['state'] == 'done'

    save = checkpoint.Checkpoints.save

    def save_and_die(self, step, *rest):
        save(self, step, *rest)
        if step == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint.Checkpoints, 'save', save_and_die)
        train.train(config, str(tmp_path / 'cut'))
    train.train(config, str(tmp_path / 'cut'))
    name = 'metrics.jsonl'
    assert (tmp_path / 'cut' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()
    last = 'checkpoints/00000020/state'
    cut_arrays, whole_arrays = (restored(tmp_path / run / last) for run in ('cut', 'whole'))
    assert any("['opt_state']['ema']" in name for name in whole_arrays)
    assert cut_arrays == whole_arrays


@pytest.mark.slow
def test_threads_leave_a_directory_and_the_learner_continues_exactly(tmp_path, monkeypatch):
    """The first update of the continued run starts from the bits that the stopped run saved."""
    config = tiny(**{'train.topology': 'threads', 'train.steps': 40 * 10, 'eval.greedy': True})
    saved_states, first_states = [], []
    save, jit_update = checkpoint.Checkpoints.save, actors_loop.jit_update

    def save_and_die(self, step, state, meta):
        save(self, step, state, meta)
        saved_states.append(jax.device_get(state))
        raise KeyboardInterrupt

    def jit_and_record(*arguments):
        update = jit_update(*arguments)

        def record(state, *rest):
            first_states.append(jax.device_get(state))
            return update(state, *rest)

        return record

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint.Checkpoints, 'save', save_and_die)
        train.train(config, str(tmp_path / 'run'))
    assert [path.name for path in (tmp_path / 'run/checkpoints').iterdir()] == ['00000005']
    with monkeypatch.context() as patched:
        patched.setattr(actors_loop, 'jit_update', jit_and_record)
        train.train(config, str(tmp_path / 'run'))
    saved, first = (jax.tree.flatten(states[0]) for states in (saved_states, first_states))
    assert saved[1] == first[1] and len(first_states) == 5
    for expected, found in zip(saved[0], first[0], strict=True):
        assert expected.dtype == found.dtype
        np.testing.assert_array_equal(found, expected)

    written = records(tmp_path / 'run')
    assert [r['step'] for r in written if r['split'] == 'train'] == [5, 10]
    assert {r['split'] for r in written} == {'train', 'eval', 'eval_greedy'}
    assert all(r['lag_max'] <= config.actors.max_lag for r in written if r['split'] == 'train')
    assert (tmp_path / 'run/checkpoints/00000010').exists()


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['fused', 'threads'])
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, topology):
    workdir = tmp_path / 'run'
    command = [
        *(sys.executable, '-m', 'mi.main', '--config=configs/rl.py:tiny,env=catch'),
        *(f'--workdir={workdir}', f'--config.train.topology={topology}'),
        *('--config.train.steps=40_000', '--config.eval.episodes=1'),
        *('--config.train.eval_every=1000', '--config.train.save_every=1000'),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    metrics = workdir / 'metrics.jsonl'
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert 'SIGTERM: saving after this step' in said
    status = json.loads((workdir / 'status.json').read_text())
    assert status['state'] == 'preempted'
    assert 0 < status['step'] < 1000
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    steps = [r['step'] for r in records(workdir) if r['split'] == 'train']
    assert steps == sorted(set(steps))
    assert steps[-1] == 1000


@pytest.mark.slow
def test_a_run_stopped_in_its_evaluation_has_its_checkpoint_and_evaluates_when_continued(
    tmp_path, monkeypatch
):
    """And its records are those of a run that was not stopped."""
    config = tiny(**{'train.topology': 'threads', 'train.steps': 40 * 10})
    original = Evaluation.__call__

    def stopped(self, agent, params, step, seed, stops):
        if step == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, agent, params, step, seed, stops)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as raised:
        patched.setattr(Evaluation, '__call__', stopped)
        train.train(config, str(tmp_path))
    assert raised.value.code == 143
    assert json.loads((tmp_path / 'status.json').read_text())['state'] == 'preempted'
    assert (tmp_path / 'checkpoints' / '00000010').exists()
    evaluated = [r for r in records(tmp_path) if r['split'] == 'eval']
    assert not evaluated

    train.train(config, str(tmp_path))
    written = records(tmp_path)
    assert [(r['split'], r['step']) for r in written] == [('train', 5), ('train', 10), ('eval', 10)]
    assert json.loads((tmp_path / 'status.json').read_text())['state'] == 'done'
    with monkeypatch.context() as patched:  # what is evaluated is not evaluated again
        patched.setattr(Evaluation, '__call__', None)
        train.train(config, str(tmp_path))
    assert records(tmp_path) == written


@pytest.mark.slow
def test_a_fused_run_stopped_in_its_evaluation_continues_to_the_same_bits(tmp_path, monkeypatch):
    """SIGTERM in the first policy's evaluation: the checkpoint of its step is there already."""
    config = tiny(**{'train.steps': 40 * 10, 'seeds': (3, 4), 'eval.greedy': True})
    train.train(config, str(tmp_path / 'whole'))
    original = evaluate.play_episodes

    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as raised:
        patched.setattr(evaluate, 'play_episodes', stopped)
        train.train(config, str(tmp_path / 'cut'))
    assert raised.value.code == 143
    assert (tmp_path / 'cut' / 'checkpoints' / '00000010').exists()
    assert {r['split'] for r in records(tmp_path / 'cut')} == {'train'}
    train.train(config, str(tmp_path / 'cut'))
    name = 'metrics.jsonl'
    assert (tmp_path / 'cut' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()
    with monkeypatch.context() as patched:  # what is evaluated is not evaluated again
        patched.setattr(evaluate, 'play_episodes', None)
        train.train(config, str(tmp_path / 'cut'))


@pytest.mark.slow
def test_steps_are_those_that_were_learned_from(tmp_path):
    """Not the rows whose action was ignored: each episode of CartPole has one beside its own."""
    pytest.importorskip('gymnasium', reason='the extra gym is not installed')
    changes = {'train.topology': 'threads', 'env.name': 'gymnasium/CartPole-v1'}
    train.train(tiny(**changes, **{'train.steps': 40 * 20}), str(tmp_path))
    recorded = [r for r in records(tmp_path) if r['split'] == 'train']
    assert [r['step'] for r in recorded] == [5, 10, 15, 20]
    ended = sum(r['episodes'] for r in recorded)
    ignored = 40 * 20 - recorded[-1]['env_steps']
    assert ended - 8 <= ignored <= ended  # those at the end of a row of the last trajectories
    assert ended > 8
    assert recorded[-1]['success'] is None
    scored = [r for r in records(tmp_path) if r['split'] == 'eval'][-1]
    assert scored['env_steps'] == recorded[-1]['env_steps']
    assert scored['success'] is None
    assert scored['episodes_per_task'] == 2


@pytest.mark.slow
def test_seconds_of_threads_exclude_evaluation_and_saving(tmp_path, monkeypatch):
    """Also those of a run that was stopped in an evaluation, which it makes when it continues."""
    ahead, num_evaluations = 0.0, 0
    evaluate, save = Evaluation.__call__, checkpoint.Checkpoints.save

    class Clock:
        @staticmethod
        def perf_counter():
            return time.perf_counter() + ahead

    def evaluate_slowly(*arguments):
        nonlocal ahead, num_evaluations
        ahead, num_evaluations = ahead + 1000, num_evaluations + 1
        if num_evaluations == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    def save_slowly(*arguments):
        nonlocal ahead
        ahead += 1000
        return save(*arguments)

    monkeypatch.setattr('mi.rl.actors.window.time', Clock)
    monkeypatch.setattr(Evaluation, '__call__', evaluate_slowly)
    monkeypatch.setattr(checkpoint.Checkpoints, 'save', save_slowly)
    config = tiny(**{'train.topology': 'threads'})
    with pytest.raises(SystemExit):
        train.train(config, str(tmp_path / 'run'))
    train.train(config, str(tmp_path / 'run'))
    lines = (tmp_path / 'run' / 'timing.jsonl').read_text().splitlines()
    assert len(lines) == 4 and num_evaluations == 3 and ahead == 7000
    assert all(0 < json.loads(line)['seconds'] < 1000 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['fused', 'threads'])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path, topology):
    config = tiny(**{'train.topology': topology, 'optim.learning_rate': 1e30})
    with pytest.raises(UserError, match='is not finite at step'):
        train.train(config, str(tmp_path / 'run'))
    assert json.loads((tmp_path / 'run/status.json').read_text())['state'] == 'failed'
    assert not list((tmp_path / 'run').glob('checkpoints/0*'))


@pytest.mark.parametrize(
    'changes, said',
    [
        ({'env.name': 'katch'}, "config.env.name = 'katch' is unknown; did you mean 'catch'"),
        ({'env.name': 'babyai/goto'}, "Try config.train.topology = 'threads'"),
        ({'train.topology': 'threads', 'actors.batch': 3}, 'a multiple of config.actors.batch = 3'),
        (
            {'env.name': 'xland/kinds', 'eval.held_out': 'xland/test'},
            'expected the trained tasks',
        ),
        (
            {'eval.held_out': 'xland/test', 'model.source': 'inferred'},
            'Try a suite of the same environment',
        ),
        ({'model.source': 'instruction'}, 'use the instruction, but'),
        ({'env.name': 'catch/hard'}, 'because catch has none'),
        ({'model.sites': ('readuot',)}, 'a tuple of distinct sites out of instruction'),
        ({'model.fusion.name': 'multi_head', 'model.source': 'embedding'}, 'one-hot contexts'),
        ({'train.save_every': 7}, 'a multiple of config.train.log_every = 5'),
        (
            {'eval.held_out': 'xlandd', 'train.topology': 'threads'},
            "config.eval.held_out = 'xlandd' is unknown",
        ),
        ({'model.instruction': True}, "config.env.name = 'catch' has none"),
        (
            {'env.options': {'size': 3}, 'train.topology': 'threads'},
            'config.env.options.size is unknown to .catch.; it has no',
        ),
        ({'loss.reward_clip': 'papr'}, "did you mean 'paper'"),
    ],
    ids=str,
)
def test_a_config_that_cannot_work_is_refused(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        train.train(tiny(**changes), str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_catch_is_solved_in_half_a_million_steps(tmp_path):
    train.train(configs.get_config('catch'), str(tmp_path / 'run'))
    last = [r for r in records(tmp_path / 'run') if r['split'] == 'train'][-1]
    assert last['success'] > 0.95


@pytest.mark.slow
def test_one_goal_of_xland_is_learnt_in_600_000_steps(tmp_path):
    """The random policy's mean return is 0.044 (`xland.RANDOM`)."""
    config = configs.get_config('env=xland/hold_red_ball').unlock()
    config.train.update({'batch': 64, 'steps': 600_000})
    train.train(config.lock(), str(tmp_path / 'run'))
    last = [r for r in records(tmp_path / 'run') if r['split'] == 'train'][-1]
    assert last['success'] > 0.75
