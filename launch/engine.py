"""What an engine is: submit(commands, resources) → states.

A command is an ordinary `python -m mi.main …` and belongs to the run directory that it keeps; the
engine learns how a run stands from there (`launch.state`) and from its exit code: 0 done, 143
stopped and saved, anything else failed. It is started again by the same command.
"""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence

from launch import restarts, state
from mi.training.run_dir import PREEMPTED

Commands = dict[pathlib.Path, list[str]]  # run directory → what runs it
QUEUED = 'queued'  # how one stands that was given to somebody else, who is not waited for
States = dict[pathlib.Path, str]  # run directory → how it stands: QUEUED, or a word of launch.state


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

    def ended(self, path: pathlib.Path, code: int) -> tuple[str, bool, str]:
        """How it stands, whether it is to be started again, and what there is to say of it.

        One that is preempted twice without getting further has failed; see `launch.restarts`.
        """
        if code == 0 or state.done(path):
            return 'stopped' if (path / state.STOPPED).exists() else 'done', False, ''
        is_stuck = code == PREEMPTED and not restarts.starts_again(path)
        if code == PREEMPTED and not is_stuck:
            return 'preempted', True, ''
        self._failures[path] += 1
        again = self._failures[path] <= self._retries
        last = state.last_line(path / 'log.txt') or 'no output'
        if is_stuck:
            last = restarts.reason(path)
        how = f'killed by signal {-code}' if code < 0 else f'exit code {code}'
        said = f'{path.name} failed{", starting it again" * again}: {how}: {last}'
        return 'died' if code < 0 else 'failed', again, f'{said} ({path / "log.txt"})'


Submit = Callable[..., States]  # (commands, resources)
Rule = Callable[[Sequence[pathlib.Path]], None]  # marks run directories that are to be stopped
