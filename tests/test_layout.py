"""The house: imports point down, and the product of x and z is four files from the entry point."""

import ast
import itertools
import pathlib

import pytest

from mi.config import flatten
from mi.lm.setup import SCHEMA, check
from tests.conftest import ROOT

FLOORS = [
    ['config'],
    [
        *('contract', 'cost', 'cudnn', 'files', 'hlo', 'overrides'),
        *('precision', 'rows', 'topologies'),
    ],
    ['dropout', 'hlo_cost', 'layers'],
    ['motifs', 'program'],
    ['fusion'],
    ['cells'],
    ['unify'],
    [
        *('optim', 'checkpoint', 'metrics', 'progress', 'tracking', 'run', 'versions'),
        *('parallel', 'placement'),
    ],
    ['lm', 'rl', 'fit'],
    ['main', 'costs'],
    ['memory'],
    ['deployment'],
    ['estimate'],
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}


def imports(file):
    """The modules of ours that a file imports, dotted, without the leading mi."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'mi':
            inner = node.module.split('.')[1:]
            yield from (
                ['.'.join([*inner, a.name]) for a in node.names] if not inner else ['.'.join(inner)]
            )
        elif isinstance(node, ast.Import):
            yield from (a.name[3:] for a in node.names if a.name.startswith('mi.'))


def files():
    return [f for f in (ROOT / 'mi').rglob('*.py') if f != ROOT / 'mi/__init__.py']


@pytest.mark.parametrize('file', files(), ids=lambda f: str(f.relative_to(ROOT)))
def test_no_import_runs_upward(file):
    room = file.relative_to(ROOT / 'mi').with_suffix('').parts[0]
    for imported in imports(file):
        other = imported.split('.')[0]
        if other == room:
            continue
        if room == 'report':
            # It reads directories and knows nothing of models.
            assert other in ('config', 'files', 'progress')
        else:
            assert FLOOR[other] < FLOOR[room] or FLOOR[other] == FLOOR[room] == FLOOR['run'], (
                imported
            )


def test_no_config_passes_the_boundary():
    for name in (
        'contract',
        'layers',
        'fusion',
        'cells',
        'lm/model',
        'lm/data',
        'lm/evaluate',
        'lm/loss',
        'lm/dynamic',
        'lm/transformer',
    ):
        assert 'ml_collections' not in (ROOT / f'mi/{name}.py').read_text()


def test_four_files_from_main_to_the_product_of_x_and_z():
    path = ['main', 'lm.train', 'lm.model', 'layers']
    for above, below in itertools.pairwise(path):
        file = ROOT / 'mi' / pathlib.Path(*above.split('.')).with_suffix('.py')
        found = set(imports(file))
        assert below in found or below.rpartition('.')[0] in found, (
            f'{above} does not import {below}'
        )
    assert 'bilinear(x, z, W' in (ROOT / 'mi/layers.py').read_text()


def test_every_key_of_the_config_has_a_rule_and_no_rule_is_without_a_key():
    from configs import lm, lm_enwik8, lm_ptb, lm_wikitext103

    files = lm, lm_enwik8, lm_ptb, lm_wikitext103
    for config in (file.get_config(preset) for file in files for preset in file.PRESETS):
        assert set(flatten(config.to_dict())) == set(SCHEMA)
        check(config, SCHEMA)


def defined_flags(folder):
    """Name of each absl flag that a module of this folder defines, with the module."""
    for file in (ROOT / folder).rglob('*.py'):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith('flags.DEFINE_'):
                yield node.args[0].value, str(file.relative_to(ROOT))


def test_benchmarks_and_launchers_can_be_imported_into_one_process():
    """absl allows one definition of a flag in a process, and tests import both."""
    launchers, benchmarks = dict(defined_flags('launch')), dict(defined_flags('benchmarks'))
    assert launchers.keys() & benchmarks.keys() == set()
    assert 'accelerator' in launchers and 'chip' in benchmarks
