"""Direction of the imports: each package imports only packages below its own."""

import ast
import importlib
import itertools

import pytest
from absl import flags

from mi import main
from mi.config import flatten
from mi.lm.config import SCHEMA, check
from tests.conftest import ROOT

# From the bottom up. Packages of one layer do not import each other.
LAYERS = [
    ['registry'],
    ['config', 'precision', 'rows'],
    ['kernels', 'dropout', 'overrides', 'options', 'web_page'],
    ['counting'],
    ['find'],
    ['layers'],
    ['motifs'],
    ['fusion'],
    ['cells'],
    ['unify'],
    ['training'],
    ['lm', 'rl', 'fit', 'report'],
    ['main', 'estimate', 'export', 'testing', 'inspect'],
    ['compress'],
]
LAYER = {package: i for i, packages in enumerate(LAYERS) for package in packages}
# A report reads run directories and knows nothing of models.
READ_BY_REPORT = (
    *('config', 'registry', 'web_page'),
    *(f'training.{name}' for name in ('io', 'lock', 'progress', 'run_metric', 'run_state')),
)
TYPED_MODULES = [
    *('kernels/bilinear', 'layers', 'fusion', 'cells/lstm', 'lm/model', 'lm/transformer'),
    *('lm/data/token_store', 'lm/evaluate', 'lm/loss', 'lm/dynamic_evaluation'),
]


def imported_modules(file):
    """Yield the modules that a file imports, dotted."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f'{node.module}.{alias.name}' for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def library_files():
    return [file for file in (ROOT / 'mi').rglob('*.py') if file != ROOT / 'mi/__init__.py']


@pytest.mark.parametrize('file', library_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file):
    package = file.relative_to(ROOT / 'mi').with_suffix('').parts[0]
    for module in imported_modules(file):
        top, _, inner = module.partition('.')
        assert top not in ('configs', 'experiments', 'launch', 'benchmarks', 'tests'), module
        if top != 'mi' or inner.split('.')[0] == package:
            continue
        if package == 'report':
            assert inner.startswith(READ_BY_REPORT), module
        else:
            assert LAYER[inner.split('.')[0]] < LAYER[package], module


@pytest.mark.parametrize('module', TYPED_MODULES)
def test_config_dicts_end_at_the_trainers(module):
    file = ROOT / f'mi/{module}.py'
    assert not any(name.startswith('ml_collections') for name in imported_modules(file))


def test_four_files_from_main_to_the_layer():
    assert main.TASKS['train']['lm'] == 'mi.lm.train:train'
    path = ['lm/train', 'lm/model', 'layers']
    for above, below in itertools.pairwise(path):
        modules = list(imported_modules(ROOT / f'mi/{above}.py'))
        assert any(m.startswith('mi.' + below.replace('/', '.')) for m in modules), (above, below)


def test_every_key_of_the_config_has_a_rule_and_no_rule_is_without_a_key():
    from configs import lm, lm_enwik8, lm_ptb, lm_wikitext103

    files = lm, lm_enwik8, lm_ptb, lm_wikitext103
    keys = {key for key in SCHEMA if not key.endswith('.*')}  # those are optional
    for config in (file.get_config(preset) for file in files for preset in file.PRESETS):
        assert set(flatten(config.to_dict())) == keys
        check(config, SCHEMA)


def import_modules(folder):
    """Import the modules in a folder of the repository, except those of missing extras."""
    for file in sorted((ROOT / folder).rglob('[!_]*.py')):
        module = '.'.join(file.relative_to(ROOT).with_suffix('').parts)
        if module == 'launch.status':  # is never beside a launcher, and also has --workdir
            continue
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            assert error.name is not None
            assert error.name.split('.')[0] not in ('mi', 'launch', 'benchmarks', 'configs'), module


def test_launchers_and_benchmarks_can_be_imported_into_one_process():
    """absl refuses two definitions of a flag in a process, unless one of them may be overridden."""
    import_modules('launch')
    import_modules('benchmarks')
    names = {'launch': set(), 'benchmarks': set()}
    for module, module_flags in flags.FLAGS.flags_by_module_dict().items():
        names.get(module.split('.')[0], set()).update(flag.name for flag in module_flags)
    assert {'accelerator', 'parallel'} <= names['launch'] and {'only', 'chip'} <= names[
        'benchmarks'
    ]
    assert not names['launch'] & names['benchmarks']
