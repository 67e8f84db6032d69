"""The one entry point: python -m mi.main --config=configs/lm.py --workdir=runs/first

To evaluate or sample, --config may be left out: the run directory has what the run was made with.

Exit codes: 0 done; 1 something to mend, one line on stderr says what; 143 stopped by a signal,
after saving: the same command continues the run.
"""

import functools
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from mi import overrides
from mi.config import UserError, format_error
from mi.fit import search
from mi.fit import train as fit
from mi.lm import assess as assess_lm
from mi.lm import sample
from mi.lm import train as lm
from mi.rl import assess as assess_rl
from mi.rl import train as rl
from mi.training import sharding
from mi.training.host import keep_freed_memory, set_xla_flags
from mi.training.io import storage_failure
from mi.training.run_config import read_config
from mi.training.run_dir import parse_steps

TASKS = {
    'train': {'lm': lm.train, 'rl': rl.train, 'fit': fit.train, 'search': search.search},
    'eval': {'lm': assess_lm.assess, 'rl': assess_rl.assess},
    'sample': {'lm': sample.sample},
}


def define_flags() -> None:
    """Define the flags of the program; not at import, so that a launcher's stay apart."""
    flags.DEFINE_string(
        'config', None, 'Config file, FILE.py or FILE.py:ARGUMENT; --config.KEY=VALUE sets a key.'
    )
    flags.DEFINE_string('workdir', None, 'Run directory, made or continued.')
    flags.DEFINE_enum(
        'mode',
        'train',
        ['train', 'eval', 'sample'],
        'eval: the scores, and videos, of what a run has learned. sample: text that it writes.',
    )
    flags.DEFINE_string(
        'profile', '', 'FIRST:LAST, the training steps of a trace, written to WORKDIR/profile.'
    )
    flags.DEFINE_string(
        'distributed', '', "One of several processes: 'auto', or 'HOST:PORT,COUNT,INDEX'."
    )


def main(argv: Sequence[str], changes: Sequence[overrides.Override] = ()) -> None:
    """Run what the flags name; `changes` are those of the config."""
    values = flags.FLAGS
    if not values['verbosity'].present:
        logging.set_verbosity(logging.WARNING)  # orbax writes a page per checkpoint
    if len(argv) > 1:
        raise UserError(f'unexpected argument {argv[1]!r}; flags are --NAME=VALUE')
    mode = values.mode
    if mode == 'train' and not (values.config and values.workdir):
        raise UserError('--config=FILE and --workdir=DIRECTORY are both needed')
    if not values.workdir:
        raise UserError(f'--mode={mode} needs --workdir=DIRECTORY, that of the run')
    if values.config:
        config = overrides.load(values.config, changes)
    else:
        config = read_config(values.workdir)
        overrides.apply(config, changes)
    task, tasks = config.get('task'), TASKS[mode]
    if task not in tasks:
        raise UserError(f'config.task = {task!r}: --mode={mode} expects one of {", ".join(tasks)}')
    profile = {'profile': parse_steps(values.profile)} if values.profile else {}
    if profile and (mode != 'train' or task == 'search'):
        raise UserError(
            f'--profile={values.profile} only applies to training of the tasks lm, rl and fit; '
            f'remove it'
        )
    keep_freed_memory()
    set_xla_flags()
    sharding.initialize(values.distributed)
    try:
        tasks[task](config, values.workdir, **profile)
    except UserError as error:
        if values.config or not str(error).startswith('config.'):
            raise
        raise UserError(
            f'{error}; the config is that of the run, and --config=FILE adds what FILE registers '
            f'and newer keys'
        ) from error


def run() -> None:
    """Parse the command line and run; what the user can mend ends with one line and exit code 1."""
    define_flags()
    changes: list[overrides.Override] = []

    def parse(argv: Sequence[str]) -> list[str]:
        rest, changes[:] = overrides.split(argv)
        try:
            return flags.FLAGS(rest)
        except flags.Error as error:
            raise UserError(format_error(error)) from error

    try:
        app.run(functools.partial(main, changes=changes), flags_parser=parse)
    except UserError as error:
        sys.exit(f'error: {error}')
    except OSError as error:  # outside of a run that is training
        if full := storage_failure(error):
            sys.exit(f'error: {full}; make room, and give the same command again')
        raise


if __name__ == '__main__':
    run()
