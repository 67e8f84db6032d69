"""What benchmarks share: lists of names, records, and the turns of a race."""

import io
import json
import pathlib
import signal
import subprocess
import sys

import jax
import pytest
from absl import flags

from benchmarks import layers, lm, options, regimes, rounds, soak
from mi.config import UserError

NAMES = ('lstm', 'transformer', 'lstm large')


def make_flag(argument):
    values = flags.FlagValues()
    flag = flags.DEFINE_list('only', [], '', flag_values=values)
    values(['program', argument])
    return flag


@pytest.mark.parametrize(
    ('argument', 'by_beginning', 'expected'),
    [
        ('--only=', False, [*NAMES]),
        ('--only=transformer,lstm', False, ['transformer', 'lstm']),
        ('--only=', True, [*NAMES]),
        ('--only=tr,lstm', True, [*NAMES]),
        ('--only=lstm l', True, ['lstm large']),
    ],
)
def test_names_of_a_list_are_selected(argument, by_beginning, expected):
    assert options.select(make_flag(argument), NAMES, by_beginning) == expected


@pytest.mark.parametrize('by_beginning', [False, True])
def test_an_unknown_name_is_refused_with_the_nearest(by_beginning):
    with pytest.raises(UserError, match=r"^--only=lstms is unknown; did you mean 'lstm'"):
        options.select(make_flag('--only=transformer,lstms'), NAMES, by_beginning)


def test_a_peer_on_the_cpu_is_not_compared_with_a_gpu(monkeypatch):
    options.require_cpu('torch')
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    with pytest.raises(UserError, match=r'backend is gpu: expected cpu.* Try JAX_PLATFORMS=cpu'):
        options.require_cpu('torch')


def test_a_record_has_the_versions_of_the_peers_that_are_installed(tmp_path):
    options.write_json(str(tmp_path / 'a.json'), ['pytest', 'missing_package'], figures=[1])
    record = json.loads((tmp_path / 'a.json').read_text())
    assert record.keys() == {'machine', 'jax', 'pytest', 'figures'}
    assert (record['jax'], record['pytest']) == (jax.__version__, pytest.__version__)


def test_ratios_are_those_of_each_round():
    figures = rounds.print_ratios(
        'set', 'tokens', {'a': 6, 'b': 12}, {'a': [4.0, 1.0, 2.0], 'b': [1.0, 2.0, 4.0]}
    )
    assert figures[1] == {
        'side': 'b', 'seconds': 2.0, 'tokens_per_second': 6.0, 'ratio': 0.5,
        'ratios': [4.0, 0.5, 0.5], 'seconds_by_round': [1.0, 2.0, 4.0],
    }  # fmt: skip
    assert figures[0]['tokens_per_second'] == 3.0 and figures[0]['ratios'] == [1.0] * 3


def test_the_clock_of_a_turn_waits_for_the_last_step(monkeypatch):
    events = []

    class Pending:
        def block_until_ready(self):
            events.append('wait')

    def step():
        events.append('step')
        return Pending()

    def read_clock():
        events.append('clock')
        return float(events.count('clock'))

    monkeypatch.setattr(sys, 'stdin', io.StringIO('\n'))
    rounds.serve(step, seconds=2.0, read_clock=read_clock)
    turn = ['step', 'wait', 'clock', 'step', 'wait', 'clock']
    assert events == ['step', 'clock', *['clock', 'step'], 'clock', *turn]


# Waits until the process whose id is in a file is stopped, and answers with its state.
OBSERVER = """
import pathlib, sys, time
print('ready', flush=True)
for _ in sys.stdin:
    deadline = time.monotonic() + 30
    while True:
        pid = pathlib.Path(sys.argv[1]).read_text()
        state = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(') ')[2][0]
        if state == 'T' or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    print(state, flush=True)
"""
ACTOR = """
import os, pathlib, sys
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
print('ready', flush=True)
for _ in sys.stdin:
    print('R', flush=True)
"""


@pytest.mark.skipif(not pathlib.Path('/proc').exists(), reason='no /proc on this system')
def test_a_side_with_actors_is_stopped_between_its_turns(tmp_path):
    commands = {
        side: ['-S', '-c', code, str(tmp_path / 'pid')]
        for side, code in [('actor', ACTOR), ('observer', OBSERVER)]
    }
    states = rounds.race(commands, 3, parse=str.strip, stopped=['actor'])
    assert states == {'actor': ['R'] * 3, 'observer': ['T'] * 3}


def test_the_trainer_runs_the_model_of_the_steps_that_it_is_compared_with():
    steps_config, run_config = (lm.make_config('loop', 'default', s) for s in ('steps', 'run'))
    lm.trainer_run(run_config)
    assert run_config.model == steps_config.model and run_config.optim == steps_config.optim


def test_sides_in_torch_are_compiled_before_they_are_timed(monkeypatch):
    pytest.importorskip('torch', reason='the extra benchmark is not installed')
    calls = []

    def layer(arrays):
        calls.append(arrays)
        return arrays['x'] @ arrays['V'] + 0 * sum(a.sum() for a in arrays.values())

    monkeypatch.setattr(layers, 'torch_sides', lambda regime: {'side': layer})
    regime = regimes.Regime('', 'full', (2,), 3, 4, 5)
    timed, _ = layers.prepare('torch', regime)
    assert timed.keys() == {('side', 'f'), ('side', 'fb')} and len(calls) == 2


def test_a_run_that_does_not_save_at_sigterm_is_an_error(tmp_path):
    (tmp_path / 'status.json').write_text('{}')
    code = 'import sys; sys.exit(int(input()))'
    for exit_code in (143, 1):
        process = subprocess.Popen([sys.executable, '-S', '-c', code], stdin=subprocess.PIPE)
        process.send_signal = lambda number, process=process, exit_code=exit_code: (
            number == signal.SIGTERM and process.communicate(f'{exit_code}\n'.encode())
        )
        if exit_code == 143:
            soak.stop(process, tmp_path)
        else:
            with pytest.raises(SystemExit, match='expected exit code 143 after SIGTERM, got 1'):
                soak.stop(process, tmp_path)
