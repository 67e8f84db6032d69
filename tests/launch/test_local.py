import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import rich.console

from launch import engine, local, plan, process, records, state, sweep, table
from mi.config import UserError
from mi.estimate import costs
from mi.overrides import find_file
from tests.conftest import ROOT

MEMBER = str(pathlib.Path(__file__).with_name('member.py'))
ONE = engine.Resources()

SWEEP = """
from launch.sweep import product
CONFIG = 'configs/lm.py:tiny'
TITLE, METRIC, SPLIT, BASELINE, NOTES = 'a test', 'bits_per_byte', 'test', {baseline!r}, []
def sweep():
    return {overrides!r}
"""


def write(tmp_path, overrides, baseline=None):
    file = tmp_path / 'a_sweep.py'
    file.write_text(SWEEP.format(overrides=overrides, baseline=baseline))
    return str(file)


def launch(file, workdir, *more):
    return [sys.executable, '-m', 'launch.local', f'--sweep={file}', f'--workdir={workdir}', *more]


def status(path, name='status.json'):
    return json.loads((path / name).read_text())


def test_members_are_named_by_what_differs(tmp_path):
    overrides = sweep.product(
        **{
            'model.fusion.name': ['concat', 'mi'],
            'model.site': ['encoder', 'both'],
            'seeds': [(0, 1)],
        }
    )
    members = sweep.load(write(tmp_path, overrides), tmp_path / 'runs')
    assert [m.name for m in members] == [
        'fusion=concat,site=encoder', 'fusion=concat,site=both',
        'fusion=mi,site=encoder', 'fusion=mi,site=both',
    ]  # fmt: skip
    assert members[3].label == 'mi, both'
    assert '--config.seeds=(0, 1)' in members[3].command
    record = json.loads((tmp_path / 'runs/sweep.json').read_text())
    assert [m['label'] for m in record['members']] == [m.label for m in members]


def test_runs_of_a_task_each_are_one_arm(tmp_path):
    overrides = sweep.product(**{'model.site': ['none', 'both'], 'data.source': ['a', 'b']})
    file = write(tmp_path, overrides)
    with open(file, 'a') as more:
        more.write("TASK = 'data.source'\n")
    members = sweep.load(file, tmp_path / 'runs')
    assert [m.label for m in members] == ['none', 'none', 'both', 'both']
    assert len({m.name for m in members}) == 4
    record = json.loads((tmp_path / 'runs/sweep.json').read_text())
    assert [m['task'] for m in record['members']] == ['a', 'b', 'a', 'b']


def test_arms_of_the_same_values_are_told_apart_by_their_keys(tmp_path):
    overrides = [
        {'model.hidden': 24, 'seeds': (0,)},
        {'model.embed': 24, 'seeds': (0,)},
        {'model.embed': 24, 'seeds': (1,)},
        {'model.hidden': 32, 'seeds': (0,)},
        {'optim.name': 'adam', 'seeds': (0,)},
        {'model.fusion.name': 'adam', 'seeds': (0,)},
    ]
    members = sweep.load(write(tmp_path, overrides), tmp_path / 'runs')
    assert [m.label for m in members] == [
        'hidden=24', 'embed=24', 'embed=24', '32', 'optim.name=adam', 'fusion=adam',
    ]  # fmt: skip
    both = [{'model.context': 24, 'data.context': 24}, {'model.context': 24}]
    shown = [{'model.context': 24}, {'data.context': 24}]
    assert sweep._make_labels(shown, shown, None) == ['model.context=24', 'data.context=24']
    assert sweep._make_labels(both, both, None) == ['24, 24', '24']


def test_a_seed_of_an_arm_is_trained_once(tmp_path):
    arms = sweep.product(**{'model.site': ['none'], 'seeds': [(0, 1), (1, 2)]})
    with pytest.raises(UserError, match=r"seed 1 of 'only'.*; give them different seeds"):
        sweep.load(write(tmp_path, arms), tmp_path / 'runs')
    configured = [{}, {'seeds': (0,)}]  # the first has the config's own
    with pytest.raises(UserError, match=r'only and seeds=\(0,\) both train seed 0'):
        sweep.load(write(tmp_path, configured), tmp_path / 'runs')
    file = write(tmp_path, sweep.product(**{'data.source': ['a', 'b'], 'seeds': [(0,), (1,)]}))
    with open(file, 'a') as more:
        more.write("TASK = 'data.source'\n")
    assert {m.label for m in sweep.load(file, tmp_path / 'runs')} == {'only'}


def test_helpers_make_the_members_they_say():
    widths = sweep.zip_(**{'model.width': [64, 128], 'optim.learning_rate': [0.1, 0.03]})
    assert widths == [
        {'model.width': 64, 'optim.learning_rate': 0.1},
        {'model.width': 128, 'optim.learning_rate': 0.03},
    ]
    both = sweep.product(widths, seeds=[(0,), (1,)])
    assert [(m['model.width'], m['seeds']) for m in both] == [
        (64, (0,)), (64, (1,)), (128, (0,)), (128, (1,)),
    ]  # fmt: skip
    first = sweep.product(seeds=[(0,)], **{'model.width': [64]})
    assert sweep.chain(first, widths, first) == [*first, *widths]
    with pytest.raises(UserError, match=r'model\.width 2, seeds 1'):
        sweep.zip_(**{'model.width': [1, 2], 'seeds': [(0,)]})
    with pytest.raises(UserError, match=r'two of its sweeps set model\.width, optim'):
        sweep.product(widths, widths)


def begin(runs, *names):
    for name in names:
        (runs / name).mkdir(exist_ok=True)
        (runs / name / 'config.json').write_text('{}')


def test_another_sweep_in_the_same_directory_is_refused(tmp_path):
    sweep.load(write(tmp_path, [{'model.site': 'none'}]), tmp_path / 'runs')
    begin(tmp_path / 'runs', 'site=none')
    with pytest.raises(UserError, match='holds another sweep'):
        sweep.load(write(tmp_path, [{'model.site': 'both'}]), tmp_path / 'runs')


def test_a_changed_sweep_is_refused_by_keys_and_values_and_a_longer_one_is_not(tmp_path):
    runs = tmp_path / 'runs'
    overrides = [{'model.site': site, 'train.steps': 7} for site in ('none', 'both')]
    sweep.load(write(tmp_path, overrides), runs)
    sweep.load(write(tmp_path, [*overrides, {'model.site': 'encoder', 'train.steps': 7}]), runs)
    begin(runs, *(f'site={site}' for site in ('none', 'both', 'encoder')))
    changed = [{'model.site': site, 'train.steps': 8, 'seeds': (1,)} for site in ('none', 'both')]
    message = (
        r'site=none, site=both: seeds was \[0\] and is \[1\] now, train\.steps was 7 and is 8 now'
    )
    with pytest.raises(
        UserError, match=message + '; site=encoder: removed from the sweep|' + message
    ):
        sweep.load(write(tmp_path, changed), runs)
    changed_file = write(tmp_path, overrides).replace('a_sweep', 'other')
    pathlib.Path(changed_file).write_text(
        (tmp_path / 'a_sweep.py').read_text().replace('lm.py:tiny', 'lm.py:tiny,core=gru')
    )
    with pytest.raises(UserError, match=r"model\.core was 'lstm' and is 'gru' now"):
        sweep.load(changed_file, runs)


def test_a_sweep_that_was_begun_before_a_config_key_was_there_goes_on(tmp_path):
    runs = tmp_path / 'runs'
    overrides = [{'model.site': site} for site in ('none', 'both')]
    sweep.load(write(tmp_path, overrides), runs)
    begin(runs, 'site=none', 'site=both')
    record = json.loads((runs / 'sweep.json').read_text())
    del record['base']['eval']['stride']
    (runs / 'sweep.json').write_text(json.dumps(record))
    sweep.load(write(tmp_path, overrides), runs)
    assert json.loads((runs / 'sweep.json').read_text())['base']['eval']['stride'] == 0


def test_what_has_not_begun_may_change_and_a_dry_run_claims_nothing(tmp_path):
    runs = tmp_path / 'runs'
    overrides = [{'model.site': site, 'train.steps': 7} for site in ('none', 'both')]
    changed = [{**changes, 'train.steps': 8} for changes in overrides]
    sweep.load(write(tmp_path, overrides), runs, dry=True)
    assert not runs.exists()
    sweep.load(write(tmp_path, overrides), runs)
    sweep.load(write(tmp_path, changed), runs)  # none has begun
    old_content = (runs / 'sweep.json').read_bytes()
    begin(runs, 'site=none')
    with pytest.raises(UserError, match=r'\(site=none: train\.steps was 8 and is 7 now\)'):
        sweep.load(write(tmp_path, overrides), runs)
    other_overrides = [
        changed[0],
        {**changed[1], 'model.site': 'encoder'},
    ]  # site=both is there no more
    sweep.load(write(tmp_path, other_overrides), runs, dry=True)
    assert (runs / 'sweep.json').read_bytes() == old_content
    sweep.load(write(tmp_path, other_overrides), runs)

    sweep.load(write(tmp_path, overrides), tmp_path / 'queued', 'slurm')
    with pytest.raises(UserError, match='holds another sweep'):  # a job may be in the queue
        sweep.load(write(tmp_path, changed), tmp_path / 'queued', 'slurm')


def test_a_key_that_the_config_has_not_is_one_line_before_anything_is_written(tmp_path):
    overrides = [{'model.hidden': 24}, {'model.hiden': 24}]
    with pytest.raises(
        UserError, match=r'--config\.model\.hiden=24.*did you mean config\.model\.hidden'
    ) as message:
        sweep.load(write(tmp_path, overrides), tmp_path / 'runs')
    assert '\n' not in str(message.value) and '\\n' not in str(message.value)
    with pytest.raises(UserError, match=r'model\.hidden=wide'):
        sweep.load(write(tmp_path, [{'model.hidden': 'wide'}]), tmp_path / 'runs')
    assert not (tmp_path / 'runs').exists()


def test_a_dry_run_tells_what_members_cost_and_hours_by_the_rate_of_those_that_ran(
    tmp_path, capsys
):
    values = {'model.width': [16, 32], 'seeds': [(0, 1)], 'train.steps': [100], 'train.batch': [8]}
    file = tmp_path / 'fits.py'
    text = SWEEP.format(overrides=sweep.product(**values), baseline=None)
    text = text.replace("'bits_per_byte', 'test'", "'mse', 'eval'")
    file.write_text(text.replace('configs/lm.py:tiny', 'experiments/expressivity/config.py:fit'))
    runs = tmp_path / 'runs'
    members = sweep.load(str(file), runs)
    member_costs = [costs.estimate_costs(sweep.parse_config(m.command)) for m in members]
    flops = [member_costs[i]['flops'] * 100 * 2 for i in range(2)]
    plan.show(members, runs)
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.split()[:1] == ['width=16'])
    count = f'{member_costs[0]["parameters"]["model"]:,}'
    assert row == ['width=16', 'waiting', count, f'{member_costs[0]["flops"]:.3g}', '100', '2',
                   f'{flops[0]:.3g}']  # fmt: skip
    assert any(line.endswith(f'--workdir={runs}/width=32') for line in lines)
    assert f'{sum(flops):.3g} FLOPs' in lines[-1] and ' h' not in lines[-1]

    (runs / 'width=16').mkdir()
    timing = [{'step': 50, 'seconds': 99.0}, {'step': 100, 'seconds': 36.0}]  # the first compiles
    (runs / 'width=16/timing.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in timing))
    plan.show(members, runs)
    pace = flops[0] / 2 / 36
    hours = f'{sum(flops) / pace / 3600:.2g} h at {pace:.3g} FLOP/s'
    assert hours in capsys.readouterr().out.splitlines()[-1]


def test_members_that_differ_in_rates_and_seeds_alone_are_traced_once(monkeypatch):
    """And what is shown of each is what it costs by itself."""
    count_cost, traced = costs.estimate_costs, []
    monkeypatch.setattr(costs, 'estimate_costs', lambda c: (traced.append(c), count_cost(c))[1])
    widths = sweep.zip_(**{'model.width': [8, 16], 'problem.dimension': [3, 4]})
    rates = {'optim.learning_rate': [0.1, 0.2], 'seeds': [(0,), (1, 2)], 'train.steps': [5, 7]}
    arguments = [
        [
            '--config=experiments/expressivity/config.py:fit',
            *(f'--config.{k}={v}' for k, v in m.items()),
        ]
        for m in sweep.product(widths, **rates)
    ]
    member_costs = plan.count_costs([sweep.parse_config(a) for a in arguments])
    assert len(member_costs) == 16 and len(traced) == 2
    assert member_costs == [count_cost(sweep.parse_config(a)) for a in arguments]
    assert [(t['steps'], t['seeds']) for t in member_costs[:4]] == [(5, 1), (7, 1), (5, 2), (7, 2)]
    for key, value in (('learning_rate', -1.0), ('clip_norm', -1.0)):  # known shapes, bad rate
        bad = sweep.parse_config([*arguments[0], f'--config.optim.{key}={value}'])
        with pytest.raises(UserError, match=f'optim.{key} = {value}'):
            plan.count_costs([sweep.parse_config(arguments[0]), bad])


@pytest.mark.parametrize(
    'config, key, values, traces',
    [
        ('configs/lm.py:tiny', 'optim.learning_rate', [0.1, 0.2], 1),
        ('configs/lm.py:tiny', 'dropout.layer', [0.1, 0.2], 1),
        ('configs/lm.py:tiny', 'dropout.layer', [0.1, 0.0], 2),
        ('configs/lm.py:tiny', 'model.hidden', [24, 32], 2),
        ('configs/lm.py:tiny', 'model.fusion.name', ['mi', 'film'], 2),
        ('configs/lm.py:tiny', 'train.batch', [2, 4], 2),
        ('configs/lm.py:tiny', 'optim.name', ['adam', 'sgd'], 2),
        ('configs/rl.py:tiny,env=catch', 'loss.entropy_cost', [0.1, 0.2], 1),
        ('configs/rl.py:tiny,env=catch', 'model.sites', ["('input',)", '()'], 2),
    ],
)
def test_only_what_shapes_do_not_depend_on_is_left_out(monkeypatch, config, key, values, traces):
    traced = []
    monkeypatch.setattr(costs, 'estimate_costs', lambda config: traced.append(config) or {})
    monkeypatch.setattr(plan, 'validate', lambda config: None)
    arguments = [[f'--config={config}', f'--config.{key}={value}'] for value in values]
    plan.count_costs([sweep.parse_config(a) for a in arguments])
    assert len(traced) == traces


def counting(path, **options):
    """A command that counts to --steps in a run directory; see tests/launch/member.py."""
    flags = [f'--{name}={value}' for name, value in options.items()]
    return [sys.executable, MEMBER, f'--workdir={path}', *flags]


def starts(path):
    return [json.loads(line) for line in (path / 'starts.jsonl').read_text().splitlines()]


def test_gpus_are_dealt_out_so_that_no_two_members_share_one(tmp_path, monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,5,6,GPU-a1')
    paths = [tmp_path / str(i) for i in range(4)]
    commands = {path: counting(path, steps=4, seconds=0.1) for path in paths}
    states = local.submit(commands, engine.Resources(gpus=2))
    assert set(states.values()) == {'done'}
    first, second, *_ = (starts(path)[0]['cuda'] for path in paths)
    assert {first, second} == {'3,5', '6,GPU-a1'}  # simultaneously
    assert {starts(path)[0]['cuda'] for path in paths[2:]} <= {first, second}
    with pytest.raises(UserError, match=r'at most the 4 GPUs of this machine .* Try fewer'):
        local.submit(commands, engine.Resources(gpus=5))
    with pytest.raises(UserError, match='expected at most 2, as'):
        local.submit(commands, engine.Resources(gpus=2, parallel=3))


def test_the_processes_of_members_have_gpus_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,5,6,7,8,9,10,11')
    dealt = []
    monkeypatch.setattr(
        process,
        'start',
        lambda path, command, environments, **_: dealt.append(
            [environment['CUDA_VISIBLE_DEVICES'] for environment in environments]
        ),
    )
    slots = local.Slots(engine.Resources(processes=2, gpus=2))
    assert slots.count == 2
    for i in range(2):
        slots.start(tmp_path / str(i), ['true'])
    assert dealt == [['3,5', '6,7'], ['8,9', '10,11']]


def test_members_that_run_at_once_are_on_cores_of_their_own(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip('one core')
    paths = [tmp_path / str(i) for i in range(2)]
    commands = {path: counting(path, steps=20, seconds=0.05) for path in paths}
    assert set(local.submit(commands, engine.Resources(parallel=2)).values()) == {'done'}
    on = [starts(path)[0]['cores'] for path in paths]
    assert on[0] and not set(on[0]) & set(on[1]) and sorted(on[0] + on[1]) == cores

    path = tmp_path / 'alone'  # it has all, but where it is to have one
    for num_cores, expected in ((0, cores), (1, cores[:1])):
        shutil.rmtree(path, ignore_errors=True)
        local.submit({path: counting(path, steps=1)}, engine.Resources(cores=num_cores))
        assert starts(path)[0]['cores'] == expected
    assert sorted(os.sched_getaffinity(0)) == cores  # those of the launcher are as before


def test_failures_are_retried_as_configured_and_preemptions_as_long_as_they_get_further(tmp_path):
    paths = {name: tmp_path / name for name in ('once', 'twice', 'preempted')}
    commands = {
        paths['once']: counting(paths['once'], steps=2, fails=1),
        paths['twice']: counting(paths['twice'], steps=2, fails=2),
        paths['preempted']: counting(paths['preempted'], steps=4, stops=1),
    }
    states = local.submit(commands, engine.Resources(parallel=3, retries=1))
    assert states == {
        paths['once']: 'done', paths['twice']: 'failed', paths['preempted']: 'done',
    }  # fmt: skip
    assert [len(starts(path)) for path in paths.values()] == [2, 2, 4]
    assert state.read_member_state(paths['twice']).reason == 'ValueError: so it was asked'

    stuck = tmp_path / 'stuck'
    commands = {stuck: counting(stuck, steps=2, stops=0)}  # always stops before its first step
    assert local.submit(commands, engine.Resources()) == {stuck: 'failed'}
    assert len(starts(stuck)) == 2


def test_a_run_whose_process_is_gone_has_died(tmp_path):
    path = tmp_path / 'run'
    first = process.start(path, counting(path, steps=1000, seconds=0.05))
    while not (path / 'metrics.jsonl').exists():
        assert first.poll() is None
        time.sleep(0.02)
    member = state.read_member_state(path, 'loss')
    assert (member.phase, member.num_steps, member.reason) == ('running', 1000, '')
    assert member.metric.startswith('loss ') and member.metric.endswith('(train)')
    second = process.start(path, counting(path, steps=1000))  # one is enough
    assert isinstance(second, process.AdoptedProcess) and second.poll() is None
    first.kill()
    assert first.wait() == second.poll() * -signal.SIGKILL  # the other one only sees that it failed
    assert state.read_member_state(path).phase == 'died' and status(path)['state'] == 'running'
    assert len(starts(path)) == 1


def test_status_shows_the_members_of_a_sweep_and_why_one_failed(tmp_path):
    file, runs = write(tmp_path, [{'model.site': s} for s in ('none', 'both')]), tmp_path / 'runs'
    sweep.load(file, runs)
    local.submit({runs / 'site=none': counting(runs / 'site=none', steps=1, fails=9)}, ONE)
    states = state.read_sweep_states(runs)
    assert {name: member.phase for name, member in states.items()} == {
        'site=none': 'failed', 'site=both': 'waiting',
    }  # fmt: skip
    assert states['site=none'].reason == 'ValueError: so it was asked'
    console = rich.console.Console(width=150, file=io.StringIO())
    console.print(table.build_table('runs', states))
    assert 'runs, 1 failed, 1 waiting' in console.file.getvalue()
    assert list(state.read_sweep_states(runs / 'site=none')) == ['site=none']
    with pytest.raises(UserError, match='expected the directory of a sweep or a run'):
        state.read_sweep_states(tmp_path)


def test_damaged_files_of_a_member_cost_nothing_but_what_they_say(tmp_path):
    sweep_file, runs = (
        write(tmp_path, [{'model.site': s} for s in ('none', 'both')]),
        tmp_path / 'runs',
    )
    sweep.load(sweep_file, runs)
    path = runs / 'site=none'
    commands = {path: counting(path, steps=3)}
    assert local.submit(commands, ONE) == {path: 'done'}
    expected = state.read_member_state(path, 'loss')
    for name in ('timing.jsonl', 'metrics.jsonl'):
        with open(path / name, 'ab') as file:  # not JSON, no object, wrong fields, unfinished
            file.write(b'{"step": 9, \xff}\n[9]\n{"loss": 9.0}\n{"step": "9"}\n{"step": 9, "lo')
    assert state.read_member_state(path, 'loss') == expected
    assert records.read_curve(path, 'loss', 'train') == {1: 1.0, 2: 0.5, 3: 1 / 3}
    for damaged in (b'', b'[1]', b'\xff\xfe', b'{"state": ', b'{"step": null}', b'7'):
        (path / 'status.json').write_bytes(damaged)
        (path / 'cost.json').write_bytes(damaged)
        member = state.read_member_state(path)
        assert (member.phase, member.step) == ('waiting', 3)
        assert not state.is_finished(path)
    (path / 'launched').write_bytes(b'[1]')
    assert process.read_slot(path) == -1
    for damaged in (b'', b'[1]', b'\xff\xfe', b'{"metric": "loss"}', b'{"members": [{}]}'):
        (runs / 'sweep.json').write_bytes(damaged)
        for reads in (lambda: state.read_sweep_states(runs), lambda: sweep.load(sweep_file, runs)):
            with pytest.raises(UserError, match=r'(?i)restore (it|the file), or name another'):
                reads()


@pytest.mark.parametrize(
    'text, message',
    [
        ('CONFIG = (\n', "line 1: SyntaxError: '(' was never closed"),
        ('\nimport nothing_such\n', "line 2: ModuleNotFoundError: No module named 'nothing_such'"),
        (
            SWEEP.format(baseline=None, overrides=0).replace('return 0', "return {}['a']"),
            'line 6: KeyError: a',
        ),
        (
            SWEEP.format(baseline=None, overrides=0).replace('return 0', 'return product(a=[{1}])'),
            'a = {1}: expected a number, a string, or a tuple of them',
        ),
    ],
)
def test_what_goes_wrong_in_a_sweep_file_is_one_line(tmp_path, text, message):
    (tmp_path / 'a_sweep.py').write_text(text)
    file = os.path.relpath(tmp_path / 'a_sweep.py')
    with pytest.raises(UserError, match=re.escape(message)) as error:
        sweep.load(file, tmp_path / 'runs')
    assert '\n' not in str(error.value)


OWN_CONFIG = """
from configs import lm
from mi.fusion import FUSIONS
FUSIONS['mine'] = FUSIONS['film']
def get_config(arg='tiny'):
    config = lm.get_config(arg)
    config.model.fusion.name = 'mine'
    return config
"""


def elsewhere(folder, *command):
    """What a command says in a directory of one's own, where the package is installed."""
    result = subprocess.run(
        [sys.executable, '-m', *command],
        cwd=folder,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    return result.returncode, result.stdout + result.stderr


def test_the_distribution_has_what_own_configs_and_sweeps_import():
    """The list of packages comes from setuptools itself."""
    result = subprocess.run(
        [sys.executable, '-c', LISTS_PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {'mi', 'mi.lm', 'launch', 'configs', 'experiments'} <= set(result.stdout.split())
    assert 'tests' not in result.stdout.split()


LISTS_PACKAGES = """
import setuptools
setuptools.setup = lambda **options: print(*options['packages'], sep='\\n')
exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py'})
"""


@pytest.mark.slow
def test_own_configs_and_sweeps_and_ours_work_from_another_directory(tmp_path):
    (tmp_path / 'mine.py').write_text(OWN_CONFIG)
    overrides = [{'model.site': 'encoder'}]
    text = SWEEP.format(baseline=None, overrides=overrides).replace('configs/lm.py:tiny', 'mine.py')
    (tmp_path / 'my_sweep.py').write_text(text)
    dry = ['launch.local', '--workdir=runs', '--dry_run']
    code, output = elsewhere(tmp_path, *dry, '--sweep=my_sweep.py')
    assert code == 0 and 'all of it' in output
    main = ['mi.main', '--workdir=run', '--config.optim.learning_rate=-1']
    code, output = elsewhere(tmp_path, *main, '--config=configs/lm.py:tiny')
    assert code == 1 and 'config.optim.learning_rate = -1' in output  # it was read


def test_the_sweeps_and_configs_of_the_package_are_found_from_another_directory(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    members = sweep.load('experiments/quickstart.py', tmp_path / 'runs', dry=True)
    assert '--config=configs/lm.py:quickstart' in members[0].command
    with pytest.raises(UserError, match=r"expected a file .* did you mean 'quickstart'"):
        sweep.load('experiments/quickstrat.py', tmp_path / 'runs')
    with pytest.raises(UserError, match=r"no such file; expected .* did you mean 'lm'"):
        sweep.parse_config(['--config=configs/lmm.py:tiny'])


def test_a_file_of_ones_own_comes_before_one_of_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_file('configs/lm.py', ['configs']) == str(ROOT / 'configs/lm.py')
    assert find_file('configs/none.py', ['configs']) == 'configs/none.py'
    assert find_file('launch/sweep.py', ['configs']) == 'launch/sweep.py'
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs/lm.py').write_text('')
    assert find_file('configs/lm.py', ['configs']) == 'configs/lm.py'


def test_members_whose_names_would_be_the_same_are_told_apart(tmp_path):
    """As text that differs in what no file name has, or keys that end alike."""
    sources = ['a/b', 'a_b', 'a/b/c', 'ä' * 300 + '/', 'ä' * 300 + '_']
    members = sweep.load(write(tmp_path, sweep.product(**{'data.source': sources})), tmp_path / 'r')
    names = [m.name for m in members]
    assert names[:3] == ['source=a_b', 'data.source=a_b', 'source=a_b_c']
    assert len(set(names)) == 5 and all(len(name.encode()) <= 255 for name in names)
    assert [m.label for m in members] == sources
    assert [m.command[-1] for m in members] == [f'--workdir={tmp_path / "r" / n}' for n in names]
    longer = sweep.product(
        **{'data.source': [*sources, 'b', 'a_b/c']}
    )  # the first keep their names
    assert [m.name for m in sweep.load(write(tmp_path, longer), tmp_path / 'r')][:5] == names

    sections = [{'optim.name': 'mi'}, {'model.fusion.name': 'mi'}, {'data.source': 'x_y'}]
    alike = [
        {'eval.batch': 8},
        {'train.batch': 8},
        {'train.batch': 8, 'eval.length': 16},
        {'train.batch': 8, 'train.length': 16},
    ]
    names = [m.name for m in sweep._make_members(alike, 'c.py', tmp_path, None)]
    assert names == [
        'batch=8', 'train.batch=8', 'batch=8,length=16', 'train.batch=8,train.length=16',
    ]  # fmt: skip
    assert len({m.name for m in sweep._make_members(sections, 'c.py', tmp_path, None)}) == 3
    thrice = [{'data.source': source} for source in ('a/b', 'a_b', 'a/_b', 'a_/b', 'a//b')]
    names = [m.name for m in sweep._make_members(thrice, 'c.py', tmp_path, None)]
    assert len(set(names)) == 5
    for same in ({'data.source': 1}, {'data.source': '1'}), ({'seeds': (0,)}, {'seeds': (0,)}):
        with pytest.raises(UserError, match='two members of the sweep have the same overrides'):
            sweep._make_members(list(same), 'c.py', tmp_path, None)


def test_numbers_of_numpy_are_those_of_python(tmp_path):
    overrides = sweep.product(
        **{
            'model.hidden': np.arange(24, 40, 8),
            'optim.learning_rate': [np.float64(0.5), np.float32(0.25)],
            'seeds': [tuple(np.arange(2))],
        }
    )
    file = tmp_path / 'a_sweep.py'
    source = 'import numpy as np\n' + SWEEP.format(baseline=None, overrides=overrides)
    file.write_text(source)
    members = sweep.load(str(file), tmp_path / 'runs')
    assert members[0].name == 'hidden=24,learning_rate=0.5'
    assert '--config.seeds=(0, 1)' in members[0].command
    record = json.loads((tmp_path / 'runs/sweep.json').read_text())
    assert record['members'][3]['overrides'] == {
        'model.hidden': 32, 'optim.learning_rate': 0.25, 'seeds': [0, 1],
    }  # fmt: skip


def test_a_name_that_no_file_can_have_is_shortened_and_only_that(tmp_path):
    sources = ['b' * 242, 'a' * 243, 'ä' * 300 + '1', 'ä' * 300 + '2']  # 'source=' has seven
    members = sweep.load(write(tmp_path, sweep.product(**{'data.source': sources})), tmp_path / 'r')
    names = [m.name for m in members]
    assert names[:2] == [f'source={source}' for source in sources[:2]]
    assert len(set(names)) == 4 and all(len(name.encode()) <= 255 for name in names)
    for member in members:
        (tmp_path / 'r' / member.name).mkdir()


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / 'file').write_text('')
    for workdir in (tmp_path / 'file', tmp_path / 'file/runs', pathlib.Path('/proc/runs')):
        with pytest.raises(UserError, match=f'--workdir={workdir}: .*; name another directory'):
            sweep.load(write(tmp_path, [{'model.site': 'none'}]), workdir)


def test_what_is_no_sweep_is_refused(tmp_path):
    with pytest.raises(UserError, match='expected a file of your own'):
        sweep.load(str(tmp_path / 'none.py'), tmp_path / 'runs')
    (tmp_path / 'empty.py').write_text('')
    with pytest.raises(UserError, match='does not define CONFIG'):
        sweep.load(str(tmp_path / 'empty.py'), tmp_path / 'runs')
    with pytest.raises(UserError, match='the same overrides'):
        sweep.load(write(tmp_path, [{'model.site': 'none'}] * 2), tmp_path / 'runs')
    arms = sweep.product(**{'model.site': ['none', 'encoder']})
    with pytest.raises(UserError, match="'encodr': expected an arm; did you mean 'encoder'"):
        sweep.load(write(tmp_path, arms, baseline='encodr'), tmp_path / 'runs')
    assert not (tmp_path / 'runs').exists()  # before anything has run


@pytest.mark.slow
def test_a_failing_member_is_named_and_the_others_finish(tmp_path, texts):
    common = {'data.source': texts, 'train.steps': 10}
    overrides = [
        common | {'model.fusion.name': 'concat', 'optim.learning_rate': 1e-3},
        common | {'model.fusion.name': 'mi', 'optim.learning_rate': -1.0},
        common | {'model.fusion.name': 'film', 'optim.learning_rate': 1e-3},
    ]
    file, runs = write(tmp_path, overrides, 'concat, 0.001'), tmp_path / 'runs'
    result = subprocess.run(launch(file, runs, '--parallel=2'), capture_output=True, text=True)
    assert result.returncode == 1
    assert '1 of 3 members failed: fusion=mi' in result.stderr
    assert 'config.optim.learning_rate = -1.0: expected a finite number above 0' in result.stderr
    good = [p for p in runs.iterdir() if p.is_dir() and 'mi' not in p.name and p.name != 'report']
    assert len(good) == 2 and all(status(p)['state'] == 'done' for p in good)
    assert (runs / 'report/report.html').exists()

    old_statuses = {p: (p / 'status.json').read_bytes() for p in good}
    second = subprocess.run(launch(file, runs), capture_output=True, text=True)
    assert second.returncode == 1
    assert {
        p: (p / 'status.json').read_bytes() for p in good
    } == old_statuses  # skipped, not run again


@pytest.mark.slow
def test_a_stopped_sweep_saves_and_goes_on(tmp_path, texts):
    rarely = {'train.steps': 4000, 'train.save_every': 1000, 'train.eval_every': 4000}
    overrides = [
        {'data.source': texts, 'model.site': site, 'train.log_every': 50} | rarely
        for site in ('none', 'both')
    ]
    file, runs = write(tmp_path, overrides), tmp_path / 'runs'
    process = subprocess.Popen(launch(file, runs), stderr=subprocess.DEVNULL)
    first = runs / 'site=none'
    while not (first / 'metrics.jsonl').exists() or not (first / 'metrics.jsonl').stat().st_size:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 143
    assert status(first)['state'] == 'preempted'
    assert not (runs / 'site=both').exists()
    result = subprocess.run(launch(file, runs), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {status(runs / f'site={s}')['state'] for s in ('none', 'both')} == {'done'}


@pytest.mark.slow
def test_a_member_of_two_processes_of_which_one_is_killed_is_tried_again(tmp_path):
    """The other process cannot continue without it and ends within seconds."""
    path = tmp_path / 'run'
    command = [sys.executable, '-m', 'mi.main', '--config=configs/rl.py:tiny,env=catch']
    command += ['--config.train.steps=2000', f'--workdir={path}']
    took = []

    def kill_one():
        while not list(path.glob('checkpoints/0*')):
            time.sleep(0.05)
        pids = [status(path, name)['pid'] for name in ('status.json', 'status.1.json')]
        os.kill(pids[1], signal.SIGKILL)
        began = time.monotonic()
        while pathlib.Path(f'/proc/{pids[0]}/stat').exists() and status(path)['pid'] == pids[0]:
            time.sleep(0.05)
        took.append(time.monotonic() - began)

    killer = threading.Thread(target=kill_one)
    killer.start()
    states = local.submit({path: command}, engine.Resources(processes=2, retries=1))
    killer.join()
    assert states == {path: 'done'}
    assert status(path)['state'] == status(path, 'status.1.json')['state'] == 'done'
    assert took[0] < 60
    lines = (path / 'metrics.jsonl').read_text().splitlines()
    steps = [r['step'] for r in map(json.loads, lines) if r['split'] == 'train']
    assert steps == list(range(5, 51, 5))


def test_a_sweep_may_draw_figures_of_its_own(tmp_path):
    file = tmp_path / 'drawn.py'
    draws = "def report(workdir, out):\n    (out / 'own.txt').write_text(workdir.name)\n"
    file.write_text(SWEEP.format(overrides=[{'model.site': 'none'}], baseline=None) + draws)
    (tmp_path / 'runs/report').mkdir(parents=True)
    sweep.report(str(file), tmp_path / 'runs')
    assert (tmp_path / 'runs/report/own.txt').read_text() == 'runs'
    sweep.report(write(tmp_path, [{'model.site': 'none'}]), tmp_path / 'runs')  # draws nothing
