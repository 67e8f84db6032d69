"""The page docs/gallery.md, with reports of `mi.find` on models of other authors.

`python -m docs.build` writes the page. It needs Haiku and Equinox from the extra `test`.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable

from docs.gallery import attention, conditioning, recurrent
from docs.gallery.attention import Built
from mi.find import Report, find
from mi.find.report import (
    describe_streams,
    format_share,
    format_times,
    group_interactions,
)

INTRODUCTION = """\
# Where to find them

Multiplicative interactions in models that others designed, found by [`mi.find`](find.md). The
modules of Flax are the library's own. The other models are in no package that this project installs;
`docs/gallery` has them, written from the equations and the source that each section cites. A section
names the published model whose sizes it has; other sizes are examples. To repeat a section, run its
command in a checkout.
"""  # noqa: E501 - text

COLUMNS = """\
`python -m docs.build` generates this page. The column "times" counts executions per call. FLOPs are
those of all executions of a call, two per multiplication with sum and one per entry of an elementwise
result. Equal rows, such as those of several blocks, are one row.
"""  # noqa: E501 - text


@dataclasses.dataclass(frozen=True)
class Entry:
    """A section of the page.

    Attributes:
      title: heading of the section.
      library: library in which the model is written.
      source: source of the model, in Markdown.
      equations: the products of the model and their operands, one per line.
      build: factory of the model.
    """

    title: str
    library: str
    source: str
    equations: str
    build: Callable[[], Built]

    @property
    def reference(self) -> str:
        """Name of the factory for `python -m mi.find`."""
        return f'{self.build.__module__}:{self.build.__name__}'

    def find(self) -> Report:
        """Return the report of `mi.find` on the model."""
        function, params, streams = self.build()
        return find(function, params, **streams)


ENTRIES = (
    Entry(
        'Multi-head attention',
        'Flax',
        '`flax.linen.MultiHeadDotProductAttention` with 8 heads, as self-attention.',
        """\
q = xW_q, k = xW_k, v = xW_v
a = softmax(q · k / √d)
y = (a · v) W_o""",
        attention.build_flax_attention,
    ),
    Entry(
        'Vision Transformer',
        'Equinox',
        'The example "Vision Transformer" of [Equinox](https://docs.kidger.site/equinox/), without '
        'dropout; [Dosovitskiy et al., ICLR 2021](https://arxiv.org/abs/2010.11929).',
        """\
six times:
  x ← x + Attention(LN(x))
  x ← x + MLP(LN(x))
logits = LN(x_0) W""",
        attention.build_equinox_transformer,
    ),
    Entry(
        'Perceiver',
        'Haiku',
        '[Jaegle et al., ICML 2021](https://arxiv.org/abs/2103.03206), and '
        '[deepmind-research/perceiver](https://github.com/google-deepmind/deepmind-research/tree/'
        'master/perceiver): the first cross-attention and the first self-attention of '
        'the encoder for ImageNet.',
        """\
x ← x + Attention(LN(x), LN(pixels)), x ← x + MLP(LN(x))    x starts as a parameter
x ← x + Attention(LN(x), LN(x)),      x ← x + MLP(LN(x))""",
        attention.build_perceiver,
    ),
    Entry(
        'LSTM',
        'Flax',
        '`flax.linen.OptimizedLSTMCell` in `flax.linen.RNN`.',
        """\
c ← σ(f) ⊙ c + σ(i) ⊙ tanh(g)    f, i, g, o affine in x_t and h
h ← σ(o) ⊙ tanh(c)""",
        recurrent.build_flax_lstm,
    ),
    Entry(
        'Convolutional LSTM',
        'Flax',
        '`flax.linen.ConvLSTMCell` in `flax.linen.RNN`; '
        '[Shi et al., NeurIPS 2015](https://arxiv.org/abs/1506.04214), without peepholes.',
        """\
c ← σ(f) ⊙ c + σ(i) ⊙ tanh(g)    f, i, g, o convolutions of x_t and h
h ← σ(o) ⊙ tanh(c)""",
        recurrent.build_flax_conv_lstm,
    ),
    Entry(
        'IMPALA',
        'Haiku',
        '[Espeholt et al., ICML 2018](https://arxiv.org/abs/1802.01561), and the example '
        '[examples/impala](https://github.com/google-deepmind/dm-haiku/tree/main/examples/impala) '
        'of Haiku: the deep network for Atari with its LSTM, on 20 steps of 32 environments.',
        """\
u = ResNet(frames)
c ← σ(f) ⊙ c + σ(i) ⊙ tanh(g)    f, i, g, o = [u_t, h] W
h ← σ(o) ⊙ tanh(c)               c, h ← 0 where an episode starts
logits = hW_π, value = hW_v""",
        recurrent.build_impala,
    ),
    Entry(
        'RG-LRU',
        'Flax',
        'The recurrent block of Griffin, [De et al., 2024](https://arxiv.org/abs/2402.19427), and '
        '[recurrentgemma](https://github.com/google-deepmind/recurrentgemma), with the width of '
        'RecurrentGemma-2B.',
        """\
x = Conv(uW_x), y = gelu(uW_y)
r, i = σ(xW_r), σ(xW_i)
a = exp(−8 softplus(Λ) ⊙ r)
h ← a ⊙ h + √(1 − a²) ⊙ (i ⊙ x)
output = (h ⊙ y) W_o""",
        recurrent.build_rg_lru,
    ),
    Entry(
        'Mamba',
        'Equinox',
        '[Gu & Dao, 2023](https://arxiv.org/abs/2312.00752), and '
        '[state-spaces/mamba](https://github.com/state-spaces/mamba): the block with the sizes of '
        'Mamba-130M.',
        """\
u = silu(Conv(xW_u)), g = xW_g
Δ = softplus(uW_Δ), B = uW_B, C = uW_C
h ← exp(ΔA) ⊙ h + (Δ ⊙ u) ⊗ B
y = ((hC + D ⊙ u) ⊙ silu(g)) W_o""",
        recurrent.build_mamba,
    ),
    Entry(
        'DiT block',
        'Flax',
        '[Peebles & Xie, ICCV 2023](https://arxiv.org/abs/2212.09748), and '
        '[facebookresearch/DiT](https://github.com/facebookresearch/DiT): adaLN-Zero with the '
        'sizes of DiT-XL/2.',
        """\
β₁, γ₁, α₁, β₂, γ₂, α₂ = silu(c) W
x ← x + α₁ ⊙ Attention(LN(x) ⊙ (1 + γ₁) + β₁)
x ← x + α₂ ⊙ MLP(LN(x) ⊙ (1 + γ₂) + β₂)""",
        conditioning.build_dit_block,
    ),
    Entry(
        'QMIX',
        'plain JAX',
        'A hypernetwork that mixes the values of agents, [Rashid et al., ICML 2018]'
        '(https://arxiv.org/abs/1803.11485), and [pymarl](https://github.com/oxwhirl/pymarl) with '
        'one hypernetwork layer.',
        """\
h = elu(q |W₁(s)| + b₁(s))    W₁, b₁, w₂ affine in s
Q = h · |w₂(s)| + V(s)""",
        conditioning.build_qmix,
    ),
    Entry(
        'Answers about images',
        'plain JAX',
        'MLB, [Kim et al., ICLR 2017](https://arxiv.org/abs/1610.04325), and '
        '[MulLowBiVQA](https://github.com/jnhwkim/MulLowBiVQA), with two attention maps.',
        """\
a = softmax_s((tanh(qU) ⊙ tanh(v_s V)) P)
v̂ = Σ_s a_s v_s
logits = (tanh(qW) ⊙ tanh(v̂X)) Y""",
        conditioning.build_vqa_head,
    ),
)


def find_all() -> dict[str, Report]:
    """Return title → report for all models."""
    return {entry.title: entry.find() for entry in ENTRIES}


def make_page(reports: dict[str, Report]) -> str:
    """Return the text of docs/gallery.md."""
    sections = [_make_section(entry, reports[entry.title]) for entry in ENTRIES]
    return '\n'.join([INTRODUCTION, _make_summary(reports), COLUMNS, *sections])


def _make_summary(reports: dict[str, Report]) -> str:
    lines = ['| model | library | interactions | motifs | share of FLOPs | candidates |']
    lines.append('| --- | --- | ---: | --- | ---: | ---: |')
    for entry in ENTRIES:
        report = reports[entry.title]
        number = len(report.interactions)
        motifs = ', '.join(f'{count} {motif}' for motif, count in report.count().items())
        share = format_share(sum(interaction.share for interaction in report.interactions))
        link = f'[{entry.title}](#{entry.title.lower().replace(" ", "-")})'
        lines.append(
            f'| {link} | {entry.library} | {number} | {motifs} | {share} | '
            f'{len(report.candidates)} |'
        )
    return '\n'.join(lines) + '\n'


def _make_section(entry: Entry, report: Report) -> str:
    """Return the section of a model, with source, equations, interactions and candidates."""
    streams = describe_streams(report.streams)
    lines = [
        f'## {entry.title}',
        '',
        entry.source,
        '',
        '```text',
        entry.equations,
        '```',
        '',
        f'`python -m mi.find {entry.reference}`. Streams: {streams}. FLOPs: {report.flops:,}.',
        '',
        '| module | motif | streams | shapes | times | FLOPs | share |',
        '| --- | --- | --- | --- | ---: | ---: | ---: |',
    ]
    for interaction, times in group_interactions(report.interactions):
        shapes = f'{list(interaction.left_shape)} · {list(interaction.right_shape)}'
        cells = [interaction.path or '—', interaction.motif, interaction.streams, shapes]
        cells += [format_times(times), f'{interaction.flops:,}', format_share(interaction.share)]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join([*lines, *_list_candidates(report), *_list_notes(report), ''])


def _list_candidates(report: Report) -> list[str]:
    """List the places where streams meet without a product, with equal ones in one line."""
    lines: Counter[str] = Counter()
    for candidate in report.candidates:
        place = f' in `{candidate.path}`' if candidate.path else ''
        costs = ', '.join(f'{form} {number:,}' for form, number in candidate.params.items())
        lines[
            f'{candidate.kind} of {candidate.x} [{candidate.n}] and {candidate.z} [{candidate.m}] '
            f'→ {candidate.k}{place}: {costs}'
        ] += 1
    if not lines:
        return []
    items = [f'- {f"{count} × " if count > 1 else ""}{line}' for line, count in lines.items()]
    return ['', 'Candidates, with the parameters that W would add:', '', *items]


def _list_notes(report: Report) -> list[str]:
    return ['', *(f'Note: {note}.' for note in report.notes)] if report.notes else []
