"""The table as LaTeX, which every engine compiles whatever characters names contain."""

import re
import textwrap
import unicodedata
from collections.abc import Collection, Sequence

from mi.report import tables
from mi.report.analysis import ArmResult
from mi.report.arms import Sweep
from mi.report.tables import Cell


def to_latex(sweep: Sweep, results: list[ArmResult], notes: list[str]) -> str:
    """Format the results as a booktabs table, scaled down only if it is wider than a line.

    The second line of a row shows details, and the caption explains the states of runs.
    """
    table = tables.make_table(sweep, results)
    body = [[*cells[:-1], Cell(cells[-1].main)] for cells in table.body]

    # The caption holds the title, the notes and the reasons.
    reasons = [
        f'{result.arm.label}: {result.arm.state}, {tables.shorten(result.arm.reason)}'
        for result in results
        if result.arm.reason
    ]
    return format_latex(
        table.header, body, [sweep.title, *notes, *reasons], describe_origin(sweep), table.best
    )


def describe_origin(sweep: Sweep) -> str:
    """Return the commands that reproduce the numbers of a sweep."""
    origin = f'Made by python -m mi.report --workdir={sweep.path}'
    return f'{origin} from runs of: {sweep.command}' if sweep.command else origin


def format_latex(
    header: Sequence[Cell],
    body: Sequence[Sequence[Cell]],
    caption: Sequence[str],
    origin: str,
    best: Collection[int] = (),
) -> str:
    """Format cells as a booktabs table, with all but the first column right-aligned.

    Args:
      header: header cell of each column.
      body: cells of each row, with details on a second line.
      caption: sentences of the caption.
      origin: commands that produced the numbers, for a comment.
      best: indices of the rows whose second cell is bold.
    """
    # Write each row on one line, or on two if it has details.
    table_lines = []
    for row_index, cells in enumerate(body):
        main_texts = [escape_latex(cell.main) for cell in cells]
        details = [_small(cell.detail) for cell in cells]
        if row_index in best:
            main_texts[1] = rf'\textbf{{{main_texts[1]}}}'
        table_lines.append(' & '.join(main_texts) + r' \\')
        if any(details):
            table_lines.append(' & '.join(details) + r' \\')

    # Frame the rows with the caption and the header.
    header_line = ' & '.join(map(_stack, header))
    caption_text = ' '.join(f'{escape_latex(sentence.rstrip(".…"))}.' for sentence in caption)
    table_body = '\n'.join(table_lines)
    return f"""% {' '.join(origin.split())}
% Needs \\usepackage{{booktabs,graphicx}}.
\\begin{{table}}
\\centering
\\setlength{{\\tabcolsep}}{{4pt}}
\\caption{{{caption_text}}}
\\medskip
\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{%
\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}
\\toprule
{header_line} \\\\
\\midrule
{table_body}
\\bottomrule
\\end{{tabular}}}}
\\end{{table}}
"""


def _small(detail: str) -> str:
    return rf'\scriptsize {escape_latex(detail)}' if detail else ''


def _stack(cell: Cell) -> str:
    """Break a header into narrow lines, so that the numbers determine the column width."""
    header_lines = textwrap.wrap(cell.main, 12, break_long_words=False)
    stacked = r' \\ '.join(map(escape_latex, [*header_lines, *filter(None, [cell.detail])]))
    return rf'\shortstack[r]{{{stacked}}}'


# Characters with a meaning in LaTeX; a bracket or star only has one after the end of a line.
ASCII = {
    '\\': r'\textbackslash{}', '{': r'\{', '}': r'\}', '&': r'\&', '%': r'\%', '$': r'\$',
    '#': r'\#', '_': r'\_', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}',
    '<': '$<$', '>': '$>$', '[': '{[}', ']': '{]}', '|': '$|$', '*': '{*}', '`': '{`}',
}  # fmt: skip
SYMBOLS = {
    '−': '$-$', '×': r'$\times$', '·': r'$\cdot$', '÷': r'$\div$', '±': r'$\pm$', '⊙': r'$\odot$',
    '⊗': r'$\otimes$', '∂': r'$\partial$', '√': r'$\surd$', '∞': r'$\infty$', '∈': r'$\in$',
    '∑': r'$\sum$', '∏': r'$\prod$', '≤': r'$\leq$', '≥': r'$\geq$', '≠': r'$\neq$',
    '≈': r'$\approx$', '‖': r'$\Vert$', '⌈': r'$\lceil$', '⌉': r'$\rceil$', '⌊': r'$\lfloor$',
    '⌋': r'$\rfloor$', '↑': r'$\uparrow$', '↓': r'$\downarrow$', '→': r'$\rightarrow$',
    '←': r'$\leftarrow$', '↔': r'$\leftrightarrow$', '—': '---', '–': '--', '…': r'\dots{}',
    '‘': '`', '’': "'", '“': '``', '”': "''", '⁄': '/', '°': r'$^\circ$', 'ß': r'\ss{}',
    'æ': r'\ae{}', 'Æ': r'\AE{}', 'ø': r'\o{}', 'Ø': r'\O{}', 'ł': r'\l{}', 'Ł': r'\L{}',
    'œ': r'\oe{}', 'Œ': r'\OE{}', 'ı': r'\i{}', '•': r'$\bullet$', 'ℓ': r'$\ell$',
    'ο': 'o', 'Ο': 'O', 'ς': r'$\varsigma$',
}  # fmt: skip
# Greek capitals that look like Latin ones; LaTeX has no commands for them.
LATIN = dict(zip('ΑΒΕΖΗΙΚΜΝΡΤΧ', 'ABEZHIKMNPTX', strict=True))
GREEK = {
    *('ALPHA', 'BETA', 'GAMMA', 'DELTA', 'EPSILON', 'ZETA', 'ETA', 'THETA', 'IOTA', 'KAPPA'),
    *('LAMDA', 'MU', 'NU', 'XI', 'PI', 'RHO', 'SIGMA', 'TAU', 'UPSILON', 'PHI', 'CHI', 'PSI'),
    'OMEGA',
}
# Combining marks → commands of the accents.
ACCENTS = {
    '\u0300': '`', '\u0301': "'", '\u0302': '^', '\u0303': '~', '\u0304': '=', '\u0306': 'u',
    '\u0307': '.', '\u0308': '"', '\u030a': 'r', '\u030b': 'H', '\u030c': 'v', '\u0323': 'd',
    '\u0327': 'c', '\u0331': 'b',
}  # fmt: skip


def escape_latex(text: str) -> str:
    """Escape a text for LaTeX, on one line."""
    escaped: list[str] = []
    for character in unicodedata.normalize('NFD', text):
        if character in ACCENTS and escaped:
            escaped[-1] = rf'\{ACCENTS[character]}{{{escaped[-1]}}}'
        elif character == '-' and escaped and escaped[-1].endswith('-'):
            escaped.append('{}-')
        else:
            escaped.append(_command(character))
    return ''.join(escaped)


def _command(character: str) -> str:
    """Return the LaTeX command for a character, or its code point, as in [U+4E2D]."""
    # Characters with a command of their own.
    if character.isascii():
        return ASCII.get(character, character if character.isprintable() else ' ')
    if command := SYMBOLS.get(character) or LATIN.get(character):
        return command
    greek = re.fullmatch('GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)', unicodedata.name(character, ''))
    if greek and greek[2] in GREEK:
        letter_name = greek[2].lower().replace('lamda', 'lambda')
        return f'$\\{letter_name if greek[1] == "SMALL" else letter_name.capitalize()}$'

    # Superscripts, subscripts, fractions and ligatures decompose into other characters.
    tag, _, code_points = unicodedata.decomposition(character).rpartition('>')
    characters = [chr(int(code_point, 16)) for code_point in code_points.split()]
    decomposed = ''.join(map(escape_latex, characters))
    match tag:
        case '<super':
            return rf'\textsuperscript{{{decomposed}}}'
        case '<sub':
            return rf'$_{{\mbox{{\scriptsize {decomposed}}}}}$'
    if decomposed:
        return decomposed

    # Control characters and spaces become a space; everything else its number.
    category = unicodedata.category(character)
    if category[0] in 'CZ':
        return ' ' if category != 'Cf' else ''
    return f'{{[}}U+{ord(character):04X}{{]}}'
