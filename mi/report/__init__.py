"""Reports on sweeps: a web page, tables and figures from the run directories.

report.html   the page, in one file         table.csv         every digit
curves        learning curves               table.md          for a README
finals        final values                  table.tex         for a paper
pareto        cost against quality          tasks.csv         each task and seed
tasks         each task                     draws.md          ranks in each set of seeds
                                            conclusions.txt   a sentence per comparison

Figures are written as .png, .pdf and .svg. Files of tasks and of seed sets are only written for
several tasks or seed sets, pareto for known costs, and conclusions for a sweep with a baseline. The
terminal shows the conclusions and five columns of the table. `mi.report.compare` compares two
sweeps.
"""

import os
import pathlib

import rich.console

from mi.report import (
    analysis,
    conclusions,
    csv,
    figures,
    files,
    html,
    latex,
    notes,
    rankings,
    runs,
    tables,
    terminal,
)
from mi.training.progress import Work


def write(
    workdir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None
) -> list[pathlib.Path]:
    """Write the report on a sweep or a single run, and print a summary.

    Args:
      workdir: sweep directory or run directory, whose runs may still be in progress.
      out: output directory. Defaults to WORKDIR/report.

    Returns:
      The paths of the written files.

    Raises:
      UserError: if `workdir` is neither a sweep nor a run, if one of its files is malformed, or if
        `out` is not writable.
    """
    # Read the runs and compute their intervals.
    with Work(f'reading {workdir}'):
        sweep = runs.read_sweep(pathlib.Path(workdir))
    with Work(f'intervals of {len(sweep.arms)} arms'):
        results = analysis.compute_results(sweep)
        curves = figures.make_curves(sweep)
    table_notes = notes.make_notes(sweep, results)

    # Draw the figures and format the texts.
    folder = sweep.path / 'report' if out is None else pathlib.Path(out)
    with files.output_folder(folder), Work('drawing the figures'):
        figure_files, remarks = figures.draw_figures(sweep, results, curves, folder)
    warnings = [*remarks, *sweep.warnings]
    with Work('writing the page and the tables'):
        documents = {
            'report.html': html.render_page(sweep, results, curves, [*table_notes, *warnings]),
            'table.csv': csv.to_csv(sweep, results),
            'table.md': tables.to_markdown(sweep, results, table_notes),
            'table.tex': latex.to_latex(sweep, results, table_notes),
        }
    if tables.has_tasks(results):
        documents['tasks.csv'] = csv.tasks_to_csv(results)
    if ranking_text := rankings.to_markdown(sweep):
        documents['draws.md'] = ranking_text
    sentences = conclusions.write_conclusions(sweep, results)
    if sentences:
        documents['conclusions.txt'] = '\n  '.join([sweep.title, *sentences]) + '\n'
    with files.output_folder(folder):
        for file_name, contents in documents.items():
            (folder / file_name).write_text(contents, encoding='utf-8')

    # Print the table, the conclusions, what is missing, and where the rest is.
    console = terminal.make_console()
    terminal.print_table(console, tables.make_table(sweep, results), sweep.title)
    for line in (*sentences, *(remark for result in results for remark in result.remarks)):
        console.print(line, markup=False, highlight=False)
    error_console = rich.console.Console(stderr=True, soft_wrap=True)
    for warning in warnings:
        error_console.print(f'warning: {warning}', markup=False, highlight=False)
    print(f'Everything else: {folder / "report.html"}')
    return [*(folder / file_name for file_name in documents), *figure_files]
