"""What the documentation shows can be done: its commands exist, its code runs, its site builds."""

import ast
import functools
import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import types

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from configs import lm as lm_configs
from configs import rl as rl_configs
from experiments import quickstart
from launch import sweep
from mi.config import flatten
from mi.find import find
from mi.fit import factory as fit
from mi.fit import train as train_fit
from mi.lm import config as lm_config
from mi.lm import factory as lm
from mi.registry import is_reference
from mi.report import runs
from mi.rl import config as rl_config
from mi.rl import envs
from mi.rl import factory as rl
from mi.rl.envs.host import dmlab30
from mi.training import optim
from tests.conftest import ROOT

PAGES = [
    ROOT / 'README.md',
    *(p for p in sorted((ROOT / 'docs').rglob('*.md')) if p.parent.name != 'motifs'),
]
GROUPS = (  # given whole
    'env.options',
    'optim.options',
    'model.core_options',
    'model.fusion.options',
)
VALIDATE = {
    'lm': lm_config.validate,
    'rl': rl_config.validate,
    'fit': fit.validate,
    'search': fit.validate,
}


def shell(text):
    """The blocks of a page that name no language."""
    inside, kept = None, []
    for line in text.split('\n'):
        if line.startswith('```'):
            inside = line[3:] if inside is None else None
        elif inside == '':
            kept.append(line)
    return '\n'.join(kept)


def commands(page):
    """The lines of a page's blocks that run something of ours, continued lines joined."""
    lines = shell(page.read_text()).replace('\\\n', ' ').split('\n')
    return [line for line in lines if re.search(r'\bpython -m (mi|launch|benchmarks|docs)\b', line)]


COMMANDS = [
    pytest.param(line, id=f'{page.relative_to(ROOT)}:{line[:60]}')
    for page in PAGES
    for line in dict.fromkeys(commands(page))
]


def source(module):
    path = ROOT / module.replace('.', '/')
    return path / '__main__.py' if path.is_dir() else path.with_suffix('.py')


RUNS = {
    'mi.estimate': 'mi.estimate.cli',
    'mi.find': 'mi.find.__main__',
    'mi.export': 'mi.export.__main__',
}  # package → its command


@functools.cache
def read_flags(module):
    """Names of the flags that a module defines, and the modules of ours that it imports."""
    names, imports = set(), set()
    if not source(module).exists():
        return names, imports
    for node in ast.walk(ast.parse(source(module).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr.upper().startswith('DEFINE') or node.func.attr == 'add_argument':
                names |= {a.value.lstrip('-') for a in node.args[:1] if isinstance(a, ast.Constant)}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in (node.module, *(f'{node.module}.{alias.name}' for alias in node.names)):
                if name.split('.')[0] in ('launch', 'benchmarks') or name == 'mi.report':
                    imports.add(name)
    return names, imports


@functools.cache
def known_flags(module):
    """Names of the flags that a module and what it imports of ours define."""
    seen, unread = set(), [module]
    while unread:
        name = unread.pop()
        if name not in seen:
            seen.add(name)
            unread += read_flags(name)[1]
    return set().union(*(read_flags(name)[0] for name in seen))


def config_of(word):
    """The config that --config=FILE:ARGUMENT names; None if the file is the reader's own."""
    file, _, argument = word.partition(':')
    if not (ROOT / file).exists():
        assert file.startswith('my_'), f'{file}: neither there nor said to be the reader’s'
        return None
    module = importlib.import_module(file.removesuffix('.py').replace('/', '.'))
    return module.get_config(argument) if argument else module.get_config()


@pytest.fixture(autouse=True)
def _forget_modules_of_the_reader():
    """The pages give their own modules the same names."""
    yield
    for name in [name for name in sys.modules if name.startswith('my_')]:
        del sys.modules[name]


@pytest.mark.parametrize('line', COMMANDS)
def test_a_command_names_what_there_is(line):
    line = line.partition(' | ')[0]
    words = [word for word in shlex.split(line, comments=True) if word != '…']
    module = words[words.index('-m') + 1]
    assert source(module).exists(), module
    given = words[words.index('-m') + 2 :]
    if module == 'mi.find':  # the reader's factory
        assert is_reference(given.pop(0))
    assert all(word.startswith('--') for word in given), given
    flags = dict(word[2:].partition('=')[::2] for word in given)
    flags = {name: value for name, value in flags.items() if value != '…'}
    config = config_of(flags['config']) if 'config' in flags else None
    for name, value in flags.items():
        if name.startswith('config.'):
            if config is not None:
                key = name[len('config.') :]
                assert key in {*flatten(config.to_dict()), *GROUPS}, name
        else:
            assert name in known_flags(RUNS.get(module, module)), name
        if name == 'sweep' and not value.startswith('my_'):
            assert (ROOT / value).exists(), value
    if config is not None:
        VALIDATE[config.task](config)


POD = ROOT / 'docs/pod.md'


def test_the_page_takes_one_config_to_every_machine():
    named = {word for line in commands(POD) for word in line.split() if '.py' in word}
    configs = {word.removeprefix('--config=') for word in named if word.startswith('--config=')}
    sweeps = {word.removeprefix('--sweep=') for word in named if word.startswith('--sweep=')}
    configs |= {runpy.run_path(str(ROOT / file))['CONFIG'] for file in sweeps}
    assert configs == {'configs/lm.py:quickstart'}
    modules = {line.split('python -m ')[1].split()[0] for line in commands(POD)}
    assert modules == {
        *('mi.main', 'mi.estimate', 'launch.local', 'launch.slurm', 'launch.ray', 'launch.k8s')
    }


@pytest.mark.slow
@pytest.mark.parametrize('line', [line for line in commands(POD) if 'launch.' in line])
def test_a_launch_of_the_page_can_be_tried_by_a_dry_run(line):
    words = shlex.split(line.partition(' | ')[0])
    words = [sys.executable, *words[1:], '--dry_run']
    done = subprocess.run(
        [word for word in words if word != '--check'], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    count = len(quickstart.sweep())
    assert f'{count} members' in done.stdout and 'warning' not in done.stderr


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_installed_and_made_exists(page):
    text = page.read_text()
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    for names in re.findall(r"pip install -e '\.\[([\w,]+)\]'", text):
        assert set(names.split(',')) <= project['optional-dependencies'].keys()
    for target in re.findall(r'^make (\w+)', shell(text), flags=re.M):
        assert re.search(rf'^{target}:', (ROOT / 'Makefile').read_text(), flags=re.M), target


def code(name):
    return re.findall(
        r'```python\n(.*?)```', (ROOT / f'docs/tutorials/{name}.md').read_text(), flags=re.S
    )


@pytest.mark.slow
def test_your_own_fusion_in_ten_lines(tmp_path, monkeypatch, capsys):
    module, checked, of_lm, of_rl, sweep, explained = code('fusion')
    for name in ('configs', 'launch', 'experiments'):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'my_layers.py').write_text(module)
    (tmp_path / 'my_sweep.py').write_text(sweep)
    body = re.search(r'class Sine.*', re.sub('""".*?"""', '', module), flags=re.S)[0]
    assert len([line for line in body.split('\n') if line.strip()]) <= 10
    for block in (checked, of_lm, of_rl, explained):
        exec(block, {})
    assert 'Sine is not affine in x and in z' in capsys.readouterr().out
    for run in ('sine_lm', 'sine_rl'):
        assert '"state": "done"' in (tmp_path / 'runs' / run / 'status.json').read_text()
        assert '"name": "my_layers:Sine"' in (tmp_path / 'runs' / run / 'config.json').read_text()
    names = runpy.run_path('my_sweep.py')
    assert [m['model.fusion.name'] for m in names['sweep']()] == ['concat', 'my_layers:Sine']


def write_find_tutorial(path, monkeypatch):
    """Write the modules of the page, and return its two snippets that print."""
    model, candidate, policy, changed, problem, sweep_file = code('find')
    monkeypatch.chdir(path)
    monkeypatch.syspath_prepend(path)
    modules = {'model': model, 'policy': policy, 'problem': problem, 'sweep': sweep_file}
    for name, text in modules.items():
        (path / f'my_{name}.py').write_text(text)
    return candidate, changed


def test_from_find_to_an_interaction(tmp_path, monkeypatch, capsys):
    """The command and the snippets print what the page shows."""
    candidate, changed = write_find_tutorial(tmp_path, monkeypatch)
    page = (ROOT / 'docs/tutorials/find.md').read_text()
    outputs = re.findall(r'```text\n(.*?)\n```', page, flags=re.S)
    function, params, streams = importlib.import_module('my_model').build()
    print(find(function, params, **streams))
    exec(candidate, {})
    exec(changed, {})
    assert capsys.readouterr().out.splitlines() == '\n'.join(outputs).splitlines()

    # `concat` with the rows of the model's kernel is the model.
    names = {}
    exec((tmp_path / 'my_model.py').read_text(), names)
    observation, task = (jax.random.normal(jax.random.key(i), (3, n)) for i, n in ((0, 16), (1, 8)))
    params = names['Policy']().init(jax.random.key(2), observation, task)['params']
    kernel, bias = params['join']['kernel'], params['join']['bias']
    split = params | {'join': {'V': kernel[:16], 'U': kernel[16:], 'b': bias}}
    policy = importlib.import_module('my_policy').Policy()
    expected = names['Policy']().apply({'params': params}, observation, task)
    got = policy.apply({'params': split}, observation, task)
    assert jnp.abs(got - expected).max() < 1e-5


@pytest.mark.slow
def test_the_ablation_after_find(tmp_path, monkeypatch):
    """Two arms of the sweep, for fewer steps: with the product the loss is smaller."""
    write_find_tutorial(tmp_path, monkeypatch)
    members = sweep.load('my_sweep.py', tmp_path / 'runs')
    assert [member.label for member in members] == [
        *('concat', 'film', 'mi_low_rank', 'mi', 'concat, 360'),
    ]  # fmt: skip
    losses = {}
    for member in members[:1] + members[3:4]:
        config = sweep.parse_config(member.command).unlock()
        config.train.update({'steps': 300, 'save_every': 300, 'eval_every': 300, 'log_every': 300})
        workdir = tmp_path / 'runs' / member.name
        train_fit.train(config.lock(), str(workdir))
        lines = (workdir / 'metrics.jsonl').read_text().splitlines()
        records = [record for record in map(json.loads, lines) if record['split'] == 'eval']
        losses[member.label] = [record['loss'] for record in records if record['step'] == 300]
    assert len(losses['mi']) == len(losses['concat']) == 3
    assert max(losses['mi']) < min(losses['concat'])


def test_the_search_of_the_launch_page_is_drawn(tmp_path):
    text = (ROOT / 'docs/launch.md').read_text()
    (tmp_path / 'my_search.py').write_text(re.findall(r'```python\n(.*?)```', text, flags=re.S)[0])
    members = sweep.load(str(tmp_path / 'my_search.py'), tmp_path / 'runs')
    assert len(members) == 20
    for member in members:
        config = sweep.parse_config(member.command)
        lm_config.validate(config)
        assert 32 <= config.model.hidden <= 512 and config.seeds == (0, 1, 2)


@pytest.mark.slow
def test_your_own_problem_and_metric(tmp_path, monkeypatch):
    """The sweep of the page, run; the report has the areas, computed here from the records."""
    problem, metric, sweep_file = code('problem')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in (('problem', problem), ('metrics', metric), ('sweep', sweep_file)):
        (tmp_path / f'my_{name}.py').write_text(text)
    members = sweep.load('my_sweep.py', tmp_path / 'runs')
    assert [member.label for member in members] == ['concat', 'mi']
    for member in members:
        train_fit.train(sweep.parse_config(member.command), str(tmp_path / 'runs' / member.name))
    read = runs.read_sweep(tmp_path / 'runs')
    assert not read.lower_is_better and read.metric_title == 'area under curve'
    for arm in read.arms:
        values = arm.values_by_seed('accuracy', 'eval')
        areas = arm.final_values(read.metric, 'eval')
        assert list(values) == list(areas) == [0, 1, 2]
        for seed, curve in values.items():
            a, b, c, d = (curve[step] for step in (100, 200, 300, 400))
            assert areas[seed] == pytest.approx((a / 2 + b + c + d / 2) / 3)
            assert d > 0.55  # it learns


def test_your_own_cell_and_optimizer(tmp_path, monkeypatch):
    """The config accepts both, and the cell is in the models that it builds."""
    (tmp_path / 'my_cells.py').write_text(*code('cell'))
    monkeypatch.syspath_prepend(tmp_path)
    for_lm, for_rl = lm_configs.get_config('tiny'), rl_configs.get_config('tiny,env=catch')
    for config in (for_lm, for_rl):
        config.model.core = 'my_cells:GRU'
        config.optim.name = 'optax.contrib:muon'
    with for_lm.unlocked():
        for_lm.optim.options.beta = 0.9
    lm_config.validate(for_lm)
    rl_config.validate(for_rl)

    # The models.
    (E, H), words = (for_lm.model[name] for name in ('embed', 'hidden')), 11
    model = lm.build_model(for_lm, words)
    tokens = jnp.zeros((3, 2), jnp.int32)
    carry = model.initial_carry(2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), carry, tokens)['params']
    assert shapes['core']['layer_0']['unit']['in']['kernel'].shape == (E, H)
    agent = rl.build_agent(for_rl, envs.make('catch').spec)
    params = jax.eval_shape(functools.partial(rl.init_params, agent), jax.random.key(0))
    assert params['core']['unit']['hn']['kernel'].shape == (for_rl.model.hidden,) * 2

    # Muon makes the update of a diagonal matrix orthogonal.
    optimizer = optim.make_optimizer(for_lm.optim, 10)
    weights = {'W': jnp.diag(jnp.array([3.0, 4.0])), 'b': jnp.ones(2)}
    step, _ = optimizer.update(weights, optimizer.init(weights), weights)
    assert float(jnp.abs(step['W'][0, 1])) < 1e-6 < float(jnp.abs(step['W']).max())


@pytest.mark.parametrize('trainer', [lm_config, rl_config])
def test_a_core_of_one_s_own_has_a_word(trainer, monkeypatch):
    class Core(nn.Module):
        pass

    assert "did you mean 'transformer'" in trainer.SCHEMA['model.core']('transformr')
    monkeypatch.setitem(trainer.CORES, 'mine', Core)
    assert not trainer.SCHEMA['model.core']('mine')
    assert not trainer.SCHEMA['model.core']('mogrifier')


def test_the_config_of_the_dmlab_tutorial_is_fine(monkeypatch):
    names = {}
    exec(code('dmlab30')[0], names)
    config = names['get_config']()
    rl_config.validate(config)
    made = {}

    def make(suite, *, batch, seed, renderer='', cache=None, dataset=None):
        made.update(renderer=renderer, cache=cache, dataset=dataset)
        return types.SimpleNamespace(spec=dmlab30.make_spec())

    monkeypatch.setitem(envs.HOST, 'dmlab30', make)
    rl.make_pool(config, 60, 0)
    assert made == config.env.options.to_dict()
    assert made['renderer'] == 'hardware'
