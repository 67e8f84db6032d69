"""Sides of a comparison in processes of their own, which take turns.

In one process the threads of two frameworks disturb each other. Two runs after another would meet
two different machines. So each side has its process, sleeps while another has its turn, and is
compared round by round.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

PAUSE = 0.3  # seconds; the threads of the side before spin for a while


def serve(step: Callable[[], object], seconds: float = 0.7) -> None:
    """In a side's process: for each line that is read, times steps for about so many seconds.

    A call that does not do one step returns how many it did, as a float.
    """
    step()  # compiles
    repeats, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:  # the first ones may find work that was queued
        step()
        repeats += 1
    print('ready', flush=True)
    for _ in sys.stdin:
        step()
        start = time.perf_counter()
        done = [step() for _ in range(repeats)]
        steps = sum(n if isinstance(n, float) else 1 for n in done)
        print((time.perf_counter() - start) / steps, flush=True)


def race(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each side, by round.

    Args:
      commands: side → arguments of python, which end in `serve`.

    Raises:
      RuntimeError: if a side ends; its own message has gone to stderr.
    """
    workers: dict[str, subprocess.Popen[str]] = {}

    def answer(side: str) -> str:
        worker = workers[side]
        assert worker.stdout is not None
        line = worker.stdout.readline()
        if not line:
            raise RuntimeError(f'{side} ended with exit code {worker.wait()}')
        return line

    def ready(side: str) -> None:
        while answer(side) != 'ready\n':
            pass

    try:
        together = len(os.sched_getaffinity(0)) >= 2 * len(commands)
        for side, arguments in commands.items():
            workers[side] = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            if not together:  # on few cores one after another, to build in peace
                ready(side)
        if together:
            for side in commands:
                ready(side)
        seconds: dict[str, list[float]] = {side: [] for side in commands}
        for i in range(rounds):
            for side in list(commands) if i % 2 else list(commands)[::-1]:
                time.sleep(PAUSE)
                worker = workers[side]
                assert worker.stdin is not None
                worker.stdin.write('\n')
                worker.stdin.flush()
                seconds[side].append(float(answer(side)))
        return seconds
    finally:
        for worker in workers.values():
            worker.kill()
