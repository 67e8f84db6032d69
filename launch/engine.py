"""What the engines share: what they are given, their flags, and the way from a sweep to a report.

An engine is a function submit(commands, resources) → states. A command is an ordinary
`python -m mi.main …` and belongs to the run directory that it keeps; the engine learns how a run
stands from there (`launch.state`) and from its exit code: 0 done, 143 stopped and saved, anything
else failed. It is started again by the same command.
"""

import dataclasses
import pathlib
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence

import jax
import rich.console
import rich.markup
import rich.table
from absl import app, flags, logging

from launch import state, sweep
from launch.asha import Asha
from mi import costs, report
from mi.config import UserError
from mi.run import PREEMPTED

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

Commands = dict[pathlib.Path, list[str]]  # run directory → what runs it
States = dict[pathlib.Path, str]  # run directory → how it stands, a word of launch.state


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a member gets.

    Attributes:
      parallel: members at once; 0 for as many as fit.
      processes: of each member, joined by jax.distributed.
      gpus: of each process; with 0 they are not dealt out.
      cores: of each process; 0 for an even share.
      retries: how often a member that failed is started again. One that was preempted always is,
        if it got further than the time before.
    """

    parallel: int = 0
    processes: int = 1
    gpus: int = 0
    cores: int = 0
    retries: int = 0


class Attempts:
    """Which members are started again: preempted ones, and failed ones as often as configured."""

    def __init__(self, retries: int):
        self._retries = retries
        self._failures: Counter[pathlib.Path] = Counter()
        self._saved: dict[pathlib.Path, int] = {}  # the step at which one was preempted before

    def ended(self, path: pathlib.Path, code: int) -> tuple[str, bool, str]:
        """How it stands, whether it is to be started again, and what there is to say of it.

        One that is preempted twice at the same step has failed: it would be so for ever.
        """
        if code == 0 or state.done(path):
            return 'done' if code == 0 else 'stopped', False, ''
        step = state.read(path).step
        if code == PREEMPTED and step > self._saved.get(path, -1):
            self._saved[path] = step
            return 'preempted', True, ''
        self._failures[path] += 1
        again = self._failures[path] <= self._retries
        last = state.last_line(path / 'log.txt') or 'no output'
        how = f'killed by signal {-code}' if code < 0 else f'exit code {code}'
        said = f'{path.name} failed{", starting it again" * again}: {how}: {last}'
        return 'died' if code < 0 else 'failed', again, f'{said} ({path / "log.txt"})'


Submit = Callable[..., States]  # (commands, resources)
Rule = Callable[[Sequence[pathlib.Path]], None]  # marks run directories that are to be stopped


def resources() -> Resources:
    """As the flags say."""
    return Resources(PARALLEL.value, PROCESSES.value, GPUS.value, CORES.value, RETRIES.value)


def run(name: str, submit: Submit, watches: bool) -> None:
    """What `python -m launch.NAME` does; the exit code is 1 if a member failed.

    The report is written when no member goes on elsewhere.
    """
    if ASHA.value and not watches:
        raise UserError(f'--asha: launch.{name} does not watch its members; use local or ray')
    file, workdir = arguments()
    members = sweep.load(file, workdir, name)
    if DRY_RUN.value:
        plan(members, workdir)
        return
    commands = {workdir / m.name: m.command for m in members if not state.done(workdir / m.name)}
    rule = [Asha(workdir, ASHA.value, ASHA_FACTOR.value)] if ASHA.value else []
    states = submit(commands, resources(), *rule)
    if any(word in ('waiting', 'running', 'preempted') for word in states.values()):
        return
    report.write(workdir)
    sweep.report(file, workdir)
    failed = [path.name for path, word in states.items() if word in ('failed', 'died')]
    if failed:
        sys.exit(f'error: {len(failed)} of {len(members)} members failed: {", ".join(failed)}')


def arguments() -> tuple[str, pathlib.Path]:
    """--sweep and --workdir."""
    if not SWEEP.value or not WORKDIR.value:
        raise UserError('--sweep=FILE and --workdir=DIRECTORY are both needed')
    return SWEEP.value, pathlib.Path(WORKDIR.value)


def plan(members: Sequence[sweep.Member], workdir: pathlib.Path) -> None:
    """Prints what would run, and what it costs."""
    told = [costs.of_config(sweep.parsed(m.command)) for m in members]
    totals = [c['steps'] * c['seeds'] * c['flops'] if 'flops' in c else None for c in told]
    pace = FLOPS_PER_SECOND.value or measured(members, told, workdir)
    table = rich.table.Table(box=None, title=f'{len(members)} members')
    for heading in ('member', 'state', 'parameters', 'FLOPs/step', 'steps', 'seeds', 'FLOPs', 'h'):
        table.add_column(heading, justify='left' if heading in ('member', 'state') else 'right')
    for member, cost, total in zip(members, told, totals, strict=True):
        table.add_row(
            rich.markup.escape(member.name),
            state.read(workdir / member.name).word,
            f'{cost["parameters"]["model"]:,}' if 'parameters' in cost else '',
            f'{cost["flops"]:.3g}' if 'flops' in cost else '',
            f'{cost["steps"]:,}',
            f'{cost["seeds"]}',
            '' if total is None else f'{total:.3g}',
            '' if total is None or not pace else f'{total / pace / 3600:.2g}',
        )
    known = [total for total in totals if total is not None]
    hours = f', {sum(known) / pace / 3600:.2g} h at {pace:.3g} FLOP/s' if pace else ''
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 200
    console.print(table)
    for member in members:
        print(f'{member.name}: {shlex.join(member.command)}')
    print(f'all of it: {sum(known):.3g} FLOPs in products, training alone{hours}')


def measured(
    members: Sequence[sweep.Member], told: Sequence[costs.Costs], workdir: pathlib.Path
) -> float:
    """FLOP/s of those members that have run, by their own clocks; 0 if there are none."""
    flops = seconds = 0.0
    for member, cost in zip(members, told, strict=True):
        timing = state.records(workdir / member.name / 'timing.jsonl')
        if len(timing) < 2 or 'flops' not in cost:
            continue
        steps = timing[-1]['step'] - timing[0]['step']  # the first may have compiled
        flops += steps * cost['seeds'] * cost['flops']
        seconds += sum(record['seconds'] for record in timing[1:])
    return flops / seconds if seconds else 0.0


def main(name: str, submit: Submit, *, watches: bool = False) -> None:
    """What stands at the end of an engine's file.

    Args:
      name: of the module.
      submit: its engine. One that watches its members takes a `Rule` too.
      watches: whether it does.
    """
    start(lambda: run(name, submit, watches))


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
