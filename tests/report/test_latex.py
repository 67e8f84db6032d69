"""LaTeX: what every character of a name becomes, and that the tables compile."""

import shutil
import subprocess

import pytest

from mi.report import analysis, latex, notes, runs
from tests.conftest import ROOT
from tests.report import synthetic

TABLES = sorted((ROOT / 'docs/results').glob('*/*.tex'))
ENGINE = shutil.which('pdflatex')
needs_engine = pytest.mark.skipif(ENGINE is None, reason='no pdflatex is installed')
# One of each kind: accents, Greek, subscripts, fractions, symbols, control characters, no Latin.
WORDS = '\x0c\x7f é x̄ ȳ αΩΑ xᵖ x² x₁ ½ ﬁ − → ⊙ √ ‖ ≤ 中 😀 ж --a|b *[c] `d` \\{}&%$#_~^<>'


def compiled(tables, folder):
    """The log of a document with these tables, each on a page."""
    head = '\\documentclass{article}\n\\usepackage{booktabs,graphicx}\n\\begin{document}\n'
    text = head + '\n\\clearpage\n'.join(tables) + '\n\\end{document}\n'
    (folder / 'all.tex').write_text(text, encoding='utf-8')
    command = [ENGINE, '-interaction=nonstopmode', '-halt-on-error', 'all.tex']
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=120)
    log = done.stdout.decode(errors='replace')
    assert done.returncode == 0, log[-1000:]
    return log


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('5 % & 2_000', r'5 \% \& 2\_000'),
        ('Vx of the xᵖ', r'Vx of the x\textsuperscript{p}'),
        ('x₁ ½ ﬁt', r'x$_{\mbox{\scriptsize 1}}$ 1/2 fit'),
        ('α = Ω·Α', r'$\alpha$ = $\Omega$$\cdot$A'),
        ('é x̄ ȳ', r'\'{e} \={x} \={y}'),
        ('--workdir---', r'-{}-workdir-{}-{}-'),
        ('[1, 2] *a|b*', r'{[}1, 2{]} {*}a$|$b{*}'),
        ('a\nb\x0cc\x7f\u200b', 'a b c '),
        ('中', '{[}U+4E2D{]}'),
    ],
)
def test_what_characters_become(text, expected):
    assert latex.escape_latex(text) == expected


def test_every_character_becomes_ascii():
    every = ''.join(map(chr, [*range(0x3000), 0x1D4B3, 0x1F600]))
    assert all(latex.escape_latex(character).isascii() for character in every)


@pytest.mark.parametrize('path', TABLES, ids=lambda path: path.parent.name)
def test_the_tables_of_the_documentation_are_ascii(path):
    """But for the first line, which is a comment."""
    assert path.read_text().partition('\n')[2].isascii()


@needs_engine
@pytest.mark.slow
def test_the_tables_of_the_documentation_compile(tmp_path):
    files = '\n'.join(path.read_text() for path in TABLES)
    *tables, rest = files.split('\\end{table}\n')
    assert not rest
    log = compiled([f'{table}\\end{{table}}\n' for table in tables], tmp_path)
    assert f'({len(tables)} pages' in log


@needs_engine
@pytest.mark.slow
def test_a_table_of_any_names_compiles(tmp_path):
    """They start cells after the end of a line, and are in headers, reasons, notes and caption."""
    members = []
    for label in (f'*{WORDS}', f'[{WORDS}'):
        run = tmp_path / f'{len(members)}'
        synthetic.make_run(run, label, synthetic.MI, state='failed', reason=WORDS)
        members.append({'name': run.name, 'label': label})
        records = [
            {'step': 20, 'seed': s, 'split': 'test', 'bits_per_byte': s, WORDS: 1.0}
            for s in (0, 1, 2)
        ]
        synthetic.write_lines(run / 'metrics.jsonl', records)
    changes = {'title': f'*{WORDS}', 'notes': [f'*{WORDS}'], 'command': f'a {WORDS}'}
    synthetic.write_sweep(tmp_path, members, baseline=members[0]['label'], **changes)
    sweep = runs.read_sweep(tmp_path)
    results = analysis.compute_results(sweep)
    text = latex.to_latex(sweep, results, notes.make_notes(sweep, results))
    assert text.partition('\n')[2].isascii()
    compiled([text], tmp_path)


@needs_engine
@pytest.mark.slow
def test_every_character_compiles(tmp_path):
    every = [
        latex.escape_latex(''.join(map(chr, range(i, i + 64)))) for i in range(0x20, 0x2600, 64)
    ]
    compiled(['\n\n'.join(every)], tmp_path)
