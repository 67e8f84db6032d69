"""SIGTERM, SIGINT and kill -9 through every trainer, topology and the local engine.

What a signal leaves: the exit code, the status, the checkpoint; and what the same command makes of
it. Each run waits for its signal between two updates, where it asks whether it is to stop, so that
no case depends on how fast the machine is.
"""

import itertools
import json
import pkgutil
import signal
import subprocess
import sys
import time

import pytest

from mi import main, overrides
from mi.training.checkpoint import find_damage
from mi.training.lock import is_locked
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

# As `python -m mi.main`, but that at a step and after a number of checks whether to stop, it waits
# until the answer is yes.
WAITING = """
import pathlib, sys, time
from mi import main
from mi.training import run_dir

mark = pathlib.Path(sys.argv.pop(1))
step, number = int(sys.argv.pop(1)), int(sys.argv.pop(1))
stops, asked = run_dir.Run.should_stop, []

def waits(self, recorded):
    asked.append(self.step)
    if self.step >= step and len(asked) >= number and not mark.exists():
        mark.touch()
        while not stops(self, recorded):
            time.sleep(0.01)
    return stops(self, recorded)

run_dir.Run.should_stop = waits
main.run()
"""

LM = ['--config=configs/lm.py:tiny', '--config.train.steps=10', '--config.eval.final_tokens=2000']
RL = ['--config=configs/rl.py:tiny,env=catch', '--config.train.steps=800']
FIT = ['--config=experiments/expressivity/config.py:fit', '--config.train.steps=20']
FIT += ['--config.problem.examples=64', '--config.model.parameters=100']
FIT += [f'--config.train.{name}_every=5' for name in ('log', 'eval', 'save')]
SEARCH = ['--config=experiments/expressivity/config.py:search', '--config.search.at=(1,)']
SEARCH += ['--config.search.parameters=30', '--config.search.per_octave=1']
SEARCH += ['--config.search.target=1e-9', '--config.train.steps=20', '--config.train.eval_every=10']
SEARCH += ['--config.problem.examples=64', '--config.train.log_every=10']

# The step and the number of questions at which a run waits.
CASES = {
    'lm': (LM, 7, 1),
    'fused': (RL, 10, 1),
    'threads': ([*RL, '--config.train.topology=threads'], 7, 1),
    'ray': ([*RL, '--config.train.topology=ray'], 7, 1),
    'fit': (FIT, 10, 1),
    'search': (SEARCH, 0, 2),
}
SAVED = 5  # the step of the newest checkpoint then; a search has probes.json instead
SAME_BITS = ('lm', 'fused', 'fit', 'search')  # environments on the host restart
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)


def command(case, texts):
    return CASES[case][0] + ([f'--config.data.source={texts}'] if case == 'lm' else [])


def train(arguments, workdir):
    """What the command does, in this process."""
    config = overrides.parse(arguments)
    pkgutil.resolve_name(main.TASKS['train'][config.task])(config, str(workdir))


def wait_for(file, process):
    deadline = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.poll()
        time.sleep(0.02)


def status(path):
    return json.loads((path / 'status.json').read_text())


def checkpoints(path):
    return {int(p.name): p for p in (path / 'checkpoints').glob('*') if p.name.isdigit()}


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory, texts):
    """metrics.jsonl of a run that nothing stopped, by case; made once."""
    made: dict[str, bytes] = {}

    def of(case):
        if case not in made:
            workdir = tmp_path_factory.mktemp(case)
            train(command(case, texts), workdir)
            made[case] = (workdir / 'metrics.jsonl').read_bytes()
        return made[case]

    return of


# SIGINT has the handler of SIGTERM. Ray sets one of its own.
@pytest.mark.parametrize(
    'case, number',
    [
        pytest.param(case, number, id=f'{case}-{number.name}')
        for case, number in itertools.product(CASES, SIGNALS)
        if number != signal.SIGINT or case in ('lm', 'ray')
    ],
)
def test_a_run_that_gets_a_signal(case, number, tmp_path, texts, uninterrupted):
    if case == 'ray':
        pytest.importorskip('ray')
    arguments, (_, *waits) = command(case, texts), CASES[case]
    workdir, mark = tmp_path / 'run', tmp_path / 'waits'
    process = subprocess.Popen(
        [sys.executable, '-c', WAITING, mark, *map(str, waits), *arguments, f'--workdir={workdir}'],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(mark, process)
    asked_at = status(workdir)
    assert asked_at['state'] == 'running' and is_locked(workdir / 'lock')
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    left = status(workdir)
    assert not is_locked(workdir / 'lock')

    # What it leaves.
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert left == asked_at  # whoever looks takes a running one without a lock for dead
        assert max(checkpoints(workdir), default=SAVED) == SAVED
    else:
        assert process.returncode == 143, said
        assert f'{number.name}: saving after this step; the same command continues' in said
        assert 'Traceback' not in said
        assert left['state'] == 'preempted' and left['pid'] == process.pid
        if case != 'search':
            assert left['step'] > SAVED and max(checkpoints(workdir)) == left['step']
    assert all(find_damage(path) == '' for path in checkpoints(workdir).values())
    if case == 'search':
        assert len(json.loads((workdir / 'probes.json').read_text())['1']) == 2
    else:
        assert SAVED in checkpoints(workdir)

    # What the same command makes of it.
    train(arguments, workdir)
    assert status(workdir)['state'] == 'done'
    written = (workdir / 'metrics.jsonl').read_bytes()
    if case in SAME_BITS:
        assert written == uninterrupted(case)
    else:
        records = [json.loads(line) for line in written.splitlines()]
        steps = [record['step'] for record in records if record['split'] == 'train']
        assert steps == sorted(set(steps)) and steps[-1] == 20
        assert set(range(5, 21, 5)) <= set(steps)
        assert [r['step'] for r in records if r['split'] == 'eval'] == [10, 20]
        assert max(checkpoints(workdir)) == status(workdir)['step'] == 20


ENGINE = """
import pathlib, sys
from launch import engine, local
states = local.submit({pathlib.Path(sys.argv[1]): sys.argv[2:]}, engine.Resources())
sys.exit(0 if set(states.values()) == {'done'} else 1)
"""


@pytest.mark.parametrize('number', SIGNALS, ids=lambda number: number.name)
def test_a_launcher_that_gets_a_signal_stops_its_member_or_finds_it_again(number, tmp_path):
    """A member is not lost with its launcher, nor begun twice."""
    path, steps = tmp_path / 'run', 60
    member = [sys.executable, str(ROOT / 'tests/launch/member.py'), f'--workdir={path}']
    member += [f'--steps={steps}', '--seconds=0.05']
    launcher = [sys.executable, '-c', ENGINE, str(path), *member]
    process = subprocess.Popen(launcher, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for(path / 'metrics.jsonl', process)
    process.send_signal(number)
    code = process.wait(timeout=120)
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 143
        assert status(path)['state'] == 'preempted' and not is_locked(path / 'launched')
    subprocess.run(launcher, cwd=ROOT, stdout=subprocess.DEVNULL, check=True, timeout=120)
    assert status(path)['state'] == 'done'
    lines = (path / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line)['step'] for line in lines] == list(range(1, steps + 1))
    begun = (path / 'starts.jsonl').read_text().splitlines()
    assert len(begun) == (1 if number == signal.SIGKILL else 2)
