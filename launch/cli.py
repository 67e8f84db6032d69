"""What stands behind `python -m launch.ENGINE`: flags, and the way from a sweep to a report."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import app, flags, logging

from launch import asha, plan, process, state, sweep
from launch.devices import Devices, check, warnings
from launch.engine import QUEUED, Resources, States, Submit
from mi import report
from mi.config import UserError
from mi.training.run_dir import PREEMPTED

SWEEP = flags.DEFINE_string('sweep', None, 'Sweep file, such as experiments/quickstart.py.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Sweep directory, made or continued.')
DRY_RUN = flags.DEFINE_bool(
    'dry_run', False, 'List the members, what runs them and what they cost; run nothing.'
)
FLOPS_PER_SECOND = flags.DEFINE_float(
    'flops_per_second',
    None,
    'With --dry_run: what one member gets, for hours. Left out, that of the members that ran.',
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
    'parallel', 0, 'Members at once; 0 for as many as fit, 1 without GPUs.', lower_bound=0
)
PROCESSES = flags.DEFINE_integer(
    'processes', 1, 'Of each member, joined by jax.distributed.', lower_bound=1
)
GPUS = flags.DEFINE_integer(
    'gpus', 0, 'Of each process; with 0 it sees those that the engine sees.', lower_bound=0
)
CORES = flags.DEFINE_integer('cores', 0, 'Of each process; 0 for an even share.', lower_bound=0)
RETRIES = flags.DEFINE_integer(
    'retries', 0, 'How often a member that fails is started again.', lower_bound=0
)

ASHA = flags.DEFINE_integer(
    'asha', 0, 'Stop members that are behind, from this step on; see launch/asha.py.', lower_bound=0
)
ASHA_FACTOR = flags.DEFINE_integer(
    'asha_factor',
    3,
    'Of those that come to a step, the best one in so many goes on.',
    lower_bound=2,
)


def resources() -> Resources:
    """As the flags say."""
    return Resources(PARALLEL.value, PROCESSES.value, GPUS.value, CORES.value, RETRIES.value)


def run(
    name: str, submit: Submit, watches: bool, find_devices: Callable[[Resources], Devices]
) -> None:
    """What `python -m launch.NAME` does; the exit code is 1 if a member is not finished.

    The report is written unless the members are only queued.
    """
    if ASHA.value and not watches:
        raise UserError(f'--asha: launch.{name} does not watch its members; use local or ray')
    file, workdir = arguments()
    members = sweep.load(file, workdir, name, dry=DRY_RUN.value)
    if CHECK.value and not DRY_RUN.value:
        raise UserError('--check: expected --dry_run with it, as it runs nothing')
    if DRY_RUN.value:
        dry_run(members, workdir, find_devices(resources()))
        return
    if ASHA.value:
        sweep_file = state.described(workdir, {'metric': str, 'curves': str})
        configs = (sweep.parsed(m.command) for m in members)
        asha.refuse_idle(configs, ASHA.value, sweep_file['metric'], sweep_file['curves'])
    commands = {workdir / m.name: m.command for m in members if not state.done(workdir / m.name)}
    with alone(workdir) if ASHA.value else contextlib.nullcontext():
        rule = asha.Asha(workdir, ASHA.value, ASHA_FACTOR.value) if ASHA.value else None
        states = submit(commands, resources(), *([rule] if rule else []))
    if rule:
        print(rule.summary(), file=sys.stderr)
    if QUEUED in states.values():
        return
    wrong = unfinished(states, len(members))
    for line in wrong:  # before the sweep file's own report, which may raise
        print(f'error: {line}', file=sys.stderr)
    report.write(workdir)
    sweep.report(file, workdir)
    if wrong:
        sys.exit(1)


def dry_run(members: Sequence[sweep.Member], workdir: pathlib.Path, devices: Devices) -> None:
    """Print what would run, where devices would have no work, and with --check what is compiled.

    The exit code is 1 if the member that is checked does not fit.
    """
    if ACCELERATOR.value and not devices.topology:
        devices = dataclasses.replace(devices, topology=f'{ACCELERATOR.value}:{devices.count}')
    flops = plan.show(members, workdir, FLOPS_PER_SECOND.value)
    for line in warnings(members, devices):
        print(f'warning: {line}', file=sys.stderr)
    if CHECK.value and not check(members[flops.index(max(flops))], devices):
        sys.exit(1)


def unfinished(states: States, number: int) -> list[str]:
    """A line for those of so many members that failed, and one for those that have to go on."""
    failed = [path.name for path, word in states.items() if word in ('failed', 'died')]
    others = [
        f'{path.name} ({word})'
        for path, word in states.items()
        if word not in ('done', 'stopped', 'failed', 'died')
    ]
    lines = [f'{len(failed)} of {number} members failed: {", ".join(failed)}'] if failed else []
    if others:
        lines.append(
            f'{len(others)} of {number} members are not finished: {", ".join(others)}; the same '
            'command goes on with them'
        )
    return lines


@contextlib.contextmanager
def alone(workdir: pathlib.Path) -> Iterator[None]:
    """Holds a sweep directory for a launcher that decides which of its members go on.

    Raises:
      UserError: if another one does.
    """
    with open(workdir / 'launcher', 'a') as lock:
        if not process.taken(lock):
            raise UserError(
                f'--workdir={workdir}: another launcher decides about its members; wait until it '
                'has ended, or stop it'
            )
        yield


def arguments() -> tuple[str, pathlib.Path]:
    """--sweep and --workdir."""
    if not SWEEP.value or not WORKDIR.value:
        raise UserError('--sweep=FILE and --workdir=DIRECTORY are both needed')
    return SWEEP.value, pathlib.Path(WORKDIR.value)


def main(
    name: str,
    submit: Submit,
    find_devices: Callable[[Resources], Devices],
    *,
    watches: bool = False,
) -> None:
    """What stands at the end of an engine's file.

    Args:
      name: of the module.
      submit: its engine. One that watches its members takes a `Rule` too.
      find_devices: returns the devices that a member gets there.
      watches: whether it does.
    """
    start(lambda: run(name, submit, watches, find_devices))


def start(program: Callable[[], None]) -> None:
    """Parses the flags and runs; a mistake ends with one line."""

    def body(argv: Sequence[str]) -> None:
        if not flags.FLAGS['verbosity'].present:
            logging.set_verbosity(logging.WARNING)
        jax.config.update('jax_platforms', 'cpu')  # the GPUs are the members'
        if len(argv) > 1:
            raise UserError(f'unexpected argument {argv[1]!r}; flags are --NAME=VALUE')
        program()

    try:
        app.run(body)
    except UserError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:  # before a member was started
        sys.exit(PREEMPTED)
