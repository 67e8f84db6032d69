"""The command line of `python -m launch.ENGINE`, which runs a sweep and writes its report."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import app, flags, logging

from launch import asha, plan, process, state, sweep
from launch.devices import Devices, check_member, find_warnings
from launch.engine import QUEUED, Resources, States, Submit
from launch.members import Member
from mi import report
from mi.config import UserError
from mi.training.run_state import PREEMPTED

SWEEP = flags.DEFINE_string('sweep', None, 'Sweep file, such as experiments/quickstart.py.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Sweep directory, new or to be continued.')
DRY_RUN = flags.DEFINE_bool(
    'dry_run', False, 'List the members with their commands and costs; run nothing.'
)
FLOPS_PER_SECOND = flags.DEFINE_float(
    'flops_per_second',
    None,
    'With --dry_run: speed of one member, for the hours. By default the speed of finished members.',
    lower_bound=1,
)
CHECK = flags.DEFINE_bool(
    'check', False, 'With --dry_run: compile the member with the most FLOPs for its devices.'
)
ACCELERATOR = flags.DEFINE_string(
    'accelerator',
    '',
    "With --check: the GPUs of a member, such as 'h100'; see mi.estimate --topology.",
)
PARALLEL = flags.DEFINE_integer(
    'parallel',
    0,
    'Members that run simultaneously; 0 for as many as fit, or 1 without GPUs.',
    lower_bound=0,
)
PROCESSES = flags.DEFINE_integer(
    'processes', 1, 'Processes of each member, joined by jax.distributed.', lower_bound=1
)
GPUS = flags.DEFINE_integer(
    'gpus', 0, 'GPUs of each process; with 0 it sees those that the engine sees.', lower_bound=0
)
CORES = flags.DEFINE_integer(
    'cores', 0, 'CPU cores of each process; 0 for an even share.', lower_bound=0
)
RETRIES = flags.DEFINE_integer('retries', 0, 'Restarts of a member that fails.', lower_bound=0)
CACHE_MEGABYTES = flags.DEFINE_integer(
    'cache_megabytes',
    1024,
    'Size of the compiled programs in WORKDIR/compilation_cache that the members of launch.local, '
    'launch.pbt and launch.optuna share; 0 shares none.',
    lower_bound=0,
)

ASHA = flags.DEFINE_integer(
    'asha', 0, 'First step at which weak members are stopped; see launch/asha.py.', lower_bound=0
)
ASHA_FACTOR = flags.DEFINE_integer(
    'asha_factor',
    3,
    'At each comparison, the best one in this many members continues.',
    lower_bound=2,
)


def get_resources() -> Resources:
    """Return the resources given by the flags."""
    return Resources(
        PARALLEL.value,
        PROCESSES.value,
        GPUS.value,
        CORES.value,
        RETRIES.value,
        CACHE_MEGABYTES.value,
    )


def run(
    name: str, submit: Submit, watches: bool, find_devices: Callable[[Resources], Devices]
) -> None:
    """Run `python -m launch.NAME`, and exit with code 1 if a member is not finished.

    A report is written unless members are only queued.
    """
    # Check the flags and the sweep.
    if ASHA.value and not watches:
        raise UserError(
            f'--asha: launch.{name} does not watch its members. Try launch.local or launch.ray'
        )
    file, workdir = get_paths()
    members = sweep.load(file, workdir, name, dry=DRY_RUN.value)
    if CHECK.value and not DRY_RUN.value:
        raise UserError('--check: expected --dry_run too, because --check does not run the sweep')
    if DRY_RUN.value:
        dry_run(members, workdir, find_devices(get_resources()))
        return
    if ASHA.value:
        sweep_file = state.read_sweep_file(workdir, {'metric': str, 'curves': str})
        configs = (member.config for member in members)
        asha.refuse_idle(configs, ASHA.value, sweep_file['metric'], sweep_file['curves'])

    # Run the unfinished members.
    commands = {
        workdir / member.name: member.command
        for member in members
        if not state.is_finished(workdir / member.name)
    }
    with lock_sweep(workdir) if ASHA.value else contextlib.nullcontext():
        rule = asha.Asha(workdir, ASHA.value, ASHA_FACTOR.value) if ASHA.value else None
        states = submit(commands, get_resources(), *([rule] if rule else []))
    if rule:
        print(rule.summary(), file=sys.stderr)
    if QUEUED in states.values():
        return

    finish(file, workdir, states, len(members))


def finish(file: str, workdir: pathlib.Path, states: States, num_members: int) -> None:
    """Write the report, and exit with code 1 if a member is not finished."""
    # Name unfinished members before the sweep file's own report, which may raise.
    errors = describe_unfinished(states, num_members)
    for line in errors:
        print(f'error: {line}', file=sys.stderr)
    report.write(workdir)
    sweep.report(file, workdir)
    if errors:
        sys.exit(1)


def dry_run(members: Sequence[Member], workdir: pathlib.Path, devices: Devices) -> None:
    """Print what would run and which devices would be idle. With --check, compile one member.

    Exit with code 1 if the checked member does not fit on its devices.
    """
    if ACCELERATOR.value and not devices.topology:
        devices = dataclasses.replace(devices, topology=f'{ACCELERATOR.value}:{devices.count}')
    flops = plan.show(members, workdir, FLOPS_PER_SECOND.value)
    for line in find_warnings(members, devices):
        print(f'warning: {line}', file=sys.stderr)
    if CHECK.value and not check_member(members[flops.index(max(flops))], devices):
        sys.exit(1)


def describe_unfinished(states: States, num_members: int) -> list[str]:
    """Return a line about the failed members, and a line about the unfinished ones."""
    failed = [run_dir.name for run_dir, phase in states.items() if phase in ('failed', 'died')]
    unfinished = [
        f'{run_dir.name} ({phase})'
        for run_dir, phase in states.items()
        if phase not in ('done', 'stopped', 'failed', 'died')
    ]
    lines = []
    if failed:
        lines.append(f'{len(failed)} of {num_members} members failed: {", ".join(failed)}')
    if unfinished:
        lines.append(
            f'{len(unfinished)} of {num_members} members are not finished: '
            f'{", ".join(unfinished)}; the same command continues them'
        )
    return lines


@contextlib.contextmanager
def lock_sweep(workdir: pathlib.Path) -> Iterator[None]:
    """Lock a sweep directory, for launchers that decide which members continue.

    Raises:
      UserError: if another launcher holds the lock.
    """
    with open(workdir / 'launcher', 'a') as lock:
        if not process.try_lock(lock):
            raise UserError(
                f'--workdir={workdir}: another launcher controls this sweep. Wait for it to '
                'finish, or stop it'
            )
        yield


def get_paths() -> tuple[str, pathlib.Path]:
    """Return the values of --sweep and --workdir.

    Raises:
      UserError: if one of the flags is missing.
    """
    if not SWEEP.value or not WORKDIR.value:
        raise UserError('--sweep=FILE and --workdir=DIRECTORY are both required')
    return SWEEP.value, pathlib.Path(WORKDIR.value)


def main(
    name: str,
    submit: Submit,
    find_devices: Callable[[Resources], Devices],
    *,
    watches: bool = False,
) -> None:
    """Run an engine as a program. Its module calls this at the end.

    Args:
      name: name of the engine's module.
      submit: submit function of the engine, which also takes a `Rule` if the engine watches its
        members.
      find_devices: function from resources to the devices of a member.
      watches: whether the engine watches its members.
    """
    start(lambda: run(name, submit, watches, find_devices))


def start(program: Callable[[], None]) -> None:
    """Parse the flags and run a program. On a `UserError`, exit with its message."""

    def parse_and_run(argv: Sequence[str]) -> None:
        if not flags.FLAGS['verbosity'].present:
            logging.set_verbosity(logging.WARNING)
        jax.config.update('jax_platforms', 'cpu')  # leave the GPUs to the members
        if len(argv) > 1:
            raise UserError(f'unexpected argument {argv[1]!r}: expected flags as --NAME=VALUE')
        program()

    try:
        app.run(parse_and_run)
    except UserError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:  # before a member was started
        sys.exit(PREEMPTED)
