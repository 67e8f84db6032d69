"""Run a sweep on this machine and write its report.

    python -m launch.local --sweep=experiments/quickstart.py --workdir=runs/quickstart --parallel=2
    python -m launch.local --sweep=… --workdir=… --gpus=1 --retries=2
    python -m launch.local --sweep=… --workdir=… --dry_run

The launcher skips finished members and resumes interrupted ones, so it is safe to run the same
command again at any time. If a launcher was killed with `kill -9`, the next one waits for the
members that are still running. If a member fails, the others continue, and the exit code is 1. On
Ctrl-C or SIGTERM, the running members save, and the exit code is 143.
"""

import os
import pathlib
import re

import jax

from launch import compilation_cache, process
from launch.devices import Devices
from launch.engine import Commands, Resources, Rule, States
from launch.supervision import SweepMembers, supervise
from mi.config import UserError
from mi.training.host import get_cores
from mi.training.lock import is_locked


def submit(commands: Commands, resources: Resources, rule: Rule | None = None) -> States:
    """Run members to completion, several at a time, and return the phase of each."""
    phases = supervise(SweepMembers(commands), Slots(resources), resources.retries, rule)
    return {run_dir: phases[run_dir.name] for run_dir in commands}


class Slots:
    """The slots for members on this machine, each with a share of the cores and its own GPUs.

    Raises:
      UserError: if the machine has too few GPUs.
    """

    def __init__(self, resources: Resources):
        self._resources = resources
        self._slots: dict[pathlib.Path, int] = {}  # run directory of a running member → its slot
        self._running: dict[pathlib.Path, process.Process | process.AdoptedProcess] = {}
        self._gpus = find_gpus() if resources.gpus else []
        gpus_per_member = resources.gpus * resources.processes
        if gpus_per_member > len(self._gpus):
            raise UserError(
                f'--gpus={resources.gpus}: expected at most the {len(self._gpus)} GPUs of this '
                f'machine (a member of {resources.processes} process(es) needs '
                f'{gpus_per_member}). Try fewer, or --gpus=0'
            )
        num_fitting = len(self._gpus) // gpus_per_member if gpus_per_member else 1
        self.count = resources.parallel or num_fitting
        if gpus_per_member and self.count > num_fitting:
            raise UserError(
                f'--parallel={self.count}: expected at most {num_fitting}, because this machine '
                f'has {len(self._gpus)} GPUs. Try --parallel=0'
            )

    def has_room(self) -> bool:
        return self._find_free_slot() is not None

    def adopt(self, run_dir: pathlib.Path) -> process.AdoptedProcess | None:
        if not is_locked(run_dir / 'launched'):
            return None
        self._slots[run_dir] = process.read_slot(run_dir)
        self._running[run_dir] = member = process.AdoptedProcess(run_dir / 'launched')
        return member

    def start(
        self, run_dir: pathlib.Path, command: list[str]
    ) -> process.Process | process.AdoptedProcess:
        """Start a member in the first free slot.

        Raises:
          ValueError: if no slot is free.
        """
        slot = self._find_free_slot()
        if slot is None:
            raise ValueError(f'{run_dir}: expected a free slot, but all {self.count} are taken')
        num_processes, gpus_per_process = self._resources.processes, self._resources.gpus
        cache = compilation_cache.prepare(run_dir.parent, self._resources.cache_megabytes)
        environments = [{'PYTHONUNBUFFERED': '1'} | cache for _ in range(num_processes)]
        if gpus_per_process:
            for process_index, environment in enumerate(environments):
                first = (slot * num_processes + process_index) * gpus_per_process
                gpus = self._gpus[first : first + gpus_per_process]
                environment['CUDA_VISIBLE_DEVICES'] = ','.join(gpus)
        options = process.ProcessOptions(
            num_processes, environments, self._choose_cores(slot), slot
        )
        member = process.start(run_dir, command, options)
        self._slots[run_dir], self._running[run_dir] = slot, member
        return member

    def release(self, run_dir: pathlib.Path) -> None:
        del self._slots[run_dir], self._running[run_dir]

    def stop_all(self) -> None:
        for member in self._running.values():
            member.stop()
        for member in self._running.values():
            member.wait()

    def _find_free_slot(self) -> int | None:
        """Return the first free slot, or None. A member whose slot is unknown also occupies one."""
        free_slots = set(range(self.count)) - set(self._slots.values())
        return min(free_slots) if free_slots and len(self._slots) < self.count else None

    def _choose_cores(self, slot: int) -> set[int]:
        """Return the cores of a slot. Small programs run best on a few dedicated cores."""
        cores = get_cores()
        if self._resources.cores:
            num_cores = self._resources.cores * self._resources.processes
            return {cores[(slot * num_cores + index) % len(cores)] for index in range(num_cores)}
        return set(cores[slot :: self.count]) or set(cores)


def find_devices(resources: Resources) -> Devices:
    """Return the devices of a member, which are its GPUs or all devices that its processes see."""
    devices_per_process = resources.gpus or len(find_gpus()) or jax.local_device_count()
    return Devices(resources.processes * devices_per_process, resources.processes)


def find_gpus() -> list[str]:
    """Return the GPUs that this process may use, named as in CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    if visible is not None:
        return [name for name in visible.split(',') if name]
    device_files = pathlib.Path('/dev').glob('nvidia[0-9]*')
    numbers = (match[0] for file in device_files if (match := re.search(r'\d+$', file.name)))
    return sorted(numbers, key=int)


if __name__ == '__main__':
    from launch import cli

    cli.main('local', submit, find_devices, watches=True)
