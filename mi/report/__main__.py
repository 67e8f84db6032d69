"""python -m mi.report --workdir=runs/quickstart [--out=DIR]: see mi.report.write."""

import sys

from absl import app, flags

from mi import report
from mi.config import UserError

WORKDIR = flags.DEFINE_string('workdir', None, 'Sweep or run directory.')
OUT = flags.DEFINE_string('out', None, 'Where to write; WORKDIR/report unless given.')


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f'error: unknown argument {argv[1]!r}; known: --workdir, --out')
    if WORKDIR.value is None:
        sys.exit('error: --workdir=DIRECTORY is needed, of a sweep or a run')
    try:
        report.write(WORKDIR.value, OUT.value)
    except UserError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    app.run(main)
