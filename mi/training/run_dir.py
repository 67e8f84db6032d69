"""A run directory: who may write to it, what it was made with, how its run ended, when to stop.

config.json   resolved config          status.json   running, done, failed, preempted
versions.json what it computes with (mi.training.versions)
cost.json     parameters and FLOPs     lock          held by the process that writes here
metrics.jsonl, timing.jsonl, tensorboard/ (mi.training.logger)
checkpoints/ (mi.training.checkpoint)
profile/, where one was asked for        tracker.json, where there is one (mi.training.trackers)

Of several processes (mi.training.sharding) the first writes all of it, but that process 1 has its
own status.1.json, and each has its part of a checkpoint.
"""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import platform
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from mi import precision
from mi.config import UserError, describe_difference, flatten
from mi.training import (
    logger,
    sharding,
    trackers,
    versions,
)
from mi.training.host import describe_machine
from mi.training.io import overwrite, read_json, replace_file, storage_failure, write_json

Steps = tuple[int, int]  # first and last


PREEMPTED = 143  # 128 + SIGTERM, what a scheduler expects of a job that it stopped


class Run:
    """An open run directory; made by `open_run`.

    Attributes:
      path: the directory.
      config: what it was started with.
      step: how far the run is.
    """

    def __init__(
        self, path: pathlib.Path, config: ml_collections.ConfigDict, profile: Steps | None = None
    ):
        self.path = path
        self.config = config
        self.step = 0
        self._asked = False
        self._profile, self._tracing = profile, False

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Writes a JSON file whole or not at all; nothing if this is not the first process."""
        if sharding.is_primary():
            write_json(self.path / name, value)

    def write_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes an .npz file whole or not at all; nothing if this is not the first process."""
        if sharding.is_primary():
            with replace_file(self.path / name) as beside, open(beside, 'wb') as stream:
                np.savez_compressed(stream, allow_pickle=False, **arrays)

    def write_status(self, state: str, reason: str | None = None) -> None:
        """Write how the run is; in place where the disk has no room for another file."""
        process = jax.process_index()
        file = self.path / (f'status.{process}.json' if process else 'status.json')
        value = {
            'state': state,
            'reason': reason,
            'step': self.step,
            'pid': os.getpid(),
            'host': platform.node(),
            'machine': describe_machine(),
            'updated': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        }
        try:
            write_json(file, value)
        except OSError:
            overwrite(file, json.dumps(value).encode() + b'\n')

    def open_logger(self, total: int, position: int) -> logger.RunLogger:
        """What the run writes down as it goes on.

        Args:
          total: steps that the run has.
          position: where metrics.jsonl is continued; 0 for a new one.
        """
        if not sharding.is_primary():
            return logger.RunLogger(None, total, self.step, position)
        config = json.loads(self.config.to_json())
        tracker = trackers.start_tracker(self.config.tracker, self.path, config)
        return logger.RunLogger(self.path, total, self.step, position, tracker)

    def call_traced(self, count: int, program: Callable[..., Any], *args: Any) -> Any:
        """program(*args), the next `count` steps; recorded if they are to be.

        The trace begins before the first of the steps that were asked for and ends when the last of
        them has been computed: a program of several steps is recorded as a whole. Each call is
        marked 'train' with its first step, as the profiler's overview needs it.
        """
        first, last = self.step + 1, self.step + count
        if self._profile is None or last < self._profile[0] or first > self._profile[1]:
            return program(*args)
        if not self._tracing:
            jax.profiler.start_trace(str(self.path / 'profile'))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation('train', step_num=first):
            result = program(*args)
        if last >= self._profile[1]:
            jax.block_until_ready(result)
            self.end_trace()
        return result

    def end_trace(self) -> None:
        """Writes the trace that has begun, if one has."""
        if self._tracing:
            jax.profiler.stop_trace()
            print(f'profile of steps in {self.path / "profile"}', file=sys.stderr)
            self._profile, self._tracing = None, False

    def should_stop(self, recorded: bool) -> bool:
        """Whether the loop is to save and end: SIGTERM or SIGINT came, in any process.

        Args:
          recorded: whether this step has a record. Several processes agree there, and only there.
        """
        if jax.process_count() == 1:
            return self._asked
        return recorded and sharding.any_process(self._asked)

    def exit_preempted(self) -> None:
        """Ends the process after its state was saved; the same command continues the run."""
        raise Preempted

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        self._asked = True
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        name = signal.Signals(number).name
        print(f'{name}: saving after this step; the same command continues', file=sys.stderr)


class Preempted(SystemExit):
    """Exit code 143, after a checkpoint."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


@contextlib.contextmanager
def open_run(
    workdir: str | os.PathLike[str],
    config: ml_collections.ConfigDict,
    profile: Steps | None = None,
) -> Iterator[Run]:
    """Opens a run directory, new or to be continued, and records how the run ends.

    Products inside are as precise as `config.train.matmul_precision` says.

    Args:
      workdir: the directory.
      config: what the run is made with.
      profile: first and last of the steps that `Run.call_traced` records; None for none.

    Raises:
      UserError: if another process holds it, or it was made with another config.
    """
    path = pathlib.Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--workdir={path}: {error.strerror}; name another directory') from error
    with _named_if_full(path), contextlib.ExitStack() as stack:
        if sharding.is_primary():
            stack.enter_context(_locked(path / 'lock', path))
            _same_config(path / 'config.json', config)
            _same_settings(path)
        sharding.barrier('run directory')
        run = Run(path, config, profile)
        stack.enter_context(precision.use_config(config))
        handlers = {s: signal.signal(s, run._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            run.write_status('running')
            yield run
            run.write_status('done')
        except Preempted:
            with contextlib.suppress(OSError):  # the state is saved all the same
                run.write_status('preempted')
            raise
        except BaseException as error:
            full = storage_failure(error)
            with contextlib.suppress(OSError):  # or nobody learns what was wrong
                run.write_status('failed', full or f'{type(error).__name__}: {error}'.strip())
            raise
        finally:
            run.end_trace()
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _named_if_full(path: pathlib.Path) -> Iterator[None]:
    """Make one line of whatever comes of a disk that is full, or cannot be written."""
    try:
        yield
    except (UserError, Preempted):
        raise
    except BaseException as error:
        if full := storage_failure(error):
            raise UserError(
                f'--workdir={path}: {full}; checkpoints that are there are whole. Make room, and '
                f'the same command continues'
            ) from error
        raise


@contextlib.contextmanager
def _locked(lock: pathlib.Path, path: pathlib.Path) -> Iterator[None]:
    try:
        opened = open(lock, 'a+')  # noqa: SIM115
    except OSError as error:
        raise UserError(f'{lock}: {error.strerror}; name another --workdir') from error
    with opened as file:
        for attempt in range(10):  # who looks whether it is held, as launch.status, holds it too
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if attempt < 9:
                    time.sleep(0.1)
                    continue
                file.seek(0)
                holder = file.read().strip() or 'another process'
                raise UserError(
                    f'{path} is in use by {holder}; wait for it or name another --workdir'
                ) from error
        file.truncate(0)
        file.write(f'process {os.getpid()} on {platform.node()}')
        file.flush()
        yield  # closing the file releases the lock, also when the process is killed


def _same_config(file: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Write config.json, or refuse another config than it has; keys may have been added since."""
    resolved = json.loads(config.to_json())
    if not file.exists():
        write_json(file, resolved)
        return
    before = flatten(read_json(file))
    now = flatten(resolved)
    for side in (before, now):
        side.pop('tracker', None)  # who else is told has no part in what is learnt
    added = {key: value for key, value in now.items() if key not in before}
    changed = describe_difference(before, now)
    if describe_difference(before | added, now):
        raise UserError(
            f'{file.parent} was made with another config: {changed}; name another --workdir'
        )
    if added:
        which = ', '.join(f'config.{key} = {value!r}' for key, value in added.items())
        print(
            f'warning: {file.parent} was begun before there was {which}; it goes on with that',
            file=sys.stderr,
        )
        write_json(file, resolved)


def _same_settings(path: pathlib.Path) -> None:
    """Write versions.json, or refuse settings of JAX with which a run would not go on the same."""
    steps = [int(each.name) for each in (path / 'checkpoints').glob('*') if each.name.isdigit()]
    step = max(steps, default=0 if (path / 'probes.json').exists() else None)
    write_json(path / 'versions.json', versions.compare(path / 'versions.json', step))


def recorded_config(workdir: str | os.PathLike[str]) -> ml_collections.ConfigDict:
    """Return the config that a run directory was made with; locked.

    Raises:
      UserError: if it is not the directory of a run.
    """
    file = pathlib.Path(workdir) / 'config.json'
    if not file.exists():
        raise UserError(f'--workdir={workdir} has no config.json: expected the directory of a run')
    return ml_collections.ConfigDict(_with_tuples(read_json(file))).lock()


def _with_tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were in the config."""
    if isinstance(value, dict):
        return {key: _with_tuples(each) for key, each in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def config_to_evaluate(
    workdir: str | os.PathLike[str],
    config: ml_collections.ConfigDict,
    *,
    own: Sequence[str],
    fixed: Sequence[str],
) -> ml_collections.ConfigDict:
    """Return the config of a run, evaluated as `config` says.

    What is neither `own` nor `fixed`, such as the optimizer, has no part in an evaluation: it is
    that of the run, whatever `config` has there.

    Args:
      workdir: the directory of the run.
      config: what was asked for now.
      own: sections and keys that are those of `config`, as 'eval'.
      fixed: those that decide what the checkpoint is, as 'model', and have to be those of the run.

    Raises:
      UserError: if one of `fixed` differs, or it is not the directory of a run.
    """
    trained = flatten(recorded_config(workdir).to_dict())
    asked = flatten(config.to_dict())

    def is_in(key: str, parts: Sequence[str]) -> bool:
        return any(f'{key}.'.startswith(f'{part}.') for part in parts)

    for key in trained.keys() & asked.keys():
        if is_in(key, fixed) and _plain(trained[key]) != _plain(asked[key]):
            raise UserError(
                f'config.{key} = {asked[key]!r}: {workdir} was trained with {trained[key]!r}; '
                f'remove it, or name the --workdir of another run'
            )
    of_run = {k: v for k, v in trained.items() if k in asked and not is_in(k, own)}
    merged = config.copy_and_resolve_references()
    with merged.ignore_type():
        merged.update_from_flattened_dict(of_run)
    return merged.lock()


def _plain(value: Any) -> Any:
    """The value as JSON has it."""
    return json.loads(json.dumps(value))


def parse_steps(text: str) -> Steps:
    """'10:20' → (10, 20)."""
    first, colon, last = text.removeprefix('steps=').partition(':')
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(
            f'--profile={text}: expected FIRST:LAST, such as 10:20, the first step is 1'
        )
    return int(first), int(last)
