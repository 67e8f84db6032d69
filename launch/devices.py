"""Which devices a member gets, and whether its config gives all of them work.

`warnings` compiles nothing and is part of every dry run. `check` runs `python -m mi.estimate` on
one member, which compiles its training step for those devices.
"""

import dataclasses
import math
import os
import shlex
import subprocess
from collections.abc import Sequence

import ml_collections

from launch import sweep
from mi.config import UserError
from mi.training import placement, sharding

FORCED = '--xla_force_host_platform_device_count'


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a member.

    Attributes:
      count: of all its processes; 0 if it is not known before.
      processes: of the member.
      topology: their name for `mi.estimate.topologies`, such as 'v5e:4x4'; '' if the kind is not
        known.
    """

    count: int
    processes: int = 1
    topology: str = ''


def warnings(members: Sequence[sweep.Member], devices: Devices) -> list[str]:
    """Return a line for each kind of member that leaves devices without work of their own.

    Args:
      members: of a sweep.
      devices: of each member.
    """
    if devices.count < 2:
        return []
    names: dict[str, list[str]] = {}
    for member in members:
        if said := waste(sweep.parsed(member.command), devices):
            names.setdefault(said, []).append(member.name)
    return [f'{said} ({", ".join(of)})' for said, of in names.items()]


def waste(config: ml_collections.ConfigDict, devices: Devices) -> str:
    """Return how many devices have no work of their own, and what to change; '' if none."""
    count = devices.count
    if config.task in ('fit', 'search'):
        return _wasted_seeds(config, devices)
    # Agents that act outside the learner's program train one seed.
    has_seeds = config.task == 'lm' or config.train.topology == 'fused'
    seeds = len(config.seeds) if has_seeds else 1
    batch = config.train.batch
    try:
        fsdp = config.train.fsdp if config.task == 'lm' else 1
        shape = sharding.choose_mesh_shape(seeds, batch, fsdp, config.train.mesh, count)
    except UserError as error:
        return f'each member will be refused on {count} devices: {error}'
    used = math.prod(shape)
    if used == count:
        return ''
    what = f'{count - used} of {count} devices will be idle'
    if devices.processes > 1:
        what = f'each member will be refused, as {count - used} of {count} devices would be idle'
    enough = -(-batch // count) * count
    return (
        f'{what}: config.train.batch = {batch} of {seeds} seed{"s" * (seeds != 1)} divides over '
        f'{used}. Try config.train.batch = {enough}'
    )


def _wasted_seeds(config: ml_collections.ConfigDict, devices: Devices) -> str:
    """The same for fit problems, which divide nothing but seeds, in a search with their rates."""
    runs, what = len(config.seeds), 'seeds'
    if config.task == 'search':
        runs, what = runs * len(config.search.rates), 'pairs of a seed and a learning rate'
    count = devices.count
    share = placement.seeds_per_device(runs, count)
    idle = count + (-runs // share)
    if devices.processes > 1 and count * share > runs:
        waste = f'{count * share - runs} of {count * share} places will repeat the work of others'
    elif devices.processes == 1 and idle:
        waste = f'{idle} of {count} devices will be idle'
    else:
        return ''
    return f'{waste}: {runs} {what} are placed {share} to a device. Try a multiple of {count}'


def check(member: sweep.Member, devices: Devices) -> bool:
    """Print what `mi.estimate` says of a member on its devices; return whether it fits and divides.

    Without a topology the devices are those of a CPU, as many: the share of the FLOPs and what is
    sent are the same, and whether it fits is not known.

    Raises:
      UserError: if it is not known how many devices there are.
    """
    if not devices.count:
        raise UserError('--check: expected a known number of devices. Try --gpus=COUNT')
    words = [word for word in member.command if not word.startswith('--workdir=')]
    words[words.index('mi.main')] = 'mi.estimate'
    environment = dict(os.environ)
    if devices.topology:
        words.append(f'--topology={devices.topology}')
    else:
        environment['JAX_PLATFORMS'] = 'cpu'
        environment['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {FORCED}={devices.count}'
    print(f'\ncheck: {member.name}\n{shlex.join(["python", *words[1:]])}', flush=True)
    return subprocess.run(words, env=environment).returncode == 0
