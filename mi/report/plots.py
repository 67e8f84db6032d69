"""Building blocks of figures for papers with a text width of 5.5 inches.

Matplotlib is used without pyplot, so that it leaves no global state in a process that trains. The
same input always produces the same bytes.
"""

import colorsys
import itertools
import logging
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, Locator, MaxNLocator

from mi.report import tables

INK = '#1b1b1f'
GREY = '#808080'  # the baseline
# Okabe & Ito's palette for color-blind readers, without black and yellow: visible on white and on
# black.
PALETTE = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
GOLDEN = 0.618034  # multiples of it, modulo 1, are spread evenly for any number of them
Dashes = str | tuple[float, tuple[float, ...]]  # a line style of matplotlib
DASHES: tuple[Dashes, ...] = (
    '-',
    (0, (4, 1.5)),
    (0, (1, 1)),
    (0, (4, 1, 1, 1)),
)  # one per round of the palette
MARKERS = ('o', 's', '^', 'D')  # one per round of the palette
WIDTH = 5.5
LONGEST = 34  # characters of a label
STYLE: dict[Any, Any] = {
    'pdf.fonttype': 42,
    'svg.hashsalt': 'mi.report',
    'svg.fonttype': 'path',
    'text.parse_math': False,  # a label may hold dollars
    'font.size': 8,
    'axes.labelsize': 8,
    'axes.titlesize': 8,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.linewidth': 0.6,
    'legend.fontsize': 7,
    'xtick.labelsize': 7,
    'ytick.labelsize': 7,
    'figure.constrained_layout.w_pad': 0.06,
    **{f'{name}tick.major.width': 0.6 for name in 'xy'},
    **{f'{name}tick.color': INK for name in 'xy'},
    **{name: INK for name in ('text.color', 'axes.labelcolor', 'axes.edgecolor')},
}
METADATA: dict[str, dict[str, None]] = {
    'png': {'Software': None},
    'pdf': {'Creator': None, 'Producer': None, 'CreationDate': None},
    'svg': {'Creator': None, 'Date': None, 'Format': None, 'Type': None},
}

# fontTools reports every glyph of a PDF at INFO, which absl prints.
logging.getLogger('fontTools').setLevel(logging.WARNING)


def save(figure: Figure, out: pathlib.Path, figure_name: str) -> list[pathlib.Path]:
    """Save a figure as .png, .pdf and .svg, and return the paths of the files.

    Call this function inside the context STYLE. The same figure always produces the same bytes.
    """
    paths = [out / f'{figure_name}.{extension}' for extension in METADATA]
    figure.draw_without_rendering()
    # Keep the layout of the first draw instead of repeating it for every file.
    figure.set_layout_engine('none')
    for path in paths:
        figure.savefig(path, dpi=200, metadata=METADATA[path.suffix[1:]])
    return paths


class Style(NamedTuple):
    """The style of an arm's lines and points."""

    color: str
    dashes: Dashes
    marker: str


def make_style(arm_index: int) -> Style:
    """Return the style of an arm by its index. No two arms have the same color.

    The first arms use the palette. Later rounds use shades of the palette, which are harder to
    distinguish, so that each round also has its own dashes and markers.
    """
    palette_round, color_index = divmod(arm_index, len(PALETTE))
    color = PALETTE[color_index]
    if palette_round:
        red, green, blue = (int(color[offset : offset + 2], 16) / 255 for offset in (1, 3, 5))
        hue, _, saturation = colorsys.rgb_to_hls(red, green, blue)
        # Visible on white and on black.
        lightness = 0.32 + 0.36 * ((palette_round * GOLDEN + 0.45) % 1)
        hue += 0.06 * (palette_round // 8 * GOLDEN % 1)
        channels = colorsys.hls_to_rgb(hue, lightness, max(0.4, saturation * 0.8))
        color = '#' + ''.join(f'{round(255 * channel):02X}' for channel in channels)
    return Style(color, DASHES[palette_round % len(DASHES)], MARKERS[palette_round % len(MARKERS)])


def format_ticks(values: Sequence[float]) -> list[str]:
    """Format numbers with a common unit prefix and enough digits to differ: 429.5k, 430.0k."""
    # Choose the largest prefix that the smallest number allows.
    magnitudes = [abs(value) for value in values if value]
    if not magnitudes:
        return ['0' for _ in values]
    smallest = min(magnitudes)
    exponent = next(power for power in tables.PREFIX if smallest >= 10**power or not power)
    scaled = [value / 10**exponent for value in values]

    # Choose the fewest decimals whose error is small beside the smallest gap.
    neighbors = itertools.pairwise(sorted(set(scaled)))
    gap = min((abs(larger - smaller) for smaller, larger in neighbors), default=0.0)
    tolerance = 1e-3 * gap or 0.005 * max(map(abs, scaled))
    decimals = next(
        (n for n in range(15) if all(abs(x - round(x, n)) <= tolerance for x in scaled)), 15
    )
    prefix = tables.PREFIX[exponent].strip()
    return [f'{x:.{decimals}f}{prefix}'.replace('-', '−') if x else '0' for x in scaled]


class Decades(Locator):
    """Locator of a few ticks on a logarithmic axis, for any number of decades."""

    def __call__(self) -> Any:
        assert self.axis is not None
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> Any:
        lower_limit, upper_limit = sorted((vmin, vmax))
        first_power = math.floor(math.log10(lower_limit))
        powers = np.arange(first_power, math.ceil(math.log10(upper_limit)) + 1.0)
        for digits in ((1,), (1, 3), (1, 2, 5)):
            stride = -(-len(powers) // 5) if digits == (1,) else 1
            ticks = np.outer(10 ** powers[::stride], digits).ravel()
            ticks = ticks[(lower_limit <= ticks) & (ticks <= upper_limit)]
            if len(ticks) > 2:
                return ticks
        return MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(lower_limit, upper_limit)


class Ticks(Formatter):
    """Formatter of distinct tick labels, which uses `format_ticks`."""

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        return format_ticks(values)

    def __call__(self, x: float, pos: int | None = None) -> str:
        return format_ticks([x])[0]


def set_round_ticks(axes: Axes, num_ticks: int, integer: bool) -> None:
    """Set about `num_ticks` round ticks of the x axis, at integers only if `integer` is True."""
    locator = MaxNLocator(num_ticks, steps=[1, 2, 2.5, 5, 10], integer=integer)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(Ticks())


def shorten_labels(texts: Iterable[str]) -> dict[str, str]:
    """Return {text: label} with distinct one-line labels that are short enough for a legend.

    A long text keeps both ends, which usually distinguish arms. If they do not, the label starts
    after the common beginning of the texts.
    """
    texts = list(dict.fromkeys(texts))
    labels = {text: _shorten(' '.join(text.split())) for text in texts}

    # Drop the common beginning of texts with equal labels.
    for label in set(labels.values()):
        alike = [text for text in texts if labels[text] == label]
        if len(alike) > 1:
            columns = zip(*alike, strict=False)
            common = itertools.takewhile(lambda letters: len(set(letters)) == 1, columns)
            start = max(0, len(list(common)) - 8)
            labels |= {text: _shorten(f'…{" ".join(text[start:].split())}') for text in alike}

    # Number the labels that are still equal.
    for text in texts:
        duplicates = [duplicate for duplicate in texts if labels[duplicate] == labels[text]]
        if len(duplicates) > 1:
            labels |= {
                duplicate: f'{labels[duplicate][:30]} ({copy_number})'
                for copy_number, duplicate in enumerate(duplicates, start=1)
            }
    return labels


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST else f'{text[:14]}…{text[-19:]}'
