"""Command line of the compression experiment. See experiments.compression.run.

python -m experiments.compression --workdir=RUN --out=DIRECTORY [--ranks=1,2,4] [--form=cp]
    [--steps=300] [--calibration=4096] [--config.KEY=VALUE …]
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging

from experiments.compression.run import Settings, find_metric, run, write_report
from mi import overrides
from mi.config import UserError, format_error
from mi.training import host

WORKDIR = flags.DEFINE_string('workdir', None, 'Run directory of the full MI.')
OUT = flags.DEFINE_string('out', None, 'Directory of the runs of this experiment.')
RANKS = flags.DEFINE_list('ranks', ['1', '2', '4', '8', '16', '32'], 'Ranks, or numbers of blocks.')
FORM = flags.DEFINE_enum('form', 'cp', ['cp', 'tucker', 'block'], 'Form of the compression.')
STEPS = flags.DEFINE_integer('steps', 300, 'Steps of the fine-tuning.')
CALIBRATION = flags.DEFINE_integer('calibration', 0, 'Number of inputs to fit outputs at.')


def main(argv: Sequence[str], changes: Sequence[overrides.Override]) -> None:
    """Run the experiment that the flags describe.

    Raises:
      UserError: if the flags or the run are invalid.
    """
    host.set_xla_flags()
    if len(argv) > 1:
        raise UserError(f'unexpected argument {argv[1]!r}: expected flags of the form --NAME=VALUE')
    if not WORKDIR.value or not OUT.value:
        raise UserError('--workdir=DIRECTORY and --out=DIRECTORY are both required')
    if not all(rank.isdigit() and int(rank) for rank in RANKS.value):
        raise UserError(f'--ranks={",".join(RANKS.value)}: expected integers of at least 1')
    logging.set_verbosity(logging.WARNING)  # orbax writes a page per checkpoint
    form: Any = FORM.value  # absl knows only that it is text
    settings = Settings(
        pathlib.Path(WORKDIR.value), pathlib.Path(OUT.value), form, STEPS.value,
        CALIBRATION.value, tuple(changes),
    )  # fmt: skip
    metric = find_metric(settings.workdir)
    values = run(settings, [int(rank) for rank in RANKS.value])
    report_path = write_report(settings, values, metric)
    print((report_path / 'compression.md').read_text() + f'{metric[1]} in the split {metric[0]}')


def start() -> None:
    """Parse the command line and run. A UserError is printed on one line, with exit code 1."""
    changes: list[overrides.Override] = []

    def parse(argv: list[str]) -> list[str]:
        other_arguments, changes[:] = overrides.split(argv)
        try:
            return flags.FLAGS(other_arguments)
        except flags.Error as error:
            raise UserError(format_error(error)) from error

    try:
        app.run(lambda argv: main(argv, changes), flags_parser=parse)
    except UserError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    start()
