"""Submit a sweep to Slurm as an array of jobs.

    python -m launch.slurm --sweep=experiments/lm_fusion.py --workdir=runs/lm_fusion \\
        --partition=gpu --gpus=1 --cores=8 --time=4:00:00 --parallel=16 --retries=1

The command returns when the jobs are in the queue. `launch.status` shows their progress. With
`--wait`, the command waits for them and writes the report. If you repeat the command, it resubmits
members that are neither finished nor in the queue. The nodes must see the repository and the sweep
directory at the same paths. The complete batch script is WORKDIR/slurm/sweep.sh.

A job that nears its time limit receives a warning, saves, and returns to the queue as long as it
makes progress (`launch.restarts`). If Slurm preempts or requeues a job, or loses its node, the job
saves if it can, and Slurm queues it again. A resumed job continues from its checkpoint with
identical results. `scancel` ends a job for good.
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
from collections.abc import Collection, Sequence

from absl import flags

from launch import state
from launch.devices import Devices
from launch.engine import QUEUED, Commands, Resources, States
from mi.config import UserError
from mi.training.io import read_json, write_json
from mi.training.run_state import PREEMPTED

PARTITION = flags.DEFINE_string('partition', '', "Partition; '' for the default one.")
TIME = flags.DEFINE_string(
    'time', '', "Time limit of a job, such as '4:00:00'; '' for that of the partition."
)
GRES = flags.DEFINE_string('gres', '', "GPUs of each node, such as 'gpu:a100:2'; replaces --gpus.")
WARNING = flags.DEFINE_integer(
    'warning',
    120,
    'Seconds before the limit at which a job saves and goes back to the queue.',
    lower_bound=1,
    upper_bound=65535,  # the limit of sbatch --signal
)
SBATCH = flags.DEFINE_multi_string(
    'sbatch', [], 'Another option of sbatch, such as --sbatch=--account=me; may be repeated.'
)
WAIT = flags.DEFINE_bool('wait', False, 'Wait until no member is in the queue, then report.')

POLL_SECONDS = 10  # between two looks at the queue

# The batch script of one job. USR1 reaches only the script, when its time is nearly up. TERM also
# reaches the processes, when Slurm requeues or cancels the job, and then Slurm decides what
# follows. A signal ends `wait` early, so the script waits again until the step is gone. The lock is
# the one that launch.process holds for a run on this machine. A job that is warned before its run
# can save ends like one that has saved, so launch.restarts decides whether it goes back to the
# queue.
JOB_SCRIPT = """\
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
    """Options of the jobs, with the same names as the flags."""

    partition: str = ''
    time: str = ''
    gres: str = ''
    warning: int = 120
    sbatch: Sequence[str] = ()


def parse_time_limit(limit: str) -> float:
    """Convert a Slurm time limit to seconds, where inf means no limit.

    Slurm accepts MINUTES[:SECONDS], HOURS:MINUTES:SECONDS and DAYS-HOURS[:MINUTES[:SECONDS]].

    Raises:
      UserError: if the text is not a time limit.
    """
    if limit.upper() in ('UNLIMITED', 'INFINITE', '-1'):
        return math.inf
    match = re.fullmatch(r'(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?', limit)
    if match is None:
        raise UserError(
            f"--time={limit}: expected MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS. Try '4:00:00'"
        )
    days, *clock_parts = (None if group is None else int(group) for group in match.groups())
    numbers = [group for group in clock_parts if group is not None]
    if days is None and len(numbers) < 3:
        numbers = [0, *numbers]  # without days, the first of two numbers is minutes
    hours, minutes, remainder = [*numbers, 0, 0][:3]
    return float((((days or 0) * 24 + hours) * 60 + minutes) * 60 + remainder)


def refuse_short(options: Options) -> None:
    """Check that jobs are not warned about their time limit before they have begun.

    Raises:
      UserError: if the time limit is not longer than the warning.
    """
    limits = [('--time=', options.time)] if options.time else []
    for option in options.sbatch:
        match = re.fullmatch(r'(--time=|--time |-t ?)(.+)', option.strip())
        if match:
            limits.append((f'--sbatch={match[1]}', match[2].strip()))
    for flag, limit in limits:
        if parse_time_limit(limit) <= options.warning:
            raise UserError(
                f'{flag}{limit}: expected more than --warning={options.warning} seconds, the '
                f'time that a job has to save. Try a longer time, or a shorter --warning'
            )


def write_script(
    commands: Commands, resources: Resources, options: Options, folder: pathlib.Path
) -> str:
    """Return the batch script of an array of jobs, one for each command in order.

    Args:
      commands: run directory → command.
      resources: resources of each member.
      options: other options of sbatch.
      folder: directory for the output of the batch script.
    """
    # List the options of sbatch and of srun.
    array_limit = f'%{resources.parallel}' if resources.parallel else ''
    sbatch_options = [
        f'--job-name={shlex.quote(folder.parent.name)}',
        f'--array=0-{len(commands) - 1}{array_limit}',
        f'--output={shlex.quote(str(folder / "%A_%a.txt"))}',
        '--open-mode=append',
        '--requeue',
        f'--signal=B:USR1@{options.warning}',
        f'--ntasks={resources.processes}',
    ]
    srun_options = ['--kill-on-bad-exit=1', f'--ntasks={resources.processes}']
    if resources.cores:
        srun_options.append(f'--cpus-per-task={resources.cores}')
        sbatch_options.append(f'--cpus-per-task={resources.cores}')
    if options.gres:
        sbatch_options.append(f'--gres={options.gres}')
    elif resources.gpus:
        sbatch_options.append(f'--gpus-per-task={resources.gpus}')
    if options.partition:
        sbatch_options.append(f'--partition={options.partition}')
    if options.time:
        sbatch_options.append(f'--time={options.time}')

    # Write a line for each command, and the common rest.
    distributed = ['--distributed=auto'] if resources.processes > 1 else []
    sbatch_options += options.sbatch
    script_lines = ['#!/bin/bash', *(f'#SBATCH {option}' for option in sbatch_options)]
    script_lines += [f'cd {shlex.quote(os.getcwd())} || exit', 'case $SLURM_ARRAY_TASK_ID in']
    for task_index, (run_dir, command) in enumerate(commands.items()):
        arguments = shlex.join([*command, *distributed])
        script_lines.append(
            f'{task_index}) path={shlex.quote(str(run_dir))} command=({arguments}) ;;'
        )
    script_lines.append('esac')
    job_script = JOB_SCRIPT.format(
        retries=resources.retries,
        srun=shlex.join(srun_options),
        preempted=PREEMPTED,
        restarts=shlex.join([sys.executable, '-m', 'launch.restarts']),
    )
    return '\n'.join(script_lines) + '\n' + job_script


def submit(commands: Commands, resources: Resources) -> States:
    """Submit the members that are not in the queue. With --wait, wait for them.

    Raises:
      UserError: if Slurm is not installed, or rejects the jobs.
    """
    if not commands:
        return {}

    # Find the members that are not in the queue.
    folder = next(iter(commands)).parent / 'slurm'
    jobs_file = folder / 'jobs.json'  # name of a member → its newest job
    job_ids: dict[str, str] = read_json(jobs_file) if jobs_file.exists() else {}
    options = Options(PARTITION.value, TIME.value, GRES.value, WARNING.value, SBATCH.value)
    refuse_short(options)
    queued_jobs = read_queue()
    new_commands = {
        run_dir: command
        for run_dir, command in commands.items()
        if job_ids.get(run_dir.name) not in queued_jobs
    }

    # Submit them, and note their jobs.
    if new_commands:
        folder.mkdir(parents=True, exist_ok=True)
        batch_script = folder / 'sweep.sh'
        batch_script.write_text(write_script(new_commands, resources, options, folder))
        job_id = run_slurm('sbatch', '--parsable', str(batch_script)).partition(';')[0].strip()
        job_ids |= {
            run_dir.name: f'{job_id}_{task_index}'
            for task_index, run_dir in enumerate(new_commands)
        }
        try:
            write_json(jobs_file, job_ids)
        except BaseException:  # a job that is not noted would be submitted twice; raised again
            run_slurm('scancel', job_id)
            raise
        print(f'job {job_id}: {len(new_commands)} members ({batch_script})')
    print(f'python -m launch.status --workdir={folder.parent}')

    # Wait for all members if asked to.
    if not WAIT.value:
        return dict.fromkeys(commands, QUEUED)
    while is_queued(set(job_ids.values())):
        time.sleep(POLL_SECONDS)
    return {run_dir: state.read_member_state(run_dir).phase for run_dir in commands}


def find_devices(resources: Resources) -> Devices:
    """Return the devices of a member, to the extent that the flags determine them."""
    devices_per_process = resources.gpus or 1
    if GRES.value:  # it counts GPUs of a node, and Slurm chooses the number of nodes
        match = re.search(r'gpu(?::[^:,]+)?(?::(\d+))?', GRES.value)
        devices_per_process = int(match[1] or 1) if match else 1
        if resources.processes > 1:
            return Devices(0, resources.processes)
    return Devices(resources.processes * devices_per_process, resources.processes)


def is_queued(job_ids: Collection[str]) -> bool:
    """Return whether a job is waiting or running, or whether Slurm did not answer."""
    try:
        return not read_queue().isdisjoint(job_ids)
    except UserError as error:  # it often answers again later
        print(f'warning: {error}', file=sys.stderr)
        return True


def read_queue() -> set[str]:
    """Return the user's waiting and running jobs, as ARRAY_INDEX."""
    return set(run_slurm('squeue', '--me', '--array', '--noheader', '--format=%i').split())


def run_slurm(*command: str) -> str:
    """Run a Slurm command and return its output.

    Raises:
      UserError: if Slurm is not installed, or the command fails.
    """
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(f'{command[0]}: not found. Run launch.slurm on a Slurm node') from error
    if result.returncode:
        raise UserError(f'{command[0]}: {" ".join(result.stderr.split())}')
    return result.stdout


if __name__ == '__main__':
    from launch import cli

    cli.main('slurm', submit, find_devices)
