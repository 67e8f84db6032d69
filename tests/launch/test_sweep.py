"""Sweep files: the names, labels and commands of their members, and what is refused."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from launch import sweep
from launch.members import make_labels, make_members
from mi.config import UserError
from mi.overrides import find_file
from tests.conftest import ROOT
from tests.launch.sweep_files import SWEEP, write_sweep


def test_members_are_named_by_what_differs(tmp_path):
    overrides = sweep.product(
        **{
            'model.fusion.name': ['concat', 'mi'],
            'model.site': ['encoder', 'both'],
            'seeds': [(0, 1)],
        }
    )
    members = sweep.load(write_sweep(tmp_path, overrides), tmp_path / 'runs')
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
    file = write_sweep(tmp_path, overrides)
    with open(file, 'a') as more:
        more.write("TASK = 'data.source'\n")
    members = sweep.load(file, tmp_path / 'runs')
    assert [m.label for m in members] == ['none', 'none', 'both', 'both']
    assert len({m.name for m in members}) == 4
    record = json.loads((tmp_path / 'runs/sweep.json').read_text())
    assert [m['task'] for m in record['members']] == ['a', 'b', 'a', 'b']


def test_a_sweep_names_its_arms_where_values_would_not(tmp_path):
    wide = {'label': 'large concat', 'model.hidden': 32, 'model.embed': 32}
    overrides = sweep.product([{}, wide], seeds=[(0,), (1,)])
    file = write_sweep(tmp_path, overrides, baseline='large concat')
    members = sweep.load(file, tmp_path / 'runs')
    assert [m.label for m in members][2:] == ['large concat', 'large concat']
    assert members[0].label == members[1].label != 'large concat'
    assert not any('label' in m.name for m in members)
    assert not any('label' in part for m in members for part in m.command)
    assert members[2].overrides == {'model.hidden': 32, 'model.embed': 32, 'seeds': (0,)}
    record = json.loads((tmp_path / 'runs/sweep.json').read_text())
    assert (record['baseline'], record['members'][3]['label']) == ('large concat', 'large concat')


def test_a_name_for_two_arms_is_refused(tmp_path):
    overrides = [{'label': 'wide', 'model.hidden': size} for size in (24, 32)]
    with pytest.raises(
        UserError, match=r"label = 'wide': .*'model.hidden', 24.*'model.hidden', 32"
    ):
        sweep.load(write_sweep(tmp_path, overrides), tmp_path / 'runs')


def test_arms_of_the_same_values_are_told_apart_by_their_keys(tmp_path):
    overrides = [
        {'model.hidden': 24, 'seeds': (0,)},
        {'model.embed': 24, 'seeds': (0,)},
        {'model.embed': 24, 'seeds': (1,)},
        {'model.hidden': 32, 'seeds': (0,)},
        {'optim.name': 'adam', 'seeds': (0,)},
        {'model.fusion.name': 'adam', 'seeds': (0,)},
    ]
    members = sweep.load(write_sweep(tmp_path, overrides), tmp_path / 'runs')
    assert [m.label for m in members] == [
        'hidden=24', 'embed=24', 'embed=24', '32', 'optim.name=adam', 'fusion=adam',
    ]  # fmt: skip
    both = [{'model.context': 24, 'data.context': 24}, {'model.context': 24}]
    shown = [{'model.context': 24}, {'data.context': 24}]
    assert make_labels(shown, shown, None) == ['model.context=24', 'data.context=24']
    assert make_labels(both, both, None) == ['24, 24', '24']


def test_a_seed_of_an_arm_is_trained_once(tmp_path):
    arms = sweep.product(**{'model.site': ['none'], 'seeds': [(0, 1), (1, 2)]})
    with pytest.raises(UserError, match=r"seed 1 of the arm 'only'.*\. Give them different seeds"):
        sweep.load(write_sweep(tmp_path, arms), tmp_path / 'runs')
    configured = [{}, {'seeds': (0,)}]  # the first has the config's own
    with pytest.raises(UserError, match=r'only and seeds=\(0,\) both train seed 0'):
        sweep.load(write_sweep(tmp_path, configured), tmp_path / 'runs')
    file = write_sweep(
        tmp_path, sweep.product(**{'data.source': ['a', 'b'], 'seeds': [(0,), (1,)]})
    )
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
    with pytest.raises(UserError, match=r'two arguments set model\.width, optim'):
        sweep.product(widths, widths)


def begin_members(runs, *names):
    for name in names:
        (runs / name).mkdir(exist_ok=True)
        (runs / name / 'config.json').write_text('{}')


def test_another_sweep_in_the_same_directory_is_refused(tmp_path):
    sweep.load(write_sweep(tmp_path, [{'model.site': 'none'}]), tmp_path / 'runs')
    begin_members(tmp_path / 'runs', 'site=none')
    with pytest.raises(UserError, match='holds a different sweep'):
        sweep.load(write_sweep(tmp_path, [{'model.site': 'both'}]), tmp_path / 'runs')


def test_a_changed_sweep_is_refused_by_keys_and_values_and_a_longer_one_is_not(tmp_path):
    runs = tmp_path / 'runs'
    overrides = [{'model.site': site, 'train.steps': 7} for site in ('none', 'both')]
    sweep.load(write_sweep(tmp_path, overrides), runs)
    sweep.load(
        write_sweep(tmp_path, [*overrides, {'model.site': 'encoder', 'train.steps': 7}]), runs
    )
    begin_members(runs, *(f'site={site}' for site in ('none', 'both', 'encoder')))
    changed = [{'model.site': site, 'train.steps': 8, 'seeds': (1,)} for site in ('none', 'both')]
    message = (
        r'site=none, site=both: seeds was \[0\] and is \[1\] now, train\.steps was 7 and is 8 now'
    )
    with pytest.raises(
        UserError, match=message + '; site=encoder: removed from the sweep|' + message
    ):
        sweep.load(write_sweep(tmp_path, changed), runs)
    changed_file = write_sweep(tmp_path, overrides).replace('a_sweep', 'other')
    pathlib.Path(changed_file).write_text(
        (tmp_path / 'a_sweep.py').read_text().replace('lm.py:tiny', 'lm.py:tiny,core=gru')
    )
    with pytest.raises(UserError, match=r"model\.core was 'lstm' and is 'gru' now"):
        sweep.load(changed_file, runs)


def test_a_sweep_that_was_begun_before_a_config_key_was_there_goes_on(tmp_path):
    runs = tmp_path / 'runs'
    overrides = [{'model.site': site} for site in ('none', 'both')]
    sweep.load(write_sweep(tmp_path, overrides), runs)
    begin_members(runs, 'site=none', 'site=both')
    record = json.loads((runs / 'sweep.json').read_text())
    del record['base']['eval']['stride']
    (runs / 'sweep.json').write_text(json.dumps(record))
    sweep.load(write_sweep(tmp_path, overrides), runs)
    assert json.loads((runs / 'sweep.json').read_text())['base']['eval']['stride'] == 0


def test_what_has_not_begun_may_change_and_a_dry_run_claims_nothing(tmp_path):
    runs = tmp_path / 'runs'
    overrides = [{'model.site': site, 'train.steps': 7} for site in ('none', 'both')]
    changed = [{**changes, 'train.steps': 8} for changes in overrides]
    sweep.load(write_sweep(tmp_path, overrides), runs, dry=True)
    assert not runs.exists()
    sweep.load(write_sweep(tmp_path, overrides), runs)
    sweep.load(write_sweep(tmp_path, changed), runs)  # none has begun
    old_content = (runs / 'sweep.json').read_bytes()
    begin_members(runs, 'site=none')
    with pytest.raises(UserError, match=r'\(site=none: train\.steps was 8 and is 7 now\)'):
        sweep.load(write_sweep(tmp_path, overrides), runs)
    other_overrides = [
        changed[0],
        {**changed[1], 'model.site': 'encoder'},
    ]  # site=both is there no more
    sweep.load(write_sweep(tmp_path, other_overrides), runs, dry=True)
    assert (runs / 'sweep.json').read_bytes() == old_content
    sweep.load(write_sweep(tmp_path, other_overrides), runs)

    sweep.load(write_sweep(tmp_path, overrides), tmp_path / 'queued', 'slurm')
    with pytest.raises(UserError, match='holds a different sweep'):  # a job may be in the queue
        sweep.load(write_sweep(tmp_path, changed), tmp_path / 'queued', 'slurm')


def test_a_key_that_the_config_has_not_is_one_line_before_anything_is_written(tmp_path):
    overrides = [{'model.hidden': 24}, {'model.hiden': 24}]
    with pytest.raises(
        UserError, match=r'--config\.model\.hiden=24.*did you mean config\.model\.hidden'
    ) as message:
        sweep.load(write_sweep(tmp_path, overrides), tmp_path / 'runs')
    assert '\n' not in str(message.value) and '\\n' not in str(message.value)
    with pytest.raises(UserError, match=r'model\.hidden=wide'):
        sweep.load(write_sweep(tmp_path, [{'model.hidden': 'wide'}]), tmp_path / 'runs')
    assert not (tmp_path / 'runs').exists()


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


def run_elsewhere(folder, *command):
    """What a command says in a directory of one's own, where the package is installed."""
    result = subprocess.run(
        [sys.executable, '-m', *command],
        cwd=folder,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.slow
def test_own_configs_and_sweeps_and_ours_work_from_another_directory(tmp_path):
    (tmp_path / 'mine.py').write_text(OWN_CONFIG)
    overrides = [{'model.site': 'encoder'}]
    text = SWEEP.format(baseline=None, overrides=overrides).replace('configs/lm.py:tiny', 'mine.py')
    (tmp_path / 'my_sweep.py').write_text(text)
    dry = ['launch.local', '--workdir=runs', '--dry_run']
    code, output = run_elsewhere(tmp_path, *dry, '--sweep=my_sweep.py')
    assert code == 0 and 'all of it' in output
    main = ['mi.main', '--workdir=run', '--config.optim.learning_rate=-1']
    code, output = run_elsewhere(tmp_path, *main, '--config=configs/lm.py:tiny')
    assert code == 1 and 'config.optim.learning_rate = -1' in output  # it was read


def test_the_sweeps_and_configs_of_the_package_are_found_from_another_directory(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    members = sweep.load('experiments/quickstart.py', tmp_path / 'runs', dry=True)
    assert '--config=configs/lm.py:quickstart' in members[0].command
    with pytest.raises(UserError, match=r"expected your own sweep .* did you mean 'quickstart'"):
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
    members = sweep.load(
        write_sweep(tmp_path, sweep.product(**{'data.source': sources})), tmp_path / 'r'
    )
    names = [m.name for m in members]
    assert names[:3] == ['source=a_b', 'data.source=a_b', 'source=a_b_c']
    assert len(set(names)) == 5 and all(len(name.encode()) <= 255 for name in names)
    assert [m.label for m in members] == sources
    assert [m.command[-1] for m in members] == [f'--workdir={tmp_path / "r" / n}' for n in names]
    longer = sweep.product(
        **{'data.source': [*sources, 'b', 'a_b/c']}
    )  # the first keep their names
    assert [m.name for m in sweep.load(write_sweep(tmp_path, longer), tmp_path / 'r')][:5] == names

    sections = [{'optim.name': 'mi'}, {'model.fusion.name': 'mi'}, {'data.source': 'x_y'}]
    alike = [
        {'eval.batch': 8},
        {'train.batch': 8},
        {'train.batch': 8, 'eval.length': 16},
        {'train.batch': 8, 'train.length': 16},
    ]
    names = [m.name for m in make_members(alike, 'c.py', tmp_path, None)]
    assert names == [
        'batch=8', 'train.batch=8', 'batch=8,length=16', 'train.batch=8,train.length=16',
    ]  # fmt: skip
    assert len({m.name for m in make_members(sections, 'c.py', tmp_path, None)}) == 3
    thrice = [{'data.source': source} for source in ('a/b', 'a_b', 'a/_b', 'a_/b', 'a//b')]
    names = [m.name for m in make_members(thrice, 'c.py', tmp_path, None)]
    assert len(set(names)) == 5
    for same in ({'data.source': 1}, {'data.source': '1'}), ({'seeds': (0,)}, {'seeds': (0,)}):
        with pytest.raises(UserError, match='two members of the sweep have the same overrides'):
            make_members(list(same), 'c.py', tmp_path, None)


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
    members = sweep.load(
        write_sweep(tmp_path, sweep.product(**{'data.source': sources})), tmp_path / 'r'
    )
    names = [m.name for m in members]
    assert names[:2] == [f'source={source}' for source in sources[:2]]
    assert len(set(names)) == 4 and all(len(name.encode()) <= 255 for name in names)
    for member in members:
        (tmp_path / 'r' / member.name).mkdir()


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / 'file').write_text('')
    for workdir in (tmp_path / 'file', tmp_path / 'file/runs', pathlib.Path('/proc/runs')):
        with pytest.raises(UserError, match=rf'--workdir={workdir}: .*\. Use another directory'):
            sweep.load(write_sweep(tmp_path, [{'model.site': 'none'}]), workdir)


def test_what_is_no_sweep_is_refused(tmp_path):
    with pytest.raises(UserError, match='expected your own sweep file'):
        sweep.load(str(tmp_path / 'none.py'), tmp_path / 'runs')
    (tmp_path / 'empty.py').write_text('')
    with pytest.raises(UserError, match='expected the file to define CONFIG'):
        sweep.load(str(tmp_path / 'empty.py'), tmp_path / 'runs')
    with pytest.raises(UserError, match='the same overrides'):
        sweep.load(write_sweep(tmp_path, [{'model.site': 'none'}] * 2), tmp_path / 'runs')
    arms = sweep.product(**{'model.site': ['none', 'encoder']})
    with pytest.raises(UserError, match="'encodr': expected an arm; did you mean 'encoder'"):
        sweep.load(write_sweep(tmp_path, arms, baseline='encodr'), tmp_path / 'runs')
    assert not (tmp_path / 'runs').exists()  # before anything has run


def test_a_sweep_may_draw_figures_of_its_own(tmp_path):
    file = tmp_path / 'drawn.py'
    draws = "def report(workdir, out):\n    (out / 'own.txt').write_text(workdir.name)\n"
    file.write_text(SWEEP.format(overrides=[{'model.site': 'none'}], baseline=None) + draws)
    (tmp_path / 'runs/report').mkdir(parents=True)
    sweep.report(str(file), tmp_path / 'runs')
    assert (tmp_path / 'runs/report/own.txt').read_text() == 'runs'
    sweep.report(
        write_sweep(tmp_path, [{'model.site': 'none'}]), tmp_path / 'runs'
    )  # draws nothing


def test_a_file_that_changes_within_a_second_is_read_again(tmp_path):
    """Python's bytecode cache compares whole seconds and the size of a file."""
    runs = tmp_path / 'runs'
    for site in ('none', 'both', 'none'):
        [member] = sweep.load(write_sweep(tmp_path, [{'model.site': site}]), runs, dry=True)
        assert member.overrides == {'model.site': site}
