"""Shows how the runs of a sweep stand, whichever engine runs them; needs their directory alone.

    python -m launch.status --workdir=runs/quickstart

On a terminal the table is live until no run goes on, Ctrl-C ends it; elsewhere it is printed once.
A run whose status says that it is running and whose lock nobody holds has died: it was killed, or
its machine was. Where runs are on other machines, the lock has to be one that their file system
knows of (NFS does, Lustre if it was mounted with `flock`).
"""

import pathlib
import sys
import time
from collections.abc import Sequence

import rich.console
import rich.live
from absl import app, flags

from launch import local, state
from mi.config import UserError

WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of a sweep or of a run.')
EVERY = flags.DEFINE_float('every', 2.0, 'Seconds between two looks.', lower_bound=0.1)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f'unexpected argument {argv[1]!r}; flags are --NAME=VALUE')
    if not WORKDIR.value:
        raise UserError('--workdir=DIRECTORY is needed, of a sweep or a run')
    workdir = pathlib.Path(WORKDIR.value)
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 200
        console.print(state.table(str(workdir), state.of_sweep(workdir)))
        return
    reader = state.Reader(state.members_of(workdir)[0])
    with rich.live.Live(console=console, auto_refresh=False) as live:
        while True:
            began = time.monotonic()
            now = state.of_sweep(workdir, reader)
            live.update(state.Table(str(workdir), now), refresh=True)
            if not any(of.word in ('running', 'waiting') for of in now.values()):
                return
            took = time.monotonic() - began
            time.sleep(max(EVERY.value, local.SHARE * took))


if __name__ == '__main__':
    try:
        app.run(main)
    except UserError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit(0)
