"""Command line that compresses the layers of a run.

python -m mi.compress --workdir=runs/first --out=runs/first_rank8 --form=cp --rank=8
python -m mi.compress --workdir=runs/first --out=runs/first_block4 --form=block --blocks=4
python -m mi.compress --workdir=runs/first --out=runs/first_data8 --rank=8 --calibration=4096

--calibration=N fits the outputs of each layer at N inputs instead of W. The inputs come from the
validation text of a language model, or from the environment of an agent.

--config.KEY=VALUE sets another key of the new run, such as --config.optim.learning_rate=1e-4. Then
`python -m mi.main --mode=eval --workdir=OUT` evaluates the new run, and
`python -m mi.main --workdir=OUT` continues to train it.
"""

import sys
from typing import Any

import rich.console
import rich.table
from absl import app, flags, logging

from mi import overrides
from mi.compress.forms import FORMS
from mi.compress.runs import compress_run
from mi.config import UserError, format_error
from mi.training import host

WORKDIR = flags.DEFINE_string('workdir', None, 'Run directory of a language model or an agent.')
OUT = flags.DEFINE_string('out', None, 'Run directory to write, new or empty.')
FORM = flags.DEFINE_enum('form', 'cp', list(FORMS), 'Form of the compressed layers.')
RANK = flags.DEFINE_integer('rank', None, 'Rank of the forms cp and tucker.')
CALIBRATION = flags.DEFINE_integer(
    'calibration', 0, "Number of inputs, from the run's data, at which outputs are fitted."
)
BLOCKS = flags.DEFINE_integer('blocks', None, 'Number of blocks for --form=block.')


def main(argv: list[str], changes: list[overrides.Override]) -> None:
    """Compress the run given by the flags.

    Raises:
      UserError: if the flags or the run are invalid.
    """
    host.set_xla_flags()
    if len(argv) > 1:
        raise UserError(f'unexpected argument {argv[1]!r}; flags are --NAME=VALUE')
    if not WORKDIR.value or not OUT.value:
        raise UserError('--workdir=DIRECTORY and --out=DIRECTORY are both required')
    form: Any = FORM.value  # absl knows only that it is text
    size_name, size = ('blocks', BLOCKS.value) if form == 'block' else ('rank', RANK.value)
    if size is None or size < 1:
        raise UserError(f'--{size_name}={size}: expected at least 1 for --form={form}')
    unused = RANK if form == 'block' else BLOCKS
    if unused.value is not None:
        raise UserError(
            f'--{unused.name}={unused.value}: only applies to '
            f'--form={"cp and --form=tucker" if form == "block" else "block"}; remove it'
        )
    if CALIBRATION.value < 0:
        raise UserError(f'--calibration={CALIBRATION.value}: expected at least 0')
    logging.set_verbosity(logging.WARNING)  # orbax writes a page per checkpoint
    results = compress_run(WORKDIR.value, OUT.value, form, size, changes, CALIBRATION.value)
    measure = 'error of outputs' if CALIBRATION.value else 'error of W'
    table = rich.table.Table('layer', 'seed', measure, title=f'{OUT.value}: {form} {size}')
    for result in results:
        table.add_row(result.site, str(result.seed), f'{result.error:.4f}')
    rich.console.Console().print(table)


def run() -> None:
    """Parse the command line and run. On a user error, print one line and exit with code 1."""
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
    run()
