"""Analysis of a compiled program per device: FLOPs, bytes, collectives and kernels.

    compiled = jax.jit(step).lower(*shapes).compile()
    program = analyze(compiled)
    program.flops, program.collectives, program.bytes_sent

The analysis reads the optimized HLO of one device, `compiled.as_text()`, for a CPU, a TPU or a GPU.
The body of a loop counts once per iteration, whereas `compiled.cost_analysis()` counts it only
once. A conditional counts as its most expensive branch.
"""

import dataclasses
import math
import re
from collections import Counter

import jax

from mi.estimate import hlo, hlo_cost

KINDS = (
    'all-reduce',
    'all-gather',
    'reduce-scatter',
    'all-to-all',
    'ragged-all-to-all',
    'collective-permute',
    'collective-broadcast',
)
# Custom calls that may contain products without describing them in the text.
OPAQUE = re.compile('cudnn|cublas|onednn|tpu_custom_call|mosaic|triton|lapack|solver', re.I)
# Instructions that name, forward or await the results of others.
NO_KERNEL = {
    *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'domain'),
    *('partition-id', 'replica-id', 'optimization-barrier', 'add-dependency'),
    *('while', 'conditional', 'call', 'async', 'get-dimension-size'),
    *KINDS,
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Identical collectives of a program, with their number of executions.

    Attributes:
      kind: kind of the collective, one of `KINDS`.
      count: number of executions in one run of the program.
      bytes: output size of one execution on each device.
      group: number of devices that communicate with each other.
    """

    kind: str
    count: int
    bytes: int
    group: int

    @property
    def total(self) -> int:
        """Return the output bytes of all executions."""
        return self.count * self.bytes

    @property
    def bytes_sent(self) -> int:
        """Return the bytes that each device sends in all executions, assuming a ring."""
        return self.count * count_ring_bytes(self.kind, self.bytes, self.group)


@dataclasses.dataclass(frozen=True)
class Program:
    """The cost per device for one run of a compiled program.

    Attributes:
      flops: FLOPs of products and convolutions, 2·a·b·c for [a, b] and [b, c]. Products that the
        compiler turns into elementwise operations, such as those with a vector, are not counted.
      bytes_accessed: bytes of main memory that kernels read and write. A kernel that slices an
        array only reads the slice. Arrays in the vector memory of a TPU are not counted.
      cycles: cycles of all kernels, as estimated by a TPU's compiler, or None on other devices.
      collectives: the collectives, sorted by total size, largest first. Those of a single device
        send nothing and are omitted.
      kernels: number of launches by opcode ('fusion', 'custom-call', 'dot', 'copy', …), not
        counting instructions inside other kernels.
      sources: for each JAX operation, named with its modules, the number of launches and the bytes
        accessed by the kernels that end in it.
      unknown_loops: loops whose trip count depends on data, so that their bodies count once.
      uncounted_calls: targets of custom calls whose products, if any, are not in `flops`.
    """

    flops: int
    bytes_accessed: int
    cycles: int | None
    collectives: tuple[Collective, ...]
    kernels: dict[str, int]
    sources: dict[str, tuple[int, int]]
    unknown_loops: tuple[str, ...]
    uncounted_calls: tuple[str, ...]

    @property
    def bytes_sent(self) -> int:
        """Return the bytes that each device sends to others, assuming rings."""
        return sum(collective.bytes_sent for collective in self.collectives)


def count_ring_bytes(kind: str, size: int, group: int) -> int:
    """Return the bytes that each of `group` devices sends for an output of `size` bytes.

    An array travels around the ring in `group` parts. An all-gather and a reduce-scatter forward
    each part `group` − 1 times. An all-reduce is a reduce-scatter followed by an all-gather.
    """
    if kind == 'all-reduce':
        return 2 * (group - 1) * size // group
    if kind == 'reduce-scatter':
        return (group - 1) * size
    if kind in ('collective-permute', 'collective-broadcast'):
        return size
    return (group - 1) * size // group


def analyze(compiled: jax.stages.Compiled) -> Program:
    """Analyze the program that each device runs.

    Raises:
      ValueError: if the executable has no HLO text.
    """
    hlo_text = compiled.as_text()
    if hlo_text is None:
        raise ValueError(
            'the executable has no HLO text: expected one compiled by XLA. Try another backend'
        )
    return analyze_text(hlo_text)


def analyze_text(hlo_text: str) -> Program:
    """Analyze the text of optimized HLO."""
    # Start at the entry, whose arguments are data.
    module = hlo.parse(hlo_text)
    tally = _Reader(module).read(module.entry, ())
    collectives = [
        Collective(kind, count, output_bytes, group)
        for (kind, output_bytes, group), count in tally.collectives.items()
    ]
    return Program(
        flops=tally.flops,
        bytes_accessed=tally.bytes_accessed,
        cycles=tally.cycles or None,
        collectives=tuple(sorted(collectives, key=lambda c: (-c.total, c.kind))),
        kernels=dict(sorted(tally.kernels.items())),
        sources={name: (count, tally.traffic[name]) for name, count in tally.sources.items()},
        unknown_loops=tuple(sorted(tally.unknown_loops)),
        uncounted_calls=tuple(sorted(tally.uncounted_calls)),
    )


@dataclasses.dataclass
class _Tally:
    """Sums over the instructions in a computation and in the computations that it calls."""

    flops: int = 0
    bytes_accessed: int = 0
    cycles: int = 0
    collectives: Counter[tuple[str, int, int]] = dataclasses.field(default_factory=Counter)
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    sources: Counter[str] = dataclasses.field(default_factory=Counter)
    traffic: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown_loops: set[str] = dataclasses.field(default_factory=set)
    uncounted_calls: set[str] = dataclasses.field(default_factory=set)

    def add(self, other: '_Tally', times: int = 1) -> None:
        self.flops += times * other.flops
        self.bytes_accessed += times * other.bytes_accessed
        self.cycles += times * other.cycles
        if times:
            for collective_key, count in other.collectives.items():
                self.collectives[collective_key] += times * count
            for opcode, count in other.kernels.items():
                self.kernels[opcode] += times * count
            for source, count in other.sources.items():
                self.sources[source] += times * count
                self.traffic[source] += times * other.traffic[source]
        self.unknown_loops |= other.unknown_loops
        self.uncounted_calls |= other.uncounted_calls

    @property
    def price(self) -> tuple[int, int, int]:
        """Return the sort key of branches: FLOPs, then bytes of collectives, then kernels."""
        bytes_moved = sum(
            count * output_bytes for (_, output_bytes, _), count in self.collectives.items()
        )
        return self.flops, bytes_moved, sum(self.kernels.values())


class _Reader:
    """A reader that walks through the computations of a module in the order of execution."""

    def __init__(self, module: hlo.Module) -> None:
        self.module = module
        self.constants = hlo.Constants(module)
        self.memory = hlo_cost.Memory(module)
        self.tallies: dict[tuple[str, tuple[hlo.Value, ...], bool], _Tally] = {}

    def read(
        self, computation_name: str, arguments: tuple[hlo.Value, ...], is_fused: bool = False
    ) -> _Tally:
        """Return the sums over a computation that is called with these arguments.

        Args:
          computation_name: name of the computation.
          arguments: known values of its arguments.
          is_fused: whether it is part of a kernel, so that its instructions are not kernels.
        """
        # Known arguments decide how often loops run, so each combination is counted separately.
        call_key = computation_name, arguments, is_fused
        if call_key not in self.tallies:
            self.tallies[call_key] = _Tally()
            computation = self.module.computations[computation_name]
            for instruction in computation.instructions.values():
                self._add(self.tallies[call_key], computation, instruction, arguments, is_fused)
        return self.tallies[call_key]

    def _add(
        self,
        tally: _Tally,
        computation: hlo.Computation,
        instruction: hlo.Instruction,
        arguments: tuple[hlo.Value, ...],
        is_fused: bool,
    ) -> None:
        if instruction.opcode.endswith(('-done', '-update')):
            return  # its start has counted it
        opcode = instruction.opcode.removesuffix('-start')

        # The instruction as a kernel; within a fusion it is part of another one.
        if not is_fused and opcode not in NO_KERNEL:
            tally.kernels[opcode] += 1
            num_bytes = self.memory.bytes_accessed(computation, instruction)
            tally.bytes_accessed += num_bytes
            tally.sources[instruction.operation or opcode] += 1
            tally.traffic[instruction.operation or opcode] += num_bytes
            tally.cycles += hlo_cost.get_estimated_cycles(instruction)

        # Other computations: a loop's body as often as it runs, of a conditional one branch.
        if opcode in ('while', 'conditional', 'call', 'fusion', 'async'):
            operands = tuple(
                self.constants.value(computation, operand, arguments)
                for operand in instruction.operands
            )
        if opcode == 'while':
            trip_count = self.constants.trip_count(instruction, operands[0])
            if trip_count is None:
                tally.unknown_loops.add(instruction.label)
            state = self.constants.invariants(instruction, operands[0])
            (body,) = instruction.called('body')
            tally.add(self.read(body, (state,), is_fused), 1 if trip_count is None else trip_count)
        elif opcode == 'conditional':
            branches = zip(instruction.branches(), operands[1:], strict=True)
            tallies = [self.read(branch, (state,), is_fused) for branch, state in branches]
            tally.add(max(tallies, key=lambda branch: branch.price))
        elif opcode in ('call', 'fusion', 'async'):
            for called_name in instruction.called('to_apply' if opcode == 'call' else 'calls'):
                tally.add(self.read(called_name, operands, is_fused or opcode == 'fusion'))

        # The work of the instruction itself.
        elif opcode in KINDS:
            if not _is_continued(computation, instruction):
                tally.collectives.update(_collectives(self.module, computation, instruction))
        elif opcode in ('dot', 'convolution', 'custom-call'):
            flops = hlo_cost.count_product_flops(computation, instruction)
            if flops is None and OPAQUE.search(instruction.target):
                tally.uncounted_calls.add(instruction.target)
            tally.flops += flops or 0


def _collectives(
    module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction
) -> dict[tuple[str, int, int], int]:
    """Return {(kind, output bytes, group size): 1}, or {} for a group of one device."""
    kind = instruction.opcode.removesuffix('-start')
    output_bytes = sum(shape.bytes for shape in instruction.shapes)
    group_size = _group(instruction, module.num_devices)
    # On TPU a reduce-scatter may be an all-reduce whose fusion keeps only a part.
    root = computation.instructions[computation.root]
    is_scattered = computation.name.startswith('all-reduce-scatter')
    if kind == 'all-reduce' and is_scattered and root.opcode != 'all-reduce':
        kind, output_bytes = 'reduce-scatter', sum(shape.bytes for shape in root.shapes)
    return {(kind, output_bytes, group_size): 1} if group_size > 1 else {}


def _group(instruction: hlo.Instruction, num_devices: int) -> int:
    """Return the number of devices that communicate with each other."""
    # HLO writes groups as pairs, as a grid, as lists or as axes of a mesh.
    attributes = instruction.attributes
    if match := re.search(r'source_target_pairs=\{(.*?)\}\}', attributes):
        device_pairs = re.findall(r'(\d+),(\d+)', match[1])
        return max(1, sum(source != target for source, target in device_pairs))
    if match := re.search(r'replica_groups=\[(\d+),(\d+)\]', attributes):
        return int(match[2])
    if match := re.search(r'replica_groups=\{\{([\d,]*)\}', attributes):
        return len(match[1].split(','))
    if match := re.search(r'replica_groups=mesh\[(.*?)\] \{(.*?)\}', attributes):  # jax 0.12
        axis_sizes = dict(re.findall(r"\\?'(\w+)\\?'=(\d+)", match[1]))
        return math.prod(int(axis_sizes[axis]) for axis in re.findall(r"\\?'(\w+)\\?'", match[2]))
    return num_devices


def _is_continued(computation: hlo.Computation, instruction: hlo.Instruction) -> bool:
    """Return whether an instruction only continues a collective that a TPU started elsewhere."""
    if 'async_collective_fusion_config' not in instruction.attributes:
        return False
    calls = computation.instructions.values()
    return not any(call.target == 'AsyncCollectiveStart' for call in calls)
