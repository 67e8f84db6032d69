"""The report of an inspection, with a page, figures and tables."""

import os
import pathlib

from mi.config import UserError
from mi.inspect import figures, files, layers, page, trained
from mi.report.files import output_folder


def write(
    workdir: str | os.PathLike[str], out: pathlib.Path, seed: int | None = None
) -> tuple[list[str], list[list[str]], list[pathlib.Path]]:
    """Write the page, figures and tables of a run.

    Args:
      workdir: run directory of a language model or an agent.
      out: output directory.
      seed: seed of the figures. Defaults to the first one.

    Returns:
      The header and the rows of the table, and the files that were written.

    Raises:
      UserError: if the run has no MI layer, no complete checkpoint or no such seed, or the
        directory cannot be written to.
    """
    run = trained.load(workdir)
    seed = run.config.seeds[0] if seed is None else seed
    if seed not in run.config.seeds:
        raise UserError(f'--seed={seed}: expected one of {", ".join(map(str, run.config.seeds))}')
    analyzed = layers.analyze(run)
    drawn = [layer for layer in analyzed if layer.seed == seed]
    with output_folder(out):
        figure_files = figures.draw_figures(drawn, out)
        svg_files = {
            name: [file for file in layer_files if file.suffix == '.svg']
            for name, layer_files in figure_files.items()
        }
        title = pathlib.Path(workdir).absolute().name
        documents = {'inspect.html': page.render_page(run, title, [*drawn, *(
            layer for layer in analyzed if layer.seed != seed)], svg_files)}  # fmt: skip
        documents |= files.make_tables(analyzed)
        for file_name, text in documents.items():
            (out / file_name).write_text(text, encoding='utf-8')
    images = [file for layer_files in figure_files.values() for file in layer_files]
    return *page.make_rows(analyzed), [*(out / name for name in documents), *images]
