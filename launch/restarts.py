"""Whether a run that was stopped is started again: only if it got further than the time before.

Exit code 143 means that a run was stopped and has saved; and every engine starts such a run again.
A run that is stopped before it can save, as in a job whose time is too short, ends with 143 as
well, and would be started again without end. So whoever takes 143 for a clean stop asks here first:
`launch.engine` in its own process, the batch script of Slurm and the containers of Kubernetes by

    python -m launch.restarts RUN_DIR                 exit code 0 if it is started again, else 1
    python -m launch.restarts RUN_DIR -- COMMAND …    runs the command; 143 only if it got further

What is decided is noted in the run directory, so that it holds whichever engine comes next, and
`launch.status` shows it. Of the standard library alone: it has to start within a moment, on a node
whose time is up.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

PREEMPTED = 143  # as in mi.training.run_dir, which imports JAX
NOTE = 'stops.json'


class Saved(NamedTuple):
    """How much a run has saved; more than before compares as greater.

    Attributes:
      step: of its newest checkpoint, or of the status that it left when it was stopped.
      probes: bytes of a search's probes.json, which grows within a step.
    """

    step: int = -1
    probes: int = 0


def saved(run_dir: pathlib.Path) -> Saved:
    """How much a run has saved so far."""
    steps = [int(p.name) for p in (run_dir / 'checkpoints').glob('*') if p.name.isdigit()]
    status = _read(run_dir / 'status.json')
    if status.get('state') == 'preempted' and isinstance(status.get('step'), int):
        steps.append(status['step'])
    probes = run_dir / 'probes.json'
    return Saved(max(steps, default=-1), probes.stat().st_size if probes.exists() else 0)


def starts_again(run_dir: pathlib.Path, process: int = 0) -> bool:
    """Whether a run that ended with 143 is started again; notes how far it has got.

    Args:
      run_dir: of the run.
      process: which of its processes asks; each has a note of its own, as all may ask at once.
    """
    note, now = _note(run_dir, process), saved(run_dir)
    before = note.get('saved')
    has_progressed = not isinstance(before, list) or now > tuple(before)
    step = max(0, now.step)
    why = '' if has_progressed else f'stopped twice at step {step}, without getting further'
    _write(run_dir, process, note | {'saved': list(now), 'reason': why, 'at': list(now)})
    return has_progressed


def note_failure(run_dir: pathlib.Path, code: int, process: int = 0) -> None:
    """Notes a failure, for launchers that are not there when it happens."""
    note = _note(run_dir, process)
    why = note.get('reason') or f'exit code {code}'
    count = {'failures': failures(run_dir, process) + 1}
    _write(run_dir, process, note | count | {'reason': why, 'at': list(saved(run_dir))})


def failures(run_dir: pathlib.Path, process: int = 0) -> int:
    """How many failures were noted."""
    count = _note(run_dir, process).get('failures')
    return count if isinstance(count, int) else 0


def reason(run_dir: pathlib.Path) -> str:
    """Why a run is not started again; '' if it is, or has got further since that was noted."""
    note = _note(run_dir, 0)
    return str(note.get('reason') or '') if note.get('at') == list(saved(run_dir)) else ''


def run(run_dir: pathlib.Path, command: Sequence[str], process: int = 0) -> int:
    """Runs a command to its end: its exit code, and 1 for a 143 that got no further.

    SIGTERM and SIGINT are passed on, as of the processes of a container only the first gets them.
    """
    received: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def on_signal(number: int, frame: Any) -> None:
        received.append(number)
        for child in children:
            child.send_signal(number)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    child = subprocess.Popen(command)
    children.append(child)
    for number in received:  # before there was somebody to pass them on to
        child.send_signal(number)
    code = child.wait()
    if code < 0:
        code = 128 - code  # as a shell says it
    run_dir.mkdir(parents=True, exist_ok=True)
    if code == PREEMPTED and not starts_again(run_dir, process):
        print(f'{run_dir}: {reason(run_dir)}', file=sys.stderr)
        code = 1
    if code not in (0, PREEMPTED):
        note_failure(run_dir, code, process)
    return code


def _note(run_dir: pathlib.Path, process: int) -> dict[str, Any]:
    return _read(run_dir / _name(process))


def _name(process: int) -> str:
    return f'stops.{process}.json' if process else NOTE


def _write(run_dir: pathlib.Path, process: int, note: dict[str, Any]) -> None:
    beside = run_dir / f'.{_name(process)}.{os.getpid()}'
    beside.write_text(json.dumps(note) + '\n')
    os.replace(beside, run_dir / _name(process))


def _read(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object; {} where there is none, or no whole one."""
    try:
        value = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def main(arguments: Sequence[str]) -> int:
    """What `python -m launch.restarts` does; its exit code."""
    if not arguments or (len(arguments) > 1 and (arguments[1] != '--' or len(arguments) == 2)):
        print('usage: python -m launch.restarts RUN_DIR [-- COMMAND …]', file=sys.stderr)
        return 2
    run_dir, command = pathlib.Path(arguments[0]), arguments[2:]
    if command:
        return run(run_dir, command, int(os.environ.get('JOB_COMPLETION_INDEX', '0')))
    if starts_again(run_dir):
        return 0
    print(reason(run_dir))
    return 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
