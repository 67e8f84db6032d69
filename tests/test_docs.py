"""Generated pages are up to date, and the architecture page names existing code."""

import ast
import inspect
import re

import pytest
from flax import linen as nn

from docs import build
from mi import cells, layers
from mi.motifs import attention, dynamic_conv, experts, gating, hypernetwork, normalization, pooling
from tests.conftest import ROOT
from tests.test_fusion import SHIPPED

PARTS = {'Affine', 'Hypernetwork'}  # building blocks without a page


def test_the_table_of_fusions_is_the_dictionary():
    """Registered fusions of a user may be missing on the page."""
    page, generated = (build.HERE / 'fusions.md').read_text(), build.make_fusions_page()
    assert set(page.split('\n')) <= set(generated.split('\n')), 'run python -m docs.build'
    assert all(f'| `{name}` |' in page for name in SHIPPED)


def test_the_measured_tables_are_the_results():
    assert (build.HERE / 'evaluation.md').read_text() == build.make_evaluation_page(), (
        'run python -m docs.build'
    )


def test_the_tables_of_scaling_are_the_results():
    assert (build.HERE / 'scaling.md').read_text() == build.make_scaling_page(), (
        'run python -m docs.build'
    )


def test_every_module_has_a_place_on_a_page():
    sources = [
        *(attention, cells, dynamic_conv, experts, gating, hypernetwork, layers, normalization),
        pooling,
    ]
    modules = {
        name
        for source in sources
        for name, kind in vars(source).items()
        if inspect.isclass(kind)
        and issubclass(kind, nn.Module)
        and kind.__module__ == source.__name__
        and '__call__' in vars(kind)
        and not name.startswith('_')
    }
    examples = [example for page in build.list_pages().values() for example in page.examples]
    titles = {type(example.module).__name__ for example in examples}
    assert modules - titles <= PARTS, modules - titles - PARTS
    for title in titles:
        assert (build.HERE / f'motifs/figures/{title}.png').exists(), title


@pytest.mark.slow
@pytest.mark.parametrize('name', build.list_pages())
def test_the_page_is_up_to_date(name):
    written = (build.HERE / f'motifs/{name}.md').read_text()
    assert written == build.make_page(name), 'run python -m docs.build'


ARCHITECTURE = (build.HERE / 'architecture.md').read_text()


@pytest.mark.parametrize(
    ('path', 'names'), re.findall(r'`(mi/[\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)', ARCHITECTURE)
)
def test_the_architecture_page_names_existing_code(path, names):
    defined = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        name = getattr(node, 'name', None)
        defined |= {
            name,
            *(f'{name}.{getattr(m, "name", None)}' for m in getattr(node, 'body', ())),
        }
    assert set(re.findall(r'[\w.]+', names)) <= defined


def test_every_arrow_of_the_architecture_page_is_an_import():
    """And every folder or file in the diagram or the text exists."""
    diagram = re.search(r'```mermaid\n(.*?)```', ARCHITECTURE, flags=re.DOTALL)[1]
    paths = dict(re.findall(r'(\w+)\["([\w/.]+)', diagram))
    named = {*paths.values(), *re.findall(r'`((?:mi|tests|experiments)/[\w/.]*)`', ARCHITECTURE)}
    assert not [path for path in named if not (ROOT / path).exists()]
    for importer, imported in re.findall(r'(\w+)(?:\[[^\]]*\])? --> (\w+)', diagram):
        top = ROOT / paths[importer]
        files = sorted(top.rglob('*.py')) if top.is_dir() else [top]
        module = paths[imported].removesuffix('.py').strip('/').replace('/', '.')
        package, _, name = module.rpartition('.')
        # main names what it imports by 'package.module:function'.
        pattern = (
            rf'(?m)^\s*(from {module}[. ]|from {package or "-"} import .*\b{name}\b)'
            rf"|'{module}[\w.]*:"
        )
        assert any(re.search(pattern, file.read_text()) for file in files), (importer, imported)
