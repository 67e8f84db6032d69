"""The state of a run, determined from the files in its run directory.

waiting     nothing has started yet              done        all steps are complete
running     a process holds its lock             preempted   stopped and saved; a restart resumes it
died        its status is 'running', and         failed      it ended with an error
            no process holds its lock            stopped     a rule of the sweep ended it for good

Launchers and the report read the state here, so they agree. This module only reads files and does
not import JAX.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from mi.training.lock import is_locked

PREEMPTED = 143  # 128 + SIGTERM, the exit code that schedulers expect from a job they stopped
STOP_MARK = 'stopped.json'  # why a rule of the sweep stopped the run
RESTART_NOTE = 'stops.json'  # how far the run had got at its last stop, and why it is not restarted
LOG_TAIL = 2**16  # bytes at the end of log.txt that are searched for its last line


@dataclasses.dataclass(frozen=True)
class RunState:
    """State of a run.

    Attributes:
      phase: phase of the run, from the list above.
      reason: reason why the run failed, died or was stopped, or ''.
    """

    phase: str
    reason: str = ''


def read_run_state(run_dir: pathlib.Path, status: Mapping[str, object] | None = None) -> RunState:
    """Return the state of a run.

    The first rule that applies determines the phase:
      1. A run whose status is 'done' is done, even if a rule tried to stop it or its process has
         not exited yet.
      2. A run whose lock is held is running, whatever its status.
      3. A run with a stop mark is stopped.
      4. A run that was refused a restart has failed, unless it has made progress since.
      5. A run without a status is waiting or, if it has a log, failed before it began.
      6. A run whose status is 'running' has died.
      7. Any other run has the phase of its status: 'failed' or 'preempted'.

    Args:
      run_dir: run directory, which need not exist.
      status: content of status.json, or None to read it.
    """
    # The status is read before the locks, and again if the run may have ended in between.
    status = read_object(run_dir / 'status.json') if status is None else status
    is_alive = is_locked(run_dir / 'lock') or is_locked(run_dir / 'launched')
    if status.get('state') == 'running' and not is_alive:
        status = read_object(run_dir / 'status.json')

    # Apply the rules in order.
    phase = status.get('state')
    if phase == 'done':
        return RunState('done')
    if is_alive:
        return RunState('running')
    if (run_dir / STOP_MARK).exists():
        return RunState('stopped', str(read_object(run_dir / STOP_MARK).get('reason') or ''))
    if phase != 'failed' and (refusal := restart_refusal(run_dir)):
        return RunState('failed', refusal)
    if phase == 'running':
        return RunState('died', last_line(run_dir / 'log.txt') or 'its process is gone')
    if not isinstance(phase, str):
        log_line = last_line(run_dir / 'log.txt')
        return RunState('failed', log_line) if log_line else RunState('waiting')
    return RunState(phase, str(status.get('reason') or ''))


class SavedProgress(NamedTuple):
    """Saved progress of a run. Later progress compares as greater.

    Attributes:
      step: step of the newest checkpoint, or of the status written when the run was preempted.
      probe_bytes: size of a search's probes.json, which grows within a step.
    """

    step: int = -1
    probe_bytes: int = 0


def saved_progress(run_dir: pathlib.Path) -> SavedProgress:
    """Return the progress that a run has saved so far."""
    checkpoint_dirs = (run_dir / 'checkpoints').glob('*')
    saved_steps = [int(path.name) for path in checkpoint_dirs if path.name.isdigit()]
    status = read_object(run_dir / 'status.json')
    if status.get('state') == 'preempted' and isinstance(status.get('step'), int):
        saved_steps.append(status['step'])
    probes_file = run_dir / 'probes.json'
    probe_bytes = probes_file.stat().st_size if probes_file.exists() else 0
    return SavedProgress(max(saved_steps, default=-1), probe_bytes)


def restart_refusal(run_dir: pathlib.Path) -> str:
    """Return the reason why a run was refused a restart.

    The result is '' if it was not refused, or if the run has made progress since.
    """
    note = read_object(run_dir / RESTART_NOTE)
    has_progressed = note.get('at') != list(saved_progress(run_dir))
    return '' if has_progressed else str(note.get('reason') or '')


def last_line(log: pathlib.Path) -> str:
    """Return the last non-blank line of a log, or '' if there is none."""
    try:
        with open(log, 'rb') as log_file:
            log_file.seek(max(0, log_file.seek(0, 2) - LOG_TAIL))
            lines = log_file.read().decode(errors='replace').splitlines()
    except FileNotFoundError:
        return ''
    return next((line.strip() for line in reversed(lines) if line.strip()), '')


def read_object(file: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object, or return {} if the file is missing, or damaged by a power failure."""
    try:
        contents = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return contents if isinstance(contents, dict) else {}
