"""Topology 'threads' for minutes at full rate: memory, rate, lag and queue, and how it ends.

    pip install -e '.[envpool]' && python -m benchmarks.soak --minutes=10

A training run on four levels of BabyAI in a process of its own. A row a minute: resident memory of
the process, environment steps per second, the lag of the trajectories in updates, mean and largest,
how many were too old and dropped, and how full the queue was. At the end the process gets SIGTERM:
it must save and exit with 143.
"""

import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from absl import app, flags

from benchmarks import rl
from mi.training import host

MINUTES = flags.DEFINE_integer('minutes', 10, 'How long.', lower_bound=1)


def resident(process: int) -> float:
    """MiB."""
    status = pathlib.Path(f'/proc/{process}/status').read_text()
    return int(status.split('VmRSS:')[1].split()[0]) / 1024


def lines(path: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(argv: Sequence[str]) -> None:
    del argv
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder) / 'run'
        command = [
            sys.executable,
            '-m',
            'mi.main',
            '--config=configs/rl.py',
            f'--workdir={workdir}',
        ]
        changes = {
            'env.name': rl.LEVELS,
            'model.instruction': True,
            'model.sites': "('instruction',)",
            'train.topology': 'threads',
            'train.steps': 10**10,
            'train.log_every': 10,
        }
        command += [f'--config.{key}={value}' for key, value in changes.items()]
        print(f'{host.machine()}, {" ".join(command[1:])}\n', flush=True)
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            watch(process, workdir)
        finally:
            process.kill()


def watch(process: subprocess.Popen[bytes], workdir: pathlib.Path) -> None:
    """Prints a row a minute, from the first record on, and ends the run with SIGTERM."""
    while process.poll() is None and not lines(workdir / 'timing.jsonl'):
        time.sleep(0.5)
    print(f'{"minute":>6}{"MiB":>8}{"steps/s":>10}{"lag":>8}{"max":>6}{"dropped":>9}{"queue":>8}')
    seen = 0
    for minute in range(1, MINUTES.value + 1):
        time.sleep(60)
        if process.poll() is not None:
            sys.exit(f'error: the run ended with exit code {process.returncode}')
        timing = lines(workdir / 'timing.jsonl')[seen:]
        rows = [r for r in lines(workdir / 'metrics.jsonl') if r['split'] == 'train'][seen:]
        rows, timing = rows[: len(timing)], timing[: len(rows)]
        seen += len(rows)
        if not rows:
            sys.exit('error: no record in a minute')
        n, seconds = len(rows), sum(r['seconds'] for r in timing)
        steps = sum(r['seconds'] * r['steps_per_second'] for r in timing)
        print(
            f'{minute:6d}{resident(process.pid):8.0f}{steps / seconds:10,.0f}'
            f'{sum(r["lag"] for r in rows) / n:8.2f}{max(r["lag_max"] for r in rows):6.0f}'
            f'{sum(r["dropped"] for r in rows):9.0f}{sum(r["queue"] for r in timing) / n:8.1f}',
            flush=True,
        )
    process.send_signal(signal.SIGTERM)
    began = time.perf_counter()
    code = process.wait(120)
    state = json.loads((workdir / 'status.json').read_text())
    print(f'\nSIGTERM: exit code {code} after {time.perf_counter() - began:.1f} s, {state}')


if __name__ == '__main__':
    app.run(main)
