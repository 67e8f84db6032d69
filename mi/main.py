"""The one entry point: python -m mi.main --config=configs/lm.py --workdir=runs/first

Exit codes: 0 done; 1 something to mend, one line on stderr says what; 143 stopped by a signal,
after saving: the same command continues the run.
"""

import sys
import warnings
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from mi import parallel
from mi.config import MISTAKES, UserError, one_line
from mi.fit import search
from mi.fit import train as fit
from mi.lm import assess as assess_lm
from mi.lm import sample
from mi.lm import train as lm
from mi.rl import assess as assess_rl
from mi.rl import train as rl
from mi.run import keep_freed_memory, set_xla_flags, steps

CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file.', lock_config=True)
WORKDIR = flags.DEFINE_string('workdir', None, 'Run directory, made or continued.')

MODE = flags.DEFINE_enum(
    'mode',
    'train',
    ['train', 'eval', 'sample'],
    'eval: the scores, and videos, of what a run has learnt. sample: text that it writes.',
)
PROFILE = flags.DEFINE_string(
    'profile', '', 'FIRST:LAST, the steps of training that a trace in WORKDIR/profile is made of.'
)
DISTRIBUTED = flags.DEFINE_string(
    'distributed', '', "One of several processes: 'auto', or 'HOST:PORT,COUNT,INDEX'."
)

TASKS = {
    'train': {'lm': lm.train, 'rl': rl.train, 'fit': fit.train, 'search': search.search},
    'eval': {'lm': assess_lm.assess, 'rl': assess_rl.assess},
    'sample': {'lm': sample.sample},
}


def main(argv: Sequence[str]) -> None:
    if not flags.FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING)  # orbax writes a page per checkpoint
    if len(argv) > 1:
        raise UserError(f'unexpected argument {argv[1]!r}; flags are --NAME=VALUE')
    if CONFIG.value is None or WORKDIR.value is None:
        raise UserError('--config=FILE and --workdir=DIRECTORY are both needed')
    try:
        task = CONFIG.value.task
    except MISTAKES as error:  # a file that is not there fails when first read
        raise UserError(f'--config: {one_line(error)}') from error
    tasks = TASKS[MODE.value]
    if task not in tasks:
        raise UserError(
            f'config.task = {task!r}: --mode={MODE.value} expects one of {", ".join(tasks)}'
        )
    profile = {'profile': steps(PROFILE.value)} if PROFILE.value else {}
    if profile and (MODE.value != 'train' or task == 'search'):
        raise UserError(f'--profile={PROFILE.value} is of training; leave it away here')
    keep_freed_memory()
    set_xla_flags()
    parallel.join(DISTRIBUTED.value)
    tasks[task](CONFIG.value, WORKDIR.value, **profile)


def parse(argv: Sequence[str]) -> list[str]:
    """Parses flags; what is wrong with them becomes a UserError."""
    try:
        return flags.FLAGS(argv)
    except MISTAKES as error:
        raise UserError(one_line(error)) from error


def run() -> None:
    # ml_collections loads config files by a call that Python deprecates.
    warnings.filterwarnings('ignore', 'the load_module', DeprecationWarning)
    try:
        app.run(main, flags_parser=parse)
    except UserError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    run()
