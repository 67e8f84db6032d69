"""Checks that the config of a member uses all of its devices.

`find_warnings` is part of every dry run and does not compile anything. `check_member` runs
`python -m mi.estimate` on one member, which compiles its training step for its devices.
"""

import dataclasses
import math
import os
import shlex
import subprocess
from collections.abc import Sequence

import ml_collections

from launch.members import Member
from mi.config import UserError
from mi.training import placement, run_mesh

DEVICE_COUNT_FLAG = '--xla_force_host_platform_device_count'


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a member.

    Attributes:
      count: number of devices of all processes, or 0 if unknown.
      processes: number of processes of the member.
      topology: name of the devices in `mi.estimate.topologies`, such as 'v5e:4x4', or '' if
        unknown.
    """

    count: int
    processes: int = 1
    topology: str = ''


def find_warnings(members: Sequence[Member], devices: Devices) -> list[str]:
    """Return a line for each way in which members leave devices idle or repeat work.

    Args:
      members: the members of a sweep.
      devices: the devices of each member.
    """
    if devices.count < 2:
        return []
    member_names: dict[str, list[str]] = {}  # waste → members
    for member in members:
        if waste := describe_waste(member.config, devices):
            member_names.setdefault(waste, []).append(member.name)
    return [f'{waste} ({", ".join(names)})' for waste, names in member_names.items()]


def describe_waste(config: ml_collections.ConfigDict, devices: Devices) -> str:
    """Describe idle devices and repeated work, with the remedy, or return '' if there are none."""
    # Fit problems divide only seeds.
    count = devices.count
    if config.task in ('fit', 'search'):
        return _describe_idle_seeds(config, devices)

    # Language models and agents divide seeds and batch over a mesh. Agents that act outside the
    # learner's program train one seed.
    seeds, batch = run_mesh.count_mesh_seeds(config), config.train.batch
    try:
        shape = run_mesh.choose_run_mesh_shape(config, count)
    except UserError as error:
        return f'each member will fail on {count} devices: {error}'
    used_count = math.prod(shape)
    if used_count == count:
        return ''

    # Describe the idle devices, and what would use them.
    idle_count = count - used_count
    consequence = f'{idle_count} of {count} devices will be idle'
    if devices.processes > 1:
        consequence = (
            f'each member will fail, because {idle_count} of {count} devices would be idle'
        )
    runs = '1 seed' if seeds == 1 else f'{seeds} seeds'
    fsdp = shape[2]
    if config.train.mesh:
        advice = 'config.train.mesh = (), which uses as many devices as it can'
    elif count % fsdp:
        advice = f'config.train.fsdp = {math.gcd(count, fsdp)}'
    else:
        advice = f'config.train.batch = {-(-batch // count) * count}'
    return (
        f'{consequence}: config.train.batch = {batch} of {runs} divides over {used_count}. Try '
        f'{advice}'
    )


def _describe_idle_seeds(config: ml_collections.ConfigDict, devices: Devices) -> str:
    """Describe idle devices of a fit problem, which divides its seeds, or of a search.

    A search divides the pairs of a seed and a learning rate.
    """
    runs, kind = len(config.seeds), 'seeds'
    if config.task == 'search':
        runs, kind = runs * len(config.search.rates), 'pairs of a seed and a learning rate'
    count = devices.count
    share = placement.seeds_per_device(runs, count)
    idle_count = count + (-runs // share)
    if devices.processes > 1 and count * share > runs:
        waste = f'{count * share - runs} of {count * share} places will repeat the work of others'
    elif devices.processes == 1 and idle_count:
        waste = f'{idle_count} of {count} devices will be idle'
    else:
        return ''
    return f'{waste}: {runs} {kind} are placed {share} to a device. Try a multiple of {count}'


def check_member(member: Member, devices: Devices) -> bool:
    """Print the output of `mi.estimate` for a member and return whether it fits on its devices.

    Without a topology, the estimate is for the same number of CPU devices. It shows each device's
    share of the FLOPs and the bytes that it sends, but does not check the memory.

    Raises:
      UserError: if the number of devices is unknown.
    """
    if not devices.count:
        raise UserError('--check: expected a known number of devices. Try --gpus=COUNT')
    command = [arg for arg in member.command if not arg.startswith('--workdir=')]
    command[command.index('mi.main')] = 'mi.estimate'
    environment = dict(os.environ)
    if devices.topology:
        command.append(f'--topology={devices.topology}')
    else:
        environment['JAX_PLATFORMS'] = 'cpu'
        flags = [os.environ.get('XLA_FLAGS', ''), f'{DEVICE_COUNT_FLAG}={devices.count}']
        environment['XLA_FLAGS'] = ' '.join(flags)
    print(f'\ncheck: {member.name}\n{shlex.join(["python", *command[1:]])}', flush=True)
    return subprocess.run(command, env=environment).returncode == 0
