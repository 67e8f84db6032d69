"""What a sweep showed: a page, tables and figures from its run directories.

report.html   the page, in one file         table.csv   every digit
curves        learning curves               table.md    for a README
finals        final values                  table.tex   for a paper
pareto        cost against quality          tasks.csv   each task and seed
tasks         each task                     draws.md    ranks in each set of seeds

Figures as .png, .pdf and .svg; those of tasks and of sets of seeds where there are several, pareto
where there are costs. `mi.report.compare` sets two sweeps side by side.
"""

import os
import pathlib

import rich.console

from mi.report import (
    analysis,
    files,
    html,
    latex,
    plots,
    rankings,
    runs,
    tables,
    terminal,
)
from mi.training.progress import Work


def write(
    workdir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None
) -> list[pathlib.Path]:
    """Reports on a sweep or a single run; prints the table and returns the files it wrote.

    Args:
      workdir: a sweep directory or a run directory; runs that have not ended are welcome.
      out: where to write, workdir/report unless given.

    Raises:
      UserError: if workdir is neither, a file in it is malformed, or out cannot be written to.
    """
    with Work(f'reading {workdir}'):
        sweep = runs.read(pathlib.Path(workdir))
    with Work(f'intervals of {len(sweep.arms)} arms'):
        rows = analysis.rows(sweep)
    folder = sweep.path / 'report' if out is None else pathlib.Path(out)
    with files.written_to(folder), Work('drawing the figures'):
        figures, remarks = plots.draw(sweep, rows, folder)
    notes = [*tables.notes(sweep, rows), *remarks, *sweep.warnings]
    with Work('writing the page and the tables'):
        texts = {
            'report.html': html.page(sweep, rows, notes),
            'table.csv': tables.to_csv(sweep, rows),
            'table.md': tables.to_markdown(sweep, rows),
            'table.tex': latex.to_latex(sweep, rows),
        }
    if any(row.tasks for row in rows):
        texts['tasks.csv'] = tables.tasks_to_csv(rows)
    if sets := rankings.to_markdown(sweep):
        texts['draws.md'] = sets
    with files.written_to(folder):
        for name, text in texts.items():
            (folder / name).write_text(text, encoding='utf-8')
    _say(sweep, rows, [*remarks, *sweep.warnings])
    paths = [*(folder / name for name in texts), *figures]
    for path in paths:
        print(path)
    return paths


def _say(sweep: runs.Sweep, rows: list[analysis.Row], remarks: list[str]) -> None:
    console = terminal.console()
    terminal.show(console, tables.cells(sweep, rows), sweep.title, 'report.html and table.csv')
    for note in tables.notes(sweep, rows):
        console.print(note, markup=False, highlight=False)
    warn = rich.console.Console(stderr=True, soft_wrap=True)
    for remark in remarks:
        warn.print(f'warning: {remark}', markup=False, highlight=False)
