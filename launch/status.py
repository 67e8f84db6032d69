"""Show the state and progress of a sweep's members, for any engine.

    python -m launch.status --workdir=runs/quickstart

On a terminal, the table is updated until no member is running, or until you press Ctrl-C.
Otherwise it is printed once. A run whose status is 'running' but whose lock is free has died,
because its process or its machine was killed. If members run on other machines, the file system
must share locks. NFS does, and so does Lustre if it is mounted with `flock`.
"""

import pathlib
import sys
import time
from collections.abc import Sequence

import rich.console
import rich.live
from absl import app, flags

from launch import state, table, watch
from mi.config import UserError

WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of a sweep or of a run.')
EVERY = flags.DEFINE_float('every', 2.0, 'Seconds between two updates.', lower_bound=0.1)


def main(argv: Sequence[str]) -> None:
    """Show the table until no member is running, or once if there is no terminal."""
    if len(argv) > 1:
        raise UserError(f'unexpected argument {argv[1]!r}: expected flags as --NAME=VALUE')
    if not WORKDIR.value:
        raise UserError(
            '--workdir=DIRECTORY is required: expected the directory of a sweep or a run'
        )
    workdir = pathlib.Path(WORKDIR.value)
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 200
        console.print(table.build_table(str(workdir), state.read_sweep_states(workdir)))
        return
    reader = state.StateReader(state.find_members(workdir)[0])
    with rich.live.Live(console=console, auto_refresh=False) as live:
        while True:
            start_time = time.monotonic()
            states = state.read_sweep_states(workdir, reader)
            live.update(table.FittedTable(str(workdir), states), refresh=True)
            if not any(member.phase in ('running', 'waiting') for member in states.values()):
                return
            duration = time.monotonic() - start_time
            time.sleep(max(EVERY.value, watch.PAUSE_RATIO * duration))


if __name__ == '__main__':
    try:
        app.run(main)
    except UserError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit(0)
