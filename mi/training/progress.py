"""Progress lines on stderr for long tasks, such as compiling or tokenizing."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from mi.training.io import format_duration

INTERVAL = 10.0  # seconds between two lines
Item = TypeVar('Item')


class Work(contextlib.AbstractContextManager['Work']):
    """A context that reports the progress of a task on stderr every `INTERVAL` seconds.

    Tasks shorter than `INTERVAL` are silent. A thread writes the lines, so that they also appear
    during a single long call. Only the primary process writes.

        with Work('compiling'):
            compiled = lowered.compile()

        with Work('tokenizing', total=size, unit='MB', scale=1e6) as work:
            for piece in pieces:
                work.done += len(piece)

    Args:
      name: name of the task, such as 'compiling the training step'.
      total: total amount of work, or 0 if unknown.
      unit: name of the unit in which amounts are shown.
      scale: amount of work per unit.
    """

    def __init__(self, name: str, total: float = 0, unit: str = '', scale: float = 1):
        self.done = 0.0
        self._name, self._total, self._unit, self._scale = name, total, unit, scale
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._start = 0.0

    def line(self, seconds: float) -> str:
        """Format the line to show after `seconds`: amount done, rate and time left."""
        if not 0 < self.done < self._total:
            return f'{self._name} … {seconds:.0f} s so far'
        units_rate = self.done / seconds
        amounts = (f'{amount / self._scale:,.0f}' for amount in (self.done, self._total))
        time_left = format_duration((self._total - self.done) / units_rate)
        return (
            f'{self._name} … {" of ".join(amounts)} {self._unit}, '
            f'{units_rate / self._scale:,.1f} {self._unit}/s, {time_left} left'
        )

    def __enter__(self) -> 'Work':
        self._start = time.monotonic()
        # A program without jax, such as the report, is one process and must not import it here.
        jax = sys.modules.get('jax')
        if jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0:
            self._thread = threading.Thread(target=self._report, daemon=True)
            self._thread.start()
        return self

    def _report(self) -> None:
        has_written = False
        while not self._ended.wait(INTERVAL):
            _write(self.line(time.monotonic() - self._start))
            has_written = True
        if has_written:
            _write(f'{self._name}: took {time.monotonic() - self._start:.0f} s')

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()


def work_if(is_long: bool, name: str) -> contextlib.AbstractContextManager[object]:
    """Return `Work(name)` if the task is long, and a context that does nothing otherwise."""
    return Work(name) if is_long else contextlib.nullcontext()


def _write(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a closed stderr must not stop the work
        print(line, file=sys.stderr, flush=True)


def track(items: Iterable[Item], name: str, total: float, unit: str) -> Iterator[Item]:
    """Yield the items, and report the number of items out of `total` with `Work`."""
    with Work(name, total, unit) as work:
        for item in items:
            yield item
            work.done += 1
