"""The table for a paper, in LaTeX that every engine compiles, for any characters in names."""

import re
import textwrap
import unicodedata

from mi.report import tables
from mi.report.analysis import Row
from mi.report.runs import Sweep
from mi.report.tables import Cell


def to_latex(sweep: Sweep, rows: list[Row], notes: list[str]) -> str:
    """Return a booktabs table, scaled down only if it is wider than the line.

    The second line of a row has the details; the caption has the reasons of states.
    """
    table = tables.make_table(sweep, rows)
    header = ' & '.join(map(_stack, table.header))

    # Write each row on one line, or on two if it has details.
    lines = []
    for i, cells in enumerate(table.body):
        mains = [escape_latex(cell.main) for cell in cells]
        details = [_small(cell.detail) for cell in cells[:-1]]
        if i in table.best:
            mains[1] = rf'\textbf{{{mains[1]}}}'
        lines.append(' & '.join(mains) + r' \\')
        if any(details):
            lines.append(' & '.join([*details, '']) + r' \\')
    body = '\n'.join(lines)

    # The caption holds the title, the notes and the reasons.
    reasons = [
        f'{row.arm.label}: {row.arm.state}, {tables.shorten(row.arm.reason)}'
        for row in rows
        if row.arm.reason
    ]
    sentences = [sweep.title, *notes, *reasons]
    caption = ' '.join(f'{escape_latex(text.rstrip(".…"))}.' for text in sentences)
    origin = f'Made by python -m mi.report --workdir={sweep.path}'
    if sweep.command:
        origin += f' from runs of: {sweep.command}'
    return f"""% {' '.join(origin.split())}
% Needs \\usepackage{{booktabs,graphicx}}.
\\begin{{table}}
\\centering
\\setlength{{\\tabcolsep}}{{4pt}}
\\caption{{{caption}}}
\\medskip
\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{%
\\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}
\\toprule
{header} \\\\
\\midrule
{body}
\\bottomrule
\\end{{tabular}}}}
\\end{{table}}
"""


def _small(detail: str) -> str:
    return rf'\scriptsize {escape_latex(detail)}' if detail else ''


def _stack(cell: Cell) -> str:
    """Break a header into narrow lines, so that the numbers set the width of the column."""
    lines = textwrap.wrap(cell.main, 12, break_long_words=False)
    stacked = r' \\ '.join(map(escape_latex, [*lines, *filter(None, [cell.detail])]))
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
    """Return the text in LaTeX, on one line."""
    parts: list[str] = []
    for character in unicodedata.normalize('NFD', text):
        if character in ACCENTS and parts:
            parts[-1] = rf'\{ACCENTS[character]}{{{parts[-1]}}}'
        elif character == '-' and parts and parts[-1].endswith('-'):
            parts.append('{}-')
        else:
            parts.append(_command(character))
    return ''.join(parts)


def _command(character: str) -> str:
    """Return a character in LaTeX, or its number, [U+4E2D], if there is no command for it."""
    if character.isascii():
        return ASCII.get(character, character if character.isprintable() else ' ')
    if known := SYMBOLS.get(character) or LATIN.get(character):
        return known
    greek = re.fullmatch('GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)', unicodedata.name(character, ''))
    if greek and greek[2] in GREEK:
        name = greek[2].lower().replace('lamda', 'lambda')
        return f'$\\{name if greek[1] == "SMALL" else name.capitalize()}$'
    # Superscripts, subscripts, fractions and ligatures decompose into other characters.
    kind, _, points = unicodedata.decomposition(character).rpartition('>')
    inner = ''.join(escape_latex(chr(int(point, 16))) for point in points.split())
    match kind:
        case '<super':
            return rf'\textsuperscript{{{inner}}}'
        case '<sub':
            return rf'$_{{\mbox{{\scriptsize {inner}}}}}$'
    if inner:
        return inner
    category = unicodedata.category(character)
    if category[0] in 'CZ':
        return ' ' if category != 'Cf' else ''
    return f'{{[}}U+{ord(character):04X}{{]}}'
