"""Entry point of every run: python -m mi.main --config=configs/lm.py --workdir=runs/first

An existing run stores its config in its directory, so --config is optional when you continue,
evaluate or sample it.

Exit codes: 0 for success; 1 for a user error, with one line on stderr; 143 if a signal stopped the
run after a checkpoint, in which case the same command continues it.
"""

import functools
import pkgutil
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from mi import overrides
from mi.config import UserError, format_error
from mi.training import sharding
from mi.training.host import collect_garbage_rarely, keep_freed_memory, set_xla_flags
from mi.training.io import storage_failure
from mi.training.run_config import has_run, read_config
from mi.training.run_dir import parse_steps

# Imported when they are called: a language model needs no environments.
TASKS = {
    'train': {
        'lm': 'mi.lm.train:train',
        'rl': 'mi.rl.train:train',
        'fit': 'mi.fit.train:train',
        'search': 'mi.fit.search:search',
    },
    'eval': {'lm': 'mi.lm.assess:assess', 'rl': 'mi.rl.assess:assess'},
    'sample': {'lm': 'mi.lm.sample:sample'},
}


def define_flags() -> None:
    """Define the flags on request, because launchers that import this module have their own."""
    flags.DEFINE_string(
        'config', None, 'Config file, FILE.py or FILE.py:ARGUMENT. --config.KEY=VALUE sets a key.'
    )
    flags.DEFINE_string('workdir', None, 'Run directory, new or continued.')
    flags.DEFINE_enum(
        'mode',
        'train',
        ['train', 'eval', 'sample'],
        'eval: evaluate a trained run, with videos in RL. sample: generate text.',
    )
    flags.DEFINE_string(
        'profile', '', 'FIRST:LAST, the training steps to trace. The trace is in WORKDIR/profile.'
    )
    flags.DEFINE_string(
        'distributed', '', "One of several processes: 'auto', or 'HOST:PORT,COUNT,INDEX'."
    )


def main(argv: Sequence[str], config_overrides: Sequence[overrides.Override] = ()) -> None:
    """Run the task and mode that the flags name.

    Args:
      argv: the program's name, and any arguments that are not flags.
      config_overrides: overrides of the config.

    Raises:
      UserError: if the flags or the config are invalid.
    """
    # Check the flags, and load the config.
    flag_values = flags.FLAGS
    if not flag_values['verbosity'].present:
        logging.set_verbosity(logging.WARNING)  # orbax writes a page per checkpoint
    if len(argv) > 1:
        raise UserError(f'unexpected argument {argv[1]!r}; flags are --NAME=VALUE')
    mode = flag_values.mode
    has_config = flag_values.config or has_run(flag_values.workdir)
    if mode == 'train' and not (has_config and flag_values.workdir):
        raise UserError(
            '--config=FILE and --workdir=DIRECTORY are both required, unless --workdir holds an '
            'existing run, which has a config'
        )
    if not flag_values.workdir:
        raise UserError(f'--mode={mode} requires --workdir=DIRECTORY, the directory of the run')
    if flag_values.config:
        config = overrides.load(flag_values.config, config_overrides)
    else:
        config = read_config(flag_values.workdir)
        overrides.apply(config, config_overrides)

    # Select the function of the task.
    tasks = TASKS[mode]
    if 'task' not in config:
        raise UserError(f'config.task is missing: --mode={mode} expects {", ".join(tasks)}')
    task = config.task
    if task not in tasks:
        raise UserError(f'config.task = {task!r}: --mode={mode} expects one of {", ".join(tasks)}')
    profile_arguments = {'profile': parse_steps(flag_values.profile)} if flag_values.profile else {}
    if profile_arguments and (mode != 'train' or task == 'search'):
        raise UserError(
            f'--profile={flag_values.profile} only applies to --mode=train of the tasks lm, rl '
            f'and fit. Remove it'
        )

    # Configure the process, then run.
    keep_freed_memory()
    collect_garbage_rarely()
    set_xla_flags()
    sharding.initialize(flag_values.distributed)
    try:
        pkgutil.resolve_name(tasks[task])(config, flag_values.workdir, **profile_arguments)
    except UserError as error:
        if flag_values.config or not str(error).startswith('config.'):
            raise
        raise UserError(
            f'{error}; this config was read from --workdir. Try --config=FILE, which adds '
            'newer keys and the names that FILE registers'
        ) from error


def run() -> None:
    """Parse the command line and run. On a user error, print one line and exit with code 1."""
    define_flags()
    config_overrides: list[overrides.Override] = []

    def parse(argv: Sequence[str]) -> list[str]:
        other_arguments, config_overrides[:] = overrides.split(argv)
        try:
            return flags.FLAGS(other_arguments)
        except flags.Error as error:
            raise UserError(format_error(error)) from error

    try:
        app.run(functools.partial(main, config_overrides=config_overrides), flags_parser=parse)
    except UserError as error:
        sys.exit(f'error: {error}')
    except OSError as error:  # outside of an open run directory
        if failure := storage_failure(error):
            sys.exit(f'error: {failure}. Free some space, then run the same command again')
        raise


if __name__ == '__main__':
    run()
