"""Command line that runs `mi.find` on the function that a factory returns.

python -m mi.find my_package.model:build [--out=report.html]

The factory takes no arguments and returns (function, params, streams), where `streams` is a dict.
The command prints the report. --out also writes it to a file, as HTML, Markdown or text depending
on the suffix.
"""

import pathlib
import sys

from absl import app, flags

from mi.config import UserError, name_output
from mi.find.analysis import find
from mi.find.report import Report
from mi.registry import import_object

OUT = flags.DEFINE_string('out', None, 'File to write: NAME.html, NAME.md or NAME.txt.')
CONFIRM = flags.DEFINE_bool('confirm', False, 'Execute the function to check the degrees.')


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        sys.exit('error: expected one factory. Try python -m mi.find my_package.model:build')
    try:
        report = analyze(argv[1])
        if CONFIRM.value:
            report = report.confirm()
        print(report)
        if OUT.value:
            with name_output('out', pathlib.Path(OUT.value)):
                report.save(OUT.value)
    except (UserError, ValueError) as error:
        sys.exit(f'error: {error}')


def analyze(reference: str) -> Report:
    """Return the report on the function that a factory returns."""
    built = import_object(reference)()
    is_triple = isinstance(built, tuple) and len(built) == 3 and isinstance(built[2], dict)
    if not is_triple:
        raise UserError(
            f'{reference} returned {type(built).__name__}: expected (function, params, '
            'streams), where streams is a dict. Try return model.apply, variables, '
            f'{{"x": x}}'
        )
    function, params, streams = built
    return find(function, params, **streams)


if __name__ == '__main__':
    app.run(main)
