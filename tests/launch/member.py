"""A run in a few lines, for tests that need many: counts to --steps, one line of metrics a step.

It keeps a run directory as `mi.training.run_dir` does, with a lock, a status, and a state that it
resumes from (the number of lines). It saves at every step, and exits with 143 after SIGTERM. Every
start is recorded in starts.jsonl, so that a test can tell what ran twice. The first --fails starts
fail.
"""

import fcntl
import json
import os
import pathlib
import signal
import sys
import time


def main():
    flags = dict(argument[2:].split('=', 1) for argument in sys.argv[1:])
    path, steps = pathlib.Path(flags['workdir']), int(flags['steps'])
    seconds = float(flags.get('seconds', 0))
    path.mkdir(parents=True, exist_ok=True)
    lock = open(path / 'lock', 'w')  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)  # `launched` keeps a second one away
    received_signals = []
    signal.signal(signal.SIGTERM, lambda number, frame: received_signals.append(number))

    def status(state, step, reason=None):
        beside = path / '.status'
        beside.write_text(
            json.dumps({'state': state, 'step': step, 'reason': reason, 'pid': os.getpid()})
        )
        os.replace(beside, path / 'status.json')

    def write(name, **values):
        with open(path / name, 'a') as file:
            file.write(json.dumps(values) + '\n')

    records = path / 'metrics.jsonl'
    num_done = len(records.read_text().splitlines()) if records.exists() else 0
    cores = sorted(os.sched_getaffinity(0))
    cuda = os.environ.get('CUDA_VISIBLE_DEVICES')
    write('starts.jsonl', step=num_done, pid=os.getpid(), cuda=cuda, cores=cores)
    (path / '.cost').write_text(json.dumps({'steps': steps}))
    os.replace(path / '.cost', path / 'cost.json')
    status('running', num_done)
    starts = len((path / 'starts.jsonl').read_text().splitlines())
    if starts <= int(flags.get('fails', 0)):
        status('failed', num_done, 'ValueError: so it was asked')
        print('ValueError: so it was asked', file=sys.stderr)
        sys.exit(1)
    if 'stops' in flags:  # as if it were asked to after this number of steps
        stop_at = num_done + int(flags['stops'])
        if stop_at == num_done:
            status('preempted', num_done)
            sys.exit(143)
    else:
        stop_at = steps
    for step in range(num_done + 1, steps + 1):
        time.sleep(seconds)
        loss = float(flags.get('scale', 1)) / step
        write('metrics.jsonl', step=step, seed=0, split='train', loss=loss)
        write('timing.jsonl', step=step, seconds=seconds, steps_per_second=1 / max(seconds, 1e-9))
        if (received_signals or step == stop_at) and step < steps:
            status('preempted', step)
            sys.exit(143)
    status('done', steps)


if __name__ == '__main__':
    main()
