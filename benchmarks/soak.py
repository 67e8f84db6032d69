"""A soak test of the topology 'threads', which tracks memory, speed, lag and the queue.

    pip install -e '.[sweep,envpool]' && python -m benchmarks.soak --minutes=10

The test trains on four levels of BabyAI in a subprocess, and prints a row per minute: resident
memory, environment steps per second, mean and largest lag of the trajectories in updates, dropped
trajectories, and trajectories in the queue. At the end it sends SIGTERM to the subprocess, which
must save and exit with 143.
"""

import json
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from absl import flags

from benchmarks import babyai, options
from mi.training import host

MINUTES = flags.DEFINE_integer('minutes', 10, 'Length of the test.', lower_bound=1)


def resident_memory(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    status_text = pathlib.Path(f'/proc/{pid}/status').read_text()
    return int(status_text.split('VmRSS:')[1].split()[0]) / 1024


def read_records(path: pathlib.Path) -> list[dict[str, float]]:
    """Return the records in a JSONL file, or [] if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(argv: Sequence[str]) -> None:
    """Start the training run and watch it."""
    del argv
    with tempfile.TemporaryDirectory() as temporary_dir:
        workdir = pathlib.Path(temporary_dir) / 'run'
        command = [
            sys.executable,
            '-m',
            'mi.main',
            '--config=configs/rl.py',
            f'--workdir={workdir}',
        ]
        overrides = {
            **babyai.SETTINGS,
            'train.steps': 10**10,
            'train.log_every': 10,
        }
        command += [f'--config.{config_key}={setting}' for config_key, setting in overrides.items()]
        print(f'{host.describe_machine()}, {" ".join(command[1:])}\n', flush=True)
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            watch(process, workdir)
        finally:
            process.kill()


def watch(process: subprocess.Popen[bytes], workdir: pathlib.Path) -> None:
    """Print a row per minute after the first record, then stop the run with SIGTERM."""
    # Wait for the first record.
    while process.poll() is None and not read_records(workdir / 'timing.jsonl'):
        time.sleep(0.5)
    print(f'{"minute":>6}{"MiB":>8}{"steps/s":>10}{"lag":>8}{"max":>6}{"dropped":>9}{"queue":>8}')
    num_read = 0
    for minute in range(1, MINUTES.value + 1):
        time.sleep(60)
        if process.poll() is not None:
            sys.exit(f'error: the run ended early with exit code {process.returncode}')
        # Take the new records that both files have.
        timings = read_records(workdir / 'timing.jsonl')[num_read:]
        metrics = read_records(workdir / 'metrics.jsonl')
        updates = [record for record in metrics if record['split'] == 'train'][num_read:]
        updates, timings = updates[: len(timings)], timings[: len(updates)]
        num_read += len(updates)
        if not updates:
            sys.exit('error: no record in a minute')
        seconds = sum(record['seconds'] for record in timings)
        num_steps = sum(record['seconds'] * record['steps_per_second'] for record in timings)
        mean_lag = statistics.mean(record['lag'] for record in updates)
        mean_queue = statistics.mean(record['queue'] for record in timings)
        print(
            f'{minute:6d}{resident_memory(process.pid):8.0f}{num_steps / seconds:10,.0f}'
            f'{mean_lag:8.2f}{max(record["lag_max"] for record in updates):6.0f}'
            f'{sum(record["dropped"] for record in updates):9.0f}{mean_queue:8.1f}',
            flush=True,
        )
    stop(process, workdir)


def stop(process: subprocess.Popen[bytes], workdir: pathlib.Path) -> None:
    """Stop the run with SIGTERM and print its exit code, which must be 143, and its status."""
    process.send_signal(signal.SIGTERM)
    stop_time = time.perf_counter()
    exit_code = process.wait(120)
    save_seconds = time.perf_counter() - stop_time
    run_status = json.loads((workdir / 'status.json').read_text())
    print(f'\nSIGTERM: exit code {exit_code} after {save_seconds:.1f} s, {run_status}')
    if exit_code != 143:
        sys.exit(f'error: expected exit code 143 after SIGTERM, got {exit_code}')


if __name__ == '__main__':
    options.run(main)
