"""A generator for docs/fusions.md, docs/gallery.md, docs/motifs/ and the tables of other pages.

    python -m docs.build

The modules are tiny and have random parameters; nothing is trained.
"""

import dataclasses
import functools
import inspect
import json
import math
import pathlib
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import mi
from mi import cells, fusion
from mi.motifs import attention, dynamic_conv, experts, gating, hypernetwork, normalization, pooling
from mi.motifs.convolutional_attention import ConvolutionalSelfAttention
from mi.unify import as_mi, explain

HERE = pathlib.Path(__file__).parent
B, T, M, N, K = 2, 5, 4, 6, 8


@dataclasses.dataclass(frozen=True)
class Example:
    """A module and its inputs, for a page."""

    module: nn.Module
    inputs: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Page:
    """A page of docs/motifs.

    Attributes:
      source: Python module that the page documents.
      examples: motifs in this module.
    """

    source: types.ModuleType
    examples: list[Example]


def draw_normal(seed: int, *shape: int) -> jax.Array:
    """Draw standard normal numbers of a shape."""
    return jax.random.normal(jax.random.key(seed), shape)


def make_cell_example(module: Any) -> Example:
    """Return an example of a cell that runs for one step."""
    return Example(module, (module.initial(B), draw_normal(0, 1, B, N)))


def list_pages() -> dict[str, Page]:
    """Return name → page of docs/motifs."""
    return _layer_pages() | _fusion_pages() | _sequence_pages()


def _layer_pages() -> dict[str, Page]:
    x, z = draw_normal(0, B, N), draw_normal(1, B, M)
    image = draw_normal(3, B, 4, 4, K)
    return {
        'forms': Page(
            mi.layers,
            [
                Example(mi.MultiplicativeInteraction(K), (x, z)),
                Example(mi.LowRankMultiplicativeInteraction(K, rank=2), (x, z)),
                Example(mi.TuckerMultiplicativeInteraction(K, rank=2), (x, z)),
                Example(mi.BlockMultiplicativeInteraction(K, blocks=2), (x, z)),
                Example(mi.DiagonalMultiplicativeInteraction(), (x, z)),
                Example(mi.ScalarMultiplicativeInteraction(), (x, z)),
                Example(mi.MultiHead(K), (x, jnp.eye(M)[:B])),
            ],
        ),
        'gating': Page(
            gating,
            [
                Example(gating.GatedLinearUnit(K), (x, z)),
                Example(gating.GatedFeedForward(K), (x,)),
                Example(gating.Highway(), (x,)),
                Example(gating.SqueezeExcitation(ratio=4), (image,)),
            ],
        ),
        'normalization': Page(
            normalization,
            [
                Example(normalization.FeatureWiseModulation(), (x, z)),
                Example(normalization.ConditionalLayerNorm(), (x, z)),
                Example(normalization.ConditionalBatchNorm(use_running_average=True), (x, z)),
                Example(normalization.AdaLNZero(nn.tanh), (x, z)),
            ],
        ),
    }


def _fusion_pages() -> dict[str, Page]:
    x, z = draw_normal(0, B, N), draw_normal(1, B, M)
    return {
        'hypernetwork': Page(
            hypernetwork,
            [
                Example(hypernetwork.LinearHypernetwork(K), (x, z)),
                Example(hypernetwork.MLPHypernetwork(K, hidden=(4,)), (x, z)),
            ],
        ),
        'pooling': Page(
            pooling,
            [
                Example(pooling.MLB(K, rank=3), (x, z)),
                Example(pooling.MFB(K, factors=2), (x, z)),
                Example(pooling.MUTAN(K, rank=2, hidden=4), (x, z)),
                Example(pooling.BLOCK(K, rank=2, blocks=2, hidden=4), (x, z)),
                Example(pooling.CompactBilinear(K), (x, z)),
            ],
        ),
        'experts': Page(
            experts,
            [
                Example(experts.DenseMixture(K), (x, z)),
                Example(experts.RoutedMixture(K, experts=3, hidden=4), (x,)),
            ],
        ),
    }


def _sequence_pages() -> dict[str, Page]:
    sequence, image, tokens = (
        draw_normal(2, B, T, K), draw_normal(3, B, 4, 4, K), draw_normal(4, B, T, K)
    )  # fmt: skip
    return {
        'attention': Page(
            attention,
            [
                Example(attention.Attention(heads=2), (tokens,)),
                Example(attention.GatedCrossAttention(heads=2), (tokens, sequence)),
                Example(attention.LatentCrossAttention(latents=3, features=K, heads=2), (tokens,)),
                Example(ConvolutionalSelfAttention(heads=4, features=K), (image,)),
            ],
        ),
        'dynamic_conv': Page(
            dynamic_conv,
            [
                Example(dynamic_conv.LightweightConvolution(heads=2, width=3), (sequence,)),
                Example(dynamic_conv.DynamicConvolution(heads=2, width=3), (sequence,)),
                Example(
                    dynamic_conv.ConditionalConvolution(4, kernel_size=(2, 2), experts=3), (image,)
                ),
            ],
        ),
        'cells': Page(
            cells,
            [
                make_cell_example(cells.LSTM(K)),
                make_cell_example(cells.MultiplicativeLSTM(K)),
                make_cell_example(cells.MILSTM(K)),
                make_cell_example(cells.MogrifierLSTM(K, rounds=2)),
                make_cell_example(cells.HyperLSTM(K, hyper_features=3, embedding=2)),
            ],
        ),
    }


def make_page(name: str) -> str:
    """Return the text of docs/motifs/<name>.md."""
    page = list_pages()[name]
    summary, _, details = (inspect.getdoc(page.source) or '').partition('\n')
    parts = [f'# {name}', summary, details.strip(), '`python -m docs.build` generates this page.']
    for example in page.examples:
        title = type(example.module).__name__
        doc = inspect.getdoc(type(example.module)) or ''
        doc = re.sub(r'\n+Attributes:.*', '', doc, flags=re.S)
        parts += [
            f'## {title}',
            f'```text\n{doc}\n```',
            f'```python\n{textwrap.dedent(inspect.getsource(type(example.module).__call__)).rstrip()}\n```',
            f'```text\n{explain(example.module, init_variables(example), *example.inputs)}\n```',
            f'![W of {title}](figures/{title}.png)',
        ]
    return '\n\n'.join(part for part in parts if part) + '\n'


def format_equation(module: mi.MultiplicativeInteraction) -> str:
    """Return the equation of a module, with only the terms that it has."""
    terms = {'zᵀWx': module.use_W, 'zᵀU': module.use_U, 'Vx': module.use_V, 'b': module.use_b}
    return 'f(x, z) = ' + ' + '.join(term for term, is_used in terms.items() if is_used)


def make_fusions_page() -> str:
    """Return the text of docs/fusions.md, with a row for every name in FUSIONS."""
    # Head.
    lines = [
        '# Values of `config.model.fusion.name`',
        '',
        '`python -m docs.build` generates this page from `mi.fusion.FUSIONS`. Parameters and FLOPs',
        'are for one x of n = 64 features, one z of m = 32 and k = 128 outputs, with rank 8 and',
        'hidden 32. FLOPs are those of the products.',
        '',
        '| value | module | output | options | parameters | FLOPs |',
        '|---|---|---|---|---:|---:|',
    ]
    x, z = (jax.ShapeDtypeStruct((1, size), jnp.float32) for size in (64, 32))
    for name, constructor in fusion.FUSIONS.items():
        # Count parameters and FLOPs.
        context = {'context': 'one_hot'} if name in fusion.ONE_HOT else {}
        module = fusion.get(name, rank=8, hidden=32)(128, **context)
        shapes = jax.eval_shape(module.init, jax.random.key(0), x, z)
        flops = mi.counting.flops(module.apply, shapes, x, z)
        # Find the class of a partial, and its changed fields.
        module_class: Any = constructor
        if isinstance(constructor, functools.partial):
            module_class = constructor.keywords.get('module', constructor.func)
        changes = ', '.join(
            f'{key}={value}'
            for key, value in getattr(constructor, 'keywords', {}).items()
            if isinstance(value, str | int | bool)
        )
        # Write the row.
        summary = (inspect.getdoc(module_class) or '').split('\n\n')[0]
        summary = summary.replace('\n', ' ').replace('|', r'\|')
        if module_class is mi.MultiplicativeInteraction:
            summary = format_equation(module)
        lines.append(
            f'| `{name}` | `{module_class.__name__}`{f" ({changes})" if changes else ""} | '
            f'{summary} | {", ".join(fusion.get_options(name))} | '
            f'{mi.counting.parameters(shapes.get("params", {})):,} | {flops:,} |'
        )
    return '\n'.join(lines) + '\n'


def make_evaluation_page() -> str:
    """Return the text of docs/evaluation.md, with tables from benchmarks/results."""
    # Layers.
    results = HERE.parent / 'benchmarks/results'
    layers = json.loads((results / 'layers_cpu.json').read_text())
    head = '| regime | pass | ms | share | over einsum | best torch | over it | over Bilinear |'
    lines = [f'{layers["machine"]}, jax {layers["jax"]}, f32.', '', head + ' MiB, einsum, torch |']
    lines.append('|---|---|---:|---:|---:|---|---:|---:|---:|')
    for figure in layers['figures']:
        memory = [figure['mi_mib'], figure['einsum_mib'], figure['torch_mib']]
        has_memory = not math.isnan(memory[0])
        lines.append(
            f'| {figure["regime"]} | {figure["phase"]} | {figure["mi_ms"]:.2f} | '
            f'{figure["share"]:.2f} | {figure["einsum_over_mi"]:.2f}× | '
            f'{figure["best_torch"]} | {figure["best_torch_over_mi"]:.2f}× | '
            f'{_format_number(figure["bilinear_over_mi"], "×", 2)} | '
            f'{", ".join(map(_format_number, memory)) if has_memory else ""} |'
        )
    # Orders.
    orders = json.loads((results / 'orders_cpu.json').read_text())
    order_lines = ['| B, m, n, k | plan | fastest | plan over fastest |', '|---|---|---|---:|']
    order_lines += [
        f'| {figure["shape"]} | {figure["plan"]} | {figure["best"]} | {figure["ratio"]:.2f} |'
        for figure in orders['figures']
    ]
    text = (HERE / 'evaluation.md').read_text()
    return fill_tables(text, {'layers_cpu': lines, 'orders_cpu': order_lines})


def make_scaling_page() -> str:
    """Return the text of docs/scaling.md, with the tables in benchmarks/results."""
    results = HERE.parent / 'benchmarks/results'
    tables = {}
    for name in ('scaling', 'compiled'):
        tables |= json.loads((results / f'{name}.json').read_text())['tables']
    blocks = {}
    for name, table in tables.items():
        head, *rows = table['rows']
        has_text = [
            all(re.match('[^0-9]', row[i] or 'x') for row in rows) for i in range(len(head))
        ]
        rule = ['---' if is_text else '---:' for is_text in has_text]
        lines = [f'| {" | ".join(row)} |' for row in (head, rule, *rows)]
        blocks[name] = [f'{table["heading"]}:', '', *lines]
    return fill_tables((HERE / 'scaling.md').read_text(), blocks)


def make_gallery_page() -> str:
    """Return the text of docs/gallery.md, with reports of `mi.find` on models of other authors."""
    from docs.gallery import page  # needs Haiku and Equinox

    return page.make_page(page.find_all())


def fill_tables(text: str, blocks: dict[str, list[str]]) -> str:
    """Replace the text between `<!-- name -->` and `<!-- end -->` by the lines of each block."""
    for name, lines in blocks.items():
        pattern = f'(?s)(<!-- {name} -->\n).*?(<!-- end -->)'
        table = '\n' + '\n'.join(lines) + '\n\n'
        text = re.sub(pattern, lambda match, table=table: match[1] + table + match[2], text)
    return text


def _format_number(value: float, unit: str = '', digits: int = 0) -> str:
    return '' if math.isnan(value) else f'{value:.{digits}f}{unit}'


def init_variables(example: Example) -> Any:
    """Return variables of the module, perturbed because some of them are initialized to zero."""
    initial = example.module.init(jax.random.key(5), *example.inputs)
    return jax.tree.map(
        lambda p: p + 0.3 * draw_normal(p.size, *p.shape) if p.dtype == jnp.float32 else p, initial
    )


def draw_figure(example: Example) -> Any:
    """Draw |W| with a row for each product and the slices along z side by side."""
    from matplotlib.figure import Figure

    # Lay out the rows.

    products = as_mi(example.module, init_variables(example), *example.inputs).products
    max_slices = 8
    columns = min(max_slices, max(len(p.W) for p in products))
    figure = Figure(
        figsize=(1.1 * columns + 0.4, 1.6 * len(products)), dpi=110, layout='constrained'
    )
    rows = figure.subfigures(len(products), 1, squeeze=False)[:, 0]
    # Draw the slices of each product.
    for row, product in zip(rows, products, strict=True):
        W = np.abs(np.asarray(product.W))
        suffix = f', {max_slices} of {len(W)} slices' if len(W) > max_slices else ''
        row.suptitle(f'{product.name}{suffix}', fontsize=8)
        for i, axis in enumerate(row.subplots(1, columns, squeeze=False)[0]):
            axis.set_xticks([])
            axis.set_yticks([])
            if i >= min(len(W), max_slices):
                axis.axis('off')
                continue
            axis.imshow(W[i], vmin=0, vmax=W.max() or 1, cmap='Blues', aspect='auto')
            axis.set_title(f'W[{i}]', fontsize=7)
            if not i:
                axis.set_xlabel('y', fontsize=7)
                axis.set_ylabel('x', fontsize=7)
    return figure


def list_files() -> Iterator[tuple[pathlib.Path, Callable[[], str]]]:
    """Yield the path of each generated file, and the function that makes its text."""
    yield HERE / 'fusions.md', make_fusions_page
    yield HERE / 'evaluation.md', make_evaluation_page
    yield HERE / 'scaling.md', make_scaling_page
    yield HERE / 'gallery.md', make_gallery_page
    for name in list_pages():
        yield HERE / 'motifs' / f'{name}.md', functools.partial(make_page, name)


def main() -> None:
    """Write all pages and figures."""
    (HERE / 'motifs/figures').mkdir(parents=True, exist_ok=True)
    for path, make_text in list_files():
        path.write_text(make_text())
    for page in list_pages().values():
        for example in page.examples:
            name = type(example.module).__name__
            draw_figure(example).savefig(HERE / 'motifs/figures' / f'{name}.png')


if __name__ == '__main__':
    main()
