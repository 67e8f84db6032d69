"""One training step on many chips, on paper: products, optimiser, network, memory.

    products    Σ times · max(FLOPs / peak, bytes / bandwidth), over share of it that is reached
    optimiser   bytes of parameters, gradients and moments that a step reads and writes / bandwidth
    network     ring all-reduce over D replicas, gather and scatter over the F chips of a replica

N = D · F chips; parameters, gradients and moments are f32 (4 bytes), split over F (`train.fsdp`).
A ring over n chips sends (n − 1)/n of an array to gather or to scatter it, and twice that to reduce
it everywhere. Nothing overlaps: `Step.seconds` is the sum, and its largest part what it would be if
everything did.
"""

import dataclasses
from collections.abc import Callable, Sequence

from mi.counting import Product

FLOAT = 4  # bytes of a parameter, of its gradient and of each moment
# Adam: parameter, gradient and two moments are read, all but the gradient written; the norm for
# clipping reads the gradient once more.
OPTIMISER_PASSES = 8
STORED = 4  # parameter, gradient, two moments


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a vendor says of an accelerator.

    Attributes:
      name: as it stands in the name of the device that JAX reports.
      flops, flops_f32: peak of bf16 products, and of f32 ones as JAX makes them by default; dense.
      memory: bytes.
      bandwidth: of the memory, bytes per second.
      link: bytes per second that it sends to the chips of its node, all together.
      node: chips of a node, or of a slice whose chips are wired to each other.
      network: bytes per second that it sends to other nodes.
      cores: of the host's processors, a chip.
      source: where these come from.
    """

    name: str
    flops: float
    flops_f32: float
    memory: float
    bandwidth: float
    link: float
    node: int
    network: float
    cores: int
    source: str


# Half of NVLink's figure goes each way. A DGX has a network card of 400 Gb/s for each GPU, and 112
# cores for eight. For f32 products JAX uses TF32 on these GPUs; TPUs make them in three to six
# passes of bf16 only if asked to, so that their f32 is bf16 here.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            'A100', 312e12, 156e12, 80e9, 2.039e12, 300e9, 8, 25e9, 16,
            'NVIDIA A100 80GB SXM datasheet; DGX A100 datasheet (200 Gb/s a GPU, 128 cores)',
        ),
        Chip(
            'H100', 989e12, 494e12, 80e9, 3.35e12, 450e9, 8, 50e9, 14,
            'NVIDIA H100 SXM datasheet (without sparsity); DGX H100 datasheet',
        ),
        Chip(
            'H200', 989e12, 494e12, 141e9, 4.8e12, 450e9, 8, 50e9, 14,
            'NVIDIA H200 SXM datasheet (without sparsity); DGX H200 datasheet',
        ),
        Chip(
            'TPU v5 lite', 197e12, 197e12, 16e9, 819e9, 200e9, 256, 3.125e9, 28,
            'Cloud TPU documentation, v5e: ICI 400 GB/s both ways; pod of 256, 6.4 Tb/s outside',
        ),
        Chip(
            'TPU v6 lite', 918e12, 918e12, 32e9, 1.638e12, 400e9, 256, 12.5e9, 45,
            'Cloud TPU documentation, v6e: ICI 800 GB/s both ways, pod of 256, 180 vCPUs for 4 '
            'chips; 100 Gb/s a chip outside, recalled',
        ),
        Chip(
            'TPU v5p', 459e12, 459e12, 95e9, 2.765e12, 600e9, 8960, 6.25e9, 52,
            'Cloud TPU documentation, v5p: ICI 1200 GB/s both ways, 208 vCPUs for 4 chips',
        ),
    )
}  # fmt: skip
LATENCY = 3e-6  # seconds of one message of a ring; assumed, not measured


@dataclasses.dataclass(frozen=True)
class Work:
    """What one chip does of a step.

    Attributes:
      products: forward and backward.
      activations: bytes kept from the forward to the backward pass.
    """

    products: Sequence[Product]
    activations: int


@dataclasses.dataclass(frozen=True)
class Job:
    """A training run.

    Attributes:
      name: in words.
      parameters: P.
      units: of one row in one step: its tokens, or its steps of an environment.
      total: units of the whole run.
      work: rows of a chip → its work.
    """

    name: str
    parameters: int
    units: int
    total: float
    work: Callable[[int], Work]


@dataclasses.dataclass(frozen=True)
class Step:
    """One step on N chips; seconds and bytes are those of each chip.

    Attributes:
      chips: N.
      rows: of the batch, all of them.
      memory: bytes.
      arithmetic, reading: seconds of the products that are bound by FLOPs, and by memory.
      optimiser: seconds.
      traffic: bytes that it sends.
      network: seconds.
      units: of the whole step.
    """

    chips: int
    rows: int
    memory: float
    arithmetic: float
    reading: float
    optimiser: float
    traffic: float
    network: float
    units: int

    @property
    def seconds(self) -> float:
        return sum(self.parts().values())

    @property
    def rate(self) -> float:
        """Units per second."""
        return self.units / self.seconds

    def parts(self) -> dict[str, float]:
        return {
            'arithmetic': self.arithmetic,
            'memory': self.reading,
            'optimiser': self.optimiser,
            'network': self.network,
        }

    @property
    def bottleneck(self) -> str:
        """The part that takes longest."""
        parts = self.parts()
        return max(parts, key=lambda name: parts[name])


def roofline(products: Sequence[Product], chip: Chip, f32: bool = False) -> tuple[float, float]:
    """Seconds of the products that are bound by arithmetic, and of those bound by memory."""
    bound = [0.0, 0.0]
    peak = chip.flops_f32 if f32 else chip.flops
    for product in products:
        arithmetic, reading = product.flops / peak, product.bytes / chip.bandwidth
        bound[reading > arithmetic] += product.times * max(arithmetic, reading)
    return bound[0], bound[1]


def exchange(parameters: int, replicas: int, fsdp: int) -> tuple[float, float]:
    """Bytes that a chip sends in a step: within its replica, and between replicas.

    Within: parameters gathered for the forward and for the backward pass, gradients scattered.
    Between: its part of the gradient reduced over all replicas.
    """
    size = FLOAT * parameters
    within = 3 * (fsdp - 1) / fsdp * size
    between = 2 * (replicas - 1) / replicas * size / fsdp
    return within, between


def bandwidth(chip: Chip, span: int) -> float:
    """Bytes per second of a ring over chips of which `span` stand side by side.

    A ring that leaves the nodes is made of one ring for each chip of a node, so that all network
    cards are used, and is no faster than the links inside.
    """
    return chip.link if span <= chip.node else min(chip.link, chip.network * chip.node)


def step(job: Job, chip: Chip, chips: int, rows: int, fsdp: int = 1, share: float = 1.0) -> Step:
    """One step of `rows` rows on so many chips.

    Args:
      job: what is trained.
      chip: on which.
      chips: N.
      rows: of the batch; a multiple of N.
      fsdp: F, chips that share one copy of the parameters; a divisor of N.
      share: of the roofline's speed that products reach, as measured on one chip.

    Raises:
      ValueError: if rows or fsdp do not fit the chips.
    """
    if rows % chips or chips % fsdp:
        raise ValueError(f'{rows} rows on {chips} chips, {fsdp} to a replica: expected divisors')
    work = job.work(rows // chips)
    arithmetic, reading = roofline(work.products, chip)
    within, between = exchange(job.parameters, chips // fsdp, fsdp)
    messages = 3 * (fsdp - 1) + 2 * (chips // fsdp - 1)
    seconds = within / bandwidth(chip, fsdp) + between / bandwidth(chip, chips)
    return Step(
        chips=chips,
        rows=rows,
        memory=STORED * FLOAT * job.parameters / fsdp + work.activations,
        arithmetic=arithmetic / share,
        reading=reading / share,
        optimiser=OPTIMISER_PASSES * FLOAT * job.parameters / fsdp / chip.bandwidth,
        traffic=within + between,
        network=seconds + messages * LATENCY,
        units=rows * job.units,
    )


def hours(job: Job, step: Step) -> float:
    """Of the whole run."""
    return job.total / step.rate / 3600
