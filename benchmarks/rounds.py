"""A race between the sides of a comparison, in processes that take turns.

In one process the threads of two frameworks would disturb each other. Two consecutive runs would
see a machine in two states. So each side has its own process, sleeps during the turns of the rest,
and is compared round by round.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from mi.training import host

Result = TypeVar('Result')

PAUSE = 0.3  # seconds until the threads of the previous side have stopped spinning


def serve(step: Callable[[], object], seconds: float = 0.7) -> None:
    """Time steps for every line on stdin, in the process of a side.

    Args:
      step: runs one step, or returns the number of steps that it ran, as a float.
      seconds: approximate length of a round.
    """
    step()  # compile
    num_calls, start_time = 0, time.perf_counter()
    while time.perf_counter() < start_time + seconds:  # the first ones may wait for queued work
        step()
        num_calls += 1
    print('ready', flush=True)
    for _ in sys.stdin:
        step()
        start_time = time.perf_counter()
        results = [step() for _ in range(num_calls)]
        num_steps = sum(result if isinstance(result, float) else 1 for result in results)
        print((time.perf_counter() - start_time) / num_steps, flush=True)


def serve_turns(take_turn: Callable[[], object]) -> None:
    """Print the result of a turn as JSON for every line on stdin, in the process of a side."""
    print('ready', flush=True)
    for _ in sys.stdin:
        print(json.dumps(take_turn()), flush=True)


def race(
    commands: Mapping[str, Sequence[str]], rounds: int, parse: Callable[[str], Result] = float
) -> dict[str, list[Result]]:
    """Return the seconds per step by side and round.

    Args:
      commands: side → arguments of python that run `serve`.
      rounds: number of rounds.
      parse: reads the line of a round; `json.loads` for sides that run `serve_turns`.

    Raises:
      RuntimeError: if a side ends; its message is on stderr.
    """
    workers: dict[str, subprocess.Popen[str]] = {}

    def read_line(side: str) -> str:
        worker = workers[side]
        assert worker.stdout is not None
        answer = worker.stdout.readline()
        if not answer:
            raise RuntimeError(f'{side} ended with exit code {worker.wait()}')
        return answer

    def wait_until_ready(side: str) -> None:
        while read_line(side) != 'ready\n':
            pass

    try:
        # Start all sides, and let them compile simultaneously if there are cores for it.
        is_parallel = len(host.get_cores()) >= 2 * len(commands)
        for side, arguments in commands.items():
            workers[side] = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            if not is_parallel:  # start one at a time on few cores
                wait_until_ready(side)
        if is_parallel:
            for side in commands:
                wait_until_ready(side)

        # Let the sides take turns; every other round reverses their order.
        results: dict[str, list[Result]] = {side: [] for side in commands}
        for round_index in range(rounds):
            for side in list(commands) if round_index % 2 else list(commands)[::-1]:
                time.sleep(PAUSE)
                worker = workers[side]
                assert worker.stdin is not None
                worker.stdin.write('\n')
                worker.stdin.flush()
                results[side].append(parse(read_line(side)))
        return results
    finally:
        for worker in workers.values():
            worker.kill()
