"""Submits a sweep to Slurm, as one array of jobs.

    python -m launch.slurm --sweep=experiments/lm_fusion.py --workdir=runs/lm_fusion \\
        --partition=gpu --gpus=1 --cores=8 --time=4:00:00 --parallel=16 --retries=1

It returns when they are in the queue; `launch.status` shows how they stand, and `--wait` waits for
them and writes the report. Given again, the command submits those that are neither finished nor in
the queue. The repository and the sweep directory have to be where the nodes see them, under the
same path. What is submitted is written to WORKDIR/slurm/sweep.sh and has nothing hidden in it.

A job that runs out of its time is warned, saves, and goes back to the queue, as long as it gets
further each time (`launch.restarts`); one that Slurm preempts, requeues, or loses with its node
saves if it can, and Slurm queues it again. All go on from what they saved, to the same bits.
`scancel` ends a job for good.
"""

import dataclasses
import math
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import flags

from launch import state
from launch.devices import Devices
from launch.engine import QUEUED, Commands, Resources, States
from mi.config import UserError
from mi.training.io import read_json, write_json
from mi.training.run_dir import PREEMPTED

PARTITION = flags.DEFINE_string('partition', '', 'Partition; the default one if left out.')
TIME = flags.DEFINE_string('time', '', "Limit of a job, such as '4:00:00'; that of the partition.")
GRES = flags.DEFINE_string('gres', '', "Of each node, such as 'gpu:a100:2'; in place of --gpus.")
WARNING = flags.DEFINE_integer(
    'warning',
    120,
    'Seconds before the limit at which a job saves and goes back to the queue.',
    lower_bound=1,
    upper_bound=65535,  # of sbatch --signal
)
SBATCH = flags.DEFINE_multi_string(
    'sbatch', [], 'Another option of sbatch, such as --sbatch=--account=me; any number of times.'
)
WAIT = flags.DEFINE_bool('wait', False, 'Wait until no member is in the queue, then report.')

# The batch script of one job. USR1 is for it alone and comes when time is nearly up; TERM comes to
# the processes too, when Slurm requeues or cancels the job, and what becomes of it is Slurm's then.
# A signal ends `wait` early, so that it is called until the step is gone. The lock is the one that
# launch.process holds for a run of this machine. A job that is warned before its run can save ends
# like one that has saved: launch.restarts tells whether it got further and goes back to the queue.
RUN = """\
mkdir -p "$path"
exec 9>>"$path/launched"
flock --timeout 5 9 || {{ echo "$path: runs already" >&2; exit 1; }}
job="${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
expired=
trap 'expired=1; scancel --signal=TERM "$job"' USR1
trap : TERM
for attempt in $(seq 0 {retries}); do
    srun {srun} "${{command[@]}}" >>"$path/log.txt" 2>&1 &
    step=$!
    wait $step
    code=$?
    while kill -0 $step 2>/dev/null; do
        wait $step
        code=$?
    done
    if [[ $code == 0 || $code == {preempted} ]]; then break; fi
done
if [[ -n $expired && $code == {preempted} ]]; then
    {restarts} "$path" >>"$path/log.txt" 2>&1 || exit 1
    exec scontrol requeue "$job"
fi
exit $code
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags say of the jobs; see there."""

    partition: str = ''
    time: str = ''
    gres: str = ''
    warning: int = 120
    sbatch: Sequence[str] = ()


def seconds(limit: str) -> float:
    """A time limit as Slurm reads it: MINUTES[:SECONDS], H:M:S, DAYS-H[:M[:S]]; inf for none.

    Raises:
      UserError: if it is none.
    """
    if limit.upper() in ('UNLIMITED', 'INFINITE', '-1'):
        return math.inf
    form = re.fullmatch(r'(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?', limit)
    if form is None:
        raise UserError(
            f"--time={limit}: expected MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS. Try '4:00:00'"
        )
    days, *parts = (None if part is None else int(part) for part in form.groups())
    numbers = [part for part in parts if part is not None]
    if days is None and len(numbers) < 3:
        numbers = [0, *numbers]  # of hours
    hours, minutes, rest = [*numbers, 0, 0][:3]
    return float((((days or 0) * 24 + (hours or 0)) * 60 + (minutes or 0)) * 60 + (rest or 0))


def refuse_short(options: Options) -> None:
    """Refuses jobs that would be warned before they have begun.

    Raises:
      UserError: if the time limit is not above the warning.
    """
    limits = [('--time=', options.time)] if options.time else []
    for option in options.sbatch:
        given = re.fullmatch(r'(--time=|--time |-t ?)(.+)', option.strip())
        if given:
            limits.append((f'--sbatch={given[1]}', given[2].strip()))
    for flag, limit in limits:
        if seconds(limit) <= options.warning:
            raise UserError(
                f'{flag}{limit}: expected more than --warning={options.warning} seconds, at which '
                f'a job is told to save. Try a longer time, or a shorter --warning'
            )


def script(commands: Commands, resources: Resources, options: Options, folder: pathlib.Path) -> str:
    """The batch script of an array of jobs, in the order of the commands.

    Args:
      commands: what is to run.
      resources: what each gets.
      options: what else is told to sbatch.
      folder: where the jobs' own output goes.
    """
    limit = f'%{resources.parallel}' if resources.parallel else ''
    asked = [
        f'--job-name={shlex.quote(folder.parent.name)}',
        f'--array=0-{len(commands) - 1}{limit}',
        f'--output={shlex.quote(str(folder / "%A_%a.txt"))}',
        '--open-mode=append',
        '--requeue',
        f'--signal=B:USR1@{options.warning}',
        f'--ntasks={resources.processes}',
    ]
    each = ['--kill-on-bad-exit=1', f'--ntasks={resources.processes}']
    if resources.cores:
        each.append(f'--cpus-per-task={resources.cores}')
        asked.append(each[-1])
    if options.gres:
        asked.append(f'--gres={options.gres}')
    elif resources.gpus:
        asked.append(f'--gpus-per-task={resources.gpus}')
    if options.partition:
        asked.append(f'--partition={options.partition}')
    if options.time:
        asked.append(f'--time={options.time}')
    together = ['--distributed=auto'] if resources.processes > 1 else []
    lines = ['#!/bin/bash', *(f'#SBATCH {option}' for option in [*asked, *options.sbatch])]
    lines += [f'cd {shlex.quote(os.getcwd())} || exit', 'case $SLURM_ARRAY_TASK_ID in']
    for i, (path, command) in enumerate(commands.items()):
        words = shlex.join([*command, *together])
        lines.append(f'{i}) path={shlex.quote(str(path))} command=({words}) ;;')
    lines.append('esac')
    run = RUN.format(
        retries=resources.retries,
        srun=shlex.join(each),
        preempted=PREEMPTED,
        restarts=shlex.join([sys.executable, '-m', 'launch.restarts']),
    )
    return '\n'.join(lines) + '\n' + run


def submit(commands: Commands, resources: Resources) -> States:
    """Puts those in the queue that are not there; returns at once, unless --wait.

    Raises:
      UserError: if Slurm is not here, or refuses.
    """
    if not commands:
        return {}
    folder = next(iter(commands)).parent / 'slurm'
    record = folder / 'jobs.json'  # name of a member → its newest job
    jobs: dict[str, str] = read_json(record) if record.exists() else {}
    options = Options(PARTITION.value, TIME.value, GRES.value, WARNING.value, SBATCH.value)
    refuse_short(options)
    there = queue()
    new = {path: command for path, command in commands.items() if jobs.get(path.name) not in there}
    if new:
        folder.mkdir(parents=True, exist_ok=True)
        batch = folder / 'sweep.sh'
        batch.write_text(script(new, resources, options, folder))
        job = _slurm('sbatch', '--parsable', str(batch)).partition(';')[0].strip()
        jobs |= {path.name: f'{job}_{i}' for i, path in enumerate(new)}
        try:
            write_json(record, jobs)
        except BaseException:  # the next launcher would not know of them
            _slurm('scancel', job)
            raise
        print(f'job {job}: {len(new)} members ({batch})')
    print(f'python -m launch.status --workdir={folder.parent}')
    if not WAIT.value:
        return dict.fromkeys(commands, QUEUED)
    while queue() & set(jobs.values()):
        time.sleep(2)
    return {path: state.read(path).word for path in commands}


def find_devices(resources: Resources) -> Devices:
    """Return the devices of a member, as far as the flags say."""
    each = resources.gpus or 1
    if GRES.value:  # of each node, and Slurm decides how many nodes there are
        form = re.search(r'gpu(?::[^:,]+)?(?::(\d+))?', GRES.value)
        each = int(form[1] or 1) if form else 1
        if resources.processes > 1:
            return Devices(0, resources.processes)
    return Devices(resources.processes * each, resources.processes)


def queue() -> set[str]:
    """The user's jobs that wait or run, as ARRAY_INDEX."""
    return set(_slurm('squeue', '--me', '--array', '--noheader', '--format=%i').split())


def _slurm(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(f'{command[0]}: not found; launch.slurm runs on a node of Slurm') from error
    if done.returncode:
        raise UserError(f'{command[0]}: {" ".join(done.stderr.split())}')
    return done.stdout


if __name__ == '__main__':
    from launch import cli

    cli.main('slurm', submit, find_devices)
