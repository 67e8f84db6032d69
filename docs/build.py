"""Writes docs/fusions.md, docs/motifs/, and tables of other pages, from code and results.

    python -m docs.build

Sizes are tiny, parameters random; nothing is trained. tests/test_docs.py compares the text.
"""

import dataclasses
import functools
import inspect
import json
import pathlib
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import mi
from mi import cells, fusion
from mi.motifs import attention, dynamic_conv, experts, gating, hypernetwork, normalization, pooling
from mi.unify import as_mi, explain

HERE = pathlib.Path(__file__).parent
B, T, M, N, K = 2, 5, 4, 6, 8


@dataclasses.dataclass(frozen=True)
class Example:
    """A module of a page, with inputs."""

    module: nn.Module
    inputs: tuple[Any, ...]


def random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def cell(module: Any) -> Example:
    return Example(module, (module.initial(B), random(0, 1, B, N)))


def pages() -> dict[str, tuple[Any, list[Example]]]:
    """Name → the module of Python that it is about, and its motifs."""
    x, z = random(0, B, N), random(1, B, M)
    sequence, image = random(2, B, T, K), random(3, B, 4, 4, K)
    tokens = random(4, B, T, K)
    return {
        'forms': (
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
        'gating': (
            gating,
            [
                Example(gating.GatedLinearUnit(K), (x, z)),
                Example(gating.GatedFeedForward(K), (x,)),
                Example(gating.Highway(), (x,)),
                Example(gating.SqueezeExcitation(ratio=4), (image,)),
            ],
        ),
        'normalization': (
            normalization,
            [
                Example(normalization.FeatureWiseModulation(), (x, z)),
                Example(normalization.ConditionalLayerNorm(), (x, z)),
                Example(normalization.ConditionalBatchNorm(use_running_average=True), (x, z)),
                Example(normalization.AdaLNZero(nn.tanh), (x, z)),
            ],
        ),
        'hypernetwork': (
            hypernetwork,
            [
                Example(hypernetwork.LinearHypernetwork(K), (x, z)),
                Example(hypernetwork.MLPHypernetwork(K, hidden=(4,)), (x, z)),
            ],
        ),
        'attention': (
            attention,
            [
                Example(attention.Attention(heads=2), (tokens,)),
                Example(attention.GatedCrossAttention(heads=2), (tokens, sequence)),
                Example(attention.LatentCrossAttention(latents=3, features=K, heads=2), (tokens,)),
                Example(attention.ConvolutionalSelfAttention(heads=4, features=K), (image,)),
            ],
        ),
        'dynamic_conv': (
            dynamic_conv,
            [
                Example(dynamic_conv.LightweightConvolution(heads=2, width=3), (sequence,)),
                Example(dynamic_conv.DynamicConvolution(heads=2, width=3), (sequence,)),
                Example(
                    dynamic_conv.ConditionalConvolution(4, kernel_size=(2, 2), experts=3), (image,)
                ),
            ],
        ),
        'pooling': (
            pooling,
            [
                Example(pooling.MLB(K, rank=3), (x, z)),
                Example(pooling.MFB(K, factors=2), (x, z)),
                Example(pooling.MUTAN(K, rank=2, hidden=4), (x, z)),
                Example(pooling.BLOCK(K, rank=2, blocks=2, hidden=4), (x, z)),
                Example(pooling.CompactBilinear(K), (x, z)),
            ],
        ),
        'experts': (
            experts,
            [
                Example(experts.DenseMixture(K), (x, z)),
                Example(experts.RoutedMixture(K, experts=3, hidden=4), (x,)),
            ],
        ),
        'cells': (
            cells,
            [
                cell(cells.LSTM(K)),
                cell(cells.MultiplicativeLSTM(K)),
                cell(cells.MILSTM(K)),
                cell(cells.MogrifierLSTM(K, rounds=2)),
                cell(cells.HyperLSTM(K, hyper_features=3, embedding=2)),
            ],
        ),
    }


def page(name: str) -> str:
    """The text of docs/motifs/<name>.md."""
    about, examples = pages()[name]
    summary, _, rest = inspect.getdoc(about).partition('\n')
    parts = [f'# {name}', summary, rest.strip(), '`python -m docs.build` generates this page.']
    for example in examples:
        title = type(example.module).__name__
        doc = re.sub(r'\n+Attributes:.*', '', inspect.getdoc(type(example.module)), flags=re.S)
        parts += [
            f'## {title}',
            f'```text\n{doc}\n```',
            f'```python\n{textwrap.dedent(inspect.getsource(type(example.module).__call__)).rstrip()}\n```',
            f'```text\n{explain(example.module, variables(example), *example.inputs)}\n```',
            f'![W of {title}](figures/{title}.png)',
        ]
    return '\n\n'.join(part for part in parts if part) + '\n'


def equation(module: mi.MultiplicativeInteraction) -> str:
    """The terms that it has."""
    terms = {'zᵀWx': module.use_W, 'zᵀU': module.use_U, 'Vx': module.use_V, 'b': module.use_b}
    return 'f(x, z) = ' + ' + '.join(term for term, used in terms.items() if used)


def fusions() -> str:
    """The text of docs/fusions.md: a row for every word of FUSIONS."""
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
    for word, constructor in fusion.FUSIONS.items():
        context = {'context': 'one_hot'} if word in fusion.ONE_HOT else {}
        module = fusion.get(word, rank=8, hidden=32)(128, **context)
        shapes = jax.eval_shape(module.init, jax.random.key(0), x, z)
        flops = mi.counting.flops(module.apply, shapes, x, z)
        about: Any = constructor
        if isinstance(constructor, functools.partial):
            about = constructor.keywords.get('module', constructor.func)
        changed = ', '.join(
            f'{key}={value}'
            for key, value in getattr(constructor, 'keywords', {}).items()
            if isinstance(value, str | int | bool)
        )
        summary = inspect.getdoc(about).split('\n\n')[0].replace('\n', ' ').replace('|', r'\|')
        if about is mi.MultiplicativeInteraction:
            summary = equation(module)
        lines.append(
            f'| `{word}` | `{about.__name__}`{f" ({changed})" if changed else ""} | {summary} | '
            f'{", ".join(fusion.get_options(word))} | '
            f'{mi.counting.parameters(shapes.get("params", {})):,} | {flops:,} |'
        )
    return '\n'.join(lines) + '\n'


def evaluation() -> str:
    """The text of docs/evaluation.md, with its tables made from benchmarks/results/."""
    text = (HERE / 'evaluation.md').read_text()
    results = HERE.parent / 'benchmarks/results'
    layers = json.loads((results / 'layers_cpu.json').read_text())
    head = '| regime | pass | ms | share | over einsum | best torch | over it | over Bilinear |'
    lines = [f'{layers["machine"]}, jax {layers["jax"]}, f32.', '', head + ' MiB, einsum, torch |']
    lines.append('|---|---|---:|---:|---:|---|---:|---:|---:|')
    for f in layers['figures']:
        used = [f['mi_mib'], f['einsum_mib'], f['torch_mib']]
        lines.append(
            f'| {f["regime"]} | {f["phase"]} | {f["mi_ms"]:.2f} | {f["share"]:.2f} | '
            f'{f["einsum_over_mi"]:.2f}× | {f["best_torch"]} | {f["best_torch_over_mi"]:.2f}× | '
            f'{_number(f["bilinear_over_mi"], "×", 2)} | '
            f'{", ".join(_number(u) for u in used) if used[0] == used[0] else ""} |'
        )
    orders = json.loads((results / 'orders_cpu.json').read_text())
    rule = ['| B, m, n, k | plan | fastest | plan over fastest |', '|---|---|---|---:|']
    rule += [
        f'| {f["shape"]} | {f["plan"]} | {f["best"]} | {f["ratio"]:.2f} |'
        for f in orders['figures']
    ]
    return filled(text, {'layers_cpu': lines, 'orders_cpu': rule})


def scaling() -> str:
    """The text of docs/scaling.md, with its tables made from those in benchmarks/results."""
    results = HERE.parent / 'benchmarks/results'
    written = [
        json.loads((results / f'{name}.json').read_text()) for name in ('scaling', 'compiled')
    ]
    blocks = {}
    for name, table in {**written[0]['tables'], **written[1]['tables']}.items():
        head, *rows = table['rows']
        words = [all(re.match('[^0-9]', row[i] or 'x') for row in rows) for i in range(len(head))]
        rule = ['---' if word else '---:' for word in words]
        lines = [f'| {" | ".join(row)} |' for row in (head, rule, *rows)]
        blocks[name] = [f'{table["heading"]}:', '', *lines]
    return filled((HERE / 'scaling.md').read_text(), blocks)


def filled(text: str, blocks: dict[str, list[str]]) -> str:
    """The text, with lines between `<!-- name -->` and `<!-- end -->`."""
    for name, lines in blocks.items():
        pattern = f'(?s)(<!-- {name} -->\n).*?(<!-- end -->)'
        made = '\n' + '\n'.join(lines) + '\n\n'
        text = re.sub(pattern, lambda found, made=made: found[1] + made + found[2], text)
    return text


def _number(value: float, unit: str = '', digits: int = 0) -> str:
    return '' if value != value else f'{value:.{digits}f}{unit}'


def variables(example: Example) -> Any:
    """Of the module, moved off the zeros that some start with."""
    start = example.module.init(jax.random.key(5), *example.inputs)
    return jax.tree.map(
        lambda p: p + 0.3 * random(p.size, *p.shape) if p.dtype == jnp.float32 else p, start
    )


def figure(example: Example) -> Any:
    """|W| of every product of a module: a row each, its slices along z side by side."""
    from matplotlib.figure import Figure

    products = as_mi(example.module, variables(example), *example.inputs).products
    most = 8
    columns = min(most, max(len(p.W) for p in products))
    drawn = Figure(
        figsize=(1.1 * columns + 0.4, 1.6 * len(products)), dpi=110, layout='constrained'
    )
    rows = drawn.subfigures(len(products), 1, squeeze=False)[:, 0]
    for row, product in zip(rows, products, strict=True):
        W = np.abs(np.asarray(product.W))
        shown = f', {most} of {len(W)} slices' if len(W) > most else ''
        row.suptitle(f'{product.name}{shown}', fontsize=8)
        for i, axis in enumerate(row.subplots(1, columns, squeeze=False)[0]):
            axis.set_xticks([])
            axis.set_yticks([])
            if i >= min(len(W), most):
                axis.axis('off')
                continue
            axis.imshow(W[i], vmin=0, vmax=W.max() or 1, cmap='Blues', aspect='auto')
            axis.set_title(f'W[{i}]', fontsize=7)
            if not i:
                axis.set_xlabel('y', fontsize=7)
                axis.set_ylabel('x', fontsize=7)
    return drawn


def texts() -> Iterator[tuple[pathlib.Path, Callable[[], str]]]:
    """Every file that is made, and what makes its text."""
    yield HERE / 'fusions.md', fusions
    yield HERE / 'evaluation.md', evaluation
    yield HERE / 'scaling.md', scaling
    for name in pages():
        yield HERE / 'motifs' / f'{name}.md', functools.partial(page, name)


def main() -> None:
    (HERE / 'motifs/figures').mkdir(parents=True, exist_ok=True)
    for path, text in texts():
        path.write_text(text())
    for _, examples in pages().values():
        for example in examples:
            name = type(example.module).__name__
            figure(example).savefig(HERE / 'motifs/figures' / f'{name}.png')


if __name__ == '__main__':
    main()
