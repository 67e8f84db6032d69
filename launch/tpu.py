"""The TPU slices that GKE offers: from a kind and a topology to hosts and chips of each host.

Source: "Plan TPUs in GKE", https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, and
the pages of each generation beside it, https://docs.cloud.google.com/tpu/docs/v5e and so on. The
slice of two chips of v5p and the largest one of v4 are recalled.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from mi.config import UserError, suggest

FLAT = ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4')
CUBE = 4  # chips along each side of a cube, which slices of more than one are made of


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of TPUs.

    Attributes:
      name: in the topologies that `mi.estimate` compiles for, as 'v5e' in 'v5e:4x4'.
      machines: machine type → the topologies that are made of it; its last number counts chips.
      largest: chips of the largest slice made of cubes; 0 if all topologies are in `machines`.
      devices: of a chip, as JAX counts them.
    """

    name: str
    machines: Mapping[str, Sequence[str]]
    largest: int = 0
    devices: int = 1

    def topologies(self) -> str:
        """Return the topologies in words."""
        names = list(dict.fromkeys(t for machine in self.machines.values() for t in machine))
        if not self.largest:
            return f'{", ".join(names[:-1])} or {names[-1]}'
        return (
            f'{", ".join(names)}, or AxBxC of multiples of {CUBE} with A ≤ B ≤ C and at most '
            f'{self.largest:,} chips'
        )


GENERATIONS = {
    'tpu-v4-podslice': Generation('v4', {'ct4p-hightpu-4t': CUBES}, largest=12 * 16 * 16),
    'tpu-v5-lite-podslice': Generation(
        'v5e',
        {'ct5lp-hightpu-1t': ('1x1',), 'ct5lp-hightpu-4t': FLAT, 'ct5lp-hightpu-8t': ('2x4',)},
    ),
    'tpu-v5p-slice': Generation(
        'v5p',
        {
            'ct5p-hightpu-1t': ('1x1x1',),
            'ct5p-hightpu-2t': ('2x1x1',),
            'ct5p-hightpu-4t': CUBES,
        },
        largest=16 * 16 * 24,
    ),
    'tpu-v6e-slice': Generation(
        'v6e',
        {'ct6e-standard-1t': ('1x1',), 'ct6e-standard-4t': FLAT, 'ct6e-standard-8t': ('2x4',)},
    ),
    'tpu7x': Generation(
        'tpu7x',
        {'tpu7x-standard-1t': ('1x1x1',), 'tpu7x-standard-4t': CUBES},
        largest=16 * 24 * 24,
        devices=2,
    ),
}
"""Word of the node label cloud.google.com/gke-tpu-accelerator → its generation."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice.

    Attributes:
      topology: as `mi.estimate` has it, such as 'v5e:4x4'.
      machine: the machine type of its hosts.
      hosts: how many.
      chips: of each host.
      devices: of the slice, as JAX counts them.
    """

    topology: str
    machine: str
    hosts: int
    chips: int
    devices: int


def find_slice(kind: str, topology: str, chips: int = 0, hosts: int = 0) -> Slice:
    """Return a slice that GKE offers; of several machine types, that with the fewest hosts.

    Args:
      kind: of `GENERATIONS`.
      topology: such as '4x4'.
      chips: of each host, where the user has said so; 0 where not.
      hosts: likewise.

    Raises:
      UserError: if GKE has no such slice, with those that it has.
    """
    generation = GENERATIONS.get(kind)
    if generation is None:
        raise UserError(f'--tpu={kind}: {suggest(kind, GENERATIONS)}')
    machines = [name for name, made in generation.machines.items() if topology in made]
    if not machines and _has_cubes(topology, generation.largest):
        machines = [name for name, made in generation.machines.items() if made == CUBES]
    if not machines:
        raise UserError(
            f'--topology={topology}: expected a slice of {kind} that GKE has: '
            f'{generation.topologies()}'
        )
    total = math.prod(map(int, topology.split('x')))
    slices = [
        Slice(
            f'{generation.name}:{topology}',
            machine,
            total // chips_of(machine),
            chips_of(machine),
            total * generation.devices,
        )
        for machine in machines
    ]
    fitting = [s for s in slices if chips in (0, s.chips) and hosts in (0, s.hosts)]
    if not fitting:
        given = [f'--processes={hosts}'] * bool(hosts) + [f'--gpus={chips}'] * bool(chips)
        choices = ' or '.join(f'--processes={s.hosts} --gpus={s.chips}' for s in slices)
        raise UserError(
            f'{" ".join(given)}: expected {choices}, the hosts and the chips of each of a '
            f'{topology} slice of {kind}. Try leaving both out'
        )
    return min(fitting, key=lambda s: s.hosts)


def chips_of(machine: str) -> int:
    """Return the chips of a machine type: 'ct5lp-hightpu-4t' → 4."""
    return int(machine.rpartition('-')[2].removesuffix('t'))


def _has_cubes(topology: str, largest: int) -> bool:
    """Return whether it is a slice of several cubes, of at most so many chips."""
    sides = [int(side) if side.isdecimal() else 0 for side in topology.split('x')]
    return (
        len(sides) == 3
        and all(side and side % CUBE == 0 for side in sides)
        and sides == sorted(sides)
        and math.prod(sides) <= largest
    )
