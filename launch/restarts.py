"""Rules that restart a stopped run only if it has made progress since its last stop.

Exit code 143 means that a run was stopped and has saved. Every engine restarts such a run. But a
run that is stopped before it can save, for example because its time limit is too short, also exits
with 143 and would be restarted forever. Every engine therefore checks these rules first.
`launch.engine` does so in its own process. The batch script for Slurm and the containers for
Kubernetes use the command line:

    python -m launch.restarts RUN_DIR                 exit with 0 if the run is restarted, else 1
    python -m launch.restarts RUN_DIR -- COMMAND …    run a command; exit with 143 only on progress

The decision is stored in the run directory, where `launch.status` and the next engine find it. This
module does not import JAX, so that it starts quickly on a node whose time is nearly up.
"""

import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from mi.training.io import write_json
from mi.training.run_state import (
    PREEMPTED,
    RESTART_NOTE,
    read_object,
    restart_refusal,
    saved_progress,
)


def note_stop(run_dir: pathlib.Path, process: int = 0) -> bool:
    """Store the progress of a run that exited with 143 and return whether to restart it.

    Args:
      run_dir: the run directory.
      process: index of the calling process. Each process has its own note, because all of them may
        call this simultaneously.
    """
    stop_note, progress = _read_note(run_dir, process), saved_progress(run_dir)
    last_progress = stop_note.get('saved')
    has_progressed = not isinstance(last_progress, list) or progress > tuple(last_progress)
    step = max(0, progress.step)
    reason = '' if has_progressed else f'stopped twice at step {step}, without getting further'
    new_fields = {'saved': list(progress), 'reason': reason, 'at': list(progress)}
    write_json(run_dir / _note_name(process), stop_note | new_fields)
    return has_progressed


def note_failure(run_dir: pathlib.Path, reason: str, process: int = 0) -> None:
    """Store a failure and its reason, for launchers that are not running when it happens."""
    new_fields = {
        'failures': count_failures(run_dir, process) + 1,
        'reason': reason,
        'at': list(saved_progress(run_dir)),
    }
    write_json(run_dir / _note_name(process), _read_note(run_dir, process) | new_fields)


def count_failures(run_dir: pathlib.Path, process: int = 0) -> int:
    """Return the number of stored failures."""
    num_failures = _read_note(run_dir, process).get('failures')
    return num_failures if isinstance(num_failures, int) else 0


def run(run_dir: pathlib.Path, command: Sequence[str], process: int = 0) -> int:
    """Run a command to completion and return its exit code, or 1 if it is 143 without progress.

    SIGTERM and SIGINT are passed on, because only the first process of a container receives them.
    """
    received_signals: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def on_signal(signal_number: int, frame: FrameType | None) -> None:
        received_signals.append(signal_number)
        for child in children:
            child.send_signal(signal_number)

    # Start the command, and pass on signals that came before it existed.
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    child = subprocess.Popen(command)
    children.append(child)
    for signal_number in received_signals:
        child.send_signal(signal_number)
    exit_code = child.wait()
    if exit_code < 0:
        exit_code = 128 - exit_code  # as a shell reports a signal

    # Note how it ended.
    run_dir.mkdir(parents=True, exist_ok=True)
    reason = f'exit code {exit_code}'
    if exit_code == PREEMPTED and not note_stop(run_dir, process):
        exit_code, reason = 1, str(_read_note(run_dir, process)['reason'])
        print(f'{run_dir}: {reason}', file=sys.stderr)
    if exit_code not in (0, PREEMPTED):
        note_failure(run_dir, reason, process)
    return exit_code


def _note_name(process: int) -> str:
    return f'stops.{process}.json' if process else RESTART_NOTE


def _read_note(run_dir: pathlib.Path, process: int) -> dict[str, Any]:
    return read_object(run_dir / _note_name(process))


def main(arguments: Sequence[str]) -> int:
    """Run `python -m launch.restarts` and return its exit code."""
    if not arguments or (len(arguments) > 1 and (arguments[1] != '--' or len(arguments) == 2)):
        print('usage: python -m launch.restarts RUN_DIR [-- COMMAND …]', file=sys.stderr)
        return 2
    run_dir, command = pathlib.Path(arguments[0]), arguments[2:]
    if command:
        return run(run_dir, command, int(os.environ.get('JOB_COMPLETION_INDEX', '0')))
    if note_stop(run_dir):
        return 0
    print(restart_refusal(run_dir))
    return 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
