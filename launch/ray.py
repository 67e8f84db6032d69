"""Runs a sweep on a Ray cluster and writes its report; needs the extra `ray`.

    python -m launch.ray --sweep=experiments/lm_fusion.py --workdir=runs/lm_fusion \\
        --address=auto --gpus=1 --cores=8 --retries=1

Each member is a task that starts its ordinary command in this directory and waits for it; no code
is sent. So the repository, its Python and the sweep directory have to be where the nodes see them,
under the same path. Ray finds each a place by its cores and GPUs, and asks an autoscaling cluster
for more nodes. A member whose node is lost counts as failed, and goes on from what it saved where
--retries says so. Without --address a Ray of this machine is started for the time of the sweep.
"""

import logging
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from absl import flags

from launch import engine, local, process
from launch.devices import Devices
from launch.engine import Commands, Resources, Rule, States
from mi.config import UserError, suggest_install
from mi.training.lock import is_locked
from mi.training.run_dir import PREEMPTED

ADDRESS = flags.DEFINE_string(
    'address', '', "Of a Ray cluster: 'auto', 'HOST:PORT', 'ray://…'; left out, this machine."
)


def submit(commands: Commands, resources: Resources, rule: Rule | None = None) -> States:
    """Runs them to their ends, as many at once as there is room for; what became of each.

    Raises:
      UserError: if Ray is not installed, the cluster is not there, or no node has so much.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f'launch.ray needs Ray, which is not installed. Try {suggest_install("ray")}'
        ) from error
    where: dict[str, Any] = {'address': ADDRESS.value}
    if not ADDRESS.value:
        where = {'address': 'local', 'include_dashboard': False}
    there = {'PYTHONPATH': os.getcwd(), 'PYTHONUNBUFFERED': '1'}
    try:
        ray.init(
            runtime_env={'env_vars': there},
            log_to_driver=False,
            logging_level=logging.WARNING,
            **where,
        )
    except ConnectionError as error:
        raise UserError(f'--address={ADDRESS.value}: {error}') from error
    needs = {'num_cpus': resources.cores or 1, 'num_gpus': resources.gpus}
    for kind, flag in (('CPU', 'cores'), ('GPU', 'gpus')):
        has, wants = ray.cluster_resources().get(kind, 0), getattr(resources, flag)
        if wants * resources.processes > has and not ADDRESS.value:  # a cluster may grow
            raise UserError(f'--{flag}={wants}: Ray finds {has:.0f} of them on this machine')
    attempts, watch = engine.Attempts(resources.retries), local.Watch(list(commands))
    waiting, states = list(commands), States()
    running: dict[pathlib.Path, _Run] = {}
    try:
        with local.supervising(watch, lambda: _stop_all(running)) as heed:
            while waiting or running:
                heed()
                while waiting and len(running) < (resources.parallel or len(commands)):
                    path = waiting.pop(0)
                    running[path] = _Run(path, commands[path], resources.processes, needs)
                time.sleep(local.TICK)
                for path, member in list(running.items()):
                    if (code := member.poll()) is None:
                        continue
                    del running[path]
                    states[path], again, said = attempts.ended(path, code)
                    if said:
                        watch.say(said)
                    if again:
                        waiting.append(path)
                watch.update(rule)
    finally:
        ray.shutdown()
    return states


def find_devices(resources: Resources) -> Devices:
    """Return the devices of a member."""
    return Devices(resources.processes * (resources.gpus or 1), resources.processes)


def _stop_all(running: Mapping[pathlib.Path, '_Run']) -> None:
    """Ask the members to save, and wait for a while until they have.

    Ray may call a task cancelled before the process that it started has ended, so the locks of the
    run directories decide.
    """
    import ray

    left = [task for member in running.values() for task in member.tasks]
    for task in left:
        ray.cancel(task)
    if left:
        ray.wait(left, num_returns=len(left), timeout=process.SAVING)
    deadline = time.monotonic() + process.SAVING
    while any(is_locked(path / 'lock') for path in running) and time.monotonic() < deadline:
        time.sleep(local.TICK)


class _Run:
    """A member on the cluster: one task, or several that are placed at once and join each other."""

    def __init__(self, path: pathlib.Path, command: list[str], processes: int, needs: Any):
        import ray
        from ray.util import scheduling_strategies

        task = ray.remote(process.run).options(max_retries=0, **needs)
        arguments = str(path.absolute()), command, os.getcwd()
        self._group: Any = None
        if processes == 1:
            self.tasks = [task.remote(*arguments)]
            return
        bundle = {'CPU': needs['num_cpus'], 'GPU': needs['num_gpus']}
        bundle = {name: number for name, number in bundle.items() if number}
        self._group = group = ray.util.placement_group([bundle] * processes, strategy='PACK')

        def at(index: int, task: Any) -> Any:
            strategy = scheduling_strategies.PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=index
            )
            return task.options(scheduling_strategy=strategy)

        address = at(0, ray.remote(_address).options(num_cpus=0)).remote()
        self.tasks = [
            at(i, task).remote(*arguments, address, processes, i) for i in range(processes)
        ]

    def poll(self) -> int | None:
        """The exit code; None as long as one of its tasks runs. A task that Ray lost has failed."""
        import ray

        if len(ray.wait(self.tasks, num_returns=len(self.tasks), timeout=0)[0]) < len(self.tasks):
            return None
        codes = []
        for task in self.tasks:
            try:
                codes.append(int(ray.get(task)))
            except ray.exceptions.TaskCancelledError:
                codes.append(PREEMPTED)
            except ray.exceptions.RayError as error:
                said = ' '.join(str(error).split())
                print(f'{type(error).__name__}: {said}', file=sys.stderr)
                codes.append(1)
        if self._group is not None:
            ray.util.remove_placement_group(self._group)
        return next((code for code in codes if code not in (0, PREEMPTED)), max(codes))


def _address() -> str:
    """'HOST:PORT' of a node, at which the others may reach a process that is about to start."""
    import ray

    return f'{ray.util.get_node_ip_address()}:{process.free_port()}'


if __name__ == '__main__':
    from launch import cli

    cli.main('ray', submit, find_devices, watches=True)
