"""Command line that inspects a run's MI layers.

python -m mi.inspect --workdir=runs/first [--seed=1] [--out=DIR]

inspect.html           a self-contained page with the table and the figures
LAYER.spectrum         singular values of the unfoldings      .png, .pdf and .svg
LAYER.outputs          eigenvalues of outputs
LAYER.contexts         similarity of contexts
spectrum.csv, singular_values.csv, outputs.csv, contexts.csv, similarity.csv
                       full precision, for all seeds

The files are written to WORKDIR/inspect unless --out gives another directory.
"""

import pathlib
import sys

from absl import app, flags, logging

from mi.config import UserError
from mi.inspect import report
from mi.training import host

WORKDIR = flags.DEFINE_string('workdir', None, 'Run directory of a language model or an agent.')
SEED = flags.DEFINE_integer('seed', None, 'Seed of the figures; the first one by default.')
OUT = flags.DEFINE_string('out', None, 'Output directory; WORKDIR/inspect by default.')


def main(argv: list[str]) -> None:
    host.set_xla_flags()
    if len(argv) > 1:
        sys.exit(f'error: unknown argument {argv[1]!r}; flags are --NAME=VALUE, see --help')
    if not WORKDIR.value:
        sys.exit('error: expected --workdir=DIRECTORY, the directory of a run')
    logging.set_verbosity(logging.WARNING)  # orbax writes a page per checkpoint
    out = pathlib.Path(OUT.value or pathlib.Path(WORKDIR.value) / 'inspect')
    try:
        header, rows, files = report.write(WORKDIR.value, out, SEED.value)
    except UserError as error:
        sys.exit(f'error: {error}')

    # One line for each quantity, because a row of the page's table is wider than a terminal.
    for name, seed, *cells in rows:
        print(f'{name}, seed {seed}; in parentheses: initial')
        for title, cell in zip(header[2:], cells, strict=True):
            print(f'  {title:<18}{cell}')
    for file in files:
        print(file)


if __name__ == '__main__':
    app.run(main)
