"""The distribution: what it contains, what it imports, and that its console scripts start."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

from launch import console
from tests.conftest import ROOT
from tools import extras

LATE = ('orbax', 'matplotlib', 'tokenizers', 'tensorboardX', 'chex', 'ml_collections', 'optax')
LATE += ('scipy.cluster', 'scipy.optimize', 'tensorly')
LAYER = """
import sys, jax, mi
from mi import compress, find, fusion, motifs, unify
x = jax.numpy.ones((2, 3))
y, variables = mi.MultiplicativeInteraction(4).init_with_output(jax.random.key(0), x, x)
apply = mi.MultiplicativeInteraction(4).apply
mi.find(lambda params, x, z: apply(params, x, z), variables, x=x, z=x)
print(y.shape, sorted(set(sys.argv[1:]) & sys.modules.keys()))
"""


def run(*command, cwd=None, **variables):
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd or ROOT,
        env=os.environ | {'JAX_PLATFORMS': 'cpu', **variables},
        capture_output=True,
        text=True,
    )


def test_layers_import_no_package_of_an_extra():
    done = run(sys.executable, '-c', LAYER, *LATE)
    assert done.stdout.strip() == '(2, 4) []', done.stderr


def test_the_package_itself_imports_nothing():
    program = "import sys; import mi; print('jax' in sys.modules, 'numpy' in sys.modules)"
    assert run(sys.executable, '-c', program).stdout == 'False False\n'


@pytest.mark.parametrize(
    'task, others',
    [
        ('lm', ('mi.rl', 'mi.fit', 'PIL')),
        ('rl', ('mi.lm', 'mi.fit', 'tokenizers', 'gymnasium', 'envpool', 'ray')),
        ('fit', ('mi.lm', 'mi.rl', 'PIL', 'tokenizers')),
    ],
)
def test_a_run_imports_the_packages_of_its_task_alone(task, others):
    """Importing takes a large share of a small run's time."""
    program = (
        'import pkgutil, sys; from mi import main\n'
        'before = sorted(set(sys.argv[2:]) & sys.modules.keys())\n'
        'try: pkgutil.resolve_name(main.TASKS["train"][sys.argv[1]])({}, "")\n'
        'except AttributeError: pass  # the config has no keys\n'
        'assert f"mi.{sys.argv[1]}.train" in sys.modules\n'
        'print(before, sorted(set(sys.argv[2:]) & sys.modules.keys()))'
    )
    never = ('matplotlib', 'scipy', 'pandas', 'torch', 'tensorflow', 'optuna')
    done = run(sys.executable, '-c', program, task, *others, *never)
    assert done.stdout.strip() == '[] []', done.stdout + done.stderr


def test_every_import_is_of_a_package_that_an_extra_declares():
    """Imports of mi and launch that are not in a function or under TYPE_CHECKING."""
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    requirements = project['dependencies'] + [
        each for extra in ('train', 'report', 'sweep') for each in read_all(project, extra)
    ]
    names = {re.match(r'[\w-]+', each)[0].lower() for each in requirements}
    modules = {'absl-py': 'absl', 'orbax-checkpoint': 'orbax', 'pillow': 'PIL', 'pyyaml': 'yaml'}
    modules |= {'tensorboardx': 'tensorboardX'}
    known = {modules.get(name, name) for name in names} | set(sys.stdlib_module_names)
    known |= {'mi', 'launch', 'configs'}
    # Files that are imported for a chosen environment or engine, and its extra.
    known |= {'gymnasium', 'ray', 'envpool'}
    for folder in ('mi', 'launch', 'configs'):
        for file in (ROOT / folder).rglob('*.py'):
            assert {*list_imports(file)} <= known, file


def read_all(project, extra):
    for requirement in project['optional-dependencies'][extra]:
        included = re.fullmatch(r'multiplicative-interactions\[(.+)\]', requirement)
        for name in included[1].split(',') if included else []:
            yield from read_all(project, name)
        if not included:
            yield requirement


def list_imports(file):
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition('.')[0]


def test_the_page_of_the_installation_has_every_extra_and_no_other():
    page = (ROOT / 'docs/install.md').read_text()
    rows = re.findall(r'^\| (`.*?`) \|', page, flags=re.M)
    assert set(re.findall(r'`(\w+)`', ' '.join(rows))) == extras.read_extras().keys()


@pytest.mark.parametrize(
    ('arguments', 'module'),
    [
        ([], 'launch.local'),
        (['--sweep=a.py'], 'launch.local'),
        (['slurm', '--sweep=a.py'], 'launch.slurm'),
    ],
)
def test_the_engine_of_a_sweep_is_its_first_argument(monkeypatch, arguments, module):
    monkeypatch.setattr(sys, 'argv', ['mi-sweep', *arguments])
    calls = []
    monkeypatch.setattr(console.runpy, 'run_module', lambda name, **options: calls.append(name))
    console.sweep()
    assert calls == [module] and sys.argv == ['mi-sweep', *arguments[-1:]][: len(sys.argv)]
    assert all(argument.startswith('-') for argument in sys.argv[1:])


def test_an_unknown_engine_is_refused(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['mi-sweep', 'slrum', '--sweep=a.py'])
    with pytest.raises(SystemExit, match=r"'slrum': expected an engine .* did you mean 'slurm'"):
        console.sweep()


@pytest.mark.parametrize('name', ['absl', 'orbax.checkpoint'])
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, name):
    def fail(module, **options):
        raise ModuleNotFoundError(f'No module named {name!r}', name=name)

    monkeypatch.setattr(console.runpy, 'run_module', fail)
    package = name.partition('.')[0]
    with pytest.raises(SystemExit, match=rf'error: {package} is not installed. Try pip install'):
        console.train()


def test_a_missing_module_of_our_own_is_no_matter_of_installation(monkeypatch):
    def fail(module, **options):
        raise ModuleNotFoundError("No module named 'mi.typo'", name='mi.typo')

    monkeypatch.setattr(console.runpy, 'run_module', fail)
    with pytest.raises(ModuleNotFoundError):
        console.report()


@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    """The wheel and the sdist, built from a copy of the tracked files."""
    source, folder = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('dist')
    files = run('git', 'ls-files').stdout.split('\n')
    for name in filter(None, files):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    done = run(sys.executable, '-m', 'build', '--outdir', folder, source)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_wheel_has_the_packages_and_their_data(dist):
    assert run(sys.executable, '-m', 'twine', 'check', '--strict', *dist.iterdir()).returncode == 0
    (wheel,) = dist.glob('*.whl')
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.partition('/')[0] for name in names}
    metadata = {folder for folder in folders if folder.endswith('.dist-info')}
    assert folders - metadata == {'mi', 'launch', 'configs', 'experiments'}
    tracked = run('git', 'ls-files', 'mi', 'launch', 'configs', 'experiments').stdout.split('\n')
    suffixes = ('.py', '.xz', '.css', '.js', '.csv', '.typed')
    packed = [name for name in tracked if name.endswith(suffixes)]
    assert set(packed) <= set(names)


def find_python(version):
    """Return an interpreter of this machine that can make an environment; else skip the test."""
    folders = os.environ['PATH'].split(':')
    folders += sorted(map(str, (ROOT.home() / '.pyenv/versions').glob(f'{version}.*/bin')))
    for folder in folders:
        python = shutil.which(f'python{version}', path=folder)
        if python and run(python, '-c', 'import venv, ensurepip').returncode == 0:
            return python
    pytest.skip(f'no Python {version}')


@pytest.mark.slow
@pytest.mark.parametrize('version', ['3.11', '3.12', '3.13', '3.14'])
def test_the_wheel_installs_its_layers_and_with_an_extra_its_trainers(tmp_path, dist, version):
    """Away from the clone, in an environment of its own: layers by pip, the extra by uv.

    Python 3.11 also plans a sweep and uses the example package. The others use only uv, which is
    faster.
    """
    # Without PYTHONPATH, in which pip would find the package installed, and without flags that
    # another jaxlib does not know.
    alone = {'cwd': tmp_path, 'PYTHONPATH': '', 'XLA_FLAGS': ''}
    assert run(find_python(version), '-m', 'venv', tmp_path / 'env').returncode == 0
    programs = tmp_path / 'env/bin'
    (wheel,) = dist.glob('*.whl')
    lock = ['-c', ROOT / 'requirements/lock.txt']
    python = programs / 'python'
    pip = [python, '-m', 'pip', 'install', '--quiet']
    uv = [sys.executable, '-m', 'uv', 'pip', 'install', '--quiet', '--python', python]
    done = run(*(pip if version == '3.11' else uv), wheel, *lock, **alone)
    assert done.returncode == 0, done.stderr
    layer = run(python, '-c', LAYER, *LATE, **alone)
    assert layer.stdout.strip() == '(2, 4) []', layer.stderr
    refused = run(programs / 'mi-train', **alone)
    assert refused.returncode == 1 and 'is not installed. Try pip install' in refused.stderr

    # With the extra, a run of two steps and its status.
    done = run(*uv, f'{wheel}[sweep]', *lock, **alone)
    assert done.returncode == 0, done.stderr
    config = '--config=experiments/expressivity/config.py:fit'
    short = ['--config.train.steps=2', '--workdir=run']
    trained = run(programs / 'mi-train', config, *short, **alone)
    assert trained.returncode == 0, trained.stderr
    assert run(programs / 'mi-status', '--workdir=run', **alone).returncode == 0
    if version == '3.11':
        sweep = ['--sweep=experiments/quickstart.py', '--workdir=sweep']
        planned = run(programs / 'mi-sweep', *sweep, '--dry_run', **alone)
        assert planned.returncode == 0 and 'all of it' in planned.stdout, planned.stderr
        use_the_example(programs, uv, alone)


def use_the_example(programs, uv, alone):
    """Install examples/my_fusion beside the wheel; check, sweep and train it from its directory."""
    example = alone['cwd'] / 'example'
    shutil.copytree(ROOT / 'examples/my_fusion', example)
    alone = alone | {'cwd': example}
    done = run(*uv, '-e', '.', 'pytest', **alone)
    assert done.returncode == 0, done.stderr
    checked = run(programs / 'python', '-m', 'pytest', '-q', **alone)
    assert checked.returncode == 0 and '2 passed' in checked.stdout, checked.stdout
    text = (example / 'my_fusion/sweep.py').read_text().replace('60_000', '400')
    (example / 'short.py').write_text(text.replace('(0, 1, 2, 3, 4, 5)', '(0, 1)'))
    swept = run(programs / 'mi-sweep', '--sweep=short.py', '--workdir=signs', **alone)
    assert swept.returncode == 0, swept.stderr
    assert 'my_fusion.layers:TanhGate' in (example / 'signs/report/table.csv').read_text()
    model = '--config.model.fusion.name=my_fusion.layers:TanhGate'
    tiny = ['--config=configs/lm.py:tiny', '--config.train.steps=2', '--workdir=lm']
    trained = run(programs / 'mi-train', *tiny, model, **alone)
    assert trained.returncode == 0, trained.stderr


@pytest.mark.slow
def test_every_extra_has_a_solution_with_and_without_the_lock(capsys):
    """By uv. pip, which takes minutes for some, resolves the extra of the trainers."""
    extras.main(['--installers=uv'])
    extras.main(['--installers=pip', '--only=train'])
    assert 'FAILED' not in capsys.readouterr().out
