"""The table for a paper, in LaTeX that every engine compiles, whatever characters names have."""

import re
import textwrap
import unicodedata

from mi.report import tables
from mi.report.analysis import Row
from mi.report.runs import Sweep
from mi.report.tables import Cell


def to_latex(sweep: Sweep, rows: list[Row]) -> str:
    """A booktabs table, made smaller only if it is wider than the line; details on a second line.

    Reasons stand in the caption, where there is room for them.
    """
    _, header, body, best = tables.cells(sweep, rows)
    head = ' & '.join(map(_stack, header))
    lines = []
    for i, line in enumerate(body):
        mains = [escaped(cell.main) for cell in line]
        details = [rf'\scriptsize {escaped(cell.detail)}' * bool(cell.detail) for cell in line[:-1]]
        if i in best:
            mains[1] = rf'\textbf{{{mains[1]}}}'
        lines.append(' & '.join(mains) + r' \\')
        if any(details):
            lines.append(' & '.join([*details, '']) + r' \\')
    inner = '\n'.join(lines)
    ends = [
        f'{row.arm.label}: {row.arm.state}, {tables.one_line(row.arm.reason)}'
        for row in rows
        if row.arm.reason
    ]
    said = [sweep.title, *tables.notes(sweep, rows), *ends]
    caption = ' '.join(f'{escaped(text.rstrip(".…"))}.' for text in said)
    made = f'Made by python -m mi.report --workdir={sweep.path}'
    made += f' from runs of: {sweep.command}' if sweep.command else ''
    return f"""% {' '.join(made.split())}
% Needs \\usepackage{{booktabs,graphicx}}.
\\begin{{table}}
\\centering
\\setlength{{\\tabcolsep}}{{4pt}}
\\caption{{{caption}}}
\\medskip
\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{%
\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}
\\toprule
{head} \\\\
\\midrule
{inner}
\\bottomrule
\\end{{tabular}}}}
\\end{{table}}
"""


def _stack(cell: Cell) -> str:
    """A head of narrow lines, so that the numbers set the width of the column."""
    lines = textwrap.wrap(cell.main, 12, break_long_words=False)
    stacked = r' \\ '.join(map(escaped, [*lines, *filter(None, [cell.detail])]))
    return rf'\shortstack[r]{{{stacked}}}'


# What LaTeX takes for something else: a bracket or a star after a line's end, or two hyphens.
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
# Greek capitals that look like Latin ones, which LaTeX has no commands for.
LATIN = dict(zip('ΑΒΕΖΗΙΚΜΝΡΤΧ', 'ABEZHIKMNPTX', strict=True))
GREEK = {
    *('ALPHA', 'BETA', 'GAMMA', 'DELTA', 'EPSILON', 'ZETA', 'ETA', 'THETA', 'IOTA', 'KAPPA'),
    *('LAMDA', 'MU', 'NU', 'XI', 'PI', 'RHO', 'SIGMA', 'TAU', 'UPSILON', 'PHI', 'CHI', 'PSI'),
    'OMEGA',
}
# Combining marks, and the commands of these accents.
ACCENTS = {
    '\u0300': '`', '\u0301': "'", '\u0302': '^', '\u0303': '~', '\u0304': '=', '\u0306': 'u',
    '\u0307': '.', '\u0308': '"', '\u030a': 'r', '\u030b': 'H', '\u030c': 'v', '\u0323': 'd',
    '\u0327': 'c', '\u0331': 'b',
}  # fmt: skip


def escaped(text: str) -> str:
    """A text in LaTeX, on one line."""
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
    """A character in LaTeX; its number in brackets, [U+4E2D], where there is no command for it."""
    if character.isascii():
        return ASCII.get(character, character if character.isprintable() else ' ')
    if known := SYMBOLS.get(character) or LATIN.get(character):
        return known
    greek = re.fullmatch('GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)', unicodedata.name(character, ''))
    if greek and greek[2] in GREEK:
        name = greek[2].lower().replace('lamda', 'lambda')
        return f'$\\{name if greek[1] == "SMALL" else name.capitalize()}$'
    kind, _, points = unicodedata.decomposition(character).rpartition('>')
    inner = ''.join(escaped(chr(int(point, 16))) for point in points.split())
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
