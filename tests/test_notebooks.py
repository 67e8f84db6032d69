"""The notebooks of the documentation: kept without outputs, and what they show when they run."""

import importlib.util
import json
import re

import pytest

from tests.conftest import ROOT

FOLDER = ROOT / 'docs/notebooks'
NOTEBOOKS = sorted(FOLDER.glob('*.ipynb'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs_and_links_to_what_there_is(path):
    cells = json.loads(path.read_text())['cells']
    code = [cell for cell in cells if cell['cell_type'] == 'code']
    assert code and not any(cell['outputs'] or cell['execution_count'] for cell in code)
    text = '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown')
    assert text.startswith('# ')
    for link in re.findall(r'\]\(([^)#:]+)\)', text):
        target = {'../results/index.md': '../results/README.md'}.get(link, link)
        assert (FOLDER / target).exists(), link


@pytest.fixture(scope='module')
def pages():
    """Run the notebooks as the build of the site does; return its pages and figures by path."""
    for package in ('mkdocs', 'nbclient', 'nbconvert', 'ipykernel'):
        pytest.importorskip(package, reason='the extra docs is not installed')
    spec = importlib.util.spec_from_file_location('docs_site', ROOT / 'docs/site.py')
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    made = {}
    for path in NOTEBOOKS:
        made |= site.make_notebook(path)
    return made


@pytest.mark.slow
def test_film_is_an_interaction_on_the_page_of_the_layer(pages):
    page = pages['notebooks/layer.md']
    difference = re.search(r'between FiLM and the interaction: (\d\S+)', page)[1]
    assert 0 <= float(difference) < 1e-4
    assert 'FiLM ranks of the slices [1, 1, 1, 1, 1]' in page
    assert 'full ranks of the slices [3, 3, 3, 3, 3]' in page
    concat, interaction = (
        float(re.search(rf'\n {{4}}{name} +(\d\S+)', page)[1]) for name in ('concat', 'interaction')
    )
    assert concat < 1e-5 < 1e-2 < interaction


@pytest.mark.slow
def test_the_ablation_ends_with_a_table_and_figures(pages):
    """Every seed of mi has the smaller error, and the table has the mean of those printed."""
    page = pages['notebooks/ablation.md']
    printed = re.findall(r'seed (\d): concat (\S+), mi (\S+)', page)
    assert [int(seed) for seed, _, _ in printed] == [0, 1, 2]
    for column, arm in ((1, 'concat'), (2, 'mi')):
        mean = sum(float(row[column]) for row in printed) / 3
        shown = re.search(rf'\| {arm} \| \**([\d.]+)', page)[1]
        assert float(shown) == pytest.approx(mean, abs=1e-3)
    assert all(float(mi) < float(concat) for _, concat, mi in printed)
    figures = [pages[f'notebooks/{name}'] for name in re.findall(r'!\[figure\]\((\S+)\)', page)]
    assert len(figures) == 2 and all(figure.startswith(b'\x89PNG') for figure in figures)
