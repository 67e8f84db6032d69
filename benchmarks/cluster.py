"""An analytic model of the time and memory of a training step on many chips.

    products    Σ times · max(FLOPs / peak, bytes / bandwidth), divided by the share reached
    optimizer   bytes of parameters, gradients and moments read and written, divided by bandwidth
    network     ring all-reduce over D replicas, gather and scatter over the F chips of a replica

There are N = D · F chips. Parameters, gradients and moments are f32 (4 bytes) and sharded over F
chips (`train.fsdp`). In a ring of n chips, each sends (n − 1)/n of an array to gather or scatter
it, and twice as much to all-reduce it. `Step.seconds` assumes that nothing overlaps. With perfect
overlap, a step would take as long as its largest part.
"""

import dataclasses
from collections.abc import Callable, Sequence

from mi.counting import Product
from mi.kernels.linear import Platform

FLOAT_BYTES = 4  # bytes of a parameter, of its gradient and of each moment
# Adam: parameter, gradient and two moments are read, all but the gradient written; the norm for
# clipping reads the gradient once more.
OPTIMIZER_PASSES = 8
STORED_COPIES = 4  # parameter, gradient, two moments


@dataclasses.dataclass(frozen=True)
class Chip:
    """The specification of an accelerator, as published by its vendor.

    Attributes:
      name: substring of the device kind that JAX reports.
      flops: peak FLOP/s of dense bf16 products.
      flops_f32: peak FLOP/s of dense f32 products at JAX's default precision.
      memory: memory size in bytes.
      bandwidth: memory bandwidth in bytes per second.
      link: total bandwidth to the other chips of the node, in bytes per second.
      node: number of chips per node, or per slice of directly connected chips.
      network: bandwidth to other nodes, in bytes per second.
      cores: number of host processor cores per chip.
      source: source of the numbers.
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

    @property
    def platform(self) -> Platform:
        """The platform that JAX reports: 'gpu' or 'tpu'."""
        return 'tpu' if self.name.startswith('TPU') else 'gpu'


# Half of NVLink's figure goes each way. A DGX has a network card of 400 Gb/s for each GPU, and 112
# cores for eight. JAX computes f32 products in TF32 on these GPUs. TPUs use three to six passes of
# bf16 only at a higher precision, so the default f32 has the speed of bf16.
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
    """The work of one chip in a training step.

    Attributes:
      products: products of the forward and backward pass.
      activations: bytes that the forward pass saves for the backward pass.
    """

    products: Sequence[Product]
    activations: int


@dataclasses.dataclass(frozen=True)
class Job:
    """A training run.

    Attributes:
      name: title for tables.
      parameters: number of parameters.
      units: number of tokens or environment steps that a row contributes to a training step.
      total: number of tokens or environment steps in the run.
      work: function from the number of rows on a chip and its platform to the work of the chip.
    """

    name: str
    parameters: int
    units: int
    total: float
    work: Callable[[int, Platform], Work]


@dataclasses.dataclass(frozen=True)
class Step:
    """The cost of one training step on N chips. Seconds and bytes are per chip.

    Attributes:
      chips: number of chips, N.
      rows: number of rows in the batch, over all chips.
      memory: bytes in use.
      arithmetic: seconds in products limited by FLOP/s.
      reading: seconds in products limited by memory bandwidth.
      optimizer: seconds in the optimizer.
      traffic: bytes sent.
      network: seconds spent sending.
      units: number of tokens or environment steps, over all chips.
    """

    chips: int
    rows: int
    memory: float
    arithmetic: float
    reading: float
    optimizer: float
    traffic: float
    network: float
    units: int

    @property
    def seconds(self) -> float:
        """Seconds per step if nothing overlaps."""
        return sum(self.parts().values())

    @property
    def rate(self) -> float:
        """Tokens or environment steps per second."""
        return self.units / self.seconds

    def parts(self) -> dict[str, float]:
        """Return part → seconds."""
        return {
            'arithmetic': self.arithmetic,
            'memory': self.reading,
            'optimizer': self.optimizer,
            'network': self.network,
        }

    @property
    def bottleneck(self) -> str:
        """Name of the part that takes the most time."""
        parts = self.parts()
        return max(parts, key=lambda part: parts[part])


def estimate_roofline(
    products: Sequence[Product], chip: Chip, f32: bool = False
) -> tuple[float, float]:
    """Return the seconds in products limited by FLOP/s, and in those limited by bandwidth."""
    arithmetic_seconds = reading_seconds = 0.0
    peak = chip.flops_f32 if f32 else chip.flops
    for product in products:
        arithmetic, reading = product.flops / peak, product.bytes / chip.bandwidth
        if arithmetic >= reading:
            arithmetic_seconds += product.times * arithmetic
        else:
            reading_seconds += product.times * reading
    return arithmetic_seconds, reading_seconds


def compute_traffic(parameters: int, replicas: int, fsdp: int) -> tuple[float, float]:
    """Return the bytes that a chip sends per step, within its replica and between replicas.

    Within a replica, parameters are gathered for the forward and for the backward pass, and
    gradients are scattered. Between replicas, the gradient shard of each chip is all-reduced.
    """
    param_bytes = FLOAT_BYTES * parameters
    inner_bytes = 3 * (fsdp - 1) / fsdp * param_bytes
    outer_bytes = 2 * (replicas - 1) / replicas * param_bytes / fsdp
    return inner_bytes, outer_bytes


def ring_bandwidth(chip: Chip, span: int) -> float:
    """Return the bandwidth of a ring over `span` adjacent chips, in bytes per second.

    A ring that spans several nodes consists of one ring for each chip of a node, so that it uses
    all network cards. It is not faster than the links inside a node.
    """
    return chip.link if span <= chip.node else min(chip.link, chip.network * chip.node)


def estimate_step(
    job: Job, chip: Chip, chips: int, rows: int, fsdp: int = 1, share: float = 1.0
) -> Step:
    """Estimate one training step on `chips` chips.

    Args:
      job: the training run.
      chip: the accelerator.
      chips: number of chips, N.
      rows: number of rows in the batch, a multiple of N.
      fsdp: number of chips that share one copy of the parameters, F, which divides N.
      share: fraction of the roofline that products reach on one chip.

    Raises:
      ValueError: if `chips` does not divide `rows`, or `fsdp` does not divide `chips`.
    """
    if rows % chips or chips % fsdp:
        raise ValueError(
            f'rows = {rows}, chips = {chips}, fsdp = {fsdp}: expected rows to be a multiple of '
            f'chips, and chips to be a multiple of fsdp'
        )
    chip_work = job.work(rows // chips, chip.platform)
    arithmetic, reading = estimate_roofline(chip_work.products, chip)
    inner_bytes, outer_bytes = compute_traffic(job.parameters, chips // fsdp, fsdp)
    messages = 3 * (fsdp - 1) + 2 * (chips // fsdp - 1)
    seconds = inner_bytes / ring_bandwidth(chip, fsdp) + outer_bytes / ring_bandwidth(chip, chips)
    return Step(
        chips=chips,
        rows=rows,
        memory=STORED_COPIES * FLOAT_BYTES * job.parameters / fsdp + chip_work.activations,
        arithmetic=arithmetic / share,
        reading=reading / share,
        optimizer=OPTIMIZER_PASSES * FLOAT_BYTES * job.parameters / fsdp / chip.bandwidth,
        traffic=inner_bytes + outer_bytes,
        network=seconds + messages * LATENCY,
        units=rows * job.units,
    )


def estimate_hours(job: Job, step: Step) -> float:
    """Return the duration of a run in hours, at the rate of the given step."""
    return job.total / step.rate / 3600
