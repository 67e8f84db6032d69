"""The directory of a run, with its status, metrics, checkpoints and profile.

config.json   resolved config               status.json   running, done, failed, preempted
versions.json software and settings         cost.json     parameters and FLOPs
lock          held by the writing process   tracker.json  id of the run at config.tracker
data.json     hash of the tokens
metrics.jsonl, timing.jsonl, tensorboard/   see mi.training.logger
checkpoints/                                see mi.training.checkpoint
profile/                                    trace, with --profile

The primary process writes all of these. Every other process writes its part of a checkpoint and
its own status, such as status.1.json.
"""

import contextlib
import datetime
import json
import os
import pathlib
import platform
import signal
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import jax
import ml_collections
import numpy as np

from mi import precision
from mi.config import UserError
from mi.training import logger, sharding, trackers, versions
from mi.training.host import describe_machine
from mi.training.io import overwrite, replace_file, storage_failure, write_json
from mi.training.lock import hold_lock
from mi.training.run_config import record_config
from mi.training.run_state import PREEMPTED

Steps = tuple[int, int]  # first and last
Result = TypeVar('Result')


class Run:
    """An open run directory, from `open_run`.

    Attributes:
      path: path of the directory.
      config: config of the run.
      step: number of finished steps.
    """

    def __init__(
        self, path: pathlib.Path, config: ml_collections.ConfigDict, profile: Steps | None = None
    ):
        self.path = path
        self.config = config
        self.step = 0
        self._has_signal = False
        self._profile, self._is_tracing = profile, False

    def write(self, file_name: str, contents: Mapping[str, object]) -> None:
        """Write a JSON file atomically. Only the primary process writes."""
        if sharding.is_primary():
            write_json(self.path / file_name, contents)

    def write_arrays(self, file_name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write an .npz file atomically. Only the primary process writes."""
        if sharding.is_primary():
            with replace_file(self.path / file_name) as temporary, open(temporary, 'wb') as stream:
                np.savez_compressed(stream, allow_pickle=False, **arrays)

    def write_status(self, state: str, reason: str | None = None) -> None:
        """Write status.json, or overwrite it in place if the disk is full."""
        process_index = jax.process_index()
        file_name = f'status.{process_index}.json' if process_index else 'status.json'
        status_file = self.path / file_name
        status = {
            'state': state,
            'reason': reason,
            'step': self.step,
            'pid': os.getpid(),
            'host': platform.node(),
            'machine': describe_machine(),
            'updated': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        }
        try:
            write_json(status_file, status)
        except OSError:
            overwrite(status_file, json.dumps(status).encode() + b'\n')

    def open_logger(self, total: int, position: int) -> logger.RunLogger:
        """Open the logger of the run.

        Args:
          total: number of steps of the run.
          position: number of bytes of metrics.jsonl to keep, or 0 for a new file.
        """
        if not sharding.is_primary():
            return logger.RunLogger(None, total, self.step, position)
        config = json.loads(self.config.to_json())
        tracker = trackers.start_tracker(self.config.tracker, self.path, config)
        return logger.RunLogger(self.path, total, self.step, position, tracker)

    def call_traced(self, num_steps: int, program: Callable[..., Result], *args: object) -> Result:
        """Call a program that computes the next steps, and trace it if they are in the profile.

        The trace starts before the first step of the profile, and ends once its last step has been
        computed. A program of several steps is traced as a whole. Each call is annotated as 'train'
        with its first step, because the overview of the profiler needs the annotation.

        Args:
          num_steps: number of steps that the program computes.
          program: the program.
          *args: arguments of the program.

        Returns:
          The result of the program.
        """
        first_step, last_step = self.step + 1, self.step + num_steps
        if self._profile is None or last_step < self._profile[0] or first_step > self._profile[1]:
            return program(*args)

        # Start the trace with the first program that has a step of the profile.
        if not self._is_tracing:
            jax.profiler.start_trace(str(self.path / 'profile'))
            self._is_tracing = True
        with jax.profiler.StepTraceAnnotation('train', step_num=first_step):
            result = program(*args)

        # End it once the devices have computed the last step.
        if last_step >= self._profile[1]:
            jax.block_until_ready(result)
            self.end_trace()
        return result

    def end_trace(self) -> None:
        """End the trace, if one has started, and write it to the directory."""
        if self._is_tracing:
            jax.profiler.stop_trace()
            print(f'profile of steps in {self.path / "profile"}', file=sys.stderr)
            self._profile, self._is_tracing = None, False

    def should_stop(self, recorded: bool) -> bool:
        """Return whether any process received SIGTERM or SIGINT and the run must save and exit.

        Args:
          recorded: whether this step writes a record. Several processes only communicate at such
            steps, and the result is False at all others.
        """
        if jax.process_count() == 1:
            return self._has_signal
        return recorded and bool(sharding.any_process(self._has_signal))

    def exit_preempted(self) -> None:
        """Raise `Preempted`, after a checkpoint from which the same command will continue."""
        raise Preempted

    def _on_signal(self, signal_number: int, frame: types.FrameType | None) -> None:
        self._has_signal = True
        signal.signal(signal_number, signal.SIG_DFL)  # a second signal ends the process immediately
        signal_name = signal.Signals(signal_number).name
        print(f'{signal_name}: saving after this step; the same command continues', file=sys.stderr)


class Preempted(SystemExit):
    """Raised to end a run with exit code 143, after a checkpoint."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


@contextlib.contextmanager
def open_run(
    workdir: str | os.PathLike[str],
    config: ml_collections.ConfigDict,
    profile: Steps | None = None,
) -> Iterator[Run]:
    """Open a new or existing run directory, and record in status.json how the run ends.

    Matrix products inside the context have the precision `config.train.matmul_precision`.

    Args:
      workdir: run directory.
      config: config of the run.
      profile: first and last step that `Run.call_traced` traces, or None for no trace.

    Raises:
      UserError: if another process uses the directory, or if the run in it has a different config.
    """
    # Make the directory.
    path = pathlib.Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--workdir={path}: {error.strerror}. Use another directory') from error
    with _explain_storage_failure(path), contextlib.ExitStack() as stack:
        # The primary process locks the directory and compares config and versions.
        if sharding.is_primary():
            stack.enter_context(hold_lock(path / 'lock', path))
            record_config(path / 'config.json', config)
            _record_versions(path)
        sharding.barrier('run directory')

        # Set precision and signal handlers for the time of the run.
        run = Run(path, config, profile)
        stack.enter_context(precision.use_config(config))
        old_handlers = {
            signal_number: signal.signal(signal_number, run._on_signal)
            for signal_number in (signal.SIGTERM, signal.SIGINT)
        }
        # Record every way in which the run can end.
        try:
            run.write_status('running')
            yield run
            run.write_status('done')
        except Preempted:
            with contextlib.suppress(OSError):  # the checkpoint is complete without the status
                run.write_status('preempted')
            raise
        except BaseException as error:  # KeyboardInterrupt and SystemExit are failures too
            failure = storage_failure(error)
            with contextlib.suppress(OSError):  # report the first error, not this one
                run.write_status('failed', failure or f'{type(error).__name__}: {error}'.strip())
            raise
        finally:
            run.end_trace()
            for signal_number, old_handler in old_handlers.items():
                signal.signal(signal_number, old_handler)


@contextlib.contextmanager
def _explain_storage_failure(path: pathlib.Path) -> Iterator[None]:
    """Raise a one-line `UserError` for any exception caused by a full or read-only disk."""
    try:
        yield
    except (UserError, Preempted):
        raise
    except BaseException as error:  # orbax and others wrap the OSError in types of their own
        if failure := storage_failure(error):
            raise UserError(
                f'--workdir={path}: {failure}. Existing checkpoints are intact. Free some space, '
                f'then run the same command to continue'
            ) from error
        raise


def _record_versions(path: pathlib.Path) -> None:
    """Write versions.json, or raise UserError if JAX settings would change a resumed run."""
    saved_steps = [
        int(checkpoint_dir.name)
        for checkpoint_dir in (path / 'checkpoints').glob('*')
        if checkpoint_dir.name.isdigit()
    ]
    step = max(saved_steps, default=0 if (path / 'probes.json').exists() else None)
    write_json(path / 'versions.json', versions.compare(path / 'versions.json', step))


def parse_steps(text: str) -> Steps:
    """Parse the first and last step of a --profile value: '10:20' → (10, 20).

    Raises:
      UserError: if the text does not have this form, or if the last step precedes the first.
    """
    first_step, colon, last_step = text.removeprefix('steps=').partition(':')
    has_numbers = colon and first_step.isdecimal() and last_step.isdecimal()
    if not has_numbers or not 1 <= int(first_step) <= int(last_step):
        raise UserError(
            f'--profile={text}: expected FIRST:LAST with 1 <= FIRST <= LAST, such as 10:20'
        )
    return int(first_step), int(last_step)
