"""The interface of an engine: submit(commands, resources) → states.

A command is an ordinary `python -m mi.main …` with its own run directory. The engine learns the
state of a run from this directory (`launch.state`) and from the exit code: 0 means done, 143 means
stopped and saved, and anything else is a failure. The same command restarts a run.
"""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from launch import restarts, state
from mi.training.run_state import PREEMPTED, STOP_MARK, last_line, restart_refusal

Commands = dict[pathlib.Path, list[str]]  # run directory → command
QUEUED = 'queued'  # phase of a member that was submitted to a scheduler and is not waited for
States = dict[pathlib.Path, str]  # run directory → QUEUED or the phase of a `RunState`


@dataclasses.dataclass(frozen=True)
class Resources:
    """The resources of a member.

    Attributes:
      parallel: number of members that run simultaneously, or 0 for as many as fit.
      processes: number of processes of each member, joined by jax.distributed.
      gpus: number of GPUs per process, or 0 to assign none.
      cores: number of CPU cores per process, or 0 for an even share.
      retries: number of restarts of a member that fails. A preempted member is always restarted if
        it has made progress.
      cache_megabytes: size limit, whenever a member starts, for the cache of compiled programs that
        members on this machine share, or 0 for no cache.
    """

    parallel: int = 0
    processes: int = 1
    gpus: int = 0
    cores: int = 0
    retries: int = 0
    cache_megabytes: int = 1024


class Exit(NamedTuple):
    """The end of an attempt to run a member.

    Attributes:
      phase: phase of the member.
      is_restarted: whether the member will be restarted.
      message: message for the user, or '' for none.
    """

    phase: str
    is_restarted: bool = False
    message: str = ''


class Attempts:
    """A count of attempts, which decides whether members are restarted.

    Preempted members are restarted as long as they make progress, and failed ones up to `retries`
    times.
    """

    def __init__(self, retries: int):
        self._retries = retries
        self._failures: Counter[pathlib.Path] = Counter()

    def end(self, run_dir: pathlib.Path, exit_code: int) -> Exit:
        """Return the outcome of an attempt that ended with an exit code.

        A member that is preempted twice without progress counts as failed. See `launch.restarts`.
        """
        if exit_code == 0 or state.is_finished(run_dir):
            is_done = state.read_status(run_dir).get('state') == 'done'
            is_stopped = (run_dir / STOP_MARK).exists() and not is_done
            return Exit('stopped' if is_stopped else 'done')
        is_stuck = exit_code == PREEMPTED and not restarts.note_stop(run_dir)
        if exit_code == PREEMPTED and not is_stuck:
            return Exit('preempted', is_restarted=True)
        self._failures[run_dir] += 1
        is_restarted = self._failures[run_dir] <= self._retries
        log_file = run_dir / 'log.txt'
        detail = restart_refusal(run_dir) if is_stuck else last_line(log_file) or 'no output'
        cause = f'killed by signal {-exit_code}' if exit_code < 0 else f'exit code {exit_code}'
        outcome = 'failed, starting it again' if is_restarted else 'failed'
        message = f'{run_dir.name} {outcome}: {cause}: {detail} ({log_file})'
        return Exit('died' if exit_code < 0 else 'failed', is_restarted, message)


Submit = Callable[..., States]  # (commands, resources)
Rule = Callable[[Sequence[pathlib.Path]], None]  # marks run directories to be stopped
