"""python -m mi.report --workdir=runs/quickstart [--out=DIR]: see mi.report.write."""

import sys

from absl import app, flags

from mi import report
from mi.config import UserError

WORKDIR = flags.DEFINE_string('workdir', None, 'Sweep or run directory.', required=True)
OUT = flags.DEFINE_string('out', None, 'Where to write; WORKDIR/report unless given.')


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f'unknown argument {argv[1]!r}; known: --workdir, --out')
    try:
        report.write(WORKDIR.value, OUT.value)
    except UserError as error:
        sys.exit(str(error))


if __name__ == '__main__':
    app.run(main)
