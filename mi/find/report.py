"""The report of `mi.find` as text, rows, Markdown and HTML."""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mi.find import degree, page
from mi.find.candidates import Candidate
from mi.find.degree import Output

WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Interaction:
    """A product of two values that both depend on data.

    Attributes:
      motif: name of the motif, from `mi.find.motifs`.
      primitive: name of the JAX primitive.
      left, right: the streams that each side depends on, such as ('x', 'z').
      left_shape, right_shape, shape: shapes of the sides and the result.
      path: the names of the enclosing modules, such as 'block_0/attention'.
      source: the source line, such as 'file.py:12'.
      times: number of executions per call, or None if it depends on a while loop.
      flops: FLOPs per call, counting one iteration of a while loop.
      share: share of the function's FLOPs.
    """

    motif: str
    primitive: str
    left: tuple[str, ...]
    right: tuple[str, ...]
    left_shape: tuple[int, ...]
    right_shape: tuple[int, ...]
    shape: tuple[int, ...]
    path: str
    source: str
    times: int | None
    flops: int
    share: float

    @property
    def is_self(self) -> bool:
        """Return whether both sides depend on the same streams."""
        return set(self.left) == set(self.right)

    @property
    def streams(self) -> str:
        """Return the sides as text, such as 'x · x,z'."""
        return f'{",".join(self.left)} · {",".join(self.right)}'


@dataclasses.dataclass(frozen=True)
class Report:
    """The report of `mi.find`.

    Attributes:
      name: name of the function.
      streams: shapes of the arrays in each stream, by name.
      interactions: products of two values that depend on data, in the order of the computation.
      activations: elementwise products of an array with itself, as in SiLU, which are not
        interactions.
      candidates: places where streams are concatenated or added in an affine map.
      outputs: the outputs with their degrees.
      flops: FLOPs of the function.
      notes: operations that could not be analyzed, and streams that no output depends on.
      call: the function and its arguments, for `confirm`.
    """

    name: str
    streams: Mapping[str, tuple[tuple[int, ...], ...]]
    interactions: tuple[Interaction, ...]
    activations: tuple[Interaction, ...]
    candidates: tuple[Candidate, ...]
    outputs: tuple[Output, ...]
    flops: int
    notes: tuple[str, ...]
    call: tuple[Callable[..., Any], Any, Mapping[str, Any]] = dataclasses.field(repr=False)

    def count(self) -> dict[str, int]:
        """Count the interactions of each motif."""
        return dict(Counter(interaction.motif for interaction in self.interactions))

    def confirm(self, seed: int = 0) -> 'Report':
        """Execute the function to check degrees by finite differences, and return a new report.

        Arguments that are given as shapes are replaced with random numbers.
        """
        function, params, streams = self.call
        outputs = degree.confirm_outputs(function, params, streams, list(self.outputs), seed)
        return dataclasses.replace(self, outputs=tuple(outputs))

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict per interaction, for a table."""
        return [dataclasses.asdict(interaction) for interaction in self.interactions]

    def __str__(self) -> str:
        """Return the report as a tree of modules, at most 100 columns wide."""
        lines = [*_wrap(self._summarize()), *([''] if self.interactions else [])]
        last_parts: tuple[str, ...] = ()
        for path, group in group_by_path(self.interactions).items():
            parts = tuple(path.split('/')) if path else ()
            num_common = _count_common(last_parts, parts)
            lines += [
                _clip('  ' * (depth + 1) + part)
                for depth, part in enumerate(parts)
                if depth >= num_common
            ]
            last_parts = parts
            indent = '  ' * (len(parts) + 1)
            lines += [_format_line(indent, interaction, times) for interaction, times in group]
        lines += self._describe_rest()
        return '\n'.join(line.rstrip() for line in lines).rstrip()

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        # The interactions, equal ones in one row.
        lines = [f'# {self.name}', '', self._summarize(), '']
        if self.interactions:
            lines += [
                '| module | motif | streams | shapes | times | FLOPs | share | source |',
                '| --- | --- | --- | --- | ---: | ---: | ---: | --- |',
            ]
            for interaction, times in group_interactions(self.interactions):
                cells = [
                    interaction.path or '—',
                    interaction.motif,
                    interaction.streams,
                    format_shapes(interaction),
                    format_times(times),
                    f'{interaction.flops:,}',
                    format_share(interaction.share),
                    shorten_source(interaction.source),
                ]
                lines.append('| ' + ' | '.join(cell.replace('|', r'\|') for cell in cells) + ' |')

        # The candidates, with what a W would add.
        if self.candidates:
            lines += [
                '',
                '## Candidates',
                '',
                '| module | kind | x [n] | z [m] | k | full | low rank | diagonal | source |',
                '| --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- |',
            ]
            for candidate in self.candidates:
                costs = [f'{candidate.params[form]:,}' for form in candidate.params]
                x, z = f'{candidate.x} [{candidate.n}]', f'{candidate.z} [{candidate.m}]'
                cells = [candidate.path or '—', candidate.kind, x, z, str(candidate.k), *costs,
                         shorten_source(candidate.source)]  # fmt: skip
                lines.append('| ' + ' | '.join(cells) + ' |')
            lines += [
                '',
                'The columns full, low rank and diagonal are parameters that W would add.',
            ]

        # The degrees of the outputs, and what the interpreter could not read.
        lines += ['', '## Outputs', '', *(f'- {line}' for line in self.describe_outputs())]
        lines += [*(['', '## Notes', ''] if self.notes else []), *(f'- {n}' for n in self.notes)]
        return '\n'.join(lines) + '\n'

    def to_html(self) -> str:
        """Return the report as a self-contained HTML page."""
        return page.render_page(self)

    def save(self, path: str | pathlib.Path) -> None:
        """Write the report as HTML or Markdown for a suffix of .html or .md, or else as text."""
        path = pathlib.Path(path)
        writers = {'.html': self.to_html, '.md': self.to_markdown}
        text = writers.get(path.suffix, lambda: f'{self}\n')()
        path.write_text(text, encoding='utf-8')

    def describe_outputs(self) -> list[str]:
        """Return one line per output, with its degrees."""
        lines = []
        for output in self.outputs:
            text = f'output{output.name} {list(output.shape)}: {output.describe()}'
            if output.is_confirmed is not None:
                verdict = 'confirmed' if output.is_confirmed else 'not confirmed'
                text += f' ({verdict} at random points)'
            nonzero_degrees = [degree for degree in output.degrees.values() if degree]
            if nonzero_degrees == [1, 1]:
                text += '; `as_mi` gives W, U, V, b'
            lines.append(text)
        return lines

    def _summarize(self) -> str:
        streams = describe_streams(self.streams)
        counts = ', '.join(f'{number} {motif}' for motif, number in self.count().items())
        number = len(self.interactions)
        noun = 'interaction' if number == 1 else 'interactions'
        share = format_share(sum(interaction.share for interaction in self.interactions))
        text = f'{self.name}: {number} {noun}'
        text += f' ({counts}), {share} of {self.flops:,} FLOPs' if number else ''
        return f'{text}. Streams: {streams}.'

    def _describe_rest(self) -> list[str]:
        """Return the lines below the tree."""
        lines = []
        if self.activations:
            lines += ['', f'  activations: {len(self.activations)} products of an array with '
                      'itself']  # fmt: skip
        if self.candidates:
            lines += ['', '  candidates: streams that meet parameters without a product']
            for candidate in self.candidates:
                lines += _describe_candidate(candidate)
        lines += ['', *(line for text in self.describe_outputs() for line in _wrap(text, '  '))]
        lines += [line for note in self.notes for line in _wrap(f'note: {note}', '  ')]
        return lines


def group_interactions(
    interactions: Sequence[Interaction],
) -> list[tuple[Interaction, int | None]]:
    """Merge interactions that are identical, such as the steps of an unrolled loop.

    Returns:
      One interaction per group, with the total FLOPs and share, and its number of executions.
    """
    groups: dict[Interaction, list[Interaction]] = {}
    for interaction in interactions:
        key = dataclasses.replace(interaction, flops=0, share=0.0)
        groups.setdefault(key, []).append(interaction)
    joined = []
    for group in groups.values():
        flops, share = sum(i.flops for i in group), sum(i.share for i in group)
        times = None if group[0].times is None else group[0].times * len(group)
        joined.append((dataclasses.replace(group[0], flops=flops, share=share), times))
    return joined


def group_by_path(
    interactions: Sequence[Interaction],
) -> dict[str, list[tuple[Interaction, int | None]]]:
    """Return the merged interactions by module path."""
    paths: dict[str, list[tuple[Interaction, int | None]]] = {}
    for interaction, times in group_interactions(interactions):
        paths.setdefault(interaction.path, []).append((interaction, times))
    return paths


def describe_streams(streams: Mapping[str, Sequence[tuple[int, ...]]]) -> str:
    """Describe the arrays of each stream, such as 'x [8, 3], carry [8, 4] and [8, 4]'."""
    return ', '.join(
        f'{name} {" and ".join(str(list(shape)) for shape in shapes)}'
        for name, shapes in streams.items()
    )


def format_shapes(interaction: Interaction) -> str:
    """Format the shapes of both sides."""
    return f'{list(interaction.left_shape)} · {list(interaction.right_shape)}'


def format_times(times: int | None) -> str:
    """Format the number of executions."""
    return 'while' if times is None else f'{times:,}'


def format_share(share: float) -> str:
    """Format a share in percent."""
    return f'{100 * share:.1f} %' if share == 0 or share >= 0.001 else '< 0.1 %'


def shorten_source(source: str) -> str:
    """Return the file name and line, without the directory."""
    return source.rpartition('/')[2]


def _format_line(indent: str, interaction: Interaction, times: int | None) -> str:
    """Format a line of the tree: motif and streams on the left, cost and source on the right."""
    repeats = '' if times == 1 else f' × {format_times(times)}'
    left = f'{indent}{interaction.motif}: {interaction.streams}  {format_shapes(interaction)}'
    right = f'{repeats}  {format_share(interaction.share)}  {shorten_source(interaction.source)}'
    right = right[-60:]
    return _clip(left, WIDTH - len(right)).ljust(WIDTH - len(right)) + right


def _describe_candidate(candidate: Candidate) -> list[str]:
    place = '  '.join(filter(None, [candidate.path, shorten_source(candidate.source)]))
    sizes = f'{candidate.x} [{candidate.n}] and {candidate.z} [{candidate.m}] → {candidate.k}'
    costs = '; '.join(
        f'{form if form != "low rank" else f"rank {candidate.rank}"}: '
        f'{candidate.params[form]:,} parameters, {candidate.flops[form]:,} FLOPs'
        for form in candidate.params
    )
    return [_clip(f'    {candidate.kind} of {sizes}  {place}'), *_wrap(costs, '      ')]


def _count_common(left: Sequence[str], right: Sequence[str]) -> int:
    pairs: Iterable[tuple[str, str]] = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _clip(text: str, width: int = WIDTH) -> str:
    return text if len(text) <= width else f'{text[: width - 1]}…'


def _wrap(text: str, indent: str = '') -> list[str]:
    """Wrap a text to lines of at most 100 columns."""
    lines, line = [], indent
    for word in text.split(' '):
        if len(line) + len(word) + 1 > WIDTH and line.strip():
            lines.append(line)
            line = f'{indent}  '
        line += word if not line.strip() else f' {word}'
    return [_clip(line) for line in [*lines, line]]
