"""A timed comparison of several sides, in processes that take turns.

A side is one of the implementations to compare. In one process, the threads of two frameworks would
disturb each other, and the state of the machine may change between two runs. Therefore each side
has its own process, sleeps while the others run, and is compared round by round.
"""

import json
import operator
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import jax

from mi.training import host

Result = TypeVar('Result')

PAUSE = 0.3  # seconds until the threads of the previous side have stopped spinning


def serve(
    step: Callable[[], object],
    seconds: float = 0.7,
    read_clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Time a round of steps for every line on stdin, in the process of a side.

    Args:
      step: function that runs one step, or runs several and returns their number as a float. A step
        may return arrays that are still being computed. The clock waits for those of the last step.
      seconds: approximate duration of a round.
      read_clock: clock of the measurement.
    """
    step()  # compile
    num_calls, start_time = 0, read_clock()
    while read_clock() < start_time + seconds:  # the first ones may wait for queued work
        step()
        num_calls += 1
    print('ready', flush=True)
    for _ in sys.stdin:
        jax.block_until_ready(step())
        start_time = read_clock()
        results = [step() for _ in range(num_calls)]
        jax.block_until_ready(results[-1])
        num_steps = sum(result if isinstance(result, float) else 1 for result in results)
        print((read_clock() - start_time) / num_steps, flush=True)


def serve_turns(take_turn: Callable[[], object]) -> None:
    """Run a turn for every line on stdin and print its result as JSON, in the process of a side."""
    print('ready', flush=True)
    for _ in sys.stdin:
        print(json.dumps(take_turn()), flush=True)


def race(
    commands: Mapping[str, Sequence[str]],
    rounds: int,
    parse: Callable[[str], Result] = float,
    stopped: Collection[str] = (),
) -> dict[str, list[Result]]:
    """Run all sides in turns, and return side → result of each round (seconds per step).

    Args:
      commands: side → arguments of the Python process that runs `serve`.
      rounds: number of rounds.
      parse: function that parses the output of a round, such as `json.loads` for sides that run
        `serve_turns`.
      stopped: sides whose threads would work between their turns, such as those with actors. Their
        processes get SIGSTOP after a turn, and SIGCONT at the next one.

    Raises:
      RuntimeError: if a process ends early. Its message is on stderr.
    """
    workers: dict[str, subprocess.Popen[str]] = {}

    def read_line(side: str) -> str:
        worker = workers[side]
        assert worker.stdout is not None
        answer = worker.stdout.readline()
        if not answer:
            raise RuntimeError(f'{side} ended early with exit code {worker.wait()}')
        return answer

    def wait_until_ready(side: str) -> None:
        while read_line(side) != 'ready\n':
            pass
        stop(side)

    def stop(side: str) -> None:
        if side in stopped:
            workers[side].send_signal(signal.SIGSTOP)

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
                if side in stopped:
                    worker.send_signal(signal.SIGCONT)
                worker.stdin.write('\n')
                worker.stdin.flush()
                results[side].append(parse(read_line(side)))
                stop(side)
        return results
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()  # wait and close its pipes


def print_ratios(
    title: str,
    unit: str,
    step_sizes: Mapping[str, int],
    seconds: Mapping[str, Sequence[float]],
) -> list[dict[str, Any]]:
    """Print and return a row for each side of a race.

    Args:
      title: title of the table.
      unit: what a step processes, such as 'tokens'.
      step_sizes: side → number of units per step.
      seconds: side → seconds per step in each round. The first side is the peer of the ratios.
    """
    peer = next(iter(seconds))
    figures = []
    print(f'\n{title}\n{"":<20}{"ms a step":>12}{unit + "/s":>12}{"× " + peer:>22}  range')
    for side, side_seconds in seconds.items():
        ratios = list(map(operator.truediv, seconds[peer], side_seconds))
        median_seconds, median_ratio = statistics.median(side_seconds), statistics.median(ratios)
        rate = step_sizes[side] / median_seconds
        print(
            f'{side:<20}{1000 * median_seconds:12.2f}{rate:12,.0f}{median_ratio:22.2f}  '
            f'{min(ratios):.2f}–{max(ratios):.2f}',
            flush=True,
        )
        figures.append(
            {
                'side': side,
                'seconds': median_seconds,
                f'{unit}_per_second': rate,
                'ratio': median_ratio,
                'ratios': ratios,
                'seconds_by_round': list(side_seconds),
            }
        )
    return figures
