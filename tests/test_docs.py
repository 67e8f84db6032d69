import inspect

import pytest
from flax import linen as nn

from docs import build
from mi import cells, layers
from mi.motifs import attention, dynamic_conv, experts, gating, hypernetwork, normalization, pooling
from tests.test_fusion import SHIPPED

PARTS = {'Affine', 'Hypernetwork'}  # of motifs, not motifs


def test_the_table_of_fusions_is_the_dictionary():
    """A word of your own may be missing on the page; what is there has to be true."""
    page, made = ((build.HERE / 'fusions.md').read_text(), build.fusions())
    assert set(page.split('\n')) <= set(made.split('\n')), 'run python -m docs.build'
    assert all(f'| `{word}` |' in page for word in SHIPPED)


def test_the_measured_tables_are_the_results():
    assert (build.HERE / 'evaluation.md').read_text() == build.evaluation(), (
        'run python -m docs.build'
    )


def test_the_tables_of_scaling_are_the_results():
    assert (build.HERE / 'scaling.md').read_text() == build.scaling(), 'run python -m docs.build'


def test_every_module_has_a_place_on_a_page():
    homes = [
        *(attention, cells, dynamic_conv, experts, gating, hypernetwork, layers, normalization),
        pooling,
    ]
    modules = {
        name
        for home in homes
        for name, kind in vars(home).items()
        if inspect.isclass(kind)
        and issubclass(kind, nn.Module)
        and kind.__module__ == home.__name__
        and '__call__' in vars(kind)
        and not name.startswith('_')
    }
    shown = {type(e.module).__name__ for _, examples in build.pages().values() for e in examples}
    assert modules - shown <= PARTS, modules - shown - PARTS
    for _, examples in build.pages().values():
        for example in examples:
            title = type(example.module).__name__
            assert (build.HERE / f'motifs/figures/{title}.png').exists(), title


@pytest.mark.slow
@pytest.mark.parametrize('name', build.pages())
def test_the_page_is_what_the_code_says(name):
    written = (build.HERE / f'motifs/{name}.md').read_text()
    assert written == build.page(name), 'run python -m docs.build'
