"""Lines on stderr while one long piece of work is under way, such as compiling or tokenizing."""

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
    """Reports a piece of work every `INTERVAL` seconds until it ends; shorter work is silent.

    A thread writes the lines, so that they also come while the work is inside one call. Of several
    processes the first alone writes.

        with Work('compiling'):
            compiled = lowered.compile()

        with Work('tokenizing', total=size, unit='MB', scale=1e6) as work:
            for piece in pieces:
                work.done += len(piece)

    Args:
      name: what is done, as 'compiling the training step'.
      total: how much there is to do; 0 if unknown.
      unit: what `total` counts, as it is written.
      scale: how many of what `total` counts are one unit.
    """

    def __init__(self, name: str, total: float = 0, unit: str = '', scale: float = 1):
        self.done = 0.0
        self._name, self._total, self._unit, self._scale = name, total, unit, scale
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._start = 0.0

    def line(self, seconds: float) -> str:
        """Return what is written after so many seconds: how far the work is, rate and time left."""
        if not 0 < self.done < self._total:
            return f'{self._name} … {seconds:.0f} s so far'
        rate = self.done / seconds
        counts = (f'{count / self._scale:,.0f}' for count in (self.done, self._total))
        left = format_duration((self._total - self.done) / rate)
        return (
            f'{self._name} … {" of ".join(counts)} {self._unit}, '
            f'{rate / self._scale:,.1f} {self._unit}/s, {left} left'
        )

    def __enter__(self) -> 'Work':
        self._start = time.monotonic()
        # A program without jax, as the report, is one process, and does not wait for its import.
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
    """Return the report of a piece of work that is long, such as the first of its kind."""
    return Work(name) if is_long else contextlib.nullcontext()


def _write(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed; the work goes on
        print(line, file=sys.stderr, flush=True)


def track(items: Iterable[Item], name: str, total: float, unit: str) -> Iterator[Item]:
    """Yield the items, and report how many of `total` have been yielded as `Work` does."""
    with Work(name, total, unit) as work:
        for item in items:
            yield item
            work.done += 1
