"""The TPU slices that GKE offers, with their hosts and the chips of each host.

Source: "Plan TPUs in GKE", https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, and
the page of each generation, such as https://docs.cloud.google.com/tpu/docs/v5e. The v5p slice of
two chips and the largest v4 slice are recalled.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from mi.config import UserError, suggest

TOPOLOGIES_2D = ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
TOPOLOGIES_3D = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4')
CUBE_SIDE = 4  # chips along each side of a cube; larger slices consist of cubes


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of TPUs.

    Attributes:
      name: name in the topologies of `mi.estimate`, such as 'v5e' in 'v5e:4x4'.
      machines: machine type → topologies. The last number in a machine type is its number of chips.
      max_chips: number of chips in the largest slice made of cubes, or 0 if `machines` lists all
        topologies.
      devices_per_chip: number of JAX devices per chip.
    """

    name: str
    machines: Mapping[str, Sequence[str]]
    max_chips: int = 0
    devices_per_chip: int = 1

    def describe_topologies(self) -> str:
        """Return the topologies as text."""
        machines = self.machines.values()
        names = list(dict.fromkeys(name for topologies in machines for name in topologies))
        if not self.max_chips:
            return f'{", ".join(names[:-1])} or {names[-1]}'
        return (
            f'{", ".join(names)}, or AxBxC of multiples of {CUBE_SIDE} with A ≤ B ≤ C and at most '
            f'{self.max_chips:,} chips'
        )


GENERATIONS = {
    'tpu-v4-podslice': Generation('v4', {'ct4p-hightpu-4t': TOPOLOGIES_3D}, max_chips=12 * 16 * 16),
    'tpu-v5-lite-podslice': Generation(
        'v5e',
        {
            'ct5lp-hightpu-1t': ('1x1',),
            'ct5lp-hightpu-4t': TOPOLOGIES_2D,
            'ct5lp-hightpu-8t': ('2x4',),
        },
    ),
    'tpu-v5p-slice': Generation(
        'v5p',
        {
            'ct5p-hightpu-1t': ('1x1x1',),
            'ct5p-hightpu-2t': ('2x1x1',),
            'ct5p-hightpu-4t': TOPOLOGIES_3D,
        },
        max_chips=16 * 16 * 24,
    ),
    'tpu-v6e-slice': Generation(
        'v6e',
        {
            'ct6e-standard-1t': ('1x1',),
            'ct6e-standard-4t': TOPOLOGIES_2D,
            'ct6e-standard-8t': ('2x4',),
        },
    ),
    'tpu7x': Generation(
        'tpu7x',
        {'tpu7x-standard-1t': ('1x1x1',), 'tpu7x-standard-4t': TOPOLOGIES_3D},
        max_chips=16 * 24 * 24,
        devices_per_chip=2,
    ),
}
"""Value of the node label cloud.google.com/gke-tpu-accelerator → generation."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice.

    Attributes:
      topology: name of the topology in `mi.estimate`, such as 'v5e:4x4'.
      machine: machine type of the hosts.
      hosts: number of hosts.
      chips_per_host: number of chips per host.
      devices: number of JAX devices.
    """

    topology: str
    machine: str
    hosts: int
    chips_per_host: int
    devices: int


def find_slice(kind: str, topology: str, chips_per_host: int = 0, num_hosts: int = 0) -> Slice:
    """Return a slice that GKE offers, with as few hosts as possible.

    Args:
      kind: a key of `GENERATIONS`.
      topology: a topology such as '4x4'.
      chips_per_host: number of chips per host, or 0 for any number.
      num_hosts: number of hosts, or 0 for any number.

    Raises:
      UserError: if GKE does not offer this slice. The message names the available ones.
    """
    generation = GENERATIONS.get(kind)
    if generation is None:
        raise UserError(f'--tpu={kind}: {suggest(kind, GENERATIONS)}')

    # Find the machine types that offer it.
    offers = generation.machines.items()
    machines = [machine for machine, topologies in offers if topology in topologies]
    if not machines and _consists_of_cubes(topology, generation.max_chips):
        machines = [machine for machine, topologies in offers if topologies == TOPOLOGIES_3D]
    if not machines:
        raise UserError(
            f'--topology={topology}: expected a slice of {kind} that GKE offers: '
            f'{generation.describe_topologies()}'
        )

    # Choose the slice with the fewest hosts that has the hosts and chips asked for.
    total_chips = math.prod(map(int, topology.split('x')))
    slices = [
        Slice(
            f'{generation.name}:{topology}',
            machine,
            total_chips // count_chips(machine),
            count_chips(machine),
            total_chips * generation.devices_per_chip,
        )
        for machine in machines
    ]
    fitting = [
        candidate
        for candidate in slices
        if chips_per_host in (0, candidate.chips_per_host) and num_hosts in (0, candidate.hosts)
    ]
    if not fitting:
        flags = [f'--processes={num_hosts}'] if num_hosts else []
        flags += [f'--gpus={chips_per_host}'] if chips_per_host else []
        choices = ' or '.join(
            f'--processes={candidate.hosts} --gpus={candidate.chips_per_host}'
            for candidate in slices
        )
        raise UserError(
            f'{" ".join(flags)}: expected {choices}, the number of hosts and of chips per host '
            f'in a {topology} slice of {kind}. Try leaving out both flags'
        )
    return min(fitting, key=lambda candidate: candidate.hosts)


def count_chips(machine: str) -> int:
    """Return the number of chips of a machine type, such as 4 for 'ct5lp-hightpu-4t'."""
    return int(machine.rpartition('-')[2].removesuffix('t'))


def _consists_of_cubes(topology: str, max_chips: int) -> bool:
    """Return whether a topology is made of cubes and has at most `max_chips` chips."""
    sides = [int(side) if side.isdecimal() else 0 for side in topology.split('x')]
    return (
        len(sides) == 3
        and all(side and side % CUBE_SIDE == 0 for side in sides)
        and sides == sorted(sides)
        and math.prod(sides) <= max_chips
    )
