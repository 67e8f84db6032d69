"""Run a sweep on a Ray cluster and write its report. This needs the extra `ray`.

    python -m launch.ray --sweep=experiments/lm_fusion.py --workdir=runs/lm_fusion \\
        --address=auto --gpus=1 --cores=8 --retries=1

Each member is a task that starts its ordinary command in this directory and waits for it. No code
is sent, so the nodes need the repository, its Python environment and the sweep directory at the
same paths. Ray places each task by its cores and GPUs, and asks an autoscaling cluster for more
nodes. A member whose node is lost counts as failed, and with `--retries` it resumes from its
checkpoint. Without `--address`, a local Ray is started for the duration of the sweep.
"""

import logging
import os
import pathlib
import sys
import time
from typing import Any

from absl import flags

from launch import process
from launch.devices import Devices
from launch.engine import Commands, Resources, Rule, States
from launch.supervision import TICK, SweepMembers, supervise
from mi.config import UserError, suggest_install
from mi.training.lock import is_locked
from mi.training.run_state import PREEMPTED

CANCEL_INTERVAL = 10.0  # seconds between two cancellations of a task

ADDRESS = flags.DEFINE_string(
    'address', '', "Address of a Ray cluster: 'auto', 'HOST:PORT', 'ray://…'; '' for this machine."
)


def submit(commands: Commands, resources: Resources, rule: Rule | None = None) -> States:
    """Run members to completion, as many at a time as fit, and return the phase of each.

    Raises:
      UserError: if Ray is not installed, the cluster cannot be reached, or this machine has too few
        cores or GPUs.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f'launch.ray needs Ray, which is not installed. Try {suggest_install("ray")}'
        ) from error

    # Connect to the cluster, or start a Ray of this machine.
    init_options: dict[str, Any] = {'address': ADDRESS.value}
    if not ADDRESS.value:
        init_options = {'address': 'local', 'include_dashboard': False}
    search_path = filter(None, [os.getcwd(), os.environ.get('PYTHONPATH')])
    env_vars = {'PYTHONPATH': os.pathsep.join(search_path), 'PYTHONUNBUFFERED': '1'}
    try:
        ray.init(
            runtime_env={'env_vars': env_vars},
            log_to_driver=False,
            logging_level=logging.WARNING,
            **init_options,
        )
    except ConnectionError as error:
        raise UserError(f'--address={ADDRESS.value}: {error}') from error

    # Refuse what this machine does not have; a cluster may grow.
    for resource, flag, amount in (
        ('CPU', 'cores', resources.cores),
        ('GPU', 'gpus', resources.gpus),
    ):
        available = ray.cluster_resources().get(resource, 0)
        if amount * resources.processes > available and not ADDRESS.value:
            raise UserError(f'--{flag}={amount}: Ray finds only {available:.0f} on this machine')

    # Run the members.
    max_members = resources.parallel or len(commands)
    try:
        places = ClusterPlaces(resources, max_members)
        phases = supervise(SweepMembers(commands), places, resources.retries, rule)
    finally:
        ray.shutdown()
    return {run_dir: phases[run_dir.name] for run_dir in commands}


def find_devices(resources: Resources) -> Devices:
    """Return the devices of a member."""
    return Devices(resources.processes * (resources.gpus or 1), resources.processes)


class ClusterPlaces:
    """The nodes of a Ray cluster, on which Ray places the members.

    Args:
      resources: resources of each member.
      max_members: maximum number of members that run simultaneously.
    """

    def __init__(self, resources: Resources, max_members: int):
        self._resources, self._max_members = resources, max_members
        self._running: dict[pathlib.Path, ClusterMember] = {}

    def has_room(self) -> bool:
        return len(self._running) < self._max_members

    def adopt(self, run_dir: pathlib.Path) -> None:
        """Return None, because a task with a locked run directory adopts the run on its node."""

    def start(self, run_dir: pathlib.Path, command: list[str]) -> 'ClusterMember':
        self._running[run_dir] = member = ClusterMember(run_dir, command, self._resources)
        return member

    def release(self, run_dir: pathlib.Path) -> None:
        del self._running[run_dir]

    def stop_all(self) -> None:
        """Ask the members to save and end, and wait for a limited time.

        Ray may report a task as cancelled before the process that it started has ended. Therefore
        this waits for the locks of the run directories.
        """
        import ray

        # A cancellation can get lost in a busy Ray, so ask until every task has ended.
        pending = [task for member in self._running.values() for task in member.tasks]
        deadline = time.monotonic() + process.SAVE_TIMEOUT
        while pending and time.monotonic() < deadline:
            for task in pending:
                ray.cancel(task)
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=CANCEL_INTERVAL)

        deadline = time.monotonic() + process.SAVE_TIMEOUT
        while time.monotonic() < deadline and any(
            is_locked(path / 'lock') for path in self._running
        ):
            time.sleep(TICK)


class ClusterMember:
    """A member on the cluster, made of one task or several tasks that are placed together.

    Attributes:
      tasks: the tasks, one for each process.
    """

    def __init__(self, run_dir: pathlib.Path, command: list[str], resources: Resources):
        import ray
        from ray.util import scheduling_strategies

        # Start one task.
        num_cpus, num_gpus = resources.cores or 1, resources.gpus
        task = ray.remote(process.run).options(max_retries=0, num_cpus=num_cpus, num_gpus=num_gpus)
        arguments = str(run_dir.absolute()), command, os.getcwd()
        self._group: Any = None
        if resources.processes == 1:
            self.tasks = [task.remote(*arguments)]
            return

        # Reserve places for several tasks, so that all of them or none run.
        counts = {'CPU': num_cpus, 'GPU': num_gpus}
        bundle = {name: count for name, count in counts.items() if count}
        self._group = group = ray.util.placement_group(
            [bundle] * resources.processes, strategy='PACK'
        )

        def place(index: int, task: Any) -> Any:
            strategy = scheduling_strategies.PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=index
            )
            return task.options(scheduling_strategy=strategy)

        # Start them with the address of the first.
        address = place(0, ray.remote(_find_address).options(num_cpus=0)).remote()
        self.tasks = [
            place(i, task).remote(*arguments, address, resources.processes, i)
            for i in range(resources.processes)
        ]

    def poll(self) -> int | None:
        """Return the exit code, or None while a task is running. A lost task counts as failed."""
        import ray

        num_tasks = len(self.tasks)
        if len(ray.wait(self.tasks, num_returns=num_tasks, timeout=0)[0]) < num_tasks:
            return None
        exit_codes = []
        for task in self.tasks:
            try:
                exit_codes.append(int(ray.get(task)))
            except ray.exceptions.TaskCancelledError:
                exit_codes.append(PREEMPTED)
            except ray.exceptions.RayError as error:
                message = ' '.join(str(error).split())
                print(f'{type(error).__name__}: {message}', file=sys.stderr)
                exit_codes.append(1)
        if self._group is not None:
            ray.util.remove_placement_group(self._group)
        return next(
            (exit_code for exit_code in exit_codes if exit_code not in (0, PREEMPTED)),
            max(exit_codes),
        )

    def stop(self) -> None:
        """Do nothing, because `process.run` stops a member with a stop mark on its own node."""


def _find_address() -> str:
    """Return 'HOST:PORT' on this node, for a process that is about to start."""
    import ray

    return f'{ray.util.get_node_ip_address()}:{process.find_free_port()}'


if __name__ == '__main__':
    from launch import cli

    cli.main('ray', submit, find_devices, watches=True)
